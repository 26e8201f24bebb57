"""What a sandbox has changed of its project: the layer that it wrote against the project, on the host.

The layer is what the sandbox made, and so is everything in it: names, depths, sizes, modes. It is walked by
``runtimes.beneath``, within bounds, in a thread of its own. Of what overlays keep in it, that is believed which the
sandbox cannot make itself: a device 0/0 (it has no CAP_MKNOD), and the attributes with the prefix that is the
overlay's own and hidden from inside.

Three kinds of layers:

* ``overlay``, ``userxattr``: the kernel's. A device 0/0 stands for what was removed; a directory with the attribute
  ``opaque`` hides the project's. They differ in the attributes' prefix.
* ``fuse``: those of fuse-overlayfs, which writes ``.wh.NAME`` where it may not make devices.
* ``copy``: a whole tree. Changed is what is not as it was when it was copied: see ``Copied``.

Source: overlayfs in the kernel's documentation; fuse-overlayfs(1).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from hashlib import blake2b
from typing import Literal

import msgspec

from runtimes import beneath
from sandboxd.failures import CapacityExceeded, Timeout

LayerKind = Literal["overlay", "userxattr", "fuse", "copy"]
Kind = Literal["added", "modified", "removed", "renamed", "mode"]
FileType = Literal["file", "dir", "symlink", "other"]

DEPTH_MAX = 100
"""Of directories within each other; each takes two descriptors while it is walked."""
COMPARE_BYTES = 1024 * 1024
PERMISSIONS = 0o777
"""What of a mode counts: a sandbox gives nobody setuid, setgid or sticky bits."""

_WHITEOUT_PREFIX = b".wh."
_OPAQUE_MARKER = b".wh..wh..opq"
_OPAQUE = {
    "overlay": "trusted.overlay.opaque",
    "userxattr": "user.overlay.opaque",
    "fuse": "user.fuseoverlayfs.opaque",
}
_ORIGIN = {
    "overlay": "trusted.overlay.origin",
    "userxattr": "user.overlay.origin",
    "fuse": "user.fuseoverlayfs.origin",
}


class Stopped(Exception):
    """Whoever wanted to know has gone."""


class Budget:
    """What a walk may cost. One thread spends it; any may stop it."""

    def __init__(self, *, entries_max: int, bytes_max: int, seconds_max: float) -> None:
        self._entries_left = self._entries_max = entries_max
        self._bytes_left = self._bytes_max = bytes_max
        self._seconds_max = seconds_max
        self._deadline = time.monotonic() + seconds_max
        self._stop = threading.Event()

    def stop(self) -> None:
        """Have the walk end soon."""
        self._stop.set()

    def entries(self, count: int) -> None:
        """Take so many directory entries.

        Raises:
            Stopped: somebody called ``stop``.
            CapacityExceeded: there are more than may be looked at.
            Timeout: it has taken too long.
        """
        self.fits(count)
        self._entries_left -= count

    def fits(self, count: int) -> None:
        """See that so many directory entries could be taken. Raises as ``entries`` does."""
        if count > self._entries_left:
            raise CapacityExceeded(
                f"cannot look at more than {self._entries_max} files at once", hint="name some paths"
            )
        self.check()

    def bytes(self, count: int) -> None:
        """Take so many bytes of content. Raises as ``entries`` does."""
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise CapacityExceeded(f"cannot read more than {self._bytes_max} bytes at once", hint="name some paths")
        self.check()

    def check(self) -> None:
        """See that there is time left, and that somebody waits. Raises ``Stopped`` and ``Timeout``."""
        if self._stop.is_set():
            raise Stopped
        if time.monotonic() > self._deadline:
            raise Timeout(f"cannot finish within {self._seconds_max:g} s", hint="name some paths")


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it was when it was looked at."""

    type: FileType
    mode: int
    """As in ``st_mode``."""
    size_bytes: int
    inode: int
    ctime_ns: int
    uid: int
    gid: int

    @property
    def permissions(self) -> int:
        """What counts of the mode; a symlink has none."""
        return 0 if self.type == "symlink" else self.mode & PERMISSIONS

    @property
    def stamp(self) -> Stamp:
        """By which it is known again."""
        return (self.inode, self.ctime_ns)


Stamp = tuple[int, int]
"""Inode and ctime: nobody who cannot set the clock can change a file and keep both."""


