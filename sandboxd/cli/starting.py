"""Starts the daemon when nobody listens: once, however many command lines want it at the same moment."""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
import time

from sandboxd.client import Connection, NotRunning, RpcError
from sandboxd.paths import DAEMON_LOG_NAME, state_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

COMMAND = (sys.executable, "-P", "-m", "sandboxd.daemon")
"""``-P``: the current directory is no place to import from."""

READY_TIMEOUT_S = 15.0
RETRY_S = 0.02
"""Between attempts to connect to a daemon that somebody else has just started, and that listens in a moment."""

READY_LINE_BYTES_MAX = 64 * 1024
LOG_TAIL_BYTES = 2000

_READY_FD = 3
_FD_MAX = 1 << 20


def start(path: str, env: Mapping[str, str]) -> Connection:
    """Start the daemon, wait until it listens, and connect.

    Raises:
        RpcError: It did not start; what it said is in the error.
    """
    directory = state_dir(env)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        # Several command lines wait here for the one that starts it, and then find it running.
        lock = os.open(os.path.join(directory, "start.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failed(f"{directory}: {error.strerror}", "set SANDBOXD_STATE_DIR") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Connection.connect(path)
        except NotRunning:
            log = os.path.join(directory, DAEMON_LOG_NAME)
            deadline = time.monotonic() + READY_TIMEOUT_S
            _wait_until_ready(_spawn(log, env), log, deadline)
            return _connect(path, deadline)
    finally:
        os.close(lock)


def _spawn(log: str, env: Mapping[str, str]) -> int:
    """Start the process in a session of its own; return the pipe on which it says that it is ready."""
    read_end, write_end = os.pipe()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        output = os.open(log, flags, 0o600)
    except OSError as error:
        raise _failed(f"{log}: {error.strerror}", "set SANDBOXD_STATE_DIR") from None
    if os.fork() == 0:
        try:
            os.setsid()
            os.chdir("/")
            null = os.open(os.devnull, os.O_RDONLY)
            # Above the numbers that are about to be taken, so that none of them is overwritten first.
            null, output, ready = (
                fcntl.fcntl(number, fcntl.F_DUPFD, _READY_FD + 1) for number in (null, output, write_end)
            )
            for number, place in ((null, 0), (output, 1), (output, 2), (ready, _READY_FD)):
                os.dup2(number, place)
            os.closerange(_READY_FD + 1, _FD_MAX)
            os.execve(COMMAND[0], [*COMMAND, "--ready-fd", str(_READY_FD)], dict(env))  # noqa: S606 - no shell is meant
        finally:
            os._exit(127)
    os.close(write_end)
    os.close(output)
    return read_end


def _wait_until_ready(ready: int, log: str, deadline: float) -> None:
    said = b""
    try:
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
        data = json.loads(text)
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
