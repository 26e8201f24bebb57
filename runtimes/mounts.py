"""Mounting by descriptor, through the kernel's new mount API.

A bind mount made from a path can be raced: somebody swaps a directory for a symlink between the check and the
mount. Here the directory is opened once, checked, and mounted by that descriptor. Attributes (nosuid, nodev,
read-only, an id mapping) are set on the detached mount before anybody can see it.

Needs CAP_SYS_ADMIN, so a daemon that runs as root; others let the engine mount and check the outcome.
Source: open_tree(2), move_mount(2), mount_setattr(2), fsopen(2); overlayfs in the kernel's documentation.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import struct
from collections.abc import Callable
from functools import lru_cache

from runtimes import mounttable
from runtimes.errors import UnreadableAnswer, Unsupported
from runtimes.mountinfo import MountEntry, is_below, parse

# The numbers are the same on every architecture, as for all system calls since Linux 5.1.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
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
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_NAMES_MAX = 4096
"""Held at a time while a tree is removed."""

MOUNTINFO_CHARS_MAX = 4 * 1024 * 1024
"""Some ten thousand mounts."""

_libc = ctypes.CDLL(None, use_errno=True)


def late_mounts_exist() -> bool:
    """Whether this kernel has the calls that mount into a container that runs: Linux 5.12 and newer."""
    return all(
        _libc.syscall(ctypes.c_long(number), ctypes.c_long(-1), None, ctypes.c_long(0), None, ctypes.c_long(0)) < 0
        and ctypes.get_errno() != errno.ENOSYS
        for number in (_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR)
    )


def detached_bind(source_fd: int, *, read_only: bool, userns_fd: int | None) -> int:
    """Return a mount of what is behind ``source_fd`` that is nowhere yet: nosuid, nodev, private.

    It goes away with its descriptor, unless it is attached before.

    Args:
        source_fd: An opened directory or file (``O_PATH`` is enough).
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
    except BaseException:
        os.close(tree_fd)
        raise
    return tree_fd


