"""The commands of one sandbox: what runs, how it is ended, and how it ended.

sandbox-init owns the processes. This table owns what is known about them here: who waits, which timeout runs,
and the verdict when the end comes. A command has up to two ends: its main process exits (``ended``), and later
the last process that it left behind does (``gone``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import random
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import anyio
import msgspec

from runtimes.init.channel import InitChannel, RequestRefused, SpawnFailed
from runtimes.init.wire import Exited, Gone, InitError, InvalidSpawn, Scope, SpawnRequest, SpawnTooLarge
from sandboxd.background import Background
from sandboxd.failures import Conflict, NotFound, Timeout
from sandboxd.outlet import Outlet
from sandboxd.protocol import CommandEnd, CommandInfo
from sandboxd.records import CommandRecord
from sandboxd.timings import now_ms

logger = logging.getLogger(__name__)

ENDED_KEPT_MAX = 256
"""Ends of background commands that nobody has asked for yet; the oldest are forgotten first."""

KILL_DEADLINE_S = 5.0
"""How long init may take to kill a tree. Design: gone for good within 2 s; a loaded host gets some more."""

KILL_RETRY_S = 1.0
"""Between two tries to end what could not be ended."""

COMMAND_ID_BITS = 47

ARGV_SHOWN_CHARS_MAX = 512
"""How much of a command's arguments is kept to be shown."""


def format_command_id(command_id: int) -> str:
    """The wire's form of a command id: twelve hexadecimal digits."""
    return f"{command_id:012x}"


def shown_argv(argv: Sequence[str]) -> list[str]:
    """The beginning of an argument vector, which may be megabytes long."""
    shown: list[str] = []
    left = ARGV_SHOWN_CHARS_MAX
    for argument in argv:
        if left <= 0:
            return [*shown, "..."]
        shown.append(argument if len(argument) <= left else f"{argument[:left]}...")
        left -= len(argument) + 1
    return shown


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to judge an end by."""

    wait_status: int | None
    """As of wait(2); None: nobody saw it end."""
    oom_kills: int | None
    """How far the sandbox's own counter rose while the command ran."""
    timed_out: bool
    killed: bool


def judge(verdict: Verdict) -> tuple[int | None, int | None, str]:
    """Return exit code, signal and status. Pure; an OOM is told by the kernel's counter, never by 137."""
    if verdict.wait_status is None:
        return None, None, "killed" if verdict.killed else "oom" if verdict.oom_kills else "lost"
    ended_by = verdict.wait_status & 0x7F
    exit_code = None if ended_by else (verdict.wait_status >> 8) & 0xFF
    failed = exit_code != 0
    if verdict.timed_out:
        status = "timeout"
    elif verdict.oom_kills and failed:
        status = "oom"
    elif verdict.killed:
        status = "killed"
    elif ended_by:
        status = "signaled"
    else:
        status = "nonzero" if failed else "ok"
    return exit_code, ended_by or None, status


class Command:
    """One command."""

    def __init__(
        self,
        command_id: int,
        argv: Sequence[str],
        *,
        background: bool,
        started_at_ms: int,
        oom_kills: int | None,
        ended: anyio.Event | None = None,
    ) -> None:
        self.id = command_id
        self.argv = list(argv)
        self.background = background
        self.started_at_ms = started_at_ms
        self.started_monotonic_s = time.monotonic()
        self.oom_kills_before = oom_kills
        self.pid: int | None = None
        self.timed_out = False
        self.killed = False
        self.released = False
        self.announced = False
        self.end: CommandEnd | None = None
        self.outlet: Outlet | None = None
        self.ended = ended or anyio.Event()
        self.gone = anyio.Event()

    @property
    def state(self) -> str:
        """``running``, ``lingering`` or ``ended``."""
        if self.end is None:
            return "running"
        return "ended" if self.gone.is_set() else "lingering"

    def info(self) -> CommandInfo:
        """The row of the command list."""
        return CommandInfo(
            command_id=format_command_id(self.id),
            pid=self.pid,
            argv=self.argv,
            state=self.state,  # type: ignore[arg-type]
            started_at_ms=self.started_at_ms,
            end=self.end,
        )


