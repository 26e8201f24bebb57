"""Services: started when wanted, watched, started again; and the shared ChromaDB, a part of it for each sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from runtimes import process
from sandboxd.background import Background
from sandboxd.config import Chroma as ChromaSetting
from sandboxd.config import Config
from sandboxd.config import Service as ServiceSetting
from sandboxd.failures import Conflict, Failure, InvalidArgument, NotFound, Unsupported
from sandboxd.network import streams
from sandboxd.records import GrantRecord
from sandboxd.services import launcher, supervisor
from sandboxd.services.room import ServiceRoom
from sandboxd.services.supervisor import Service, ServiceState
from sandboxd.services.way_in import WayIn, free_port
from tests.daemon.proxies import PATIENCE_S, door

pytestmark = pytest.mark.anyio

FAKE = (sys.executable, os.path.join(os.path.dirname(__file__), "fake_chroma.py"), "run")
FLAGS = ("--path", "{data}", "--host", "127.0.0.1", "--port", "{port}")
ECHO = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    accepted, _ = listening.accept()
    accepted.sendall(accepted.recv(99))
    accepted.close()
"""
BASE = "/api/v2/tenants/default_tenant/databases/default_database"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "WATCH_PERIOD_S", 0.1)
    monkeypatch.setattr(supervisor, "BACKOFF_S_MIN", 0.02)


