"""What engines say of our containers, as it happens: whatever was done to one behind our back is looked at at once.

What ends is noticed without them, for its init falls silent. They tell the rest: paused, let go on, started again,
and removed while it was stopped. An event says only that it is time to look: what is written down, and said, is what
the engine answers then. It may come late, after whatever we did next, and so accuses nobody: somebody else did
something where a container is not as we left it. What happened while an engine told nothing, because it was stopped
and started again, say, a sweep finds as soon as it answers.

An engine is followed while it has sandboxes: a follower is a process of some 5 MB.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import anyio
from anyio import sleep

from runtimes.engine import Engine
from runtimes.errors import RuntimeFailure
from runtimes.model import ContainerEvent, Happening
from sandboxd.background import Background
from sandboxd.engines import EngineRoom
from sandboxd.lifecycle import State
from sandboxd.manager import Manager
from sandboxd.sandbox import Sandbox

logger = logging.getLogger(__name__)

PAUSE_S_MIN, PAUSE_S_MAX = 1.0, 300.0
"""Before an engine is followed again that ended it: twice as long each time."""
STEADY_S = 60.0
"""Who was followed for so long is taken for one that can be."""

_NEWS: dict[Happening, frozenset[State]] = {
    Happening.STARTED: frozenset({State.STOPPED, State.BROKEN, State.LOST}),
    Happening.ENDED: frozenset({State.RUNNING, State.PAUSED, State.BROKEN}),
    Happening.PAUSED: frozenset({State.RUNNING, State.BROKEN}),
    Happening.RESUMED: frozenset({State.PAUSED}),
    Happening.REMOVED: frozenset({State.RUNNING, State.PAUSED, State.STOPPED, State.BROKEN}),
}
"""The states in which something that happens may be news; in any other we did it, or know of it."""


class EngineEvents:
    """Follows the engines of one daemon.

    Args:
        sweep: Looks at everything, where it is not known what was missed. Raises nothing.
    """

    def __init__(
        self, manager: Manager, engines: EngineRoom, background: Background, sweep: Callable[[], Awaitable[None]]
    ) -> None:
        self._manager = manager
        self._engines = engines
        self._background = background
        self._sweep = sweep
        self._changed = anyio.Event()
        manager.watchers.append(self._on_changed)

    def _on_changed(self, _: Sandbox) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Follow every engine that has sandboxes, for as long as it has. Never ends."""
        followed: dict[str, anyio.CancelScope] = {}
        async with anyio.create_task_group() as tasks:
            while True:
                self._changed = anyio.Event()
                wanted = {sandbox.record.engine for sandbox in self._manager.all()}
                for engine in self._engines.usable():
                    name = engine.name.value
                    if name in wanted and name not in followed:
                        followed[name] = anyio.CancelScope()
                        tasks.start_soon(self._follow, engine, followed[name])
                for name in followed.keys() - wanted:
                    followed.pop(name).cancel()
                await self._changed.wait()

    async def _follow(self, engine: Engine, scope: anyio.CancelScope) -> None:
        pause_s = PAUSE_S_MIN
        missed = False
        with scope:
            while True:
                began_s = time.monotonic()
                try:
                    if missed:
                        await engine.ping()
                        self._background.start(self._sweep)
                    await engine.follow(owner=self._manager.owner, told=self._on_event)
                except RuntimeFailure as error:
                    logger.info("%s; sweeps go on, and it is tried again in %g s", error, pause_s)
                if time.monotonic() - began_s >= STEADY_S:
                    pause_s = PAUSE_S_MIN
                missed = True
                await sleep(pause_s)
                pause_s = min(pause_s * 2, PAUSE_S_MAX)

    def _on_event(self, event: ContainerEvent) -> None:
        for sandbox in self._manager.all():
            if sandbox.record.container_id == event.container_id:
                self._background.start(self._look, sandbox, event.happening)

    async def _look(self, sandbox: Sandbox, happening: Happening) -> None:
        async with sandbox.lock:
            # Whoever had the lock may have done it, and has written it down by now.
            if sandbox.record.slot:
                if happening is Happening.PAUSED:
                    self._manager.on_slot_lost(sandbox)
                return
            before = sandbox.record.state
            if before not in _NEWS[happening]:
                return
            # What is out of reach may have got there by what we did.
            settled = before is not State.BROKEN
            why = f"its container was {happening.value}, and not by sandboxd"
            await self._manager.look(sandbox, why=why if settled else "its container runs")
            # What is condemned meanwhile is removed by us, and that is no news of its container.
            if settled and sandbox.record.state not in (before, State.REMOVING):
                logger.info("%s is %s: %s", sandbox.record.id, sandbox.record.state.value, why)