class Copied(msgspec.Struct, frozen=True, array_like=True):
    """One entry of a copy, when it was made."""

    original: Stamp
    copy: Stamp
    permissions: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One path on which sandbox and project differ."""

    path: bytes
    """Relative to the project."""
    kind: Kind
    old: Seen | None
    """In the project; None: it is not there."""
    new: Seen | None
    """In the sandbox; None: it was removed."""
    old_path: bytes | None = None
    """What a renamed file is called in the project."""
    known: bool = False
    """It was in the project when that was copied, so that it should be there."""
    parent: Stamp | None = None
    """The project's directory, if the overlay made this file, which is not there, of one of the project's."""
    note: str = ""
    """Why it can be neither shown nor applied."""


class Trees(msgspec.Struct, frozen=True, kw_only=True):
    """A project and what a sandbox made of it, both open."""

    project_fd: int
    layer_fd: int
    kind: LayerKind
    copied: Mapping[bytes, Copied] = {}
    """Of a copy: what was in it."""


def changes(trees: Trees, budget: Budget, *, paths: Collection[bytes] = ()) -> list[Change]:
    """All changes, by path; what was removed stands before what came in its place.

    Args:
        trees: Project and layer.
        budget: What it may cost.
        paths: Only what is at or below one of these; none: everything.

    Raises:
        CapacityExceeded, Timeout, Stopped: of ``budget``.
        OSError: one of the two roots cannot be read.
    """
    walk = _Walk(trees, budget, [path.split(b"/") for path in paths])
    found = list(walk.walk((), trees.project_fd, trees.layer_fd, opaque=trees.kind == "copy"))
    return with_renames(trees, found, budget)


class _Walk:
    def __init__(self, trees: Trees, budget: Budget, wanted: list[list[bytes]]) -> None:
        self._trees = trees
        self._budget = budget
        self._wanted = wanted
        self._is_copy = trees.kind == "copy"

    def walk(
        self, parts: tuple[bytes, ...], project_fd: int | None, layer_fd: int | None, *, opaque: bool
    ) -> Iterator[Change]:
        """What differs between two directories. None: there is none on that side."""
        names, removed = self._names(layer_fd)
        if project_fd is not None and (opaque or layer_fd is None):
            names |= set(beneath.names_in(project_fd, self._budget.fits))
        elif project_fd is not None:
            names |= removed
        self._budget.entries(len(names))
        for name in sorted(names):
            path = (*parts, name)
            if self._is_wanted(path):
                old = None if project_fd is None else seen(beneath.look(project_fd, name))
                new = None if layer_fd is None or name in removed else self._layer_seen(layer_fd, name)
                yield from self._compare(path, project_fd, layer_fd, old, new, opaque=opaque)

    def _names(self, layer_fd: int | None) -> tuple[set[bytes], set[bytes]]:
        """What is in a directory of the layer, and what fuse-overlayfs says was removed."""
        if layer_fd is None:
            return set(), set()
        names = set(beneath.names_in(layer_fd, self._budget.fits))
        if self._trees.kind != "fuse":
            return names, set()
        markers = {name for name in names if name.startswith(_WHITEOUT_PREFIX)}
        return names - markers, {name.removeprefix(_WHITEOUT_PREFIX) for name in markers - {_OPAQUE_MARKER}}

    def _layer_seen(self, layer_fd: int, name: bytes) -> Seen | None:
        status = beneath.look(layer_fd, name)
        if status is None or (not self._is_copy and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0):
            return None
        return seen(status)

    def _is_wanted(self, path: tuple[bytes, ...]) -> bool:
        """Whether it lies at, below or above something that was asked for."""
        return not self._wanted or any(
            all(left == right for left, right in zip(path, wanted, strict=False)) for wanted in self._wanted
        )

    def _is_asked_for(self, path: tuple[bytes, ...]) -> bool:
        return not self._wanted or any(list(path[: len(wanted)]) == wanted for wanted in self._wanted)

    def _compare(
        self,
        path: tuple[bytes, ...],
        project_fd: int | None,
        layer_fd: int | None,
        old: Seen | None,
        new: Seen | None,
        *,
        opaque: bool,
    ) -> Iterator[Change]:
        joined = b"/".join(path)
        copied = self._trees.copied.get(joined)
        if old is None and new is None:
            return
        if self._is_copy and (new is None if copied is None else new is not None and self._is_untouched(new, copied)):
            # Nothing that the sandbox did: the project got it since, or it is as it was copied.
            return
        if len(path) > DEPTH_MAX:
            if self._is_asked_for(path):
                yield Change(path=joined, kind="modified", old=old, new=new, note="it lies too deep")
        elif old is not None and new is not None and old.type == new.type:
            yield from self._same_type(path, project_fd, layer_fd, old, new, opaque=opaque)
        else:
            if old is not None:
                yield from self._gone(path, project_fd, old)
            if new is not None:
                yield from self._came(path, project_fd, layer_fd, new, known=copied is not None and old is None)

    @staticmethod
    def _is_untouched(new: Seen, copied: Copied) -> bool:
        return new.type != "dir" and new.stamp == copied.copy

    def _gone(self, path: tuple[bytes, ...], project_fd: int | None, old: Seen) -> Iterator[Change]:
        if self._is_asked_for(path):
            yield Change(path=b"/".join(path), kind="removed", old=old, new=None)
        if old.type == "dir" and project_fd is not None:
            with _opened(project_fd, path[-1]) as child_fd:
                if child_fd is not None:
                    yield from self.walk(path, child_fd, None, opaque=True)

    def _came(
        self, path: tuple[bytes, ...], project_fd: int | None, layer_fd: int | None, new: Seen, *, known: bool
    ) -> Iterator[Change]:
        assert layer_fd is not None
        with _opened(layer_fd, path[-1]) if new.type == "dir" else contextlib.nullcontext() as child_fd:
            if self._is_asked_for(path):
                note = _unfit(new) or ("it cannot be read" if new.type == "dir" and child_fd is None else "")
                parent = None
                if project_fd is not None and new.type == "file" and self._has_origin(layer_fd, path[-1]):
                    status = os.fstat(project_fd)
                    parent = (status.st_ino, status.st_ctime_ns)
                yield Change(
                    path=b"/".join(path), kind="added", old=None, new=new, known=known, parent=parent, note=note
                )
            if child_fd is not None:
                yield from self.walk(path, None, child_fd, opaque=True)

    def _has_origin(self, layer_fd: int, name: bytes) -> bool:
        """Whether the overlay made it of a file of the project."""
        if self._is_copy:
            return False
        try:
            file_fd = beneath.open_file(layer_fd, name)
        except OSError:
            return False
        try:
            return beneath.xattr(file_fd, _ORIGIN[self._trees.kind]) is not None
        finally:
            os.close(file_fd)

    def _same_type(
        self,
        path: tuple[bytes, ...],
        project_fd: int | None,
        layer_fd: int | None,
        old: Seen,
        new: Seen,
        *,
        opaque: bool,
    ) -> Iterator[Change]:
        assert project_fd is not None
        assert layer_fd is not None
        joined = b"/".join(path)
        asked_for = self._is_asked_for(path)
        if new.type == "dir":
            if asked_for and self._mode_differs(joined, old, new):
                yield Change(path=joined, kind="mode", old=old, new=new)
            with _opened(project_fd, path[-1]) as old_fd, _opened(layer_fd, path[-1]) as new_fd:
                if new_fd is None or old_fd is None:
                    yield Change(path=joined, kind="modified", old=old, new=new, note="it cannot be read")
                else:
                    yield from self.walk(path, old_fd, new_fd, opaque=opaque or self._hides(new_fd))
            return
        if not asked_for:
            return
        try:
            same = self._same_content(project_fd, layer_fd, path[-1], old, new)
        except OSError as error:
            yield Change(path=joined, kind="modified", old=old, new=new, note=f"it cannot be read: {error.strerror}")
            return
        if not same:
            yield Change(path=joined, kind="modified", old=old, new=new, note=_unfit(new))
        elif old.permissions != new.permissions:
            yield Change(path=joined, kind="mode", old=old, new=new)

    def _mode_differs(self, joined: bytes, old: Seen, new: Seen) -> bool:
        """Of a copied directory, whether the sandbox changed it; its ctime says nothing, for files come and go."""
        copied = self._trees.copied.get(joined)
        return old.permissions != new.permissions and (copied is None or copied.permissions != new.permissions)

    def _hides(self, layer_fd: int) -> bool:
        """Whether nothing of the project's directory shows through this one."""
        if self._is_copy:
            return True
        if beneath.xattr(layer_fd, _OPAQUE[self._trees.kind]) in {b"y", b"x"}:
            return True
        return self._trees.kind == "fuse" and beneath.look(layer_fd, _OPAQUE_MARKER) is not None

    def _same_content(self, project_fd: int, layer_fd: int, name: bytes, old: Seen, new: Seen) -> bool:
        if new.type == "symlink":
            return os.readlink(name, dir_fd=project_fd) == os.readlink(name, dir_fd=layer_fd)
        if new.type == "other":
            return old.mode == new.mode
        if old.size_bytes != new.size_bytes:
            return False
        with contextlib.ExitStack() as opened:
            old_fd = beneath.open_file(project_fd, name)
            opened.callback(os.close, old_fd)
            new_fd = beneath.open_file(layer_fd, name)
            opened.callback(os.close, new_fd)
            position = 0
            while position < new.size_bytes:
                self._budget.bytes(COMPARE_BYTES)
                left = os.pread(old_fd, COMPARE_BYTES, position)
                if left != os.pread(new_fd, COMPARE_BYTES, position):
                    return False
                if not left:
                    break
                position += len(left)
        return True


