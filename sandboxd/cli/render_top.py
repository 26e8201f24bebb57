"""One screen of all that a daemon has. Pure: replies in, lines out, no more and no longer than there is room for."""

from __future__ import annotations

import time

from sandboxd.cli import render
from sandboxd.cli.tables import fitted, known, on_screen, size, until

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

EVENTS_MIN = 4
"""So many of the last events are seen, however many sandboxes there are."""

_HEADER = ("NAME", "STATE", "CPU", "MEMORY", "PIDS", "COMMANDS", "LEFT", "PROBLEMS")
_YIELDING = ("LEFT", "PIDS", "STATE", "COMMANDS")


def screen(view: dict[str, Any], columns: int | None, rows: int | None) -> list[str]:
    """The lines of one screen; without a size, all that there is.

    Args:
        view: ``sandboxes``, ``metrics``, ``pools``, ``services`` and ``events`` as they were told ``at_ms``.
        columns: How long a line may be.
        rows: How many lines there may be.
    """
    head = _head(view)
    table = _sandboxes(view, columns)
    events = [line for event in view["events"] for line in render.event(event).splitlines()]
    if rows is not None:
        room = max(rows - len(head) - 2, 0)
        table = _shortened(table, max(room - min(len(events), EVENTS_MIN), 0))
        events = events[max(len(events) - max(room - len(table), 0), 0) :]
    lines = [*head, "", *table, *(["", *events] if events else [])]
    return fitted("\n".join(lines), columns).splitlines()[:rows]


def _head(view: dict[str, Any]) -> list[str]:
    metrics = view["metrics"]
    running = sum(row["commands_running"] for row in view["sandboxes"])
    used = sum(row["memory_bytes"] or 0 for row in metrics)
    cpus = sum(row["cpu_percent"] or 0 for row in metrics) / 100
    at = time.strftime("%H:%M:%S", time.localtime(view["at_ms"] / 1000))
    counts = f"{len(metrics)} sandboxes   {running} commands   {cpus:.1f} CPUs   {size(used)}"
    lines = [f"{at}   {counts}"]
    pools = [_pool(row) for row in view["pools"] if row["warm"] or row["filling"] or row["target"] or row["failure"]]
    if pools:
        lines.append(f"pools      {'   '.join(pools)}")
    services = [f"{row['name']} {row['state']}" for row in view["services"] if row["state"] != "idle"]
    if services:
        lines.append(f"services   {'   '.join(services)}")
    return lines


def _pool(row: dict[str, Any]) -> str:
    filling = f", {row['filling']} filling" if row["filling"] else ""
    failure = ", failing" if row["failure"] else ""
    return f"{row['template']} {row['warm']} of {row['target']} warm{filling}{failure}"


def _sandboxes(view: dict[str, Any], columns: int | None) -> list[str]:
    """The busiest first."""
    listed = {row["id"]: row for row in view["sandboxes"]}
    # What came or went between the two questions is seen next time.
    metrics = [row for row in view["metrics"] if row["id"] in listed]
    metrics.sort(key=lambda row: (-(row["cpu_percent"] or 0), row["name"] or row["id"]))
    rows = [_cells(row, listed[row["id"]], view["at_ms"]) for row in metrics]
    return on_screen(_HEADER, rows, columns, _YIELDING).splitlines() if rows else ["no sandboxes"]


def _cells(row: dict[str, Any], listed: dict[str, Any], now_ms: int) -> tuple[str, ...]:
    return (
        row["name"] or row["id"],
        row["state"],
        render.cpu(row["cpu_percent"], row["cpu_millis"]),
        f"{size(row['memory_bytes'])} / {size(row['memory_bytes_max'])}",
        f"{known(row['pids'])} / {known(row['pids_max'])}",
        str(listed["commands_running"]),
        until(listed["expires_at_ms"], now_ms),
        known(" ".join(problem["kind"] for problem in listed.get("problems", ()))),
    )


def _shortened(table: Sequence[str], lines_max: int) -> list[str]:
    if len(table) <= lines_max:
        return list(table)
    kept = max(lines_max - 1, 0)
    return [*table[:kept], f"and {len(table) - kept} more"][:lines_max]
