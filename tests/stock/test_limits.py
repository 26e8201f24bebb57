"""Limits on control groups v2, rootless, with systemd as Podman's manager: set, read, provoked and changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import Daemon
from tests.stock.bed import controllers_needed, group_of, limits

pytestmark = controllers_needed

MIB = 1024 * 1024
ASKED = {"memory": "64m", "cpus": "0.5", "pids": "50"}
EXPECTED = {"memory": 64 * MIB, "memory_swap": 64 * MIB, "cpus": 500, "pids": 50}

KERNEL_FILES = {
    "memory_bytes_peak": "memory.peak",
    "pids_peak": "pids.peak",
    "cpu_pressure": "cpu.pressure",
    "memory_pressure": "memory.pressure",
    "io_pressure": "io.pressure",
}


@pytest.fixture(scope="module")
def box(daemon: Daemon) -> Iterator[dict[str, Any]]:
    with daemon.box("podman", limits=ASKED) as box:
        yield box


def limited(box: dict[str, Any]) -> Path:
    """The group that has the limits: systemd's scope, or with the crun of Debian 12 the group below it."""
    leaf = group_of(box["pid"])
    assert leaf.parent.name == f"libpod-{box['container_id']}.scope", "systemd is the manager"
    return leaf if (leaf / "memory.max").read_text() != "max\n" else leaf.parent


def held(box: dict[str, Any], field: str = "effective") -> dict[str, Any]:
    return {name: value for name, value in limits(box, field).items() if name in EXPECTED}


def test_they_are_proven_and_the_kernels_files_say_the_same(
    daemon: Daemon, box: dict[str, Any], figures: list[str]
) -> None:
    assert held(box) == EXPECTED
    assert box["verified"] is True
    files = ("memory.max", "memory.swap.max", "cpu.max", "pids.max")
    found = {name: (limited(box) / name).read_text().strip() for name in files}
    swap = found.pop("memory.swap.max")
    assert found == {"memory.max": str(64 * MIB), "cpu.max": "50000 100000", "pids.max": "50"}
    figures.append(f"limits: {', '.join(f'{name} {value}' for name, value in found.items())}, memory.swap.max {swap}")
    reported = held(daemon.call("sandbox/get", sandbox=box["id"]), "reported")
    assert {**reported, "memory_swap": None} == {**EXPECTED, "memory_swap": None}


def test_each_of_them_holds(daemon: Daemon, box: dict[str, Any], figures: list[str]) -> None:
    verdicts = daemon.call("sandbox/verify", sandbox=box["id"], provoke=True)["provocations"]
    figures.extend(f"provoked {verdict['limit']}: {verdict['evidence']}" for verdict in verdicts)
    by_limit = {verdict["limit"]: verdict["held"] for verdict in verdicts}
    # None for a CPU that the host of the machine did not give: a busy host is no failure of the limit.
    assert by_limit.pop("cpus") in {True, None}
    assert by_limit == {"memory": True, "pids": True}


def test_what_the_kernel_counts_is_told_and_nothing_else(daemon: Daemon, box: dict[str, Any]) -> None:
    """Absence is unknown, never zero."""
    group = group_of(box["pid"]).parent
    (stats,) = daemon.call("sandbox/metrics", sandboxes=[box["id"]])["sandboxes"]
    there = {field: (group / name).exists() for field, name in KERNEL_FILES.items()}
    assert {field: stats[field] is not None for field in KERNEL_FILES} == there


def test_they_change_while_it_runs(daemon: Daemon, box: dict[str, Any]) -> None:
    """Podman 4.3 cannot change the processes by itself."""
    reply = daemon.call("sandbox/update", sandbox=box["id"], limits={"memory": "96m", "pids": 60})
    assert held(reply) == {**EXPECTED, "memory": 96 * MIB, "memory_swap": 96 * MIB, "pids": 60}
    assert reply["verified"] is True
    assert (limited(box) / "pids.max").read_text() == "60\n"
