"""Shells that keep their state from one text to the next.

A shell is a background command, ``sandbox-shell open``, and each text that it evaluates is a command of its own,
``sandbox-shell run``, through which the output goes into spools (see ``runtimes/init/shell.c``). So what holds for
commands holds for texts: bounded output, followers, a table, a kill. A shell is recognized by its arguments, which
are written down with every background command: after a restart of the daemon it is found where it was.

What hangs is interrupted as by Ctrl-C. If that does not help, what began with the text is ended by TERM, then by
KILL. If the shell is still not back, a new one takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import msgspec

from runtimes.init.channel import SpawnFailed
from runtimes.init.wire import InitError, Scope, SpawnRequest
from sandboxd import running
from sandboxd.commands import COMMAND_ID_BITS, Command, format_command_id, shown_argv
from sandboxd.failures import CapacityExceeded, CommandNotStarted, Conflict, Failure, InvalidArgument, NotFound
from sandboxd.outlet import opening
from sandboxd.protocol import CommandEnd, CommandParams, ShellEnd, ShellInfo, ShellOpenParams, ShellRunParams
from sandboxd.sandbox import INSIDE_BIN, Sandbox

PROGRAM = f"{INSIDE_BIN}/sandbox-shell"

SHELLS_MAX = 16
"""Of one sandbox."""

READY_DEADLINE_S = 10.0
"""How long a shell may take to answer for the first time."""

ENDING_DEADLINE_S = 2.0
"""From the end of a text that has ended its shell to the news of the latter."""

STATE_BYTES_MAX = 72 * 1024
"""A path and what a shell exports, as ``sandbox-shell`` bounds them."""

ORDERS: tuple[tuple[signal.Signals, float], ...] = (
    (signal.SIGINT, 1.0),
    (signal.SIGTERM, 1.0),
    (signal.SIGUSR1, 2.0),
)
"""What ``sandbox-shell run`` is told, one after the other, and for how many seconds its end is then waited for."""

_LENGTH = struct.Struct("=I")
_OPEN_ARGUMENTS = 4

Follow = Callable[[Command], Coroutine[Any, Any, None]]


class Left(msgspec.Struct, frozen=True):
    """What a text left behind in its shell."""

    cwd: str
    exports: bytes
    """Text that exports everything again; empty if it was too long."""


class Shell:
    """One shell of one sandbox."""

    def __init__(self, sandbox: Sandbox, shell_id: str, program: str, host: Command) -> None:
        self.sandbox = sandbox
        self.id = shell_id
        self.program = program
        self.host = host
        """The command that holds it; another one after a restart."""
        self.opened_at_ms = host.started_at_ms
        self.busy = False
        self.closed = False
        self.text: Command | None = None
        self.left: Left | None = None
        self.interrupted = False
        self.restarted = False
        """Of the text that runs now."""
        self.idle = anyio.Event()

    def info(self) -> ShellInfo:
        """The row of the list."""
        return ShellInfo(
            sandbox=self.sandbox.record.id,
            shell_id=self.id,
            shell=self.program,
            state="busy" if self.busy else "idle",
            cwd=None if self.left is None else self.left.cwd,
            opened_at_ms=self.opened_at_ms,
            command_id=None if self.text is None else format_command_id(self.text.id),
        )


class Shells:
    """The shells of all sandboxes. Keeps what is known of each; what exists is in the tables of commands."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Shell] = {}

    def list(self, sandbox: Sandbox) -> list[Shell]:
        """The shells of a sandbox, the oldest first."""
        found = {}
        for row in sandbox.commands.infos():
            if row.end is None and len(row.argv) == _OPEN_ARGUMENTS and row.argv[:2] == [PROGRAM, "open"]:
                program, shell_id = row.argv[2:]
                shell = self._known.get((sandbox.record.id, shell_id))
                if shell is None:
                    host = sandbox.commands.get(int(row.command_id, 16))
                    shell = self._known[sandbox.record.id, shell_id] = Shell(sandbox, shell_id, program, host)
                found[shell_id] = shell
        for key, shell in list(self._known.items()):
            if shell.host.end is not None and not shell.busy:
                del self._known[key]
            elif shell.sandbox is sandbox:
                found[shell.id] = shell
        return sorted(found.values(), key=lambda shell: shell.opened_at_ms)

    def get(self, sandbox: Sandbox, shell_id: str) -> Shell:
        """Find a shell.

        Raises:
            NotFound: it has ended, or never was.
        """
        for shell in self.list(sandbox):
            if shell.id == shell_id:
                return shell
        raise NotFound(
            f"cannot find shell {shell_id}",
            detail="it has ended, or never was",
            hint=f"sandboxctl session open {sandbox.record.id}",
        )

    async def open(self, sandbox: Sandbox, params: ShellOpenParams) -> Shell:
        """Open a shell, and see that it answers.

        Raises:
            CapacityExceeded: the sandbox has as many as it may, or no process left.
            CommandNotStarted: there is no such shell inside, or it does not answer.
        """
        running.require_running(sandbox)
        running.check_env(params.env)
        if len(self.list(sandbox)) >= SHELLS_MAX:
            raise CapacityExceeded(
                f"cannot open more than {SHELLS_MAX} shells in one sandbox",
                hint=f"sandboxctl session close {sandbox.record.id} SHELL",
            )
        shell_id = format_command_id(random.getrandbits(COMMAND_ID_BITS))
        host = await _start_host(sandbox, params.shell, shell_id, env=params.env, cwd=params.cwd)
        shell = self._known[sandbox.record.id, shell_id] = Shell(sandbox, shell_id, params.shell, host)
        try:
            async with _busy(shell):
                if not await _quietly(shell, ":"):
                    raise CommandNotStarted(
                        f"cannot execute {'bash or sh' if params.shell == 'auto' else params.shell!r}",
                        detail="ENOENT: it is not there" if host.end is not None else "it does not answer as a shell",
                        hint="give a shell that the image has",
                    )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.close(shell)
            raise
        return shell

    async def close(self, shell: Shell) -> None:
        """End a shell, what it evaluates, and all that it left running. Idempotent."""
        shell.closed = True
        await shell.sandbox.commands.kill(shell.host)
        self._known.pop((shell.sandbox.record.id, shell.id), None)

    async def run(self, shell: Shell, params: ShellRunParams, follow: Follow) -> ShellEnd:
        """Let a shell evaluate a text, and wait until it is ready again, or replaced.

        Args:
            shell: Which.
            params: The text, and how long it may take.
            follow: Given the text's command once it runs, beside the wait.

        Raises:
            Conflict: it evaluates another one.
            CapacityExceeded: the sandbox has no process left.
        """
        running.require_running(shell.sandbox)
        if "\0" in params.text:
            raise InvalidArgument("cannot evaluate a text with a NUL")
        timeout_s = None if params.timeout is None else running.seconds(params.timeout, option="--timeout")
        async with _busy(shell):
            return await _run(shell, params.text, timeout_s, follow)

    async def interrupt(self, shell: Shell) -> tuple[bool, bool]:
        """End what a shell evaluates, if need be with the shell; wait until it can be used again.

        Returns:
            Whether there was something to end, and whether the shell is another one now.
        """
        text = shell.text
        if text is None or text.ended.is_set():
            return False, False
        shell.interrupted = True
        idle = shell.idle
        await _order(shell, text)
        await idle.wait()
        return True, shell.restarted


