"""Limits on control groups v2, rootless, with systemd as Podman's manager: set, read, provoked and changed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import PATIENCE_S, Daemon
from tests.stock.bed import controllers_needed, group_of, limits

pytestmark = controllers_needed

MIB = 1024 * 1024
ASKED = {"memory": "64m", "cpus": "0.5", "pids": "50"}
EXPECTED = {"memory": 64 * MIB, "memory_swap": 64 * MIB, "cpus": 500, "pids": 50}


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
    (counted,) = daemon.ctl_json("stats", box["id"])["sandboxes"]
    assert counted["ooms_own"] >= 1, "memory.events.local: it was its own limit"
    assert counted["pids_refused"] >= 1
    assert EXPECTED["memory"] // 2 < counted["memory_bytes_peak"] <= EXPECTED["memory"]
    assert counted["pids_peak"] is None or 1 < counted["pids_peak"] <= EXPECTED["pids"]


def test_they_change_while_it_runs(daemon: Daemon, box: dict[str, Any], figures: list[str]) -> None:
    """Podman 4.3 cannot change the processes by itself."""
    with daemon.connect() as connection:
        asked = {"sandbox": box["id"], "limits": {"memory": "96m", "pids": 60}}
        began = time.monotonic()
        reply = connection.call("sandbox/update", asked, timeout_s=PATIENCE_S)
        figures.append(f"update of two limits: {(time.monotonic() - began) * 1000:.1f} ms, read back")
    assert held(reply) == {**EXPECTED, "memory": 96 * MIB, "memory_swap": 96 * MIB, "pids": 60}
    assert reply["verified"] is True
    assert (limited(box) / "pids.max").read_text() == "60\n"
