"""What a follower of a command's output is told, besides the output."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from runtimes.inotify import Inotify
from sandboxd import protocol
from sandboxd.handlers.commands import follow
from sandboxd.outlet import Outlet
from sandboxd.spool import SpoolDirectory
from sandboxd.spool_plan import Stream

pytestmark = pytest.mark.anyio

DEADLINE_S = 30


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Told:
    """A command that has ended with some bytes in its spool, and what a follower hears of it."""

    def __init__(self, outlet: Outlet) -> None:
        self._command: Any = SimpleNamespace(id=1, outlet=outlet)
        self._sandbox: Any = SimpleNamespace(record=SimpleNamespace(id="sb-test"))

    async def from_offset(self, offset: int) -> list[tuple[int, bytes, int]]:
        """Offset, data and dropped bytes of each message."""
        heard: list[tuple[int, bytes, int]] = []

        async def deliver(method: str, output: protocol.CommandOutput) -> None:
            assert (method, output.sandbox, output.stream) == ("commands/output", "sb-test", "stdout")
            heard.append((output.offset, output.data, output.dropped_bytes))

        context: Any = SimpleNamespace(deliver=deliver)
        with anyio.fail_after(DEADLINE_S):
            await follow(self._sandbox, self._command, context, {"stdout": offset})
        return heard


@pytest.fixture
async def written(tmp_path: Path) -> AsyncIterator[tuple[int, Told]]:
    """Where the command writes, and what is told of it."""
    ended = anyio.Event()
    ended.set()
    with Inotify() as inotify:
        spool, fd = SpoolDirectory(str(tmp_path / "box"), inotify).create(1, Stream.BOTH)
        with spool:
            yield fd, Told(Outlet({"stdout": spool}, ended))
        os.close(fd)


async def test_output_is_told_once_and_from_where_it_is_asked_for(written: tuple[int, Told]) -> None:
    fd, told = written
    os.write(fd, b"abc")
    assert await told.from_offset(0) == [(0, b"abc", 0)]
    assert await told.from_offset(1) == [(1, b"bc", 0)]
    assert await told.from_offset(3) == []


async def test_a_follower_is_told_where_the_output_ends_if_not_where_it_thought(written: tuple[int, Told]) -> None:
    """It has an offset from before, and the command has cut its output short since."""
    fd, told = written
    os.write(fd, b"abc")
    assert await told.from_offset(10) == [(3, b"", 0)]


async def test_a_hole_is_told_with_what_follows_it_and_alone_if_nothing_does(written: tuple[int, Told]) -> None:
    """Zeros that nobody wrote are nobody's output, and a follower that counts must not miss them."""
    fd, told = written
    os.write(fd, b"a" * 4096)
    os.truncate(fd, 1 << 20)
    assert await told.from_offset(0) == [(0, b"a" * 4096, 0), (1 << 20, b"", (1 << 20) - 4096)]
    os.write(fd, b"z")
    assert (await told.from_offset(0))[-1] == (1 << 20, b"z", (1 << 20) - 4096)
