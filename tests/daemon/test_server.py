"""The door, on a real socket: what goes in, what comes out, and whom a bad peer harms."""

import errno
import json
import logging
import os
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec import Struct

from sandboxd.connection import Connection, Context, Limits
from sandboxd.failures import NotFound
from sandboxd.framing import encode
from sandboxd.protocol import FRAME_BYTES_MAX, Acknowledged, CommandParams, CommandStarted, Params, SandboxGone
from tests.daemon.rpc_peer import PATIENCE_S, Peer, Witnesses, serving, serving_on

GONE = SandboxGone(id="s1", name=None, gone=False, timings_ms={})
LONG_WINDED = "long-winded"
RUN = {"sandbox": "box", "argv": ["true"], "stdio": "descriptors"}


class Handlers:
    """Small handlers, and what a test wants to know of them."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.may_finish = threading.Event()
        self.told_late = threading.Event()
        self.connection_closed = threading.Event()
        self.contexts: list[Context] = []
        self.paths: list[str] = []

    async def __call__(self, method: str, params: Params, context: Context) -> Struct:
        self.contexts.append(context)
        handler: Callable[[Params, Context], Any] = getattr(self, "on_" + method.replace("/", "_"))
        result: Struct = await handler(params, context)
        return result

    async def on_daemon_info(self, params: Params, context: Context) -> Struct:
        return Acknowledged()

    async def on_sandbox_kill(self, params: Params, context: Context) -> Struct:
        return GONE

    async def on_sandbox_get(self, params: Params, context: Context) -> Struct:
        raise NotFound("cannot find 'box'", detail="no such sandbox", hint="sandboxctl ls")

    async def on_sandbox_list(self, params: Params, context: Context) -> Struct:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._fail)
        return Acknowledged()

    async def _fail(self) -> None:
        raise NotFound("cannot find 'inner'")

    async def on_sandbox_verify(self, params: Params, context: Context) -> Struct:
        raise RuntimeError("the secret is 1234")

    async def on_commands_wait(self, params: Params, context: Context) -> Struct:
        if getattr(params, "sandbox", "") == LONG_WINDED:
            raise NotFound("cannot find it", detail="x" * FRAME_BYTES_MAX)
        context.on_close(self.connection_closed.set)
        self.started.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled.set()

    async def on_sandbox_create(self, params: Params, context: Context) -> Struct:
        context.on_close(self.connection_closed.set)
        self.started.set()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.may_finish.wait, PATIENCE_S)
        context.on_close(self.told_late.set)
        return GONE

    async def on_commands_run(self, params: Params, context: Context) -> Struct:
        descriptors = context.take_descriptors()
        for descriptor in descriptors:
            self.paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.close(descriptor)
        return Acknowledged()

    async def on_commands_start(self, params: Params, context: Context) -> Struct:
        return Acknowledged()

    async def on_image_build(self, params: Params, context: Context) -> Struct:
        context.progress("pulling", done=1, total=2)
        return Acknowledged()

    async def on_commands_list(self, params: Params, context: Context) -> Struct:
        read_end, write_end = os.pipe()
        os.write(write_end, b"from the daemon")
        os.close(write_end)
        started = CommandStarted(sandbox="s1", command_id="0" * 12, pid=1, timings_ms={})
        context.notify("commands/started", started, [read_end])
        return Acknowledged()

    async def on_commands_logs(self, params: Params, context: Context) -> Struct:
        return CommandStarted(sandbox="x" * FRAME_BYTES_MAX, command_id="0" * 12, pid=1, timings_ms={})

    async def on_image_list(self, params: Params, context: Context) -> Struct:
        big = CommandStarted(sandbox="x" * 1_000_000, command_id="0" * 12, pid=1, timings_ms={})
        try:
            while True:
                context.notify("commands/started", big)
                await anyio.lowlevel.checkpoint()
        finally:
            self.connection_closed.set()


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


@pytest.fixture
def path(tmp_path: Path, handlers: Handlers) -> Iterator[str]:
    with serving(tmp_path, handlers) as socket_path:
        yield socket_path


@pytest.fixture
def peer(path: str) -> Iterator[Peer]:
    with Peer(path) as connected:
        yield connected


def test_a_request_gets_its_result(peer: Peer) -> None:
    """The plain case, with both kinds of id and with none worth the name."""
    for request_id in (7, "seven", None, 2**70):
        reply = peer.ask("sandbox/kill", {"sandbox": "box"}, request_id)
        assert reply == {
            "jsonrpc": "2.0",
            "id": request_id,
            "result": {"id": "s1", "name": None, "gone": False, "timings_ms": {}},
        }


@pytest.mark.parametrize("params", ["null", "[]", "{}", None])
def test_no_params_may_be_written_in_any_way(peer: Peer, params: str | None) -> None:
    """Clients differ in how they say nothing."""
    member = "" if params is None else f',"params":{params}'
    peer.send_bytes(encode(b'{"jsonrpc":"2.0","id":1,"method":"daemon/info"%b}' % member.encode(), lines=False))
    assert peer.receive()["result"] == {}


def test_a_peer_that_opens_with_a_brace_gets_lines(peer: Peer) -> None:
    """Replies use the framing that the peer uses."""
    peer.send_bytes(b'{"jsonrpc":"2.0","id":1,"method":"daemon/info"}\n')
    data = peer.socket.recv(65536)
    assert data == b'{"jsonrpc":"2.0","id":1,"result":{}}\n'


NOT_JSON = -32700
NO_REQUEST = -32600
NO_METHOD = -32601
BAD_PARAMS = -32602


@pytest.mark.parametrize(
    ("body", "code", "request_id", "says"),
    [
        (b"", NOT_JSON, None, "truncated"),
        (b"{", NOT_JSON, None, "truncated"),
        (b'{"jsonrpc":"2.0","id":NaN,"method":"daemon/info"}', NOT_JSON, None, "malformed"),
        (b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', NOT_JSON, None, "utf-8"),
        (b"[" * 100_000, NO_REQUEST, None, "batches"),
        (b'{"a":' * 100_000, NOT_JSON, None, "nested"),
        (b'{"jsonrpc":"2.0","id":1,"method":"daemon/info","params":' + b"[" * 100_000, NOT_JSON, None, "nested"),
        (b"[]", NO_REQUEST, None, "batches"),
        (b'[{"jsonrpc":"2.0","id":1,"method":"daemon/info"}]', NO_REQUEST, None, "batches"),
        (b"17", NO_REQUEST, None, "Expected `object`"),
        (b'{"id":5,"method":"daemon/info"}', NO_REQUEST, 5, "jsonrpc"),
        (b'{"jsonrpc":"1.0","id":5,"method":"daemon/info"}', NO_REQUEST, 5, "jsonrpc"),
        (b'{"jsonrpc":"2.0","id":5}', NO_REQUEST, 5, "method"),
        (b'{"jsonrpc":"2.0","id":5,"result":{}}', NO_REQUEST, 5, "method"),
        (b'{"jsonrpc":"2.0","id":5,"method":7}', NO_REQUEST, 5, "$.method"),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"daemon/info"}', NO_REQUEST, None, "$.id"),
        (b'{"jsonrpc":"2.0","id":true,"method":"daemon/info"}', NO_REQUEST, None, "$.id"),
        (b'{"jsonrpc":"2.0","id":%b,"method":"daemon/info"}' % (b"9" * 5000), NO_REQUEST, None, "$.id"),
        (b'{"jsonrpc":"2.0","id":"%b","method":"daemon/info"}' % (b"9" * 65), NO_REQUEST, None, "$.id"),
        (b'{"jsonrpc":"2.0","id":5,"method":"sandbox/kil"}', NO_METHOD, 5, "no such method"),
        (b'{"jsonrpc":"2.0","id":5,"method":"__class__"}', NO_METHOD, 5, "no such method"),
        (b'{"jsonrpc":"2.0","id":5,"method":"sandbox/kill"}', BAD_PARAMS, 5, "`sandbox`"),
        (b'{"jsonrpc":"2.0","id":5,"method":"sandbox/kill","params":["box"]}', BAD_PARAMS, 5, "`object`"),
        (b'{"jsonrpc":"2.0","id":5,"method":"sandbox/kill","params":{"sandbox":7}}', BAD_PARAMS, 5, "$.sandbox"),
        (
            b'{"jsonrpc":"2.0","id":5,"method":"sandbox/create","params":{"limits":{"memroy":1}}}',
            BAD_PARAMS,
            5,
            "memroy",
        ),
        (b'{"jsonrpc":"2.0","id":5,"method":"sandbox/kill","params":{"sandbox":"\xff"}}', NOT_JSON, 5, "utf-8"),
    ],
)
def test_a_bad_message_gets_its_error_and_the_connection_goes_on(
    peer: Peer, body: bytes, code: int, request_id: Any, says: str
) -> None:
    """An editor with one bad feature keeps its other features."""
    peer.send_bytes(encode(body, lines=False))
    reply = peer.receive()
    assert reply["id"] == request_id
    assert reply["error"]["code"] == code
    assert says in reply["error"]["data"]["detail"]
    assert peer.ask("daemon/info", request_id=6) == {"jsonrpc": "2.0", "id": 6, "result": {}}


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "neither a header nor a line"),
        (b"Content-Length: %d\r\n\r\n" % (FRAME_BYTES_MAX + 1), "are allowed"),
        (b"Content-Length: banana\r\n\r\n", "not a number"),
        (b"X: " + b"x" * 5000, "longer than"),
        (b"{" + b" " * (FRAME_BYTES_MAX + 1), "longer than"),
    ],
)
def test_a_stream_without_frames_gets_one_error_and_is_closed(path: str, stream: bytes, says: str) -> None:
    """And whoever else is connected does not notice."""
    with Peer(path) as other, Peer(path) as peer:
        peer.send_bytes(stream)
        error = peer.receive()["error"]
        assert error["code"] == NO_REQUEST
        assert says in error["data"]["detail"]
        assert peer.is_closed()
        assert other.ask("daemon/info")["result"] == {}


def test_half_a_frame_harms_nobody_else(path: str) -> None:
    """A peer may take as long as it likes; it only waits for itself."""
    with Peer(path) as slow, Peer(path) as other:
        request = slow.request("daemon/info")
        for byte in request[:-1]:
            slow.send_bytes(bytes([byte]))
        assert other.ask("daemon/info")["result"] == {}
        slow.send_bytes(request[-1:])
        assert slow.receive()["result"] == {}


def test_a_huge_message_just_within_the_bound_is_served(peer: Peer) -> None:
    """Argv and env may be large, and come in many portions."""
    metadata = {"k": "x" * (FRAME_BYTES_MAX - 1000)}
    assert peer.ask("sandbox/list", {"metadata": metadata})["error"]["data"]["type"] == "not_found"


def test_an_unknown_method_gets_a_suggestion(peer: Peer) -> None:
    """Most unknown methods are misspelt ones."""
    assert peer.ask("sandbox/kil")["error"]["data"]["hint"] == "did you mean 'sandbox/kill'?"


def test_a_notification_for_a_method_is_not_carried_out(peer: Peer, handlers: Handlers) -> None:
    """Nobody could learn that it failed, so it must not change anything either."""
    peer.send_bytes(encode(b'{"jsonrpc":"2.0","method":"daemon/info"}', lines=False))
    peer.send_bytes(encode(b'{"jsonrpc":"2.0","method":"$/setTrace"}', lines=False))
    assert peer.ask("daemon/info", request_id=2)["id"] == 2
    assert len(handlers.contexts) == 1


def test_a_failure_crosses_unchanged(peer: Peer) -> None:
    """It was made beside the call that failed, and is read on a terminal."""
    assert peer.ask("sandbox/get", {"sandbox": "box"})["error"] == {
        "code": -32001,
        "message": "cannot find 'box'",
        "data": {
            "type": "not_found",
            "brief": "cannot find 'box'",
            "detail": "no such sandbox",
            "hint": "sandboxctl ls",
        },
    }


def test_a_failure_inside_a_task_group_is_still_that_failure(peer: Peer) -> None:
    """Handlers may fan out; their callers need not know."""
    assert peer.ask("sandbox/list")["error"]["message"] == "cannot find 'inner'"


def test_an_unexpected_error_is_logged_once_and_told_without_internals(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    """Tracebacks may hold secrets; the log is the owner's, the reply may travel."""
    with caplog.at_level(logging.ERROR):
        reply = peer.ask("sandbox/verify", {"sandbox": "box"})
    assert reply["error"]["code"] == -32603
    assert "1234" not in json.dumps(reply)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info