@contextlib.asynccontextmanager
async def _busy(shell: Shell) -> AsyncIterator[None]:
    if shell.busy:
        raise Conflict(
            f"cannot evaluate two texts in shell {shell.id} at once",
            detail="it is busy",
            hint=f"wait, or sandboxctl session interrupt {shell.sandbox.record.id} {shell.id}",
        )
    shell.busy = True
    shell.interrupted = shell.restarted = False
    shell.idle = anyio.Event()
    try:
        yield
    finally:
        shell.busy = False
        shell.idle.set()


async def _start_host(
    sandbox: Sandbox, program: str, shell_id: str, *, env: dict[str, str], cwd: str | None
) -> Command:
    params = CommandParams(
        sandbox=sandbox.record.id, argv=[PROGRAM, "open", program, shell_id], env=env, cwd=cwd, stdio="null"
    )
    host, _ = await running.start(sandbox, params, (), keep=True)
    return host


async def _run(shell: Shell, text: str, timeout_s: float | None, follow: Follow) -> ShellEnd:
    command, ours = await _start_text(shell, text)
    shell.text = command
    try:
        with ours:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow, command)
                end, left = await _end_of_text(shell, command, ours, text, timeout_s)
    finally:
        shell.text = None
        shell.sandbox.commands.release(command)
    # Shielded, or a caller that goes away now would leave nobody to put a new shell in the place of a lost one.
    with anyio.CancelScope(shield=True):
        settled = await _settle(shell, end, left)
    return settled  # noqa: RET504  (a scope may swallow, says the type checker)


async def _start_text(shell: Shell, text: str) -> tuple[Command, socket.socket]:
    """Start the command through which the shell is given a text, and the socket that it reads it from."""
    sandbox = shell.sandbox
    request = SpawnRequest(
        command_id=sandbox.commands.new_id(),
        argv=[PROGRAM.encode(), b"run", str(shell.host.pid).encode()],
        env=[],
        cwd=b"/",
    )
    ended = anyio.Event()
    ours, theirs = socket.socketpair()
    try:
        with (
            theirs,
            opening(
                sandbox.spools,
                request.command_id,
                ended=ended,
                user=sandbox.record.user,
                merge=False,
                stdin=False,
                pty=False,
            ) as opened,
        ):
            passed = (theirs.fileno(), *opened.passed[1:])
            command, _ = await sandbox.commands.start(
                request, passed, background=False, timeout_s=None, grace_s=0, ended=ended
            )
            command.argv = shown_argv([shell.program, text])
            sandbox.commands.take_outlet(command, opened.outlet)
    except BaseException as error:
        ours.close()
        sandbox.drop_command(request.command_id)
        if isinstance(error, SpawnFailed):
            raise running.not_started(error, request) from None
        raise
    ours.setblocking(False)
    return command, ours


