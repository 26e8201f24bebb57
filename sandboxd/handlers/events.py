"""``events/*``."""

from __future__ import annotations

from sandboxd import protocol
from sandboxd.connection import Context
from sandboxd.events import EventLog
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.protocol import EventInfo, EventsLost

EVENT, LOST, BEGUN = "events/event", "events/lost", "events/begun"


class EventHandlers:
    """Telling what happens."""

    def __init__(self, log: EventLog, manager: Manager) -> None:
        self._log = log
        self._manager = manager

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {"events/subscribe": self.subscribe}

    async def subscribe(self, params: protocol.EventsParams, context: Context) -> protocol.EventsEnd:
        """Send events as fast as the peer takes them, and say which it missed."""
        known = None if params.sandbox is None else self._manager.id_of(params.sandbox)
        since = self._log.oldest_seq - 1 if params.since is None else params.since
        cursor = min(since + 1, self._log.next_seq)
        context.notify(BEGUN, protocol.EventsBegun(next_seq=cursor))
        while True:
            items, cursor = self._log.take(cursor)
            for item in items:
                match item:
                    case EventsLost():
                        await context.deliver(LOST, item)
                    case EventInfo() if _wanted(item, params, known):
                        await context.deliver(EVENT, item)
                    case EventInfo():
                        pass
            if items:
                continue
            if not params.follow:
                return protocol.EventsEnd(last_seq=cursor - 1)
            await self._log.more(cursor)


def _wanted(event: EventInfo, params: protocol.EventsParams, known: str | None) -> bool:
    """Whether it was asked for; ``known`` is the id of the sandbox that was, if it is there still."""
    if params.kinds and event.kind not in params.kinds:
        return False
    if known is not None:
        return event.sandbox == known
    return params.sandbox in {None, event.sandbox, event.name}