class World:
    """The services of a daemon, with a stand-in for ChromaDB."""

    def __init__(self, directory: Path, settings: dict[str, ServiceSetting], argv: Sequence[str]) -> None:
        self.sandbox_ids = ["sb-1", "sb-2"]
        config = Config(services=settings, chroma=ChromaSetting(python=sys.executable))
        self.room = ServiceRoom(config, str(directory), lambda: self.sandbox_ids)
        self.chroma = self.room.get("chroma")
        self.chroma.spec = msgspec.structs.replace(
            self.chroma.spec,
            argv=tuple(argv),
            keep=(sys.prefix, sys.base_prefix, os.path.dirname(__file__)),
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[World]:
        async with anyio.create_task_group() as tasks:
            self.room.start(Background(tasks))
            try:
                yield self
            finally:
                tasks.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def inside(self, sandbox_id: str, *scopes: str) -> AsyncIterator[Inside]:
        """A sandbox's view of ChromaDB."""
        grant = GrantRecord(service="chroma", scopes=scopes)
        async with door(self.room.server(grant, sandbox_id=sandbox_id)) as (port, _):
            yield Inside(port)


class Inside:
    def __init__(self, port: int) -> None:
        self.port = port

    async def ask(self, method: str, path: str, content: object = None) -> tuple[int, Any]:
        body = b"" if content is None else json.dumps(content).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost:8000\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.read()
        writer.close()
        head_said, _, said = answer.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head_said.lower():
            said = said.partition(b"\r\n")[2].rpartition(b"\r\n0")[0]
        return int(head_said.split()[1]), json.loads(said or b"null")

    async def make(self, name: str, database: str = BASE) -> str:
        status, said = await self.ask("POST", f"{database}/collections", {"name": name})
        assert status == 200, said
        identity: str = said["id"]
        return identity

    async def names(self, database: str = BASE) -> list[str]:
        status, said = await self.ask("GET", f"{database}/collections")
        assert status == 200, said
        return [row["name"] for row in said]


@contextlib.asynccontextmanager
async def world(
    directory: Path, settings: dict[str, ServiceSetting] | None = None, argv: Sequence[str] = (*FAKE, *FLAGS)
) -> AsyncIterator[World]:
    async with World(directory, settings or {}, argv).running() as made:
        yield made


async def until_state(service: Service, state: ServiceState) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while service.state is not state:  # noqa: ASYNC110  (it tells those who wait for it to be ready, and only them)
            await asyncio.sleep(0.01)


async def logged(service: Service, said: str) -> str:
    """Its log, once this is in it: what it says is written down beside its life, its last words after its end."""
    async with asyncio.timeout(PATIENCE_S):
        while said not in (log := await service.log_tail(10_000)):  # noqa: ASYNC110  (nobody is told when it is written)
            await asyncio.sleep(0.01)
    return log


# ---- its life


async def test_a_service_is_started_when_it_is_wanted_and_not_before(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        assert (made.chroma.state, made.chroma.pid) == (ServiceState.IDLE, None)
        assert await made.chroma.ready(patience_s=PATIENCE_S)
        assert made.chroma.pid is not None


async def test_a_service_ends_with_the_daemon(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        await made.chroma.ready(patience_s=PATIENCE_S)
        pid = made.chroma.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_where_the_daemon_is_root_a_service_is_not_and_can_gain_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        await made.chroma.ready(patience_s=PATIENCE_S)
        lines = Path(f"/proc/{made.chroma.pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        uid = str(supervisor.NOBODY_UID if os.geteuid() == 0 else os.geteuid())
        assert status["Uid"] == [uid] * 4
        assert status["CapEff"] == ["0000000000000000"]
        assert status["NoNewPrivs"] == ["1"]
        limits = Path(f"/proc/{made.chroma.pid}/limits").read_text()
        assert "Max core file size        0 " in limits
        assert str(4 << 30) in limits


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_service_that_dies_or_hangs_is_started_again_and_has_kept_what_it_said(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was acknowledged is on the disk; who asks meanwhile waits, and is answered."""
    monkeypatch.setattr(supervisor, "HEALTH_DEADLINE_S", 0.2)
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 0.2)
    async with world(tmp_path) as made, made.inside("sb-1", "shared") as inside:
        identity = await inside.make("notes")
        assert (await inside.ask("POST", f"{BASE}/collections/{identity}/add", {"ids": "1"}))[0] == 201
        first = made.chroma.pid
        assert first is not None
        os.kill(first, number)
        await until_state(made.chroma, ServiceState.DEGRADED)
        assert (await inside.ask("POST", f"{BASE}/collections/{identity}/get"))[1] == {"ids": "1"}
        assert made.chroma.pid != first
        assert made.chroma.restarts == 1


async def test_one_that_ends_with_0_at_once_is_degraded_and_says_why_and_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy port makes ChromaDB print a line and end with 0: that is no success."""
    monkeypatch.setattr("sandboxd.services.chroma.READY_PATIENCE_S", 0.3)
    (tmp_path / "chroma" / "data").mkdir(parents=True)
    (tmp_path / "chroma" / "data" / "die").touch()
    async with world(tmp_path) as made, made.inside("sb-1", "shared") as inside:
        status, said = await inside.ask("GET", "/api/v2/heartbeat")
        assert (status, said["error"]) == (503, "ServiceUnavailable")
        await until_state(made.chroma, ServiceState.DEGRADED)
        assert made.chroma.reason == "it ended with 0"
        await logged(made.chroma, "already in use")


async def test_who_asks_for_a_restart_does_not_wait_for_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S_MIN", 1000.0)
    die = tmp_path / "chroma" / "data" / "die"
    die.parent.mkdir(parents=True)
    die.touch()
    async with world(tmp_path) as made:
        made.chroma.want()
        await until_state(made.chroma, ServiceState.DEGRADED)
        die.unlink()
        await made.chroma.restart()
        assert await made.chroma.ready(patience_s=PATIENCE_S)


async def test_two_are_never_started_on_the_same_data(tmp_path: Path) -> None:
    """Two servers on one directory both start, and both write."""
    async with world(tmp_path) as first:
        await first.chroma.ready(patience_s=PATIENCE_S)
        async with world(tmp_path) as second:
            second.chroma.want()
            await until_state(second.chroma, ServiceState.DEGRADED)
            assert "still uses its data" in second.chroma.reason
            assert second.chroma.pid is None


async def test_whoever_else_answers_on_its_port_is_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of a port and listening on it, another user's program can take it, and would be told all."""

    async def impostor(accepted: socket.socket) -> None:
        await streams.receive(accepted)
        await streams.send(accepted, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    sleeper = (sys.executable, "-c", "import time; time.sleep(100)")
    async with door(impostor) as (port, _):
        monkeypatch.setattr(supervisor, "free_port", lambda: port)
        async with world(tmp_path, argv=sleeper) as made:
            made.chroma.spec = msgspec.structs.replace(made.chroma.spec, network="host")
            assert not await made.chroma.ready(patience_s=0.5)
            assert made.chroma.state is ServiceState.STARTING


def processes_in(network: str) -> set[int]:
    """Those whose network it is, by its link in /proc."""
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.readlink(f"/proc/{name}/ns/net") == network:
                found.add(int(name))
    return found


@pytest.mark.skipif(not launcher.can_have_own_network(), reason="this host gives nobody a network namespace")
async def test_nobody_else_on_the_host_can_connect_to_a_service_and_nothing_of_its_network_stays(
    tmp_path: Path,
) -> None:
    """A port of the host's loopback is every user's, and a database asks nobody who he is."""
    async with world(tmp_path) as made, made.inside("sb-1", "shared") as inside:
        await inside.make("notes")
        assert made.chroma.network == "own"
        assert made.room.exposed() == []
        assert isinstance(made.chroma.address, tuple)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(made.chroma.address)
        network = os.readlink(f"/proc/{made.chroma.pid}/ns/net")
        assert network != os.readlink("/proc/self/ns/net")
        assert made.chroma.pid in processes_in(network)
    assert made.chroma.network is None
    async with asyncio.timeout(PATIENCE_S):
        while processes_in(network):  # noqa: ASYNC110  (a process that nobody waits for tells nobody of its end)
            await asyncio.sleep(0.01)


async def test_where_the_kernel_gives_no_network_a_service_is_on_the_hosts_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = tmp_path / "denied.py"
    denied.write_text(f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("launcher", {launcher.__file__!r})
launcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(launcher)
def enter_own_network():
    raise PermissionError
launcher.enter_own_network = enter_own_network
launcher.main(sys.argv[1:])
""")
    monkeypatch.setattr(launcher, "__file__", str(denied))
    async with world(tmp_path / "services") as made, made.inside("sb-1", "shared") as inside:
        await inside.make("notes")
        assert made.chroma.network == "host"
        assert made.room.exposed() == ["chroma"]
        assert isinstance(made.chroma.address, tuple)
        socket.create_connection(made.chroma.address).close()


async def test_who_is_not_root_has_a_network_for_it_too() -> None:
    """By a user namespace, in which the program has no right and is who it was."""
    python, uid = "/usr/bin/python3", 65534 if os.geteuid() == 0 else os.geteuid()
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if os.geteuid() == 0 else []
    if (await anyio.run_process([*become, "unshare", "-Urn", "true"], check=False)).returncode:
        pytest.skip("this host gives ordinary users no namespaces")
    with tempfile.TemporaryDirectory() as data:
        shutil.copy(launcher.__file__, data)
        os.chmod(data, 0o755)
        port, way_in = free_port(), WayIn()
        child = process.start(
            [
                *(*become, python, "-IS", f"{data}/launcher.py", str(os.getpid()), str(uid), str(1 << 30), "64"),
                *("none", str(way_in.passed), data, "", "--", python, "-c", ECHO, str(port)),
            ],
            what="a service",
            env={"PATH": os.environ["PATH"]},
            passed=(way_in.passed,),
        )
        way_in.started()
        try:
            connected = await reached(way_in, port)
            with connected:
                await streams.send(connected, b"hello")
                assert await streams.receive(connected) == b"hello"
            assert way_in.own
            assert os.readlink(f"/proc/{child.pid}/ns/net") != os.readlink("/proc/self/ns/net")
            status = Path(f"/proc/{child.pid}/status").read_text()
            assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in status
            assert "CapEff:\t0000000000000000\n" in status
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
        finally:
            way_in.close()
            await child.close(grace_s=0)


async def reached(way_in: WayIn, port: int) -> socket.socket:
    """A connection, once the program listens."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                return await way_in.connect(port, deadline_s=PATIENCE_S)
            await asyncio.sleep(0.01)


async def test_who_stops_waiting_for_a_socket_leaves_none_that_is_of_no_use(tmp_path: Path) -> None:
    """A socket that comes late is the next one's: nothing gets out of step or piles up."""
    async with world(tmp_path) as made:
        assert await made.chroma.ready(patience_s=PATIENCE_S)
        for _ in range(1000):
            asking = asyncio.ensure_future(made.chroma.connect())
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        (await made.chroma.connect()).close()


async def test_a_program_that_is_missing_is_degraded_with_a_hint(tmp_path: Path) -> None:
    room = ServiceRoom(Config(), str(tmp_path), list)
    made = room.get("chroma")
    if made.spec.missing:
        assert "sandboxd[chroma]" in made.spec.hint
    made.spec = msgspec.structs.replace(made.spec, missing="it is not installed")
    async with anyio.create_task_group() as tasks:
        room.start(Background(tasks))
        async with door(room.server(GrantRecord(service="chroma"), sandbox_id="sb-1")) as (port, _):
            with anyio.fail_after(PATIENCE_S / 2):  # and not for as long as a start is waited for
                status, said = await Inside(port).ask("GET", "/api/v2/heartbeat")
        assert (status, said["message"]) == (503, "the shared ChromaDB does not answer: it cannot be started here")
        await until_state(made, ServiceState.DEGRADED)
        assert made.reason == "it is not installed"
        tasks.cancel_scope.cancel()


async def test_more_memory_than_it_may_have_is_not_to_be_had(tmp_path: Path) -> None:
    """The program is told so, and ends by itself or lives with it; nobody else pays for it."""
    hog = "bytearray(64 << 20); print('small enough', flush=True); bytearray(512 << 20); print('too much')"
    settings = {"hog": ServiceSetting(port=7000, command=[sys.executable, "-c", hog], memory="256m")}
    async with world(tmp_path, settings) as made:
        service = made.room.get("hog")
        service.spec = msgspec.structs.replace(service.spec, keep=(sys.prefix, sys.base_prefix))
        service.want()
        await until_state(service, ServiceState.DEGRADED)
        assert service.reason == "it ended with 1"
        log = await logged(service, "MemoryError")
        assert "small enough" in log
        assert "too much" not in log


# ---- scopes


async def test_two_sandboxes_share_and_a_third_reads_and_a_private_one_sees_nothing(tmp_path: Path) -> None:
    async with (
        world(tmp_path) as made,
        made.inside("sb-1", "shared") as first,
        made.inside("sb-2", "shared") as second,
        made.inside("sb-3", "shared-ro") as reader,
        made.inside("sb-4", "private") as private,
    ):
        identity = await first.make("notes")
        assert await second.names() == await reader.names() == ["notes"]
        assert await private.names() == []
        assert (await reader.ask("POST", f"{BASE}/collections", {"name": "mine"}))[0] == 403
        assert (await reader.ask("POST", f"{BASE}/collections/{identity}/add", {"a": "b"}))[0] == 403


async def test_an_id_from_another_database_opens_nothing(tmp_path: Path) -> None:
    """ChromaDB would serve it: whoever may only read could write through his own database."""
    async with (
        world(tmp_path) as made,
        made.inside("sb-1", "shared") as first,
        made.inside("sb-2", "private") as private,
        made.inside("sb-3", "shared-ro", "private") as both,
    ):
        identity = await first.make("notes")
        private_base = BASE.replace("default_database", "private")
        for inside, base in ((private, BASE), (both, private_base)):
            for verb in ("get", "add"):
                status, said = await inside.ask("POST", f"{base}/collections/{identity}/{verb}", {"evil": "1"})
                assert (status, said["error"]) == (404, "NotFoundError")
        assert (await both.ask("POST", f"{BASE}/collections/{identity}/get"))[0] == 200


async def test_what_is_private_goes_with_the_sandbox_and_what_is_kept_stays(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        async with made.inside("sb-1", "private", "private:team") as inside:
            await inside.make("mine")
            await inside.make("ours", BASE.replace("default_database", "team"))
        await made.room.forget("sb-1", [GrantRecord(service="chroma", scopes=("private", "private:team"))])
        async with made.inside("sb-1", "private", "private:team") as inside:
            assert await inside.names() == []
            assert await inside.names(BASE.replace("default_database", "team")) == ["ours"]


async def test_what_could_not_be_removed_is_removed_when_it_starts_the_next_time(tmp_path: Path) -> None:
    async with world(tmp_path) as made, made.inside("sb-1", "private") as inside:
        await inside.make("mine")
        made.sandbox_ids.remove("sb-1")
        await made.chroma.restart()
        assert await inside.names() == []


async def test_a_restart_is_not_noticed_by_who_keeps_a_connection(tmp_path: Path) -> None:
    request = b"GET /api/v2/heartbeat HTTP/1.1\r\nHost: x\r\n\r\n"
    async with world(tmp_path) as made, made.inside("sb-1", "shared") as inside:
        reader, writer = await asyncio.open_connection("127.0.0.1", inside.port)
        for _ in range(3):
            writer.write(request)
            async with asyncio.timeout(PATIENCE_S):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                await reader.readuntil(b"}")
            await made.chroma.restart()
        writer.close()


# ---- copies


async def test_a_copy_brings_back_what_was_there_and_keeps_what_came_after(tmp_path: Path) -> None:
    async with world(tmp_path / "state") as made, made.inside("sb-1", "shared") as inside:
        await inside.make("before")
        copied = await made.room.backup("chroma", str(tmp_path / "copy.tar"))
        assert copied.size_bytes == (tmp_path / "copy.tar").stat().st_size
        assert (tmp_path / "copy.tar").stat().st_mode & 0o777 == 0o600
        await inside.make("after")
        restored = await made.room.restore("chroma", str(tmp_path / "copy.tar"))
        assert await inside.names() == ["before"]
        assert restored.former_data_dir is not None
        assert "after" in Path(restored.former_data_dir, "store.json").read_text()


async def test_a_copy_replaces_nothing_and_nonsense_is_not_put_back(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"no archive at all")
    async with world(tmp_path / "state") as made, made.inside("sb-1", "shared") as inside:
        await inside.make("before")
        with pytest.raises(Conflict):
            await made.room.backup("chroma", str(tmp_path / "there"))
        with pytest.raises(InvalidArgument):
            await made.room.backup("chroma", "relative")
        with pytest.raises(InvalidArgument):
            await made.room.restore("chroma", str(tmp_path / "there"))
        with pytest.raises(NotFound):
            await made.room.restore("chroma", str(tmp_path / "missing"))
        assert await inside.names() == ["before"]
        assert not os.path.exists(f"{made.chroma.data_dir}.restoring")


# ---- a user's own


async def test_a_service_of_the_users_own_is_run_and_reached_like_chroma(tmp_path: Path) -> None:
    settings = {"echo": ServiceSetting(port=7000, command=[sys.executable, "-c", ECHO, "{port}"])}
    async with world(tmp_path, settings) as made:
        made.room.get("echo").spec = msgspec.structs.replace(
            made.room.get("echo").spec, keep=(sys.prefix, sys.base_prefix)
        )
        async with door(made.room.server(GrantRecord(service="echo"), sandbox_id="sb-1")) as (port, _):
            assert await said_by(port, b"hello") == b"hello"


async def test_a_service_of_somebody_else_is_reached_where_it_is(tmp_path: Path) -> None:
    async def echo(accepted: socket.socket) -> None:
        await streams.send(accepted, await streams.receive(accepted))

    async with door(echo) as (port, _):
        settings = {"db": ServiceSetting(port=5432, address=f"127.0.0.1:{port}")}
        async with world(tmp_path, settings) as made:
            async with door(made.room.server(GrantRecord(service="db"), sandbox_id="sb-1")) as (inside, _):
                assert await said_by(inside, b"hello") == b"hello"
            with pytest.raises(Unsupported):
                await made.room.backup("db", str(tmp_path / "copy.tar"))


async def said_by(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    return answer


async def test_grants_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    settings = {"one": ServiceSetting(port=8000, address="127.0.0.1:1")}
    async with world(tmp_path, settings) as made:
        assert made.room.grants(["chroma=shared-ro", "chroma=private"], sandbox_id="sb-1") == (
            GrantRecord(service="chroma", scopes=("shared-ro", "private")),
        )
        for texts, scopes in (
            (["chroma"], ()),
            (["chroma", "chroma=private"], ("shared", "private")),
            (["chroma=private", "chroma"], ("private", "shared")),
        ):
            assert made.room.grants(texts, sandbox_id="sb-1") == (GrantRecord(service="chroma", scopes=scopes),)
        for texts, failure in (
            (["chroma", "chroma=shared"], InvalidArgument),
            (["nothing"], NotFound),
            (["chroma=everything"], InvalidArgument),
            (["chroma="], InvalidArgument),
            (["one=shared"], InvalidArgument),
            (["chroma", "one"], InvalidArgument),
        ):
            with pytest.raises(failure):
                made.room.grants(texts, sandbox_id="sb-1")


# ---- containers


class FakeBox:
    """A container whose program is a server on the loopback that says what it hears, and lives until it is told."""

    def __init__(self, number: int, said: bytes) -> None:
        self.sandbox_id = f"sb-{number}"
        self.pid: int | None = number
        self.data_inside = "/workspace"
        self.argv: list[str] = []
        self.ends = anyio.Event()
        self.closed = False
        self._said = said
        self._port = 0

    async def run(self, argv: Sequence[str], output: int) -> str:
        self.argv = list(argv)
        os.write(output, self._said)
        async with door(self._echo) as (port, _):
            self._port = port
            await self.ends.wait()
        return "it ended with 7"

    async def _echo(self, accepted: socket.socket) -> None:
        await streams.send(accepted, await streams.receive(accepted))

    async def dial(self, port: int) -> socket.socket:
        assert port == 7000
        if self.ends.is_set() or not self._port:
            raise ConnectionRefusedError
        return await streams.connect(socket.AF_INET, ("127.0.0.1", self._port), deadline_s=PATIENCE_S)


class FakeBoxes:
    def __init__(self) -> None:
        self.made: list[FakeBox] = []
        self.failure: Failure | None = None

    @contextlib.asynccontextmanager
    async def box(self, spec: Any) -> AsyncIterator[FakeBox]:
        if self.failure is not None:
            raise self.failure
        assert all(box.closed for box in self.made), "two at once on the same data"
        box = FakeBox(len(self.made), b"it begins\n")
        self.made.append(box)
        try:
            yield box
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            box.closed = True


CONTAINED = ServiceSetting(port=7000, image="i", command=["serve", "--on", "{port}", "--in", "{data}/db"])


@contextlib.asynccontextmanager
async def contained(directory: Path) -> AsyncIterator[tuple[Service, FakeBoxes, int]]:
    """A service, what makes its containers, and the port of a sandbox's door to it."""
    boxes = FakeBoxes()
    room = ServiceRoom(Config(services={"box": CONTAINED}), str(directory), list, boxes)
    async with anyio.create_task_group() as tasks:
        room.start(Background(tasks))
        async with door(room.server(GrantRecord(service="box"), sandbox_id="sb-1")) as (port, _):
            yield room.get("box"), boxes, port
        tasks.cancel_scope.cancel()
    assert all(box.closed for box in boxes.made)


async def is_reached(service: Service) -> None:
    connected = await service.reach(patience_s=PATIENCE_S)
    assert connected is not None
    connected.close()


async def test_a_container_is_told_its_port_and_place_and_reached_through_its_door(tmp_path: Path) -> None:
    async with contained(tmp_path) as (service, boxes, port):
        assert await said_by(port, b"hello") == b"hello"
        (box,) = boxes.made
        assert box.argv == ["serve", "--on", "7000", "--in", "/workspace/db"]
        assert (service.state, service.pid, service.sandbox_id, service.address) == (
            ServiceState.READY,
            0,
            "sb-0",
            None,
        )
        assert await logged(service, "it begins") == "it begins\n"


async def test_a_container_that_ends_is_made_anew_and_who_comes_meanwhile_waits(tmp_path: Path) -> None:
    async with contained(tmp_path) as (service, boxes, port):
        await is_reached(service)
        boxes.made[0].ends.set()
        assert await said_by(port, b"again") == b"again"
        assert service.sandbox_id == "sb-1"
        assert service.restarts == 1


async def test_a_container_is_gone_before_its_restart_makes_the_next(tmp_path: Path) -> None:
    async with contained(tmp_path) as (service, boxes, _):
        await is_reached(service)
        async with service.stopped():
            assert (boxes.made[0].closed, service.sandbox_id, service.pid) == (True, None, None)
        await is_reached(service)
        assert service.sandbox_id == "sb-1"


async def test_a_container_that_cannot_be_made_is_degraded_with_the_reason_and_tried_again(tmp_path: Path) -> None:
    async with contained(tmp_path) as (service, boxes, _):
        boxes.failure = Failure("no such image", hint="pull it")
        service.want()
        await until_state(service, ServiceState.DEGRADED)
        assert (service.reason, service.hint) == ("no such image", "pull it")
        boxes.failure = None
        await is_reached(service)
        assert service.hint == ""


async def test_data_in_memory_is_not_copied_and_the_way_to_keep_it_is_said(tmp_path: Path) -> None:
    room = ServiceRoom(Config(services={"box": CONTAINED}), str(tmp_path), list, FakeBoxes())
    with pytest.raises(Unsupported) as refused:
        await room.backup("box", str(tmp_path / "copy.tar"))
    assert "[services.box]" in refused.value.hint
