"""The ring of events: numbered, bounded, and honest about what it no longer has."""

from __future__ import annotations

import itertools

import anyio
import pytest

from sandboxd.events import BLOCK, TAKEN_MAX, EventLog, kind_of
from sandboxd.failures import Failure
from sandboxd.lifecycle import Event, State
from sandboxd.protocol import EventInfo, EventsLost


def log(kept_max: int = 8, first: int = 1) -> EventLog:
    numbers = itertools.count(first, BLOCK)
    return EventLog(lambda _: next(numbers), kept_max=kept_max)


def publish(events: EventLog, count: int) -> None:
    for number in range(count):
        events.publish("created", f"sb-{number}", None, {})


def all_from(events: EventLog, cursor: int) -> list[EventInfo | EventsLost]:
    taken: list[EventInfo | EventsLost] = []
    while True:
        items, cursor = events.take(cursor)
        if not items:
            return taken
        taken += items


def test_events_are_numbered_and_replayed_from_any_number() -> None:
    events = log()
    publish(events, 5)
    assert [event.seq for event in all_from(events, 1) if isinstance(event, EventInfo)] == [1, 2, 3, 4, 5]
    assert [event.seq for event in all_from(events, 4) if isinstance(event, EventInfo)] == [4, 5]
    assert all_from(events, 6) == []


def test_what_is_not_kept_any_longer_is_said() -> None:
    """A subscriber that was too slow must not believe that nothing happened."""
    events = log(kept_max=8)
    publish(events, 20)
    lost, *rest = all_from(events, 3)
    assert lost == EventsLost(first_seq=3, last_seq=12)
    assert [event.seq for event in rest if isinstance(event, EventInfo)] == list(range(13, 21))


def test_a_subscriber_of_a_former_daemon_learns_that_it_missed_something() -> None:
    """Numbers go on after a restart, so that its place is known to be in the past."""
    events = log(first=BLOCK + 1)
    assert all_from(events, 7) == [EventsLost(first_seq=7, last_seq=BLOCK)]


def test_a_portion_is_bounded() -> None:
    events = log(kept_max=3 * TAKEN_MAX)
    publish(events, 2 * TAKEN_MAX + 1)
    items, cursor = events.take(1)
    assert (len(items), cursor) == (TAKEN_MAX, TAKEN_MAX + 1)
    assert len(all_from(events, 1)) == 2 * TAKEN_MAX + 1


def test_a_block_that_is_used_up_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another daemon may have taken numbers meanwhile; they may skip, and never come again."""
    monkeypatch.setattr("sandboxd.events.BLOCK", 3)
    firsts = iter([1, 100, 200])
    events = EventLog(lambda _: next(firsts))
    publish(events, 7)
    assert [event.seq for event in all_from(events, 1) if isinstance(event, EventInfo)] == [
        1,
        2,
        3,
        100,
        101,
        102,
        200,
    ]


def test_a_journal_that_cannot_be_written_stops_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandboxd.events.BLOCK", 2)

    def reserve(count: int, calls: itertools.count[int] = itertools.count()) -> int:  # noqa: B008 - one for all calls
        if next(calls):
            raise Failure("cannot write to the journal")
        return 1

    events = EventLog(reserve)
    publish(events, 5)
    assert [event.seq for event in all_from(events, 1) if isinstance(event, EventInfo)] == [1, 2, 3, 4, 5]


@pytest.mark.anyio
async def test_whoever_waits_is_woken_by_the_next_event() -> None:
    events = log()
    woken = []

    async def wait() -> None:
        await events.more(1)
        woken.append(events.take(1)[0])

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(wait)
        await anyio.lowlevel.checkpoint()
        assert woken == []
        publish(events, 1)
    assert [len(items) for items in woken] == [1, 1, 1]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_every_change_that_leads_somewhere_has_a_word() -> None:
    """Started, resumed and found again are three things, though each is an adoption."""
    assert kind_of(State.STARTING, Event.ADOPTED) == "started"
    assert kind_of(State.PAUSED, Event.ADOPTED) == "resumed"
    assert kind_of(State.RUNNING, Event.ADOPTED) == "adopted"
    assert kind_of(State.BROKEN, Event.ADOPTED) == "recovered"
    assert kind_of(State.PAUSED, Event.PAUSE) is None, "it was paused already"
    assert kind_of(State.STOPPED, Event.START) is None, "started is told when it has"
    assert kind_of(State.CREATING, Event.FILLED) is None, "a slot is nobody's business"
    assert kind_of(State.WARM, Event.RESERVE) is None, "created is told when it has been claimed"
    for event in set(Event) - {Event.START, Event.FILLED, Event.RESERVE}:
        assert kind_of(State.RUNNING, event) is not None
