"""Containers whose records were lost: none is taken for nobody's, whatever the engines say, and when."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import msgspec
import pytest

from runtimes import netns
from runtimes.errors import EngineUnavailable
from runtimes.model import ContainerFacts, ContainerSpec, Limits, Network, User
from runtimes.netns import NetworkView
from sandboxd import note, rebuilding
from sandboxd.journal import Journal
from sandboxd.lifecycle import State
from sandboxd.records import SandboxRecord
from sandboxd.sandbox import CLAIM_SPARE_NAME
from sandboxd.timings import Timings
from tests.daemon.test_manager import IMAGE, UNAVAILABLE, World, anyio_backend, no_patience, world
from tests.unit.records import record

pytestmark = pytest.mark.anyio

__all__ = ["anyio_backend", "no_patience", "world"]


async def made(world: World, box: SandboxRecord, *, noted: bool = True) -> str:
    """The container of a record that is in no journal."""
    return await world.engine.create(
        ContainerSpec(
            sandbox_id=box.id,
            owner=world.journal.owner(),
            image=IMAGE,
            command=("/init",),
            user=box.user,
            limits=box.limits,
            network=box.network,
            seccomp_profile="/seccomp.json",
            note=note.written(box) if noted else "",
        )
    )


@pytest.fixture
def torn(world: World, tmp_path: Path) -> World:
    """A world whose journal is lost."""
    world.journal.close()
    os.truncate(tmp_path / "journal.sqlite3", 0)
    world.journal = Journal.open(str(tmp_path / "journal.sqlite3"))
    return world


async def test_a_container_of_a_lost_record_has_one_again(torn: World) -> None:
    """With what its note says; and it says itself that this is not all."""
    box = record(name="box", template="python", limits=Limits(pids_max=50), network=Network.FULL)
    container_id = await made(torn, box)
    torn.engine.end(container_id)
    async with torn.managed() as manager:
        await torn.recovery.recover()
        found = manager.get("box").record
        assert (found.id, found.container_id, found.state) == (box.id, container_id, State.STOPPED)
        assert (found.limits, found.network, found.template) == (box.limits, box.network, "python")
        assert found.warnings == (rebuilding.WARNING,)
        assert found.network_wanted is Network.NONE, "it may have been taken away since, and must not come back"
        done = await torn.recovery.repair()
        assert (os.path.basename(done.aside), done.unseen) == ("journal.sqlite3.damaged", ("docker",))
        assert torn.journal.sandboxes() == [found]
        await torn.recovery.sweep()
        assert await torn.containers() == [container_id]


async def test_a_container_without_a_note_is_kept_as_well(torn: World) -> None:
    """An older daemon made it: its engine knows the least."""
    box = record(user=User(uid=12, gid=34), limits=Limits(pids_max=50), network=Network.FULL)
    container_id = await made(torn, box, noted=False)
    torn.engine.end(container_id)
    async with torn.managed() as manager:
        await torn.recovery.recover()
        (found,) = manager.all()
        assert (found.record.image, found.record.user) == (IMAGE, box.user)
        assert (found.record.limits, found.record.network) == (box.limits, box.network)


async def test_what_an_engine_has_that_answers_late_is_not_nobodys(torn: World) -> None:
    """Not even after the repair: it had no chance to say what it has."""
    box = record(name="late")
    container_id = await made(torn, box)
    torn.engine.end(container_id)
    boxes = torn.boxes / box.id
    boxes.mkdir()
    async with torn.managed() as manager:
        torn.engine.fail_next("list_containers", UNAVAILABLE)
        await torn.recovery.recover()
        assert boxes.exists(), "its socket may be in there"
        torn.engine.fail_next("list_containers", UNAVAILABLE)
        done = await torn.recovery.repair()
        assert set(done.unseen) == {"docker", "podman"}
        torn.engine.fail_next("inspect", EngineUnavailable("cannot reach podman"))
        await torn.recovery.sweep()
        assert await torn.containers() == [container_id], "it could not be asked what that is"
        await torn.recovery.sweep()
        assert manager.get("late").record.state is State.STOPPED
        assert [row.id for row in torn.journal.sandboxes()] == [box.id]


async def test_a_record_that_cannot_be_read_costs_nobody_his_container(world: World, tmp_path: Path) -> None:
    """Only the record is lost. Its output and its layers stay, too."""
    box = record(name="box")
    container_id = await made(world, box)
    world.engine.end(container_id)
    world.journal.put(box)
    world.journal.close()
    database = sqlite3.connect(tmp_path / "journal.sqlite3")
    database.execute("UPDATE sandboxes SET record = x'7b7d'")
    database.commit()
    database.close()
    kept = [tmp_path / "spools" / box.id, tmp_path / "layers" / box.id]
    for directory in kept:
        directory.mkdir(parents=True)
    world.journal = Journal.open(str(tmp_path / "journal.sqlite3"))
    async with world.managed() as manager:
        world.engine.fail_next("list_containers", UNAVAILABLE)
        await world.recovery.recover()
        assert [directory.exists() for directory in kept] == [True, True]
        await world.recovery.sweep()
        assert manager.get("box").record.container_id == container_id
        assert not world.journal.damaged
        await manager.remove(manager.get("box"), Timings())
        assert await world.containers() == []


async def test_a_slot_of_a_lost_record_stays_nobodys_and_one_that_was_claimed_does_not(torn: World) -> None:
    """What tells them apart is the note that a claim leaves beside its socket, be it whole or not."""
    slot, claimed, torn_claim, unsure = (
        record(id=f"sb-{name}", state=State.WARM, slot=True) for name in ("slot", "claimed", "torn", "unsure")
    )
    for box in (slot, claimed, torn_claim, unsure):
        await made(torn, box)
    for box, text in (
        (slot, None),
        (claimed, note.written(record(id="sb-claimed", name="mine", template="python"))),
        (torn_claim, '{"name": "min'),
    ):
        (torn.boxes / box.id).mkdir()
        (torn.boxes / box.id / CLAIM_SPARE_NAME).write_text("")
        if text is not None:
            (torn.boxes / box.id / rebuilding.CLAIM_NAME).write_text(text)
    found = {}
    for container in await torn.engine.list_containers(owner=torn.journal.owner()):
        directory = str(torn.boxes / container.sandbox_id)
        found[container.sandbox_id] = await rebuilding.rebuilt(container, torn.engine, directory)
    assert {name for name, box in found.items() if box.slot} == {"sb-slot"}
    assert found["sb-slot"].state is State.WARM
    assert (found["sb-claimed"].name, found["sb-claimed"].template, found["sb-claimed"].launch) == (
        "mine",
        "python",
        "warm",
    )


@pytest.mark.parametrize("made_with", list(Network))
@pytest.mark.parametrize("routed", [True, False])
async def test_the_network_of_a_lost_record_is_what_the_kernel_shows(
    torn: World, monkeypatch: pytest.MonkeyPatch, made_with: Network, routed: bool
) -> None:
    """It may have been opened or closed since the container was made: no label says so."""
    monkeypatch.setattr(netns, "look", lambda _: NetworkView(interfaces=(), routed=routed))
    await made(torn, record(network=made_with))
    (container,) = await torn.engine.list_containers(owner=torn.journal.owner())
    inspect = torn.engine.inspect

    async def running(container_id: str) -> ContainerFacts:
        return msgspec.structs.replace(await inspect(container_id), pid=os.getpid())

    monkeypatch.setattr(torn.engine, "inspect", running)
    found = await rebuilding.rebuilt(container, torn.engine, str(torn.boxes / "nowhere"))
    assert found.network is made_with
    assert found.network_wanted is (Network.FULL if routed else Network.NONE)
