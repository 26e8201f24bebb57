"""Time that is over, time that was set, and who keeps a sandbox alive: with a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from runtimes.errors import EngineRefused
from sandboxd import expiry, lifetimes
from sandboxd.background import Background
from sandboxd.failures import InvalidArgument, Unsupported
from sandboxd.lifecycle import State
from sandboxd.lifetimes import Lifetimes
from sandboxd.protocol import SandboxParams, SandboxTimeoutParams
from sandboxd.records import LifetimeRecord, SandboxRecord
from sandboxd.sandbox import Sandbox
from sandboxd.timings import Timings, now_ms
from tests.daemon.test_manager import World
from tests.fakes.fake_engine import ALL_CAPABILITIES, FakeEngine
from tests.unit.records import record

pytestmark = pytest.mark.anyio

HOUR_MS = 3_600_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.journal.close()


class Watched:
    """Sandboxes of one daemon whose time is watched, and what was told of them."""

    def __init__(self, world: World, watch: Lifetimes) -> None:
        self.world = world
        self.watch = watch
        self.told: list[tuple[str, dict[str, Any]]] = []

    async def box(self, state: State = State.RUNNING, **lifetime: Any) -> Sandbox:
        """A sandbox as this daemon would have it, its container included."""
        found = await self.world.container_of(record(state=state))
        box = self.world.manager.register(self.with_lifetime(found, **lifetime))
        box.on_told = lambda kind, _id, _name, data: self.told.append((kind, data))
        self.watch.look_again(box)
        return box

    def with_lifetime(self, found: SandboxRecord, **lifetime: Any) -> SandboxRecord:
        fields = {name: getattr(found, name) for name in found.__struct_fields__}
        changed = SandboxRecord(**{**fields, "lifetime": LifetimeRecord(**lifetime)})
        self.world.journal.put(changed)
        return changed

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.told]


@asynccontextmanager
async def watched(world: World) -> AsyncIterator[Watched]:
    async with world.managed() as manager, anyio.create_task_group() as tasks:
        watch = Lifetimes(manager, Background(tasks))
        tasks.start_soon(watch.run)
        yield Watched(world, watch)
        tasks.cancel_scope.cancel()


async def until(condition: Any) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - nothing tells of what is waited for
            await anyio.sleep(0.005)


async def test_a_sandbox_whose_lifetime_is_over_is_removed_after_a_warning(world: World) -> None:
    async with watched(world) as house:
        box = await house.box(lifetime_ms=300, expires_at_ms=now_ms() + 300)
        await box.gone.wait()
        assert house.kinds == ["expiring", "expired", "removing", "removed"]
        expiring = house.told[0][1]
        assert (expiring["cause"], expiring["action"]) == ("lifetime", "kill")
        assert 0 < expiring["ends_in_ms"] <= 150
        await world.assert_empty()


@pytest.mark.parametrize("state", [State.RUNNING, State.STOPPED, State.BROKEN, State.LOST])
async def test_what_was_over_while_no_daemon_ran_is_done_at_once(world: World, state: State) -> None:
    """Also where it does not run: somebody promised that it would be gone by then."""
    async with watched(world) as house:
        box = await house.box(state, lifetime_ms=HOUR_MS, expires_at_ms=now_ms() - HOUR_MS)
        await box.gone.wait()
        await world.assert_empty()


async def test_a_sandbox_can_be_paused_at_the_end_and_then_has_time_without_end(world: World) -> None:
    """Until somebody resumes it: then it has a whole lifetime again."""
    async with watched(world) as house:
        box = await house.box(lifetime_ms=200, expires_at_ms=now_ms() + 200, on_timeout="pause")
        await until(lambda: box.record.state is State.PAUSED)
        assert box.record.state_reason == "its lifetime of 200ms is over"
        assert box.record.lifetime.expires_at_ms is None
        assert world.journal.sandboxes() == [box.record]
        await anyio.sleep(0.3)
        assert box.record.state is State.PAUSED
        assert "remove" not in world.engine.calls


async def test_a_pause_that_fails_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "RETRY_S", 0.01)
    async with watched(world) as house:
        monkeypatch.setattr(house.world.manager, "_look", lambda *_: anyio.lowlevel.checkpoint())
        world.engine.fail_next("pause", EngineRefused("cannot pause"))
        box = await house.box(lifetime_ms=1, expires_at_ms=now_ms(), on_timeout="pause")
        await until(lambda: box.record.state is State.PAUSED)
        assert world.engine.calls.count("pause") == 2


async def test_a_sandbox_in_which_nothing_happens_is_idle(world: World) -> None:
    async with watched(world) as house:
        box = await house.box(idle_timeout_ms=400)
        await box.gone.wait()
        assert house.told[0][0] == "expiring"
        assert {data["cause"] for kind, data in house.told if kind in ("expiring", "expired")} == {"idle"}


async def test_requests_cpu_time_and_touching_keep_it_and_looking_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A monitor that asks for its state every second must not keep it alive."""
    monkeypatch.setattr(expiry, "LOOK_MS_MIN", 10)
    async with watched(world) as house:
        box = await house.box(idle_timeout_ms=300)
        watch, params = house.watch, SandboxParams(sandbox=box.record.id)
        with watch.used_by("commands/run", params):
            await anyio.sleep(0.6)
        assert not box.leaving, "a request that uses it was under way"
        used_us = iter(range(0, 10**12, 50_000))
        monkeypatch.setattr(box, "cpu_us", lambda: next(used_us))
        await anyio.sleep(0.6)
        assert not box.leaving, "something works in it"
        monkeypatch.setattr(box, "cpu_us", lambda: 10**12)
        for _ in range(8):
            watch.touch(box)
            await anyio.sleep(0.1)
        assert not box.leaving, "somebody wants it to stay"
        with watch.used_by("sandbox/metrics", params), watch.used_by("sandbox/get", params):
            await box.gone.wait()


