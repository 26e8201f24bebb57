"""What is added to requests on their way out: it arrives over TLS at the host that it is for, and nowhere else."""

from __future__ import annotations

import logging
import socket

import pytest

from sandboxd.egress_rules import Egress, parse_rules
from sandboxd.network import streams
from tests.daemon.proxies import AUTHORITY, door, injecting, said_to, tls_server

pytestmark = pytest.mark.anyio

CANARY = b"canary-e1b70c55"
SECRETS = {"token": CANARY + b"\n"}
RULE = "good.example Authorization: Bearer {token}"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authority of the tests' server is one of this system's, as far as this process goes."""
    monkeypatch.setenv("SSL_CERT_FILE", AUTHORITY)


class Plain:
    """A server without TLS that keeps what it heard."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    async def __call__(self, accepted: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data and (part := await streams.receive(accepted)):
            data += part
        self.heard.append(data)
        await streams.send(accepted, ANSWER)


def request(url: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    lines = [f"{method} {url} HTTP/1.1", "Host: good.example", "Connection: close", *headers, *length, "", ""]
    return "\r\n".join(lines).encode() + body


async def test_a_request_goes_on_over_tls_with_what_is_added_in_place_of_what_the_sandbox_said() -> None:
    async with tls_server(ANSWER) as server, injecting(server.port, RULE, secrets=SECRETS) as proxy:
        answer = await said_to(
            proxy.port,
            request(
                "http://good.example/a?b", "Authorization: mine", "AUTHORIZATION: too", method="POST", body=b"x" * 9
            ),
        )
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"hello")
    (heard,) = server.heard
    assert heard.startswith(b"POST /a?b HTTP/1.1\r\nhost: good.example\r\n")
    assert heard.endswith(b"\r\n\r\n" + b"x" * 9)
    assert heard.lower().count(b"authorization: bearer " + CANARY + b"\r\n") == 1
    assert b"mine" not in heard
    assert b"too" not in heard
    assert CANARY not in answer


@pytest.mark.parametrize("spelling", ["X_Key", "x-key", "X-KEY"])
async def test_a_header_in_another_spelling_is_replaced_too(spelling: str) -> None:
    """Behind a gateway of old, ``X_Key`` and ``X-Key`` are one variable, and the last of them wins."""
    rule = "good.example X-Key: {token}"
    async with tls_server(ANSWER) as server, injecting(server.port, rule, secrets=SECRETS) as proxy:
        await said_to(proxy.port, request("http://good.example/", f"{spelling}: mine"))
    assert b"mine" not in server.heard[0]


async def test_large_bodies_pass_whole_both_ways() -> None:
    body = bytes(range(256)) * 8192
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with tls_server(answer) as server, injecting(server.port, RULE, secrets=SECRETS) as proxy:
        heard = await said_to(proxy.port, request("http://good.example/", method="PUT", body=body))
        assert heard.endswith(body)
        assert server.heard[0].endswith(body)
        assert proxy.ledger.traffic.sent_bytes == proxy.ledger.traffic.received_bytes == len(body)


async def test_an_answer_without_a_length_that_is_cut_off_is_not_taken_for_whole() -> None:
    """Over TLS an end is said; whoever cuts the line cannot say it."""
    answer = b"HTTP/1.1 200 OK\r\n\r\nhalf"
    for cuts_off in (False, True):
        async with (
            tls_server(answer, cuts_off=cuts_off) as server,
            injecting(server.port, RULE, secrets=SECRETS) as proxy,
        ):
            heard = await said_to(proxy.port, request("http://good.example/"))
        assert heard.endswith(b"half\r\n0\r\n\r\n") is not cuts_off


@pytest.mark.parametrize("host", ["evil.example", "good.example.evil.example", "agood.example"])
async def test_a_host_that_resembles_gets_nothing(host: str) -> None:
    plain = Plain()
    async with door(plain) as (port, _):
        names = ("good.example", host)
        async with injecting(port, RULE, secrets=SECRETS, names=names, allow=["*"]) as proxy:
            answer = await said_to(proxy.port, request(f"http://{host}/", "Authorization: mine"))
    assert answer.endswith(b"hello")
    assert b"authorization: mine" in plain.heard[0].lower()
    assert CANARY not in plain.heard[0]


