"""Runs a program as if the kernel were older than 5.2: it has none of the calls that came with the new mount API.

    python tests/engine/old_kernel.py PROGRAM [ARGUMENT ...]

A filter answers them as a kernel does that has never heard of them, for the program and all that it starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

MISSING = (428, 429, 430, 431, 432, 433, 437, 442)
"""open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, openat2, mount_setattr: the same numbers everywhere."""

_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_LOAD_NUMBER = (0x20, 0, 0, 0)
_ALLOW = (0x06, 0, 0, 0x7FFF0000)
_NO_SUCH_CALL = (0x06, 0, 0, 0x00050000 | errno.ENOSYS)


def filter_of(numbers: tuple[int, ...]) -> bytes:
    """A program for the kernel: those numbers do not exist."""
    # Each comparison skips the others and what is after them, up to the refusal.
    compared = [(0x15, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    return b"".join(struct.pack("=HBBI", *word) for word in (_LOAD_NUMBER, *compared, _ALLOW, _NO_SUCH_CALL))


def main() -> None:
    """Install the filter, and become the program."""
    words = filter_of(MISSING)
    buffer = ctypes.create_string_buffer(words, len(words))
    program = struct.pack("@HP", len(words) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot install the filter")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