def test_an_answer_that_is_too_large_says_so(peer: Peer) -> None:
    """The caller can ask for less; of an internal error it could make nothing."""
    error = peer.ask("commands/logs", {"sandbox": "box", "command_id": "0" * 12})["error"]
    assert error["data"]["type"] == "capacity_exceeded"
    assert "larger than one message" in error["data"]["detail"]
    assert error["data"]["hint"]
    assert peer.ask("daemon/info", request_id=2)["result"] == {}


def test_a_failure_of_any_length_still_fits(peer: Peer) -> None:
    """It may quote what an engine said, and an answer that cannot be sent is none."""
    error = peer.ask("commands/wait", {"sandbox": LONG_WINDED, "command_id": "0" * 12})["error"]
    assert error["data"]["type"] == "not_found"
    assert len(json.dumps(error)) < FRAME_BYTES_MAX
    assert peer.ask("daemon/info", request_id=2)["result"] == {}


def test_the_document_is_served(peer: Peer) -> None:
    """A client can learn the methods without this repository."""
    document = peer.ask("rpc.discover")["result"]
    assert "sandbox/create" in [method["name"] for method in document["methods"]]


def test_progress_names_its_request(peer: Peer) -> None:
    """Several may be under way."""
    peer.send("image/build", request_id="b")
    assert peer.receive() == {
        "jsonrpc": "2.0",
        "method": "$/progress",
        "params": {"token": "b", "message": "pulling", "done": 1, "total": 2, "entries": None},
    }
    assert peer.receive()["id"] == "b"


