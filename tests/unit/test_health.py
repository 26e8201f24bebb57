"""What is judged to be wrong with a sandbox."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.cgroup.readings import Usage
from sandboxd.health import Facts, is_full, judge
from sandboxd.lifecycle import State
from tests.unit.init_files import tree

MIB = 1 << 20


def facts(**changes: object) -> Facts:
    """A sandbox with limits, of which nothing is wrong, but for the changes."""
    fine: dict[str, object] = {
        "sandbox_id": "sb-a",
        "state": State.RUNNING,
        "state_reason": "",
        "init_answers": True,
        "usage": Usage(pids=5, memory_working_set_bytes=10 * MIB),
        "memory_bytes_max": 64 * MIB,
        "pids_max": 32,
    }
    return Facts(**{**fine, **changes})  # type: ignore[arg-type]


def kinds(**changes: object) -> list[str]:
    """What is wrong with it."""
    return [problem.kind for problem in judge(facts(**changes))]


def test_nothing_is_wrong_with_what_is_fine_or_unknown() -> None:
    """A counter that cannot be read is no problem of the sandbox's."""
    assert kinds() == []
    assert kinds(usage=Usage()) == []
    assert kinds(memory_bytes_max=None, pids_max=None, forks_refused=3) == []
    assert kinds(state=State.STOPPED, init_answers=False) == []


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"state": State.BROKEN, "init_answers": False}, "init_gone"),
        ({"state": State.LOST, "init_answers": False}, "init_gone"),
        ({"state": State.STOPPED, "state_reason": "its init ended with 137", "init_answers": False}, "init_gone"),
        ({"init_answers": False}, "init_gone"),
        ({"full": ("/tmp",)}, "disk_full"),
        ({"usage": Usage(pids=32)}, "pids_exhausted"),
        ({"forks_refused": 1}, "pids_exhausted"),
        ({"usage": Usage(memory_working_set_bytes=63 * MIB)}, "memory_at_limit"),
    ],
)
def test_each_kind_is_told_with_what_to_do_about_it(changes: dict[str, object], kind: str) -> None:
    """And alone: one broken thing is not taken for another."""
    [problem] = judge(facts(**changes))
    assert problem.kind == kind
    assert problem.detail
    assert problem.hint


def test_several_are_told_at_once() -> None:
    """Each full file system apart."""
    found = judge(facts(full=("/tmp", "/workspace"), usage=Usage(pids=40)))
    assert [problem.kind for problem in found] == ["disk_full", "disk_full", "pids_exhausted"]
    assert "/workspace" in found[1].detail


@pytest.fixture(params=["size=256k", "size=4m,nr_inodes=8"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for few bytes, or for few files."""
    if os.geteuid() != 0:
        pytest.fail("a small file system must be mounted: run it as root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "small", small], check=True)
    yield small
    subprocess.run(["umount", small], check=True)


@pytest.mark.anyio
async def test_a_full_file_system_is_told_by_the_worker_inside(small: Path) -> None:
    """Full of bytes, or of files; and no more once something is removed."""
    async with tree() as served:
        assert not await is_full(served.files, str(small))
        with contextlib.suppress(OSError):
            for number in range(16):
                (small / str(number)).write_bytes(bytes(64 * 1024))
        assert await is_full(served.files, str(small))
        for path in small.iterdir():
            path.unlink()
        assert not await is_full(served.files, str(small))
        assert not await is_full(served.files, "/nowhere")
