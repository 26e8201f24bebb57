"""Mounting by ``mount(2)`` alone, for kernels without the calls that ``mounts`` makes: before Linux 5.12.

Whatever is mounted, its place on the host is the daemon's alone, and it gets its flags there. A ``SlotDirectory``
brings it into a container that runs: it is a tmpfs that is shared and that the container has as a slave, so what is
mounted on it appears inside as well. Then the host's end is cut off and taken away. The container keeps its own.

Needs CAP_SYS_ADMIN in the host's own namespaces. Ids cannot be mapped. Source: mount(2), mount_namespaces(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os

from runtimes.errors import Unsupported
from runtimes.model import User
from runtimes.mounts import mounts_below, unmount

_RDONLY = 1
_NOSUID = 2
_NODEV = 4
_REMOUNT = 32
_BIND = 4096
_PRIVATE = 1 << 18
_SHARED = 1 << 20
_RELATIME = 1 << 21

_KEPT = os.ST_RDONLY | os.ST_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME
"""Flags of a mount that ``statvfs`` and ``mount`` have the same numbers for, and that a copy of it keeps."""

_libc = ctypes.CDLL(None, use_errno=True)


def bind_at(source_fd: int, path: str, *, source_path: str, read_only: bool) -> None:
    """Mount what is behind ``source_fd`` at a place of ours: nosuid, nodev, private.

    Args:
        source_fd: An opened directory or file (``O_PATH`` is enough).
        path: An existing directory or file, of the same kind.
        source_path: Its real path, for what is mounted below it.
        read_only: Mount it read-only.

    Raises:
        Unsupported: other file systems are mounted below it. Each would need its flags, and a path to it leads
            through what others may write.
        OSError: anything else.
    """
    if any(each != source_path for each in mounts_below(source_path)):
        raise Unsupported(
            f"cannot mount {source_path!r} by descriptor on this kernel",
            detail="other file systems are mounted below it",
            hint="unmount them, or use Linux 5.12 or newer",
        )
    _mount(f"/proc/self/fd/{source_fd}", path, _BIND)
    try:
        _mount("none", path, _PRIVATE)
        status = os.statvfs(path).f_flag
        kept = status & _KEPT | (_RELATIME if status & os.ST_RELATIME else 0)
        _mount("none", path, _BIND | _REMOUNT | _NOSUID | _NODEV | kept | (_RDONLY if read_only else 0))
    except BaseException:
        unmount(path)
        raise


def overlay_at(lower_fd: int, layers_fd: int, path: str) -> None:
    """Mount an overlay at a place of ours, as ``mounts.detached_overlay`` makes one.

    Raises:
        OSError: it cannot be.
    """
    options = (
        f"lowerdir=/proc/self/fd/{lower_fd},upperdir=/proc/self/fd/{layers_fd}/upper,"
        f"workdir=/proc/self/fd/{layers_fd}/work,index=off,metacopy=off,redirect_dir=nofollow"
    )
    _mount("overlay", path, _NOSUID | _NODEV, kind="overlay", options=options)
    try:
        _mount("none", path, _PRIVATE)
    except BaseException:
        unmount(path)
        raise


class SlotDirectory:
    """Where a container that runs can be given a mount. Its path is the daemon's alone."""

    def __init__(self, path: str) -> None:
        self.path = path

    def make(self, *, size_bytes_max: int, owner: User) -> None:
        """Make it: an empty tmpfs, which is what is seen inside until something is passed on.

        Raises:
            OSError: it cannot be mounted.
        """
        self.clear()
        os.mkdir(self.path, 0o700)
        options = f"size={size_bytes_max},mode=1777,uid={owner.uid},gid={owner.gid}"
        _mount("tmpfs", self.path, _NOSUID | _NODEV, kind="tmpfs", options=options)
        _mount("none", self.path, _SHARED)

    def pass_on(self, mount: str | None) -> None:
        """Have the container see the mount that is at a place of ours, or keep the tmpfs; then take our end away.

        Raises:
            OSError: it is not there, or cannot be passed on.
        """
        slot_fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if mount is not None:
                _mount(mount, self.path, _BIND)
            # The tmpfs itself, which the other now covers: else the container would lose what is unmounted here.
            _mount("none", f"/proc/self/fd/{slot_fd}", _PRIVATE)
        finally:
            os.close(slot_fd)
        self.clear()

    def clear(self) -> None:
        """Take everything off, and remove the place. Idempotent; also clears what a crash left."""
        with contextlib.suppress(FileNotFoundError):
            while unmount(self.path):
                pass
            os.rmdir(self.path)


def _mount(source: str, target: str, flags: int, *, kind: str = "none", options: str = "") -> None:
    words = [os.fsencode(text) for text in (source, target, kind)]
    if _libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(options)) != 0:
        code = ctypes.get_errno()
        if code == errno.ENODEV:
            raise Unsupported(f"cannot mount a file system of kind {kind}", detail=os.strerror(code))
        raise OSError(code, os.strerror(code), target)