# --- concurrency, cancelling, ending


def test_a_waiting_request_does_not_hold_up_the_next(peer: Peer, handlers: Handlers) -> None:
    """One connection is enough for an editor."""
    peer.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12}, request_id=1)
    assert peer.ask("daemon/info", request_id=2)["id"] == 2
    assert not handlers.cancelled.is_set()


def test_requests_sent_at_once_are_all_answered(peer: Peer) -> None:
    """Nobody has to wait for a reply before asking again."""
    peer.send_bytes(b"".join(peer.request("daemon/info", request_id=number) for number in range(200)))
    assert sorted(peer.receive()["id"] for _ in range(200)) == list(range(200))


def test_an_id_in_use_is_refused(peer: Peer, handlers: Handlers) -> None:
    """Two replies with one id could not be told apart, nor cancelled apart."""
    params = {"sandbox": "box", "command_id": "0" * 12}
    peer.send("commands/wait", params, request_id=1)
    assert "has not ended" in peer.ask("commands/wait", params, request_id=1)["error"]["data"]["detail"]
    peer.cancel(1)
    assert peer.receive()["error"]["code"] == -32800
    assert peer.ask("daemon/info", request_id=1)["result"] == {}


def test_a_cancelled_request_ends_with_its_own_error(peer: Peer, handlers: Handlers) -> None:
    """As editors expect it."""
    peer.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12}, request_id="w")
    assert handlers.started.wait(PATIENCE_S)
    peer.cancel("w")
    reply = peer.receive()
    assert (reply["id"], reply["error"]["code"], reply["error"]["data"]["type"]) == ("w", -32800, "cancelled")
    assert handlers.cancelled.is_set()


