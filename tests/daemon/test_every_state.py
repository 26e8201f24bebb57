"""No state is a dead end: from each of them a sandbox can be removed, whatever has become of its container."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from runtimes.errors import EngineRefused, EngineUnavailable
from sandboxd.lifecycle import State
from sandboxd.records import SandboxRecord
from sandboxd.timings import Timings
from tests.daemon.test_manager import REFUSED, UNAVAILABLE, World, anyio_backend, no_patience, world
from tests.unit.records import record

pytestmark = pytest.mark.anyio

__all__ = ["anyio_backend", "no_patience", "world"]


async def written(world: World, state: State) -> SandboxRecord:
    """A sandbox in this state, with its container; a slot where only slots are in it."""
    box = await world.container_of(record(state=state))
    box = record(state=state, slot=state is State.WARM, container_id=box.container_id)
    world.journal.put(box)
    return box


async def runs(world: World, box: SandboxRecord) -> None:
    """As it should."""


async def is_paused(world: World, box: SandboxRecord) -> None:
    await world.engine.pause(str(box.container_id))


async def has_ended(world: World, box: SandboxRecord) -> None:
    world.engine.end(str(box.container_id))


async def is_gone(world: World, box: SandboxRecord) -> None:
    await world.engine.remove(str(box.container_id))


async def is_not_known(world: World, box: SandboxRecord) -> None:
    """A daemon that was killed before the engine had answered."""
    world.journal.put(record(id=box.id, state=box.state, slot=box.slot, container_id=None))


Fate = Callable[[World, SandboxRecord], Awaitable[None]]

FATES: tuple[Fate, ...] = (runs, is_paused, has_ended, is_gone, is_not_known)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("fate", FATES, ids=lambda fate: fate.__name__)
async def test_a_sandbox_in_any_state_can_be_removed(world: World, state: State, fate: Fate) -> None:
    """As it is, without anything that would have made it better before."""
    await fate(world, await written(world, state))
    async with world.managed() as manager:
        (box,) = world.journal.sandboxes()
        sandbox = manager.register(box)
        await manager.remove(sandbox, Timings())
        await manager.remove(sandbox, Timings())
        await world.assert_empty()


@pytest.mark.parametrize("state", [state for state in State if state not in (State.WARM, State.RESERVED)])
async def test_a_removal_that_an_engine_prevents_says_why_and_is_finished_when_it_can_be(
    world: World, state: State
) -> None:
    """It is listed until then, so that nobody believes it gone."""
    await world.container_of(record(state=state))
    async with world.managed() as manager:
        (box,) = world.journal.sandboxes()
        sandbox = manager.register(box)
        for failure in (UNAVAILABLE, REFUSED):
            # What refuses may only be frozen: that is thawed, and tried once more.
            for _ in range(2 if failure is REFUSED else 1):
                world.engine.fail_next("remove", failure)
            with pytest.raises((EngineUnavailable, EngineRefused)):
                await manager.remove(sandbox, Timings())
            assert manager.get(sandbox.record.id) is sandbox
            assert str(failure) in sandbox.record.state_reason
        await world.recovery.sweep()
        await world.assert_empty()


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("fate", FATES, ids=lambda fate: fate.__name__)
async def test_what_cannot_be_used_says_why(world: World, state: State, fate: Fate) -> None:
    """After a start, whatever was written down and whatever has become of it."""
    await fate(world, await written(world, state))
    async with world.managed() as manager:
        await world.recovery.recover()
        for sandbox in manager.all():
            found = sandbox.record
            assert found.state in (State.STOPPED, State.PAUSED, State.BROKEN, State.LOST), "there is no init here"
            if found.state is not state:
                assert found.state_reason, found.state
            await manager.remove(sandbox, Timings())
        await world.assert_empty()
