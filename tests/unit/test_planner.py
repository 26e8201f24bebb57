"""How many slots a pool should have."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import planner
from sandboxd.planner import PoolSettings, PoolView, Room, SlotView, plan, target_of

NOW = 10_000.0
SETTINGS = PoolSettings(slots_min=1, slots_max=8, idle_s=600.0, age_s_max=3600.0)
AMPLE = Room(fills=100, slots=100)


def slots(count: int, *, age_s: float = 1.0, current: bool = True) -> list[SlotView]:
    return [SlotView(slot_id=f"{age_s}-{n}", made_s=NOW - age_s - n, current=current) for n in range(count)]


def view(**changes: object) -> PoolView:
    base = PoolView(
        settings=SETTINGS,
        warm=[],
        filling=0,
        waiting=0,
        asked_s=[],
        refill_s=0.5,
        failures=0,
        failed_s=0.0,
        drained=False,
    )
    return msgspec.structs.replace(base, **changes)


def asked(*ages_s: float) -> list[float]:
    return sorted(NOW - age_s for age_s in ages_s)


@pytest.mark.parametrize(
    ("ages_s", "refill_s", "target"),
    [
        ((), 0.5, 1),
        ((5.0,), 0.5, 2),
        ((5.0, 5.1, 5.2), 0.5, 4),
        # Far apart: one slot is back before the next is asked for.
        ((5.0, 105.0, 205.0), 0.5, 2),
        # Unless slots take that long to be made.
        ((5.0, 105.0, 205.0), 100.0, 4),
        ((601.0,) * 5, 0.5, 1),
        ((5.0,) * 50, 0.5, 8),
    ],
)
def test_the_target_follows_the_largest_burst_that_is_remembered(
    ages_s: Sequence[float], refill_s: float, target: int
) -> None:
    assert target_of(view(asked_s=asked(*ages_s), refill_s=refill_s), NOW) == target


def test_what_is_missing_is_made_as_far_as_there_is_room() -> None:
    busy = view(asked_s=asked(1.0, 1.1, 1.2), warm=slots(1), filling=1)
    assert plan(busy, AMPLE, NOW).start == 2
    assert plan(busy, Room(fills=1, slots=100), NOW).start == 1
    assert plan(busy, Room(fills=100, slots=0), NOW).start == 0


def test_no_slot_is_made_while_claims_come_and_slots_are_left() -> None:
    claimed = view(asked_s=asked(0.05), warm=slots(1))
    assert plan(claimed, AMPLE, NOW).start == 0
    again_s = plan(claimed, AMPLE, NOW).look_again_s
    assert again_s is not None
    assert again_s <= NOW + 0.1
    assert plan(claimed, AMPLE, NOW + 0.06).start == 1
    assert plan(view(asked_s=asked(0.05)), AMPLE, NOW).start == 2, "nothing is left"
    assert plan(view(asked_s=asked(0.05), warm=slots(1), waiting=1), AMPLE, NOW).start == 2, "somebody waits"


def test_no_slot_is_made_while_claims_are_carried_out_but_not_without_end() -> None:
    """The last slots of a pool are claimed beside nothing else; a crowd that never stops must starve no pool."""
    emptied = view(asked_s=asked(0.01), waiting=3)
    held = plan(emptied, msgspec.structs.replace(AMPLE, claiming_since_s=NOW - 0.05), NOW)
    assert held.start == 0
    assert held.look_again_s is not None
    assert held.look_again_s <= NOW + 0.1
    assert plan(emptied, AMPLE, NOW).start == 5
    assert plan(emptied, msgspec.structs.replace(AMPLE, claiming_since_s=NOW - 0.11), NOW).start == 5


def test_callers_who_wait_are_made_slots_beyond_the_target() -> None:
    assert plan(view(waiting=3, warm=slots(0)), AMPLE, NOW).start == 4


def test_surplus_goes_oldest_first() -> None:
    warm = slots(3)
    decided = plan(view(warm=warm), AMPLE, NOW)
    assert decided.start == 0
    assert decided.retire == ("1.0-2", "1.0-1")


def test_a_slot_of_an_old_image_goes_at_once_and_is_replaced() -> None:
    decided = plan(view(warm=slots(1, current=False)), AMPLE, NOW)
    assert decided.retire == ("1.0-0",)
    assert decided.start == 1


def test_an_old_slot_serves_until_a_fresh_one_is_there() -> None:
    old = slots(1, age_s=4000.0)
    first = plan(view(warm=old), AMPLE, NOW)
    assert (first.start, first.retire) == (1, ())
    then = plan(view(warm=[*old, *slots(1)]), AMPLE, NOW)
    assert (then.start, then.retire) == (0, (old[0].slot_id,))


def test_a_failure_is_followed_by_a_pause_that_doubles() -> None:
    failed = view(failures=1, failed_s=NOW - 0.5)
    assert plan(failed, AMPLE, NOW).start == 0
    assert plan(failed, AMPLE, NOW + 0.6).start == 1
    pauses = [planner.resumes_at(view(failures=count, failed_s=NOW)) - NOW for count in range(1, 9)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_whatever_is_held_back_is_looked_at_again() -> None:
    decided = plan(view(failures=3, failed_s=NOW), AMPLE, NOW)
    assert decided.look_again_s is not None
    assert decided.look_again_s >= NOW + 4.0
    crowded = plan(view(), Room(fills=0, slots=0), NOW)
    assert crowded.look_again_s is not None


def test_a_drained_pool_makes_nothing_whoever_asks() -> None:
    decided = plan(view(drained=True, asked_s=asked(1.0), waiting=1, warm=slots(2)), AMPLE, NOW)
    assert (decided.target, decided.start, len(decided.retire)) == (0, 0, 2)


@given(
    st.builds(
        view,
        warm=st.integers(0, 20).map(slots),
        filling=st.integers(0, 10),
        waiting=st.integers(0, 10),
        asked_s=st.lists(st.floats(0, 2000), max_size=40).map(lambda ages: asked(*ages)),
        refill_s=st.floats(0.01, 120),
        failures=st.integers(0, 60),
        failed_s=st.floats(0, NOW),
        drained=st.booleans(),
    ),
    st.builds(
        Room,
        fills=st.integers(0, 10),
        slots=st.integers(0, 10),
        claiming_since_s=st.none() | st.floats(NOW - 1, NOW),
    ),
)
def test_no_plan_goes_beyond_its_bounds(pool: PoolView, room: Room) -> None:
    decided = plan(pool, room, NOW)
    assert 0 <= decided.start <= min(room.fills, room.slots)
    assert 0 <= decided.target <= SETTINGS.slots_max
    assert set(decided.retire) <= {slot.slot_id for slot in pool.warm}
    assert len(set(decided.retire)) == len(decided.retire)
    assert not (decided.start and len(decided.retire) == len(pool.warm) > decided.start + decided.target)
    assert decided.look_again_s is None or decided.look_again_s > NOW
    assert pool.filling + decided.start <= max(SETTINGS.slots_max, pool.filling)


@given(
    st.builds(
        view,
        filling=st.integers(0, 8),
        waiting=st.integers(1, 50),
        asked_s=st.lists(st.floats(0, 2000), min_size=1, max_size=40).map(lambda ages: asked(*ages)),
    )
)
def test_whoever_waits_has_a_slot_made_for_him(pool: PoolView) -> None:
    """Nobody waits while there is a warm one; and then as many are made as may be, so that nobody starves."""
    decided = plan(pool, AMPLE, NOW)
    assert pool.filling + decided.start >= min(SETTINGS.slots_max, pool.waiting)


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_a_slot_is_kept_or_let_go_and_what_is_kept_is_what_is_wanted(fresh: int, old: int, stale: int) -> None:
    warm = [*slots(fresh), *slots(old, age_s=4000.0), *slots(stale, age_s=2.0, current=False)]
    decided = plan(view(warm=warm), AMPLE, NOW)
    kept = {slot.slot_id for slot in warm} - set(decided.retire)
    assert not any(not slot.current for slot in warm if slot.slot_id in kept)
    assert len(kept) <= decided.target
    assert len(kept) == min(decided.target, fresh + old)
