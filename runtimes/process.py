"""The only spawner: one client process, bounded in time, in output and in number.

Theory of operation. The client becomes the leader of its own session, so that one ``killpg`` reaches it and
whatever it forked, a stopped process included. Three things are watched through one epoll descriptor: its
stdout, its stderr and its pidfd. The client's *end* finishes the call, not the end of its output: an engine's
client leaves monitors behind (conmon, a shim) that may inherit the pipes and hold them open for ever. What the
client wrote before it ended is in the pipes by then, and is taken out without waiting.

No threads, no signal handlers, no child watcher: the same on every event loop, and about a millisecond more
than ``posix_spawn`` alone.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Literal

import anyio
import msgspec

from runtimes.errors import EngineTimeout, EngineUnavailable, UnreadableAnswer, Unsupported

CLIENTS_AT_ONCE_MAX = 3
"""Clients of one engine that run at the same time. On two cores, two or three creates at once finish
soonest altogether; eight at once only lengthen each."""

STDOUT_BYTES_MAX = 8 * 1024 * 1024
"""A list of a thousand containers is well under a MiB; an inspect is some 10 KiB."""

STDERR_BYTES_MAX = 256 * 1024

CANCELLED_CLIENT_S_MAX = 15.0
"""How long a client that must not be cut short may go on after its caller has been cancelled."""

REAP_S_MAX = 2.0
"""How long a killed client may take to be gone. Only one in uninterruptible sleep takes any time at all."""

_READ_BYTES = 64 * 1024

SERVICE_VARIABLES = frozenset(
    {
        "FDSTORE",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_PIDFDID",
        "MAINPID",
        "MANAGERPID",
        "MANAGERPIDFDID",
        "MEMORY_PRESSURE_WATCH",
        "MEMORY_PRESSURE_WRITE",
        "NOTIFY_SOCKET",
        "SYSTEMD_EXEC_PID",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)
"""What systemd tells a service about itself, and must not reach an engine: with LISTEN_FDS Podman 5.4 fails
to start, and with INVOCATION_ID Podman leaves conmon in the daemon's own cgroup, where a restart kills it."""

OnCancel = Literal["kill", "leave"]


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A client that has ended by itself."""

    returncode: int
    """Exit status, or minus the number of the signal that ended it."""
    stdout: bytes
    stderr: bytes
    wall_ms: float
    """From the spawn, without the wait for a turn."""


def client_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for an engine's client: ``env`` without what systemd tells a service about itself."""
    return {name: value for name, value in env.items() if name not in SERVICE_VARIABLES}


async def run(
    argv: Sequence[str],
    *,
    what: str,
    deadline_s: float | None,
    env: Mapping[str, str],
    limiter: anyio.Semaphore | None = None,
    stdout_bytes_max: int = STDOUT_BYTES_MAX,
    stderr_bytes_max: int = STDERR_BYTES_MAX,
    on_cancel: OnCancel = "kill",
    descriptors: tuple[int, int, int] | None = None,
) -> Finished:
    """Run one client to its end. Its stdin is /dev/null, its working directory the root.

    Args:
        argv: Program, looked up in the PATH of ``env``, and arguments.
        what: The call as a person would name it, for messages. Messages never quote ``argv``: it may hold a
            user's environment.
        deadline_s: Seconds until the client and its process group are killed, counted from now: waiting for a
            turn is part of it. None waits for ever.
        env: The whole environment.
        limiter: Whose turn is waited for; None starts at once.
        stdout_bytes_max: More than this on stdout ends the client.
        stderr_bytes_max: The same for stderr.
        on_cancel: ``kill`` ends the client with its caller. ``leave`` lets it come to its own end first, for
            ``CANCELLED_CLIENT_S_MAX`` at most, and only then goes on with the cancellation: whoever cleans up
            after a cancelled call finds everything that the client made.
        descriptors: Become stdin, stdout and stderr of the client; nothing is captured then.

    Raises:
        EngineUnavailable: the program is missing or cannot be started.
        EngineTimeout: the deadline passed.
        UnreadableAnswer: the output was larger than its bound.
        Unsupported: an argument holds a NUL, or the arguments are too long for the kernel.
    """
    deadline = None if deadline_s is None else anyio.current_time() + deadline_s
    async with _turn(what, limiter, deadline):
        client = _Client(what, argv, env, descriptors, {"stdout": stdout_bytes_max, "stderr": stderr_bytes_max})
        try:
            await _finish(client, what, deadline, on_cancel)
        finally:
            await client.close()
    return client.finished()


@contextlib.asynccontextmanager
async def _turn(what: str, limiter: anyio.Semaphore | None, deadline: float | None) -> AsyncIterator[None]:
    if limiter is None:
        yield
        return
    with anyio.CancelScope(deadline=_scope_deadline(deadline)) as scope:
        await limiter.acquire()
    if scope.cancelled_caught:
        raise EngineTimeout(f"cannot start {what} in time", detail="the calls before it have not ended")
    try:
        yield
    finally:
        limiter.release()


