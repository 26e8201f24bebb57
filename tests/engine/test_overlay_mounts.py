"""Overlays as root mounts them, without an engine: whose files are in the layer, and that no mount stays."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtimes import mounts
from runtimes.errors import Unsupported
from runtimes.mounts import mounts_below
from runtimes.userns import open_swapped_userns
from sandboxd.layers import Layers
from sandboxd.trees import Budget, changes
from sandboxd.workspace import SANDBOX_USER, TARGET, MountSource

pytestmark = pytest.mark.engine


@pytest.fixture(params=[True, False], ids=["idmapped", "plain"])
def userns_fd(request: pytest.FixtureRequest) -> Iterator[int | None]:
    if not request.param:
        yield None
        return
    descriptor = open_swapped_userns(outside=0, inside=SANDBOX_USER.uid)
    yield descriptor
    os.close(descriptor)


def _of_attached_layers(make: Callable[[int, int], int], lower_fd: int, layers_fd: int) -> int:
    """As a kernel does before 6.15."""
    attached = {entry.number for entry in mounts.mounts_of("self")}
    for descriptor in (lower_fd, layers_fd):
        shown = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("mnt_id:\t")[1].split("\n")[0]
        if int(shown) not in attached:
            raise Unsupported("cannot mount by descriptor on this host")
    return make(lower_fd, layers_fd)


@pytest.mark.parametrize("takes_detached", [True, False], ids=["6.15", "5.19"])
def test_an_overlay_is_mounted_nowhere_and_its_layer_belongs_to_whom_the_project_does(
    tmp_path: Path, userns_fd: int | None, takes_detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Id-mapped it can be none itself: its layers are, and older kernels want those attached meanwhile."""
    if not takes_detached:
        monkeypatch.setattr(
            mounts, "detached_overlay", functools.partial(_of_attached_layers, mounts.detached_overlay)
        )
    project = tmp_path / "low:er,dir\\x"
    project.mkdir()
    (project / "file").write_text("old")
    (project / "gone").write_text("x")
    layers = Layers(str(tmp_path / "layers"))
    project_fd = os.open(project, os.O_RDONLY | os.O_DIRECTORY)
    status = os.fstat(project_fd)
    layers.make_overlay(project_fd, "overlay")
    source = MountSource(
        target=TARGET,
        path=str(project),
        descriptor=project_fd,
        device=status.st_dev,
        inode=status.st_ino,
        read_only=False,
        overlay=layers.for_overlay(scratch=str(tmp_path / "scratch")),
    )
    mount_fd = source.detach(userns_fd=userns_fd)
    try:
        assert mounts_below(str(tmp_path)) == []
        seen = Path(f"/proc/self/fd/{mount_fd}")
        owner = 0 if userns_fd is None else SANDBOX_USER.uid
        assert (seen / "file").stat().st_uid == owner
        with open(seen / "file", "a") as file:
            file.write(" and new")
        (seen / "gone").unlink()
        (seen / "dir").mkdir()
        os.chown(seen / "dir", owner, owner)
    finally:
        os.close(mount_fd)
    assert (project / "file").read_text() == "old"
    assert Path(layers.upper, "file").stat().st_uid == 0
    assert Path(layers.upper, "dir").stat().st_uid == 0
    with layers.opened(project_fd) as trees:
        found = changes(trees, Budget(entries_max=100, bytes_max=1000_000_000, seconds_max=60))
    assert [(change.path, change.kind) for change in found] == [
        (b"dir", "added"),
        (b"file", "modified"),
        (b"gone", "removed"),
    ]
    os.close(project_fd)
    layers.erase()
    assert sorted(os.listdir(tmp_path)) == ["low:er,dir\\x"]
