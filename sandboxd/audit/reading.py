"""Reading the audit log: what fits a question, and whether it is as it was written. To be run in a worker thread."""

from __future__ import annotations

from collections.abc import Sequence

from sandboxd.audit.chain import Checker, Head, Line, decode, file_number
from sandboxd.audit.files import OpenFile
from sandboxd.protocol import AuditEntries, AuditEntry, AuditQueryParams, AuditVerified

REPLY_BYTES_MAX = 2 * 1024 * 1024
"""Of lines in one reply, whatever its limit says: less than a message may have."""


def query(files: Sequence[OpenFile], wanted: AuditQueryParams, sandbox: str | None) -> AuditEntries:
    """The last entries that fit.

    Args:
        files: The oldest first.
        wanted: What was asked for.
        sandbox: The id that its sandbox is known to have, or what was typed.

    Raises:
        OSError: a file cannot be read.
    """
    found: list[AuditEntry] = []
    size = 0
    for file in reversed(files):
        for raw in reversed(file.lines()):
            line = decode(raw)
            if line is None or not _fits(line, wanted, sandbox):
                continue
            if len(found) == wanted.limit or size + len(raw) > REPLY_BYTES_MAX:
                return AuditEntries(entries=found[::-1], more=True)
            found.append(_entry(line))
            size += len(raw)
    return AuditEntries(entries=found[::-1], more=False)


def _entry(line: Line) -> AuditEntry:
    return AuditEntry(**{name: getattr(line, name) for name in AuditEntry.__struct_fields__})


def _fits(line: Line, wanted: AuditQueryParams, sandbox: str | None) -> bool:
    return (
        (wanted.since_ms is None or line.at_ms >= wanted.since_ms)
        and (wanted.until_ms is None or line.at_ms <= wanted.until_ms)
        and (wanted.uid is None or line.uid == wanted.uid)
        and (wanted.method is None or _is_of(line.method, wanted.method))
        and (wanted.result is None or _came_to(line.result, wanted.result))
        and (sandbox is None or sandbox in {line.sandbox, line.arguments.get("sandbox"), line.arguments.get("name")})
    )


def _is_of(method: str | None, wanted: str) -> bool:
    return method is not None and (method == wanted or method.startswith(f"{wanted.rstrip('/')}/"))


def _came_to(result: str | None, wanted: str) -> bool:
    return result not in {None, "ok"} if wanted == "failed" else result == wanted


def verify(files: Sequence[OpenFile], head: Head | None) -> AuditVerified:
    """Follow the chain from the oldest line that is kept to the last.

    Args:
        files: The oldest first.
        head: What the last line must be.

    Raises:
        OSError: a file cannot be read.
    """
    checker = Checker()
    for file in files:
        checker.read(file.name, file.lines())
    checker.missing_files(number for file in files if (number := file_number(file.name)) is not None)
    checker.finish(head)
    last = checker.head
    return AuditVerified(
        intact=checker.problem_count == 0,
        files=len(files),
        records=checker.records,
        first_seq=checker.first_seq,
        last_seq=None if last is None else last.seq,
        head="" if last is None else last.sha256,
        gaps=checker.gaps,
        torn=checker.torn,
        problems=checker.problems,
        problem_count=checker.problem_count,
    )
