"""How many slots a pool should have: what is there, what was asked for and the time in, decisions out. Pure.

The number follows demand. While a slot is being made, about ``refill_s``, claims are served from what is there; so a
pool that holds as many slots as were ever claimed within that time, lately, would not have run dry. What was not
needed for ``idle_s`` is let go, down to ``slots_min``.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

WINDOW_S_MIN = 2.0
"""Claims that come this close together are one burst, however quickly slots are made."""

WINDOW_REFILLS = 2.0
"""A slot that is asked for while others are being made waits for them too."""

YIELD_S = 0.1
"""While claims come this close together and there are slots left, no new ones are made: to make one takes all that
the host has, and whoever claims would feel it. Nor while claims are carried out, the last ones of a pool included;
but where that goes on and on, no longer than this."""

BACK_OFF_S_MIN = 1.0
BACK_OFF_S_MAX = 60.0

LOOK_S_MIN = 0.02

REFILL_WEIGHT = 0.3
"""Of the newest measurement in the moving average of the time that a slot takes."""

REFILL_S_FIRST = 1.0
"""Before anything was measured."""


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool is told."""

    slots_min: int
    slots_max: int
    idle_s: float
    """How long a demand is remembered."""
    age_s_max: float
    """A slot that is older is replaced."""


class SlotView(msgspec.Struct, frozen=True, kw_only=True):
    """One warm slot."""

    slot_id: str
    made_s: float
    current: bool
    """Made of the image that the template has now."""


class PoolView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one pool. All times are of one monotonic clock, in seconds."""

    settings: PoolSettings
    warm: Sequence[SlotView]
    filling: int
    waiting: int
    """Callers who wait for a slot."""
    asked_s: Sequence[float]
    """When slots were asked for, oldest first, hits and misses."""
    refill_s: float
    failures: int
    """Fills that failed, one after another."""
    failed_s: float
    drained: bool
    """Nothing is to be made until somebody says so."""


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What the host, and the other pools, leave."""

    fills: int
    """How many more may be made at once."""
    slots: int
    """How many more slots the memory budget allows."""
    claiming_since_s: float | None = None
    """Since when claims have been carried out, one or several at any time; None: there are none now."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now."""

    target: int
    start: int
    retire: tuple[str, ...]
    look_again_s: float | None
    """When something may have to be done although nothing happens; None: never."""


def plan(view: PoolView, room: Room, now_s: float) -> Plan:
    """Decide how many slots to make, and which to let go."""
    target = target_of(view, now_s)
    stale = [slot for slot in view.warm if not slot.current]
    old = [slot for slot in view.warm if slot.current and now_s - slot.made_s > view.settings.age_s_max]
    fresh = len(view.warm) - len(stale) - len(old)
    wanted = target + view.waiting - fresh - view.filling
    resumes_s = max(resumes_at(view), _yields_until(view, room))
    may_start = now_s >= resumes_s and not view.drained
    start = max(0, min(wanted, room.fills, room.slots, view.settings.slots_max - view.filling)) if may_start else 0
    # One of an old image must not be given to anybody. An old one serves until a fresh one is there.
    retire = [slot.slot_id for slot in stale]
    surplus = len(view.warm) - len(stale) - target
    by_age = sorted((slot for slot in view.warm if slot.current), key=lambda slot: slot.made_s)
    retire += [slot.slot_id for slot in by_age[: max(0, surplus)]]
    return Plan(
        target=target,
        start=start,
        retire=tuple(retire),
        look_again_s=_look_again(view, now_s, resumes_s, held_back=wanted > start),
    )


def _yields_until(view: PoolView, room: Room) -> float:
    last_s = view.asked_s[-1] if view.asked_s and view.warm and not view.waiting else None
    return max((began_s + YIELD_S for began_s in (last_s, room.claiming_since_s) if began_s is not None), default=0.0)


def target_of(view: PoolView, now_s: float) -> int:
    """How many slots there should be, filling ones included."""
    settings = view.settings
    if view.drained:
        return 0
    recent = [asked_s for asked_s in view.asked_s if now_s - asked_s <= settings.idle_s]
    if not recent:
        return settings.slots_min
    return max(settings.slots_min, min(_burst(recent, _window_s(view)) + 1, settings.slots_max))


def _window_s(view: PoolView) -> float:
    return max(WINDOW_S_MIN, WINDOW_REFILLS * view.refill_s)


def _burst(times_s: Sequence[float], window_s: float) -> int:
    """The most that ever came within one window."""
    most = first = 0
    for last, time_s in enumerate(times_s):
        while time_s - times_s[first] > window_s:
            first += 1
        most = max(most, last - first + 1)
    return most


def resumes_at(view: PoolView) -> float:
    """When to try again after failures: the pause doubles with each."""
    if view.failures == 0:
        return 0.0
    return view.failed_s + min(BACK_OFF_S_MAX, BACK_OFF_S_MIN * 2.0 ** (view.failures - 1))


def _look_again(view: PoolView, now_s: float, resumes_s: float, *, held_back: bool) -> float | None:
    times = [slot.made_s + view.settings.age_s_max for slot in view.warm]
    times += [asked_s + view.settings.idle_s for asked_s in view.asked_s[:1]]
    if held_back:
        times.append(resumes_s if resumes_s > now_s else now_s + WINDOW_S_MIN)
    return min((max(time_s, now_s + LOOK_S_MIN) for time_s in times), default=None)


def next_refill_s(average_s: float | None, measured_s: float) -> float:
    """The moving average, with one more measurement in it."""
    if average_s is None:
        return measured_s
    return average_s + REFILL_WEIGHT * (measured_s - average_s)
