"""Two texts → a unified diff, in git's extended form, which ``git apply`` and ``patch -p1`` both read. Pure.

Texts may be hostile: the work is bounded, and where it would be too much a block is told as removed and added, which
is longer and as true.

Source: git-diff(1), "Generating patch text with -p"; Myers, Algorithmica 1 (1986); the anchors are
lines that are unique on both sides, in the longest order that they have in common.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

CONTEXT_LINES = 3

EDITS_MAX = 400
"""Of one block without anchors. The memory of a search is the square of it."""
STEPS_MAX = 2_000_000
"""Of one pair of texts: about a second."""

SYMLINK = 0o120000
REGULAR = 0o100000
EXECUTABLE_BITS = 0o111

_QUOTED = {0x07: "a", 0x08: "b", 0x09: "t", 0x0A: "n", 0x0B: "v", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
_PRINTABLE = range(0x20, 0x7F)
_NUL = b"\0"


class Block(NamedTuple):
    """Lines ``old_start`` to ``old_end`` became lines ``new_start`` to ``new_end``; from zero, ends excluded."""

    old_start: int
    old_end: int
    new_start: int
    new_end: int


class FileVersion(NamedTuple):
    """One side of one file."""

    mode: int
    """Type and permissions, as in ``st_mode``."""
    data: bytes | None
    """Its content, or where a symlink leads; None: not text, or too large to be shown."""


class Patch(NamedTuple):
    """What became of one file."""

    text: bytes
    insertions: int
    deletions: int


def is_text(data: bytes) -> bool:
    """Whether somebody would want to read it."""
    return _NUL not in data


def file_patch(
    path: bytes, old: FileVersion | None, new: FileVersion | None, *, old_path: bytes | None = None
) -> Patch:
    """The part of a patch that is about one file. None: it is not there on that side.

    Args:
        path: Relative, without ``a/`` and ``b/``.
        old: What it was.
        new: What it is.
        old_path: What it was called, if it was renamed.
    """
    before = old_path or path
    lines = [b"diff --git " + _quoted(b"a/" + before) + b" " + _quoted(b"b/" + path) + b"\n"]
    lines += _header(path, old, new, old_path)
    old_data = b"" if old is None else old.data
    new_data = b"" if new is None else new.data
    if old_data is None or new_data is None:
        left, right = _side(b"a/" + before, old), _side(b"b/" + path, new)
        lines.append(b"Binary files " + left + b" and " + right + b" differ\n")
        return Patch(b"".join(lines), 0, 0)
    hunks = list(_hunks(_lines(old_data), _lines(new_data)))
    if hunks:
        lines.append(b"--- " + _named(_side(b"a/" + before, old)) + b"\n")
        lines.append(b"+++ " + _named(_side(b"b/" + path, new)) + b"\n")
    insertions = deletions = 0
    for hunk in hunks:
        lines.append(hunk.text)
        insertions += hunk.insertions
        deletions += hunk.deletions
    return Patch(b"".join(lines), insertions, deletions)


def _header(path: bytes, old: FileVersion | None, new: FileVersion | None, old_path: bytes | None) -> list[bytes]:
    lines = []
    if old is None and new is not None:
        lines.append(b"new file mode %o\n" % _git_mode(new.mode))
    elif new is None and old is not None:
        lines.append(b"deleted file mode %o\n" % _git_mode(old.mode))
    elif old is not None and new is not None:
        if _git_mode(old.mode) != _git_mode(new.mode):
            lines += [b"old mode %o\n" % _git_mode(old.mode), b"new mode %o\n" % _git_mode(new.mode)]
        if old_path is not None:
            lines += [b"similarity index 100%\n", b"rename from " + _quoted(old_path) + b"\n"]
            lines.append(b"rename to " + _quoted(path) + b"\n")
    return lines


def _git_mode(mode: int) -> int:
    """Git knows a symlink, a file, and a file that can be executed."""
    if mode & 0o170000 == SYMLINK:
        return SYMLINK
    return REGULAR | (0o755 if mode & EXECUTABLE_BITS else 0o644)


def _side(path: bytes, version: FileVersion | None) -> bytes:
    return b"/dev/null" if version is None else _quoted(path)


def _named(name: bytes) -> bytes:
    """A name that ends where it ends: behind one with a blank, readers look for a tab."""
    return name + b"\t" if b" " in name and not name.startswith(b'"') else name


def _quoted(name: bytes) -> bytes:
    if all(byte in _PRINTABLE and byte not in _QUOTED for byte in name):
        return name
    text = "".join(
        f"\\{_QUOTED[byte]}" if byte in _QUOTED else chr(byte) if byte in _PRINTABLE else f"\\{byte:03o}"
        for byte in name
    )
    return f'"{text}"'.encode("ascii")


def _lines(data: bytes) -> list[bytes]:
    """The lines with their ends; the last one may have none."""
    lines = data.split(b"\n")
    last = lines.pop()
    return [line + b"\n" for line in lines] + ([last] if last else [])


class _Hunk(NamedTuple):
    text: bytes
    insertions: int
    deletions: int


def _hunks(old: Sequence[bytes], new: Sequence[bytes]) -> Iterator[_Hunk]:
    group: list[Block] = []
    for block in blocks(old, new):
        if group and block.old_start - group[-1].old_end > 2 * CONTEXT_LINES:
            yield _hunk(old, new, group)
            group = []
        group.append(block)
    if group:
        yield _hunk(old, new, group)


def _hunk(old: Sequence[bytes], new: Sequence[bytes], group: Sequence[Block]) -> _Hunk:
    before = min(CONTEXT_LINES, group[0].old_start)
    after = min(CONTEXT_LINES, len(old) - group[-1].old_end)
    old_start, old_end = group[0].old_start - before, group[-1].old_end + after
    new_start, new_end = group[0].new_start - before, group[-1].new_end + after
    parts = [f"@@ -{_range(old_start, old_end)} +{_range(new_start, new_end)} @@\n".encode("ascii")]
    position = old_start
    for block in group:
        parts += (_line(b" ", line) for line in old[position : block.old_start])
        parts += (_line(b"-", line) for line in old[block.old_start : block.old_end])
        parts += (_line(b"+", line) for line in new[block.new_start : block.new_end])
        position = block.old_end
    parts += (_line(b" ", line) for line in old[position:old_end])
    return _Hunk(
        b"".join(parts),
        insertions=sum(block.new_end - block.new_start for block in group),
        deletions=sum(block.old_end - block.old_start for block in group),
    )


def _range(start: int, end: int) -> str:
    """Lines are counted from one; where there are none, the line before is named."""
    return f"{start + 1 if end > start else start},{end - start}"


def _line(sign: bytes, line: bytes) -> bytes:
    return sign + line if line.endswith(b"\n") else sign + line + b"\n\\ No newline at end of file\n"


# --- which lines became which ---------------------------------------------------------------------------


class _Steps:
    """What is left to spend."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> bool:
        self.left -= count
        return self.left >= 0


