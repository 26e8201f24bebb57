"""Reading and writing beneath an opened directory whose content somebody hostile may have made, and may be changing.

No symlink is followed, ever; no name of more than one part is given to the kernel; what is opened is looked at before
a byte of it is read, so that no pipe is waited for and no device is touched. Whoever changes the tree meanwhile can
have us see something else, and never something elsewhere.

Source: openat(2), ioctl_ficlone(2), copy_file_range(2), xattr(7).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FICLONE = 0x40049409

PORTION_BYTES = 8 * 1024 * 1024
"""Of one system call while a file is copied: between two of them whoever waits may have gone."""

NAMES_PER_STEP = 1000
"""Of a directory that is read: between two of them it may turn out to be too many."""

XATTR_BYTES_MAX = 4096

_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF)
"""This file system, or this pair of them, cannot do it: there is a slower way."""


def open_root(path: str) -> int:
    """Open a directory of our own to walk from."""
    return os.open(path, _DIRECTORY)


def open_dir(parent_fd: int, name: bytes) -> int:
    """Open a subdirectory.

    Raises:
        OSError: it is none (ENOTDIR, ELOOP for a symlink), or may not be read.
    """
    return os.open(name, _DIRECTORY, dir_fd=parent_fd)


@contextlib.contextmanager
def parent_of(root_fd: int, parts: Sequence[bytes]) -> Iterator[int]:
    """The directory that holds the last of ``parts``, each of them one name.

    Raises:
        OSError: one of those before it is no directory.
    """
    current = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            following = open_dir(current, part)
            os.close(current)
            current = following
        yield current
    finally:
        os.close(current)


def look(parent_fd: int, name: bytes) -> os.stat_result | None:
    """What is called ``name``, itself; None: nothing is."""
    try:
        return os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def names_in(descriptor: int, step: Callable[[int], None]) -> list[bytes]:
    """What is in an opened directory.

    Args:
        descriptor: The directory.
        step: Called every now and then with how many names there are so far; raises to end it. There may be millions.
    """
    names: list[bytes] = []
    with os.scandir(os.fsencode(f"/proc/self/fd/{descriptor}")) as entries:
        while some := [entry.name for entry in itertools.islice(entries, NAMES_PER_STEP)]:
            names += some
            step(len(names))
    return names


def open_file(parent_fd: int, name: bytes) -> int:
    """Open a regular file for reading.

    Raises:
        OSError: EINVAL when it is something else; it may not be read.
    """
    looked_at = os.open(name, _LOOK, dir_fd=parent_fd)
    try:
        if not stat.S_ISREG(os.fstat(looked_at).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        # The very file that was looked at, whatever is called that by now.
        return os.open(f"/proc/self/fd/{looked_at}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(looked_at)


def xattr(descriptor: int, name: str) -> bytes | None:
    """An extended attribute of an opened file or directory; None: it has none of this name."""
    try:
        return os.getxattr(descriptor, name)[:XATTR_BYTES_MAX]
    except OSError:
        return None


def copy_content(source_fd: int, target_fd: int, size_bytes: int, step: Callable[[int], None]) -> bool:
    """Copy the first ``size_bytes`` of a file into an empty one: shared where the file system can, else with holes.

    Args:
        source_fd: A regular file.
        target_fd: An empty one, open for writing.
        size_bytes: What grows meanwhile is not followed.
        step: Called with the number of bytes before each portion that is really copied; raises to end it.

    Returns:
        Whether the two share their blocks.
    """
    if size_bytes == 0:
        return False
    if _clone(source_fd, target_fd):
        if os.fstat(target_fd).st_size > size_bytes:
            os.ftruncate(target_fd, size_bytes)
        return True
    os.ftruncate(target_fd, size_bytes)
    position = 0
    while position < size_bytes:
        start, end = _next_data(source_fd, position, size_bytes)
        while start < end:
            step(min(end - start, PORTION_BYTES))
            copied = _copy_portion(source_fd, target_fd, start, min(end - start, PORTION_BYTES))
            if copied == 0:
                return False
            start += copied
        position = max(end, position + 1)
    return False


def _clone(source_fd: int, target_fd: int) -> bool:
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno not in _NOT_HERE and error.errno != errno.EPERM:
            raise
        return False
    return True


def _next_data(descriptor: int, position: int, end: int) -> tuple[int, int]:
    """Where the next bytes are that are not a hole; ``(end, end)`` when there are none."""
    try:
        start = os.lseek(descriptor, position, os.SEEK_DATA)
        stop = os.lseek(descriptor, start, os.SEEK_HOLE)
    except OSError as error:
        return (end, end) if error.errno == errno.ENXIO else (position, end)
    return min(start, end), min(stop, end)


def _copy_portion(source_fd: int, target_fd: int, position: int, count: int) -> int:
    try:
        return os.copy_file_range(source_fd, target_fd, count, position, position)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    return os.pwrite(target_fd, os.pread(source_fd, count, position), position)
