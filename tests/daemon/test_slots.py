"""Slots when something comes in between: a restart, a death, a caller who leaves; and limits that others change."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from runtimes.cgroup.readings import EffectiveLimits, OwnLimits
from runtimes.errors import CgroupUnreadable, EngineUnavailable
from runtimes.model import Limits
from sandboxd import note
from sandboxd.config import Config, Template
from sandboxd.failures import PoolExhausted, SandboxGone
from sandboxd.launching import Launcher
from sandboxd.lifecycle import Event, State
from sandboxd.protocol import SandboxCreateParams
from sandboxd.rebuilding import CLAIM_NAME
from sandboxd.records import SandboxRecord
from sandboxd.sandbox import CLAIM_SPARE_NAME, PROVEN_TMPFS, Sandbox
from sandboxd.timings import Timings
from tests.daemon.test_manager import IMAGE, World
from tests.unit.records import record

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
PATIENCE_S = 10.0
CONFIG = Config(templates={"mine": Template(image=IMAGE)})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of the fake engine have no init, and nobody is to wait for one."""
    monkeypatch.setattr("sandboxd.sandbox.INIT_DEADLINE_S", 0.05)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def slot_of(world: World, **changes: Any) -> SandboxRecord:
    """A slot as a former daemon had written it down, with its container."""
    made = await world.container_of(record(id=changes.pop("id", "sb-slot")))
    slot = msgspec.structs.replace(
        made, **{"state": State.WARM, "slot": True, "template": "mine", "image": IMAGE, **changes}
    )
    world.journal.put(slot)
    return slot


async def emptied(world: World) -> None:
    with anyio.fail_after(PATIENCE_S):
        while world.manager.all():
            await anyio.lowlevel.checkpoint()
    await world.assert_empty()


@pytest.mark.parametrize("state", [State.RESERVED, State.WARM])
async def test_a_slot_that_cannot_be_claimed_after_a_start_is_removed(world: World, state: State) -> None:
    """Half claimed, or without an init that answers."""
    await slot_of(world, state=state, slot=state is State.WARM)
    async with world.managed(CONFIG) as manager:
        await world.recovery.recover()
        world.launcher.keep_pools()
        assert manager.present() == []
        await world.recovery.sweep()
        await emptied(world)


@pytest.mark.parametrize("state", [State.RESERVED, State.WARM])
async def test_a_slot_of_an_engine_that_is_silent_goes_as_soon_as_it_answers(world: World, state: State) -> None:
    """And is nobody's sandbox until then: no user could make anything of it."""
    await slot_of(world, state=state, slot=state is State.WARM)
    async with world.managed(CONFIG) as manager:
        world.engine.fail_next("list_containers", EngineUnavailable("cannot reach podman"))
        await world.recovery.recover()
        world.launcher.keep_pools()
        assert [box for box in manager.present() if not box.record.state_reason] == []
        assert [box.record.state for box in manager.all()] == [State.REMOVING]
        await world.recovery.sweep()
        await emptied(world)


async def test_a_template_that_is_gone_from_the_configuration_costs_its_slots_and_nothing_else(world: World) -> None:
    await slot_of(world, template="deleted")
    async with world.managed(CONFIG) as manager:
        (slot,) = [manager.register(row) for row in world.journal.sandboxes()]
        assert slot.record.state is State.WARM
        world.launcher.keep_pools()
        assert {bucket.recipe.template for bucket in world.launcher.pools.buckets()} == {"default", "mine"}
        await emptied(world)


async def test_slots_go_when_settings_that_are_read_again_change_their_template(world: World) -> None:
    """And only then: neither another setting nor an engine that is silent at that moment costs a slot."""
    await slot_of(world)
    async with world.managed(CONFIG) as manager:
        (slot,) = [manager.register(row) for row in world.journal.sandboxes()]
        recipe = world.launcher._own_recipe("mine")
        assert recipe is not None
        world.launcher.pools.adopt(recipe, slot, age_s=0.0)
        more = msgspec.structs.replace(CONFIG.templates["mine"], pool_max=7)
        world.launcher.reconfigure(Config(templates={"mine": more}))
        other = Config(templates={"mine": Template(image="localhost/other")})
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(world.launcher._engines, "get", _no_engine)
            world.launcher.reconfigure(other)
        assert [list(bucket.warm) for bucket in world.launcher.pools.buckets() if bucket.recipe == recipe] == [[slot]]
        world.launcher.reconfigure(other)
        await emptied(world)


