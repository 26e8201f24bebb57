"""The egress proxy: what the rules grant gets through, whole and once; all else is refused and written down."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.egress_rules import Egress, parse_rules
from sandboxd.network import egress, http, streams
from tests.daemon.proxies import PUBLIC, Client, Recorder, egressing, said_to

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def echo(accepted: socket.socket) -> None:
    """Answers with what it heard, once the other side has ended."""
    data = b""
    while part := await streams.receive(accepted):
        data += part
    await streams.send(accepted, b"heard " + data)


def get(url: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {url} HTTP/1.1", "Host: good.example", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


async def test_a_plain_request_gets_through_and_is_counted() -> None:
    server = Recorder()
    async with egressing(server) as proxy:
        answer = await said_to(proxy.port, get("http://good.example/a?b=c", "Accept: */*"))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"hello")
        assert server.heard[0].startswith(b"GET /a?b=c HTTP/1.1\r\nhost: good.example\r\n")
        assert (proxy.ledger.requests, proxy.ledger.denied) == (1, 0)
        assert proxy.ledger.traffic.received_bytes == 5


async def test_what_was_said_to_the_proxy_stays_there() -> None:
    """Its credentials are nobody else's, and the Host is that of the URL, whatever the client claims."""
    server = Recorder()
    async with egressing(server) as proxy:
        await said_to(
            proxy.port,
            b"GET http://good.example/ HTTP/1.1\r\nHost: evil.example\r\nProxy-Authorization: Basic c2VjcmV0\r\n"
            b"Connection: close, X-Mine\r\nX-Mine: 1\r\nX-Yours: 2\r\n\r\n",
        )
    heard = server.heard[0].lower()
    assert b"host: good.example\r\n" in heard
    assert b"x-yours: 2" in heard
    for word in (b"evil", b"proxy-", b"x-mine"):
        assert word not in heard


async def test_a_tunnel_passes_bytes_both_ways_and_the_end_of_one_of_them() -> None:
    async with egressing(echo) as proxy, Client(proxy.port) as client:
        await client.say(b"CONNECT good.example:443 HTTP/1.1\r\nHost: good.example:443\r\n\r\nearly ")
        assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await client.say(b"late")
        client.writer.write_eof()
        assert await client.rest() == b"heard early late"
        assert proxy.ledger.traffic.sent_bytes == len(b"early late")
        assert proxy.ledger.traffic.received_bytes == len(b"heard early late")