def test_a_cancellation_of_nothing_is_ignored(peer: Peer) -> None:
    """Replies and cancellations cross on the way."""
    peer.cancel(99)
    peer.cancel(None)
    peer.cancel([1])
    assert peer.ask("daemon/info")["result"] == {}


def test_what_stands_under_a_shield_finishes_and_replies_although_cancelled(peer: Peer, handlers: Handlers) -> None:
    """A half-made sandbox is nobody's; a whole one has an id that its maker must learn."""
    peer.send("sandbox/create", request_id=1)
    assert handlers.started.wait(PATIENCE_S)
    peer.cancel(1)
    assert peer.ask("daemon/info", request_id=2)["id"] == 2
    handlers.may_finish.set()
    assert peer.receive()["result"]["id"] == "s1"


def test_a_peer_that_goes_away_takes_its_requests_with_it(path: str, handlers: Handlers) -> None:
    """Nobody waits for them any more, and the hooks say so first."""
    with Peer(path) as peer:
        peer.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12})
        assert handlers.started.wait(PATIENCE_S)
    assert handlers.connection_closed.wait(PATIENCE_S)
    assert handlers.cancelled.wait(PATIENCE_S)


def test_what_stands_under_a_shield_outlives_its_peer(path: str, handlers: Handlers) -> None:
    """And a hook that is registered after the end runs at once, so that an ephemeral sandbox is not forgotten."""
    with Peer(path) as peer:
        peer.send("sandbox/create")
        assert handlers.started.wait(PATIENCE_S)
    assert handlers.connection_closed.wait(PATIENCE_S)
    handlers.may_finish.set()
    assert handlers.told_late.wait(PATIENCE_S)


