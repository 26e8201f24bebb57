"""Docker, rootful, for an ordinary user who is in its group, beside a rootless Podman."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import IMAGE, Daemon, wait_until
from tests.stock.bed import BED, POLICY, controllers_needed, limits, quick_bed, run, sudo

ASKED = {"limits": {"memory": "64m", "cpus": "0.5", "pids": 50}} if BED == "machine" else {}


@pytest.fixture(scope="module")
def box(daemon: Daemon, figures: list[str]) -> Iterator[dict[str, Any]]:
    sudo("systemctl start docker.socket")
    server = run("docker", "version", "--format={{.Server.Version}}").strip()
    figures.append(f"docker: {server}, rootful, for a member of its group")
    daemon.call("daemon/doctor")
    daemon.call("image/build", source="busybox", reference=IMAGE, engine="docker")
    project = daemon.directory / "docker-project"
    project.mkdir()
    with daemon.box("docker", workspace={"path": str(project)}, limits_policy=POLICY, **ASKED) as box:
        yield {**box, "project": str(project)}
    run("docker", "rmi", IMAGE)
    sudo("systemctl stop docker.socket docker.service")


def test_it_is_the_systems_and_may_be_used(daemon: Daemon, box: dict[str, Any]) -> None:
    (docker,) = (engine for engine in daemon.call("daemon/info")["engines"] if engine["name"] == "docker")
    assert (docker["usable"], docker["rootless"], docker["cgroup_version"]) == (True, False, "v2")
    assert daemon.sh(box, "id -u") == f"{os.getuid()}\n"


def test_files_are_the_callers(daemon: Daemon, box: dict[str, Any]) -> None:
    assert daemon.sh(box, "echo x > inside; stat -c %u inside") == f"{os.getuid()}\n"
    assert Path(box["project"], "inside").stat().st_uid == os.getuid()


@quick_bed
def test_one_daemon_drives_both_engines(daemon: Daemon, box: dict[str, Any]) -> None:
    """What is root's is ended and started again as what is the user's own."""
    with daemon.box("podman", limits_policy=POLICY) as other:
        assert {row["id"]: row["engine"] for row in daemon.sandboxes()} == {
            box["id"]: "docker",
            other["id"]: "podman",
        }
        for each in (box, other):
            started = daemon.ctl("exec", "-d", each["id"], "sh", "-c", "setsid sleep 3333 & sleep 3334")
            command = started.stdout.decode().strip()
            wait_until(lambda each=each: b"sleep 3333" in daemon.run(each, "ps").stdout, "both run")
            assert daemon.ctl("kill", each["id"], command).returncode == 0
            wait_until(lambda each=each: b"sleep 333" not in daemon.run(each, "ps").stdout, "both have ended")
            assert daemon.ctl("stop", each["id"]).returncode == 0
            assert daemon.ctl("start", each["id"]).returncode == 0
            assert daemon.sh(each, "echo $((6 * 7))") == "42\n"


@controllers_needed
def test_its_limits_are_proven(box: dict[str, Any]) -> None:
    """The group belongs to root: it is read, and not written, by us."""
    assert box["verified"] is True
    found = limits(box, "effective")
    assert [found[name] for name in ("memory", "memory_swap", "cpus", "pids")] == [67108864, 67108864, 500, 50]
