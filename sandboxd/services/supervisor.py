"""One service: started when it is first wanted, watched, started again when it ends, and never for longer than we.

::

    IDLE --wanted--> STARTING --its health check answers--> READY --ends, or stops answering--> DEGRADED
                        `--ends, or takes too long--> DEGRADED --after a while, longer each time--> STARTING

Nobody's request waits for more than it wants to: ``ready`` gives up by itself, and a sandbox never fails because a
service does.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import functools
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import anyio
import anyio.to_thread
import msgspec

from runtimes import process
from runtimes.errors import RuntimeFailure
from sandboxd.failures import Failure
from sandboxd.network.http import ask_over
from sandboxd.network.streams import connect
from sandboxd.services import launcher
from sandboxd.services.way_in import WayIn, free_port, listens
from sandboxd.timings import now_ms

logger = logging.getLogger(__name__)

START_DEADLINE_S = 60.0
"""A large database is opened within it on a slow disk."""
START_POLL_S = 0.05
WATCH_PERIOD_S = 10.0
HEALTH_DEADLINE_S = 5.0
HEALTH_FAILURES_MAX = 3
STOP_GRACE_S = 10.0
RECONNECT_PAUSE_S = 0.2

BACKOFF_S_MIN = 0.2
BACKOFF_S_MAX = 30.0
STEADY_S = 60.0
"""Ready for so long, and the next restart is quick again."""

LOG_BYTES_MAX = 1024 * 1024
"""Of the log that is written and of the one before it."""

FILES_MAX = 4096
NOBODY_UID = 64901
"""Of services, where the daemon is root: in no one's range, so that it is nobody else."""


class ServiceState(enum.StrEnum):
    """What is true of a service."""

    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPED = "stopped"


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The container of a service that runs in one."""

    image: str
    engine: str | None
    cpus: str | None
    pids: int | None
    env: dict[str, str]
    data: str
    """A directory of the host, seen inside as the data; empty: data is in memory and goes with the container."""
    secrets: tuple[str, ...]


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a service is."""

    name: str
    argv: tuple[str, ...]
    """``{port}`` and ``{data}`` are replaced; empty: it is somebody else's, and only reached."""
    container: ContainerSpec | None = None
    """Where it runs; None: on the host."""
    port_inside: int
    """On the loopback of sandboxes."""
    address: tuple[str, int] | str | None = None
    """Of a service that is somebody else's."""
    health_path: str = ""
    """Answered with 200 when it is well; empty: a connection is enough."""
    memory_bytes_max: int = 0
    missing: str = ""
    """Why it cannot be started at all; empty: it can."""
    hint: str = ""
    """What to type then."""
    env: dict[str, str] = {}
    """On top of what every service gets."""
    keep: tuple[str, ...] = ()
    """Directories that the program needs, where the daemon is root."""
    network: Literal["none", "host"] = "none"
    """On the host: ``none``: a network of its own, with nothing but a loopback, where this host lets us."""
    own_listener: bool = True
    """The program itself listens: whoever else answers on its port is not it."""


class Box(Protocol):
    """A container in which a service may run, without a network."""

    sandbox_id: str
    pid: int | None
    """Of its init, on the host."""
    data_inside: str

    async def run(self, argv: Sequence[str], output: int) -> str:
        """Run the service until it ends; how it ended. What it prints goes to ``output``."""
        ...

    async def dial(self, port: int) -> socket.socket:
        """A connection to a port inside.

        Raises:
            OSError: nobody listens there.
        """
        ...


class Boxes(Protocol):
    """What makes such containers."""

    def box(self, spec: ServiceSpec) -> AbstractAsyncContextManager[Box]:
        """One of them for the length of an ``async with``.

        Raises:
            Failure, RuntimeFailure: it cannot be made; nothing is left.
        """
        ...


def _nobody_else() -> bool:
    """Whoever answers is it."""
    return True