async def test_a_redirect_elsewhere_carries_nothing_along() -> None:
    """The proxy follows none: where the sandbox goes next is judged as any other request."""
    redirect = b"HTTP/1.1 302 Found\r\nlocation: http://evil.example/\r\ncontent-length: 0\r\n\r\n"
    names = ("good.example", "evil.example")
    async with (
        tls_server(redirect) as server,
        injecting(server.port, RULE, secrets=SECRETS, names=names, allow=["*"]) as proxy,
    ):
        answer = await said_to(proxy.port, request("http://good.example/"))
        assert answer.startswith(b"HTTP/1.1 302")
        assert CANARY not in answer
        assert len(server.heard) == 1


async def test_a_host_that_does_not_prove_who_it_is_hears_nothing() -> None:
    """A name server that lies, or somebody in between: the certificate is another's."""
    rule = "other.example Authorization: Bearer {token}"
    async with (
        tls_server(ANSWER) as server,
        injecting(server.port, rule, secrets=SECRETS, names=["other.example"], allow=["*"]) as proxy,
    ):
        answer = await said_to(proxy.port, request("http://other.example/"))
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"does not prove who it is" in answer
    assert server.heard == []


async def test_a_host_that_does_not_speak_tls_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandboxd.network.tls.HANDSHAKE_DEADLINE_S", 0.3)
    plain = Plain()
    async with door(plain) as (port, _), injecting(port, RULE, secrets=SECRETS) as proxy:
        answer = await said_to(proxy.port, request("http://good.example/"))
    assert answer.startswith(b"HTTP/1.1 502")
    assert all(CANARY not in heard and b"GET" not in heard for heard in plain.heard)


async def test_without_tls_only_where_the_rule_says_so() -> None:
    plain = Plain()
    rule = "http://good.example X-Key: {token}"
    async with door(plain) as (port, _), injecting(port, rule, secrets=SECRETS) as proxy:
        await said_to(proxy.port, request("http://good.example/"))
    assert b"x-key: " + CANARY + b"\r\n" in plain.heard[0]


async def test_a_rule_adds_and_grants_nothing() -> None:
    async with (
        tls_server(ANSWER) as server,
        injecting(server.port, RULE, secrets=SECRETS, allow=["GET good.example:443"]) as proxy,
    ):
        assert (await said_to(proxy.port, request("http://good.example/"))).startswith(b"HTTP/1.1 200")
        posted = await said_to(proxy.port, request("http://good.example/", method="POST", body=b"x"))
        assert posted.startswith(b"HTTP/1.1 403")
        proxy.rules = Egress(parse_rules(["good.example:80"]))
        assert b"--allow good.example:443" in await said_to(proxy.port, request("http://good.example/"))
    assert len(server.heard) == 1


@pytest.mark.parametrize("method", ["TRACE", "trace", "Track"])
async def test_a_method_that_is_answered_with_the_request_is_refused(method: str) -> None:
    """In any letters: there are servers that make no difference."""
    async with tls_server(ANSWER) as server, injecting(server.port, RULE, secrets=SECRETS) as proxy:
        answer = await said_to(proxy.port, request("http://good.example/", method=method))
        assert answer.startswith(b"HTTP/1.1 403")
        assert proxy.ledger.denied == 1
    assert server.heard == []


@pytest.mark.parametrize("value", [None, b"two\nlines-" + CANARY, b"nul\0" + CANARY])
async def test_a_secret_that_cannot_be_added_is_told_outside_by_its_name_and_inside_not_at_all(
    value: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {} if value is None else {"token": value}
    async with tls_server(ANSWER) as server, injecting(server.port, RULE, secrets=secrets) as proxy:
        with caplog.at_level(logging.DEBUG):
            answer = await said_to(proxy.port, request("http://good.example/"))
        (denial,) = proxy.ledger.denials
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"token" not in answer
    assert "'token'" in denial.reason
    assert server.heard == []
    assert CANARY.decode() not in f"{answer!r} {denial.reason} {caplog.text}"


async def test_a_tunnel_is_what_it_was() -> None:
    """What is encrypted by the sandbox cannot be added to."""
    plain = Plain()
    async with door(plain) as (port, _), injecting(port, RULE, secrets=SECRETS, allow=["good.example"]) as proxy:
        await said_to(proxy.port, b"CONNECT good.example:443 HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert plain.heard == [b"GET / HTTP/1.1\r\n\r\n"]


async def test_rules_count_from_the_next_request_on() -> None:
    async with tls_server(ANSWER) as server, injecting(server.port, RULE, secrets=SECRETS) as proxy:
        await said_to(proxy.port, request("http://good.example/"))
        proxy.secrets["token"] = b"renewed"
        await said_to(proxy.port, request("http://good.example/"))
    assert [b"Bearer renewed" in heard for heard in server.heard] == [False, True]
