"""Who is at the other end of a Unix socket, by the kernel's word."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from typing import NamedTuple

_CREDENTIALS = struct.Struct("3i")

SO_PEERPIDFD = 77
"""A descriptor that means the very process that connected, from Linux 6.5 on. Python has no name for it yet."""


class Peer(NamedTuple):
    """Who is at the other end, as of the time of connect."""

    pid: int
    uid: int
    gid: int
    exe: str = ""
    """Its program, as of the time at which it was let in; empty where that cannot be seen."""


def peer_of(connected: socket.socket) -> Peer:
    """The peer of a connection, to be asked once, when it is let in: later its pid may be somebody else's."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return Peer(pid, uid, gid, _exe_of(connected, pid))


def _exe_of(connected: socket.socket, pid: int) -> str:
    """The path of the program, if the process that connected is still there to be looked at.

    Where the kernel gives no descriptor of that process, whoever has the pid now is opened, and is the one that is
    looked at.
    """
    try:
        pidfd = _pidfd_of(connected, pid)
    except OSError:
        return ""
    try:
        exe = os.readlink(f"/proc/{pid}/exe")
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        return "" if ended.poll(0) else os.fsencode(exe).decode("utf-8", "backslashreplace")
    except OSError:
        return ""
    finally:
        os.close(pidfd)


def _pidfd_of(connected: socket.socket, pid: int) -> int:
    with contextlib.suppress(OSError):
        return connected.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    return os.pidfd_open(pid)
