"""Telling engines which limits their containers have by now.

A claim writes limits straight into the control group, where an engine would take a hundred times as long. What the
engine has written down is then the slot's: its inspect shows that, and that is what it writes at a start, or systemd
at a reload where it keeps the groups. So the engine is told later, one container at a time, when nobody waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import anyio

from runtimes.engine import Engine
from runtimes.errors import RuntimeFailure
from runtimes.model import EngineInfo, Limits
from sandboxd.failures import Failure
from sandboxd.lifecycle import State
from sandboxd.sandbox import Sandbox, container_id_of

logger = logging.getLogger(__name__)

TELL_AFTER_S = 5.0
"""Many sandboxes are gone by then, and cost no call at all; and claims that come together are served first."""


class EngineRecords:
    """What the engines of one daemon have yet to be told.

    Args:
        engine_of: The engine that runs a sandbox; raises a failure when it cannot be used.
        passable: The limits that an engine can be told.
    """

    def __init__(
        self, engine_of: Callable[[Sandbox], Engine], passable: Callable[[Limits, EngineInfo], Limits]
    ) -> None:
        self._engine_of = engine_of
        self._passable = passable
        self._due: dict[str, tuple[Sandbox, float]] = {}
        self._woken = anyio.Event()

    def stale(self, sandbox: Sandbox) -> None:
        """Have its engine told, some time from now. Returns at once."""
        self._due.pop(sandbox.record.id, None)
        self._due[sandbox.record.id] = (sandbox, time.monotonic() + TELL_AFTER_S)
        self._woken.set()

    async def run(self) -> None:
        """Tell, for as long as the daemon runs."""
        while True:
            while self._due:
                sandbox_id, (_, due_s) = next(iter(self._due.items()))
                await anyio.sleep(max(0.0, due_s - time.monotonic()))
                found = self._due.pop(sandbox_id, None)
                if found is not None:
                    await self._tell(found[0])
            self._woken = anyio.Event()
            await self._woken.wait()

    async def _tell(self, sandbox: Sandbox) -> None:
        """Under its lock, so that no update comes in between; but not where others want that lock."""
        if sandbox.lock.locked():
            self.stale(sandbox)
            return
        async with sandbox.lock:
            if sandbox.record.state is not State.RUNNING:
                # What is resumed or started comes here again, and what is removed needs nothing.
                return
            try:
                engine = self._engine_of(sandbox)
                limits = self._passable(sandbox.record.limits, engine.info)
                with anyio.CancelScope(shield=True):
                    await engine.update(container_id_of(sandbox), limits)
            except (RuntimeFailure, Failure) as error:
                logger.warning("cannot tell the engine the limits of %s: %s", sandbox.record.id, error)
