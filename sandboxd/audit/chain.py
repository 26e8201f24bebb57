r"""The lines of the audit log, and what is wrong with a chain of them. Pure.

Each line is one JSON object in printable ASCII: whatever a caller chose, a newline or a control character in it is
written as ``\n`` or ``\u007f``, so that no value can pretend to be a line. It holds the SHA-256 of the line before,
newline excluded, over the bounds of files as well. So a line can be neither changed, taken out, put in nor moved
without the next one saying so. What the last line must be is known to the daemon, and after its end to the file
``head``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256

import msgspec

from sandboxd.protocol import AuditEntry, AuditProblem

GENESIS_PREV = "0" * 64
"""What stands for a line before the first."""

PROBLEMS_MAX = 100

LINE_BYTES_MAX = 64 * 1024
"""Far above what arguments are cut to, even where each of their characters is escaped."""


class Line(AuditEntry, frozen=True, kw_only=True, omit_defaults=True):
    """An entry as it is in a file."""

    prev: str


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The last line."""

    seq: int
    sha256: str


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a line stands."""

    file: str
    line: int


_decoder = msgspec.json.Decoder(Line)


def encode(line: Line) -> bytes:
    """One line, without its newline."""
    data = msgspec.json.encode(line)
    if data.isascii() and b"\x7f" not in data:
        return data
    text = json.dumps(json.loads(data), separators=(",", ":"), ensure_ascii=True)
    return text.replace("\x7f", "\\u007f").encode("ascii")


def decode(raw: bytes) -> Line | None:
    """What a line says; None if it is none."""
    try:
        return _decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def digest(raw: bytes) -> str:
    """What the line after this one holds."""
    return sha256(raw).hexdigest()


class Checker:
    """Reads a chain from its oldest line on, and notes what is wrong with it."""

    def __init__(self) -> None:
        self.problems: list[AuditProblem] = []
        self.problem_count = 0
        self.records = 0
        self.first_seq: int | None = None
        self.gaps = 0
        self.torn = 0
        self.oldest_file = 1
        """The number of the oldest file that must still be there, by the word of the newest."""
        self._last: Line | None = None
        self._hash = ""
        self._place = Place(file="", line=0)
        self._fragment: tuple[Place, bytes] | None = None
        """What is no line, until the next one has said whether a crash cut it short."""

    @property
    def head(self) -> Head | None:
        """The last line; None: there is none."""
        return None if self._last is None else Head(seq=self._last.seq, sha256=self._hash)

    def read(self, file: str, lines: Iterable[bytes]) -> None:
        """Take the lines of the next file."""
        for number, raw in enumerate(lines, 1):
            self._take(Place(file=file, line=number), raw)

    def _take(self, place: Place, raw: bytes) -> None:
        line = decode(raw)
        if line is None:
            # A crash may have left several, where the disk was full as well.
            self._fragment = (
                (place, raw) if self._fragment is None else (self._fragment[0], self._fragment[1] + b"\n" + raw)
            )
            return
        if self._fragment is not None:
            _, fragment = self._fragment
            if line.kind == "torn" and line.data.get("sha256") == digest(fragment):
                self._fragment = None
                self.torn += 1
            self._settle_fragment()
        if self._last is None:
            self._begin(place, line)
        else:
            self._link(self._last, place, line)
        self._note(place, line)
        self.records += 1
        self._last, self._hash, self._place = line, digest(raw), place

    def _begin(self, place: Place, line: Line) -> None:
        self.first_seq = line.seq
        if line.kind == "genesis" and line.prev != GENESIS_PREV:
            self._problem(place, line.seq, "changed", "the first line of all cannot follow another")
        elif line.kind not in {"genesis", "continued"}:
            self._problem(place, line.seq, "removed", "the lines before this one are not there")

    def _link(self, last: Line, place: Place, line: Line) -> None:
        if line.prev == self._hash and line.seq == last.seq + 1:
            return
        if line.kind == "mismatch" and line.prev == self._hash:
            return
        missing = line.seq - last.seq - 1
        if missing > 0:
            self._problem(place, line.seq, "removed", f"{missing} lines before this one are not there")
        elif missing < 0:
            self._problem(
                place, line.seq, "inserted", f"it is no line to follow number {last.seq}: one was put in, or moved"
            )
        else:
            self._problem(self._place, last.seq, "changed", "it is not the line that the next one follows")

    def _note(self, place: Place, line: Line) -> None:
        match line.kind:
            case "gap":
                self.gaps += _number(line.data.get("lost"))
            case "continued":
                self.oldest_file = max(self.oldest_file, _number(line.data.get("oldest_file")))
            case "mismatch":
                self._problem(
                    place, line.seq, "mismatch", str(line.data.get("reason") or "it was not as it was left")
                )
            case _:
                pass

    def _settle_fragment(self) -> None:
        if self._fragment is not None:
            place, _ = self._fragment
            self._fragment = None
            self._problem(place, None, "unreadable", "it is no line of this log")

    def missing_files(self, numbers: Iterable[int]) -> None:
        """Note which files of those that must be there are not."""
        there = set(numbers)
        for number in range(self.oldest_file, max(there, default=0) + 1):
            if number not in there:
                self._problem(Place(file=file_name(number), line=0), None, "missing", "the file is not there")

    def finish(self, expected: Head | None) -> None:
        """Compare the end with what it must be. ``expected`` None: nobody knows."""
        self._settle_fragment()
        if expected is None:
            return
        if self._last is None:
            self._problem(self._place, None, "removed", f"there is no line, and there were {expected.seq}")
        elif self._last.seq < expected.seq:
            missing = expected.seq - self._last.seq
            self._problem(self._place, self._last.seq, "removed", f"{missing} lines after this one are not there")
        elif self._last.seq > expected.seq:
            self._problem(self._place, self._last.seq, "inserted", f"the last line is number {expected.seq}")
        elif self._hash != expected.sha256:
            self._problem(self._place, self._last.seq, "changed", "it is not the line that was written last")

    def _problem(self, place: Place, seq: int | None, kind: str, detail: str) -> None:
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_MAX:
            found = AuditProblem(file=place.file, line=place.line, seq=seq, kind=kind, detail=detail)  # type: ignore[arg-type]
            self.problems.append(found)


def _number(value: str | int | None) -> int:
    return value if isinstance(value, int) else 0


def file_name(number: int) -> str:
    """What a file of the log is called."""
    return f"audit-{number:06d}.jsonl"


def file_number(name: str) -> int | None:
    """The number of a file of the log; None: it is none."""
    digits = name.removeprefix("audit-").removesuffix(".jsonl")
    return int(digits) if digits.isascii() and digits.isdigit() and name == file_name(int(digits)) else None
