"""The project inside a sandbox: whose files they are, what may be one, and that nothing stays, on each engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Box
from tests.engine.daemons import Daemon

pytestmark = pytest.mark.engine

ODD_NAME = "a b:c,d\"e'f\\g\nh=é$(id)"
"""Each of these means something to a shell, to CSV, to ``--volume`` or to ``/proc/mounts``."""


@pytest.fixture(scope="module")
def odd_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("odd") / ODD_NAME
    project.mkdir()
    return project


@pytest.fixture(scope="module")
def worked_on(daemon: Daemon, engine: str, odd_project: Path) -> Iterator[Box]:
    """A sandbox on root's own project, which is called by a symlink."""
    link = odd_project.parent / f"link-{engine}"
    link.symlink_to(odd_project)
    with daemon.box(engine, workspace={"path": str(link)}) as box:
        yield box


def test_any_path_can_be_a_project_and_a_symlink_is_resolved(
    daemon: Daemon, worked_on: Box, odd_project: Path
) -> None:
    (odd_project / "from outside").write_text("seen")
    assert worked_on["workspace"]["path"] == str(odd_project)
    assert daemon.run(worked_on, "cat", "from outside").stdout == b"seen"


def test_files_of_root_are_the_sandbox_users_inside_and_roots_outside(
    daemon: Daemon, worked_on: Box, odd_project: Path
) -> None:
    """Else either the project could not be worked on, or root's next step would meet foreign files."""
    assert worked_on["workspace"]["mounted"] == "idmapped"
    assert worked_on["warnings"] == []
    (odd_project / "outside").write_text("1")
    assert daemon.sh(worked_on, "echo 2 >> outside; echo 3 > inside; stat -c %u outside inside").split() == [
        "1000",
        "1000",
    ]
    for name in ("outside", "inside"):
        status = (odd_project / name).stat()
        assert (status.st_uid, status.st_gid) == (0, 0), name


def test_no_mount_stays_on_the_host(daemon: Daemon, worked_on: Box) -> None:
    """A mount that stays keeps a disk busy, and shows others the project."""
    assert daemon.mounts() == []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        assert [line for line in file if worked_on["id"] in line] == []


def test_a_mount_brings_neither_devices_nor_setuid(daemon: Daemon, worked_on: Box) -> None:
    mounts = [line.split() for line in daemon.sh(worked_on, "cat /proc/mounts").splitlines()]
    (options,) = (fields[3].split(",") for fields in mounts if fields[1] == "/workspace")
    assert {"rw", "nosuid", "nodev"} <= set(options)


@pytest.mark.parametrize("uid", [1000, 4321])
def test_the_project_of_another_is_worked_on_as_that_user(
    daemon: Daemon, engine: str, project: Path, uid: int
) -> None:
    os.chown(project, uid, uid)
    with daemon.box(engine, workspace={"path": str(project)}) as box:
        assert box["user"] == f"{uid}:{uid}"
        assert daemon.sh(box, "id -u; echo > made; stat -c %u made; echo > ~/home; echo > /run/x").split() == [
            str(uid),
            str(uid),
        ]
    assert (project / "made").stat().st_uid == uid


def test_a_project_that_is_only_read_cannot_be_written_to(daemon: Daemon, engine: str, project: Path) -> None:
    (project / "file").write_text("kept")
    project.chmod(0o777)
    with daemon.box(engine, workspace={"path": str(project), "mode": "ro"}) as box:
        assert box["workspace"]["mode"] == "ro"
        ran = daemon.run(box, "sh", "-c", "cat file; echo > file; touch new; rm file; mount -o remount,rw /workspace")
        assert ran.stdout == b"kept"
        assert ran.stderr.count(b"Read-only file system") == 3
    assert os.listdir(project) == ["file"]
    assert (project / "file").read_text() == "kept"


def test_what_is_no_project_is_refused_and_nothing_is_made(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    """A slip of the hand must not hand the system, or somebody's keys, to what runs inside."""
    home = Path(daemon.env["HOME"])
    disguised = tmp_path / "innocent"
    disguised.symlink_to("/etc")
    file = tmp_path / "file"
    file.write_text("")
    refused = ["/", "/etc", "/etc/ssl", "/usr/bin", "/proc", "/run", "/home", str(home), str(disguised), str(file)]
    refused += ["relative", "", str(tmp_path / "nowhere"), "/tmp", "/var/lib"]
    before = (daemon.containers(engine), daemon.boxes_left())
    for path in refused:
        refusal = daemon.refusal("sandbox/create", engine=engine, workspace={"path": path})
        assert refusal.type == "invalid_argument", (path, refusal)
    assert (daemon.containers(engine), daemon.boxes_left()) == before
