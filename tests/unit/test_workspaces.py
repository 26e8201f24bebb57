"""What a mode of the workspace is carried out with, and which paths of a project are named."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest

from runtimes.model import EngineInfo, EngineName, User
from sandboxd import layers
from sandboxd.failures import Failure, InvalidArgument, Unsupported
from sandboxd.protocol import WorkspaceParams
from sandboxd.workspace import Identity, OpenedPath, Rules
from sandboxd.workspaces import Bounds, Opened, Workspaces, _conflict_failure, project_paths
from tests.fakes.fake_engine import ALL_CAPABILITIES

ME = User(uid=1001, gid=1001)
OPENED = Opened(
    project=OpenedPath(path="/p", descriptor=-1, device=1, inode=2, owner=ME, is_directory=True),
)
IDENTITY = Identity(user=ME, keep_id=False, mounted="same-uid")


async def _nothing(_: str) -> None:
    raise AssertionError("nothing of another user's is here")


def at_home(home: Path, **rules: list[str]) -> Workspaces:
    return Workspaces(
        "/nonexistent",
        rules=Rules(home=str(home), **rules),
        bounds=Bounds(entries_max=1, bytes_max=1),
        may_mount=False,
        idmap_works=False,
        remove_foreign=_nothing,
    )


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was done in threads."""
    made: list[object] = []
    run_sync = anyio.to_thread.run_sync

    def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        made.append(function)
        return run_sync(function, *arguments, **options)

    monkeypatch.setattr(anyio.to_thread, "run_sync", counted)
    return made


async def opened(workspaces: Workspaces, path: Path) -> OpenedPath:
    with contextlib.ExitStack() as held:
        project = (await workspaces.open(WorkspaceParams(path=str(path)), [], held)).project
        assert project is not None
        status = os.fstat(project.descriptor)
        assert (project.device, project.inode) == (status.st_dev, status.st_ino)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(project.descriptor)
    return msgspec.structs.replace(project, descriptor=-1)


@pytest.mark.anyio
async def test_a_project_that_was_used_lately_is_opened_without_a_trip_to_a_thread(
    tmp_path: Path, trips: list[object]
) -> None:
    """A claim has milliseconds, and sixteen of them at once make sixteen threads of as many trips."""
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    workspaces = at_home(tmp_path)
    first = await opened(workspaces, project)
    for path in (project, project / ".." / "project"):
        # A mount or a rename anywhere on the host may cost one opening a trip, and not one after the other.
        needed = []
        for _ in range(20):
            del trips[:]
            assert await opened(workspaces, path) == first
            needed.append(len(trips))
        assert 0 in needed


@pytest.mark.anyio
async def test_a_project_is_the_same_at_a_glance_whatever_leads_to_it(tmp_path: Path) -> None:
    """A parent is the directory's own, and not what stands before it in the path."""
    (tmp_path / "project" / "below").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "project" / "below")
    workspaces = at_home(tmp_path)
    first = await opened(workspaces, tmp_path / "project")
    for _ in range(3):
        assert await opened(workspaces, tmp_path / "elsewhere" / "link" / "..") == first


@pytest.mark.anyio
async def test_what_takes_more_than_a_glance_is_looked_at_in_a_thread(tmp_path: Path, trips: list[object]) -> None:
    """A worktree has a file that must be read, and rules have paths of their own."""
    worktree = tmp_path / "worktree"
    worktree.mkdir()
    (worktree / ".git").write_text("gitdir: /nowhere/.git/worktrees/it\n")
    for workspaces in (at_home(tmp_path), at_home(tmp_path, allow=[str(tmp_path)])):
        for _ in range(2):
            del trips[:]
            assert (await opened(workspaces, worktree)).says_worktree
            assert trips


