"""Lets sandboxes in as far as this host has room for them, and keeps the others waiting in order.

``admission`` decides. What is promised is read from the records of the sandboxes that there are, and from the
reservations of those that are being made: a sandbox that is stopped or gone gives its share back by that alone.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable

import anyio
import psutil

from runtimes.quantities import format_bytes, parse_memory
from sandboxd import admission
from sandboxd.admission import Budget, Share, Shortage
from sandboxd.config import SIZE_BYTES_MAX, Config
from sandboxd.failures import CapacityExceeded
from sandboxd.lifecycle import State
from sandboxd.limits import Host
from sandboxd.manager import Manager

LOOK_S = 1.0
"""How often somebody who waits looks whether the host has memory again: nothing tells."""

_COUNTED = (State.RUNNING, State.PAUSED, State.STOPPING, State.STARTING, State.BROKEN)
"""States in which a sandbox has what it was promised. One that is being made has a reservation."""

Progress = Callable[[str, int | None, int | None], None]


class _Waiting:
    def __init__(self, asked: Share) -> None:
        self.asked = asked
        self.changed = anyio.Event()


class Capacity:
    """The room on this host.

    Args:
        manager: Whose sandboxes there are.
        config: How much may be promised.
        host: What there is.
        available_bytes: How much memory is free, or could be made so; for tests.
    """

    def __init__(
        self, manager: Manager, config: Config, host: Host, *, available_bytes: Callable[[], int] | None = None
    ) -> None:
        self._manager = manager
        self._host = host
        self._available_bytes = available_bytes or _available_bytes
        self._reservations: list[Share] = []
        self._queue: list[_Waiting] = []
        self.reconfigure(config)
        manager.watchers.append(lambda _: self._wake())

    def reconfigure(self, config: Config) -> None:
        """Go by these settings from now on; who waits may have room now."""
        self.budget: Budget = admission.budget_of(
            self._host, config.capacity, sandboxes_max=config.daemon.sandboxes_max
        )
        self._reserve_bytes = parse_memory(config.capacity.memory_reserve, bytes_max=SIZE_BYTES_MAX, bytes_min=1)
        self._wake()

    @property
    def available_bytes(self) -> int:
        """How much memory this host has to give."""
        return self._available_bytes()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    @contextlib.asynccontextmanager
    async def admitted(self, asked: Share, *, wait_s: float | None, progress: Progress) -> AsyncIterator[None]:
        """Have room for so much, for as long as it is entered; then the sandbox's own record counts.

        Args:
            asked: How much.
            wait_s: How long to wait for it; None: not at all.
            progress: Told of the place in the queue, and of how many there are.

        Raises:
            CapacityExceeded: there is none, or none in time.
        """
        if asked == Share():
            yield
            return
        shortage = self._shortage(asked)
        if shortage is None and self._queue:
            shortage = Shortage(
                detail=f"{len(self._queue)} others wait for room",
                hint="wait as well: --wait-capacity 30s",
                for_ever=False,
            )
        if shortage is not None:
            if wait_s is None or shortage.for_ever:
                raise _exceeded(shortage)
            await self._wait(asked, wait_s, progress)
        self._reservations.append(asked)
        try:
            yield
        finally:
            self._reservations.remove(asked)
            self._wake()

    async def _wait(self, asked: Share, wait_s: float, progress: Progress) -> None:
        """Wait for a turn and for room. First come, first served."""
        waiting = _Waiting(asked)
        self._queue.append(waiting)
        told = 0
        try:
            with anyio.move_on_after(wait_s):
                while (place := self._queue.index(waiting) + 1) > 1 or self._shortage(asked) is not None:
                    if place != told:
                        progress("waiting for room on this host", place, len(self._queue))
                        told = place
                    waiting.changed = anyio.Event()
                    with anyio.move_on_after(LOOK_S):
                        await waiting.changed.wait()
                return
        finally:
            self._queue.remove(waiting)
            self._wake()
        shortage = self._shortage(asked)
        raise _exceeded(shortage, waited_s=wait_s)

    def _shortage(self, asked: Share) -> Shortage | None:
        found = admission.shortage(self.budget, self.promised, asked)
        if found is not None or asked.sandboxes == 0:
            return found
        available = self._available_bytes()
        if available >= self._reserve_bytes:
            return None
        return Shortage(
            detail=f"{format_bytes(available)} of this host's memory are available, and "
            f"{format_bytes(self._reserve_bytes)} are kept free",
            hint="sandboxctl stats shows who uses it; or lower capacity.memory_reserve",
            for_ever=False,
        )

    @property
    def promised(self) -> Share:
        """What sandboxes have, and those that are being made will."""
        given = [
            admission.share_of(sandbox.record.limits)
            for sandbox in self._manager.present()
            if sandbox.record.state in _COUNTED
        ]
        return admission.total([*given, *self._reservations])

    def _wake(self) -> None:
        for waiting in self._queue:
            waiting.changed.set()


def _exceeded(shortage: Shortage | None, *, waited_s: float | None = None) -> CapacityExceeded:
    late = "" if waited_s is None else f" within {waited_s:g} s"
    return CapacityExceeded(
        f"cannot have room for this sandbox on this host{late}",
        detail="" if shortage is None else shortage.detail,
        hint="" if shortage is None else shortage.hint,
    )


@functools.lru_cache(maxsize=1)
def _available_bytes_at(_: int) -> int:
    return int(psutil.virtual_memory().available)


def _available_bytes() -> int:
    """Not older than a tenth of a second: a burst of requests needs not look each time."""
    return _available_bytes_at(int(time.monotonic() * 10))
