"""What the service manager is told while the daemon runs: how it is, that it is alive, and that it needs more time.

The watchdog is fed by a task of the loop that serves, and only after our own door was knocked at: a connection to our
own socket, and a request that is answered. A loop that hangs, a door that lets nobody in and a process without
descriptors all miss it. What a new start would not mend, such as a full disk or an engine that is down, is no reason.

Without a service manager nobody is told anything, and nothing of this runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import anyio
import anyio.abc

from sandboxd import framing, jsontext
from sandboxd.activation import Activation

logger = logging.getLogger(__name__)

STATUS_PERIOD_S = 1.0
"""A status that changes is sent at most this often: a burst of creates is one line."""

EXTENSION_S = 30.0
EXTENSION_PERIOD_S = 10.0
"""While it starts or stops, and as long as its loop turns, it is given so much time again and again."""

EXTENDED_S_MAX = 300.0
"""And not for ever: what takes longer has hung somewhere, and then the unit's own limit holds."""

FEEDINGS = 3
"""In the time that the watchdog gives: a third to find out, a third to wait, a third to spare."""

ANSWER_BYTES_MAX = 64 * 1024

_KNOCK = framing.encode(
    jsontext.encode({"jsonrpc": "2.0", "id": 1, "method": "daemon/info", "params": {}}), lines=False
)

_WORTH_SAYING = ("paused", "broken", "lost")


def status_text(states: Sequence[str], warm: int, engines: Sequence[str]) -> str:
    """One line for ``systemctl status``: how many sandboxes there are, and what of them wants a look."""
    parts = [f"{len(states)} sandbox{'' if len(states) == 1 else 'es'}, {states.count('running')} running"]
    parts += [f"{states.count(state)} {state}" for state in _WORTH_SAYING if state in states]
    if warm:
        parts.append(f"{warm} warm")
    return f"{', '.join(parts)}; {' and '.join(engines) or 'no engine'}"


async def answers(path: str) -> bool:
    """Whether somebody behind the socket lets us in and answers; whoever asks bounds the time."""
    try:
        async with await anyio.connect_unix(path) as stream:
            await stream.send(_KNOCK)
            return bool(await stream.receive(ANSWER_BYTES_MAX))
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError) as error:
        logger.debug("cannot reach our own socket: %s", error)
        return False


class Supervision:
    """Keeps the service manager informed.

    Args:
        activation: Whom to tell.
        path: Our own socket.
        describe: Says how the daemon is, in one line.
    """

    def __init__(self, activation: Activation, path: str, describe: Callable[[], str]) -> None:
        self._activation = activation
        self._path = path
        self._describe = describe
        self._changed = anyio.Event()
        self._serving = False

    def note(self) -> None:
        """What the status says may have changed. Never blocks."""
        self._changed.set()

    def ready(self, tasks: anyio.abc.TaskGroup) -> None:
        """It serves: say so, and from now on how it is, and that it is alive."""
        self._serving = True
        self._activation.tell(f"READY=1\nSTATUS={self._describe()}")
        if self._activation.listens:
            tasks.start_soon(self._keep_status)
        if self._activation.watchdog_s is not None:
            tasks.start_soon(self._feed, self._activation.watchdog_s / FEEDINGS)

    @contextlib.asynccontextmanager
    async def busy(self, state: str, status: str) -> AsyncIterator[None]:
        """Ask for patience, for as long as it is entered and the loop turns.

        Args:
            state: What to say first, such as ``STOPPING=1``; may be empty.
            status: What it is busy with.
        """
        self._serving = False
        self._activation.tell("\n".join([*([state] if state else []), f"STATUS={status}"]))
        async with anyio.create_task_group() as tasks:
            if self._activation.listens:
                tasks.start_soon(self._extend)
            yield
            tasks.cancel_scope.cancel()

    @contextlib.contextmanager
    def reloading(self) -> Iterator[None]:
        """Say that settings are read again, and after it that it is ready, whatever came of it.

        Nothing before it serves and once it stops: to be ready would be something else than what it was then.
        """
        if not self._serving:
            yield
            return
        self._activation.tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=reading settings")
        try:
            yield
        finally:
            self._activation.tell(f"READY=1\nSTATUS={self._describe()}")

    async def _extend(self) -> None:
        with anyio.move_on_after(EXTENDED_S_MAX):
            while True:
                self._activation.tell(f"EXTEND_TIMEOUT_USEC={int(EXTENSION_S * 1e6)}")
                await anyio.sleep(EXTENSION_PERIOD_S)

    async def _keep_status(self) -> None:
        told = self._describe()
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            status = self._describe()
            if status != told and self._serving:
                self._activation.tell(f"STATUS={status}")
                told = status
            await anyio.sleep(STATUS_PERIOD_S)

    async def _feed(self, period_s: float) -> None:
        was_alive = True
        while True:
            alive = False
            with anyio.move_on_after(period_s):
                alive = await answers(self._path)
            if not self._serving:
                return
            if alive:
                self._activation.tell("WATCHDOG=1")
            elif was_alive:
                logger.error("cannot answer on %s: the service manager is not told that all is well", self._path)
            was_alive = alive
            await anyio.sleep(period_s)
