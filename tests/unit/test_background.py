"""Tasks that nobody waits for."""

from __future__ import annotations

import logging

import anyio
import pytest

from sandboxd.background import Background

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_task_that_fails_does_not_take_the_daemon_down(caplog: pytest.LogCaptureFixture) -> None:
    """A kill that runs into its deadline must not end every other sandbox's care."""
    finished = anyio.Event()

    async def fail() -> None:
        raise RuntimeError("cannot go on")

    async def work() -> None:
        finished.set()

    with caplog.at_level(logging.ERROR):
        async with anyio.create_task_group() as tasks:
            background = Background(tasks)
            background.start(fail)
            background.start(work)
    assert finished.is_set()
    assert "cannot go on" in caplog.text


async def test_cancelling_the_daemon_cancels_its_tasks() -> None:
    """The end of the daemon is no failure of a task."""
    started = anyio.Event()

    async def last() -> None:
        started.set()
        await anyio.sleep_forever()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            Background(tasks).start(last)
            await started.wait()
            tasks.cancel_scope.cancel()


async def test_what_must_be_done_is_tried_again_until_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A daemon that was out of descriptors for a moment must not leave files for ever."""
    monkeypatch.setattr("sandboxd.background.AGAIN_S_MIN", 0.0)
    tries = []

    async def remove(name: str) -> None:
        tries.append(name)
        if len(tries) < 3:
            raise OSError("too many open files")

    with caplog.at_level(logging.WARNING):
        async with anyio.create_task_group() as tasks:
            Background(tasks).persist(remove, "spool")
    assert tries == ["spool"] * 3
    assert caplog.text.count("too many open files") == 2


async def test_what_cannot_be_done_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start sweeps what is left; until then nobody tries for ever."""
    monkeypatch.setattr("sandboxd.background.AGAIN_S_MIN", 0.0)
    monkeypatch.setattr("sandboxd.background.TRIES_MAX", 4)
    tries = []

    async def remove() -> None:
        tries.append(1)
        raise PermissionError("not ours")

    async with anyio.create_task_group() as tasks:
        Background(tasks).persist(remove)
    assert len(tries) == 4
