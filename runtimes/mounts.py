"""Mounting by descriptor, through the kernel's new mount API.

A bind mount made from a path can be raced: somebody swaps a directory for a symlink between the check and the
mount. Here the directory is opened once, checked, and mounted by that descriptor. Attributes (nosuid, nodev,
read-only, an id mapping) are set on the detached mount before anybody can see it.

Needs CAP_SYS_ADMIN, so a daemon that runs as root; others let the engine mount and check the outcome.
Source: open_tree(2), move_mount(2), mount_setattr(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from runtimes.errors import Unsupported

# The numbers are the same on every architecture, as for all system calls since Linux 5.1.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_IDMAP = 0x100000
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


def stage_bind(source_fd: int, target_fd: int, *, read_only: bool, userns_fd: int | None) -> None:
    """Mount the directory tree behind ``source_fd`` onto the directory behind ``target_fd``: nosuid, nodev, private.

    Args:
        source_fd: An opened directory (``O_PATH`` is enough).
        target_fd: An opened directory to mount on.
        read_only: Mount it, and everything beneath, read-only.
        userns_fd: A user namespace whose id mapping the mount shows; None: ids as they are.

    Raises:
        Unsupported: the kernel or the file system cannot (no new mount API, no id-mapped mounts).
        OSError: anything else, such as EPERM without CAP_SYS_ADMIN.
    """
    tree_fd = _syscall(
        _SYS_OPEN_TREE,
        source_fd,
        b"",
        _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE,
    )
    try:
        attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | (_MOUNT_ATTR_RDONLY if read_only else 0)
        if userns_fd is not None:
            attributes |= _MOUNT_ATTR_IDMAP
        # struct mount_attr: attr_set, attr_clr, propagation, userns_fd; four 64-bit words.
        mount_attr = struct.pack("=QQQQ", attributes, 0, _MS_PRIVATE, userns_fd if userns_fd is not None else 0)
        _syscall(_SYS_MOUNT_SETATTR, tree_fd, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, mount_attr, len(mount_attr))
        _syscall(_SYS_MOVE_MOUNT, tree_fd, b"", target_fd, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)
    finally:
        os.close(tree_fd)


def unmount(path: str) -> bool:
    """Take the topmost mount off ``path``, now or when its last user leaves. Never follows a symlink at the end.

    Returns:
        False when nothing was mounted there. Idempotent.
    """
    if _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOENT):
        return False
    raise OSError(code, os.strerror(code), path)


def mounts_below(directory: str) -> list[str]:
    """Mount points at or below ``directory`` in our mount namespace, deepest first."""
    prefix = directory.rstrip("/")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        targets = [_unescape(line.split(" ", 5)[4]) for line in file]
    found = [target for target in targets if target == prefix or target.startswith(prefix + "/")]
    return sorted(found, key=len, reverse=True)


def _unescape(field: str) -> str:
    for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(escaped, plain)
    return field


def _syscall(number: int, *arguments: int | bytes) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    outcome: int = _libc.syscall(ctypes.c_long(number), *converted)
    if outcome >= 0:
        return outcome
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise Unsupported(
            "cannot mount by descriptor on this host", detail=f"system call {number}: {os.strerror(code)}"
        )
    raise OSError(code, os.strerror(code))
