"""Opening what the kernel has in memory, and looking at it, without waiting for any disk or server.

A look at a path may take for ever: its file system may be a server that is gone. So it is made in a thread, and a
trip to a thread costs more than all that is looked at. Most paths were looked at a moment ago; of those the kernel
knows all that there is to know, and can be asked for no more than that: names that it remembers (RESOLVE_CACHED),
attributes without a question to a server (AT_STATX_DONT_SYNC). No other mount is crossed into, for who arrives at the
root of a server's is told whether that is still there. Whoever is told None here goes the long way; so does who comes
while something is mounted or renamed anywhere on the host, for then the kernel cannot tell at once.

Source: openat2(2), since Linux 5.12; statx(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from typing import NamedTuple

# The number is the same on every architecture, as for all system calls since Linux 5.1.
_SYS_OPENAT2 = 437

_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_STATS = 0x7FF
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_CACHED = 0x20

_HOW = struct.Struct("=QQQ")
_STATX_BYTES = 256
_STATX = struct.Struct("=20xIIH2xQ96xII")
"""The fields of ``Seen`` in ``struct statx``: owner, mode, inode, device."""

_libc = ctypes.CDLL(None, use_errno=True)


class Seen(NamedTuple):
    """What the kernel knows of something that is open."""

    uid: int
    gid: int
    mode: int
    inode: int
    device: int

    @property
    def is_directory(self) -> bool:
        """It is one."""
        return stat.S_ISDIR(self.mode)


def open_below(base_fd: int, path: str, *, flags: int = 0) -> int | None:
    """A descriptor (``O_PATH``) of what is at a relative path; None: that cannot be told without waiting.

    Args:
        base_fd: An opened directory.
        path: May lead through symlinks, but not to another mount.
        flags: Besides ``O_PATH``, which it is, and ``O_CLOEXEC``.

    Raises:
        FileNotFoundError: nothing is there; that is known for sure.
    """
    return _openat2(base_fd, path, flags, _RESOLVE_CACHED | _RESOLVE_NO_XDEV)


def open_base(path: str) -> int | None:
    """A descriptor (``O_PATH``) of a directory that is known to answer; None: it is not in memory."""
    with contextlib.suppress(FileNotFoundError):
        return _openat2(-1, path, os.O_DIRECTORY, _RESOLVE_CACHED)
    return None


def _openat2(base_fd: int, path: str, flags: int, resolve: int) -> int | None:
    how = _HOW.pack(os.O_PATH | os.O_CLOEXEC | flags, 0, resolve)
    descriptor: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2), ctypes.c_long(base_fd), os.fsencode(path), how, ctypes.c_long(len(how))
    )
    if descriptor >= 0:
        return descriptor
    if ctypes.get_errno() == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return None


def look(descriptor: int) -> Seen | None:
    """What the kernel knows of what is open; None where it cannot be asked so."""
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = ctypes.c_int(_AT_EMPTY_PATH | _AT_STATX_DONT_SYNC)
    if _libc.statx(ctypes.c_int(descriptor), b"", flags, ctypes.c_uint(_STATX_BASIC_STATS), answer) != 0:
        return None
    uid, gid, mode, inode, major, minor = _STATX.unpack_from(answer)
    return Seen(uid=uid, gid=gid, mode=mode, inode=inode, device=os.makedev(major, minor))
