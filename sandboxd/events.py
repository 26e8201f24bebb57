"""What happens to sandboxes, numbered, for whoever listens.

The last events are kept in a ring. A subscriber is a place in it and nothing else: what it has not taken yet waits
there, whatever it missed because it was too slow, or came too late, it is told as a gap. So a subscriber that reads
nothing costs nothing, and holds up nobody.

Numbers go on over a restart of the daemon: blocks of them are taken from the journal.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable

import anyio

from sandboxd.failures import Failure
from sandboxd.lifecycle import Event, State
from sandboxd.protocol import EventInfo, EventsLost
from sandboxd.timings import now_ms

logger = logging.getLogger(__name__)

KEPT_MAX = 4096
TAKEN_MAX = 256
"""Events in one portion."""
BLOCK = 100_000
"""Numbers that are taken from the journal at once."""

_KINDS = {
    Event.CREATED: "created",
    Event.CLAIMED: "created",
    Event.PAUSE: "paused",
    Event.STOP: "stopping",
    Event.EXITED: "stopped",
    Event.UNREACHABLE: "broken",
    Event.VANISHED: "lost",
    Event.REMOVE: "removing",
}
_ADOPTED_KINDS = {State.STARTING: "started", State.PAUSED: "resumed", State.RUNNING: "adopted"}


def kind_of(before: State, event: Event) -> str | None:
    """What subscribers are told of a change; None: it is none of their business."""
    if event is Event.ADOPTED:
        return _ADOPTED_KINDS.get(before, "recovered")
    if before is State.PAUSED and event is Event.PAUSE:
        return None
    return _KINDS.get(event)


class EventLog:
    """The last events of one daemon.

    Args:
        reserve: Takes so many numbers that were never given out before; returns the first.
        kept_max: How many events are kept.
    """

    def __init__(self, reserve: Callable[[int], int], *, kept_max: int = KEPT_MAX) -> None:
        self._reserve = reserve
        self._kept: deque[EventInfo] = deque(maxlen=kept_max)
        self._changed: anyio.Event | None = None
        """There is one while somebody waits."""
        self._next = reserve(BLOCK)
        self._reserved_to = self._next + BLOCK
        self.gaps = 0
        """How often a subscriber was told that it had missed some."""

    @property
    def next_seq(self) -> int:
        """The number that the next event gets."""
        return self._next

    @property
    def oldest_seq(self) -> int:
        """The number of the oldest event that is kept, or else of the next."""
        return self._kept[0].seq if self._kept else self._next

    def publish(self, kind: str, sandbox: str, name: str | None, data: dict[str, str | int | None]) -> None:
        """Tell everybody; never blocks."""
        if self._next >= self._reserved_to:
            self._reserve_more()
        self._kept.append(
            EventInfo(seq=self._next, at_ms=now_ms(), kind=kind, sandbox=sandbox, name=name, data=data)  # type: ignore[arg-type]
        )
        self._next += 1
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def _reserve_more(self) -> None:
        try:
            self._next = max(self._next, self._reserve(BLOCK))
        except Failure as error:
            # Better numbers that come again after a restart than no events.
            logger.warning("cannot take numbers for events from the journal: %s", error)
        self._reserved_to = self._next + BLOCK

    def take(self, cursor: int) -> tuple[list[EventInfo | EventsLost], int]:
        """What there is from number ``cursor`` on, a portion of it, after the gap if there is one.

        Returns:
            The events, and the cursor for the next portion.
        """
        items: list[EventInfo | EventsLost] = []
        oldest = self.oldest_seq
        if cursor < oldest:
            items.append(EventsLost(first_seq=cursor, last_seq=oldest - 1))
            self.gaps += 1
            cursor = oldest
        if cursor >= self._next:
            return items, cursor
        # Numbers may skip where a new block begins, so a place is looked for and not computed.
        fitting = list(itertools.takewhile(lambda event: event.seq >= cursor, reversed(self._kept)))
        fitting = fitting[: -TAKEN_MAX - 1 : -1]
        items += fitting
        return items, fitting[-1].seq + 1 if fitting else self._next

    async def more(self, cursor: int) -> None:
        """Wait until there is something from number ``cursor`` on."""
        while cursor >= self._next:
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()