async def test_a_claim_is_noted_beside_the_socket_whole_or_not_at_all_and_told_with_its_time(world: World) -> None:
    """Its file is made while the slot is warm, for a claim has no time for that. Its name says that there was one."""
    async with world.managed() as manager:
        slot = manager.register(record(id="sb-slot", state=State.WARM, slot=True))
        box = Path(slot.directory)
        box.mkdir()
        slot.prepare_claim()
        assert [path.name for path in box.iterdir()] == [CLAIM_SPARE_NAME]
        slot.claim(record(id="sb-other", name="mine", template="python", state=State.CREATING))
        assert [path.name for path in box.iterdir()] == [CLAIM_NAME]
        noted = note.read((box / CLAIM_NAME).read_text())
        assert noted is not None
        assert (noted.name, noted.template, noted.slot) == ("mine", "python", False)
        told: list[tuple[str, object]] = []
        slot.on_told = lambda kind, _id, _name, data: told.append((kind, data))
        slot.change(Event.CLAIMED, took_us=1234)
        assert told == [("created", {"reason": "", "launch": "warm", "miss_reason": "", "ready_us": 1234})]
        slot.prepare_claim()
        slot.erase()
        assert not box.exists()


async def test_a_note_that_a_full_disk_cuts_short_is_not_left_and_is_in_the_way_of_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a note says that there was a claim, and not of what. The log tells of it; a slot is wiped anew."""
    room = 400
    write = os.write

    def filling(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[:room])
        room -= written
        return written

    async with world.managed() as manager:
        slot = manager.register(record(id="sb-slot", state=State.WARM, slot=True))
        box = Path(slot.directory)
        box.mkdir()
        slot.prepare_claim()
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", filling)
            slot.claim(record(id="sb-slot", name="m" * room, state=State.CREATING))
        assert [path.name for path in box.iterdir()] == [CLAIM_SPARE_NAME]
        assert "cannot leave a note for sb-slot" in caplog.text
        slot.prepare_claim()
        assert (box / CLAIM_SPARE_NAME).read_bytes() == b""
        slot.erase()


def _no_engine(_: object) -> Any:
    raise EngineUnavailable("cannot reach podman")


def hand_out(monkeypatch: pytest.MonkeyPatch, launcher: Launcher, slots: list[Sandbox]) -> None:
    monkeypatch.setattr(launcher.pools, "take", lambda _: slots.pop(0) if slots else None)


async def test_slots_that_have_died_unheard_are_passed_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wants a slot only is told so; whoever wants a sandbox has one made."""
    for number in range(4):
        await slot_of(world, id=f"sb-slot-{number}")
    async with world.managed(CONFIG) as manager:
        slots = [manager.register(row) for row in world.journal.sandboxes()]
        hand_out(monkeypatch, world.launcher, slots)
        with pytest.raises(PoolExhausted, match="claim failed"):
            await world.launcher.create(SandboxCreateParams(template="mine", launch="warm"), Timings())
        assert len(slots) == 1, "three were tried"
        creates = world.engine.calls.count("create")
        with pytest.raises(SandboxGone):
            await world.launcher.create(SandboxCreateParams(template="mine"), Timings())
        assert world.engine.calls.count("create") == creates + 1
        await emptied(world)


async def test_a_caller_who_leaves_before_the_claim_has_begun_leaves_no_slot_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await slot_of(world)
    async with world.managed(CONFIG) as manager:
        (slot,) = [manager.register(row) for row in world.journal.sandboxes()]
        hand_out(monkeypatch, world.launcher, [slot])
        async with anyio.create_task_group() as tasks, slot.lock:
            tasks.start_soon(world.launcher.create, SandboxCreateParams(template="mine"), Timings())
            with anyio.fail_after(PATIENCE_S):
                while slot.record.state is not State.RESERVED:
                    await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        await emptied(world)


