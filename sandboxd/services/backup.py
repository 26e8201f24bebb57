"""Copies of a service's data, made while it does not run: all of it, at one moment."""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile

from runtimes.mounts import remove_tree
from sandboxd.failures import Conflict, Failure, InvalidArgument, NotFound

ENTRIES_MAX = 1_000_000
FREE_SHARE_MAX = 0.9
"""Of the free space: what a backup may unpack to."""


def check_new(path: str) -> None:
    """Refuse a path that is no place for a new file.

    Raises:
        InvalidArgument: it is relative, or its directory is not there.
        Conflict: there is something.
    """
    if not os.path.isabs(path) or not os.path.isdir(os.path.dirname(path)):
        raise InvalidArgument(f"cannot write a backup to {path!r}", detail="give the path of a new file")
    if os.path.lexists(path):
        raise Conflict(f"cannot write a backup to {path!r}", detail="there is something already")


def write_backup(data_dir: str, path: str) -> int:
    """Write all below ``data_dir`` into a new archive, whole or not at all; return its size in bytes.

    Raises:
        Failure: the disk is full, or the data cannot be read.
    """
    unfinished = f"{path}.{os.getpid()}.part"
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                if os.path.isdir(data_dir):
                    archive.add(data_dir, arcname="data", filter=_plain)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.link(unfinished, path)  # unlike rename, fails if somebody was faster
    except OSError as error:
        raise Failure(f"cannot write a backup to {path!r}", detail=error.strerror or "") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
    return size


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if not (member.isfile() or member.isdir()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def read_backup(path: str, fresh_dir: str) -> None:
    """Unpack an archive that ``write_backup`` made into a directory that is not there yet.

    Raises:
        NotFound: there is no such file.
        InvalidArgument: it is no backup; nothing is left.
        Failure: it cannot be read, or the disk is full; nothing is left.
    """
    os.mkdir(fresh_dir, 0o700)
    try:
        with tarfile.open(path, mode="r:") as archive:
            _unpack(archive, path, fresh_dir)
    except BaseException as error:
        remove_tree(fresh_dir)
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"cannot find the backup {path!r}", hint=f"ls -l {os.path.dirname(path)}") from error
        if isinstance(error, tarfile.TarError):
            raise InvalidArgument(f"cannot read {path!r}", detail=f"it is no backup: {error}") from error
        if isinstance(error, OSError):
            raise Failure(f"cannot read the backup {path!r}", detail=str(error)) from error
        raise


def _unpack(archive: tarfile.TarFile, path: str, fresh_dir: str) -> None:
    room = shutil.disk_usage(fresh_dir).free * FREE_SHARE_MAX
    for count, member in enumerate(archive):
        parts = member.name.split("/")
        if parts[0] != "data" or ".." in parts or not (member.isfile() or member.isdir()):
            raise InvalidArgument(f"cannot read {path!r}", detail=f"it is no backup: it holds {member.name[:80]!r}")
        room -= member.size
        if count >= ENTRIES_MAX or room < 0:
            raise InvalidArgument(f"cannot read {path!r}", detail="it holds more than there is room for")
        below = os.path.join(fresh_dir, *parts[1:])
        if member.isdir():
            os.makedirs(below, mode=0o700, exist_ok=True)
        else:
            _copy_out(archive, member, below)


def _copy_out(archive: tarfile.TarFile, member: tarfile.TarInfo, target: str) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise tarfile.ReadError(f"{member.name[:80]!r} cannot be read")
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with source, os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


def swap_in(fresh_dir: str, data_dir: str) -> str | None:
    """Put restored data into place; return where what was there before is now."""
    before = None
    if os.path.isdir(data_dir):
        before = f"{data_dir}.before-restore"
        with contextlib.suppress(FileNotFoundError):
            remove_tree(before)
        os.rename(data_dir, before)
    os.rename(fresh_dir, data_dir)
    return before
