"""Commands as a table."""

from typing import Any

import pytest

from sandboxd.cli import render, render_audit, render_host, render_network, tables
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


WIDTH = 80
SENTENCE = "several words that say what is wrong here, and that go on for more than a terminal has room for " * 2


def pool_row() -> dict[str, Any]:
    return {
        "template": "web-front-end",
        "engine": "podman",
        "user": "1000:1000",
        "workspace": "/home/me/" + "long" * 20,
        "warm": 1,
        "filling": 0,
        "drained": False,
        "target": 2,
        "min": 0,
        "max": 8,
        "hits": 1234,
        "misses": {"empty": 12},
        "ready_ms": 812.0,
        "failure": "",
    }


def template_row() -> dict[str, Any]:
    return {
        "name": "web-front-end",
        "image": "localhost/sandboxd/default:latest",
        "memory": "512m",
        "cpus": "0.5",
        "pids": 512,
        "network": "allow",
        "pool_min": 0,
        "pool_max": 8,
        "description": SENTENCE,
    }


def metrics_row() -> dict[str, Any]:
    pressure = {"some_avg10_percent": 12.0}
    return {
        "id": "sb-abcdefghij",
        "name": "web-front-end",
        "state": "running",
        "reason": "",
        "cpu_percent": 123.4,
        "cpu_millis": 2000,
        "memory_bytes": 123 << 20,
        "memory_bytes_max": 512 << 20,
        "pids": 12,
        "pids_max": 512,
        "memory_bytes_peak": 400 << 20,
        "throttled_us": 12_300_000,
        "oom_kills": 3,
        "cpu_pressure": pressure,
        "memory_pressure": None,
        "io_pressure": None,
    }


SCREENS = {
    "stats": (lambda columns: render.metrics_table([metrics_row()], columns), {"sb-abcdefghij", "3", "cpu", "12%"}),
    "doctor": (
        lambda columns: render_host.doctor(
            {"checks": [{"name": "id-mapped mounts", "status": "warning", "detail": SENTENCE, "fix": ""}]}, columns
        ),
        {"id-mapped", "warning", "room"},
    ),
    "pool": (lambda columns: render_host.pools([pool_row()], columns), {"web-front-end", "1234", "12", "8"}),
    "template": (lambda columns: render_host.templates([template_row()], columns), {"web-front-end", "512m", "0-8"}),
    "image": (
        lambda columns: render_host.images(
            [
                {
                    "engine": "podman",
                    "tags": ["localhost/" + "long" * 20 + "/name:1"],
                    "size_bytes": 1 << 20,
                    "image_id": "a" * 64,
                    "created_at_ms": 0,
                }
            ],
            60_000,
            columns,
        ),
        {"podman", "aaaaaaaaaaaa", "1m"},
    ),
    "config": (
        lambda columns: render_host.config(
            [
                {
                    "key": "capacity.memory_overcommit",
                    "value": "localhost/sandboxd/default:latest",
                    "origin": "/home/me/.config/sandboxd/config.toml",
                    "description": SENTENCE,
                }
            ],
            columns,
        ),
        {"capacity.memory_overcommit", ".../config.toml"},
    ),
    "gc": (
        lambda columns: render_host.gc(
            [{"action": "remove", "kind": "container", "name": "c" * 64, "engine": "podman", "reason": SENTENCE}],
            columns,
        ),
        {"remove", "container", "podman", "room"},
    ),
    "services": (
        lambda columns: render_network.services(
            [
                {
                    "name": "chroma",
                    "state": "degraded",
                    "reason": SENTENCE,
                    "since_ms": 0,
                    "pid": 123456,
                    "address": "127.0.0.1:45678",
                    "sandbox": None,
                    "port": 8000,
                    "restarts": 12,
                    "sandboxes": [],
                }
            ],
            60_000,
            columns,
        ),
        {"chroma", "degraded", "127.0.0.1:8000", "chroma:", "room"},
    ),
    "audit": (
        lambda columns: render_audit.entries(
            {
                "entries": [
                    {
                        "seq": 123456,
                        "at_ms": 0,
                        "kind": "request",
                        "uid": 1000,
                        "pid": 123456,
                        "exe": "/usr/bin/python3.11",
                        "method": "sandbox/set_timeout",
                        "sandbox": "sb-abcdefghij",
                        "result": "not_found",
                        "duration_ms": 1234.5,
                        "data": {},
                        "arguments": {"lifetime": "10m", "on_timeout": "kill", "text": SENTENCE, "dry_run": True},
                    }
                ],
                "more": False,
            },
            columns,
        ),
        {"123456", "sandbox/set_timeout", "sb-abcdefghij", "not_found", "lifetime=10m"},
    ),
}


@pytest.mark.parametrize("name", SCREENS)
def test_every_table_fits_a_narrow_terminal_with_what_one_looks_for(name: str) -> None:
    """A line that a terminal breaks is no row of a table any more. A pipe gets all of it, each row on its line."""
    text_of, told = SCREENS[name]
    narrow = text_of(WIDTH)
    assert max(len(line) for line in narrow.splitlines()) <= WIDTH, narrow
    assert told <= set(narrow.split()), narrow
    assert max(len(line) for line in text_of(None).splitlines()) > WIDTH


def test_what_one_asks_for_by_name_goes_on_below_itself_and_is_not_cut() -> None:
    """Words are kept whole where a line is too short for them all: a path may be wanted."""
    path = "/home/me/" + "long" * 30
    text = tables.facts([("detail", SENTENCE), ("path", path)], WIDTH)
    assert " ".join(text.split()) == f"detail {SENTENCE}path {path}"
    assert all(line.startswith(("detail   ", "path     ", "         ")) for line in text.splitlines())


def test_what_a_template_has_none_of_is_a_dash_and_lists_are_no_programs_text() -> None:
    row = {**template_row(), "description": "short", "env": {"A": "hidden", "B": ""}, "allow": [], "deny": ["a", "b"]}
    lines = dict(line.split(None, 1) for line in render_host.template(row).splitlines())
    assert (lines["env"], lines["allow"], lines["deny"]) == ("A   B", "-", "a   b")


@pytest.mark.parametrize(("seconds", "text"), [(0, "now"), (5, "5s ago"), (120, "2m ago")])
def test_now_is_not_ago(seconds: int, text: str) -> None:
    assert tables.ago(1_000_000, 1_000_000 + seconds * 1000) == text
