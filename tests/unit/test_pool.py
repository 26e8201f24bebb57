"""Slots are made when they are missing, and each is handed to exactly one caller."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from runtimes.errors import EngineRefused
from runtimes.model import Network, User
from sandboxd.background import Background
from sandboxd.failures import NotFound, PoolExhausted
from sandboxd.lifecycle import State
from sandboxd.planner import PoolSettings
from sandboxd.pool import Pools, Slots
from sandboxd.recipe import Recipe
from sandboxd.records import WorkspaceRecord
from tests.unit.records import record

pytestmark = pytest.mark.anyio

PATIENCE_S = 10.0
RECIPE = Recipe(
    template="default",
    engine="podman",
    image="image",
    user=User(uid=1000, gid=1000),
    keep_id=False,
    network=Network.NONE,
    nofile_max=None,
    tmp_bytes_max=None,
    shm_bytes_max=None,
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Slot:
    """As much of a sandbox as a pool looks at."""

    def __init__(self, number: int, image_id: str) -> None:
        self.record = record(id=f"sb-{number}", state=State.WARM, slot=True, image_id=image_id)
        self.connected = True


class World:
    """What pools are given, and what they did with it."""

    def __init__(self) -> None:
        self.settings = PoolSettings(slots_min=0, slots_max=8, idle_s=600.0, age_s_max=3600.0)
        self.now_s = 0.0
        self.image = "one"
        self.made: list[Slot] = []
        self.discarded: list[Slot] = []
        self.may_fill = anyio.Event()
        self.may_fill.set()
        self.failing: Exception | None = None
        self.at_once = self.most_at_once = 0
        self.spare = 100
        self.pools: Pools

    async def fill(self, _: Recipe) -> Any:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.may_fill.wait()
            await anyio.lowlevel.checkpoint()
            if self.failing is not None:
                raise self.failing
            slot = Slot(len(self.made), self.image)
            self.made.append(slot)
            return slot
        finally:
            self.at_once -= 1

    async def image_id(self, _: Recipe) -> str | None:
        return self.image

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Pools]:
        async with anyio.create_task_group() as tasks:
            self.pools = Pools(
                Background(tasks),
                settings_of=lambda recipe: (
                    msgspec.structs.replace(self.settings, slots_min=0) if recipe.prebound else self.settings
                ),
                fill=self.fill,
                discard=self.discarded.append,  # type: ignore[arg-type]
                image_id=self.image_id,
                spare_slots=lambda: self.spare,
                fills_max=2,
                clock=lambda: self.now_s + time.monotonic(),
            )
            tasks.start_soon(self.pools.run)
            yield self.pools
            tasks.cancel_scope.cancel()

    def bucket(self) -> Slots:
        return self.pools.buckets()[0]

    async def until(self, condition: Any) -> None:
        with anyio.fail_after(PATIENCE_S):
            while not condition():
                await anyio.lowlevel.checkpoint()


async def test_a_pool_is_warmed_to_its_minimum_without_being_asked() -> None:
    world = World()
    world.settings = msgspec.structs.replace(world.settings, slots_min=3)
    async with world.running() as pools:
        pools.keep(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 3)
    assert world.most_at_once == 2


async def test_the_first_claim_misses_and_later_ones_hit() -> None:
    world = World()
    async with world.running() as pools:
        assert pools.take(RECIPE) is None
        await world.until(lambda: len(world.bucket().warm) == 2)
        assert pools.take(RECIPE) is world.made[0]
        assert pools.take(RECIPE) is world.made[1]
        assert world.bucket().hits == 2
        assert world.bucket().misses == {"empty": 1}


async def test_slots_are_made_once_the_claims_that_emptied_the_pool_are_done() -> None:
    """To make one takes all that the host has, and the last in the line of claims would feel it."""
    world = World()
    world.settings = msgspec.structs.replace(world.settings, slots_min=1)
    async with world.running() as pools:
        pools.keep(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 1)
        world.now_s += 10.0
        clock_s = pools._clock()
        pools._clock = lambda: clock_s  # its time stands still: nothing is made because it had waited long enough
        with pools.claiming():
            assert pools.take(RECIPE) is world.made[0]
            await world.until(lambda: pools._held_back)
            assert not world.at_once
            assert len(world.made) == 1
        await world.until(lambda: len(world.made) > 1)


async def test_no_slot_is_given_to_two_of_many_racing_callers() -> None:
    world = World()
    got: list[Any] = []

    async def claim() -> None:
        slot = world.pools.take(RECIPE) or await world.pools.wait(RECIPE, deadline_s=PATIENCE_S)
        got.append(slot)

    async with world.running(), anyio.create_task_group() as callers:
        for _ in range(50):
            callers.start_soon(claim)
    assert len(got) == 50
    assert len({slot.record.id for slot in got}) == 50


async def test_who_waits_is_served_in_turn() -> None:
    world = World()
    world.may_fill = anyio.Event()
    order: list[int] = []

    async def claim(number: int) -> None:
        await world.pools.wait(RECIPE, deadline_s=PATIENCE_S)
        order.append(number)

    async with world.running(), anyio.create_task_group() as callers:
        for number in range(6):
            callers.start_soon(claim, number)
            await anyio.sleep(0.01)
        # Somebody who only takes what is there does not overtake those who wait.
        assert world.pools.take(RECIPE) is None
        world.may_fill.set()
    assert order == list(range(6))


async def test_a_caller_who_went_away_gives_the_slot_back() -> None:
    world = World()
    world.may_fill = anyio.Event()
    async with world.running() as pools:
        with anyio.move_on_after(0.05):
            await pools.wait(RECIPE, deadline_s=PATIENCE_S)
        assert not world.bucket().waiters
        world.may_fill.set()
        await world.until(lambda: world.bucket().warm)
        slot = pools.take(RECIPE)
        assert slot is not None
        count = len(world.bucket().warm)
        pools.give_back(RECIPE, slot)
        assert len(world.bucket().warm) == count + 1
        assert world.bucket().hits == 0


async def test_who_waits_too_long_is_told_why() -> None:
    world = World()
    world.failing = EngineRefused("cannot create a container", detail="the disk is full")
    async with world.running() as pools:
        with pytest.raises(PoolExhausted) as caught:
            await pools.wait(RECIPE, deadline_s=0.2)
    assert "the disk is full" in caught.value.detail


@pytest.mark.parametrize("failing", [EngineRefused("cannot create a container"), OSError(28, "no space left")])
async def test_failures_are_not_repeated_without_a_pause(failing: Exception) -> None:
    world = World()
    world.failing = failing
    async with world.running() as pools:
        pools.take(RECIPE)
        await world.until(lambda: world.bucket().failures >= 1 and not world.at_once)
        failures = world.bucket().failures
        await anyio.sleep(0.2)
        assert world.bucket().failures == failures
        world.failing = None
        world.now_s += 61.0
        pools.take(RECIPE)
        await world.until(lambda: world.bucket().warm)
        assert world.bucket().failures == 0


async def test_a_dead_slot_is_never_handed_out_and_is_replaced() -> None:
    world = World()
    async with world.running() as pools:
        pools.take(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 2)
        world.made[0].connected = False
        assert pools.take(RECIPE) is world.made[1]
        assert world.discarded == [world.made[0]]
        await world.until(lambda: len(world.bucket().warm) >= 2)
        pools.lost(world.bucket().warm[0])
        assert world.bucket().lost == 2
        await world.until(lambda: len(world.bucket().warm) >= 2)


async def test_slots_of_a_replaced_image_are_let_go_and_made_anew() -> None:
    world = World()
    async with world.running() as pools:
        pools.take(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 2)
        old = set(world.made)
        world.image = "two"
        world.now_s += 20.0
        pools.keep(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 2 and old == set(world.discarded))
        slot = pools.take(RECIPE)
        assert slot is not None
        assert slot.record.image_id == "two"


async def test_a_drained_pool_stays_empty_until_it_is_warmed() -> None:
    world = World()
    async with world.running() as pools:
        pools.take(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 2)
        assert pools.drain("default") == 2
        assert pools.take(RECIPE) is None
        await anyio.sleep(0.1)
        assert not world.bucket().warm
        assert await pools.warm("default", 3, deadline_s=PATIENCE_S) >= 3
        with pytest.raises(NotFound):
            pools.drain("nonsense")


async def test_a_drain_can_wait_for_slots_that_are_being_made_and_those_go_too() -> None:
    """A daemon that ends after it leaves none behind."""
    world = World()
    async with world.running() as pools:
        pools.take(RECIPE)
        await world.until(lambda: world.bucket().filling)
        pools.drain("default")
        await pools.filled("default", deadline_s=PATIENCE_S)
        assert not world.bucket().filling
        assert world.made
        assert [slot.record.id for slot in world.discarded] == [slot.record.id for slot in world.made]


async def test_warming_says_why_it_cannot() -> None:
    world = World()
    world.failing = EngineRefused("cannot create a container", detail="the disk is full")
    async with world.running() as pools:
        pools.keep(RECIPE)
        with pytest.raises(PoolExhausted, match="cannot claim"):
            await pools.warm("default", 1, deadline_s=PATIENCE_S)


async def test_no_slots_are_made_without_memory_for_them() -> None:
    world = World()
    world.spare = 0
    async with world.running() as pools:
        pools.take(RECIPE)
        await anyio.sleep(0.1)
        assert not world.made


async def test_slots_of_a_template_that_has_changed_are_replaced_by_as_many() -> None:
    """One that was being made is let go as well, and what nobody can claim any more is not in the list."""
    world = World()
    changed = msgspec.structs.replace(RECIPE, network=Network.FULL)
    other = msgspec.structs.replace(RECIPE, template="other")
    async with world.running() as pools:
        for _ in range(2):
            assert pools.take(RECIPE) is None
        assert pools.take(other) is None
        await world.until(lambda: [len(bucket.warm) for bucket in pools.buckets()] == [3, 2])
        world.may_fill = anyio.Event()
        old = [slot for slot in world.made if pools._buckets[RECIPE].made_s.get(slot.record.id) is not None]
        assert pools.take(RECIPE) in old
        await world.until(lambda: world.at_once)
        pools.outdate(lambda recipe: changed if recipe == RECIPE else recipe)
        world.may_fill.set()
        await world.until(lambda: len(world.discarded) >= 3)
        await world.until(lambda: [bucket.recipe for bucket in pools.buckets()] == [other, changed])
        await world.until(lambda: len(pools.buckets()[1].warm) >= 3)
        assert len(pools.buckets()[0].warm) == 2, "the other template has not changed"
        assert pools.take(changed) not in old


async def test_a_template_has_no_more_slots_than_it_may_in_all_its_variants() -> None:
    world = World()
    world.settings = msgspec.structs.replace(world.settings, slots_max=3)
    async with world.running() as pools:
        for number in range(5):
            bound = WorkspaceRecord(
                path=f"/project/{number}", device=1, inode=number, read_only=False, mounted="same-uid"
            )
            for _ in range(3):
                pools.take(msgspec.structs.replace(RECIPE, prebound=bound))
        for _ in range(50):
            await anyio.sleep(0.01)
            assert sum(len(bucket.warm) + bucket.filling for bucket in pools.buckets()) <= 3
        assert sum(len(bucket.warm) for bucket in pools.buckets()) == 3


async def test_idle_slots_of_another_variant_make_room_for_who_waits() -> None:
    """A template has so many slots in all; they are where they are asked for."""
    world = World()
    world.settings = msgspec.structs.replace(world.settings, slots_max=3)
    other = msgspec.structs.replace(RECIPE, user=User(uid=1234, gid=1234))
    async with world.running() as pools:
        for _ in range(3):
            pools.take(other)
        await world.until(lambda: len(pools.buckets()[0].warm) == 3)
        slot = await pools.wait(RECIPE, deadline_s=PATIENCE_S)
        assert slot is world.made[-1]
        assert world.discarded
        assert sum(len(bucket.warm) + bucket.filling for bucket in pools.buckets()) <= 3


async def test_a_variant_that_cannot_be_made_takes_no_place_of_another() -> None:
    """Nor does one for which there is no memory: the slots that there are would go, and nothing come of it."""
    world = World()
    world.settings = msgspec.structs.replace(world.settings, slots_max=3)
    other = msgspec.structs.replace(RECIPE, user=User(uid=1234, gid=1234))
    async with world.running() as pools:
        for _ in range(3):
            pools.take(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 3)
        world.failing = EngineRefused("cannot create a container")
        for _ in range(10):
            pools.take(other)
            await anyio.sleep(0.03)
        assert len(world.discarded) == 1, "for the one that was tried"
        world.spare = 0
        world.now_s += 30.0
        pools.take(other)
        await anyio.sleep(0.1)
        assert len(world.bucket().warm) == 2


async def test_what_is_always_kept_is_given_up_only_for_who_waits() -> None:
    world = World()
    world.settings = msgspec.structs.replace(world.settings, slots_min=3, slots_max=3)
    variant = msgspec.structs.replace(
        RECIPE, prebound=WorkspaceRecord(path="/project", read_only=False, mounted="same-uid")
    )
    async with world.running() as pools:
        pools.keep(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 3)
        pools.take(variant)
        await anyio.sleep(0.1)
        assert len(world.bucket().warm) == 3
        assert await pools.wait(variant, deadline_s=PATIENCE_S) is world.made[-1]


async def test_a_pool_of_nothing_is_no_pool() -> None:
    world = World()
    world.settings = msgspec.structs.replace(world.settings, slots_max=0)
    async with world.running() as pools:
        assert pools.take(RECIPE) is None
        assert not pools.buckets()
        with pytest.raises(PoolExhausted):
            await pools.wait(RECIPE, deadline_s=PATIENCE_S)


async def test_what_nobody_has_asked_for_lately_is_let_go() -> None:
    world = World()
    async with world.running() as pools:
        for _ in range(4):
            pools.take(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 5)
        world.now_s += 601.0
        pools.keep(RECIPE)
        await world.until(lambda: not world.bucket().warm)
        assert len(world.discarded) == 5


async def test_a_pool_that_is_closed_keeps_its_slots_and_makes_no_more() -> None:
    """They run on, and are the next daemon's."""
    world = World()
    async with world.running() as pools:
        pools.take(RECIPE)
        await world.until(lambda: len(world.bucket().warm) == 2)
        pools.close()
        assert pools.take(RECIPE) is not None
        await anyio.sleep(0.1)
        assert len(world.made) == 2
        assert not world.discarded
