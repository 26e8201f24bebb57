"""Metrics of a real daemon: over its socket, on the command line, and over HTTP for those who have no client."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from sandboxd.network.metrics_door import CONNECTIONS_MAX, MetricsDoor
from sandboxd.openmetrics import CONTENT_TYPE
from tests.daemon.test_daemon import without_engines
from tests.engine.daemons import CHECKOUT, PATIENCE_S, Daemon, running, wait_until
from tests.openmetrics_reader import read


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self._path)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Daemon, str]]:
    """A daemon, and the path of the socket where it serves metrics."""
    path = str(tmp_path / "metrics.sock")
    with running(without_engines(tmp_path, SANDBOXD_METRICS_LISTEN=f"unix:{path}"), engines=()) as daemon:
        wait_until(lambda: os.path.exists(path), "it listened")
        yield daemon, path


def test_sandboxctl_prints_what_a_strict_reader_takes(tmp_path: Path) -> None:
    with running(without_engines(tmp_path), engines=()) as daemon:
        daemon.refusal("sandbox/pause", sandbox="absent")
        done = daemon.ctl("metrics")
        assert done.returncode == 0
        found = read(done.stdout.decode())
        reply = daemon.ctl_json("metrics")
        assert (reply["content_type"], read(reply["text"]).keys()) == (CONTENT_TYPE, found.keys())
        assert found["sandboxd_requests"].total("_total", method="sandbox/pause") == 1
        assert found["sandboxd_build"].samples
        assert found["process_resident_memory_bytes"].value() > 10_000_000
        assert found["process_open_fds"].value() > 5
        assert found["sandboxd_budget_sandboxes"].value() == 500
        assert found["sandboxd_available_memory_bytes"].value() > 0
        assert found["sandboxd_audit_failing"].value() == 0
        labels = {name for family in found.values() for _, series in family.samples for name, _ in series}
        known = "method result engine verb template reason verdict kind state limit le version"
        assert labels <= set(known.split()), "of each there are few values"


def test_the_reader_of_prometheus_takes_them_as_ours_does(tmp_path: Path) -> None:
    """The reader of these tests is ours, from the specification; this is the one that others use."""
    with running(without_engines(tmp_path), engines=()) as daemon:
        daemon.refusal("sandbox/pause", sandbox="absent")
        text = daemon.ctl("metrics").stdout.decode()
    theirs = {family.name: len(family.samples) for family in text_string_to_metric_families(text)}
    assert theirs == {name: len(family.samples) for name, family in read(text).items()}


def test_metrics_are_served_over_a_unix_socket_of_this_user_alone(served: tuple[Daemon, str]) -> None:
    daemon, path = served
    assert os.stat(path).st_mode & 0o777 == 0o600
    with contextlib.closing(UnixConnection(path)) as connection:
        for _ in range(2):
            connection.request("GET", "/metrics?all=1")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["content-type"]) == (200, CONTENT_TYPE)
            assert "sandboxd_requests" in read(answer.read().decode())
        connection.request("HEAD", "/metrics")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
        assert int(answer.headers["content-length"]) > 1000
    daemon.stop()
    assert not os.path.exists(path), "it is taken away with the daemon"


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("GET", "/", None, 404),
        ("GET", "/metrics/x", None, 404),
        ("POST", "/metrics", None, 405),
        ("GET", "/metrics", "a body", 400),
    ],
)
def test_there_is_nothing_else_to_be_had(
    served: tuple[Daemon, str], method: str, target: str, body: str | None, status: int
) -> None:
    daemon, path = served
    with contextlib.closing(UnixConnection(path)) as connection:
        connection.request(method, target, body)
        assert connection.getresponse().status == status
    assert daemon.call("daemon/info")["pid"] == daemon.pid


def test_peers_that_say_nothing_or_nonsense_take_nothing_from_others(served: tuple[Daemon, str]) -> None:
    """All places but one are held by peers that are silent; who says what is no HTTP is let go."""
    daemon, path = served
    with contextlib.ExitStack() as held:
        for _ in range(CONNECTIONS_MAX - 1):
            silent = held.enter_context(socket.socket(socket.AF_UNIX))
            silent.connect(path)
        for nonsense in (b"\x00" * 100, b"GET /metrics\r\n\r\n", b"GET " + b"a" * 100_000):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(PATIENCE_S)
                peer.connect(path)
                with contextlib.suppress(BrokenPipeError):
                    peer.sendall(nonsense)
                    peer.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert peer.recv(65536)[:12] in {b"HTTP/1.1 400", b""}
        with contextlib.closing(UnixConnection(path)) as connection:
            connection.request("GET", "/metrics")
            assert connection.getresponse().status == 200
    assert daemon.call("daemon/info")["pid"] == daemon.pid


def test_a_web_page_cannot_read_them_by_a_name_of_its_own(tmp_path: Path) -> None:
    """Its author can have that name lead to our loopback: so an address, or localhost, must have been asked for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"SANDBOXD_METRICS_LISTEN": f"127.0.0.1:{port}"}
    with running(without_engines(tmp_path, **env), engines=()) as daemon:
        wait_until(lambda: asked(port, "127.0.0.1") == 200, f"it listened\n{daemon.log.read_text()}")
        assert [asked(port, host) for host in ("localhost", f"127.0.0.1:{port}", "[::1]")] == [200, 200, 200]
        assert [asked(port, host) for host in ("evil.example", f"127.0.0.1.evil.example:{port}")] == [403, 403]
        # Names that browsers and resolvers take, and that no rule of ours could be written for.
        for host in ("-a.evil.example", "a-.evil.example:80", "a~b.evil.example"):
            assert asked(port, host) == 403