async def _finish(client: _Client, what: str, deadline: float | None, on_cancel: OnCancel) -> None:
    """Wait for the client's own end; see ``run`` for what a deadline and a cancellation do."""
    with anyio.CancelScope(deadline=_scope_deadline(deadline)) as scope:
        try:
            await client.wait()
        except anyio.get_cancelled_exc_class():
            if on_cancel == "leave" and not scope.cancel_called:
                await _wait_out(client, deadline)
            raise
    if scope.cancelled_caught:
        raise EngineTimeout(f"cannot wait longer for {what}", detail=client.last_words())


async def _wait_out(client: _Client, deadline: float | None) -> None:
    grace = anyio.current_time() + CANCELLED_CLIENT_S_MAX
    with (
        anyio.CancelScope(deadline=grace if deadline is None else min(grace, deadline), shield=True),
        contextlib.suppress(UnreadableAnswer),
    ):
        await client.wait()


class Helper:
    """A resident helper of our own: one process that ends when its stdin is closed. Made by ``start_helper``."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End it, and reap it."""
        self._process.kill()
        self._process.wait()


def start_helper(argv: Sequence[str], *, stdin_fd: int) -> Helper:
    """Start a resident helper with an empty environment. Its stdout is /dev/null, its stderr ours.

    Args:
        argv: Absolute path of the program, and arguments.
        stdin_fd: Becomes its stdin; stays the caller's.

    Raises:
        EngineUnavailable: it is missing or cannot be started.
    """
    with _spawn_errors(argv[0], argv[0]):
        return Helper(
            subprocess.Popen(argv, stdin=stdin_fd, stdout=subprocess.DEVNULL, cwd="/", env={}, start_new_session=True)
        )


class _Client:
    """One spawned process with its pipes. Made by spawning; ``close`` must follow, and leaves nothing behind."""

    def __init__(
        self,
        what: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        descriptors: tuple[int, int, int] | None,
        bytes_max: Mapping[str, int],
    ) -> None:
        self._what = what
        self._resources = contextlib.ExitStack()
        self._bytes_max = bytes_max
        self._output = {name: bytearray() for name in bytes_max}
        self._open: dict[int, str] = {}
        self._returncode: int | None = None
        self._wall_ms = 0.0
        self._started_s = time.monotonic()
        self._process = _spawn(what, argv, env, descriptors)
        try:
            self._watch()
        except OSError as error:
            self._kill()
            self._process.wait()
            self._resources.close()
            raise EngineUnavailable(f"cannot watch {what}", detail=str(error)) from error

    def _watch(self) -> None:
        for name, pipe in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
            if pipe is not None:
                self._resources.callback(pipe.close)
                os.set_blocking(pipe.fileno(), False)
                self._open[pipe.fileno()] = name
        self._pidfd = os.pidfd_open(self._process.pid)
        self._resources.callback(os.close, self._pidfd)
        self._epoll = select.epoll()
        self._resources.callback(self._epoll.close)
        for descriptor in (*self._open, self._pidfd):
            self._epoll.register(descriptor, select.EPOLLIN)

    async def wait(self) -> None:
        """Return when the process has ended and what it wrote has been taken in.

        Raises:
            UnreadableAnswer: it wrote more than its bound.
        """
        while self._returncode is None:
            await anyio.wait_readable(self._epoll.fileno())
            ready = {descriptor for descriptor, _ in self._epoll.poll(0)}
            for descriptor in ready & self._open.keys():
                self._take(descriptor)
            if self._pidfd in ready:
                self._reap()
        for descriptor in list(self._open):
            while self._take(descriptor):
                pass

    def _take(self, descriptor: int) -> bool:
        """Take what the pipe holds now. False when it holds nothing more."""
        name = self._open[descriptor]
        try:
            chunk = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self._epoll.unregister(descriptor)
            del self._open[descriptor]
            return False
        self._output[name] += chunk
        if len(self._output[name]) > self._bytes_max[name]:
            raise UnreadableAnswer(
                f"cannot read the answer of {self._what}",
                detail=f"more than {self._bytes_max[name]} bytes on {name}",
            )
        return True

    def _reap(self) -> None:
        self._returncode = self._process.wait()
        self._wall_ms = (time.monotonic() - self._started_s) * 1000

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Kill what still runs, reap it, close the pipes."""
        try:
            if self._returncode is None:
                self._kill()
                with anyio.CancelScope(deadline=anyio.current_time() + REAP_S_MAX, shield=True):
                    await anyio.wait_readable(self._pidfd)
                    self._reap()
        finally:
            self._resources.close()

    def last_words(self) -> str:
        """What it said on stderr, for a message."""
        return self._output["stderr"][-500:].decode(errors="replace").strip()

    def finished(self) -> Finished:
        assert self._returncode is not None
        return Finished(
            returncode=self._returncode,
            stdout=bytes(self._output["stdout"]),
            stderr=bytes(self._output["stderr"]),
            wall_ms=self._wall_ms,
        )


class Lasting:
    """A program that outlives us: leader of its own session, with no pipe or terminal of ours."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        """Its exit status, or minus the number of the signal that ended it; None while it runs."""
        return self._process.poll()


def start_lasting(
    argv: Sequence[str], *, program: str, what: str, env: Mapping[str, str], passed: Sequence[int]
) -> Lasting:
    """Start a program that goes on when this process has ended. Its streams are /dev/null, it works in the root.

    Args:
        argv: Its name, by which it is found again, and its arguments.
        program: Its path.
        what: For messages.
        env: The whole environment.
        passed: Descriptors that it keeps, under the same numbers.

    Raises:
        EngineUnavailable: it is missing or cannot be started.
    """
    with _spawn_errors(what, program):
        return Lasting(
            subprocess.Popen(
                argv,
                executable=program,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=env,
                start_new_session=True,
                pass_fds=passed,
            )
        )


class Running:
    """A program that runs until it ends or is ended: a service. Leader of its own session; ``close`` must follow.

    What it prints, on both streams, comes out of ``output``.
    """

    def __init__(self, process: subprocess.Popen[bytes], output: int) -> None:
        self._process = process
        self._pidfd = os.pidfd_open(process.pid)
        self.pid = process.pid
        self.output = output
        """Non-blocking; closed by ``close``."""

    async def wait(self) -> int:
        """Return its exit status, or minus the number of the signal that ended it, once it has ended."""
        while (status := self._process.poll()) is None:
            await anyio.wait_readable(self._pidfd)
        return status

    async def lines(self, *, bytes_max: int) -> AsyncIterator[bytes]:
        """What it prints, line by line, without their ends, until nobody has its output open any more.

        Raises:
            UnreadableAnswer: a line is longer than ``bytes_max``.
        """
        begun = b""
        while True:
            try:
                chunk = os.read(self.output, _READ_BYTES)
            except BlockingIOError:
                await anyio.wait_readable(self.output)
                continue
            if not chunk:
                return
            *whole, begun = (begun + chunk).split(b"\n")
            for line in whole:
                yield line
            if len(begun) > bytes_max:
                raise UnreadableAnswer(
                    "cannot read what a client says", detail=f"a line of more than {bytes_max} bytes"
                )

    def signal(self, number: signal.Signals) -> None:
        """Signal it and what it forked; nothing if it has ended."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    async def close(self, *, grace_s: float) -> None:
        """End it, with TERM and after ``grace_s`` with KILL, and reap it."""
        try:
            with anyio.CancelScope(shield=True):
                self.signal(signal.SIGTERM)
                with anyio.move_on_after(grace_s):
                    await self.wait()
                self.signal(signal.SIGKILL)
                with anyio.move_on_after(REAP_S_MAX):
                    await self.wait()
        finally:
            os.close(self._pidfd)
            os.close(self.output)


