"""Every limit, from what was asked to what the kernel holds, on each engine.

What the product says is compared with what the kernel says, read by code of the tests' own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine import kernel
from tests.engine.conftest import Box
from tests.engine.daemons import Daemon, wait_until

pytestmark = pytest.mark.engine

MIB = 1024 * 1024
ASKED = {"memory": "96m", "cpus": "0.5", "pids": "64", "cpuset": "0", "shm": "8m", "tmp": "40m", "nofile": "256"}
EXPECTED = {
    "memory": 96 * MIB,
    "memory_swap": 96 * MIB,
    "cpus": 500,
    "pids": 64,
    "cpuset": "0",
    "shm": 8 * MIB,
    "nofile": 256,
    "tmpfs:/home/sandbox": 40 * MIB,
    "tmpfs:/tmp": 40 * MIB,
}
NOT_REPORTED = {"memory_swap", "tmpfs:/home/sandbox", "tmpfs:/tmp"}
"""What no inspect of an engine says."""


@pytest.fixture(scope="module")
def limited(daemon: Daemon, engine: str) -> Iterator[Box]:
    """A sandbox with every limit set."""
    with daemon.box(engine, limits=ASKED) as limited:
        yield limited


def rows(reply: dict[str, Any], field: str) -> dict[str, Any]:
    return {row["name"]: row[field] for row in reply["limits"]}


def held_to(**changes: Any) -> kernel.Held:
    """What the kernel is to hold such a sandbox to."""
    held = kernel.Held(
        memory=96 * MIB,
        memory_and_swap=96 * MIB,
        cpu_millis=500,
        pids=64,
        cpuset="0",
        nofile=("256", "256"),
        shm=8 * MIB,
        tmp=40 * MIB,
        home=40 * MIB,
    )
    return held._replace(**changes)


def test_each_limit_is_requested_and_reported_and_effective(daemon: Daemon, limited: Box) -> None:
    reply = daemon.call("sandbox/get", sandbox=limited["id"])
    assert rows(reply, "requested") == EXPECTED
    assert rows(reply, "effective") == EXPECTED
    assert rows(reply, "reported") == {name: None if name in NOT_REPORTED else EXPECTED[name] for name in EXPECTED}
    assert all(rows(reply, "verified").values())
    assert reply["verified"] is True


def test_the_kernels_own_files_say_the_same(limited: Box) -> None:
    """That it says ``verified`` is worth what this finds."""
    assert kernel.held(limited["pid"]) == held_to()


def test_create_proves_before_it_answers(limited: Box) -> None:
    assert rows(limited, "effective") == EXPECTED
    assert limited["verified"] is True


def test_the_limits_are_felt_inside(daemon: Daemon, limited: Box) -> None:
    assert daemon.sh(limited, "ulimit -n; ulimit -Hn; nproc").split() == ["256", "256", "1"]
    for place, size_mib in (("/dev/shm", 8), ("/tmp", 40), ("/home/sandbox", 40)):
        script = f"dd if=/dev/zero of={place}/fill bs=1M count=64; wc -c < {place}/fill; rm {place}/fill"
        ran = daemon.run(limited, "sh", "-c", script)
        assert b"No space left" in ran.stderr
        assert int(ran.stdout) == size_mib * MIB


def test_what_was_not_asked_for_is_limited_all_the_same(daemon: Daemon, box: Box) -> None:
    """A sandbox without limits would be one that can take the host."""
    assert {"memory", "memory_swap", "cpus", "pids", "shm", "nofile", "tmpfs:/tmp"} <= set(rows(box, "effective"))
    assert box["verified"] is True
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert kernel.held(box["pid"]).memory < host_bytes


def test_a_running_sandbox_gets_other_limits_and_proves_them_again(daemon: Daemon, engine: str) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    cpuset = f"0-{cpus[-1]}" if cpus == list(range(len(cpus))) and len(cpus) > 1 else "0"
    with daemon.box(engine, limits=ASKED) as box:
        asked = {"memory": "128m", "cpus": "0.25", "pids": "48", "cpuset": cpuset}
        updated = daemon.call("sandbox/update", sandbox=box["id"], limits=asked)
        changed = {"memory": 128 * MIB, "memory_swap": 128 * MIB, "cpus": 250, "pids": 48, "cpuset": cpuset}
        assert rows(updated, "requested") == EXPECTED | changed
        assert rows(updated, "effective") == EXPECTED | changed
        assert updated["verified"] is True
        expected = held_to(memory=128 * MIB, memory_and_swap=128 * MIB, cpu_millis=250, pids=48, cpuset=cpuset)
        assert kernel.held(box["pid"]) == expected

        daemon.call("sandbox/update", sandbox=box["id"], limits={"memory": "72m"})
        expected = expected._replace(memory=72 * MIB, memory_and_swap=72 * MIB)
        assert kernel.held(box["pid"]) == expected, "lowering one limit leaves the others alone"


def test_memory_in_use_cannot_be_taken_away(daemon: Daemon, limited: Box) -> None:
    """The kernel would kill what holds it."""
    daemon.sh(limited, "dd if=/dev/zero of=/tmp/held bs=1M count=24 2>/dev/null")
    refusal = daemon.refusal("sandbox/update", sandbox=limited["id"], limits={"memory": "16m"})
    daemon.sh(limited, "rm /tmp/held")
    assert refusal.type == "conflict", refusal
    assert "in use" in refusal.detail
    assert kernel.held(limited["pid"]) == held_to()
    assert rows(daemon.call("sandbox/get", sandbox=limited["id"]), "requested") == EXPECTED


def test_processes_that_run_cannot_be_taken_away(daemon: Daemon, limited: Box) -> None:
    """No process would be ended by it, and the sandbox would be stuck."""
    started = daemon.call(
        "commands/start",
        sandbox=limited["id"],
        argv=["sh", "-c", "for n in $(seq 1 20); do sleep 1000 & done; wait"],
    )
    wait_until(lambda: len(kernel.processes(limited["pid"])) > 20, "all of them ran")
    refusal = daemon.refusal("sandbox/update", sandbox=limited["id"], limits={"pids": 10})
    daemon.call("commands/kill", sandbox=limited["id"], command_id=started["command_id"])
    assert refusal.type == "conflict", refusal
    assert kernel.held(limited["pid"]).pids == 64


@pytest.mark.parametrize("name", ["shm", "tmp", "nofile"])
def test_what_is_fixed_at_creation_is_refused_not_ignored(daemon: Daemon, limited: Box, name: str) -> None:
    refusal = daemon.refusal("sandbox/update", sandbox=limited["id"], limits={name: 16 * MIB, "pids": 50})
    assert refusal.type == "invalid_argument"
    assert f"--{name}" in refusal.brief
    assert kernel.held(limited["pid"]).pids == 64, "nothing of a refused request is done"


def test_running_into_each_limit_shows_that_it_holds(daemon: Daemon, engine: str) -> None:
    """The last doubt: a limit may be written down where it has no effect."""
    with daemon.box(engine, limits=ASKED) as box:
        proof = daemon.call("sandbox/verify", sandbox=box["id"], provoke=True)
        held = {entry["limit"]: entry["held"] for entry in proof["provocations"]}
        assert held == {"memory": True, "cpus": True, "pids": True}, proof["provocations"]
        assert all(entry["evidence"] for entry in proof["provocations"])
        assert proof["verified"] is True
        _the_counters_tell(daemon, box)
        assert daemon.sh(box, "echo alive") == "alive\n"
        wait_until(lambda: len(kernel.processes(box["pid"])) == 1, "the provocation is over")


def _the_counters_tell(daemon: Daemon, box: Box) -> None:
    (usage,) = daemon.call("sandbox/metrics", sandboxes=[box["id"]])["sandboxes"]
    pid = box["pid"]
    kills = kernel.counters(pid, "memory", "memory.oom_control", "memory.events")["oom_kill"]
    throttled = kernel.counters(pid, "cpu", "cpu.stat", "cpu.stat")["nr_throttled"]
    refused = kernel.counters(pid, "pids", "pids.events", "pids.events")["max"]
    assert min(kills, throttled, refused) >= 1
    assert (usage["oom_kills"], usage["pids_refused"]) == (kills, refused)
    assert usage["throttled_periods"] >= 1
    assert usage["memory_bytes_max"] == 96 * MIB
    assert 0 < usage["memory_bytes"] <= usage["memory_bytes_peak"] <= 96 * MIB
    assert usage["pids_max"] == 64
    assert usage["pids"] >= 1
    assert usage["cpu_us"] > 0


def test_the_command_line_shows_the_proofs(daemon: Daemon, limited: Box) -> None:
    reply = daemon.ctl_json("inspect", limited["id"])
    assert rows(reply, "effective") == EXPECTED
    assert daemon.ctl("verify", limited["id"]).returncode == 0
    shown = daemon.ctl("update", "--pids", "60", limited["id"]).stdout.decode()
    assert kernel.held(limited["pid"]).pids == 60
    assert any(line.split()[0] == "pids" and line.split()[-1] == "yes" for line in shown.splitlines() if line)
    daemon.ctl("update", "--pids", "64", limited["id"])
