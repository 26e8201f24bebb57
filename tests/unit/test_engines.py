"""A look at the engines that began before anybody asked: it is given once, and then it is looked anew."""

from __future__ import annotations

import anyio
import pytest

from runtimes.model import EngineInfo
from sandboxd.engines import BegunLook
from tests.fakes.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_who_asks_first_waits_for_the_look_that_has_begun_and_who_asks_again_for_a_new_one() -> None:
    """A start must not ask an engine twice, and `doctor` must not be told what was true an hour ago."""
    info = FakeEngine().info
    looks = 0
    answered = anyio.Event()

    async def detect() -> list[EngineInfo]:
        nonlocal looks
        looks += 1
        await answered.wait()
        return [info]

    look = BegunLook(detect)
    found: list[object] = []

    async def ask() -> None:
        found.append(await look())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look.begin)
        tasks.start_soon(ask)
        await anyio.wait_all_tasks_blocked()
        assert (looks, found) == (1, [])
        answered.set()
    assert (looks, found) == (1, [[info]])
    assert list(await look()) == [info]
    assert looks == 2