class CommandTable:
    """The commands of one sandbox.

    Args:
        background: Where timeouts run.
        read_oom_kills: The sandbox's counter, from its control group; None when it cannot be read.
        unthrottled: Lifts the sandbox's CPU quota for as long as it is entered.
        on_ended: Told the id and the end of a background command.
        on_forgotten: Told the id of a command whose end is not kept any longer, and whose output need not be.
    """

    def __init__(
        self,
        background: Background,
        read_oom_kills: Callable[[], int | None],
        unthrottled: Callable[[], AbstractContextManager[None]],
        on_ended: Callable[[int, CommandEnd], None],
        on_forgotten: Callable[[int], None],
    ) -> None:
        self._background = background
        self._read_oom_kills = read_oom_kills
        self._unthrottled = unthrottled
        self._on_ended = on_ended
        self._on_forgotten = on_forgotten
        self.on_told: Callable[[str, Command], None] = _nobody_listens
        """Told of commands that were announced: ``command_started`` and ``command_ended``."""
        self._channel: InitChannel | None = None
        self._live: dict[int, Command] = {}
        self._ended: OrderedDict[int, Command] = OrderedDict()

    def announce(self, command: Command) -> None:
        """Have it told that a user's command has started, and later how it ended; our own are nobody's business."""
        command.announced = True
        self.on_told("command_started", command)
        if command.end is not None:
            self.on_told("command_ended", command)

    def attach(self, channel: InitChannel) -> None:
        """Use this channel from now on."""
        self._channel = channel

    @property
    def running_count(self) -> int:
        """How many commands run or have left processes behind."""
        return len(self._live)

    def running(self) -> list[Command]:
        """Those that run or have left processes behind."""
        return list(self._live.values())

    async def count_written(self) -> None:
        """Note of each command that has ended how much it wrote, though nobody waits for its end."""
        for command in (*self._ended.values(), *self._live.values()):
            if command.end is not None and command.outlet is not None and command.outlet.finished.is_set():
                # Its spools are removed once enough others have ended.
                with contextlib.suppress(NotFound):
                    await self.wait(command)

    def infos(self) -> list[CommandInfo]:
        """All rows, the oldest first."""
        rows = [command.info() for command in (*self._ended.values(), *self._live.values())]
        return sorted(rows, key=lambda row: row.started_at_ms)

    def get(self, command_id: int) -> Command:
        """Find a command that runs, lingers, or ended lately.

        Raises:
            NotFound: there is none.
        """
        command = self._live.get(command_id) or self._ended.get(command_id)
        if command is None:
            raise NotFound(
                f"cannot find command {format_command_id(command_id)}",
                detail="it never was, or it ended too long ago",
                hint="sandboxctl ps SANDBOX",
            )
        return command

    def new_id(self) -> int:
        """An id that no command of this sandbox has."""
        while (command_id := random.getrandbits(COMMAND_ID_BITS)) in self._live or command_id in self._ended:
            pass
        return command_id

    async def start(
        self,
        request: SpawnRequest,
        descriptors: Sequence[int],
        *,
        background: bool,
        timeout_s: float | None,
        grace_s: float,
        ended: anyio.Event | None = None,
    ) -> tuple[Command, int | None]:
        """Run a command.

        Args:
            request: What to run.
            descriptors: stdin, stdout and stderr; none with a terminal.
            background: Its end is kept until somebody asks, or too many others have ended.
            timeout_s: When to end it; None: never.
            grace_s: Between TERM and KILL.
            ended: Set at its end; None: a new one.

        Returns:
            The command, and the terminal's master descriptor when ``request`` asked for a terminal: the caller
            closes it.

        Raises:
            SpawnFailed: init could not; nothing runs.
            InitError: the channel broke; the command is killed if it was started after all.
        """
        channel = self._usable_channel()
        command = Command(
            request.command_id,
            shown_argv([argument.decode(errors="replace") for argument in request.argv]),
            background=background,
            started_at_ms=now_ms(),
            oom_kills=self._read_oom_kills(),
            ended=ended,
        )
        self._live[command.id] = command
        try:
            # Not cancelled half-way: a command that runs and that nobody knows of could not be ended.
            with anyio.CancelScope(shield=True):
                spawned = await channel.spawn(request, descriptors)
        except (SpawnFailed, SpawnTooLarge, InvalidSpawn):
            self._live.pop(command.id, None)
            raise
        except InitError:
            self._live.pop(command.id, None)
            self._background.start(self._kill_unconfirmed, channel, command.id)
            raise
        command.pid = spawned.pid
        if timeout_s is not None:
            self._background.start(self._enforce_timeout, command, timeout_s, grace_s)
        return command, spawned.pty_fd

    def take_outlet(self, command: Command, outlet: Outlet) -> None:
        """Keep the output of a command that was just started, until nothing of it is left.

        That may be so already: init tells of a quick one's end in the same breath as of its start.
        """
        command.outlet = outlet
        outlet.start(self._background, command.gone)
        if command.background and command.gone.is_set():
            self._background.start(outlet.rest)

    def awaited(self, command_id: int) -> Command | None:
        """One that is known to have been started, and not to have ended."""
        return self._live.get(command_id)

    def expect(self, record: CommandRecord, *, ended: anyio.Event, outlet: Outlet | None) -> Command:
        """Know a background command that a former daemon started, before init says what became of it."""
        command = Command(
            record.id,
            record.argv,
            background=True,
            started_at_ms=record.started_at_ms,
            oom_kills=self._read_oom_kills(),
            ended=ended,
        )
        command.outlet = outlet
        if outlet is not None:
            outlet.start(self._background, command.gone)
        command.started_monotonic_s -= max(0.0, time.time() - record.started_at_ms / 1000)
        command.announced = True
        self._live[command.id] = command
        return command

    def adopt(self, command: Command, *, pid: int, remaining_s: float | None, grace_s: float) -> None:
        """Take over one that was expected: init is there, and its time is counted from now on."""
        command.pid = pid
        if command.oom_kills_before is None:
            command.oom_kills_before = self._read_oom_kills()
        if remaining_s is not None:
            self._background.start(self._enforce_timeout, command, remaining_s, grace_s)

    def restore(self, record: CommandRecord, outlet: Outlet | None) -> None:
        """Know again a background command that ended under a former daemon."""
        command = Command(record.id, record.argv, background=True, started_at_ms=record.started_at_ms, oom_kills=None)
        command.end = record.end
        command.outlet = outlet
        if outlet is not None:
            outlet.close()
        command.ended.set()
        command.gone.set()
        self._ended[command.id] = command

    def on_event(self, event: Exited | Gone) -> None:
        """Take note of what init says. Called by the channel; never blocks."""
        command = self._live.get(event.command_id)
        if command is None:
            return
        if isinstance(event, Exited):
            if command.end is None:
                self._record_end(command, event)
        else:
            if command.end is None:
                self._record_end(command, None)
            self._retire(command)

    def detach(self) -> None:
        """Use the channel no longer; what runs goes on, and is found again by ``attach`` and ``adopt``."""
        self._channel = None

    def on_channel_lost(self, *, killed: bool = False) -> None:
        """The sandbox went away under its commands: whoever waits for one is told.

        Args:
            killed: By us, with the sandbox; else they are lost.
        """
        self._channel = None
        commands = list(self._live.values())
        for command in commands:
            if command.end is None:
                command.killed = command.killed or killed
                self._record_end(command, None)
        for command in commands:
            self._retire(command)

    async def wait(self, command: Command) -> CommandEnd:
        """Wait until the main process of a command has ended."""
        await command.ended.wait()
        if command.end is None:
            raise AssertionError("a command ended without an end record")
        if command.outlet is not None and command.end.stdout_bytes is None:
            await command.outlet.finished.wait()
            command.end = msgspec.structs.replace(
                command.end, **msgspec.structs.asdict(await command.outlet.summary())
            )
        return command.end

    async def wait_or_kill(self, command: Command) -> CommandEnd:
        """Wait for the end; when the wait is cancelled, kill the whole tree first."""
        try:
            return await self.wait(command)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self.kill(command)
            raise

    async def signal(self, command: Command, number: int, scope: Scope) -> None:
        """Send a signal. A command that has ended takes none, which is not an error."""
        if command.gone.is_set():
            return
        try:
            await self._usable_channel().signal(command.id, number, scope)
        except RequestRefused as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT):
                raise

    async def kill(self, command: Command) -> CommandEnd:
        """Kill the whole tree and wait until nothing of it is left. Idempotent.

        Raises:
            Timeout: something is left after ``KILL_DEADLINE_S``.
        """
        if not command.gone.is_set():
            if command.end is None:
                command.killed = True
            await self._kill_surely(command)
        return await self.wait(command)

    async def _kill_surely(self, command: Command) -> None:
        """Kill; where that does not come to an end, once more without the CPU quota that may be in its way."""
        try:
            await self._kill_tree(command)
        except (InitError, Timeout) as error:
            logger.warning("cannot end command %s yet: %s", format_command_id(command.id), error)
            with self._unthrottled():
                await self._kill_tree(command)

    async def _kill_tree(self, command: Command) -> None:
        with contextlib.suppress(RequestRefused):
            await self._usable_channel().kill(command.id)
        with anyio.move_on_after(KILL_DEADLINE_S):
            await command.gone.wait()
            return
        raise Timeout(
            f"cannot kill command {format_command_id(command.id)}",
            detail=f"processes of it are left after {KILL_DEADLINE_S:g} s",
            hint="sandboxctl rm SANDBOX ends them all",
        )

    async def _enforce_timeout(self, command: Command, timeout_s: float, grace_s: float) -> None:
        with anyio.move_on_after(timeout_s):
            await command.ended.wait()
        if command.ended.is_set():
            return
        command.timed_out = True
        if grace_s > 0:
            with contextlib.suppress(InitError, Conflict):
                await self.signal(command, signal.SIGTERM, Scope.TREE)
                with anyio.move_on_after(grace_s):
                    await command.gone.wait()
        while not command.gone.is_set() and self._channel is not None:
            try:
                await self._kill_surely(command)
            except (InitError, Timeout):
                # A paused sandbox does not die now; when it runs again, this must.
                await anyio.sleep(KILL_RETRY_S)

    @staticmethod
    async def _kill_unconfirmed(channel: InitChannel, command_id: int) -> None:
        """End a command of which nobody knows whether it started."""
        with contextlib.suppress(InitError):
            await channel.kill(command_id)

    async def _forget(self, channel: InitChannel, command_id: int) -> None:
        with contextlib.suppress(InitError):
            await channel.forget(command_id)

    def _record_end(self, command: Command, exited: Exited | None) -> None:
        now = self._read_oom_kills()
        before = command.oom_kills_before
        oom_kills = None if now is None or before is None else max(0, now - before)
        exit_code, ended_by, status = judge(
            Verdict(
                wait_status=None if exited is None else exited.wait_status,
                oom_kills=oom_kills,
                timed_out=command.timed_out,
                killed=command.killed,
            )
        )
        wall_ms = (time.monotonic() - command.started_monotonic_s) * 1000
        command.end = CommandEnd(
            command_id=format_command_id(command.id),
            exit_code=exit_code,
            signal=ended_by,
            status=status,  # type: ignore[arg-type]
            oom_kills=oom_kills,
            cpu_ms=None if exited is None else (exited.usage.utime_us + exited.usage.stime_us) / 1000,
            wall_ms=round(wall_ms if exited is None else exited.usage.wall_us / 1000, 3),
            memory_bytes_peak=None if exited is None else exited.usage.maxrss_kib * 1024,
            stdout_bytes=None,
            stderr_bytes=None,
            truncated=False,
            timings_ms={},
        )
        command.ended.set()
        if command.announced:
            self.on_told("command_ended", command)

    def _retire(self, command: Command) -> None:
        self._live.pop(command.id, None)
        command.gone.set()
        if self._channel is not None:
            self._background.start(self._forget, self._channel, command.id)
        if command.background:
            self._keep_end(command)
            if command.outlet is not None:
                self._background.start(command.outlet.rest)
        elif command.released:
            self._drop(command)

    def release(self, command: Command) -> None:
        """Nobody will ask for a foreground command any more: let go of its output once nothing of it is left."""
        command.released = True
        if command.gone.is_set():
            self._drop(command)

    def _keep_end(self, command: Command) -> None:
        self._ended[command.id] = command
        if command.end is not None:
            self._on_ended(command.id, command.end)
        while len(self._ended) > ENDED_KEPT_MAX:
            self._drop(self._ended.popitem(last=False)[1])

    def _drop(self, command: Command) -> None:
        if command.outlet is not None:
            command.outlet.close()
        self._on_forgotten(command.id)

    def _usable_channel(self) -> InitChannel:
        if self._channel is None:
            raise Conflict(
                "cannot reach the sandbox", detail="its init does not answer", hint="sandboxctl inspect SANDBOX"
            )
        return self._channel


def _nobody_listens(kind: str, command: Command) -> None:
    """Nobody wants to know."""


def remaining_s(deadline_at_ms: int | None) -> float | None:
    """How long until a wall-clock deadline, never negative; None: there is none."""
    return None if deadline_at_ms is None else max(0.0, deadline_at_ms / 1000 - time.time())


def deadline_at_ms(timeout_s: float | None) -> int | None:
    """The wall-clock time, in milliseconds since the epoch, at which a timeout that starts now passes."""
    return None if timeout_s is None else math.ceil((time.time() + timeout_s) * 1000)
