"""``commands/*``."""

from __future__ import annotations

import os
from collections.abc import Mapping

import anyio
import msgspec

from runtimes.init.wire import PtySize, Scope
from runtimes.model import EngineName
from sandboxd import health, protocol, running
from sandboxd.commands import Command, format_command_id
from sandboxd.connection import Context
from sandboxd.engines import EngineRoom
from sandboxd.failures import CapacityExceeded, Conflict, InvalidArgument, Unsupported
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.outlet import Outlet, OutputName
from sandboxd.sandbox import Sandbox
from sandboxd.spool_plan import Chunk, Dropped, Truncated
from sandboxd.timings import Timings

STARTED = "commands/started"
OUTPUT = "commands/output"

_SCOPES = {"process": Scope.MAIN, "group": Scope.GROUP, "tree": Scope.TREE}


class CommandHandlers:
    """Running commands, and reaching the ones that run."""

    def __init__(self, manager: Manager, engines: EngineRoom) -> None:
        self._manager = manager
        self._engines = engines

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "commands/run": self.run,
            "commands/start": self.start,
            "commands/wait": self.wait,
            "commands/signal": self.signal,
            "commands/kill": self.kill,
            "commands/connect": self.connect,
            "commands/logs": self.logs,
            "commands/send_stdin": self.send_input,
            "commands/close_stdin": self.close_input,
            "commands/resize": self.resize,
            "commands/list": self.list,
        }

    async def run(self, params: protocol.CommandParams, context: Context) -> protocol.CommandEnd:
        """Run a command to its end."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        descriptors = context.take_descriptors()
        try:
            if params.user is not None:
                engine = self._engines.get(EngineName(sandbox.record.engine))
                return await running.run_as_other_user(
                    engine, sandbox, params, descriptors, timings, user=params.user
                )
            keep = params.on_disconnect == "keep"
            command, pty_fd = await _start(sandbox, params, descriptors, keep=keep)
        finally:
            _close(descriptors)
        refused_before = sandbox.forks_refused
        timings.mark("spawn")
        masters = () if pty_fd is None else (pty_fd,)
        context.notify(STARTED, _started(sandbox, command.id, command.pid, timings), masters)
        wait = sandbox.commands.wait if keep else sandbox.commands.wait_or_kill
        try:
            if params.follow and command.outlet is not None:
                async with anyio.create_task_group() as following:
                    following.start_soon(follow, sandbox, command, context, {})
                    end = await wait(command)
            else:
                end = await wait(command)
        finally:
            if not keep:
                sandbox.commands.release(command)
        timings.mark("command")
        end = await health.explained(sandbox, end, refused_before=refused_before)
        return msgspec.structs.replace(end, timings_ms=timings.as_dict())

    async def start(self, params: protocol.CommandParams, context: Context) -> protocol.CommandStarted:
        """Start a command in the background."""
        timings = Timings()
        if params.pty is not None and params.stdio != "spool":
            raise InvalidArgument(
                "cannot start a terminal in the background",
                detail="nobody would hold its other end",
                hint='use commands/run, or stdio "spool"',
            )
        if params.user is not None:
            raise Unsupported(
                "cannot start a command of another user in the background", hint="leave out -d or --user"
            )
        sandbox = self._manager.get(params.sandbox)
        descriptors = context.take_descriptors()
        try:
            command, _ = await _start(sandbox, params, descriptors, keep=True)
        finally:
            _close(descriptors)
        timings.mark("spawn")
        return _started(sandbox, command.id, command.pid, timings)

    async def wait(self, params: protocol.CommandRef, _: Context) -> protocol.CommandEnd:
        """Wait for an end."""
        sandbox = self._manager.get(params.sandbox)
        end = await sandbox.commands.wait(sandbox.commands.get(int(params.command_id, 16)))
        return await health.explained(sandbox, end)

    async def signal(self, params: protocol.CommandSignalParams, _: Context) -> protocol.Acknowledged:
        """Send a signal."""
        commands = self._awake(params.sandbox).commands
        await commands.signal(commands.get(int(params.command_id, 16)), params.signal, _SCOPES[params.scope])
        return protocol.Acknowledged()

    async def kill(self, params: protocol.CommandRef, _: Context) -> protocol.CommandEnd:
        """Kill a tree."""
        commands = self._awake(params.sandbox).commands
        return await commands.kill(commands.get(int(params.command_id, 16)))

    def _awake(self, reference: str) -> Sandbox:
        """A sandbox whose init can answer: of one that is paused it would be waited for in vain."""
        sandbox = self._manager.get(reference)
        running.require_awake(sandbox)
        return sandbox

    async def connect(self, params: protocol.CommandConnectParams, context: Context) -> protocol.CommandEnd:
        """Follow output, and wait for the end."""
        sandbox = self._manager.get(params.sandbox)
        command = sandbox.commands.get(int(params.command_id, 16))
        running.outlet_of(command)
        offsets = {"stdout": params.stdout_offset, "stderr": params.stderr_offset}
        async with anyio.create_task_group() as following:
            following.start_soon(follow, sandbox, command, context, offsets)
            end = await sandbox.commands.wait(command)
        return await health.explained(sandbox, end)

    async def logs(self, params: protocol.CommandLogsParams, _: Context) -> protocol.CommandLogs:
        """Read kept output."""
        command = self._manager.get(params.sandbox).commands.get(int(params.command_id, 16))
        spool = running.outlet_of(command).spool(params.stream)
        total = spool.bytes_written
        offset = max(0, total - params.length) if params.offset is None else params.offset
        excerpt = await spool.read_range(offset, params.length)
        chunks = [item for item in excerpt.items if isinstance(item, Chunk)]
        return protocol.CommandLogs(
            offset=chunks[0].offset if chunks else excerpt.end,
            data=b"".join(chunk.data for chunk in chunks),
            dropped=[
                protocol.ByteRange(start=item.start, end=item.end)
                for item in excerpt.items
                if isinstance(item, Dropped)
            ],
            bytes_total=total,
            ended=command.end is not None,
        )

    async def send_input(self, params: protocol.CommandInputParams, _: Context) -> protocol.Acknowledged:
        """Write to a stdin or a terminal."""
        await self._outlet(params.sandbox, params.command_id).send(params.data)
        return protocol.Acknowledged()

    async def close_input(self, params: protocol.CommandRef, _: Context) -> protocol.Acknowledged:
        """End a stdin."""
        self._outlet(params.sandbox, params.command_id).end_input()
        return protocol.Acknowledged()

    async def resize(self, params: protocol.CommandResizeParams, _: Context) -> protocol.Acknowledged:
        """Change a terminal's size."""
        sandbox = self._manager.get(params.sandbox)
        command = sandbox.commands.get(int(params.command_id, 16))
        await running.resize(sandbox, command, PtySize(params.size.rows, params.size.cols))
        return protocol.Acknowledged()

    def _outlet(self, sandbox: str, command_id: str) -> Outlet:
        return running.outlet_of(self._manager.get(sandbox).commands.get(int(command_id, 16)))

    async def list(self, params: protocol.CommandListParams, _: Context) -> protocol.CommandList:
        """The rows."""
        commands = self._manager.get(params.sandbox).commands
        await commands.count_written()
        return protocol.CommandList(commands=commands.infos())


