"""A real `sandbox-init` on the host, built with AddressSanitizer and UBSan, for the tests of its room.

`running_init()` gives a `Host`; when it ends, init must have ended cleanly, nothing that it started may live, and
this process must hold as many descriptors as before. Each command carries a mark in its environment, by which it
is found wherever it fled to.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import ModuleType

from runtimes.init.channel import InitChannel, Spawned
from runtimes.init.wire import Exited, Gone, PtySize, Rlimit, SpawnRequest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0  # of a condition that should come true within milliseconds; sanitizers and 2 cores are slow
GOLDEN = ROOT / "tests" / "golden"
FOLDER_OF_INIT = ROOT / "runtimes" / "init"
STORM_SOURCE = Path(__file__).with_name("init_storm.c")


def load_build_hook() -> ModuleType:
    """hack/build_init.py as a module: hack/ is no package."""
    spec = importlib.util.spec_from_file_location("build_init", ROOT / "hack" / "build_init.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="init-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def sanitized_init() -> Path:
    """The program under test, built once per session. Fails, and says what to install, without sanitizers."""
    output = _scratch() / "sandbox-init"
    load_build_hook().compile_init(output, sanitize=True)
    return output


@functools.cache
def old_init(version: str) -> Path:
    """An init of a former version, from the sources that it was released with: sandboxes keep theirs for years."""
    folder = _scratch() / f"init-{version}"
    folder.mkdir()
    with tarfile.open(GOLDEN / f"init-{version}.tar.xz") as archive:
        for member in archive:
            source = archive.extractfile(member)
            assert source is not None
            (folder / member.name).write_bytes(source.read())
    load_build_hook().compile_init(folder / "sandbox-init", sources=sorted(folder.glob("*.c")), sanitize=False)
    return folder / "sandbox-init"


@functools.cache
def storm() -> bytes:
    """A program that flees: see init_storm.c."""
    output = _scratch() / "storm"
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-o", str(output), str(STORM_SOURCE)], check=True)
    return os.fsencode(output)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Returns when the condition holds; there are no events for what other processes do."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    assert condition(), what


@contextlib.contextmanager
def devnull() -> Iterator[int]:
    """A descriptor to read nothing from and to write nothing to."""
    descriptor = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def status_of(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


class Ends:
    """The events that arrived, each command's apart."""

    def __init__(self) -> None:
        self.log: list[Exited | Gone] = []
        self._waiting: dict[tuple[type, int], asyncio.Future[Exited | Gone]] = {}
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def _future(self, kind: type, command_id: int) -> asyncio.Future[Exited | Gone]:
        return self._waiting.setdefault((kind, command_id), asyncio.get_running_loop().create_future())

    def on_event(self, event: Exited | Gone) -> None:
        self.log.append(event)
        if self._future(type(event), event.command_id).done():  # an id that was forgotten and used again
            del self._waiting[type(event), event.command_id]
        self._future(type(event), event.command_id).set_result(event)

    def on_closed(self, error: Exception | None) -> None:
        self.closed.set_result(error)

    async def exited(self, command_id: int) -> Exited:
        event = await asyncio.wait_for(asyncio.shield(self._future(Exited, command_id)), DEADLINE_S)
        assert isinstance(event, Exited)
        return event

    async def gone(self, command_id: int) -> Gone:
        event = await asyncio.wait_for(asyncio.shield(self._future(Gone, command_id)), DEADLINE_S)
        assert isinstance(event, Gone)
        return event


