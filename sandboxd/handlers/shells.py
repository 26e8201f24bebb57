"""``shells/*``."""

from __future__ import annotations

from sandboxd import health, protocol
from sandboxd.commands import Command, format_command_id
from sandboxd.connection import Context
from sandboxd.handlers.commands import STARTED, follow
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.shells import Shell, Shells
from sandboxd.timings import Timings


class ShellHandlers:
    """Shells that keep their state."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._shells = Shells()

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "shells/open": self.open,
            "shells/run": self.run,
            "shells/interrupt": self.interrupt,
            "shells/list": self.list,
            "shells/close": self.close,
        }

    def _get(self, params: protocol.ShellRef | protocol.ShellRunParams) -> Shell:
        return self._shells.get(self._manager.get(params.sandbox), params.shell_id)

    async def open(self, params: protocol.ShellOpenParams, _: Context) -> protocol.ShellInfo:
        """Open."""
        return (await self._shells.open(self._manager.get(params.sandbox), params)).info()

    async def run(self, params: protocol.ShellRunParams, context: Context) -> protocol.ShellEnd:
        """Evaluate a text, and follow what it writes."""
        shell = self._get(params)
        timings = Timings()

        async def follow_it(command: Command) -> None:
            timings.mark("spawn")
            started = protocol.CommandStarted(
                sandbox=shell.sandbox.record.id,
                command_id=format_command_id(command.id),
                pid=command.pid or 0,
                timings_ms=timings.as_dict(),
            )
            context.notify(STARTED, started)
            if params.follow:
                await follow(shell.sandbox, command, context, {})

        end = await self._shells.run(shell, params, follow_it)
        return await health.explained(shell.sandbox, end)

    async def interrupt(self, params: protocol.ShellRef, _: Context) -> protocol.ShellInterrupted:
        """Get it back."""
        interrupted, restarted = await self._shells.interrupt(self._get(params))
        return protocol.ShellInterrupted(interrupted=interrupted, restarted=restarted)

    async def list(self, params: protocol.ShellListParams, _: Context) -> protocol.ShellList:
        """The rows."""
        shells = self._shells.list(self._manager.get(params.sandbox))
        return protocol.ShellList(shells=[shell.info() for shell in shells])

    async def close(self, params: protocol.ShellRef, _: Context) -> protocol.Acknowledged:
        """End it."""
        await self._shells.close(self._get(params))
        return protocol.Acknowledged()