async def _start(
    sandbox: Sandbox, params: protocol.CommandParams, descriptors: tuple[int, ...], *, keep: bool
) -> tuple[Command, int | None]:
    try:
        return await running.start(sandbox, params, descriptors, keep=keep)
    except (CapacityExceeded, Conflict) as error:
        health.add_to(error, health.counted(sandbox))
        raise


async def follow(sandbox: Sandbox, command: Command, context: Context, offsets: Mapping[str, int]) -> None:
    """Send ``commands/output`` for all streams of a command, until it has ended and all of it was sent."""
    outlet = running.outlet_of(command)
    async with anyio.create_task_group() as streams:
        for name in outlet.spools:
            streams.start_soon(_follow_one, sandbox, command, outlet, name, offsets.get(name, 0), context)


async def _follow_one(
    sandbox: Sandbox, command: Command, outlet: Outlet, name: OutputName, offset: int, context: Context
) -> None:
    dropped_bytes = 0

    async def tell(at: int, data: bytes = b"") -> None:
        output = protocol.CommandOutput(
            sandbox=sandbox.record.id,
            command_id=format_command_id(command.id),
            stream=name,
            offset=at,
            data=data,
            dropped_bytes=dropped_bytes,
        )
        await context.deliver(OUTPUT, output)

    with outlet.spool(name).follow(offset, until_ended=outlet.finished) as items:
        async for item in items:
            match item:
                case Dropped():
                    dropped_bytes += item.end - item.start
                    continue
                case Chunk():
                    await tell(item.offset, item.data)
                case Truncated():
                    await tell(item.after)
            dropped_bytes = 0
        if dropped_bytes:
            await tell(items.offset)


def _started(sandbox: Sandbox, command_id: int, pid: int | None, timings: Timings) -> protocol.CommandStarted:
    return protocol.CommandStarted(
        sandbox=sandbox.record.id,
        command_id=format_command_id(command_id),
        pid=pid or 0,
        timings_ms=timings.as_dict(),
    )


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