def test_a_peer_that_only_stopped_sending_gets_its_replies(peer: Peer) -> None:
    """``echo ... | socat`` closes one direction and listens on the other."""
    peer.send_bytes(b'{"jsonrpc":"2.0","id":1,"method":"daemon/info"}')
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.receive()["id"] == 1
    assert peer.is_closed()


def test_a_peer_that_stopped_sending_and_then_goes_away_is_noticed(path: str, handlers: Handlers) -> None:
    """Reading tells no more then; the hang-up does."""
    with Peer(path) as peer:
        peer.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12})
        peer.socket.shutdown(socket.SHUT_WR)
        assert handlers.started.wait(PATIENCE_S)
        assert not handlers.cancelled.is_set()
    assert handlers.cancelled.wait(PATIENCE_S)


# --- what goes wrong in one connection


def test_a_connection_that_fails_takes_only_itself(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of our own in one of them must not end the daemon, and with it everybody's."""

    async def fail(_: Connection) -> None:
        raise RuntimeError("a mistake of ours")

    with Peer(path) as before:
        assert before.ask("daemon/info")["result"] == {}
        with monkeypatch.context() as patched:
            patched.setattr(Connection, "_read", fail)
            with Peer(path) as broken:
                assert broken.is_closed()
        assert before.ask("daemon/info", request_id=2)["result"] == {}
        with Peer(path) as after:
            assert after.ask("daemon/info")["result"] == {}
    assert "a mistake of ours" in caplog.text


def test_a_process_without_descriptors_takes_a_half_closed_peer_for_gone(
    path: str, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for the hang-up takes a descriptor, and there may be none left."""

    def none_left() -> select.epoll:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with Peer(path) as other, Peer(path) as peer:
        assert other.ask("daemon/info")["result"] == {}
        peer.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12})
        assert handlers.started.wait(PATIENCE_S)
        monkeypatch.setattr("sandboxd.connection.select.epoll", none_left)
        peer.socket.shutdown(socket.SHUT_WR)
        assert handlers.cancelled.wait(PATIENCE_S)
        assert peer.is_closed()
        assert other.ask("daemon/info", request_id=2)["result"] == {}


class Refusing(socket.socket):
    """A listening socket whose first accept fails in a way that nobody thought of."""

    refusals = 1

    def accept(self) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return super().accept()


def test_an_accept_that_fails_is_tried_again(handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """The connections that there are go on, and the next one is served."""
    name = f"\0sandboxd-test-accept-{os.getpid()}"
    with Refusing(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen()
        with serving_on(listening, handlers), Peer(name) as peer:
            assert peer.ask("daemon/info")["result"] == {}
    assert "cannot accept a connection" in caplog.text


# --- bounds


def test_a_peer_that_never_reads_is_dropped_and_nobody_waits_for_it(path: str, handlers: Handlers) -> None:
    """What it does not read would otherwise be kept for ever."""
    with Peer(path) as deaf, Peer(path) as other:
        deaf.send("image/list")
        assert handlers.connection_closed.wait(PATIENCE_S)
        assert other.ask("daemon/info")["result"] == {}


def test_a_peer_that_reads_slowly_gets_everything_in_order(peer: Peer) -> None:
    """Replies beyond the kernel's buffer wait their turn."""
    peer.send_bytes(b"".join(peer.request("rpc.discover", request_id=number) for number in range(40)))
    replies = [peer.receive() for _ in range(40)]
    assert sorted(reply["id"] for reply in replies) == list(range(40))
    assert all("openrpc" in reply["result"] for reply in replies)


def test_requests_in_flight_are_bounded(tmp_path: Path, handlers: Handlers) -> None:
    """Each is a task and perhaps a process."""
    with serving(tmp_path, handlers, Limits(requests_in_flight_max=2)) as path, Peer(path) as peer:
        for number in (1, 2):
            peer.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12}, request_id=number)
        assert peer.ask("daemon/info", request_id=3)["error"]["data"]["type"] == "capacity_exceeded"
        peer.cancel(1)
        assert peer.receive()["id"] == 1
        assert peer.ask("daemon/info", request_id=4)["result"] == {}