@contextlib.contextmanager
def _opened(parent_fd: int, name: bytes) -> Iterator[int | None]:
    """A subdirectory, open; None if it is none any more, or may not be read."""
    try:
        descriptor = beneath.open_dir(parent_fd, name)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def seen(status: os.stat_result | None) -> Seen | None:
    """What ``stat`` says, as far as it counts."""
    if status is None:
        return None
    return Seen(
        type=_type_of(status.st_mode),
        mode=status.st_mode,
        size_bytes=status.st_size,
        inode=status.st_ino,
        ctime_ns=status.st_ctime_ns,
        uid=status.st_uid,
        gid=status.st_gid,
    )


def _type_of(mode: int) -> FileType:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "dir"
    return "symlink" if stat.S_ISLNK(mode) else "other"


def _unfit(new: Seen) -> str:
    return "a socket, pipe or device stays in the sandbox" if new.type == "other" else ""


# --- renames --------------------------------------------------------------------------------------------


def with_renames(trees: Trees, found: list[Change], budget: Budget) -> list[Change]:
    """The same changes, with a file that went and one that came told as one where their content is the same."""
    gone: dict[int, list[Change]] = {}
    # What something else has taken the place of did not move, it was replaced.
    taken = {change.path for change in found if change.new is not None}
    for change in found:
        if change.path in taken or change.old is None or change.old.type != "file":
            continue
        if change.kind == "removed" and change.old.size_bytes:
            gone.setdefault(change.old.size_bytes, []).append(change)
    sources: dict[bytes, Change] = {}
    renamed: dict[bytes, Change] = {}
    digests: dict[bytes, bytes | None] = {}
    for change in found:
        if change.kind != "added" or change.new is None or change.new.type != "file" or change.note:
            continue
        candidates = [each for each in gone.get(change.new.size_bytes, []) if each.path not in sources]
        if not candidates:
            continue
        content = _digest(trees.layer_fd, change.path, change.new.size_bytes, budget)
        # A file that kept its name moved, rather than any other with the same content.
        candidates.sort(key=lambda each: _name_of(each.path) != _name_of(change.path))
        for each in candidates:
            if each.path not in digests:
                digests[each.path] = _digest(trees.project_fd, each.path, change.new.size_bytes, budget)
            if content is not None and digests[each.path] == content:
                sources[each.path] = each
                renamed[change.path] = msgspec.structs.replace(
                    change, kind="renamed", old=each.old, old_path=each.path
                )
                break
    return [
        renamed.get(change.path, change) if change.kind == "added" else change
        for change in found
        if not (change.kind == "removed" and change.path in sources)
    ]