class Service:
    """One service, while the daemon runs.

    Args:
        spec: What it is.
        directory: What the daemon keeps of it.
        boxes: Where it runs, if it runs in a container.
    """

    def __init__(self, spec: ServiceSpec, directory: str, boxes: Boxes | None = None) -> None:
        self.spec = spec
        self.data_dir = os.path.join(directory, "data")
        if spec.container is not None:
            self.data_dir = spec.container.data
        self._boxes = boxes
        self._box: Box | None = None
        self._way_in: WayIn | None = None
        self._lives = False
        self.state = ServiceState.IDLE
        self.reason = spec.missing
        self.hint = spec.hint
        """What to type, where there is a reason."""
        self.pid: int | None = None
        self.restarts = 0
        self.since_ms = now_ms()
        self._directory = directory
        self._log_path = os.path.join(directory, "log")
        self._endpoint: tuple[str, int] | str | None = None
        self._wanted = anyio.Event()
        self._changed = anyio.Event()
        self._hurry = anyio.Event()
        """Somebody will not wait until it is tried again."""
        self._life = anyio.CancelScope()
        self._held = anyio.Lock()
        self.on_ready: Callable[[], Awaitable[None]] | None = None
        """Called each time it has become ready, before anybody is let to it."""

    # --- using it -------------------------------------------------------------------------------------

    def want(self) -> None:
        """Have it started. Idempotent; returns at once."""
        self._wanted.set()

    @property
    def address(self) -> tuple[str, int] | str | None:
        """Where it is, if it runs, in its ``network``; in a container it is nowhere on the host."""
        return self._endpoint

    @property
    def network(self) -> Literal["own", "host"] | None:
        """Which network it is in; None: it does not run, or is not run here."""
        if self._box is not None:
            return "own"
        if self._way_in is None or self._way_in.own is None:
            return None
        return "own" if self._way_in.own else "host"

    @property
    def sandbox_id(self) -> str | None:
        """Of the container that it runs in."""
        return None if self._box is None else self._box.sandbox_id

    async def reach(self, *, patience_s: float) -> socket.socket | None:
        """A connection to it, once it is ready; None: it takes none, within ``patience_s``."""
        self.want()
        with anyio.move_on_after(patience_s):
            while True:
                await self._until_ready()
                try:
                    return await self.connect()
                except (OSError, TimeoutError):
                    # It has ended, and nobody has seen it yet.
                    with anyio.move_on_after(RECONNECT_PAUSE_S):
                        await self._changed.wait()
        return None

    async def _until_ready(self) -> None:
        while self.state is not ServiceState.READY:
            await self._changed.wait()

    async def connect(self) -> socket.socket:
        """A connection to it, as it is now.

        Raises:
            OSError: it does not run, or takes none.
            TimeoutError: it does not answer.
        """
        if self._box is not None:
            return await self._box.dial(self.spec.port_inside)
        if self._way_in is not None and isinstance(self._endpoint, tuple):
            return await self._way_in.connect(self._endpoint[1], deadline_s=HEALTH_DEADLINE_S)
        if self._endpoint is None:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        family = socket.AF_UNIX if isinstance(self._endpoint, str) else socket.AF_INET
        return await connect(family, self._endpoint, deadline_s=HEALTH_DEADLINE_S)

    async def ready(self, *, patience_s: float) -> bool:
        """Whether it is ready now, or within ``patience_s``."""
        self.want()
        if self.spec.missing:
            return False
        with anyio.move_on_after(patience_s):
            await self._until_ready()
        return self.state is ServiceState.READY

    async def restart(self) -> None:
        """Have it ended and started anew; returns when it has begun to."""
        self.want()
        async with self.stopped():
            pass

    @contextlib.asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """It does not run, for the length of an ``async with``; whoever uses it waits meanwhile."""
        async with self._held:
            self._life.cancel()
            self._hurry.set()
            while self._lives:
                await self._changed.wait()
            before = self.state
            self._become(ServiceState.STOPPED if before is not ServiceState.IDLE else before, "on request")
            try:
                yield
            finally:
                self.restarts += before is not ServiceState.IDLE

    async def log_tail(self, bytes_max: int) -> str:
        """The end of what it printed."""
        return await anyio.to_thread.run_sync(self._read_log, bytes_max)

    def _read_log(self, bytes_max: int) -> str:
        parts = []
        for path in (f"{self._log_path}.1", self._log_path):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                parts.append(file.read(2 * LOG_BYTES_MAX))
        return b"".join(parts)[-bytes_max:].decode(errors="replace")

    # --- its life -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep it running while it is wanted, until cancelled."""
        pause_s = BACKOFF_S_MIN
        await self._wanted.wait()
        while not self.spec.missing:
            async with self._held:
                self._life = anyio.CancelScope()
            began_s = anyio.current_time()
            with self._life:
                await self._live()
            if self._life.cancelled_caught:
                async with self._held:  # until whoever stopped it is done
                    continue
            if anyio.current_time() - began_s > STEADY_S:
                pause_s = BACKOFF_S_MIN
            self.restarts += 1
            logger.warning("service %s: %s; trying again in %.1f s", self.spec.name, self.reason, pause_s)
            with anyio.move_on_after(pause_s):
                await self._hurry.wait()
            self._hurry = anyio.Event()
            pause_s = min(2 * pause_s, BACKOFF_S_MAX)
        self._become(ServiceState.DEGRADED, self.spec.missing)

    async def _live(self) -> None:
        """From a start to an end; what went wrong becomes the reason."""
        self._become(ServiceState.STARTING, "")
        self._lives = True
        try:
            if self.spec.container is not None:
                await self._live_in_a_box()
            elif self.spec.argv:
                await self._live_as_child()
            else:
                self._endpoint = self.spec.address
                await self._begin()
                await self._watch()
        except (Failure, RuntimeFailure, OSError, _Unwell) as error:
            self.hint = getattr(error, "hint", "")
            self._become(ServiceState.DEGRADED, str(error))
        finally:
            self._lives = False
            self._notify()

    async def _live_in_a_box(self) -> None:
        assert self._boxes is not None
        await anyio.to_thread.run_sync(functools.partial(os.makedirs, self._directory, mode=0o700, exist_ok=True))
        async with self._boxes.box(self.spec) as box:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            try:
                os.set_blocking(reading, False)
                self._box, self.pid = box, box.pid
                port = str(self.spec.port_inside)
                argv = [part.replace("{port}", port).replace("{data}", box.data_inside) for part in self.spec.argv]
                how = ""
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._keep_log, reading)
                    tasks.start_soon(self._attend, tasks.cancel_scope)
                    how = await box.run(argv, writing)
                    tasks.cancel_scope.cancel()
                self._become(ServiceState.DEGRADED, how or self.reason)
            finally:
                self._box = self.pid = None
                os.close(reading)
                os.close(writing)

    async def _live_as_child(self) -> None:
        await anyio.to_thread.run_sync(self._prepare)
        lock = _hold(os.path.join(self._directory, "lock"))
        try:
            port = free_port()
            self._endpoint = ("127.0.0.1", port)
            way_in = self._way_in = WayIn()
            try:
                child = process.start(
                    self._argv(port, way_in.passed),
                    what=self.spec.name,
                    env=self._env(),
                    passed=(lock, way_in.passed),
                )
            except BaseException:
                self._leave(way_in)
                raise
        finally:
            os.close(lock)
        way_in.started()
        self.pid = child.pid
        status: int | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_log, child.output)
                is_it = functools.partial(listens, child.pid, port) if self.spec.own_listener else _nobody_else
                tasks.start_soon(self._attend, tasks.cancel_scope, is_it)
                status = await child.wait()
                tasks.cancel_scope.cancel()
            self._become(ServiceState.DEGRADED, self.reason if status is None else _how_it_ended(status))
        finally:
            self._leave(way_in)
            await child.close(grace_s=STOP_GRACE_S)
            self.pid = None
            self._notify()

    def _leave(self, way_in: WayIn) -> None:
        self._endpoint = self._way_in = None
        way_in.close()

    async def _attend(self, life: anyio.CancelScope, is_it: Callable[[], bool] = _nobody_else) -> None:
        try:
            await self._begin(is_it)
            await self._watch()
        except (OSError, _Unwell) as error:
            self.reason = str(error)
            life.cancel()

    async def _begin(self, is_it: Callable[[], bool] = _nobody_else) -> None:
        """Until it is ready."""
        deadline = anyio.current_time() + START_DEADLINE_S
        while not (await self._is_well() and is_it()):
            if anyio.current_time() > deadline:
                raise _Unwell(f"it did not answer within {START_DEADLINE_S:g} s")
            await anyio.sleep(START_POLL_S if self.spec.argv else WATCH_PERIOD_S)
        if self.on_ready is not None:
            await self.on_ready()
        self.hint = self.spec.hint
        self._become(ServiceState.READY, "")

    async def _watch(self) -> None:
        """While it is well."""
        failures = 0
        while failures < HEALTH_FAILURES_MAX:
            await anyio.sleep(WATCH_PERIOD_S)
            failures = 0 if await self._is_well() else failures + 1
        raise _Unwell("it does not answer any more")

    async def _is_well(self) -> bool:
        try:
            with anyio.fail_after(HEALTH_DEADLINE_S), await self.connect() as connected:
                if not self.spec.health_path:
                    return True
                status, _ = await ask_over(connected, "GET", self.spec.health_path)
                return status == 200
        except (OSError, TimeoutError):
            return False

    # --- what it is started with ----------------------------------------------------------------------

    def _prepare(self) -> None:
        os.makedirs(self.data_dir, mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            give_away(self.data_dir, NOBODY_UID)

    def _argv(self, port: int, way_in: int) -> Sequence[str]:
        root = os.geteuid() == 0
        data = launcher.DATA_INSIDE if root else self.data_dir
        program = [part.replace("{port}", str(port)).replace("{data}", data) for part in self.spec.argv]
        return [
            sys.executable,
            "-IS",
            launcher.__file__,
            str(os.getpid()),
            str(NOBODY_UID if root else os.geteuid()),
            str(self.spec.memory_bytes_max),
            str(FILES_MAX),
            self.spec.network,
            str(way_in),
            self.data_dir,
            ":".join(self.spec.keep),
            "--",
            *program,
        ]

    def _env(self) -> dict[str, str]:
        data = launcher.DATA_INSIDE if os.geteuid() == 0 else self.data_dir
        path = os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin")
        return {"PATH": path, "HOME": data, "LANG": "C.UTF-8", **self.spec.env}

    async def _keep_log(self, output: int) -> None:
        while True:
            await anyio.wait_readable(output)
            try:
                data = os.read(output, 64 * 1024)
            except BlockingIOError:
                continue
            if not data:
                return
            await anyio.to_thread.run_sync(self._write_log, data)

    def _write_log(self, data: bytes) -> None:
        with open(self._log_path, "ab", opener=_private) as file:
            file.write(data)
            full = file.tell() > LOG_BYTES_MAX
        if full:
            os.replace(self._log_path, f"{self._log_path}.1")

    def _become(self, state: ServiceState, reason: str) -> None:
        if state is not self.state:
            self.since_ms = now_ms()
            logger.info("service %s is %s%s", self.spec.name, state, reason and f": {reason}")
        self.state = state
        self.reason = reason
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


class _Unwell(Exception):
    """It does not do what it is there for."""


def give_away(directory: str, uid: int) -> None:
    """Make everything below ``directory`` belong to ``uid``; follows no link."""
    for path, folders, files, descriptor in os.fwalk(directory):
        if os.fstat(descriptor).st_uid != uid:
            os.fchown(descriptor, uid, uid)
        for name in (*folders, *files):
            if os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_uid != uid:
                os.chown(name, uid, uid, dir_fd=descriptor, follow_symlinks=False)
        del path


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _hold(path: str) -> int:
    """A lock that lives as long as the program that inherits it: two servers on one database would both write.

    Raises:
        OSError: a former one still runs.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(errno.EBUSY, "a former one still uses its data") from None
    return descriptor


def _how_it_ended(status: int) -> str:
    return f"it ended by signal {-status}" if status < 0 else f"it ended with {status}"