def test_connections_are_bounded(tmp_path: Path, handlers: Handlers) -> None:
    """The one too many is told why; those before it go on."""
    with serving(tmp_path, handlers, Limits(connections_max=1)) as path, Peer(path) as first:
        assert first.ask("daemon/info")["result"] == {}
        with Peer(path) as second:
            assert second.receive()["error"]["data"]["type"] == "capacity_exceeded"
            assert second.is_closed()
        assert first.ask("daemon/info")["result"] == {}


ANOTHER_USER = """
import socket, sys
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
data = b""
while chunk := peer.recv(65536):
    data += chunk
print(data.decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to try it")
def test_another_user_is_refused(handlers: Handlers, request: pytest.FixtureRequest) -> None:
    """Even where the file's permissions would let it in: the kernel's word counts."""
    name = f"\0sandboxd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(name)
        listening.listen()
        with serving_on(listening, handlers):
            script = ANOTHER_USER.replace("sys.argv[1]", repr(name))
            done = subprocess.run(
                ["/usr/bin/env", "-i", "/usr/bin/python3", "-c", script],
                user=65534,
                group=65534,
                extra_groups=[],
                cwd="/",
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=True,
            )
    assert '"type":"unauthorized"' in done.stdout
    assert handlers.contexts == []


# --- descriptors


def test_descriptors_arrive_with_their_request(peer: Peer, handlers: Handlers, tmp_path: Path) -> None:
    """They become the command's stdin, stdout and stderr, in that order."""
    files = [os.open(tmp_path / name, os.O_CREAT | os.O_RDWR) for name in "abc"]
    peer.send("commands/run", RUN, descriptors=files)
    assert peer.receive()["result"] == {}
    assert handlers.paths == [str(tmp_path / name) for name in "abc"]
    for file in files:
        os.close(file)


def test_pipelined_requests_get_each_their_own_descriptors(peer: Peer, handlers: Handlers, tmp_path: Path) -> None:
    """Also when a request without any stands between them, and when frames come in pieces."""
    for number in range(20):
        files = [os.open(tmp_path / f"{number}-{name}", os.O_CREAT | os.O_RDWR) for name in "abc"]
        big = RUN | {"env": {"PAD": "x" * (70_000 if number % 3 == 0 else 0)}}
        peer.send("commands/run", big, number, files)
        peer.send("daemon/info", request_id=100 + number)
        for file in files:
            os.close(file)
    assert all("result" in peer.receive() for _ in range(40))
    expected = [str(tmp_path / f"{number}-{name}") for number in range(20) for name in "abc"]
    assert handlers.paths == expected


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_request_with_too_few_descriptors_is_refused(peer: Peer, count: int) -> None:
    """Its params say how many there are."""
    with Witnesses(count) as witnesses:
        peer.send("commands/run", RUN, descriptors=witnesses.write_ends)
        assert f"carries {count} descriptors" in peer.receive()["error"]["data"]["detail"]
        assert witnesses.all_closed()


