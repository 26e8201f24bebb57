"""Carrying changes from one tree to another: from a sandbox's layer to the project, or the other way to undo them.

The source is not trusted (see ``trees``), and the target is the user's own: each file appears whole or not at all
(written beside its place and renamed), nothing outside of the target is touched, and what is no longer as it was when
the changes were found out is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec

from runtimes import beneath, mounts
from sandboxd.trees import PERMISSIONS, Budget, Change, Seen, opened_file, read_link, seen, without_renames

TEMPORARY_PREFIX = b".sandboxd-"
"""Begins the names of files that are being written."""

Owner = tuple[int, int]


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """From where to where."""

    source_fd: int
    target_fd: int
    owner_of: Callable[[Seen], Owner] | None
    """Who shall own what is new in the target; None: whoever makes it, for that cannot be chosen."""
    check: bool
    """Leave alone what is no longer as ``Change.old`` says."""


class Outcome(msgspec.Struct, kw_only=True):
    """What came of it, filled while it is done: what was done until an error is known, too."""

    touched: list[bytes] = msgspec.field(default_factory=list)
    """Paths of the target that were written or removed."""
    changed_meanwhile: list[bytes] = msgspec.field(default_factory=list)
    failed: dict[bytes, str] = msgspec.field(default_factory=dict)

    def is_done(self, change: Change) -> bool:
        """Whether all of a change was carried over."""
        paths = {change.path, change.old_path or change.path}
        return not change.note and paths.isdisjoint(self.failed) and paths.isdisjoint(self.changed_meanwhile)


def apply(transfer: Transfer, found: Collection[Change], budget: Budget, outcome: Outcome) -> None:
    """Make the target what the changes say. Goes on after a file that cannot be written.

    Raises:
        CapacityExceeded, Timeout, Stopped: of ``budget``; what was carried over until then stays.
    """
    split = _with_replacements(without_renames([change for change in found if not change.note]))
    came = [change for change in split if change.new is not None]
    gone = [change for change in reversed(split) if change.new is None]
    new_paths = {change.path for change in came if change.kind == "added"}
    in_the_way = [change for change in gone if _is_in_the_way(change, new_paths)]
    for change in in_the_way:
        _attempt(transfer, change, outcome, budget, _remove)
    for change in came:
        _attempt(transfer, change, outcome, budget, _make)
    undone = {*outcome.failed, *outcome.changed_meanwhile}
    kept = {change.old_path for change in found if change.path in undone}
    for change in gone:
        # Nothing is lost by a failure: a file leaves its old name once it has the new one.
        if change not in in_the_way and change.path not in kept:
            _attempt(transfer, change, outcome, budget, _remove)
    for change in reversed(came):
        # Last, for a file cannot be made in a directory that is read-only.
        if change.new is not None and change.new.type == "dir" and change.path not in outcome.failed:
            _attempt(transfer, change, outcome, budget, _set_mode_of_dir)


def _with_replacements(split: Sequence[Change]) -> list[Change]:
    """The changes, with a file that went and another kind that came told as one: it takes the place at once."""
    gone = {change.path: change.old for change in split if _is_file_gone(change)}
    replaced = set()
    merged = []
    for change in split:
        if change.new is not None and change.new.type != "dir" and change.old is None and change.path in gone:
            replaced.add(change.path)
            merged.append(msgspec.structs.replace(change, old=gone[change.path]))
        else:
            merged.append(change)
    return [change for change in merged if not (change.path in replaced and change.new is None)]


def _is_file_gone(change: Change) -> bool:
    return change.new is None and change.old is not None and change.old.type != "dir"


def _is_in_the_way(change: Change, came: Collection[bytes]) -> bool:
    """Whether something comes in its place, or in the place of a directory above it."""
    parts = change.path.split(b"/")
    return any(b"/".join(parts[:depth]) in came for depth in range(1, len(parts) + 1))


_Step = Callable[[Transfer, int, bytes, Change, Budget], None]


class _ChangedMeanwhile(Exception):
    """It is no longer what it was."""


def _attempt(transfer: Transfer, change: Change, outcome: Outcome, budget: Budget, step: _Step) -> None:
    budget.entries(1)
    try:
        parts = change.path.split(b"/")
        if change.new is not None:
            _make_parents(transfer, parts)
        with beneath.parent_of(transfer.target_fd, parts) as parent_fd:
            step(transfer, parent_fd, parts[-1], change, budget)
            outcome.touched.append(change.path)
    except _ChangedMeanwhile:
        outcome.changed_meanwhile.append(change.path)
    except OSError as error:
        outcome.failed[change.path] = error.strerror or str(error)


def _make_parents(transfer: Transfer, parts: Sequence[bytes]) -> None:
    """The directories above, where only a part of the changes is wanted."""
    current = os.dup(transfer.target_fd)
    try:
        for depth, part in enumerate(parts[:-1], 1):
            if beneath.look(current, part) is None:
                with beneath.parent_of(transfer.source_fd, parts[: depth + 1]) as there:
                    like = seen(os.fstat(there))
                assert like is not None
                _make_dir(transfer, current, part, like)
                # What stands there by now may be a symlink: whoever works in the target can be quicker.
                with _opened_dir(current, part) as made_fd:
                    os.fchmod(made_fd, like.permissions)
            following = beneath.open_dir(current, part)
            os.close(current)
            current = following
    finally:
        os.close(current)


def _require_same(transfer: Transfer, parent_fd: int, name: bytes, old: Seen | None) -> Seen | None:
    """What is there now, which must be what was there."""
    now = seen(beneath.look(parent_fd, name))
    if transfer.check and not _is_same(old, now):
        raise _ChangedMeanwhile
    return now


def _is_same(old: Seen | None, now: Seen | None) -> bool:
    if old is None or now is None:
        return old is now
    # A directory's ctime moves with every file in it, ours too.
    return old.type == now.type and (old.type == "dir" or old.stamp == now.stamp)


def _remove(transfer: Transfer, parent_fd: int, name: bytes, change: Change, budget: Budget) -> None:
    now = _require_same(transfer, parent_fd, name, change.old)
    if now is None:
        return
    if now.type != "dir":
        os.unlink(name, dir_fd=parent_fd)
        return
    try:
        os.rmdir(name, dir_fd=parent_fd)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        if transfer.check:
            raise OSError(error.errno, "there are files in it that are to stay") from None
        # Of a sandbox's own directory nothing stays: what is left in it could not be looked at.
        mounts.remove_tree(f"/proc/self/fd/{parent_fd}/{os.fsdecode(name)}", budget.check)


def _make(transfer: Transfer, parent_fd: int, name: bytes, change: Change, budget: Budget) -> None:
    new = change.new
    assert new is not None
    if new.type == "dir":
        if beneath.look(parent_fd, name) is None:
            _make_dir(transfer, parent_fd, name, new)
        else:
            os.close(beneath.open_dir(parent_fd, name))
        return
    temporary = TEMPORARY_PREFIX + secrets.token_hex(8).encode("ascii")
    try:
        if new.type == "symlink":
            os.symlink(read_link(transfer.source_fd, change.path), temporary, dir_fd=parent_fd)
            _give(transfer, temporary, parent_fd, change.old or new)
        else:
            _write(transfer, parent_fd, temporary, change, budget)
        _require_same(transfer, parent_fd, name, change.old)
        os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=parent_fd)
        raise


def _write(transfer: Transfer, parent_fd: int, temporary: bytes, change: Change, budget: Budget) -> None:
    new = change.new
    assert new is not None
    with opened_file(transfer.source_fd, change.path) as source_fd:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target_fd = os.open(temporary, flags, 0o600, dir_fd=parent_fd)
        try:
            beneath.copy_content(source_fd, target_fd, os.fstat(source_fd).st_size, budget.bytes)
            if transfer.owner_of is not None:
                os.fchown(target_fd, *transfer.owner_of(change.old or new))
            os.fchmod(target_fd, new.permissions)
        finally:
            os.close(target_fd)


def _make_dir(transfer: Transfer, parent_fd: int, name: bytes, like: Seen) -> None:
    os.mkdir(name, 0o700, dir_fd=parent_fd)
    _give(transfer, name, parent_fd, like)


def _give(transfer: Transfer, name: bytes, parent_fd: int, like: Seen) -> None:
    if transfer.owner_of is not None:
        os.chown(name, *transfer.owner_of(like), dir_fd=parent_fd, follow_symlinks=False)


def _set_mode_of_dir(_: Transfer, parent_fd: int, name: bytes, change: Change, __: Budget) -> None:
    assert change.new is not None
    with _opened_dir(parent_fd, name) as descriptor:
        if os.fstat(descriptor).st_mode & PERMISSIONS != change.new.permissions:
            os.fchmod(descriptor, change.new.permissions)


@contextlib.contextmanager
def _opened_dir(parent_fd: int, name: bytes) -> Iterator[int]:
    descriptor = beneath.open_dir(parent_fd, name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def reversed_changes(found: Collection[Change]) -> list[Change]:
    """What undoes these changes."""
    undone = []
    for change in without_renames(found):
        kind = {"added": "removed", "removed": "added"}.get(change.kind, change.kind)
        # What cannot be shown can still be taken away, or written over.
        note = change.note if change.old is not None and change.old.type == "dir" else ""
        undone.append(msgspec.structs.replace(change, kind=kind, old=change.new, new=change.old, note=note))
    return sorted(undone, key=lambda change: (change.path, change.new is not None))
