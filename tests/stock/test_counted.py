"""What the kernel counts for a sandbox is told where it is there; else the figure is unknown, and never zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.daemons import Daemon, wait_until
from tests.stock import telling
from tests.stock.bed import BED, POLICY, group_of

FILES = {
    "cpu_us": "cpu.stat",
    "memory_bytes": "memory.current",
    "memory_bytes_peak": "memory.peak",
    "oom_kills": "memory.events",
    "ooms_own": "memory.events.local",
    "pids": "pids.current",
    "pids_peak": "pids.peak",
    "pids_refused": "pids.events",
    "cpu_pressure": "cpu.pressure",
    "memory_pressure": "memory.pressure",
    "io_pressure": "io.pressure",
}
"""Figure and the file that it is read from: with the kernel and the controllers, some of them are there."""

WITH_CONTROLLERS = {"memory_bytes", "memory_bytes_peak", "oom_kills", "ooms_own", "pids", "pids_refused"}


@pytest.fixture
def box(daemon: Daemon) -> Iterator[dict[str, Any]]:
    with daemon.box("podman", limits_policy=POLICY) as box:
        yield box


def test_each_figure_is_told_where_its_file_is_and_unknown_where_not(
    daemon: Daemon, box: dict[str, Any], figures: list[str]
) -> None:
    group = group_of(box["pid"]).parent
    assert box["container_id"] in group.name
    (stats,) = daemon.ctl_json("stats", box["id"])["sandboxes"]
    there = {figure: (group / name).exists() for figure, name in FILES.items()}
    assert {figure: stats[figure] is not None for figure in FILES} == there
    assert there["cpu_us"]
    # Both halves are proven: the machine has what the quick bed has not.
    assert {there[figure] for figure in WITH_CONTROLLERS} == {BED == "machine"}
    absent = [FILES[figure] for figure, is_there in there.items() if not is_there]
    figures.append(f"control group files that are not there, and so unknown: {', '.join(absent) or 'none'}")


def test_a_sandbox_is_killed_by_one_write_to_its_group(daemon: Daemon, box: dict[str, Any]) -> None:
    """cgroup.kill: what forks meanwhile is killed as well."""
    daemon.call("commands/start", sandbox=box["id"], argv=["sh", "-c", "while :; do sleep 0.01 & done"])
    group = group_of(box["pid"]).parent
    assert (group / "cgroup.kill").exists()
    daemon.remove(box)
    assert telling.told(box["pid"], done=True) in daemon.log.read_text()
    wait_until(lambda: not group.exists(), "systemd has removed its group")