@pytest.mark.parametrize(
    "request_",
    [
        get("http://other.example/"),
        get("http://good.example:8080/"),
        get("http://127.0.0.1/"),
        get("http://[::1]/"),
        get("http://169.254.169.254/latest/meta-data/"),
        b"CONNECT other.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT good.example:22 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT 8.8.8.8:53 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_what_no_rule_grants_is_refused_and_written_down_with_the_command(request_: bytes) -> None:
    server = Recorder()
    async with egressing(server) as proxy:
        answer = await said_to(proxy.port, request_)
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert (b"sandboxctl network box --allow" in answer) is (b"169.254" not in request_)
        (denial,) = proxy.ledger.denials
        assert (denial.command, proxy.ledger.denied) == ("0123456789ab curl", 1)
        assert denial.host.encode() in request_
        assert proxy.outside.looked_up == []
    assert server.heard == []


@pytest.mark.parametrize("method", ["DELETE", "delete", "Delete"])
async def test_a_method_that_is_denied_is_denied_in_any_letters(method: str) -> None:
    """There are servers that make no difference."""
    server = Recorder()
    async with egressing(server) as proxy:
        proxy.rules = Egress(allow=parse_rules(["good.example"]), deny=parse_rules(["DELETE good.example"]))
        assert (await said_to(proxy.port, get("http://good.example/"))).startswith(b"HTTP/1.1 200 ")
        assert (await said_to(proxy.port, get("http://good.example/", method=method))).startswith(b"HTTP/1.1 403 ")
    assert len(server.heard) == 1


@pytest.mark.parametrize("answer", [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], [PUBLIC, "127.0.0.1"], ["::1"]])
async def test_a_granted_name_that_leads_to_a_private_place_leads_nowhere(answer: list[str]) -> None:
    """Even one such address among public ones: whoever answers so wants to be let through."""
    server = Recorder()
    async with egressing(server, names={"good.example": [answer]}) as proxy:
        assert (await said_to(proxy.port, get("http://good.example/"))).startswith(b"HTTP/1.1 403 ")
        assert proxy.outside.connected_to == []
        assert "no name may lead" in proxy.ledger.denials[0].reason
    assert server.heard == []


async def test_a_name_that_leads_to_this_host_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's public address is public, and reaches all that listens on it."""
    async with egressing(Recorder()) as proxy:
        monkeypatch.setattr(proxy.outside, "own_addresses", lambda: frozenset({ipaddress.ip_address(PUBLIC)}))
        assert (await said_to(proxy.port, get("http://good.example/"))).startswith(b"HTTP/1.1 403 ")


async def test_a_name_server_that_changes_its_mind_is_not_asked_twice() -> None:
    """Rebinding: public when it is judged, private when it is connected to."""
    async with egressing(Recorder(), names={"good.example": [[PUBLIC], ["127.0.0.1"]]}) as proxy:
        assert (await said_to(proxy.port, get("http://good.example/"))).startswith(b"HTTP/1.1 200 ")
        assert proxy.outside.looked_up == ["good.example"]
        assert proxy.outside.connected_to == [ipaddress.ip_address(PUBLIC)]
        assert (await said_to(proxy.port, get("http://good.example/"))).startswith(b"HTTP/1.1 403 ")
        assert len(proxy.outside.connected_to) == 1


async def test_a_redirect_is_the_clients_to_follow_and_is_judged_again() -> None:
    redirect = b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
    async with egressing(Recorder(redirect)) as proxy:
        answer = await said_to(proxy.port, get("http://good.example/"))
        assert answer.startswith(b"HTTP/1.1 302 ")
        assert (await said_to(proxy.port, get("http://169.254.169.254/"))).startswith(b"HTTP/1.1 403 ")


async def test_rules_that_change_count_from_the_next_request_on() -> None:
    server = Recorder()
    keep = b"GET http://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n"
    async with egressing(server) as proxy, Client(proxy.port) as client:
        await client.say(keep)
        assert (await client.until(b"hello")).startswith(b"HTTP/1.1 200")
        proxy.rules = Egress()
        await client.say(keep)
        assert (await client.rest()).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"GET https://good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"GET http://user:word@good.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"GET http://good.example\\@evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"GET http://good.example#/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"GET http://good.example:80:80/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"GET http://good%2eexample/ HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"GET http:///path HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"CONNECT good.example HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"CONNECT http://good.example:443 HTTP/1.1\r\nHost: good.example\r\n\r\n",
        b"CONNECT good.example:443 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody",
        b"POST http://good.example/ HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nHost: x\r\n\r\n0",
        b"POST http://good.example/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST http://good.example/ HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST http://good.example/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\nhello",
        b"POST http://good.example/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST http://good.example/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST http://good.example/ HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello",
        b"GET http://good.example/ HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET http://good.example/\r\nHost: x\r\n\r\n",
        b"GET http://good.example/ HTTP/1.1\r\nHost: x\r\nA: b\0c\r\n\r\n",
        b"GET http://good.example/ HTTP/1.1\r\nHost: x\r\nBad Name: c\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET http://good.example/ HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_what_two_readers_could_read_in_two_ways_is_refused_before_anybody_is_asked(request_: bytes) -> None:
    server = Recorder()
    async with egressing(server) as proxy:
        answer = await said_to(proxy.port, request_)
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
        assert answer.count(b"HTTP/1.1") == 1
        assert proxy.outside.connected_to == []
    assert server.heard == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from(
            [
                b"GET http://good.example/ HTTP/1.1\r\n",
                b"CONNECT evil.example:443 HTTP/1.1\r\n",
                b"Host: good.example\r\n",
                b"Content-Length: 3\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"\r\n",
                b"3\r\nabc\r\n",
                b"0\r\n\r\n",
                b"GET http://evil.example/ HTTP/1.1\r\n",
                b" folded\r\n",
                b"\n",
            ]
        ),
        max_size=10,
    ).map(b"".join)
)
def test_nothing_that_is_said_reaches_a_host_that_no_rule_grants(data: bytes) -> None:
    """Whatever is smuggled into one request: each goes over a connection of its own, to a host that was judged."""

    async def attempt() -> None:
        server = Recorder()
        async with egressing(server) as proxy, Client(proxy.port) as client:
            await client.say(data)
            client.writer.write_eof()
            await client.rest()
            assert set(proxy.outside.looked_up) <= {"good.example"}
            assert b"evil" not in b"".join(server.heard)

    asyncio.run(attempt())


