"""The client's half: errors in words, descriptors, and what it refuses to trust."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandboxd import client, protocol
from sandboxd.client import Connection, Message, NotRunning, RpcError
from tests.daemon.rpc_peer import serving
from tests.daemon.test_server import RUN, Handlers


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


@pytest.fixture
def connection(tmp_path: Path, handlers: Handlers) -> Iterator[Connection]:
    with serving(tmp_path, handlers) as path, Connection.connect(path) as connected:
        yield connected


@contextlib.contextmanager
def scripted(directory: Path, script: Callable[[socket.socket], None]) -> Iterator[Connection]:
    """A connection to somebody who says what the script says."""
    path = str(directory / "scripted.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def serve() -> None:
            accepted, _ = listening.accept()
            with accepted:
                script(accepted)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with Connection.connect(path) as connected:
                yield connected
        finally:
            thread.join()


def test_a_call_returns_the_result(connection: Connection) -> None:
    """As plain dictionaries: the caller knows what they mean."""
    assert connection.call("sandbox/kill", {"sandbox": "box"})["id"] == "s1"


def test_an_error_reply_is_raised_with_all_its_parts(connection: Connection) -> None:
    """They end up on a terminal."""
    with pytest.raises(RpcError) as raised:
        connection.call("sandbox/get", {"sandbox": "box"})
    error = raised.value
    assert (error.type, error.brief, error.detail, error.hint) == (
        "not_found",
        "cannot find 'box'",
        "no such sandbox",
        "sandboxctl ls",
    )
    assert str(error) == "cannot find 'box': no such sandbox"


def test_descriptors_go_with_a_request_and_stay_the_callers(connection: Connection, handlers: Handlers) -> None:
    """The command line goes on using its own stdin afterwards."""
    with open(os.devnull) as null:
        connection.call("commands/run", RUN, [null.fileno()] * 3)
        os.fstat(null.fileno())
    assert handlers.paths == ["/dev/null"] * 3


def test_a_descriptor_comes_with_a_notification(connection: Connection) -> None:
    """A terminal's master, in real life."""
    taken: list[int] = []

    def on_notification(message: Message) -> None:
        taken.extend(connection.take_descriptors(message, 1))

    connection.call("commands/list", {"sandbox": "box"}, on_notification=on_notification)
    [read_end] = taken
    assert os.read(read_end, 100) == b"from the daemon"
    os.close(read_end)


def test_a_descriptor_that_nobody_takes_is_closed(connection: Connection) -> None:
    """A caller that does not know a notification must not leak what it carries."""
    connection.call("daemon/info", {})
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        connection.call("commands/list", {"sandbox": "box"})
        connection.call("daemon/info", {})
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_several_requests_may_be_under_way(connection: Connection) -> None:
    """Each wait gets its own reply, in whatever order they come."""
    waiting = connection.send("commands/wait", {"sandbox": "box", "command_id": "0" * 12})
    asked = connection.send("daemon/info", {})
    assert connection.wait(asked) == {}
    connection.cancel(waiting)
    with pytest.raises(RpcError) as raised:
        connection.wait(waiting)
    assert raised.value.code == -32800


def test_a_reply_that_does_not_come_is_a_timeout(connection: Connection) -> None:
    """Where the caller has set a bound."""
    with pytest.raises(RpcError) as raised:
        connection.call("commands/wait", {"sandbox": "box", "command_id": "0" * 12}, timeout_s=0.05)
    assert raised.value.type == "timeout"


def test_text_that_is_not_utf_8_is_refused_before_it_is_sent(connection: Connection) -> None:
    """JSON cannot carry it, and a replaced byte would be another argument than the caller's."""
    with pytest.raises(RpcError) as raised:
        connection.call("commands/run", RUN | {"argv": [os.fsdecode(b"\xff")]})
    assert raised.value.type == "invalid_argument"
    assert connection.call("daemon/info", {}) == {}


def test_a_number_that_json_lacks_is_refused_before_it_is_sent(connection: Connection) -> None:
    """The daemon could only say that it cannot read the message, and not which."""
    with pytest.raises(RpcError) as raised:
        connection.call("commands/run", RUN | {"timeout": float("nan")})
    assert raised.value.type == "invalid_argument"
    assert connection.call("daemon/info", {}) == {}


def test_a_request_that_is_too_large_is_told_so(connection: Connection) -> None:
    """The daemon hangs up in the middle of it, and its reason must not be lost in a broken pipe."""
    with pytest.raises(RpcError) as raised:
        connection.call("sandbox/list", {"metadata": {"k": "x" * (8 * 1024 * 1024)}})
    assert "are allowed" in raised.value.detail


def test_no_socket_and_nobody_behind_it_are_the_same_error(tmp_path: Path) -> None:
    """Both mean: start it."""
    path = str(tmp_path / "sandboxd.sock")
    with pytest.raises(NotRunning, match="no such socket"):
        Connection.connect(path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with pytest.raises(NotRunning, match="nobody listens"):
        Connection.connect(path)


@pytest.mark.parametrize("place", ["/etc/passwd", "/etc/passwd/x", "/etc"])
def test_a_path_that_is_no_socket_is_an_error_in_words(place: str) -> None:
    """A mistyped SANDBOXD_SOCKET, most likely."""
    with pytest.raises(RpcError, match=f"cannot reach the daemon at '{place}'"):
        Connection.connect(place)


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        (b"", "disconnected"),
        (b"Content-Length: 10\r\n\r\n{", "disconnected"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "bad_reply"),
        (b"Content-Length: 2\r\n\r\n[]", "bad_reply"),
        (b"Content-Length: 2\r\n\r\n{]", "bad_reply"),
        (b"Content-Length: 2\r\n\r\n{}", "bad_reply"),
        (b'{"id":1}\n', "bad_reply"),
        (b'{"id":1,"error":{"code":1,"message":"no"}}\n', "internal"),
        (b"Content-Length: 99999999\r\n\r\n", "bad_reply"),
    ],
)
def test_whatever_the_other_end_says_becomes_one_kind_of_error(tmp_path: Path, says: bytes, kind: str) -> None:
    """Nothing that comes from outside may end as a traceback."""

    def script(accepted: socket.socket) -> None:
        accepted.recv(65536)
        accepted.sendall(says)

    with scripted(tmp_path, script) as connection, pytest.raises(RpcError) as raised:
        connection.call("daemon/info", {})
    assert raised.value.type == kind


SOMEBODY_ELSES_DAEMON = """
import socket
listening = socket.socket(socket.AF_UNIX)
listening.bind({name!r})
listening.listen()
print(flush=True)
input()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to try it")
def test_a_daemon_of_another_user_is_not_talked_to(tmp_path: Path) -> None:
    """Our environment and our terminal would be in its hands."""
    tmp_path.chmod(0o755)
    name = f"\0sandboxd-test-other-{os.getpid()}"
    script = SOMEBODY_ELSES_DAEMON.format(name=name)
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", script],
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RpcError, match="uid 65534's"):
            Connection.connect(name)
        other.communicate(b"\n")


def test_the_bound_is_the_protocols() -> None:
    """It is written twice, because the protocol is too heavy to import here."""
    assert client.FRAME_BYTES_MAX == protocol.FRAME_BYTES_MAX


def test_importing_the_client_imports_little() -> None:
    """It is most of what the command line pays before it does anything."""
    script = "import sys, sandboxd.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"msgspec", "anyio", "asyncio", "subprocess", "typing", "argparse", "sandboxd.protocol", "logging"}
    heavy |= {"json", "socket", "re", "enum", "selectors"}
    assert not heavy & set(loaded)
