"""Our own mount table, which the kernel is slow to tell: 1 ms with a hundred containers, whose mounts are all in it.

Whoever asks for it a hundred times in a row keeps it meanwhile: it is read again only when the kernel says that
something was mounted, unmounted or made read-only. What it does not say is that a directory was renamed which a mount
shows the inside of; so nobody keeps the table for long.

Source: proc_pid_mountinfo(5); poll(2) of it in proc(5), "/proc/mounts".
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterator

PATH = "/proc/self/mountinfo"
BYTES_MAX = 4 * 1024 * 1024
READ_BYTES = 1024 * 1024


class MountTable:
    """The table of this process, at hand for as long as it is open. To be used in ``with``; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = os.open(PATH, os.O_RDONLY | os.O_CLOEXEC)
        self._changes = select.poll()
        self._changes.register(self._fd, select.POLLPRI)
        self._text: bytes | None = None

    def close(self) -> None:
        """Let go of it. Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def text(self) -> bytes:
        """All lines, as they are now; the same object as before when nothing has changed.

        Raises:
            OSError: it cannot be read, or was closed.
        """
        with self._lock:
            # Asked before reading: what changes while it is read is told at the next call.
            if self._changes.poll(0) or self._text is None:
                self._text = _read(self._fd)
            return self._text


_kept: list[MountTable] = []


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Have ``text`` answer from one table for as long as this is entered; where none can be opened, as without."""
    try:
        table = MountTable()
    except OSError:
        yield
        return
    _kept.append(table)
    try:
        yield
    finally:
        _kept.remove(table)
        table.close()


def text() -> bytes:
    """What the kernel says of our mounts; cut off where it is longer than any table should be.

    Raises:
        OSError: it cannot be read.
    """
    if _kept:
        return _kept[-1].text()
    fd = os.open(PATH, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    chunks, size = [], 0
    while size <= BYTES_MAX and (chunk := os.read(fd, READ_BYTES)):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)
