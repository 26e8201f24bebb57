"""The audit log as text for people. Pure."""

from __future__ import annotations

import time

from sandboxd.cli.tables import UNKNOWN, fitted, on_screen, shown, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HEADER = ("SEQ", "AT", "WHO", "METHOD", "SANDBOX", "RESULT", "TOOK")
_INDENT = "    "


def entries(reply: dict[str, Any], columns: int | None = None) -> str:
    """One line per entry, the oldest first; on a terminal its arguments are below it, cut to one line."""
    entered = [
        (_cells(row, "%Y-%m-%d %H:%M:%S" if columns is None else "%m-%d %H:%M:%S"), _facts(row))
        for row in reply["entries"]
    ]
    if columns is None:
        text = table((*_HEADER, ""), [(*cells, told) for cells, told in entered])
    else:
        lines = on_screen(_HEADER, [cells for cells, _ in entered], columns, ("TOOK", "WHO")).splitlines()
        below = [fitted(f"{_INDENT}{told}", columns) if told else "" for _, told in entered]
        text = "".join(f"{line}\n{told}" for line, told in zip(lines, ["", *below], strict=True))
    return text + ("older ones fit as well: --limit, --until\n" if reply["more"] else "")


def _cells(row: dict[str, Any], time_format: str) -> tuple[str, ...]:
    return (
        str(row["seq"]),
        time.strftime(time_format, time.localtime(row["at_ms"] / 1000)),
        _who(row),
        row["method"] or row["kind"],
        row["sandbox"] or UNKNOWN,
        row["result"] or (row["kind"] if row["method"] else UNKNOWN),
        UNKNOWN if row["duration_ms"] is None else f"{row['duration_ms']:.1f}ms",
    )


def _who(row: dict[str, Any]) -> str:
    if row["uid"] is None:
        return UNKNOWN
    program = shown(row["exe"].rpartition("/")[2]) if row["exe"] else UNKNOWN
    return f"{row['uid']}:{row['pid']} {program}"


def _facts(row: dict[str, Any]) -> str:
    facts = {**row["arguments"], **row["data"]}
    return " ".join(f"{name}={_value(value)}" for name, value in facts.items() if name != "sandbox")


def _value(value: object) -> str:
    match value:
        case list():
            return f"[{' '.join(_value(item) for item in value)}]"
        case dict():
            return ",".join(f"{name}={_value(item)}" for name, item in value.items())
        case bool():
            return str(value).lower()
        case _:
            return shown(str(value))


def verified(reply: dict[str, Any]) -> str:
    """Whether it is intact, and which lines are not."""
    lines = [
        f"{row['file']}:{row['line']}: {row['kind']}{'' if row['seq'] is None else ', number ' + str(row['seq'])}: "
        f"{shown(row['detail'])}"
        for row in reply["problems"]
    ]
    if reply["problem_count"] > len(lines):
        lines.append(f"and {reply['problem_count'] - len(lines)} more")
    about = f"{reply['records']} lines in {reply['files']} files, numbers {reply['first_seq']} to {reply['last_seq']}"
    if reply["gaps"]:
        about += f"; {reply['gaps']} lines could not be written, which it says"
    if reply["torn"]:
        about += f"; {reply['torn']} cut short by a crash, which it says"
    return "\n".join(
        [*lines, f"{'intact' if reply['intact'] else 'NOT intact'}: {about}", f"head {reply['head'] or UNKNOWN}"]
    )
