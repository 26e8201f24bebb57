"""What belongs to nobody is shown before it is removed, with the reason; and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.model import ContainerSpec
from sandboxd.lifecycle import State
from tests.daemon.test_manager import IMAGE, UNAVAILABLE, World, anyio_backend, no_patience, world
from tests.unit.records import record

pytestmark = pytest.mark.anyio

__all__ = ["anyio_backend", "no_patience", "world"]


async def stray(world: World, sandbox_id: str) -> str:
    """A container with our labels that no record knows."""
    return await world.engine.create(
        ContainerSpec(
            sandbox_id=sandbox_id,
            owner=world.journal.owner(),
            image=IMAGE,
            command=("/init",),
            user=record().user,
            seccomp_profile="/seccomp.json",
        )
    )


def leave(world: World, tmp_path: Path, sandbox_id: str) -> dict[str, Path]:
    """Of each kind of directory the one that this sandbox would have."""
    left = {
        "output": tmp_path / "spools" / sandbox_id,
        "layer": tmp_path / "layers" / sandbox_id,
        "directory": world.boxes / sandbox_id,
    }
    for directory in left.values():
        directory.mkdir(parents=True)
    return left


async def test_a_dry_run_says_what_would_be_done_and_does_nothing(world: World, tmp_path: Path) -> None:
    """And the same words say what was done."""
    box = await world.container_of(record(state=State.STOPPED))
    world.engine.end(str(box.container_id))
    async with world.managed() as manager:
        await world.recovery.recover()
        kept = leave(world, tmp_path, box.id)
        left = leave(world, tmp_path, "sb-nobodys")
        container_id = await stray(world, "sb-nobodys")
        expected = {
            ("container", container_id, "podman", "remove", "it carries our label and no sandbox owns it"),
            *((kind, str(path), "", "remove", "no sandbox knows it") for kind, path in left.items()),
        }
        for dry_run in (True, True, False):
            found, unseen = await world.recovery.collect(dry_run=dry_run)
            assert {tuple(each) for each in found} == expected
            assert unseen == []
            assert {path.exists() for path in left.values()} == {dry_run}
            assert (container_id in await world.containers()) is dry_run
        found, _ = await world.recovery.collect(dry_run=False)
        assert found == []
        assert {path.exists() for path in kept.values()} == {True}
        assert [sandbox.record.id for sandbox in manager.all()] == [box.id]


async def test_what_an_engine_has_that_does_not_answer_is_not_looked_at(world: World) -> None:
    """Its sandboxes are not lost for that."""
    box = await world.container_of(record(state=State.STOPPED))
    world.engine.end(str(box.container_id))
    async with world.managed() as manager:
        await world.recovery.recover()
        world.engine.fail_next("list_containers", UNAVAILABLE)
        found, unseen = await world.recovery.collect(dry_run=False)
        assert (found, unseen) == ([], ["podman"])
        assert manager.all()[0].record.state is State.STOPPED


async def test_a_container_that_was_removed_behind_our_back_is_noted_as_lost(world: World) -> None:
    box = await world.container_of(record(state=State.STOPPED))
    world.engine.end(str(box.container_id))
    async with world.managed() as manager:
        await world.recovery.recover()
        await world.engine.remove(str(box.container_id))
        for dry_run, state in ((True, State.STOPPED), (False, State.LOST)):
            (finding,), _ = await world.recovery.collect(dry_run=dry_run)
            assert (finding.kind, finding.name, finding.action) == ("sandbox", box.id, "note_lost")
            assert finding.reason == "podman no longer has its container"
            assert manager.all()[0].record.state is state


async def test_programs_that_no_sandbox_uses_any_more_go(world: World, tmp_path: Path) -> None:
    """Each version of ours leaves some; those that are mounted into a sandbox stay as long as that."""
    programs = tmp_path / "bin"
    for name in ("now", "used", "old"):
        (programs / name).mkdir(parents=True)
    world.bin_dir = str(programs / "now")
    box = await world.container_of(record(state=State.STOPPED))
    world.journal.put(record(state=State.STOPPED, container_id=box.container_id, bin_dir=str(programs / "used")))
    world.engine.end(str(box.container_id))
    async with world.managed():
        await world.recovery.recover()
        found, _ = await world.recovery.collect(dry_run=False)
        assert [(each.kind, each.name) for each in found] == [("programs", str(programs / "old"))]
        assert sorted(path.name for path in programs.iterdir()) == ["now", "used"]


async def test_programs_stay_while_it_is_not_known_which_ones_a_sandbox_has(world: World, tmp_path: Path) -> None:
    """They are mounted into it: one whose record was rebuilt without a note may have any of them."""
    programs = tmp_path / "bin"
    for name in ("now", "old"):
        (programs / name).mkdir(parents=True)
    world.bin_dir = str(programs / "now")
    box = await world.container_of(record(state=State.STOPPED))
    world.journal.put(record(state=State.STOPPED, container_id=box.container_id, bin_dir=""))
    world.engine.end(str(box.container_id))
    async with world.managed():
        await world.recovery.recover()
        found, _ = await world.recovery.collect(dry_run=False)
        assert found == []
        assert sorted(path.name for path in programs.iterdir()) == ["now", "old"]


async def test_programs_stay_while_a_record_cannot_be_read(world: World, tmp_path: Path) -> None:
    """Its sandbox may run, with an engine that does not answer."""
    programs = tmp_path / "bin"
    for name in ("now", "old"):
        (programs / name).mkdir(parents=True)
    world.bin_dir = str(programs / "now")
    async with world.managed():
        await world.recovery.recover()
        world.journal.unreadable.add("sb-unreadable")
        assert await world.recovery.collect(dry_run=False) == ([], [])
        world.journal.unreadable.clear()
        found, _ = await world.recovery.collect(dry_run=False)
        assert [(each.kind, each.name) for each in found] == [("programs", str(programs / "old"))]


async def test_a_symlink_among_our_directories_is_removed_and_not_what_it_leads_to(
    world: World, tmp_path: Path
) -> None:
    """By the sweep after a start, and when it is asked for: what is elsewhere is not ours, whatever its name."""
    elsewhere = tmp_path / "elsewhere"
    theirs = [elsewhere / "io" / "file", elsewhere / "resolv.conf", elsewhere / "stages"]
    async with world.managed():
        await world.recovery.recover()
        for directory in ("io", "stages"):
            (elsewhere / directory).mkdir(parents=True)
        for path in theirs[:2]:
            path.write_text("theirs")
        link = world.boxes / "sb-link"
        for remove in (world.recovery.recover, lambda: world.recovery.collect(dry_run=False)):
            world.boxes.mkdir(exist_ok=True)
            link.symlink_to(elsewhere)
            await remove()
            assert not link.is_symlink()
            assert {path.exists() for path in theirs} == {True}
