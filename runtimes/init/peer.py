"""Who is at the other end of init's socket, by the kernel's word."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
from functools import lru_cache

import msgspec

_UCRED = struct.Struct("iII")
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


class PeerCredentials(msgspec.Struct, frozen=True):
    """The process that listens on a Unix socket, numbers as seen from here."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connected: socket.socket) -> PeerCredentials:
    """Who called listen(2) on the socket that this one is connected to."""
    return PeerCredentials(*_UCRED.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def open_process(pid: int) -> int | None:
    """A descriptor of this process, which never comes to mean another one; None: it is gone, or has none to give."""
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid)
    return None


def kill_process(pidfd: int) -> bool:
    """SIGKILL, which nothing can refuse and no container runtime is asked for. PID 1 takes its namespace with it.

    Returns:
        Whether it will be, or is, dead; False where it is another user's.
    """
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return True


def is_namespace_init(pid: int) -> bool:
    """Whether `pid` is PID 1 of a pid namespace that lies directly below ours.

    False also when the process is gone or when anything cannot be read: the question is asked before trusting.
    """
    if pid <= 0:
        return False
    try:
        theirs = _namespaced_pids(f"/proc/{pid}/status")
        ours = _own_pids(os.getpid())
    except OSError:
        return False
    return len(ours) > 0 and len(theirs) == len(ours) + 1 and theirs[-1] == "1"


def is_container_init(pid: int, container_id: str) -> bool:
    """Whether `pid` is PID 1 of that container, whose control group is named for it.

    False where the container has no control group of its own (rootless on cgroup v1): then only the engine knows.
    """
    if not is_namespace_init(pid) or _CONTAINER_ID.fullmatch(container_id) is None:
        return False
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return any(container_id in line for line in file)
    except OSError:
        return False


@lru_cache(maxsize=1)
def _own_pids(_: int) -> list[str]:
    """Of the process with this pid, which is ours: they never change."""
    return _namespaced_pids("/proc/self/status")


def _namespaced_pids(path: str) -> list[str]:
    """The process's pids in each namespace from ours downwards."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return line.split()[1:]
    return []
