"""Commands as a table."""

from typing import Any

import pytest

from sandboxd.cli import render
from sandboxd.cli.render import command_list, verification


def row(argv: list[str], **end: Any) -> dict[str, Any]:
    known = {"exit_code": None, "signal": None, "status": "ok"}
    return {
        "command_id": "0123456789ab",
        "pid": 7,
        "argv": argv,
        "state": "ended" if end else "running",
        "started_at_ms": 0,
        "end": {**known, **end} if end else None,
    }


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ({}, "-"),
        ({"exit_code": 0}, "exit 0"),
        ({"exit_code": 7, "status": "nonzero"}, "exit 7"),
        ({"signal": 15, "status": "signaled"}, "signal 15"),
        ({"signal": 9, "status": "oom"}, "oom (signal 9)"),
        ({"exit_code": 1, "status": "timeout"}, "timeout (exit 1)"),
        ({"status": "lost"}, "lost"),
    ],
)
def test_an_end_is_a_code_or_a_signal_and_a_verdict_where_that_says_more(end: dict[str, Any], told: str) -> None:
    """137 alone says nothing of memory."""
    line = command_list([row(["true"], **end)], 60_000, None).splitlines()[1]
    assert [cell.strip() for cell in line.split("   ") if cell.strip()][3:] == ["1m", told, "true"]


def test_lines_are_cut_to_the_width_that_there_is() -> None:
    """So that each command is one line."""
    rows = [row(["echo", "x" * 100])]
    assert [len(line) for line in command_list(rows, 0, 70).splitlines()] == [50, 70]
    assert "x" * 100 in command_list(rows, 0, None)


def test_arguments_that_a_terminal_would_obey_are_shown_as_written_in_code() -> None:
    """And an empty one is seen at all."""
    assert command_list([row(["a", "", "\x1b[2J", "two words"])], 0, None).endswith("a '' '\\x1b[2J' two words\n")


def test_what_was_not_found_out_is_neither_yes_nor_no() -> None:
    """A provocation that could not be tried proves nothing, and disproves nothing."""
    rows = [{"limit": name, "held": held, "evidence": "e"} for name, held in (("a", True), ("b", False), ("c", None))]
    shown = verification({"limits": [], "provocations": rows})
    assert [line.split()[:2] for line in shown.splitlines()[-3:]] == [["a", "yes"], ["b", "no"], ["c", "-"]]


def test_a_list_fits_the_terminal_and_leaves_out_what_nobody_has() -> None:
    row = {
        "id": "sb-abcdefghij",
        "name": None,
        "state": "running",
        "engine": "podman",
        "image": "localhost/sandboxd/default:latest",
        "workspace": "/home/me/" + "long" * 40,
        "created_at_ms": 0,
        "expires_at_ms": None,
        "commands_running": 0,
        "verified": True,
        "problems": [],
    }
    piped = render.sandbox_list([row], 1000)
    assert "NAME" in piped
    assert "localhost/sandboxd/default:latest" in piped
    shown = render.sandbox_list([row], 1000, 100)
    assert max(map(len, shown.splitlines())) <= 100
    assert "NAME" not in shown
    assert "sandboxd/default " in shown
    assert render.sandbox_list([], 1000, 100) == render.sandbox_list([], 1000)


def test_a_narrow_terminal_costs_the_long_names_and_not_what_one_looks_for() -> None:
    """Whether something is wrong, and how long there is, matter more than the beginning of a path."""
    row = {
        "id": "sb-abcdefghij",
        "name": "box",
        "state": "running",
        "engine": "podman",
        "image": "localhost/sandboxd/default:latest",
        "workspace": "/home/me/projects/" + "long" * 10,
        "created_at_ms": 0,
        "expires_at_ms": 90_000,
        "commands_running": 2,
        "verified": True,
        "problems": [{"kind": "disk_full"}],
    }
    header, line = render.sandbox_list([row], 1000, 120).splitlines()
    assert max(len(header), len(line)) <= 120
    assert {"...glonglong", "sandboxd/default", "disk_full"} <= set(line.split())
    header, line = render.sandbox_list([row], 1000, 80).splitlines()
    assert {"AGE", "LEFT", "COMMANDS", "VERIFIED", "PROBLEMS"} <= set(header.split())
    assert "disk_full" in line
    assert max(len(header), len(line)) <= 80