async def test_a_lifetime_is_changed_from_now_on_and_what_is_not_said_stays(world: World) -> None:
    async with watched(world) as house:
        box = await house.box(lifetime_ms=HOUR_MS, expires_at_ms=now_ms() + HOUR_MS, idle_timeout_ms=HOUR_MS)
        house.watch.change(box, SandboxTimeoutParams(sandbox=box.record.id, lifetime="10m"))
        assert 590_000 < (house.watch.left_ms(box) or 0) <= 600_000
        assert box.record.lifetime.idle_timeout_ms == HOUR_MS
        house.watch.change(box, SandboxTimeoutParams(sandbox=box.record.id, idle_timeout="none", on_timeout="pause"))
        assert (box.record.lifetime.lifetime_ms, box.record.lifetime.idle_timeout_ms) == (600_000, None)
        house.watch.change(box, SandboxTimeoutParams(sandbox=box.record.id, lifetime="none"))
        assert house.watch.left_ms(box) is None
        for params in ({}, {"lifetime": "soon"}, {"idle_timeout": -1}):
            with pytest.raises(InvalidArgument):
                house.watch.change(box, SandboxTimeoutParams(sandbox=box.record.id, **params))
        assert house.kinds == ["timeout_changed"] * 3


async def test_connecting_never_shortens_a_life(world: World) -> None:
    async with watched(world) as house:
        box = await house.box(lifetime_ms=HOUR_MS, expires_at_ms=now_ms() + HOUR_MS)
        house.watch.extend(box, 1000)
        assert (house.watch.left_ms(box) or 0) > HOUR_MS - 60_000
        house.watch.extend(box, 2 * HOUR_MS)
        assert (house.watch.left_ms(box) or 0) > HOUR_MS
        house.watch.extend(box, None)
        assert house.watch.left_ms(box) is None


async def test_what_cannot_be_paused_is_not_promised_to_be(world: World) -> None:
    """Rootless on cgroup v1: nothing could be frozen when the time comes."""
    able = {name: getattr(ALL_CAPABILITIES, name) for name in ALL_CAPABILITIES.__struct_fields__}
    world.engine = FakeEngine(images=("image",), capabilities=type(ALL_CAPABILITIES)(**{**able, "pause": False}))
    async with world.managed() as manager:
        watch = Lifetimes(manager, manager._background)
        box = manager.register(record())
        with pytest.raises(Unsupported, match="cannot pause") as caught:
            watch.change(box, SandboxTimeoutParams(sandbox=box.record.id, on_timeout="pause"))
        assert caught.value.hint == "--on-timeout kill"


async def test_a_clock_that_is_set_neither_ends_nor_prolongs_anything(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the daemon runs another clock counts; what is written down for the next one moves with the clock."""
    async with watched(world) as house:
        box = await house.box(lifetime_ms=HOUR_MS, expires_at_ms=now_ms() + HOUR_MS)
        await until(lambda: house.watch.left_ms(box) is not None)
        for jump_ms in (24 * HOUR_MS, -48 * HOUR_MS):
            monkeypatch.setattr(lifetimes, "now_ms", lambda jump_ms=jump_ms: now_ms() + jump_ms)
            house.watch.look_again(box)
            await until(
                lambda jump_ms=jump_ms: (
                    abs((box.record.lifetime.expires_at_ms or 0) - now_ms() - jump_ms - HOUR_MS) < 60_000
                )
            )
            assert world.journal.sandboxes() == [box.record]
            assert HOUR_MS - 60_000 < (house.watch.left_ms(box) or 0) <= HOUR_MS
        assert not box.leaving


async def test_a_sandbox_that_is_paused_by_hand_spends_no_time(world: World) -> None:
    async with watched(world) as house:
        box = await house.box(lifetime_ms=HOUR_MS, expires_at_ms=now_ms() + HOUR_MS, idle_timeout_ms=HOUR_MS)
        await world.manager.pause(box, Timings())
        assert house.watch.left_ms(box) is None
        house.watch.change(box, SandboxTimeoutParams(sandbox=box.record.id, lifetime="1s"))
        assert box.record.lifetime.expires_at_ms is None
        assert box.record.lifetime.lifetime_ms == 1000


async def test_nothing_is_kept_of_what_is_gone_and_what_lasts_for_ever_wakes_nobody(world: World) -> None:
    """Hundreds of sandboxes without an end must not make each change of one of them slower."""
    async with watched(world) as house:
        box = await house.box()
        assert not house.watch._changed.is_set()
        with house.watch.used_by("commands/run", SandboxParams(sandbox=box.record.id)):
            await world.manager.remove(box, Timings())
        mortal = world.manager.register(record(id="sb-mortal1111", state=State.STOPPED))
        house.watch.change(mortal, SandboxTimeoutParams(sandbox=mortal.record.id, lifetime="1ms"))
        await mortal.gone.wait()
        assert (house.watch._watches, house.watch._limited) == ({}, set())


async def test_what_a_look_costs_inside_is_no_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """``inspect`` asks a worker inside how things are: somebody who does that all the time must not keep it alive."""
    async with watched(world) as house:
        box = await house.box(idle_timeout_ms=400)
        used_us = [0]
        monkeypatch.setattr(box, "cpu_us", lambda: used_us[0])
        with anyio.fail_after(30):
            while not box.gone.is_set():
                with house.watch.used_by("sandbox/get", SandboxParams(sandbox=box.record.id)):
                    used_us[0] += 3_000
                await anyio.sleep(0.01)