def asked(port: int, host: str) -> int | None:
    try:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", "/metrics", headers={"Host": host})
            return connection.getresponse().status
    except ConnectionRefusedError:
        return None


def test_a_port_that_is_taken_stops_no_daemon_and_is_told_by_doctor(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        env = {"SANDBOXD_METRICS_LISTEN": f"127.0.0.1:{other.getsockname()[1]}"}
        with running(without_engines(tmp_path, **env), engines=()) as daemon:

            def told() -> list[str]:
                checks = daemon.call("daemon/doctor")["checks"]
                return [check["detail"] for check in checks if check["name"] == "metrics"]

            assert "something listens there" in wait_until(told, "doctor told it")[0]


@pytest.mark.anyio
async def test_a_port_that_becomes_free_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandboxd.network.metrics_door.RETRY_S", 0.01)
    with anyio.fail_after(PATIENCE_S):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            door = MetricsDoor(("127.0.0.1", port), lambda: "# EOF\n", content_type=CONTENT_TYPE)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(door.run)
                await anyio.to_thread.run_sync(wait_until, lambda: door.problem, "it could not listen")
                other.close()
                await anyio.to_thread.run_sync(wait_until, lambda: not door.problem, "it listened")
                assert await anyio.to_thread.run_sync(asked, port, "127.0.0.1") == 200
                tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_text_is_made_once_for_all_who_ask_within_a_second(tmp_path: Path) -> None:
    """Whoever asks again and again must not keep the daemon busy."""
    path = str(tmp_path / "m.sock")
    made = []

    def text() -> str:
        made.append(1)
        return "# EOF\n"

    def ask_often() -> None:
        with contextlib.closing(UnixConnection(path)) as connection:
            for _ in range(20):
                connection.request("GET", "/metrics")
                assert connection.getresponse().read() == b"# EOF\n"

    door = MetricsDoor(path, text, content_type=CONTENT_TYPE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(door.run)
        with anyio.fail_after(PATIENCE_S):
            await anyio.to_thread.run_sync(wait_until, lambda: os.path.exists(path), "it listened")
            began_s = anyio.current_time()
            await anyio.to_thread.run_sync(ask_often)
            took_s = anyio.current_time() - began_s
        assert 1 <= len(made) <= 1 + took_s
        tasks.cancel_scope.cancel()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_every_metric_is_documented_and_every_documented_one_exists(tmp_path: Path) -> None:
    """An alert on a name that is only on paper never fires."""
    rows = (CHECKOUT / "docs" / "METRICS.md").read_text().split("| metric |")[1].splitlines()[2:]
    documented = set()
    for row in rows:
        if row.startswith("|"):
            first, *more = re.findall(r"`([a-z_]+)`", row.split("|")[1])
            documented |= {first, *(name if name[0] != "_" else whole_name(first, name) for name in more)}
    with running(without_engines(tmp_path), engines=()) as daemon:
        families = read(daemon.call("daemon/metrics")["text"]).values()
    suffixes = {"counter": "_total", "info": "_info"}
    assert documented == {f"{family.name}{suffixes.get(family.kind, '')}" for family in families}


def whole_name(first: str, ending: str) -> str:
    """``_pids`` behind ``sandboxd_promised_memory_bytes`` is ``sandboxd_promised_pids``."""
    return first.removesuffix("_memory_bytes").removesuffix("_warm") + ending
