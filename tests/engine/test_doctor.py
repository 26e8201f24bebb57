"""``sandboxctl doctor`` on this host: what it finds, why, and the one command for each thing that is wrong."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import Daemon, running

pytestmark = pytest.mark.engine


def report(daemon: Daemon, engine: str) -> dict[str, Any]:
    (row,) = (row for row in daemon.call("daemon/info")["engines"] if row["name"] == engine)
    return row


def test_a_host_that_runs_this_suite_is_healthy(daemon: Daemon) -> None:
    doctor = daemon.call("daemon/doctor")
    assert doctor["healthy"] is True, doctor["checks"]
    assert all(not check["fix"] for check in doctor["checks"] if check["status"] == "ok")
    assert all(check["fix"] for check in doctor["checks"] if check["status"] != "ok")
    done = daemon.ctl("doctor")
    assert done.returncode == 0
    assert all(check["name"] in done.stdout.decode() for check in doctor["checks"])


def test_each_engine_is_described_as_its_own_client_does(daemon: Daemon, engine: str) -> None:
    row = report(daemon, engine)
    version = "{{.Version.Version}}" if engine == "podman" else "{{.ServerVersion}}"
    driver = "{{.Store.GraphDriverName}}" if engine == "podman" else "{{.Driver}}"
    told = daemon.client(engine, "info", "--format", f"{version} {driver}").split()
    assert [row["server_version"], row["storage_driver"]] == told
    assert row["usable"] is True
    assert row["rootless"] is False
    assert {"memory", "cpu", "pids"} <= set(row["controllers"])
    assert row["nofile_hard_max"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    (check,) = (check for check in daemon.call("daemon/doctor")["checks"] if check["name"] == engine)
    for said in (told[0], told[1], "rootful", row["oci_runtime"], str(row["nofile_hard_max"])):
        assert said in check["detail"]


def test_the_control_groups_are_named_as_they_are_mounted(daemon: Daemon, engine: str) -> None:
    kinds = {line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    whole = "cgroup2" in kinds and "cgroup" not in kinds
    expected = "v2" if whole else "hybrid" if "cgroup2" in kinds else "v1"
    assert report(daemon, engine)["cgroup_version"] == expected
    (check,) = (check for check in daemon.call("daemon/doctor")["checks"] if check["name"] == f"{engine} limits")
    assert f"cgroup {expected}" in check["detail"]


def test_a_runtime_that_is_not_the_engines_own_choice_has_a_reason(daemon: Daemon) -> None:
    """Podman prefers crun, which refuses v1 and hybrid hosts: without a reason, the other would be a riddle."""
    row = report(daemon, "podman")
    own = daemon.client("podman", "info", "--format", "{{.Host.OCIRuntime.Name}}").strip()
    if row["oci_runtime"] == own:
        assert row["oci_runtime_reason"] == ""
    else:
        assert row["cgroup_version"] in {"v1", "hybrid"}
        assert own in row["oci_runtime_reason"]


def test_the_socket_of_docker_is_named(daemon: Daemon) -> None:
    path = report(daemon, "docker")["socket_path"]
    assert os.path.exists(path)
    (check,) = (check for check in daemon.call("daemon/doctor")["checks"] if check["name"] == "docker")
    assert path in check["detail"]


def test_a_missing_image_has_the_command_that_builds_it(daemon: Daemon, tmp_path: Path) -> None:
    image = "localhost/sandboxd/never:built"
    with running(Daemon(tmp_path / "other", env={"SANDBOXD_DEFAULTS_IMAGE": image})) as other:
        doctor = other.call("daemon/doctor")
        assert doctor["healthy"] is False
        for engine in ("podman", "docker"):
            (check,) = (check for check in doctor["checks"] if check["name"] == f"{engine} image")
            assert check["status"] == "failure"
            assert check["fix"] == f"sandboxctl image build --engine {engine}"
        done = other.ctl("create")
        assert done.returncode == 4
        assert b"hint: sandboxctl image build" in done.stderr
        assert other.ctl("doctor").returncode == 1


def test_every_setting_is_shown_with_where_it_comes_from(daemon: Daemon) -> None:
    entries = {entry["key"]: entry for entry in daemon.call("daemon/config")["entries"]}
    assert entries["defaults.image"]["origin"] == "SANDBOXD_DEFAULTS_IMAGE"
    assert entries["defaults.memory"]["origin"] == "default"
    assert b"SANDBOXD_DEFAULTS_IMAGE" in daemon.ctl("config").stdout