def blocks(old: Sequence[bytes], new: Sequence[bytes], *, steps_max: int = STEPS_MAX) -> list[Block]:
    """The blocks in which two texts differ, in order, none empty on both sides and no two touching."""
    numbers: dict[bytes, int] = {}
    left = [numbers.setdefault(line, len(numbers)) for line in old]
    right = [numbers.setdefault(line, len(numbers)) for line in new]
    steps = _Steps(steps_max)
    found: list[Block] = []
    waiting = [Block(0, len(left), 0, len(right))]
    while waiting:
        block = _trimmed(left, right, waiting.pop())
        if block.old_start == block.old_end or block.new_start == block.new_end:
            if block.old_start != block.old_end or block.new_start != block.new_end:
                found.append(block)
            continue
        parts = _between_anchors(left, right, block, steps)
        if parts:
            waiting += parts
        else:
            found += _shortest(left, right, block, steps)
    return _merged(sorted(found))


def _merged(found: Sequence[Block]) -> list[Block]:
    merged: list[Block] = []
    for block in found:
        if merged and (merged[-1].old_end, merged[-1].new_end) == (block.old_start, block.new_start):
            last = merged.pop()
            block = Block(last.old_start, block.old_end, last.new_start, block.new_end)  # noqa: PLW2901
        merged.append(block)
    return merged


