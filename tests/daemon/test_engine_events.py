"""What is done to a container behind the daemon's back is noticed at once, and what the daemon does is no news."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from runtimes.errors import EngineUnavailable
from runtimes.model import Happening
from sandboxd import engine_events, reconcile
from sandboxd.engine_events import EngineEvents
from sandboxd.lifecycle import State
from sandboxd.manager import Manager
from sandboxd.sandbox import Sandbox
from sandboxd.timings import Timings
from tests.daemon.test_manager import World, anyio_backend, no_patience, world
from tests.unit.records import record

pytestmark = pytest.mark.anyio

__all__ = ["anyio_backend", "no_patience", "world"]


@asynccontextmanager
async def followed(world: World, state: State) -> AsyncIterator[tuple[Manager, Sandbox, str]]:
    """A sandbox in this state, whose engine is followed."""
    box = await world.container_of(record(state=state))
    container_id = str(box.container_id)
    if state is State.PAUSED:
        await world.engine.pause(container_id)
    if state is State.STOPPED:
        world.engine.end(container_id)
    async with world.managed() as manager:
        await world.recovery.recover()
        (sandbox,) = manager.all()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(EngineEvents(manager, world.room, world.background, world.recovery.try_sweep).run)
            await anyio.wait_all_tasks_blocked()
            yield manager, sandbox, container_id
            tasks.cancel_scope.cancel()


async def until(sandbox: Sandbox, state: State) -> None:
    with anyio.fail_after(10):
        while sandbox.record.state is not state:
            await anyio.wait_all_tasks_blocked()


async def test_what_is_removed_while_it_is_stopped_is_lost_at_once(world: World) -> None:
    async with followed(world, State.STOPPED) as (_, sandbox, container_id):
        await world.engine.remove(container_id)
        await until(sandbox, State.LOST)
        assert sandbox.record.state_reason == "podman no longer has its container"


async def test_what_is_paused_is_paused_and_what_goes_on_is_looked_for(world: World) -> None:
    """There is no init here: what cannot be reached says so."""
    async with followed(world, State.PAUSED) as (_, sandbox, container_id):
        await world.engine.resume(container_id)
        await until(sandbox, State.BROKEN)
        await world.engine.pause(container_id)
        await until(sandbox, State.PAUSED)
        assert sandbox.record.state_reason == reconcile.PAUSED


async def test_what_we_do_is_not_news(world: World) -> None:
    """Nothing is asked for the sake of it, and no reason of ours is overwritten."""
    async with followed(world, State.STOPPED) as (manager, sandbox, _):
        world.engine.calls.clear()
        await manager.remove(sandbox, Timings())
        await anyio.wait_all_tasks_blocked()
        assert "inspect" not in world.engine.calls
        await world.assert_empty()


@pytest.mark.parametrize(
    ("state", "happening"),
    [
        (State.STOPPED, Happening.STARTED),
        (State.STOPPED, Happening.REMOVED),
        (State.PAUSED, Happening.RESUMED),
        (State.PAUSED, Happening.ENDED),
        (State.RUNNING, Happening.PAUSED),
        (State.RUNNING, Happening.ENDED),
    ],
)
async def test_what_we_did_and_is_told_late_is_no_news_either(
    world: World,
    state: State,
    happening: Happening,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """We stopped and started it, or paused it and let it go on, before its engine told of the first."""
    caplog.set_level(logging.INFO)
    async with followed(world, state) as (_, sandbox, container_id):
        monkeypatch.setattr(Sandbox, "connected", state is State.RUNNING)
        sandbox.put(state=state, state_reason="as we left it")
        world.engine.calls.clear()
        world.engine.tell_late(container_id, happening)
        with anyio.fail_after(10):
            while "inspect" not in world.engine.calls:
                await anyio.wait_all_tasks_blocked()
        await anyio.wait_all_tasks_blocked()
        assert (sandbox.record.state, sandbox.record.state_reason) == (state, "as we left it")
        assert "not by" not in caplog.text


async def test_what_somebody_did_is_logged_with_what_became_of_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever reads the log learns that it was not the daemon."""
    caplog.set_level(logging.INFO)
    async with followed(world, State.STOPPED) as (_, sandbox, container_id):
        await world.engine.remove(container_id)
        await until(sandbox, State.LOST)
        await anyio.wait_all_tasks_blocked()
        assert f"{sandbox.record.id} is lost: its container was removed, and not by sandboxd" in caplog.text


async def test_an_engine_without_sandboxes_is_not_followed(world: World) -> None:
    """A follower is a process: an idle daemon has none."""
    async with followed(world, State.STOPPED) as (manager, sandbox, _):
        assert world.engine.calls.count("follow") == 1
        assert world.engine.followers == 1
        await manager.remove(sandbox, Timings())
        with anyio.fail_after(10):
            while world.engine.followers:
                await anyio.wait_all_tasks_blocked()


async def test_an_engine_that_ends_it_is_followed_again_and_not_too_often(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was restarted; or it keeps no events, and then that costs next to nothing."""
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(engine_events, "sleep", sleep)
    for _ in range(12):
        world.engine.fail_next("follow", EngineUnavailable("cannot follow the events of podman"))
    async with followed(world, State.STOPPED) as (_, sandbox, container_id):
        with anyio.fail_after(10):
            while not world.engine.followers:
                await anyio.wait_all_tasks_blocked()
        assert pauses[:3] == [1.0, 2.0, 4.0]
        assert max(pauses) == engine_events.PAUSE_S_MAX
        await world.engine.remove(container_id)
        await until(sandbox, State.LOST)


async def test_what_we_remove_while_it_is_looked_at_was_not_done_by_somebody_else(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A paused sandbox is thawed to be removed, and its engine tells of that."""
    caplog.set_level(logging.INFO)
    async with followed(world, State.PAUSED) as (manager, sandbox, container_id):
        looked = anyio.Event()

        async def look(found: Sandbox, *, why: str) -> None:
            manager.condemn(found)
            looked.set()

        monkeypatch.setattr(manager, "look", look)
        world.engine.tell_late(container_id, Happening.RESUMED)
        with anyio.fail_after(10):
            await looked.wait()
        await anyio.wait_all_tasks_blocked()
        assert sandbox.record.state is State.REMOVING
        assert "not by" not in caplog.text


async def test_what_happened_while_an_engine_told_nothing_is_found_as_soon_as_it_answers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped, and its containers with it: nobody is to be told for a minute that it does not answer."""
    tries = 0

    async def sleep(pause_s: float) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            # By now it is there again, and its container is not what it was.
            world.engine.end(str(box.container_id))
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr(engine_events, "sleep", sleep)
    box = await world.container_of(record(state=State.RUNNING))
    world.engine.fail_next("follow", EngineUnavailable("cannot follow the events of podman"))
    world.engine.fail_next("ping", EngineUnavailable("cannot reach podman"))
    async with world.managed() as manager:
        await world.recovery.recover()
        (sandbox,) = manager.all()
        assert sandbox.record.state is State.BROKEN, "there is no init here"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(EngineEvents(manager, world.room, world.background, world.recovery.try_sweep).run)
            await until(sandbox, State.STOPPED)
            assert tries == 2
            tasks.cancel_scope.cancel()