def without_renames(found: Collection[Change]) -> list[Change]:
    """The same changes, with a renamed file told as one that went and one that came."""
    split = []
    for change in found:
        if change.old_path is None:
            split.append(change)
            continue
        split.append(Change(path=change.old_path, kind="removed", old=change.old, new=None))
        split.append(msgspec.structs.replace(change, kind="added", old=None, old_path=None))
    return sorted(split, key=lambda change: (change.path, change.new is not None))


def _name_of(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]


def _digest(root_fd: int, path: bytes, size_bytes: int, budget: Budget) -> bytes | None:
    """Of the content of a file; None where it cannot be read, or is no longer what it was."""
    digest = blake2b()
    try:
        with opened_file(root_fd, path) as descriptor:
            if os.fstat(descriptor).st_size != size_bytes:
                return None
            position = 0
            while position < size_bytes:
                budget.bytes(COMPARE_BYTES)
                data = os.pread(descriptor, COMPARE_BYTES, position)
                if not data:
                    return None
                digest.update(data)
                position += len(data)
    except OSError:
        return None
    return digest.digest()


@contextlib.contextmanager
def opened_file(root_fd: int, path: bytes) -> Iterator[int]:
    """A regular file beneath a root, open for reading.

    Raises:
        OSError: it is none, or cannot be reached without following a symlink.
    """
    parts = path.split(b"/")
    with beneath.parent_of(root_fd, parts) as parent_fd:
        descriptor = beneath.open_file(parent_fd, parts[-1])
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_link(root_fd: int, path: bytes) -> bytes:
    """Where a symlink beneath a root leads.

    Raises:
        OSError: it is none.
    """
    parts = path.split(b"/")
    with beneath.parent_of(root_fd, parts) as parent_fd:
        return os.readlink(parts[-1], dir_fd=parent_fd)