class Held:
    """A running sandbox with a control group that somebody else writes to."""

    def __init__(self, box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        self.box = box
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.written: list[Limits] = []
        self.refusing = False
        self.reads = 0
        self.memory_bytes = box.record.limits.memory_bytes_max
        box.pid = 1
        box.on_told = lambda kind, _id, _name, data: self.told.append((kind, data))
        monkeypatch.setattr(Sandbox, "connected", True)
        monkeypatch.setattr(box, "_effective_or_unknown", self.read)
        monkeypatch.setattr(box, "write_limits", self.write)

    def read(self, *, tmpfs: bool = True) -> EffectiveLimits:
        self.reads += tmpfs
        tmpfs = dict.fromkeys(("/tmp", "/home/sandbox"), self.box.record.tmp_bytes_max)
        own = OwnLimits(memory_bytes_max=self.memory_bytes, memory_swap_bytes_max=self.memory_bytes)
        return EffectiveLimits(memory_bytes_max=self.memory_bytes, tmpfs_bytes_max=tmpfs, own=own)

    def write(self, limits: Limits) -> None:
        if self.refusing:
            raise CgroupUnreadable("cannot write memory.max")
        self.written.append(limits)
        self.memory_bytes = limits.memory_bytes_max


async def held(world: World, monkeypatch: pytest.MonkeyPatch) -> Held:
    await world.container_of(record(state=State.RUNNING))
    (box,) = [world.manager.register(row) for row in world.journal.sandboxes()]
    found = Held(box, monkeypatch)
    world.manager.enforcer.prove(box)
    assert all(proof.verified for proof in box.proofs if proof.name == "memory")
    return found


async def test_limits_that_somebody_changed_are_restored_by_a_sweep_which_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.managed() as manager:
        found = await held(world, monkeypatch)
        manager.enforcer.restore(found.box)
        assert (found.written, found.told) == ([], []), "nothing was changed"
        found.memory_bytes = 512 * MIB
        with caplog.at_level(logging.WARNING):
            await world.recovery.sweep()
        assert found.memory_bytes == 64 * MIB
        ((kind, data),) = found.told
        assert kind == "limits_restored"
        assert "memory" in data["reason"]
        assert "somebody changed limits" in caplog.text
        await world.recovery.sweep()
        assert len(found.written) == 1


async def test_a_proof_goes_by_sizes_that_were_told_only_where_all_of_them_were(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that cannot say what a mount's root is has its table read, as if nobody had been asked."""
    async with world.managed() as manager:
        found = await held(world, monkeypatch)
        told = dict.fromkeys(PROVEN_TMPFS, 2**26)
        for sizes, reads in ((told, 0), ({**told, "/run": 1}, 0), ({"/tmp": 2**26}, 1), ({}, 1)):
            found.reads = 0
            proofs = manager.enforcer.prove(found.box, ahead=found.box.read_ahead(), tmpfs_bytes=sizes)
            assert found.reads == reads
            (tmp,) = [proof for proof in proofs if proof.name == "tmpfs:/tmp"]
            assert tmp.effective == (found.box.record.tmp_bytes_max if reads else 2**26)


async def test_a_group_that_takes_no_limits_is_not_said_to_have_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.managed() as manager:
        found = await held(world, monkeypatch)
        found.memory_bytes, found.refusing = 512 * MIB, True
        manager.enforcer.restore(found.box)
        assert found.told == []
        assert not all(proof.verified for proof in found.box.proofs if proof.name == "memory")


async def test_limits_are_left_alone_while_they_are_being_changed_or_lifted_on_purpose(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.managed() as manager:
        found = await held(world, monkeypatch)
        found.memory_bytes = 512 * MIB
        async with found.box.lock:
            manager.enforcer.restore(found.box)
        with found.box.unthrottled():
            before = len(found.written)
            manager.enforcer.restore(found.box)
            assert len(found.written) == before
        found.memory_bytes = 512 * MIB
        found.box.put(state=State.PAUSED)
        before = len(found.written)
        manager.enforcer.restore(found.box)
        assert len(found.written) == before