def detached_overlay(lower_fd: int, layers_fd: int) -> int:
    """Return an overlay mount that is nowhere yet: nosuid, nodev. What is below is only read.

    What the kernel keeps in extended attributes stays as simple as can be: a file in the upper layer is whole, and
    a directory is where its name is, so that whoever reads the layer need believe no attribute that leads elsewhere.

    Args:
        lower_fd: The opened directory that is below. File systems mounted beneath it are not seen.
        layers_fd: An opened directory that holds two, ``upper`` and ``work``, in one mount. Not in use by another
            overlay.

    Raises:
        Unsupported: the kernel or the file system of the layers cannot.
        OSError: anything else, such as EPERM without CAP_SYS_ADMIN.
    """
    options = {
        "source": "overlay",
        # By descriptor: no path is followed again, and none with a colon or a comma has to be written.
        "lowerdir": f"/proc/self/fd/{lower_fd}",
        "upperdir": f"/proc/self/fd/{layers_fd}/upper",
        "workdir": f"/proc/self/fd/{layers_fd}/work",
        "index": "off",
        "metacopy": "off",
        "redirect_dir": "nofollow",
    }
    context_fd = _syscall(_SYS_FSOPEN, b"overlay", _FSOPEN_CLOEXEC)
    try:
        for name, value in options.items():
            _syscall(_SYS_FSCONFIG, context_fd, _FSCONFIG_SET_STRING, name.encode(), value.encode(), 0)
        _syscall(_SYS_FSCONFIG, context_fd, _FSCONFIG_CMD_CREATE, 0, 0, 0)
        return _syscall(_SYS_FSMOUNT, context_fd, _FSMOUNT_CLOEXEC, _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
    finally:
        os.close(context_fd)


def attach(tree_fd: int, target_fd: int) -> None:
    """Mount a detached mount onto the opened directory, or file, behind ``target_fd``.

    Raises:
        Unsupported: it is attached somewhere already, or one is a file and the other a directory.
        OSError: EPERM without CAP_SYS_ADMIN, ENOTDIR.
    """
    _syscall(_SYS_MOVE_MOUNT, tree_fd, b"", target_fd, b"", _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH)


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
    found = [entry.target for entry in mounts_of("self") if is_below(entry.target, directory)]
    return sorted(found, key=len, reverse=True)


def mounts_of(process: int | str) -> tuple[MountEntry, ...]:
    """The mounts that a process sees.

    Raises:
        UnreadableAnswer: it is gone, or the kernel says something unheard of.
    """
    try:
        if process == "self":
            return _parsed(mounttable.text())
        with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return parse(file.read(MOUNTINFO_CHARS_MAX))
    except OSError as error:
        raise UnreadableAnswer("cannot read the mounts of a process", detail=error.strerror or "") from error


@lru_cache(maxsize=1)
def _parsed(table: bytes) -> tuple[MountEntry, ...]:
    """Our own table, which grows with the number of sandboxes, and is asked for once for each of them."""
    return parse(table.decode("utf-8", errors="surrogateescape"))


def remove_tree(directory: str, step: Callable[[], None] = lambda: None) -> None:
    """Remove a directory and what is in it, whatever somebody hostile has put there.

    Flat: what lies in a subdirectory is moved up before that is removed, so that no depth is too deep. Follows no
    symlink, and never goes into another mount: such a directory is left, and the error says so. Holds some thousand
    names at a time, however many there are.

    Args:
        directory: Which.
        step: Called every now and then; raises to end it. Whoever still writes there could keep it busy for ever.

    Raises:
        OSError: something cannot be removed.
    """
    top_fd = os.open(directory, _DIRECTORY_FLAGS)
    try:
        _empty(top_fd, step)
    finally:
        os.close(top_fd)
    os.rmdir(directory)


def _some_names(descriptor: int) -> list[str]:
    with os.scandir(f"/proc/self/fd/{descriptor}") as entries:
        return [entry.name for entry in itertools.islice(entries, _NAMES_MAX)]


def _empty(top_fd: int, step: Callable[[], None]) -> None:
    number = 0
    while names := _some_names(top_fd):
        step()
        for name in names:
            try:
                os.unlink(name, dir_fd=top_fd)
            except IsADirectoryError:
                number = _lift(top_fd, name, number, step)


def _lift(top_fd: int, name: str, number: int, step: Callable[[], None]) -> int:
    """Move what is in a subdirectory up, and remove it. Moving across a mount fails, which is what is wanted."""
    _make_readable(top_fd, name)
    child_fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=top_fd)
    try:
        while names := _some_names(child_fd):
            step()
            for grandchild in names:
                lifted = f".lifted-{number}"
                number += 1
                try:
                    os.rename(grandchild, lifted, src_dir_fd=child_fd, dst_dir_fd=top_fd)
                except PermissionError:
                    # A directory is written to when it is moved: where it leads up.
                    _make_readable(child_fd, grandchild)
                    os.rename(grandchild, lifted, src_dir_fd=child_fd, dst_dir_fd=top_fd)
    finally:
        os.close(child_fd)
    os.rmdir(name, dir_fd=top_fd)
    return number


def _make_readable(top_fd: int, name: str) -> None:
    """Give ourselves a directory of ours whose mode shuts even its owner out."""
    path_fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top_fd)
    try:
        os.chmod(f"/proc/self/fd/{path_fd}", 0o700)
    finally:
        os.close(path_fd)


def _syscall(number: int, *arguments: int | bytes) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    outcome: int = _libc.syscall(ctypes.c_long(number), *converted)
    if outcome >= 0:
        return outcome
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV):
        raise Unsupported(
            "cannot mount by descriptor on this host", detail=f"system call {number}: {os.strerror(code)}"
        )
    raise OSError(code, os.strerror(code))
