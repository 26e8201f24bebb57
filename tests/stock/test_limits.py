"""Limits on control groups v2, rootless, with systemd as Podman's manager: of the daemon as a service, in its slice.

Set, read and provoked; then bounded together with all others, over a restart of the service, and changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.cli.units import SLICE_UNIT
from sandboxd.client import Connection
from tests.engine.daemons import PATIENCE_S, wait_until
from tests.stock.bed import controllers_needed, group_of, limits, run
from tests.stock.installed import SOCKET, Ctl, service, show

pytestmark = controllers_needed

MIB = 1024 * 1024
ASKED = ("--memory", "64m", "--cpus", "0.5", "--pids", "50")
EXPECTED = {"memory": 64 * MIB, "memory_swap": 64 * MIB, "cpus": 500, "pids": 50}
TOGETHER_BYTES = 48 * MIB
MORE_THAN_THAT = "head -c 56m /dev/zero | tail -c 56m >/dev/null"
"""More than all of them may have together, and less than the sandbox may have for itself."""

KILLED = 128 + 9


@pytest.fixture(scope="module")
def ctl(daemon: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    """The daemon of the other tests is only needed for its image."""
    del daemon
    with service(tmp_path_factory.mktemp("limited")) as ctl:
        yield ctl


@pytest.fixture(scope="module")
def box(ctl: Ctl) -> dict[str, Any]:
    box: dict[str, Any] = ctl.json("create", *ASKED)
    return box


def limited(box: dict[str, Any]) -> Path:
    """The group that has the limits: systemd's scope, or with the crun of Debian 12 the group below it."""
    leaf = group_of(box["pid"])
    assert leaf.parent.name == f"libpod-{box['container_id']}.scope", "systemd is the manager"
    return leaf if (leaf / "memory.max").read_text() != "max\n" else leaf.parent


def slice_of(box: dict[str, Any]) -> Path:
    return group_of(box["pid"]).parent.parent


def held(box: dict[str, Any], field: str = "effective") -> dict[str, Any]:
    return {name: value for name, value in limits(box, field).items() if name in EXPECTED}


def test_they_are_proven_and_the_kernels_files_say_the_same(
    ctl: Ctl, box: dict[str, Any], figures: list[str]
) -> None:
    assert held(box) == EXPECTED
    assert box["verified"] is True
    assert slice_of(box).name == SLICE_UNIT
    files = ("memory.max", "memory.swap.max", "cpu.max", "pids.max")
    found = {name: (limited(box) / name).read_text().strip() for name in files}
    swap = found.pop("memory.swap.max")
    assert found == {"memory.max": str(64 * MIB), "cpu.max": "50000 100000", "pids.max": "50"}
    said = ", ".join(f"{name} {value}" for name, value in found.items())
    figures.append(f"limits in {SLICE_UNIT}: {said}, memory.swap.max {swap}")
    reported = held(ctl.json("inspect", box["id"]), "reported")
    assert {**reported, "memory_swap": None} == {**EXPECTED, "memory_swap": None}


def test_each_of_them_holds(ctl: Ctl, box: dict[str, Any], figures: list[str]) -> None:
    verdicts = ctl.json("verify", "--provoke", box["id"])["provocations"]
    figures.extend(f"provoked {verdict['limit']}: {verdict['evidence']}" for verdict in verdicts)
    by_limit = {verdict["limit"]: verdict["held"] for verdict in verdicts}
    # None for a CPU that the host of the machine did not give: a busy host is no failure of the limit.
    assert by_limit.pop("cpus") in {True, None}
    assert by_limit == {"memory": True, "pids": True}
    counted = usage(ctl, box)
    assert counted["ooms_own"] >= 1, "memory.events.local: it was its own limit"
    assert counted["pids_refused"] >= 1
    assert EXPECTED["memory"] // 2 < counted["memory_bytes_peak"] <= EXPECTED["memory"]
    assert counted["pids_peak"] is None or 1 < counted["pids_peak"] <= EXPECTED["pids"]


def usage(ctl: Ctl, box: dict[str, Any]) -> dict[str, Any]:
    (counted,) = ctl.json("stats", box["id"])["sandboxes"]
    return dict(counted)


def test_all_sandboxes_together_are_bounded_by_their_slice(ctl: Ctl, box: dict[str, Any], figures: list[str]) -> None:
    """Above its own limit, which still holds; and what runs out is told from its own."""
    before = usage(ctl, box)
    bound_together(box, str(TOGETHER_BYTES))
    try:
        proof = ctl.json("verify", box["id"])
        assert held(proof)["memory"] == TOGETHER_BYTES
        assert proof["verified"] is True
        assert "a tighter limit of 48 MiB applies above" in limits(proof, "reason")["memory"]
        assert ctl("exec", box["id"], "sh", "-c", MORE_THAN_THAT).returncode == KILLED
    finally:
        bound_together(box, "max")
    after = usage(ctl, box)
    assert after["oom_kills"] > before["oom_kills"]
    assert after["ooms_own"] == before["ooms_own"], "memory.events.local: it was not its own limit"
    killed = after["oom_kills"] - before["oom_kills"]
    figures.append(f"{SLICE_UNIT} at {TOGETHER_BYTES // MIB} MiB: oom_kill +{killed}, of its own limit +0")


def bound_together(box: dict[str, Any], maximum: str) -> None:
    told = maximum.replace("max", "infinity")
    run("systemctl", "--user", "set-property", "--runtime", SLICE_UNIT, f"MemoryMax={told}")
    file = slice_of(box) / "memory.max"
    wait_until(lambda: file.read_text().strip() == maximum, "systemd has written it")


def test_a_restart_of_the_service_changes_none_and_ends_nothing(ctl: Ctl, box: dict[str, Any]) -> None:
    script = "for n in $(seq 1 100000); do echo $n; sleep 0.2; done"
    command = ctl.out("exec", "-d", box["id"], "sh", "-c", script).strip()
    first = show("sandboxd.service", "MainPID")
    run("systemctl", "--user", "restart", "sandboxd.service")
    assert show("sandboxd.service", "MainPID") not in {first, "0"}
    found = ctl.json("inspect", box["id"])
    assert (found["state"], found["pid"], found["verified"]) == ("running", box["pid"], True)
    assert held(found) == EXPECTED
    written = len(ctl.out("logs", box["id"], command).split())
    wait_until(lambda: len(ctl.out("logs", box["id"], command).split()) > written, "the command goes on")


def test_they_change_while_it_runs_and_systemd_leaves_them_so(
    ctl: Ctl, box: dict[str, Any], figures: list[str]
) -> None:
    """Podman 4.3 cannot change the processes by itself; and systemd writes its own figures anew at a reload."""
    with Connection.connect(str(SOCKET)) as connection:
        asked = {"sandbox": box["id"], "limits": {"memory": "96m", "pids": 60}}
        began = time.monotonic()
        reply = connection.call("sandbox/update", asked, timeout_s=PATIENCE_S)
        figures.append(f"update of two limits: {(time.monotonic() - began) * 1000:.1f} ms, read back")
    changed = {**EXPECTED, "memory": 96 * MIB, "memory_swap": 96 * MIB, "pids": 60}
    assert held(reply) == changed
    assert reply["verified"] is True
    assert (limited(box) / "pids.max").read_text() == "60\n"
    run("systemctl", "--user", "daemon-reload")
    proof = ctl.json("verify", box["id"])
    assert held(proof) == changed
    assert proof["verified"] is True
