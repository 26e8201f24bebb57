"""What is wrong with a sandbox, for whoever asks about it or has a command fail in it.

Nothing here is on the way of a command that succeeds. The control group's counters cost some reads of small files;
free space is asked of a file worker inside, on files that nobody sees, with a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec

from runtimes.cgroup.readings import Usage
from runtimes.errors import CgroupUnreadable
from runtimes.init.file_worker import FileRefused
from runtimes.init.files import FilesChannel
from runtimes.init.wire import InitError
from runtimes.quantities import format_bytes
from sandboxd.failures import Failure
from sandboxd.lifecycle import State
from sandboxd.protocol import CommandEnd, Problem
from sandboxd.sandbox import TMPFS_TARGETS, Sandbox
from sandboxd.workspace import TARGET

ROOM_DEADLINE_S = 1.0
"""How long a sandbox may take to say how much room it has. One that is thrashing says nothing."""

ROOM_BYTES_MIN = 64 * 1024
"""A file system with less room is full."""

MEMORY_SHARE = 0.97
"""Of its limit. Above it the kernel looks for memory to free all the time."""

End = TypeVar("End", bound=CommandEnd)

_PROBE = b"/.room"
_FAILED = ("nonzero", "signaled", "oom", "lost")
_MAY_LACK_ROOM = ("nonzero", "signaled")


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one sandbox. None is unknown."""

    sandbox_id: str
    state: State
    state_reason: str
    init_answers: bool
    usage: Usage = Usage()
    memory_bytes_max: int | None = None
    pids_max: int | None = None
    forks_refused: int = 0
    """For the pids limit, lately."""
    full: tuple[str, ...] = ()
    """Paths inside where nothing more can be written."""


def judge(facts: Facts) -> list[Problem]:
    """Return what is wrong. Pure: what is unknown is no problem."""
    problems = []
    should_answer = facts.state in (State.RUNNING, State.PAUSED)
    # A sandbox that somebody stopped has no reason to be told.
    ended_by_itself = facts.state is State.STOPPED and facts.state_reason != ""
    if ended_by_itself or facts.state in (State.BROKEN, State.LOST) or (should_answer and not facts.init_answers):
        anew = f"sandboxctl rm {facts.sandbox_id}, and make it anew"
        problems.append(
            Problem(
                kind="init_gone",
                detail=facts.state_reason or "its init does not answer",
                hint=f"sandboxctl start {facts.sandbox_id}" if ended_by_itself else anew,
            )
        )
    problems += [
        Problem(kind="disk_full", detail=f"{path} has no room left", hint=f"remove files below {path}")
        for path in facts.full
    ]
    pids, used = facts.usage.pids, facts.usage.memory_working_set_bytes
    if facts.pids_max is not None and (facts.forks_refused or (pids is not None and pids >= facts.pids_max)):
        at = f"{pids} of {facts.pids_max} processes and threads run" if pids is not None else "its limit is reached"
        refused = f"; {facts.forks_refused} were refused while the command ran" if facts.forks_refused else ""
        problems.append(
            Problem(
                kind="pids_exhausted",
                detail=f"{at}{refused}",
                hint=f"sandboxctl update --pids NUMBER {facts.sandbox_id}",
            )
        )
    if facts.memory_bytes_max and used is not None and used >= facts.memory_bytes_max * MEMORY_SHARE:
        problems.append(
            Problem(
                kind="memory_at_limit",
                detail=f"{format_bytes(used)} of {format_bytes(facts.memory_bytes_max)} are in use, /tmp included",
                hint=f"sandboxctl update -m SIZE {facts.sandbox_id}",
            )
        )
    return problems


def counted(sandbox: Sandbox, *, forks_refused: int = 0, full: tuple[str, ...] = ()) -> list[Problem]:
    """What the sandbox's state and counters tell, at the cost of reading some small files."""
    record = sandbox.record
    usage = Usage()
    with contextlib.suppress(CgroupUnreadable):
        usage = sandbox.usage()
    return judge(
        Facts(
            sandbox_id=record.id,
            state=record.state,
            state_reason=record.state_reason,
            init_answers=sandbox.connected,
            usage=usage,
            memory_bytes_max=record.limits.memory_bytes_max,
            pids_max=record.limits.pids_max,
            forks_refused=forks_refused,
            full=full,
        )
    )


async def look(sandbox: Sandbox, *, forks_refused: int = 0) -> list[Problem]:
    """The same, and which of its file systems are full, as far as it says so in time."""
    full: tuple[str, ...] = ()
    if sandbox.record.state is State.RUNNING and sandbox.connected:
        with anyio.move_on_after(ROOM_DEADLINE_S), contextlib.suppress(InitError, Failure):
            full = await _full(sandbox)
    return counted(sandbox, forks_refused=forks_refused, full=full)


async def explained(sandbox: Sandbox, end: End, *, refused_before: int | None = None) -> End:
    """The end of a command; of one that failed with what is wrong with its sandbox."""
    if end.status not in _FAILED:
        return end
    refused = sandbox.forks_refused
    rose = 0 if refused is None or refused_before is None else max(0, refused - refused_before)
    if end.status in _MAY_LACK_ROOM:
        problems = await look(sandbox, forks_refused=rose)
    else:
        problems = counted(sandbox, forks_refused=rose)
    return msgspec.structs.replace(end, problems=problems)


def add_to(failure: Failure, problems: list[Problem]) -> None:
    """Say in a failure's detail what is wrong with the sandbox."""
    said = "; ".join(f"{problem.kind}: {problem.detail}" for problem in problems)
    failure.detail = "; ".join(text for text in (failure.detail, said) if text)


async def _full(sandbox: Sandbox) -> tuple[str, ...]:
    workspace = sandbox.record.workspace
    paths = [*TMPFS_TARGETS, *([TARGET] if workspace is not None and not workspace.read_only else [])]
    async with sandbox.files_for_a_moment() as files:
        return tuple([path for path in paths if await is_full(files, path)])


async def is_full(files: FilesChannel, path: str) -> bool:
    """Whether there is no room where a file in this directory would be. What cannot be told is not full."""
    try:
        async with await files.temp(path.encode() + _PROBE) as probe:
            room = await anyio.to_thread.run_sync(os.fstatvfs, probe.descriptor, abandon_on_cancel=True)
    except FileRefused as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    except OSError:
        return False
    no_blocks = room.f_blocks > 0 and room.f_bavail * room.f_frsize < ROOM_BYTES_MIN
    return no_blocks or (room.f_files > 0 and room.f_favail == 0)
