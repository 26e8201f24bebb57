"""What a sandbox writes instead of its project, on the host: the layers of an overlay, or a copy.

One directory per sandbox, ours alone:

    base          when it was made, what kind it is, and what was carried back since
    copied        of a copy: what was in it
    tree/upper    of an overlay: what the sandbox wrote
    tree/work     of an overlay: the kernel's
    tree/copy     of a copy

What is in ``tree`` is the sandbox's. All functions here may take long, and belong into a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

import msgspec

from runtimes import beneath, mounts
from sandboxd.failures import CapacityExceeded, Conflict, Failure, NotEnoughSpace, NotFound, Unsupported
from sandboxd.trees import (
    DEPTH_MAX,
    PERMISSIONS,
    Budget,
    Change,
    Copied,
    LayerKind,
    Seen,
    Stamp,
    Trees,
    seen,
)
from sandboxd.workspace import OverlayLayers

SKIPPED_SHOWN_MAX = 3
PROGRESS_ENTRIES = 1000
"""How often a long copy says how far it is."""

Progress = Callable[[int], None]
"""Told how many entries were copied so far."""


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known to tell what the sandbox did from what became of the project meanwhile."""

    kind: LayerKind
    project_inode: int
    """The project must still be that directory."""
    made_at_ns: int
    """By the file system's clock: a file whose ctime is later was changed after the sandbox was made."""
    settled: dict[bytes, Stamp | None] = {}
    """What was carried back: how it was in the project afterwards; None: it was removed there."""


class CopyReport(msgspec.Struct, kw_only=True):
    """How a copy went."""

    entries: int = 0
    shared: bool = True
    """All of its files share their blocks with the originals."""
    skipped: list[str] = msgspec.field(default_factory=list)
    """What is no part of it, as ``path: why``."""


