"""Kernels without the new mount API, as root: late mounts by a slot directory that passes them on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, running, wait_until

pytestmark = pytest.mark.engine

OLD_KERNEL = Path(__file__).with_name("old_kernel.py")
IDS = (1000, 1000)
MIB = 1024**2


@pytest.fixture(scope="module")
def old(daemon: Daemon, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on such a kernel, with a pool. In the end it has left nothing."""
    assert daemon.running, "it has made the image"
    env = {"SANDBOXD_POOL_MAX": "4", "SANDBOXD_POOL_MIN": "1", "SANDBOXD_DEFAULTS_ENGINE": engine}
    directory = tmp_path_factory.mktemp("old")
    made = Daemon(directory / "daemon", env=env, launcher=[sys.executable, str(OLD_KERNEL)])
    with running(made, (engine,)) as old:
        yield old
        old.remove_everything()
        old.call("pool/drain", template="default")
        wait_until(lambda: not old.containers(engine) and not old.boxes_left(), "all slots are gone")
    assert mounted_below(directory) == []


@pytest.fixture
def project(project: Path) -> Path:
    """Of an ordinary user, with a file: ids cannot be mapped there."""
    (project / "file").write_text("of the project")
    for path in (project, project / "file"):
        os.chown(path, *IDS)
    return project


def mounted_below(directory: Path) -> list[str]:
    """Where something is mounted on the host at, or from, a place below a directory."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [line for line in file if f"{directory}/" in line]


def claim(daemon: Daemon, **params: Any) -> dict[str, Any]:
    box = daemon.call("sandbox/create", launch="wait", wait=PATIENCE_S, **params)
    assert box["launch"] == "warm"
    assert mounted_below(daemon.boxes / box["id"]) == [], "the host's end is gone"
    return box


def flags(daemon: Daemon, box: dict[str, Any]) -> set[str]:
    """Of what is seen at /workspace: the last that was mounted there."""
    lines = [line.split() for line in daemon.sh(box, "cat /proc/mounts").splitlines()]
    return set([fields[3] for fields in lines if fields[1] == "/workspace"][-1].split(","))


def test_a_slot_gets_its_project_and_size_and_name_by_a_directory_that_passes_mounts_on(
    old: Daemon, project: Path
) -> None:
    old.call("pool/warm", template="default", count=4)
    written = claim(old, workspace={"path": str(project)}, name="written", limits={"tmp": "24m"})
    assert old.sh(written, "cat file; hostname; echo back > answer") == "of the projectwritten\n"
    answer = project / "answer"
    assert (answer.read_text(), answer.stat().st_uid) == ("back\n", IDS[0])
    assert flags(old, written) >= {"rw", "nosuid", "nodev"}
    assert written["verified"]

    read = claim(old, workspace={"path": str(project), "mode": "ro"})
    assert flags(old, read) >= {"ro", "nosuid", "nodev"}
    assert old.run(read, "sh", "-c", "echo > file").end["exit_code"] != 0

    layered = claim(old, workspace={"path": str(project), "mode": "overlay"})
    assert old.sh(layered, "echo changed > file; cat file") == "changed\n"
    assert (project / "file").read_text() == "of the project"

    none = claim(old, limits={"tmp": "24m"})
    assert old.sh(none, "echo mine > /workspace/file; cat file; ls") == "mine\nfile\n"
    size = os.statvfs(f"/proc/{none['pid']}/root/workspace")
    assert size.f_blocks * size.f_frsize == 24 * MIB
    for box in (written, read, layered, none):
        old.remove(box)


def test_what_was_passed_on_is_there_again_after_a_stop_and_a_start(old: Daemon, project: Path) -> None:
    box = claim(old, workspace={"path": str(project)})
    old.call("sandbox/stop", sandbox=box["id"])
    old.call("sandbox/start", sandbox=box["id"])
    assert old.sh(box, "cat file") == "of the project"
    assert mounted_below(old.boxes / box["id"]) == []
    old.remove(box)


def test_a_slot_of_a_killed_daemon_is_claimed_from_the_next(old: Daemon, engine: str, project: Path) -> None:
    """Its end on the host is the one mount that outlives a daemon, for as long as there is the slot."""
    old.call("pool/warm", template="default", count=1)
    slots = set(old.containers(engine))
    old.kill()
    assert mounted_below(old.directory)
    old.start()
    box = claim(old, workspace={"path": str(project)})
    assert box["container_id"] in slots
    assert old.sh(box, "cat file") == "of the project"
    old.remove(box)


def test_a_project_is_mounted_by_descriptor_where_no_slot_is_used(old: Daemon, project: Path) -> None:
    for mode, flag in (("rw", "rw"), ("ro", "ro")):
        box = old.call("sandbox/create", launch="cold", workspace={"path": str(project), "mode": mode})
        assert old.sh(box, "cat file") == "of the project"
        assert flags(old, box) >= {flag, "nosuid", "nodev"}
        assert mounted_below(old.boxes / box["id"]) == []
        old.remove(box)
