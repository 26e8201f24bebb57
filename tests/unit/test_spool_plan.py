"""What is kept of an output that outgrows its cap, over all sizes that a hostile file can have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.spool_plan import (
    PAUSE_S_MAX,
    PAUSE_S_MIN,
    RATE_MAX,
    Bounds,
    Stream,
    beyond_end,
    bounds_of,
    file_name,
    hole_to_punch,
    next_rate,
    parse_name,
    pause_s,
)

BLOCKS = st.sampled_from([4096, 65536])
ANY_SIZE = st.integers(0, 2**63 - 1)


@st.composite
def bounds(draw: st.DrawFn) -> Bounds:
    block_bytes = draw(BLOCKS)
    return bounds_of(draw(st.integers(16 * block_bytes, 4096 * block_bytes)), block_bytes)


@given(bounds())
def test_head_tail_and_step_fit_the_cap_in_whole_blocks(limits: Bounds) -> None:
    parts = (limits.head_bytes, limits.tail_bytes, limits.step_bytes)
    assert all(part > 0 and part % limits.block_bytes == 0 for part in parts)
    assert sum(parts) + limits.block_bytes <= limits.cap_bytes


def test_a_cap_without_room_for_a_head_and_a_tail_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 16 blocks"):
        bounds_of(15 * 4096, 4096)


@given(bounds(), st.data())
def test_an_honest_file_keeps_its_head_and_its_tail_and_stays_below_the_cap(
    limits: Bounds, data: st.DataObject
) -> None:
    """The file is simulated: it is one run of blocks, less what was punched, and grows by appending."""
    writes = data.draw(st.lists(st.integers(1, 2 * limits.cap_bytes), max_size=40))
    size = punched_until = 0
    for written in writes:
        size += written
        in_blocks = -(-size // limits.block_bytes) * limits.block_bytes
        dropped = max(0, punched_until - limits.head_bytes)
        hole = hole_to_punch(
            limits, size_bytes=size, allocated_bytes=in_blocks - dropped, punched_until=punched_until
        )
        if hole is not None:
            assert hole.start == limits.head_bytes
            assert punched_until < hole.end <= size - limits.tail_bytes
            assert hole.end % limits.block_bytes == 0
            punched_until = hole.end
            assert in_blocks - (hole.end - hole.start) <= limits.cap_bytes - limits.step_bytes
        assert in_blocks - max(0, punched_until - limits.head_bytes) <= limits.cap_bytes


@given(bounds(), ANY_SIZE, ANY_SIZE, ANY_SIZE)
def test_no_figures_of_a_hostile_file_make_a_hole_in_head_or_tail(
    limits: Bounds, size: int, allocated: int, punched_until: int
) -> None:
    hole = hole_to_punch(limits, size_bytes=size, allocated_bytes=allocated, punched_until=punched_until)
    if hole is not None:
        assert allocated > limits.cap_bytes
        assert limits.head_bytes == hole.start < hole.end <= size - limits.tail_bytes
        assert hole.end % limits.block_bytes == 0
    elif allocated > limits.ceiling_bytes:
        assert size < limits.head_bytes + limits.tail_bytes + limits.block_bytes


@given(bounds(), ANY_SIZE, ANY_SIZE, ANY_SIZE)
def test_blocks_beyond_the_end_are_those_that_the_output_does_not_explain(
    limits: Bounds, size: int, allocated: int, punched_until: int
) -> None:
    beyond = beyond_end(limits, size_bytes=size, allocated_bytes=allocated, punched_until=punched_until)
    assert max(0, allocated - size) <= beyond <= allocated
    assert beyond_end(limits, size_bytes=size, allocated_bytes=size, punched_until=0) == 0


@given(bounds(), st.integers(-(2**63), 2**63), st.floats(0, 1e9), ANY_SIZE, ANY_SIZE, ANY_SIZE)
def test_a_look_is_never_due_too_soon_nor_too_late(
    limits: Bounds, grown: int, elapsed_s: float, size: int, allocated: int, punched_until: int
) -> None:
    rate = next_rate(RATE_MAX, grown_bytes=grown, elapsed_s=elapsed_s)
    assert RATE_MAX / 2 <= rate <= RATE_MAX
    wait_s = pause_s(limits, size_bytes=size, allocated_bytes=allocated, punched_until=punched_until, rate=rate)
    assert PAUSE_S_MIN <= wait_s <= PAUSE_S_MAX


def test_a_slow_command_is_looked_at_less_and_less_often() -> None:
    limits, rate, pauses = bounds_of(64 * 2**20, 4096), float(RATE_MAX), []
    for _ in range(8):
        rate = next_rate(rate, grown_bytes=100, elapsed_s=0.1)
        pauses.append(pause_s(limits, size_bytes=4096, allocated_bytes=4096, punched_until=0, rate=rate))
    assert pauses == sorted(pauses)
    assert pauses[-1] == PAUSE_S_MAX


@given(st.integers(0, 2**48 - 1), st.sampled_from(Stream))
def test_a_name_says_command_and_stream(command_id: int, stream: Stream) -> None:
    assert parse_name(file_name(command_id, stream)) == (command_id, stream)


@pytest.mark.parametrize(
    "name",
    ["", "..", "000000000001", "000000000001.pty", "00000000000A.out", "000000000001.out\n", "../00000001.out"],
)
def test_a_name_that_is_no_spool_is_none(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize("command_id", [-1, 2**48])
def test_an_id_that_does_not_fit_a_name_is_refused(command_id: int) -> None:
    with pytest.raises(ValueError, match="no id of a command"):
        file_name(command_id, Stream.OUT)