class Layers:
    """Those of one sandbox."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._tree = os.path.join(directory, "tree")

    @property
    def upper(self) -> str:
        """What a sandbox wrote to an overlay."""
        return os.path.join(self._tree, "upper")

    @property
    def work(self) -> str:
        """What the kernel needs beside it."""
        return os.path.join(self._tree, "work")

    @property
    def copy(self) -> str:
        """The copy."""
        return os.path.join(self._tree, "copy")

    def for_overlay(self, scratch: str) -> OverlayLayers:
        """What a mount needs to know of them."""
        return OverlayLayers(directory=self._tree, scratch=scratch)

    # --- making them ----------------------------------------------------------------------------------

    def make_overlay(self, project_fd: int, kind: LayerKind) -> None:
        """Make the layers of an overlay over a project.

        Raises:
            Failure: they cannot be made.
        """
        with _said("cannot make an overlay"):
            self._begin()
            os.mkdir(self.work, 0o700)
            self._make_upper(project_fd, kind)

    def _make_upper(self, project_fd: int, kind: LayerKind) -> None:
        os.mkdir(self.upper, 0o700)
        # What is seen of the project's own directory is the upper one.
        status = os.fstat(project_fd)
        with contextlib.suppress(PermissionError):
            os.chown(self.upper, status.st_uid, status.st_gid)
        os.chmod(self.upper, status.st_mode & PERMISSIONS)
        made_at_ns = os.stat(self.upper).st_ctime_ns
        self._put_base(Base(kind=kind, project_inode=status.st_ino, made_at_ns=made_at_ns))

    def make_copy(self, project_fd: int, budget: Budget, progress: Progress) -> CopyReport:
        """Copy a project.

        Symlinks are copied as such; sockets, pipes, devices, other file systems and what may not be read are left
        out, and said.

        Args:
            project_fd: Opened for reading.
            budget: What it may cost.
            progress: Told now and then.

        Raises:
            CapacityExceeded, Timeout, Stopped: of ``budget``.
            Failure: it cannot be made.
        """
        with _said("cannot copy the project"):
            self._begin()
            made_at_ns = self._now_ns()
            os.mkdir(self.copy, 0o700)
            top_fd = beneath.open_root(self.copy)
            try:
                copying = _Copying(os.fstat(project_fd).st_dev, budget, progress)
                copying.directory(project_fd, top_fd, ())
            finally:
                os.close(top_fd)
            self._put("copied", msgspec.msgpack.encode(copying.copied))
            self._put_base(Base(kind="copy", project_inode=os.fstat(project_fd).st_ino, made_at_ns=made_at_ns))
        return copying.report

    def _begin(self) -> None:
        self.erase()
        os.makedirs(self._tree, mode=0o700)

    def _now_ns(self) -> int:
        self._put("clock", b"")
        return os.stat(os.path.join(self.directory, "clock")).st_ctime_ns

    # --- what is known --------------------------------------------------------------------------------

    def base(self) -> Base:
        """What is known of them.

        Raises:
            NotFound: they are gone, or damaged.
        """
        return self._get("base", Base)

    def settle(self, project_fd: int, paths: Collection[bytes]) -> None:
        """Write down that sandbox and project agree on these paths, as they are in the project now."""
        base = self.base()
        settled = dict(base.settled)
        parents = {path.rpartition(b"/")[0] for path in paths}
        for path in [*paths, *parents]:
            now = _look(project_fd, path)
            settled[path] = None if now is None else now.stamp
        if base.kind == "copy":
            self._settle_copy(project_fd, paths)
        self._put_base(msgspec.structs.replace(base, settled=settled))

    def _settle_copy(self, project_fd: int, paths: Collection[bytes]) -> None:
        """As if these had been copied just now."""
        copied = self._get("copied", dict[bytes, Copied])
        copy_fd = beneath.open_root(self.copy)
        try:
            for path in paths:
                original, made = _look(project_fd, path), _look(copy_fd, path)
                if original is None or made is None:
                    copied.pop(path, None)
                else:
                    copied[path] = Copied(original=original.stamp, copy=made.stamp, permissions=made.permissions)
        finally:
            os.close(copy_fd)
        self._put("copied", msgspec.msgpack.encode(copied))

    @staticmethod
    def require_project(base: Base, project_fd: int) -> None:
        """Refuse a directory that took the project's place.

        Raises:
            Conflict: it did.
        """
        if os.fstat(project_fd).st_ino != base.project_inode:
            raise Conflict(
                "cannot compare with the project",
                detail="another directory stands where it was",
                hint="sandboxctl ls",
            )

    def note_kind(self, kind: LayerKind) -> None:
        """Write down who made the overlay, once that is known."""
        self._put_base(msgspec.structs.replace(self.base(), kind=kind))

    @contextlib.contextmanager
    def opened(self, project_fd: int) -> Iterator[Trees]:
        """Project and layer, to be compared.

        Raises:
            NotFound: the layers are gone.
        """
        base = self.base()
        self.require_project(base, project_fd)
        path = self.copy if base.kind == "copy" else self.upper
        try:
            layer_fd = beneath.open_root(path)
        except OSError as error:
            raise NotFound("cannot find what the sandbox wrote", detail=f"{path}: {error.strerror}") from None
        try:
            copied = self._get("copied", dict[bytes, Copied]) if base.kind == "copy" else {}
            yield Trees(project_fd=project_fd, layer_fd=layer_fd, kind=base.kind, copied=copied)
        finally:
            os.close(layer_fd)

    # --- removing them --------------------------------------------------------------------------------

    def empty(self, project_fd: int) -> None:
        """Forget all that was written to an overlay that is not mounted.

        What the kernel keeps beside it stays: there may be files in it of a user that the engine made up.
        """
        kind = self.base().kind
        with _said("cannot reset an overlay"):
            mounts.remove_tree(self.upper)
            self._make_upper(project_fd, kind)

    def erase(self) -> None:
        """Remove them, whatever somebody hostile has put there. Idempotent.

        Raises:
            OSError: something cannot be removed.
        """
        with contextlib.suppress(FileNotFoundError):
            mounts.remove_tree(self._tree)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.directory)

    # --- small files ----------------------------------------------------------------------------------

    def _put_base(self, base: Base) -> None:
        self._put("base", msgspec.msgpack.encode(base))

    def _put(self, name: str, data: bytes) -> None:
        path = os.path.join(self.directory, name)
        with open(f"{path}.new", "wb", opener=_opener) as file:
            file.write(data)
        os.rename(f"{path}.new", path)

    def _get(self, name: str, kind: type[_T]) -> _T:
        path = os.path.join(self.directory, name)
        try:
            with open(path, "rb") as file:
                return msgspec.msgpack.decode(file.read(), type=kind)
        except (OSError, msgspec.MsgspecError) as error:
            raise NotFound("cannot find what the sandbox wrote", detail=f"{path}: {error}") from None


_T = TypeVar("_T")


def _look(root_fd: int, path: bytes) -> Seen | None:
    """What is at a path beneath a root, itself; the root for an empty one."""
    parts = path.split(b"/")
    if not path:
        return seen(os.fstat(root_fd))
    try:
        with beneath.parent_of(root_fd, parts) as parent_fd:
            return seen(beneath.look(parent_fd, parts[-1]))
    except OSError:
        return None


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


_KINDS: dict[int, type[Failure]] = {
    errno.ENOSPC: NotEnoughSpace,
    errno.EDQUOT: NotEnoughSpace,
    errno.EMFILE: CapacityExceeded,
    errno.ENFILE: CapacityExceeded,
}


@contextlib.contextmanager
def _said(brief: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        failure = _KINDS.get(error.errno or 0, Failure)
        raise failure(brief, detail=error.strerror or str(error), hint="df -h, and SANDBOXD_STATE_DIR") from error


class _Copying:
    """One copy, while it is made."""

    def __init__(self, device: int, budget: Budget, progress: Progress) -> None:
        self.copied: dict[bytes, Copied] = {}
        self.report = CopyReport()
        self._device = device
        self._budget = budget
        self._progress = progress

    def directory(self, source_fd: int, target_fd: int, parts: tuple[bytes, ...]) -> None:
        """Copy what is in one directory, then its own mode and times."""
        names = beneath.names_in(source_fd, self._budget.fits)
        self._budget.entries(len(names))
        for name in sorted(names):
            status = beneath.look(source_fd, name)
            if status is not None:
                self._entry(source_fd, target_fd, (*parts, name), status)
        status = os.fstat(source_fd)
        with contextlib.suppress(PermissionError):
            os.fchown(target_fd, status.st_uid, status.st_gid)
        os.fchmod(target_fd, status.st_mode & PERMISSIONS)
        os.utime(target_fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _entry(self, source_fd: int, target_fd: int, path: tuple[bytes, ...], status: os.stat_result) -> None:
        name = path[-1]
        try:
            if stat.S_ISDIR(status.st_mode):
                self._directory(source_fd, target_fd, path, status)
            elif stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(name, dir_fd=source_fd), name, dir_fd=target_fd)
                with contextlib.suppress(PermissionError):
                    os.chown(name, status.st_uid, status.st_gid, dir_fd=target_fd, follow_symlinks=False)
            elif stat.S_ISREG(status.st_mode):
                self._file(source_fd, target_fd, name)
            else:
                self._skip(path, "no file, directory or symlink")
                return
        except PermissionError as error:
            self._skip(path, error.strerror or "")
            return
        made = seen(beneath.look(target_fd, name))
        original = seen(status)
        if made is not None and original is not None:
            self.copied[b"/".join(path)] = Copied(
                original=original.stamp, copy=made.stamp, permissions=made.permissions
            )
        self.report.entries += 1
        if self.report.entries % PROGRESS_ENTRIES == 0:
            self._progress(self.report.entries)

    def _directory(self, source_fd: int, target_fd: int, path: tuple[bytes, ...], status: os.stat_result) -> None:
        if status.st_dev != self._device:
            self._skip(path, "another file system")
        if len(path) > DEPTH_MAX:
            raise Unsupported(f"cannot copy a project that is more than {DEPTH_MAX} directories deep")
        name = path[-1]
        with contextlib.ExitStack() as opened:
            child_fd = beneath.open_dir(source_fd, name)
            opened.callback(os.close, child_fd)
            os.mkdir(name, 0o700, dir_fd=target_fd)
            made_fd = beneath.open_dir(target_fd, name)
            opened.callback(os.close, made_fd)
            if status.st_dev == self._device:
                self.directory(child_fd, made_fd, path)

    def _file(self, source_fd: int, target_fd: int, name: bytes) -> None:
        with contextlib.ExitStack() as opened:
            file_fd = beneath.open_file(source_fd, name)
            opened.callback(os.close, file_fd)
            status = os.fstat(file_fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            made_fd = os.open(name, flags, 0o600, dir_fd=target_fd)
            opened.callback(os.close, made_fd)
            shared = beneath.copy_content(file_fd, made_fd, status.st_size, self._budget.bytes)
            self.report.shared &= shared or status.st_size == 0
            with contextlib.suppress(PermissionError):
                os.fchown(made_fd, status.st_uid, status.st_gid)
            os.fchmod(made_fd, status.st_mode & PERMISSIONS)
            os.utime(made_fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    def _skip(self, path: tuple[bytes, ...], why: str) -> None:
        self.report.skipped.append(f"{b'/'.join(path).decode(errors='backslashreplace')}: {why}")


# --- conflicts ------------------------------------------------------------------------------------------


def conflicts(found: Collection[Change], base: Base, copied: Mapping[bytes, Copied] | None) -> dict[bytes, str]:
    """Which changes cannot be carried back without losing what became of the project, and why. Pure.

    Args:
        found: What the sandbox did, and how the project is now.
        base: What is known.
        copied: Of a copy: what was in it.
    """
    gone = {change.path for change in found if change.new is None}
    standing = {}
    for change in found:
        # What became another type of file is judged by what went.
        replaces = change.old is None and change.path in gone
        reason = "" if change.note or replaces else _conflict(change, base, copied)
        if reason:
            standing[change.path] = reason
    return standing


def _conflict(change: Change, base: Base, copied: Mapping[bytes, Copied] | None) -> str:
    if change.old_path is not None and change.old is not None:
        # A renamed file takes the place of nothing; what is removed for it is its old name.
        return _changed(change.old_path, change.old, base, copied)
    if change.old is None:
        was_there = change.known or base.settled.get(change.path) is not None or _lost_its_place(change, base)
        return "it was removed from the project" if was_there else ""
    if change.old.type == "dir":
        return ""
    return _changed(change.path, change.old, base, copied)


def _lost_its_place(change: Change, base: Base) -> bool:
    """Whether it was made of a file of the project, in a directory that something was removed from meanwhile.

    What the sandbox moved and then changed looks the same, where the directory has changed too.
    """
    if change.parent is None or change.parent[1] <= base.made_at_ns:
        return False
    return base.settled.get(change.path.rpartition(b"/")[0]) != change.parent


def _changed(path: bytes, old: Seen, base: Base, copied: Mapping[bytes, Copied] | None) -> str:
    if path in base.settled:
        return "" if base.settled[path] == old.stamp else "it was changed in the project since it was carried back"
    if copied is not None:
        known = copied.get(path)
        if known is None:
            return "it came into the project meanwhile"
        return "" if known.original == old.stamp else "it was changed in the project"
    return "" if old.ctime_ns <= base.made_at_ns else "it was changed in the project after the sandbox was made"
