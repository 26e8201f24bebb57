"""Engines are told of limits that were written past them: later, one at a time, and in nobody's way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from runtimes.errors import EngineRefused
from runtimes.model import ContainerSpec, EngineInfo, Limits, User
from sandboxd import engine_records
from sandboxd.engine_records import EngineRecords
from sandboxd.lifecycle import State
from tests.fakes.fake_engine import FakeEngine
from tests.unit.records import record

pytestmark = pytest.mark.anyio

IMAGE = "localhost/some:image"
MIB = 1024 * 1024
PATIENCE_S = 10.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_records, "TELL_AFTER_S", 0.0)


class Box:
    """As much of a sandbox as is looked at."""

    def __init__(self, sandbox_id: str, container_id: str, memory_mib: int) -> None:
        limits = Limits(memory_bytes_max=memory_mib * MIB, nofile_max=64)
        self.record = record(id=sandbox_id, container_id=container_id, limits=limits)
        self.lock = anyio.Lock()


class World:
    def __init__(self) -> None:
        self.engine = FakeEngine(images=(IMAGE,))
        self.records = EngineRecords(lambda _: self.engine, _without_nofile)

    async def box(self, sandbox_id: str, *, memory_mib: int) -> Any:
        spec = ContainerSpec(
            sandbox_id=sandbox_id,
            owner="me",
            image=IMAGE,
            command=("/init",),
            user=User(uid=1000, gid=1000),
            seccomp_profile="/seccomp.json",
            limits=Limits(memory_bytes_max=32 * MIB),
        )
        return Box(sandbox_id, await self.engine.create(spec), memory_mib)

    async def memory_of(self, box: Any) -> int:
        limits = (await self.engine.inspect(box.record.container_id)).limits
        return (limits.memory_bytes_max or 0) // MIB

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.records.run)
            yield
            tasks.cancel_scope.cancel()

    async def told(self, box: Any) -> None:
        with anyio.fail_after(PATIENCE_S):
            while await self.memory_of(box) != box.record.limits.memory_bytes_max // MIB:
                await anyio.lowlevel.checkpoint()

    @property
    def updates(self) -> int:
        return self.engine.calls.count("update")


def _without_nofile(limits: Limits, _: EngineInfo) -> Limits:
    return Limits(memory_bytes_max=limits.memory_bytes_max)


async def settled() -> None:
    """Long enough for every task that could go on to have done so."""
    for _ in range(200):
        await anyio.lowlevel.checkpoint()


async def test_an_engine_is_told_what_was_written_past_it() -> None:
    world = World()
    first, second = await world.box("sb-1", memory_mib=48), await world.box("sb-2", memory_mib=96)
    assert await world.memory_of(first) == 32
    async with world.running():
        world.records.stale(first)
        world.records.stale(second)
        await world.told(first)
        await world.told(second)
    assert world.updates == 2


async def test_one_is_told_at_a_time_and_once_however_often_it_was_changed() -> None:
    world = World()
    first, second = await world.box("sb-1", memory_mib=48), await world.box("sb-2", memory_mib=96)
    world.engine.hang("update")
    async with world.running():
        for _ in range(5):
            world.records.stale(first)
        world.records.stale(second)
        await settled()
        assert world.updates == 1
        assert first.lock.locked()
        assert not second.lock.locked()
        world.engine.release("update")
        await world.told(second)
    assert world.updates == 2


async def test_nothing_is_told_while_somebody_works_on_the_sandbox() -> None:
    """Whoever removes it, or changes its limits, must not stand behind this."""
    world = World()
    box = await world.box("sb-1", memory_mib=48)
    async with world.running():
        async with box.lock:
            world.records.stale(box)
            await settled()
            assert world.updates == 0
        await world.told(box)


@pytest.mark.parametrize("state", [State.REMOVING, State.PAUSED, State.STOPPED, State.LOST])
async def test_nothing_is_told_of_what_does_not_run(state: State) -> None:
    world = World()
    box, after = await world.box("sb-1", memory_mib=48), await world.box("sb-2", memory_mib=96)
    box.record = record(id="sb-1", container_id=box.record.container_id, limits=box.record.limits, state=state)
    async with world.running():
        world.records.stale(box)
        world.records.stale(after)
        await world.told(after)
    assert world.updates == 1
    assert await world.memory_of(box) == 32


async def test_an_engine_that_refuses_is_no_reason_to_stop() -> None:
    world = World()
    box, after = await world.box("sb-1", memory_mib=48), await world.box("sb-2", memory_mib=96)
    world.engine.fail_next("update", EngineRefused("cannot update", detail="busy"))
    async with world.running():
        world.records.stale(box)
        world.records.stale(after)
        await world.told(after)
    assert await world.memory_of(box) == 32