def test_descriptors_that_a_request_does_not_take_are_closed(peer: Peer) -> None:
    """Too many, or with a request that takes none, or with one that is refused, or with no request at all."""
    kept_open = CommandParams(sandbox="box", argv=["true"])
    assert kept_open.descriptors_taken() == 0
    with Witnesses(13) as witnesses:
        ends = witnesses.write_ends
        peer.send("commands/run", RUN, 1, ends[:5])
        assert peer.receive()["result"] == {}
        peer.send("daemon/info", request_id=2, descriptors=ends[5:8])
        assert peer.receive()["result"] == {}
        peer.send("commands/run", RUN | {"argv": 7}, 3, ends[8:11])
        assert peer.receive()["error"]["code"] == BAD_PARAMS
        peer.send_bytes(encode(b"{", lines=False), ends[11:13])
        assert peer.receive()["error"]["code"] == NOT_JSON
        assert witnesses.all_closed()


def test_descriptors_that_a_handler_does_not_take_are_closed(peer: Peer) -> None:
    """A handler that fails early must not leak them."""
    with Witnesses(3) as witnesses:
        peer.send("commands/start", RUN, descriptors=witnesses.write_ends)
        assert peer.receive()["result"] == {}
        assert witnesses.all_closed()


def test_descriptors_of_a_request_that_never_became_whole_are_closed(path: str) -> None:
    """The peer may die in the middle of sending."""
    with Witnesses(3) as witnesses:
        with Peer(path) as peer:
            peer.send_bytes(peer.request("commands/run", RUN)[:-5], witnesses.write_ends)
        assert witnesses.all_closed()


def test_a_flood_of_descriptors_ends_the_connection(path: str) -> None:
    """Each one would cost the daemon one of its own few thousand."""
    with Witnesses(30) as witnesses, Peer(path) as peer, Peer(path) as other:
        peer.send_bytes(peer.request("commands/run", RUN)[:-5], witnesses.write_ends)
        assert peer.is_closed()
        assert witnesses.all_closed()
        assert other.ask("daemon/info")["result"] == {}


def test_a_slow_flood_of_descriptors_ends_the_connection_too(path: str) -> None:
    """Few at a time, but with a frame that never ends."""
    with Witnesses(20) as witnesses, Peer(path) as peer:
        request = peer.request("commands/run", RUN)
        for number, end in enumerate(witnesses.write_ends):
            try:
                peer.send_bytes(request[number : number + 1], [end])
            except BrokenPipeError:
                break
        assert peer.is_closed()
        assert witnesses.all_closed()


def test_a_notification_can_carry_a_descriptor(peer: Peer) -> None:
    """This is how a terminal's master reaches the caller."""
    peer.send("commands/list", {"sandbox": "box"})
    data, [read_end], _, _ = socket.recv_fds(peer.socket, 65536, 4)
    assert b"commands/started" in data
    assert os.read(read_end, 100) == b"from the daemon"
    os.close(read_end)


def test_no_descriptor_is_left_over(tmp_path: Path, handlers: Handlers) -> None:
    """After all of that, the process holds what it held before."""
    before = sorted(os.listdir("/proc/self/fd"))
    with serving(tmp_path, handlers) as path, Witnesses(3) as witnesses:
        for number in range(50):
            with Peer(path) as peer:
                if number % 2:
                    peer.send("commands/run", RUN, descriptors=witnesses.write_ends)
                else:
                    peer.send_bytes(peer.request("commands/run", RUN)[:-5], witnesses.write_ends)
        assert witnesses.all_closed()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_the_server_needs_no_time_to_stop(tmp_path: Path, handlers: Handlers) -> None:
    """Connections in the middle of something are ended with it."""
    with serving(tmp_path, handlers) as path:
        peer = Peer(path)
        peer.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12})
        assert handlers.started.wait(PATIENCE_S)
    assert handlers.cancelled.is_set()
    assert peer.is_closed()
    peer.socket.close()