class Host:
    """One init and one channel to it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], mark: str) -> None:
        self.socket_path = str(folder / "init.sock")
        self.folder = folder
        self.process = process
        self.mark = mark
        self.ends = Ends()
        self.channel: InitChannel
        self._last_id = 0

    @property
    def env(self) -> list[bytes]:
        return [b"PATH=/usr/bin:/bin", b"INIT_TEST_MARK=" + self.mark.encode()]

    async def connect(self) -> None:
        self.ends = Ends()
        self.channel = await InitChannel.connect(
            self.socket_path, timeout_s=DEADLINE_S, on_event=self.ends.on_event, on_closed=self.ends.on_closed
        )

    def new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    async def spawn(
        self,
        *argv: bytes | str,
        stdout: int | None = None,
        stdin: int | None = None,
        pty: PtySize | None = None,
        keep_pty: bool = False,
        rlimits: tuple[Rlimit, ...] = (),
        cwd: bytes = b"/",
        env: list[bytes] | None = None,
    ) -> tuple[int, Spawned]:
        command_id = self.new_id()
        request = SpawnRequest(
            command_id=command_id,
            argv=[os.fsencode(word) for word in argv],
            env=self.env if env is None else env,
            cwd=cwd,
            rlimits=rlimits,
            pty=pty,
            keep_pty=keep_pty,
        )
        with devnull() as nothing:
            out = nothing if stdout is None else stdout
            descriptors = () if pty else (nothing if stdin is None else stdin, out, out)
            return command_id, await self.channel.spawn(request, descriptors)

    async def shell(self, script: str, **options: object) -> tuple[int, Spawned]:
        return await self.spawn("sh", "-c", script, **options)  # type: ignore[arg-type]

    async def output(self, *argv: bytes | str, **options: object) -> bytes:
        """What a command wrote, when all of it has ended."""
        with tempfile.TemporaryFile() as file:
            command_id, _ = await self.spawn(*argv, stdout=file.fileno(), **options)  # type: ignore[arg-type]
            await self.ends.gone(command_id)
            file.seek(0)
            return file.read()

    def marked(self) -> list[int]:
        """The living processes that carry this host's mark."""
        wanted = b"INIT_TEST_MARK=" + self.mark.encode()
        return [pid for pid in _pids() if wanted in _environment(pid) and state_of(pid) not in "ZX?"]

    def file_workers(self) -> list[int]:
        """The living file workers of this init."""
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return []
        return [int(child) for child in children if name_of(int(child)) == "sandbox-files"]

    async def kill_and_check(self, command_id: int) -> None:
        """Kills, and holds init to its word: gone means that nobody is left."""
        await self.channel.kill(command_id)
        await self.ends.gone(command_id)
        assert self.marked() == []


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def name_of(pid: int) -> str:
    """Empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def state_of(pid: int) -> str:
    return (stat_of(pid) or ["?"])[0]


def parent_of(pid: int) -> int:
    return int(stat_of(pid)[1])


def open_descriptors(pid: int | str = "self") -> dict[int, str]:
    """Number and target of each; the one that lists them has gone by the time it is asked for."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def descriptor_count(pid: int) -> int:
    """How many are open in a process whose descriptors only root may list, as it is not dumpable."""
    folder = f"/proc/{pid}/fd"
    return os.stat(folder).st_size or len(os.listdir(folder))  # the size says it since Linux 6.2


def _start(program: Path, folder: str, stderr: int, prepare: Callable[[], None] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # As in a sandbox; and without it the kernel lets only root install init's seccomp filter.
        ["setpriv", "--no-new-privs", program, "--no-pid1", folder],
        stdin=subprocess.DEVNULL,
        stderr=stderr,
        # An undumpable process cannot be searched for leaks, and this one has no heap to leak.
        env={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        preexec_fn=prepare,
    )


@contextlib.asynccontextmanager
async def running_init(
    *, connected: bool = True, prepare: Callable[[], None] | None = None, program: Path | None = None
) -> AsyncIterator[Host]:
    """A host whose init runs, after `prepare` in its process; see above for what is checked at the end."""
    before = open_descriptors()
    with tempfile.TemporaryDirectory(prefix="init-") as folder, tempfile.TemporaryFile() as stderr:
        process = _start(program or sanitized_init(), folder, stderr.fileno(), prepare)
        host = Host(Path(folder), process, uuid.uuid4().hex)
        try:
            await until(lambda: os.path.exists(host.socket_path) or process.poll() is not None, "init listens")
            if connected:
                await host.connect()
            yield host
            if connected:
                host.channel.close()
            workers = host.file_workers()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            await until(lambda: process.poll() is not None, "init ends")
            assert not [pid for pid in workers if state_of(pid) not in "ZX?"], "a file worker is left"
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pid in host.marked():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                print(f"process {pid} was left behind", file=sys.stderr)
            stderr.seek(0)
            said = stderr.read().decode(errors="replace")
        assert said == ""
        assert process.returncode == 0
    # What others had open when this began, and have closed since, is not missed.
    await until(lambda: open_descriptors().items() <= before.items(), "no descriptor is left")
