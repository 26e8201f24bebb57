"""Docker, rootful, for an ordinary user who is in its group, beside a rootless Podman."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import IMAGE, Daemon
from tests.stock.bed import BED, POLICY, limits, run, sudo

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


@pytest.mark.skipif(BED == "namespaces", reason="control groups in namespaces of a v1 host have no controllers")
def test_its_limits_are_proven(box: dict[str, Any]) -> None:
    """The group belongs to root: it is read, and not written, by us."""
    assert box["verified"] is True
    found = limits(box, "effective")
    assert [found[name] for name in ("memory", "memory_swap", "cpus", "pids")] == [67108864, 67108864, 500, 50]
