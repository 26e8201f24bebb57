"""Starts the daemon when nobody listens: once, however many callers want it at the same moment.

Callers may have threads and live long: nothing but the new program runs between fork and exec, and what they start is
not their child, so that nobody has to reap it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import sys
import time

from sandboxd import jsontext
from sandboxd.client.connection import Connection, NotRunning, RpcError
from sandboxd.paths import DAEMON_LOG_NAME, socket_path, state_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

COMMAND = (sys.executable, "-P", "-m", "sandboxd.daemon")
"""``-P``: the current directory is no place to import from."""

READY_TIMEOUT_S = 60.0
"""An ordinary start takes a quarter of a second. The daemon asks the engines first, and gives up on one that does not
answer after ``runtimes.detect.INFO_S_MAX``; then it may have to wait for clients that a killed one left behind."""

SLOW_S = 0.5
"""From when on a start takes so long that who watches wonders."""

RETRY_S = 0.02
"""Between attempts to connect to a daemon that somebody else has just started, and that listens in a moment."""

READY_LINE_BYTES_MAX = 64 * 1024
LOG_TAIL_BYTES = 2000

HANDOVER_NAME = "sandboxd-handover"
"""Tells the daemon whose a socket is that it is passed: as in ``activation``."""

_LAUNCH = """
import os, sys
if os.fork() == 0:
    os.setsid()
    os.chdir("/")
    os.closerange(int(sys.argv[1]) + 1, 1 << 20)
    if sys.argv[2]:
        passed = str(int(sys.argv[1]) - 3)
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=passed, LISTEN_FDNAMES=sys.argv[2])
    os.execv(sys.argv[3], sys.argv[3:])
"""


def connect_or_start(env: Mapping[str, str]) -> Connection:
    """A connection to the daemon, which is started if it does not run."""
    path = socket_path(env)
    try:
        return Connection.connect(path)
    except NotRunning:
        return start(path, env)


def start(
    path: str,
    env: Mapping[str, str],
    left: Mapping[str, int] | None = None,
    on_slow: Callable[[], None] | None = None,
) -> Connection:
    """Start the daemon, wait until it listens, and connect.

    Args:
        path: Its socket.
        env: Its environment.
        left: What a daemon that has ended has left, by its names, first the socket itself; the caller's to close.
        on_slow: Called once if it is not ready at once.

    Raises:
        RpcError: It did not start; what it said is in the error.
    """
    directory = state_dir(env)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        # Several callers wait here for the one that starts it, and then find it running.
        lock = os.open(os.path.join(directory, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failed(f"{directory}: {error.strerror}", "set SANDBOXD_STATE_DIR") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever connects to a socket that was handed over waits for the daemon that is started here.
        if not left:
            with contextlib.suppress(NotRunning):
                return Connection.connect(path)
        log = os.path.join(directory, DAEMON_LOG_NAME)
        deadline = time.monotonic() + READY_TIMEOUT_S
        _wait_until_ready(_spawn(log, env, left or {}), log, deadline, on_slow)
        return _connect(path, deadline)
    finally:
        os.close(lock)


def _spawn(log: str, env: Mapping[str, str], left: Mapping[str, int]) -> int:
    """Start the process in a session of its own; return the pipe on which it says that it is ready."""
    with contextlib.ExitStack() as passed:
        try:
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            passed.callback(os.close, null)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            passed.callback(os.close, output)
        except OSError as error:
            raise _failed(f"{log}: {error.strerror}", "set SANDBOXD_STATE_DIR") from None
        read_end, write_end = os.pipe()
        passed.callback(os.close, write_end)
        numbers = [null, output, output, *left.values(), write_end]
        ready = len(numbers) - 1
        places = []
        for number in numbers:
            # Above the numbers that are about to be taken, so that none of them is overwritten first.
            places.append(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, len(numbers)))
            passed.callback(os.close, places[-1])
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(ready), ":".join(left)]
        argv = [*launch, *COMMAND, "--ready-fd", str(ready)]
        actions = [(os.POSIX_SPAWN_DUP2, number, place) for place, number in enumerate(places)]
        launcher = os.posix_spawn(sys.executable, argv, dict(env), file_actions=actions)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(launcher, 0)
    return read_end


def _wait_until_ready(ready: int, log: str, deadline: float, on_slow: Callable[[], None] | None) -> None:
    said = b""
    try:
        if on_slow is not None and not select.select([ready], [], [], SLOW_S)[0]:
            on_slow()
        while b"\n" not in said:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or not select.select([ready], [], [], remaining_s)[0]:
                raise RpcError(
                    0, "timeout", "cannot start the daemon", f"not ready after {READY_TIMEOUT_S:g}s", f"see {log}"
                )
            portion = os.read(ready, READY_LINE_BYTES_MAX)
            if not portion:
                raise _failed(_last_line(log) or "it ended at once", f"see {log}")
            said += portion
    finally:
        os.close(ready)
    line = said.partition(b"\n")[0].decode(errors="replace")
    if line.startswith("error:"):
        raise _told(line.removeprefix("error:"), log)


def _told(text: str, log: str) -> RpcError:
    try:
        data = jsontext.decode(text.encode())
        return RpcError(0, data["type"], data["brief"], data["detail"], data["hint"])
    except (ValueError, TypeError, KeyError):
        return _failed(text.strip(), f"see {log}")


def _connect(path: str, deadline: float) -> Connection:
    while True:
        try:
            return Connection.connect(path)
        except NotRunning:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def _last_line(log: str) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _failed(detail: str, hint: str) -> RpcError:
    return RpcError(0, "not_running", "cannot start the daemon", detail, hint)