async def _end_of_text(
    shell: Shell, command: Command, ours: socket.socket, text: str, timeout_s: float | None
) -> tuple[CommandEnd, Left | None]:
    try:
        with anyio.move_on_after(timeout_s):
            await _send(ours, text.encode())
            await command.ended.wait()
        if not command.ended.is_set():
            command.timed_out = shell.interrupted = True
            await _order(shell, command)
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            shell.interrupted = True
            await _order(shell, command)
            await _settle(shell, await shell.sandbox.commands.wait(command), _left(ours))
        raise
    return await shell.sandbox.commands.wait(command), _left(ours)


async def _send(ours: socket.socket, data: bytes) -> None:
    """Hand over the text. Whoever ends before it has read all of it has an end that says more."""
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(ours, data)
        ours.shutdown(socket.SHUT_WR)


async def _order(shell: Shell, command: Command) -> None:
    """End a text by what it takes; the shell with it, if nothing less helps."""
    commands = shell.sandbox.commands
    for number, patience_s in ORDERS:
        with contextlib.suppress(InitError, Conflict):
            await commands.signal(command, number, Scope.MAIN)
        with anyio.move_on_after(patience_s):
            await command.ended.wait()
        if command.ended.is_set():
            return
    await commands.kill(shell.host)
    await commands.kill(command)


def _left(ours: socket.socket) -> Left | None:
    """What the text left behind. Said by a process inside, so it may be anything."""
    data = b""
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while len(data) <= STATE_BYTES_MAX and (more := ours.recv(STATE_BYTES_MAX)):
            data += more
    if len(data) < _LENGTH.size or len(data) > STATE_BYTES_MAX:
        return None
    (length,) = _LENGTH.unpack_from(data)
    cwd, exports = data[_LENGTH.size :][:length], data[_LENGTH.size + length :]
    if not cwd.startswith(b"/") or b"\0" in cwd + exports:
        return None
    return Left(cwd=cwd.decode(errors="replace"), exports=exports)


async def _settle(shell: Shell, end: CommandEnd, left: Left | None) -> ShellEnd:
    """Judge the end of a text, and see to it that there is a shell for the next one."""
    ended, restored = False, False
    if end.exit_code is None:
        with anyio.move_on_after(ENDING_DEADLINE_S):
            await shell.host.ended.wait()
        of_host = shell.host.end
        if shell.closed:
            ended = True
        elif of_host is not None and of_host.exit_code is not None and not shell.interrupted:
            ended = True
            end = msgspec.structs.replace(
                end,
                exit_code=of_host.exit_code,
                signal=None,
                status="oom" if end.oom_kills and of_host.exit_code else of_host.status,
            )
            await shell.sandbox.commands.kill(shell.host)
        else:
            ended, restored = await _replace(shell)
            if of_host is not None and of_host.signal is not None and not shell.interrupted:
                status = "oom" if end.oom_kills else "signaled"
                end = msgspec.structs.replace(end, signal=of_host.signal, status=status)
    else:
        shell.left = left or shell.left
    if shell.interrupted and end.status != "timeout":
        end = msgspec.structs.replace(end, status="killed")
    return ShellEnd(
        **{**msgspec.structs.asdict(end), "cpu_ms": None, "memory_bytes_peak": None},
        shell_id=shell.id,
        ended=ended,
        interrupted=shell.interrupted,
        restarted=shell.restarted,
        restored=restored,
        cwd=None if shell.left is None else shell.left.cwd,
    )


async def _replace(shell: Shell) -> tuple[bool, bool]:
    """Put a new shell in the place of one that is lost.

    Returns:
        Whether there is none after all, and whether the new one has what was exported and the working directory.
    """
    sandbox = shell.sandbox
    try:
        await sandbox.commands.kill(shell.host)
        shell.host = await _start_host(sandbox, shell.program, shell.id, env={}, cwd=None)
        before, restoring = shell.left, ":"
        if before is not None:
            exports = before.exports.decode(errors="surrogateescape")
            restoring = f"{exports}\n\\command cd -- {shlex.quote(before.cwd)}"
        succeeded = await _quietly(shell, restoring)
    except (Failure, InitError):
        return True, False
    shell.restarted = shell.host.end is None
    return not shell.restarted, shell.restarted and succeeded and before is not None and bool(before.exports)


async def _quietly(shell: Shell, text: str) -> bool:
    """Let a shell evaluate a text of ours; whether it did so, with success."""
    command, ours = await _start_text(shell, text)
    commands = shell.sandbox.commands
    end = None
    try:
        with ours, anyio.move_on_after(READY_DEADLINE_S):
            await _send(ours, text.encode(errors="surrogateescape"))
            end = await commands.wait(command)
            shell.left = _left(ours) or shell.left
        return end is not None and end.exit_code == 0
    finally:
        with anyio.CancelScope(shield=True):
            if not command.ended.is_set():
                await commands.kill(command)
        commands.release(command)
