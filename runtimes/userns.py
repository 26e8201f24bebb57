"""A user namespace to map ids with, held by a descriptor and by no process.

Source: user_namespaces(7), mount_setattr(2).
"""

from __future__ import annotations

import ctypes
import os

_CLONE_NEWUSER = 0x10000000
_IDS_MAX = 2**32 - 1
"""The last id, 2^32-1, stands for "none" and cannot be mapped."""


def swap_map(outside: int, inside: int) -> str:
    """The text of a map that swaps two ids and leaves all others as they are. Pure.

    A swap, and not a mere renaming, so that no two ids on disk look the same and every id can be written.
    """
    low, high = sorted((outside, inside))
    if low == high:
        return f"0 0 {_IDS_MAX}\n"
    rows = [
        (0, 0, low),
        (low, high, 1),
        (low + 1, low + 1, high - low - 1),
        (high, low, 1),
        (high + 1, high + 1, _IDS_MAX - high - 1),
    ]
    return "".join(f"{first} {second} {count}\n" for first, second, count in rows if count > 0)


def open_swapped_userns(*, outside: int, inside: int) -> int:
    """Return a descriptor of a user namespace in which ``outside`` and ``inside`` are swapped, uids and gids alike.

    Forks, and so is called before there are threads. Needs CAP_SETUID and CAP_SETGID.

    Raises:
        OSError: the kernel says no.
    """
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    hold_read, hold_write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.close(hold_write)
            libc = ctypes.CDLL(None, use_errno=True)
            os.write(ready_write, b"\0" if libc.unshare(_CLONE_NEWUSER) == 0 else bytes([ctypes.get_errno() & 0xFF]))
            os.read(hold_read, 1)
        finally:
            os._exit(0)
    os.close(ready_write)
    os.close(hold_read)
    try:
        answer = os.read(ready_read, 1)
        if answer != b"\0":
            code = answer[0] if answer else 0
            raise OSError(code, os.strerror(code), "unshare")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{name}", "w", encoding="ascii") as file:
                file.write(swap_map(outside, inside))
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_read)
        os.close(hold_write)
        os.waitpid(child, 0)
