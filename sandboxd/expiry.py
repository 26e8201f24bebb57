"""When a sandbox has had its time: what was asked and what was seen in, what is due out.

Pure. Two clocks count for a sandbox that runs: its lifetime, which passes whatever it does, and how long it was idle.
A sandbox that is paused spends neither; when it is resumed it has a whole lifetime again.
"""

from __future__ import annotations

import msgspec

from runtimes import quantities
from runtimes.quantities import QuantityError
from sandboxd.failures import InvalidArgument
from sandboxd.lifecycle import Event, State
from sandboxd.records import LifetimeRecord

WARNING_MS_MAX = 30_000
"""How long before the end it is announced: this, or half of the time that there is in all."""

LOOKS_PER_IDLE_TIMEOUT = 10
LOOK_MS_MIN, LOOK_MS_MAX = 200, 10_000
"""How often it is looked whether something went on inside, and whether the time of day was changed."""

ACTIVE_CPU_US_PER_S = 2_000
"""Whoever uses less CPU time than this is idle: a server that waits, with its timers. A fifth of a percent."""

LOOK_CPU_US = 5_000
"""What a look from outside may cost inside, at its beginning and at its end: a worker there is asked how it is."""

CLOCK_JUMP_MS_MIN = 1_000


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one sandbox now, in milliseconds."""

    left_ms: int | None
    """Of its lifetime; None: it has no end."""
    lifetime_ms: int | None
    idle_ms: int
    """How long nothing has happened in it."""
    idle_timeout_ms: int | None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done, and when to look again."""

    ends_in_ms: int | None = None
    """None: never."""
    cause: str = ""
    """``lifetime`` or ``idle``: what ends it first."""
    warn: bool = False
    """Its end is near."""
    look_in_ms: int | None = None
    """None: only when something changes."""

    @property
    def due(self) -> bool:
        """Its time is over."""
        return self.ends_in_ms is not None and self.ends_in_ms <= 0


def judge(standing: Standing) -> Verdict:
    """Return how long a running sandbox still has."""
    ends = []
    if standing.left_ms is not None:
        ends.append((standing.left_ms, "lifetime", standing.lifetime_ms or standing.left_ms))
    if standing.idle_timeout_ms is not None:
        ends.append((standing.idle_timeout_ms - standing.idle_ms, "idle", standing.idle_timeout_ms))
    if not ends:
        return Verdict()
    ends_in_ms, cause, whole_ms = min(ends)
    lead_ms = max(min(WARNING_MS_MAX, whole_ms // 2), 1)
    warn = ends_in_ms <= lead_ms
    look_in_ms = min(ends_in_ms if warn else ends_in_ms - lead_ms, LOOK_MS_MAX)
    if standing.idle_timeout_ms is not None:
        look_in_ms = min(look_in_ms, max(standing.idle_timeout_ms // LOOKS_PER_IDLE_TIMEOUT, LOOK_MS_MIN))
    return Verdict(ends_in_ms=ends_in_ms, cause=cause, warn=warn, look_in_ms=max(look_in_ms, 1))


def was_active(cpu_us: int, over_ms: int, looks: int = 0) -> bool:
    """Whether so much CPU time in so long, with so many looks from outside, means that somebody worked."""
    return (cpu_us - looks * LOOK_CPU_US) * 1000 > ACTIVE_CPU_US_PER_S * over_ms


def duration_ms(value: float | str, option: str) -> int | None:
    """Milliseconds in what a caller wrote; None for ``none`` and for zero.

    Raises:
        InvalidArgument: it is no duration.
    """
    try:
        return quantities.parse_optional_duration_ms(str(value), option=option)
    except QuantityError as error:
        raise InvalidArgument(str(error)) from None


def begun(lifetime_ms: int | None, idle_timeout_ms: int | None, on_timeout: str, now_ms: int) -> LifetimeRecord:
    """What is written down of a sandbox whose time begins now."""
    return LifetimeRecord(
        lifetime_ms=lifetime_ms,
        expires_at_ms=None if lifetime_ms is None else now_ms + lifetime_ms,
        idle_timeout_ms=idle_timeout_ms,
        on_timeout=on_timeout,
    )


def after(record: LifetimeRecord, state: State, event: Event, now_ms: int) -> LifetimeRecord:
    """What is left of its time after something happened to it.

    The clock of what is paused stands still. However that ends, by going on or with its container, it has a whole
    lifetime from then: what is stopped or lost must not stay for ever where its user wanted an end.
    """
    if event is Event.PAUSE:
        return msgspec.structs.replace(record, expires_at_ms=None)
    if state is State.PAUSED:
        return begun(record.lifetime_ms, record.idle_timeout_ms, record.on_timeout, now_ms)
    return record


def reason(cause: str, record: LifetimeRecord) -> str:
    """Why a sandbox was ended or paused, in words."""
    if cause == "idle":
        return f"nothing happened in it for {quantities.format_duration_ms(record.idle_timeout_ms or 0)}"
    return f"its lifetime of {quantities.format_duration_ms(record.lifetime_ms or 0)} is over"
