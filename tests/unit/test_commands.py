"""The verdict on a command's end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace

import anyio
import pytest

from runtimes.init.channel import Spawned
from runtimes.init.wire import Exited, Gone, SpawnRequest, Usage
from sandboxd.background import Background
from sandboxd.commands import CommandTable, Verdict, judge
from sandboxd.outlet import Summary


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict(wait_status=0, oom_kills=0, timed_out=False, killed=False), (0, None, "ok")),
        (Verdict(wait_status=7 << 8, oom_kills=0, timed_out=False, killed=False), (7, None, "nonzero")),
        (Verdict(wait_status=137 << 8, oom_kills=0, timed_out=False, killed=False), (137, None, "nonzero")),
        (Verdict(wait_status=9, oom_kills=0, timed_out=False, killed=False), (None, 9, "signaled")),
        (Verdict(wait_status=9 | 0x80, oom_kills=0, timed_out=False, killed=False), (None, 9, "signaled")),
        (Verdict(wait_status=9, oom_kills=1, timed_out=False, killed=False), (None, 9, "oom")),
        (Verdict(wait_status=137 << 8, oom_kills=1, timed_out=False, killed=False), (137, None, "oom")),
        (Verdict(wait_status=0, oom_kills=1, timed_out=False, killed=False), (0, None, "ok")),
        (Verdict(wait_status=9, oom_kills=None, timed_out=False, killed=False), (None, 9, "signaled")),
        (Verdict(wait_status=9, oom_kills=0, timed_out=False, killed=True), (None, 9, "killed")),
        (Verdict(wait_status=15, oom_kills=0, timed_out=True, killed=False), (None, 15, "timeout")),
        (Verdict(wait_status=9, oom_kills=1, timed_out=True, killed=False), (None, 9, "timeout")),
        (Verdict(wait_status=None, oom_kills=None, timed_out=False, killed=False), (None, None, "lost")),
        (Verdict(wait_status=None, oom_kills=None, timed_out=False, killed=True), (None, None, "killed")),
        (Verdict(wait_status=None, oom_kills=2, timed_out=False, killed=False), (None, None, "oom")),
    ],
)
def test_the_verdict_comes_from_the_counters_and_never_from_137(
    verdict: Verdict, expected: tuple[int | None, int | None, str]
) -> None:
    """An OOM kill, our kill, a user's kill, a timeout and an exit 137 are five different things."""
    assert judge(verdict) == expected


class HastyInit:
    """Tells of a command's end in the same breath as of its start."""

    def __init__(self, table: CommandTable) -> None:
        self._table = table

    async def spawn(self, request: SpawnRequest, _: Sequence[int]) -> Spawned:
        self._table.on_event(Exited(request.command_id, 0, Usage(0, 0, 0, 0)))
        self._table.on_event(Gone(request.command_id, keeper_lost=False))
        return Spawned(pid=42, pty_fd=None)

    async def forget(self, command_id: int) -> None:
        """It has."""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_the_output_of_a_command_that_ends_at_once_is_held_open_no_longer_than_any_other() -> None:
    """Nobody would ever close it: a daemon lost two descriptors for each such command, and then all of them."""
    rested: list[bool] = []

    async def rest() -> None:
        rested.append(True)

    async with anyio.create_task_group() as tasks:
        table = CommandTable(Background(tasks), lambda: 0, contextlib.nullcontext, lambda _, __: None, lambda _: None)
        table.attach(HastyInit(table))  # type: ignore[arg-type]
        request = SpawnRequest(command_id=7, argv=[b"true"], env=[], cwd=b"/")
        command, _ = await table.start(request, (), background=True, timeout_s=None, grace_s=0)
        assert command.gone.is_set()
        outlet = SimpleNamespace(start=lambda _, __: None, rest=rest, close=lambda: None)
        table.take_outlet(command, outlet)  # type: ignore[arg-type]
    assert rested == [True]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_the_list_says_what_an_ended_command_wrote_though_nobody_has_waited_for_it() -> None:
    """It said null until somebody read the output, which changes nothing of how much it was."""

    async def rest() -> None:
        return None

    async def summary() -> Summary:
        return Summary(stdout_bytes=6, stderr_bytes=4, truncated=False)

    async with anyio.create_task_group() as tasks:
        table = CommandTable(Background(tasks), lambda: 0, contextlib.nullcontext, lambda _, __: None, lambda _: None)
        table.attach(HastyInit(table))  # type: ignore[arg-type]
        request = SpawnRequest(command_id=7, argv=[b"true"], env=[], cwd=b"/")
        command, _ = await table.start(request, (), background=True, timeout_s=None, grace_s=0)
        finished = anyio.Event()
        outlet = SimpleNamespace(
            start=lambda _, __: None, rest=rest, close=lambda: None, finished=finished, summary=summary
        )
        table.take_outlet(command, outlet)  # type: ignore[arg-type]
        with anyio.fail_after(20):
            await table.count_written()
        (row,) = table.infos()
        assert row.end is not None
        assert row.end.stdout_bytes is None, "its terminal still holds some of it"
        finished.set()
        await table.count_written()
        (row,) = table.infos()
        assert row.end is not None
        assert (row.end.stdout_bytes, row.end.stderr_bytes) == (6, 4)