@pytest.mark.anyio
async def test_a_glance_refuses_what_a_look_refuses(tmp_path: Path) -> None:
    keys = tmp_path / ".ssh"
    keys.mkdir()
    (tmp_path / "link").symlink_to(keys)
    for _ in range(2):
        for path in (keys, tmp_path / "link"):
            with pytest.raises(InvalidArgument) as caught:
                await opened(at_home(tmp_path), path)
            assert caught.value.detail == "~/.ssh holds credentials"
    with pytest.raises(InvalidArgument, match="cannot use"):
        await opened(at_home(tmp_path), tmp_path / "nowhere")


def backend(mode: str, *, overlays: bool, root: bool) -> str:
    workspaces = Workspaces(
        "/nonexistent",
        rules=Rules(home="/home/me"),
        bounds=Bounds(entries_max=1, bytes_max=1),
        may_mount=root,
        idmap_works=root,
        remove_foreign=_nothing,
    )
    able = msgspec.structs.replace(ALL_CAPABILITIES, overlay_for_callers=overlays)
    info = EngineInfo(name=EngineName.PODMAN, usable=True, reason="", capabilities=able)
    params = WorkspaceParams(path="/p", mode=mode)  # type: ignore[arg-type]
    record = workspaces.workspace_record(params, OPENED, IDENTITY, info)
    assert record is not None
    return record.backend


@pytest.mark.parametrize(
    ("overlays", "root", "expected"),
    [(False, True, "overlay"), (True, True, "overlay"), (True, False, "podman-overlay")],
)
def test_an_overlay_is_mounted_by_whoever_may(overlays: bool, root: bool, expected: str) -> None:
    assert backend("overlay", overlays=overlays, root=root) == expected


def test_where_nobody_may_mount_an_overlay_is_refused_and_a_copy_is_not() -> None:
    """A copy of a large project in its stead would be no small surprise; whoever wants one says so."""
    with pytest.raises(Unsupported) as caught:
        backend("overlay", overlays=False, root=False)
    assert "--copy" in caught.value.hint
    assert backend("copy", overlays=False, root=False) == "copy"
    assert backend("bind", overlays=False, root=False) == "bind"


def test_paths_are_relative_to_the_project_however_they_are_typed() -> None:
    assert project_paths(["a", "./b/", "c//d", "/workspace/e"], [b"\xff"]) == [b"a", b"b", b"c/d", b"e", b"\xff"]


@pytest.mark.parametrize("path", [".", "/workspace", "/workspace/", "a/.."])
def test_the_project_itself_is_all_of_it(path: str) -> None:
    assert project_paths([path, "a"], []) == []


@pytest.mark.parametrize("path", ["..", "../a", "/etc/passwd", "/", "a/../../b", "/workspace/../etc", "a\0b"])
def test_a_path_that_leads_out_of_the_project_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot use the path"):
        project_paths([path], [])


def test_a_conflict_tells_of_each_path_in_one_line() -> None:
    """A sandbox chose the names, and what follows a line break would look like ours."""
    sandbox: Any = SimpleNamespace(record=SimpleNamespace(id="sb-1", name=None))
    failure = _conflict_failure(
        sandbox, {b"a\nhint: rm -r .\x1b[2J": "it was changed", "é\xff".encode() + b"\xff": "gone"}
    )
    assert failure.detail == "a\\nhint: rm -r .\\x1b[2J: it was changed; é\u00ff\\xff: gone"


@pytest.mark.parametrize(
    ("number", "type_"),
    [
        (errno.ENOSPC, "not_enough_space"),
        (errno.EDQUOT, "not_enough_space"),
        (errno.EMFILE, "capacity_exceeded"),
        (errno.EIO, "internal"),
    ],
)
def test_a_full_disk_is_said_to_be_full(number: int, type_: str) -> None:
    """Whoever has a copy made can do something about that."""
    with pytest.raises(Failure) as caught, layers._said("cannot copy the project"):
        raise OSError(number, os.strerror(number))
    assert caught.value.type == type_
