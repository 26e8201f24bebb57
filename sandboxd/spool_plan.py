"""What is kept of a command's output, and what is dropped: the arithmetic of `sandboxd.spool`. Pure.

A spool that outgrows its cap keeps its head and its tail. What lies between is punched out of the file, so offsets
stay what they were: byte N of the output is byte N of the file for ever.

    0          head_bytes                              size - tail_bytes          size
    |   head   |..............  punched  ..............|           tail           |

Punching begins when more than ``cap_bytes`` are allocated and leaves at most ``cap_bytes - step_bytes``, so it
happens once per step and not once per write.

Sizes come from a file that a hostile program may truncate, grow or write in the middle of: any number that the
kernel can report is taken, and none is believed. Blocks can also be allocated where no hole helps: beyond the end
of the file (``fallocate`` with KEEP_SIZE; XFS does it by itself, for speed, up to twice the tail). Those are left
alone up to ``ceiling_bytes``, and cut off above.
"""

from __future__ import annotations

import re
from enum import StrEnum

import msgspec

CAP_BYTES = 64 * 1024 * 1024
BLOCKS_MIN = 16
"""A cap of fewer blocks than this leaves no room for a head, a tail and a step."""
HEAD_SHARE = 4
STEP_SHARE = 8
CEILING_FACTOR = 4
"""In caps. XFS allocates up to twice the tail beyond the end of an honest file: 2.5 caps in all."""
RESERVED_BYTES_MAX = 8 * 1024**3
"""Beyond the end, for a write that is under way: 2 GiB is the longest, and XFS adds up to twice as much."""

RATE_MAX = 4 * 1024**3
"""Bytes per second; what a command is taken for until more is known. ``dd`` into a spool reaches three quarters."""
PAUSE_S_MIN = 0.001
PAUSE_S_MAX = 0.064
"""What a command that trickled before can write at full speed in this time is the most that is not foreseen."""


class Stream(StrEnum):
    """Which output a spool holds."""

    OUT = "out"
    ERR = "err"
    BOTH = "both"


class Chunk(msgspec.Struct, frozen=True):
    """Output."""

    offset: int
    data: bytes


class Dropped(msgspec.Struct, frozen=True):
    """Output from ``start`` up to, not including, ``end`` is not kept, or was never written (a sparse file)."""

    start: int
    end: int


class Truncated(msgspec.Struct, frozen=True):
    """The command cut its output short: what follows is at ``after`` again, and not at ``before``."""

    before: int
    after: int


Item = Chunk | Dropped | Truncated


class Excerpt(msgspec.Struct, frozen=True):
    """A part of a spool."""

    items: tuple[Chunk | Dropped, ...]
    end: int
    """Where it ends: at the end of what was asked for, or of the output, or of what one answer may hold."""


class SpoolStat(msgspec.Struct, frozen=True, kw_only=True):
    """What a spool holds."""

    bytes_written: int
    bytes_kept: int
    dropped: tuple[Dropped, ...]
    """Disjoint, in order; the first `DROPPED_MAX` of them."""
    dropped_more: bool
    """There are more: only a command that tampers with its output has more than one."""

    @property
    def truncated(self) -> bool:
        """Not all of the output is kept."""
        return bool(self.dropped)


DROPPED_MAX = 64


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """A cap, made exact. All but ``cap_bytes`` and ``ceiling_bytes`` are multiples of ``block_bytes``."""

    cap_bytes: int
    head_bytes: int
    tail_bytes: int
    step_bytes: int
    block_bytes: int
    ceiling_bytes: int


class Hole(msgspec.Struct, frozen=True):
    """A range to punch, aligned to blocks at both ends."""

    start: int
    end: int


def bounds_of(cap_bytes: int, block_bytes: int) -> Bounds:
    """Divide a cap into head, tail and step.

    Raises:
        ValueError: it is less than ``BLOCKS_MIN`` blocks.
    """
    if cap_bytes < BLOCKS_MIN * block_bytes:
        raise ValueError(f"a cap of {cap_bytes} bytes is less than {BLOCKS_MIN} blocks of {block_bytes}")
    head_bytes = _floor(cap_bytes // HEAD_SHARE, block_bytes)
    step_bytes = _floor(cap_bytes // STEP_SHARE, block_bytes)
    return Bounds(
        cap_bytes=cap_bytes,
        head_bytes=head_bytes,
        # A block is held back because the tail begins anywhere within one.
        tail_bytes=_floor(cap_bytes - head_bytes - step_bytes - block_bytes, block_bytes),
        step_bytes=step_bytes,
        block_bytes=block_bytes,
        ceiling_bytes=CEILING_FACTOR * cap_bytes,
    )


def hole_to_punch(bounds: Bounds, *, size_bytes: int, allocated_bytes: int, punched_until: int) -> Hole | None:
    """What to punch now; None: nothing.

    Args:
        bounds: What may be kept.
        size_bytes: The file's size.
        allocated_bytes: What it takes on the disk.
        punched_until: Where the last hole ended; 0 when there was none or nobody knows.
    """
    if allocated_bytes <= bounds.cap_bytes:
        return None
    end = _floor(size_bytes - bounds.tail_bytes, bounds.block_bytes)
    if punched_until > size_bytes:
        punched_until = 0  # the file was truncated
    worthwhile = end - max(punched_until, bounds.head_bytes) >= bounds.step_bytes
    overdue = allocated_bytes > bounds.ceiling_bytes and end > bounds.head_bytes
    return Hole(bounds.head_bytes, end) if worthwhile or overdue else None


def beyond_end(bounds: Bounds, *, size_bytes: int, allocated_bytes: int, punched_until: int) -> int:
    """How many bytes are allocated that the file, up to its size and less its hole, does not explain."""
    explained = min(size_bytes, bounds.head_bytes + max(0, size_bytes - punched_until))
    return max(0, allocated_bytes - explained)


def next_rate(rate: float, *, grown_bytes: int, elapsed_s: float) -> float:
    """How fast a command is taken to write, in bytes per second: as it did, or half of what was thought before."""
    seen = max(0, grown_bytes) / max(elapsed_s, PAUSE_S_MIN)
    return min(max(seen, rate / 2, 1.0), float(RATE_MAX))


def pause_s(bounds: Bounds, *, size_bytes: int, allocated_bytes: int, punched_until: int, rate: float) -> float:
    """How long not to look: half the time in which the next hole could become due, within limits."""
    room = bounds.cap_bytes - allocated_bytes
    if room <= 0:
        room = punched_until + bounds.step_bytes + bounds.tail_bytes - size_bytes
    return min(max(room / rate / 2, PAUSE_S_MIN), PAUSE_S_MAX)


_NAME = re.compile(r"([0-9a-f]{12})\.(out|err|both)")


def file_name(command_id: int, stream: Stream) -> str:
    """The name of a spool's file.

    Raises:
        ValueError: the id does not fit twelve hexadecimal digits.
    """
    if not 0 <= command_id < 1 << 48:
        raise ValueError(f"{command_id} is no id of a command")
    return f"{command_id:012x}.{stream.value}"


def parse_name(name: str) -> tuple[int, Stream] | None:
    """The command and stream of a spool's file; None: it is none."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1], 16), Stream(match[2]))


def _floor(value: int, unit: int) -> int:
    return value // unit * unit
