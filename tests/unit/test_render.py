"""What people read: replies as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.quantities import format_bytes
from sandboxd.cli import render, render_host, tables

LIMIT = {
    "name": "memory",
    "unit": "bytes",
    "requested": 512 << 20,
    "reported": None,
    "effective": 512 << 20,
    "verified": True,
    "reason": "",
}


@given(st.lists(st.tuples(st.text("abc ", max_size=9), st.text("abc", max_size=9)), max_size=5))
def test_columns_start_at_the_same_place_in_every_line(rows: list[tuple[str, str]]) -> None:
    """That is what makes it a table."""
    lines = tables.table(("A", "B"), rows).splitlines()
    width = max(len(first) for first, _ in [("A", "B"), *rows]) + len(tables.GAP)
    assert len(lines) == len(rows) + 1
    assert [line[width:] for line in lines[1:]] == [second for _, second in rows]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        ((512 << 20) + 1, "512 MiB"),
        (157_810_688, "151 MiB"),
        (1_048_127_424, "1000 MiB"),
        ((1 << 20) - 1, "1 MiB"),
        ((8 << 20) - 100, "8 MiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_sizes_are_in_the_largest_unit_that_fits(count: int | None, text: str) -> None:
    """And unknown is not zero."""
    assert tables.size(count) == text


@given(st.integers(0, 1 << 52) | st.integers(0, 1 << 21) | st.integers(-600, 600).map(lambda near: (1 << 30) + near))
def test_tables_and_messages_tell_a_size_alike(count: int) -> None:
    """The command line has a rule of its own, for it imports nothing of the daemon's."""
    assert tables.size(count) == format_bytes(count)


@pytest.mark.parametrize(
    ("since_ms", "text"),
    [(None, "-"), (100_000_000, "now"), (100_000_001, "now"), (99_995_000, "5s"), (99_880_000, "2m"), (1, "1d")],
)
def test_ages_are_in_the_largest_unit_that_fits(since_ms: int | None, text: str) -> None:
    """Clocks of two processes may differ by a little, so an age is never negative."""
    assert tables.age(since_ms, 100_000_000) == text


def test_a_limit_shows_what_was_asked_said_and_enforced() -> None:
    """In the units that people use; a reason stands beside the verdict."""
    cpus = LIMIT | {"name": "cpus", "unit": "millicpu", "requested": 500, "effective": 1500, "verified": False}
    text = render.limits_table([LIMIT, cpus | {"reason": "no controller"}])
    header, memory, cpu = (line.split("   ") for line in text.splitlines())
    assert [cell.strip() for cell in header if cell] == ["LIMIT", "REQUESTED", "REPORTED", "EFFECTIVE", "VERIFIED"]
    assert [cell.strip() for cell in memory if cell.strip()] == ["memory", "512 MiB", "-", "512 MiB", "yes"]
    assert [cell.strip() for cell in cpu if cell.strip()] == ["cpus", "0.5", "-", "1.5", "no (no controller)"]


def test_doctor_lists_each_fix_once() -> None:
    """One command often mends several findings."""
    check = {"name": "a", "status": "failure", "detail": "", "fix": "mend it"}
    text = render_host.doctor({"checks": [check, check | {"name": "b"}]})
    assert text.count("  mend it\n") == 1
    assert "mend" not in render_host.doctor({"checks": [check | {"fix": ""}]})


def test_the_inspected_environment_is_names_only() -> None:
    """Values may be secrets, and screens are shared."""
    info = {
        "workspace": {"path": "/p", "mode": "rw", "mounted": "keep-id", "backend": "bind"},
        "mounts": [],
        "env": {"TOKEN": "hunter2"},
        "metadata": {"a": "b"},
        "limits": [LIMIT],
        "services": ["chroma=private"],
        "secrets": ["token"],
        "ephemeral": False,
        **dict.fromkeys(
            ("id", "name", "state", "state_reason", "engine", "image", "container_id", "pid", "user", "network"), "x"
        ),
        **dict.fromkeys(("lifetime_ms", "expires_at_ms", "idle_timeout_ms")),
        "on_timeout": "kill",
        "created_at_ms": 1,
        "commands_running": 0,
    }
    text = render.sandbox(info, 1)
    assert "TOKEN" in text
    assert "hunter2" not in text
    assert "/p (rw, keep-id)" in text


def test_waiting_names_what_is_waited_for() -> None:
    """Pressure tells more than usage: usage at the limit may be fine."""
    pressure = {"some_avg10_percent": 12.3, "full_avg10_percent": 0, "some_total_us": 0, "full_total_us": 0}
    row = dict.fromkeys(
        (
            *("name", "cpu_percent", "cpu_millis", "memory_bytes", "memory_bytes_max", "memory_bytes_peak", "pids"),
            *("pids_max", "throttled_us", "oom_kills", "io_pressure"),
        )
    )
    text = render.metrics_table(
        [row | {"id": "i", "state": "running", "reason": "", "cpu_pressure": pressure, "memory_pressure": pressure}]
    )
    assert text.splitlines()[1].endswith("cpu 12% memory 12%")


def test_the_daemon_lists_its_engines() -> None:
    """Which one is the default, and why another one is not usable."""
    engine = {
        "name": "podman",
        "default": True,
        "usable": False,
        "server_version": None,
        "client_version": "4.3",
        "rootless": True,
        "cgroup_version": None,
        "reason": "no socket",
    }
    info = {"pid": 1, "version": "1", "started_at_ms": 0, "socket": "/s", "state_dir": "/d", "sandboxes": 0}
    text = render_host.daemon({**info, "rss_bytes": 1, "engines": [engine]}, 0)
    assert "podman (default)" in text
    assert "no socket" in text
    assert render_host.daemon({**info, "rss_bytes": 1, "engines": []}, 0).count("ENGINE") == 0