@pytest.mark.parametrize("size_bytes", [0, http.HEAD_BYTES_MAX // http.HEAD_LINES_MAX])
async def test_a_head_of_too_many_lines_or_bytes_is_refused_for_what_it_is(size_bytes: int) -> None:
    """Thousands of empty headers are few bytes, and much to look at."""
    server = Recorder()
    lines = [f"X-{number}: {'a' * size_bytes}" for number in range(http.HEAD_LINES_MAX - 2)]
    async with egressing(server) as proxy:
        # With the two that every request here has.
        for more, status in ([], b"200" if size_bytes == 0 else b"431"), (["X: y"], b"431"):
            answer = await said_to(proxy.port, get("http://good.example/", *lines, *more))
            assert answer.startswith(b"HTTP/1.1 " + status), answer[:100]
    assert len(server.heard) == (size_bytes == 0)


@pytest.mark.parametrize("end", [b"\r\n", b"\n", b""])
@pytest.mark.parametrize("line", [b"a:", b"a: " + b"b" * http.HEAD_BYTES_MAX])
async def test_a_head_that_is_too_long_is_refused_before_anybody_reads_its_lines(line: bytes, end: bytes) -> None:
    """Whoever reads sixty thousand of them first, keeps all other connections waiting for it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        peer = http.Peer(ours, h11.SERVER)
        head = b"GET http://good.example/ HTTP/1.1\r\n" + (line + b"\r\n") * (60_000 if len(line) == 2 else 1) + end
        peer.wire.receive_data(head)
        with pytest.raises(http.BadMessage) as caught:
            await http.next_request(peer)
        assert caught.value.status == 431
        assert peer.wire.their_state is h11.IDLE


@pytest.mark.parametrize("held_back", [1, 2, 3, 4])
async def test_a_head_of_as_many_lines_as_may_be_is_taken_however_its_end_is_cut(held_back: int) -> None:
    """A line's end may be half of the blank line, and no line more."""
    lines = [f"X-{number}: y" for number in range(http.HEAD_LINES_MAX - 2)]
    data = get("http://good.example/", *lines)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        peer = http.Peer(ours, h11.SERVER)
        peer.wire.receive_data(data[:-held_back])
        theirs.sendall(data[-held_back:])
        request = await http.next_request(peer)
        assert request is not None
        assert len(request.headers) == http.HEAD_LINES_MAX


async def test_an_answer_of_too_many_header_lines_is_a_bad_gateway() -> None:
    many = b"".join(b"X-%d: y\r\n" % number for number in range(http.HEAD_LINES_MAX))
    async with egressing(Recorder(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n" + many + b"\r\n")) as proxy:
        answer = await said_to(proxy.port, get("http://good.example/"))
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert f"more than {http.HEAD_LINES_MAX} lines".encode() in answer


async def test_one_who_drips_is_let_go_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow loris takes a place for as long as it takes to say a head, and no longer."""
    monkeypatch.setattr(http, "HEAD_DEADLINE_S", 0.3)
    async with (
        egressing(Recorder(), connections_max=2) as proxy,
        Client(proxy.port) as first,
        Client(proxy.port) as second,
    ):
        for loris in (first, second):
            await loris.say(b"GET http://good.example/ HTTP/1.1\r\nA: ")
        # Both places are taken: this one waits at the door until they are let go.
        assert (await said_to(proxy.port, get("http://good.example/"))).startswith(b"HTTP/1.1 200 ")
        assert await first.rest() == b""
        assert await second.rest() == b""


async def test_ten_gibibytes_that_nobody_takes_are_not_taken_in() -> None:
    """Flow control: what upstream can push while the sandbox does not read is what the kernel's buffers hold."""
    pushed = 0
    stuck = asyncio.Event()

    async def pusher(accepted: socket.socket) -> None:
        nonlocal pushed
        await streams.receive(accepted)
        await streams.send(accepted, b"HTTP/1.1 200 OK\r\ncontent-length: 10737418240\r\n\r\n")
        chunk = bytes(1 << 20)
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await streams.send(accepted, chunk)
            except TimeoutError:
                stuck.set()
                return
            pushed += len(chunk)

    async with egressing(pusher) as proxy, Client(proxy.port) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.say(get("http://good.example/"))
        async with asyncio.timeout(60):
            await stuck.wait()
        assert pushed < 64 << 20


async def test_an_upstream_that_says_no_http_is_a_bad_gateway() -> None:
    for nonsense in (b"SSH-2.0-OpenSSH\r\n", b"", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"):
        async with egressing(Recorder(nonsense)) as proxy:
            assert (await said_to(proxy.port, get("http://good.example/"))).startswith(b"HTTP/1.1 502 ")


async def test_an_upstream_with_two_lengths_is_passed_on_with_one() -> None:
    two = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    async with egressing(Recorder(two)) as proxy:
        answer = await said_to(proxy.port, get("http://good.example/"))
        assert b"content-length" not in answer
        assert b"5\r\nhello\r\n0\r\n\r\n" in answer


async def test_an_answer_that_cannot_be_said_again_ends_the_connection_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A hostile upstream fills no log."""
    async with egressing(Recorder(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n")) as proxy:
        await said_to(proxy.port, get("http://good.example/"))
    assert "cannot serve" not in caplog.text


async def test_one_who_is_refused_over_and_over_is_counted_and_costs_one_look(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egress, "LOOK_PAUSE_S", 1000.0)
    async with egressing(Recorder()) as proxy:
        for _ in range(5):
            assert (await said_to(proxy.port, get("http://evil.example/"))).startswith(b"HTTP/1.1 403 ")
        assert proxy.ledger.denied == len(proxy.ledger.denials) == 5
        assert len(proxy.asked_for) == caplog.text.count("denied 0123456789ab curl") == 1


async def test_a_body_that_upstream_does_not_want_does_not_hold_its_answer_up() -> None:
    async with egressing(
        Recorder(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    ) as proxy:
        head = b"POST http://good.example/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nbegin"
        assert (await said_to(proxy.port, head)).startswith(b"HTTP/1.1 413 ")
