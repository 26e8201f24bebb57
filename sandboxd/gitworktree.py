"""Finding the repository of a git worktree, whose project holds no more than a file that says where it is.

That file may be the work of a sandbox that ran in the project before, and so is only believed if the repository knows
the worktree too: what a sandbox wrote must not choose what the next one sees.

Source: gitrepository-layout(5), "commondir" and "worktrees/<id>/gitdir".
"""

from __future__ import annotations

import os

from runtimes import beneath, glance

TEXT_BYTES_MAX = 8192
"""Of the files that name a directory: a path, and some words."""

_POINTER = "gitdir: "


class Untrusted(Exception):
    """It looks like a worktree, and its repository does not know it."""


def says_worktree(project_fd: int) -> bool:
    """Whether a project has the file that a git worktree has instead of a repository."""
    return _pointer(project_fd) is not None


def surely_none(project_fd: int) -> bool:
    """Whether a project has surely no such file, as far as that can be told without waiting for its file system."""
    try:
        descriptor = glance.open_below(project_fd, ".git", flags=os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    if descriptor is None:
        return False
    try:
        seen = glance.look(descriptor)
    finally:
        os.close(descriptor)
    return seen is not None and seen.is_directory


def common_directory(project_fd: int, project: str) -> str | None:
    """The repository of the worktree that ``project`` is; None if it is none.

    Args:
        project_fd: The project, open.
        project: Its real path.

    Raises:
        Untrusted: it says that it is one, and is none.
    """
    pointer = _pointer(project_fd)
    if pointer is None:
        return None
    administrative = os.path.realpath(os.path.join(project, pointer))
    common = _read(os.path.join(administrative, "commondir"))
    if common is None:
        # A submodule: its repository stands alone, and says nothing of who uses it.
        return None
    directory = os.path.realpath(os.path.join(administrative, common))
    back = _read(os.path.join(administrative, "gitdir"))
    if os.path.dirname(os.path.dirname(administrative)) != directory or back is None:
        raise Untrusted(f"{directory} has no such worktree")
    if os.path.realpath(os.path.join(administrative, back)) != os.path.join(project, ".git"):
        raise Untrusted(f"{directory} knows this worktree at another place")
    return directory


def _pointer(project_fd: int) -> str | None:
    line = _read_at(project_fd, b".git")
    return line.removeprefix(_POINTER) if line is not None and line.startswith(_POINTER) else None


def _read(path: str) -> str | None:
    try:
        directory_fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read_at(directory_fd, os.fsencode(os.path.basename(path)))
    finally:
        os.close(directory_fd)


def _read_at(directory_fd: int, name: bytes) -> str | None:
    """The line in a small regular file."""
    try:
        descriptor = beneath.open_file(directory_fd, name)
    except OSError:
        return None
    try:
        text = os.fsdecode(os.read(descriptor, TEXT_BYTES_MAX))
    finally:
        os.close(descriptor)
    line = text.rstrip("\n")
    return line if line and "\0" not in line and "\n" not in line else None
