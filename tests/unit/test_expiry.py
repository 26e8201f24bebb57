"""When a sandbox has had its time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import expiry
from sandboxd.expiry import Standing, judge
from sandboxd.failures import InvalidArgument
from sandboxd.lifecycle import Event, State
from sandboxd.records import LifetimeRecord

HOUR_MS = 3_600_000


def standing(**changes: int | None) -> Standing:
    return Standing(**{"left_ms": None, "lifetime_ms": None, "idle_ms": 0, "idle_timeout_ms": None, **changes})  # type: ignore[arg-type]


def test_a_sandbox_without_an_end_is_not_looked_at() -> None:
    verdict = judge(standing(idle_ms=10 * HOUR_MS))
    assert (verdict.due, verdict.warn, verdict.look_in_ms) == (False, False, None)


@pytest.mark.parametrize(
    ("known", "cause"),
    [
        (standing(left_ms=0, lifetime_ms=HOUR_MS), "lifetime"),
        (standing(left_ms=-HOUR_MS, lifetime_ms=1000), "lifetime"),
        (standing(idle_ms=1000, idle_timeout_ms=1000), "idle"),
        (standing(left_ms=10, lifetime_ms=HOUR_MS, idle_ms=2000, idle_timeout_ms=1000), "idle"),
    ],
    ids=["to the point", "while nobody looked", "idle", "idle first"],
)
def test_what_is_over_is_due_for_what_ended_it_first(known: Standing, cause: str) -> None:
    verdict = judge(known)
    assert (verdict.due, verdict.cause) == (True, cause)


def test_the_end_is_announced_half_a_minute_before_or_half_the_time() -> None:
    """Who was given ten seconds wants five of them as a warning, not thirty."""
    assert not judge(standing(left_ms=30_001, lifetime_ms=HOUR_MS)).warn
    assert judge(standing(left_ms=30_000, lifetime_ms=HOUR_MS)).warn
    assert not judge(standing(left_ms=5_001, lifetime_ms=10_000)).warn
    assert judge(standing(left_ms=5_000, lifetime_ms=10_000)).warn


@given(
    left_ms=st.none() | st.integers(-HOUR_MS, 400 * 24 * HOUR_MS),
    lifetime_ms=st.integers(1, 400 * 24 * HOUR_MS),
    idle_ms=st.integers(0, HOUR_MS),
    idle_timeout_ms=st.none() | st.integers(1, 400 * 24 * HOUR_MS),
)
def test_no_end_and_no_warning_is_slept_through(
    left_ms: int | None, lifetime_ms: int, idle_ms: int, idle_timeout_ms: int | None
) -> None:
    """The next look comes before the end does, unless that is now, and before the warning is due."""
    known = standing(left_ms=left_ms, lifetime_ms=lifetime_ms, idle_ms=idle_ms, idle_timeout_ms=idle_timeout_ms)
    verdict = judge(known)
    if verdict.ends_in_ms is None:
        assert left_ms is idle_timeout_ms is None
        return
    assert verdict.look_in_ms is not None
    assert 0 < verdict.look_in_ms <= max(expiry.LOOK_MS_MAX, expiry.LOOK_MS_MIN)
    if verdict.due or idle_timeout_ms is not None:
        return
    assert verdict.look_in_ms <= verdict.ends_in_ms
    later = judge(standing(left_ms=verdict.ends_in_ms - verdict.look_in_ms, lifetime_ms=lifetime_ms))
    assert verdict.warn or not later.due


def test_timers_of_a_server_that_waits_are_no_work() -> None:
    """A fifth of a percent of a CPU: more than that, and somebody works."""
    assert not expiry.was_active(0, 10_000)
    assert not expiry.was_active(20_000, 10_000)
    assert expiry.was_active(20_001, 10_000)
    assert not expiry.was_active(20_001, 10_000, looks=1)
    assert expiry.was_active(1_000_000, 10_000, looks=100), "a busy sandbox is busy, however often it is looked at"


@pytest.mark.parametrize("text", ["none", "never", "0", 0, 0.0, "0s"])
def test_no_limit_can_be_said(text: str | float) -> None:
    assert expiry.duration_ms(text, "--lifetime") is None


@pytest.mark.parametrize("text", ["soon", "-1", "", "1y", "nan", "1e400"])
def test_what_is_no_duration_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--lifetime"):
        expiry.duration_ms(text, "--lifetime")


def test_a_pause_stops_the_clock_and_going_on_gives_a_whole_lifetime() -> None:
    begun = expiry.begun(1000, 50, "pause", 10_000)
    assert begun == LifetimeRecord(lifetime_ms=1000, expires_at_ms=11_000, idle_timeout_ms=50, on_timeout="pause")
    paused = expiry.after(begun, State.RUNNING, Event.PAUSE, 10_500)
    assert paused.expires_at_ms is None
    for event in (Event.ADOPTED, Event.STOP, Event.EXITED, Event.VANISHED, Event.UNREACHABLE):
        after = expiry.after(paused, State.PAUSED, event, 20_000)
        assert (after.expires_at_ms, after.idle_timeout_ms, after.on_timeout) == (21_000, 50, "pause")


def test_nothing_else_gives_or_takes_time() -> None:
    begun = expiry.begun(1000, None, "kill", 10_000)
    for state in State:
        for event in Event:
            if event is not Event.PAUSE and state is not State.PAUSED:
                assert expiry.after(begun, state, event, 10_500) == begun


def test_why_it_ended_is_said_in_words() -> None:
    record = LifetimeRecord(lifetime_ms=1_800_000, idle_timeout_ms=90_000)
    assert expiry.reason("lifetime", record) == "its lifetime of 30m is over"
    assert "nothing happened in it for 9" in expiry.reason("idle", record) or "1m30s" in expiry.reason("idle", record)
