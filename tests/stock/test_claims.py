"""Warm sandboxes of a rootless Podman: a container that runs gets what is asked for, without any privilege."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, running, wait_until
from tests.stock.bed import BED, POLICY, podman_is_usable, quick_bed

CLAIMS = 3 if BED == "machine" else 15
ASKED = {"limits": {"memory": "96m", "cpus": "0.5", "pids": 40}} if BED == "machine" else {}
WITHOUT_PRIVILEGES = "0000000000000000"


@pytest.fixture(scope="module")
def pooled(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with warm slots; the one that the other tests share has seen to the image."""
    assert daemon.running
    env = {"SANDBOXD_POOL_MAX": "2", "SANDBOXD_POOL_MIN": "1", "SANDBOXD_DEFAULTS_ENGINE": "podman"}
    pooled = Daemon(tmp_path_factory.mktemp("pooled"), env={**env, "SANDBOXD_DEFAULTS_LIMITS_POLICY": POLICY})
    with running(pooled, ("podman",)):
        wait_until(lambda: podman_is_usable(pooled), "Podman answers")
        yield pooled
        pooled.remove_everything()
        pooled.call("pool/drain", template="default")
        wait_until(lambda: pooled.journal() == [], "all slots are gone")


def claim(daemon: Daemon, **params: Any) -> dict[str, Any]:
    """A sandbox from the pool, however long its slot takes."""
    asked = {"limits_policy": POLICY, "launch": "wait", "wait": PATIENCE_S, **ASKED, **params}
    box = daemon.call("sandbox/create", **asked)
    assert (box["launch"], box["miss_reason"]) == ("warm", "")
    return box


def options_of(daemon: Daemon, box: dict[str, Any]) -> set[str]:
    """How the project is mounted, as seen inside; below it is what the slot had there."""
    *_, top = daemon.sh(box, "grep ' /workspace ' /proc/mounts").splitlines()
    return set(top.split()[3].split(","))


def test_a_project_gets_into_a_container_that_runs_and_belongs_to_the_caller(pooled: Daemon, project: Path) -> None:
    pooled.call("pool/warm", template="default", count=1)
    (project / "later").write_text("written after the slot was made\n")
    box = claim(pooled, workspace={"path": str(project)}, env={"WHO": "me"}, name="claimed")
    uid = str(os.getuid())
    script = "cat later; echo $WHO; hostname; id -u; stat -c %u later; echo back > answer; stat -c %u answer"
    said = ["written after the slot was made", "me", "claimed", uid, uid, uid]
    assert pooled.sh(box, script).splitlines() == said
    answer = project / "answer"
    assert (answer.read_text(), answer.stat().st_uid, answer.stat().st_gid) == ("back\n", os.getuid(), os.getgid())
    assert box["workspace"]["mounted"] == "keep-id"
    assert box["verified"] is (POLICY == "strict")
    pooled.remove(box)
    assert (project / "later").exists(), "what was mounted is the caller's, and stays"


@quick_bed
def test_nobody_who_does_it_has_a_privilege(pooled: Daemon) -> None:
    """Neither the daemon nor its helper: no capability of the host, and no other user's id."""
    pooled.remove(claim(pooled))
    helpers = [child for child in psutil.Process(pooled.pid).children() if "sandbox-mounter" in child.name()]
    assert len(helpers) == 1
    for process in (psutil.Process(pooled.pid), *helpers):
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"\nCapPrm:\t{WITHOUT_PRIVILEGES}\n" in status
        assert f"\nCapEff:\t{WITHOUT_PRIVILEGES}\n" in status
        assert set(process.uids()) == {os.getuid()}


@quick_bed
def test_it_is_seen_without_devices_and_without_set_ids(pooled: Daemon, project: Path) -> None:
    box = claim(pooled, workspace={"path": str(project)})
    options = options_of(pooled, box)
    assert {"rw", "nosuid", "nodev"} <= options
    # Nobody inside has a capability: it can be neither taken away nor mounted otherwise.
    for attempt in ("umount /workspace", "mount -o remount,suid,dev /workspace", "mount --bind /tmp /workspace"):
        assert pooled.run(box, "busybox", *attempt.split()).end["exit_code"] != 0, attempt
    assert pooled.sh(box, "cat /workspace/outside") == "from outside\n"
    pooled.remove(box)


@quick_bed
def test_a_project_that_may_only_be_read(pooled: Daemon, project: Path) -> None:
    box = claim(pooled, workspace={"path": str(project), "mode": "ro"})
    assert pooled.sh(box, "cat outside; echo x > outside 2>/dev/null || echo refused") == "from outside\nrefused\n"
    options = options_of(pooled, box)
    assert {"ro", "nosuid", "nodev"} <= options
    assert (project / "outside").read_text() == "from outside\n"
    pooled.remove(box)


@quick_bed
@pytest.mark.parametrize("mode", ["overlay", "copy"])
def test_a_project_that_is_left_as_it_is(pooled: Daemon, project: Path, mode: str) -> None:
    asked = {"workspace": {"path": str(project), "mode": mode}, "limits_policy": POLICY, "wait": PATIENCE_S}
    box = pooled.call("sandbox/create", **asked)
    assert pooled.sh(box, "echo changed > outside; echo new > other; cat outside") == "changed\n"
    assert [path.name for path in project.iterdir()] == ["outside"]
    assert (project / "outside").read_text() == "from outside\n"
    changes = pooled.call("workspace/diff", sandbox=box["id"])["changes"]
    assert {(change["path"], change["kind"]) for change in changes} == {("outside", "modified"), ("other", "added")}
    assert pooled.ctl("workspace", "apply", box["id"]).returncode == 0
    assert (project / "other").stat().st_uid == os.getuid()
    assert (project / "outside").read_text() == "changed\n"
    pooled.remove(box)


def test_claims_and_kills_are_fast(pooled: Daemon, project: Path, figures: list[str]) -> None:
    """Figures, and no bounds: the machine is emulated. With project, variables and, where there are any, limits."""
    claims, kills = [], []
    for _ in range(CLAIMS):
        pooled.call("pool/warm", template="default", count=1)
        with pooled.connect() as connection:
            # A host that is busy enough for a slot to be lost must not have one made in its place.
            patient = {"launch": "wait", "wait": PATIENCE_S, "limits_policy": POLICY}
            asked = {"workspace": {"path": str(project)}, "env": {"A": "1"}, **patient, **ASKED}
            began = time.monotonic()
            box = connection.call("sandbox/create", asked, timeout_s=PATIENCE_S)
            claims.append((time.monotonic() - began) * 1000)
            assert box["launch"] == "warm"
            began = time.monotonic()
            connection.call("sandbox/kill", {"sandbox": box["id"]}, timeout_s=PATIENCE_S)
            kills.append((time.monotonic() - began) * 1000)
        init = Path(f"/proc/{box['pid']}")
        wait_until(lambda init=init: not init.exists(), "all that ran in it is gone")
    figures.append(f"warm claim: {statistics.median(claims):.1f} ms, at most {max(claims):.1f} ms, of {CLAIMS}")
    figures.append(f"kill: {statistics.median(kills):.1f} ms, at most {max(kills):.1f} ms, of {CLAIMS}")
