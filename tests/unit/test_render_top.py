"""One screen: what matters most is on it, and nothing is beyond it."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd.cli import render_top
from sandboxd.cli.tables import CUT


def view(sandboxes: int, events: int) -> dict[str, Any]:
    names = [f"box-{number:03}" + "-of-a-long-name" * (number % 2) for number in range(sandboxes)]
    return {
        "at_ms": 0,
        "sandboxes": [
            {"id": f"sb-{name}", "commands_running": 2, "expires_at_ms": 90_000, "problems": [{"kind": "disk_full"}]}
            for name in names
        ],
        "metrics": [
            {
                "id": f"sb-{name}",
                "name": name,
                "state": "running",
                "cpu_percent": float(number),
                "cpu_millis": 500,
                "memory_bytes": 1 << 20,
                "memory_bytes_max": 1 << 29,
                "pids": 3,
                "pids_max": 512,
            }
            for number, name in enumerate(names)
        ],
        "pools": [
            {"template": "web", "warm": 1, "filling": 2, "target": 3, "failure": ""},
            {"template": "bad", "warm": 0, "filling": 0, "target": 1, "failure": "no image"},
            {"template": "default", "warm": 0, "filling": 0, "target": 0, "failure": ""},
        ],
        "services": [{"name": "chroma", "state": "ready"}, {"name": "mine", "state": "idle"}],
        "events": [
            {
                "seq": number,
                "at_ms": 0,
                "kind": "created",
                "sandbox": "sb-x",
                "name": None,
                "data": {"reason": "x" * 90},
            }
            for number in range(1, events + 1)
        ],
    }


@pytest.mark.parametrize("rows", [1, 5, 10, 24, 60])
@pytest.mark.parametrize("columns", [20, 80, 200])
@pytest.mark.parametrize(("sandboxes", "events"), [(0, 0), (3, 0), (3, 3), (100, 64)])
def test_a_screen_is_no_larger_than_the_terminal(sandboxes: int, events: int, columns: int, rows: int) -> None:
    """One line too many scrolls all of them away."""
    lines = render_top.screen(view(sandboxes, events), columns, rows)
    assert len(lines) <= rows
    assert max(map(len, lines)) <= max(columns, len(CUT))


def test_the_busiest_are_seen_and_the_last_events_and_how_many_more_there_are() -> None:
    lines = render_top.screen(view(100, 64), 80, 24)
    assert "100 sandboxes   200 commands   49.5 CPUs   100 MiB" in lines[0]
    assert lines[1] == "pools      web 1 of 3 warm, 2 filling   bad 0 of 1 warm, failing"
    assert lines[2] == "services   chroma ready"
    header, first = lines[4:6]
    assert {"NAME", "CPU", "MEMORY", "PROBLEMS"} <= set(header.split())
    assert first.startswith("box-099")
    assert "disk_full" in first
    shown = sum(line.startswith("box-") for line in lines)
    assert f"and {100 - shown} more" in lines
    assert [line.split()[0] for line in lines[-4:]] == ["61", "62", "63", "64"]


def test_without_a_terminal_there_is_all_of_it() -> None:
    """For a file, or the next program."""
    lines = render_top.screen(view(100, 64), None, None)
    assert sum(line.startswith("box-") for line in lines) == 100
    assert lines[-1].startswith("64 ")


def test_what_came_between_two_questions_waits_for_the_next_look() -> None:
    """A sandbox that was removed in between has figures, and no name."""
    seen = view(2, 0)
    del seen["sandboxes"][0]
    assert sum(line.startswith("box-") for line in render_top.screen(seen, 80, 24)) == 1
