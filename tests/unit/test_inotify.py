"""Being woken when a file changes, on real files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from runtimes import inotify as inotify_module
from runtimes.inotify import Inotify, WatchRefused

pytestmark = pytest.mark.anyio
DEADLINE_S = 30


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_write_wakes_every_watch_of_the_file_and_no_other(file: int, tmp_path: Path) -> None:
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    with Inotify() as inotify, inotify.watch(file) as one, inotify.watch(file) as two, inotify.watch(other) as three:
        for watch in (one, two, three):
            watch.arm()
        assert inotify.armed_count == 2
        os.write(file, b"x")
        with anyio.fail_after(DEADLINE_S):
            await one.wait()
            await two.wait()
        waiting = asyncio.ensure_future(three.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        three.wake()
        await waiting
    os.close(other)


async def test_a_watch_is_armed_for_one_event_and_can_be_armed_again(file: int) -> None:
    """A writer that nobody waits for fills no queue and wakes nobody."""
    with Inotify() as inotify, inotify.watch(file) as watch:
        for _ in range(3):
            watch.arm()
            for _ in range(1000):
                os.write(file, b"x")
            with anyio.fail_after(DEADLINE_S):
                await watch.wait()
            assert inotify.armed_count == 0


async def test_what_was_written_before_arming_wakes_nobody_and_what_came_after_is_not_missed(file: int) -> None:
    with Inotify() as inotify, inotify.watch(file) as watch:
        os.write(file, b"before")
        watch.arm()
        os.ftruncate(file, 0)
        with anyio.fail_after(DEADLINE_S):
            await watch.wait()


async def test_one_of_two_watches_may_be_closed(file: int) -> None:
    with Inotify() as inotify, inotify.watch(file) as kept:
        kept.arm()
        with inotify.watch(file) as closed:
            closed.arm()
        assert inotify.armed_count == 1
        os.write(file, b"x")
        with anyio.fail_after(DEADLINE_S):
            await kept.wait()


async def test_a_lost_event_wakes_all(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says that its queue overflowed, and not what was in it."""
    with Inotify() as inotify, inotify.watch(file) as watch:
        watch.arm()
        overflow = inotify_module._EVENT.pack(-1, 0x4000, 0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(inotify_module.os, "read", lambda *_: overflow)
            inotify._on_readable()
        with anyio.fail_after(DEADLINE_S):
            await watch.wait()


async def test_closing_wakes_those_who_wait_and_leaves_no_descriptor(file: int) -> None:
    before = open_descriptors()
    inotify = Inotify()
    watch = inotify.watch(file)
    watch.arm()
    inotify.close()
    inotify.close()
    with anyio.fail_after(DEADLINE_S):
        await watch.wait()
    watch.close()
    assert open_descriptors() == before
    with pytest.raises(WatchRefused, match="cannot follow a file") as refused:
        watch.arm()
    assert "max_user_watches" in refused.value.hint


async def test_a_look_wakes_those_whose_file_has_changed_without_an_event_and_nobody_else(
    file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write through a mapping makes no event; and a hundred quiet files must not cost a wake-up each."""
    monkeypatch.setattr(Inotify, "arm", lambda *_: 1)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    with Inotify() as inotify, inotify.watch(file) as quiet, inotify.watch(other) as changed:
        waiting = {
            watch: asyncio.ensure_future(watch.wait_for_change(watch.shape, look_s=0.01))
            for watch in (quiet, changed)
        }
        await anyio.wait_all_tasks_blocked()
        os.write(other, b"x")
        with anyio.fail_after(DEADLINE_S):
            await waiting[changed]
        assert not waiting[quiet].done()
        waiting[quiet].cancel()
        await asyncio.wait(waiting.values())
        assert inotify.looked_at_count == 0
    os.close(other)


async def test_who_begins_to_wait_later_is_looked_at_by_the_same_timer(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Inotify() as inotify, inotify.watch(file) as one, inotify.watch(file) as two:
        begun: list[float] = []
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def counted(delay_s: float, *rest: Any) -> asyncio.TimerHandle:
            begun.append(delay_s)
            return call_later(delay_s, *rest)

        monkeypatch.setattr(loop, "call_later", counted)
        waiting = [asyncio.ensure_future(watch.wait_for_change(watch.shape, look_s=3600)) for watch in (one, two)]
        await anyio.wait_all_tasks_blocked()
        assert begun == [3600]
        for watch in (one, two):
            watch.wake()
        await asyncio.wait(waiting)