def _trimmed(left: Sequence[int], right: Sequence[int], block: Block) -> Block:
    """Without what both sides begin and end with."""
    old_start, old_end, new_start, new_end = block
    while old_start < old_end and new_start < new_end and left[old_start] == right[new_start]:
        old_start += 1
        new_start += 1
    while old_start < old_end and new_start < new_end and left[old_end - 1] == right[new_end - 1]:
        old_end -= 1
        new_end -= 1
    return Block(old_start, old_end, new_start, new_end)


def _between_anchors(left: Sequence[int], right: Sequence[int], block: Block, steps: _Steps) -> list[Block]:
    """The parts between lines that stand once on both sides; nothing where there are none."""
    old_start, old_end, new_start, new_end = block
    if not steps.take(old_end - old_start + new_end - new_start):
        return []
    old_counts = Counter(left[old_start:old_end])
    new_counts = Counter(right[new_start:new_end])
    places = {right[index]: index for index in range(new_start, new_end) if new_counts[right[index]] == 1}
    pairs = [
        (index, places[left[index]])
        for index in range(old_start, old_end)
        if old_counts[left[index]] == 1 and left[index] in places
    ]
    anchors = _rising(pairs)
    parts = []
    for old_index, new_index in anchors:
        parts.append(Block(old_start, old_index, new_start, new_index))
        old_start, new_start = old_index + 1, new_index + 1
    if anchors:
        parts.append(Block(old_start, old_end, new_start, new_end))
    return parts


def _rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of pairs whose second members rise, too; the first ones do."""
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for index, (_, place) in enumerate(pairs):
        length = bisect_left(tails, place)
        previous.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [place]
        ends[length : length + 1] = [index]
    chain = []
    index = ends[-1] if ends else -1
    while index >= 0:
        chain.append(pairs[index])
        index = previous[index]
    return chain[::-1]


def _shortest(left: Sequence[int], right: Sequence[int], block: Block, steps: _Steps) -> list[Block]:
    """The fewest edits, or the whole block where finding them would be too much work."""
    old = left[block.old_start : block.old_end]
    new = right[block.new_start : block.new_end]
    trace = _search(old, new, steps)
    if trace is None:
        return [block]
    found = []
    x, y = len(old), len(new)
    for edits in range(len(trace) - 1, 0, -1):
        reached = trace[edits - 1]
        diagonal = x - y
        down = diagonal == -edits or (
            diagonal != edits and reached.get(diagonal - 1, -1) < reached.get(diagonal + 1, -1)
        )
        came_from = diagonal + 1 if down else diagonal - 1
        from_x = reached[came_from]
        from_y = from_x - came_from
        old_at, new_at = block.old_start + from_x, block.new_start + from_y
        found.append(Block(old_at, old_at + (not down), new_at, new_at + down))
        x, y = from_x, from_y
    return found


def _search(old: Sequence[int], new: Sequence[int], steps: _Steps) -> list[dict[int, int]] | None:
    """How far each diagonal is reached with 0, 1, 2, ... edits, until the end is."""
    trace: list[dict[int, int]] = []
    reached: dict[int, int] = {1: 0}
    for edits in range(min(len(old) + len(new), EDITS_MAX) + 1):
        current: dict[int, int] = {}
        for diagonal in range(-edits, edits + 1, 2):
            below, right = reached.get(diagonal + 1, -1), reached.get(diagonal - 1, -1)
            x = below if diagonal == -edits or (diagonal != edits and right < below) else right + 1
            y = start = x - diagonal
            while x < len(old) and y < len(new) and old[x] == new[y]:
                x += 1
                y += 1
            current[diagonal] = x
            if not steps.take(y - start + 1):
                return None
            if x >= len(old) and y >= len(new):
                return [*trace, current]
        trace.append(current)
        reached = current
    return None
