"""From the changes of a sandbox to what people and ``git apply`` read: a page of them that fits into a reply."""

from __future__ import annotations

import os
from typing import NamedTuple

import msgspec

from sandboxd.protocol import WorkspaceChange
from sandboxd.trees import Budget, Change, Seen, Trees, opened_file, read_link
from sandboxd.unified import FileVersion, Patch, file_patch, is_text

TEXT_BYTES_MAX = 1024 * 1024
"""Of one side of a file that is compared line by line."""

PAGE_BYTES_MAX = 3 * 1024 * 1024
"""Of a reply, which has room for some more."""
PAGE_CHANGES_MAX = 5000


class Page(NamedTuple):
    """Some of the changes."""

    changes: list[WorkspaceChange]
    total: int
    next_offset: int | None


def page(trees: Trees, found: list[Change], budget: Budget, *, offset: int, patch: bool) -> Page:
    """The changes from ``offset`` on that fit into one reply; at least one, if there is one.

    Raises:
        CapacityExceeded, Timeout, Stopped: of ``budget``.
    """
    shown: list[WorkspaceChange] = []
    size = 0
    for number in range(offset, len(found)):
        change = _told(trees, found[number], budget, patch=patch)
        encoded = len(msgspec.json.encode(change))
        if encoded > PAGE_BYTES_MAX:
            change = _summed_up(change)
            encoded = len(msgspec.json.encode(change))
        if shown and (size + encoded > PAGE_BYTES_MAX or len(shown) == PAGE_CHANGES_MAX):
            return Page(shown, len(found), number)
        shown.append(change)
        size += encoded
    return Page(shown, len(found), None)


def _summed_up(change: WorkspaceChange) -> WorkspaceChange:
    """Without its patch, which is too long for any reply."""
    return msgspec.structs.replace(change, patch=None, patch_bytes=None, binary=True)


def _told(trees: Trees, change: Change, budget: Budget, *, patch: bool) -> WorkspaceChange:
    note = change.note
    binary = False
    made = Patch(b"", 0, 0)
    if not note:
        try:
            old, new = _versions(trees, change, budget)
        except OSError as error:
            # It changed, or went, since it was found.
            note = f"it cannot be read: {error.strerror}"
        else:
            binary = any(version is not None and version.data is None for version in (old, new))
            if old is not None or new is not None:
                made = file_patch(change.path, old, new, old_path=change.old_path)
    text, raw = _text_or_bytes(made.text) if patch else (None, None)
    path, path_bytes = _text_or_bytes(change.path)
    seen = change.new or change.old
    assert seen is not None
    return WorkspaceChange(
        path=path if path is not None else _for_display(change.path),
        path_bytes=path_bytes,
        kind=change.kind,
        type=seen.type,
        old_path=None if change.old_path is None else _for_display(change.old_path),
        old_mode=None if change.old is None else change.old.mode,
        new_mode=None if change.new is None else change.new.mode,
        old_size_bytes=None if change.old is None else change.old.size_bytes,
        new_size_bytes=None if change.new is None else change.new.size_bytes,
        binary=binary,
        insertions=made.insertions,
        deletions=made.deletions,
        patch=text or None,
        patch_bytes=raw,
        note=note,
    )


def _versions(trees: Trees, change: Change, budget: Budget) -> tuple[FileVersion | None, FileVersion | None]:
    """Both sides, as a patch needs them; nothing of what no patch can tell, such as directories."""
    if change.kind in {"mode", "renamed"}:
        # The content is the same: that it is need not be shown.
        return _bare(change.old), _bare(change.new)
    old = _version(trees.project_fd, change.path, change.old, budget)
    new = _version(trees.layer_fd, change.path, change.new, budget)
    if old is not None and new is not None and (old.data is None or new.data is None):
        return old._replace(data=None), new._replace(data=None)
    return old, new


def _bare(seen: Seen | None) -> FileVersion | None:
    return None if seen is None or seen.type == "dir" else FileVersion(seen.mode, b"")


def _version(root_fd: int, path: bytes, seen: Seen | None, budget: Budget) -> FileVersion | None:
    if seen is None or seen.type not in {"file", "symlink"}:
        return None
    if seen.type == "symlink":
        return FileVersion(seen.mode, read_link(root_fd, path))
    if seen.size_bytes > TEXT_BYTES_MAX:
        return FileVersion(seen.mode, None)
    budget.bytes(seen.size_bytes)
    with opened_file(root_fd, path) as descriptor:
        # One byte more: it may be growing.
        data = os.pread(descriptor, TEXT_BYTES_MAX + 1, 0)
    return FileVersion(seen.mode, data if len(data) <= TEXT_BYTES_MAX and is_text(data) else None)


def _text_or_bytes(data: bytes) -> tuple[str | None, bytes | None]:
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        return None, data


def _for_display(path: bytes) -> str:
    return path.decode(errors="backslashreplace")