def start(
    argv: Sequence[str],
    *,
    what: str,
    env: Mapping[str, str],
    passed: Sequence[int] = (),
    ends_with_us: bool = False,
) -> Running:
    """Start a program that nobody waits for. Its stdin is /dev/null, its working directory the root.

    Args:
        argv: Program and arguments.
        what: For messages.
        env: The whole environment.
        passed: Descriptors that it keeps, under the same numbers.
        ends_with_us: The kernel kills it when the calling thread ends, however that comes about; where there is no
            setpriv(1), which asks the kernel for that, it goes on until it writes the next time.

    Raises:
        EngineUnavailable: the program is missing or cannot be started.
        Unsupported: an argument holds a NUL, or the arguments are too long for the kernel.
    """
    bound = shutil.which("setpriv", path=env.get("PATH")) if ends_with_us else None
    words = argv if bound is None else [bound, "--pdeathsig", "KILL", "--", *argv]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        with _spawn_errors(what, argv[0]):
            process = subprocess.Popen(
                words,
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                cwd="/",
                env=env,
                start_new_session=True,
                pass_fds=passed,
            )
        os.set_blocking(reading, False)
        return Running(process, reading)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)


def _spawn(
    what: str, argv: Sequence[str], env: Mapping[str, str], descriptors: tuple[int, int, int] | None
) -> subprocess.Popen[bytes]:
    stdin, stdout, stderr = descriptors or (subprocess.DEVNULL, subprocess.PIPE, subprocess.PIPE)
    with _spawn_errors(what, argv[0]):
        return subprocess.Popen(
            argv, bufsize=0, stdin=stdin, stdout=stdout, stderr=stderr, cwd="/", env=env, start_new_session=True
        )


@contextlib.contextmanager
def _spawn_errors(what: str, program: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise EngineUnavailable(
            f"cannot find the program {program!r}", hint="install it, or put it into PATH"
        ) from error
    except ValueError as error:
        raise Unsupported(f"cannot pass these arguments to {what}", detail=str(error)) from error
    except OSError as error:
        if error.errno == errno.E2BIG:
            raise Unsupported(f"cannot pass this many arguments to {what}") from error
        raise EngineUnavailable(f"cannot start {what}", detail=str(error)) from error


def _scope_deadline(deadline: float | None) -> float:
    return math.inf if deadline is None else deadline
