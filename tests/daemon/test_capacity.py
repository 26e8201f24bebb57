"""The queue for room on a host: order, deadlines, and shares that come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from runtimes.model import Limits
from sandboxd import capacity as room
from sandboxd.admission import Share
from sandboxd.capacity import Capacity
from sandboxd.config import Capacity as Settings
from sandboxd.config import Config
from sandboxd.failures import CapacityExceeded
from sandboxd.lifecycle import State
from sandboxd.limits import Host
from tests.daemon.test_manager import World
from tests.unit.records import record

pytestmark = pytest.mark.anyio

MIB = 2**20
HOST = Host(cpus_online=(0, 1), memory_bytes=100 * MIB, swap_bytes=0, pid_max=2**22, nr_open=2**20)
CONFIG = Config(capacity=Settings(memory_overcommit=1, pids_overcommit=0, memory_reserve="1m"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.journal.close()


class Doors:
    """A host with room for 100 MiB, and those who came to it."""

    def __init__(self, capacity: Capacity, tasks: Any) -> None:
        self.capacity = capacity
        self._tasks = tasks
        self.inside: list[str] = []
        self.refused: dict[str, CapacityExceeded] = {}
        self.progress: dict[str, list[tuple[int | None, int | None]]] = {}
        self._leave: dict[str, anyio.Event] = {}

    def come(self, name: str, mib: int, wait_s: float | None = None) -> None:
        self._leave[name] = anyio.Event()
        self._tasks.start_soon(self._visit, name, mib, wait_s)

    def go(self, name: str) -> None:
        self._leave[name].set()

    async def _visit(self, name: str, mib: int, wait_s: float | None) -> None:
        seen = self.progress.setdefault(name, [])
        asked = Share(memory_bytes=mib * MIB, sandboxes=1)
        try:
            async with self.capacity.admitted(
                asked, wait_s=wait_s, progress=lambda _text, done, total: seen.append((done, total))
            ):
                self.inside.append(name)
                await self._leave[name].wait()
        except CapacityExceeded as error:
            self.refused[name] = error

    async def settle(self, condition: Callable[[], object]) -> None:
        with anyio.fail_after(30):
            while not condition():  # noqa: ASYNC110 - nothing tells of what is waited for
                await anyio.sleep(0.002)


@asynccontextmanager
async def doors(world: World, available: Callable[[], int] = lambda: 10**12) -> AsyncIterator[Doors]:
    async with world.managed() as manager, anyio.create_task_group() as tasks:
        yield Doors(Capacity(manager, CONFIG, HOST, available_bytes=available), tasks)
        tasks.cancel_scope.cancel()


async def test_who_does_not_wait_is_refused_at_once_with_what_is_short(world: World) -> None:
    async with doors(world) as house:
        house.come("a", 60)
        await house.settle(lambda: house.inside)
        house.come("b", 60)
        await house.settle(lambda: house.refused)
        assert "60 MiB of 100 MiB of memory are promised" in house.refused["b"].detail
        assert "--wait-capacity" in house.refused["b"].hint
        house.go("a")
        await house.settle(lambda: not house.capacity._reservations)
        house.come("c", 100)
        await house.settle(lambda: "c" in house.inside)


async def test_who_waits_is_let_in_in_order_and_nobody_overtakes(world: World) -> None:
    """Somebody who asks for little would fit in between; then one who asks for much might never get in."""
    async with doors(world) as house:
        house.come("a", 60)
        await house.settle(lambda: house.inside)
        for place, (name, mib) in enumerate((("big", 90), ("small", 10), ("tiny", 1)), start=1):
            house.come(name, mib, 60)
            await house.settle(lambda place=place: house.capacity.waiting == place)
        house.come("rude", 1)
        await house.settle(lambda: house.refused)
        assert "others wait" in house.refused["rude"].detail
        assert house.inside == ["a"]
        house.go("a")
        await house.settle(lambda: len(house.inside) == 3)
        assert house.inside == ["a", "big", "small"]
        assert house.progress["tiny"][0] == (3, 3)
        house.go("big")
        await house.settle(lambda: len(house.inside) == 4)
        assert house.capacity.waiting == 0


async def test_a_wait_has_an_end_and_what_can_never_be_is_not_waited_for(world: World) -> None:
    async with doors(world) as house:
        house.come("a", 60)
        await house.settle(lambda: house.inside)
        house.come("late", 60, 0.05)
        house.come("huge", 101, 60)
        await house.settle(lambda: len(house.refused) == 2)
        assert "within 0.05 s" in house.refused["late"].brief
        assert "100 MiB" in house.refused["huge"].detail
        assert house.capacity.waiting == 0


async def test_sandboxes_that_are_there_count_and_those_that_stop_or_go_make_room(world: World) -> None:
    async with doors(world) as house:
        limits = Limits(memory_bytes_max=60 * MIB)
        box = world.manager.register(record(id="sb-aaaaaaaaaa", limits=limits))
        world.manager.register(record(id="sb-bbbbbbbbbb", limits=limits, state=State.STOPPED))
        house.come("a", 60, 60)
        await house.settle(lambda: house.capacity.waiting)
        assert house.inside == []
        box.put(state=State.STOPPED)
        await house.settle(lambda: house.inside)


async def test_a_host_without_memory_takes_nobody_in_whatever_was_promised(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others use it, too. Who waits is let in as soon as there is some, though nothing tells of that."""
    monkeypatch.setattr(room, "LOOK_S", 0.01)
    free = [0]
    async with doors(world, lambda: free[0]) as house:
        house.come("a", 1)
        await house.settle(lambda: house.refused)
        assert "kept free" in house.refused["a"].detail
        house.come("b", 1, 60)
        await house.settle(lambda: house.capacity.waiting)
        free[0] = 10**9
        await house.settle(lambda: house.inside == ["b"])


async def test_who_goes_away_while_waiting_leaves_no_gap(world: World) -> None:
    async with doors(world) as house:
        house.come("a", 60)
        await house.settle(lambda: house.inside)
        async with anyio.create_task_group() as impatient:
            other = Doors(house.capacity, impatient)
            other.come("gone", 90, 60)
            await house.settle(lambda: house.capacity.waiting == 1)
            house.come("b", 60, 60)
            await house.settle(lambda: house.capacity.waiting == 2)
            impatient.cancel_scope.cancel()
        assert house.capacity.waiting == 1
        house.go("a")
        await house.settle(lambda: house.inside == ["a", "b"])
