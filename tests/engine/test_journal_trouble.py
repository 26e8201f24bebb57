"""A journal that is damaged, or cannot be written: nothing new is begun, and nothing that runs is lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, read_line, running, wait_until

pytestmark = pytest.mark.engine

STATE_BYTES = "24m"
"""Of the small file system: it holds the programs that are mounted into sandboxes, and some outputs."""
FAILING_BYTES = 48 * 1024 * 1024


@pytest.fixture
def mortal(daemon: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of one test's own. The shared one has seen to the image."""
    with running(Daemon(tmp_path / "mortal")) as mortal:
        yield mortal


@contextlib.contextmanager
def on_a_file_system_of_its_own(directory: Path, *mount: str | Path) -> Iterator[Daemon]:
    """The same, with its state on what is mounted by these words."""
    state = directory / "state"
    state.mkdir(parents=True)
    subprocess.run(["mount", *mount, state], check=True)
    state.chmod(0o700)
    try:
        daemon = Daemon(directory)
        daemon.start()
        try:
            yield daemon
            daemon.remove_everything()
        finally:
            assert daemon.stop() == 0, daemon.log.read_text()
        assert daemon.boxes_left() == []
        for name in ("podman", "docker"):
            assert daemon.containers(name) == []
    finally:
        subprocess.run(["umount", "--lazy", state], check=True)


@pytest.fixture
def cramped(daemon: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """One whose file system is small."""
    with on_a_file_system_of_its_own(
        tmp_path / "cramped", "-t", "tmpfs", "-o", f"size={STATE_BYTES}", "tmpfs"
    ) as made:
        yield made


@pytest.fixture
def failing(daemon: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """One whose disk may fail."""
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("this kernel has no loop devices, and no other disk can be told to fail")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(FAILING_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    with on_a_file_system_of_its_own(tmp_path / "failing", "-o", "loop,errors=remount-ro", image) as made:
        yield made


def fail(directory: Path) -> None:
    """Have the kernel find an error on the disk that is mounted there: from then on it takes no write."""
    device = os.stat(directory).st_dev
    name = os.path.basename(os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")
    with pytest.raises(OSError, match="Read-only"):
        (directory / "written").touch()


def assert_nothing_new(daemon: Daemon, engine: str, box: dict[str, Any]) -> None:
    """And the error says why, and what to type."""
    for method, params in (
        ("sandbox/create", {"engine": engine}),
        ("commands/start", {"sandbox": box["id"], "argv": ["true"]}),
    ):
        refusal = daemon.refusal(method, **params)
        assert refusal.type == "journal_unusable", refusal
        assert refusal.hint


def assert_life_goes_on(daemon: Daemon, box: dict[str, Any]) -> None:
    assert daemon.sh(box, "echo alive") == "alive\n"
    assert daemon.state_of(box) == "running"
    assert box["id"] in [row["id"] for row in daemon.sandboxes()]


def truncate(file: Path) -> None:
    os.truncate(file, 0)


def garble(file: Path) -> None:
    """All but the first page, as a disk does that forgot what it was told."""
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(os.urandom(file.stat().st_size - 4096))


@pytest.mark.parametrize(("engine", "damage"), [("podman", truncate), ("docker", garble)])
def test_what_runs_outlives_the_loss_of_the_journal(
    mortal: Daemon, engine: str, project: Path, damage: Callable[[Path], None]
) -> None:
    """Limits that were changed, a command in the background and its output, the project: all there, and usable.

    Of every way to lose it there is a test of the journal alone.
    """
    box = mortal.create(
        engine, name="kept", workspace={"path": str(project)}, limits={"memory": "64m"}, env={"TOKEN": "hidden"}
    )
    mortal.call("sandbox/update", sandbox=box["id"], limits={"memory": "96m"})
    script = "echo before; until [ -e /tmp/go ]; do sleep 0.05; done; echo after"
    command = mortal.call("commands/start", sandbox=box["id"], argv=["sh", "-c", script], stdio="spool")["command_id"]
    stopped = mortal.create(engine)
    mortal.call("sandbox/stop", sandbox=stopped["id"], grace=0)
    assert mortal.stop() == 0
    file = mortal.state / "journal.sqlite3"
    damage(file)
    mortal.start()

    assert_life_goes_on(mortal, box)
    assert_nothing_new(mortal, engine, box)
    found = mortal.call("sandbox/get", sandbox="kept")
    assert (found["id"], found["pid"], found["verified"]) == (box["id"], box["pid"], True)
    assert found["workspace"]["path"] == str(project)
    memory = next(limit for limit in found["limits"] if limit["name"] == "memory")
    assert memory["effective"] == 96 * 1024 * 1024
    assert mortal.state_of(stopped) == "stopped"
    assert mortal.ctl("doctor").returncode == 1, "a damaged journal is a failure of the host"

    repaired = mortal.ctl_json("doctor", "--repair")
    assert repaired["healthy"], repaired
    assert repaired["repair"]["sandboxes"] == 2
    assert repaired["repair"]["kept_aside"] == f"{file}.damaged"
    assert Path(f"{file}.damaged").exists()
    with mortal.box(engine) as new:
        assert mortal.sh(new, "echo new") == "new\n"

    mortal.kill()
    mortal.start()
    assert_life_goes_on(mortal, box)
    mortal.sh(box, "touch /tmp/go")
    end = mortal.call("commands/wait", sandbox=box["id"], command_id=command)
    assert end["exit_code"] == 0
    assert mortal.ctl("logs", box["id"], command).stdout == b"before\nafter\n"
    mortal.call("sandbox/start", sandbox=stopped["id"])
    assert mortal.sh(stopped, "echo again") == "again\n"


def test_a_slot_that_was_claimed_is_somebodys_and_another_is_not(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    """The container of a claimed slot says what the slot was; what it became must not be lost with the journal."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "file").write_text("mine\n")
    with running(
        Daemon(tmp_path / "pooled", env={"SANDBOXD_POOL_MAX": "1", "SANDBOXD_DEFAULTS_ENGINE": engine})
    ) as pooled:

        def claim() -> dict[str, Any]:
            return pooled.create(engine, name="claimed", workspace={"path": str(project)}, launch="wait", wait="30s")

        box = claim()
        assert box["launch"] == "warm"
        wait_until(lambda: len(pooled.containers(engine)) == 2, "another slot was made")
        pooled.kill()
        truncate(pooled.state / "journal.sqlite3")
        for rest in ("journal.sqlite3-wal", "journal.sqlite3-shm"):
            with contextlib.suppress(FileNotFoundError):
                (pooled.state / rest).unlink()
        pooled.start()
        assert [row["id"] for row in pooled.sandboxes()] == [box["id"]], "the slot is nobody's still"
        assert pooled.call("sandbox/get", sandbox="claimed")["workspace"]["path"] == str(project)
        assert pooled.sh(box, "cat /workspace/file") == "mine\n"
        assert pooled.ctl_json("doctor", "--repair")["healthy"]


def check(daemon: Daemon, name: str) -> dict[str, Any]:
    """What doctor says of one thing."""
    checks: list[dict[str, Any]] = daemon.call("daemon/doctor")["checks"]
    return next(row for row in checks if row["name"] == name)


def fill(directory: Path) -> Path:
    """Fill a file system to its last block; returns what can be removed to have room again."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def test_a_full_disk_stops_what_is_new_and_nothing_else(cramped: Daemon, engine: str) -> None:
    """Least of all ``rm``, which is how it gets better."""
    box, gone = cramped.create(engine), cramped.create(engine)
    ballast = fill(cramped.state)

    def refused() -> bool:
        # Until the journal has used up what it had of the disk.
        for _ in range(50):
            cramped.call("sandbox/set_timeout", sandbox=box["id"], idle_timeout="1h")
        return bool(cramped.call("daemon/doctor")["checks"]) and not cramped.call("daemon/doctor")["healthy"]

    wait_until(refused, "the journal could not be written")
    assert_nothing_new(cramped, engine, box)
    assert_life_goes_on(cramped, box)
    wait_until(lambda: "No space" in check(cramped, "audit log")["detail"], "the audit log told of it")
    cramped.remove(gone)
    assert [row["id"] for row in cramped.sandboxes()] == [box["id"]]
    cramped.call("sandbox/stop", sandbox=box["id"], grace=0)
    cramped.call("sandbox/start", sandbox=box["id"])
    assert_life_goes_on(cramped, box)

    ballast.unlink()
    wait_until(lambda: check(cramped, "audit log")["status"] == "ok", "the audit log is written again")
    verified = cramped.call("audit/verify")
    assert (verified["intact"], verified["problems"]) == (True, [])
    with cramped.box(engine) as new:
        assert cramped.sh(new, "echo new") == "new\n"
    assert sorted(record["id"] for record in cramped.journal()) == [box["id"]], "what happened meanwhile is written"
    cramped.kill()
    cramped.start()
    assert_life_goes_on(cramped, box)


def test_a_disk_that_fails_stops_what_is_new_and_nothing_else(failing: Daemon, engine: str) -> None:
    """The kernel makes it read-only under a daemon that runs: nothing can be written from one moment to the next."""
    box, gone = failing.create(engine), failing.create(engine)
    script = "until [ -e /tmp/go ]; do sleep 0.05; done; exit 7"
    started = failing.call("commands/start", sandbox=box["id"], argv=["sh", "-c", script], stdio="spool")
    fail(failing.state)

    assert_nothing_new(failing, engine, box)
    assert_life_goes_on(failing, box)
    failing.sh(box, "touch /tmp/go")
    end = failing.call("commands/wait", sandbox=box["id"], command_id=started["command_id"])
    assert end["exit_code"] == 7
    failing.remove(gone)
    assert [row["id"] for row in failing.sandboxes()] == [box["id"]]
    failing.call("sandbox/stop", sandbox=box["id"], grace=0)
    failing.call("sandbox/start", sandbox=box["id"])
    assert_life_goes_on(failing, box)
    assert check(failing, "journal")["status"] == "failure"
    wait_until(lambda: "Read-only" in check(failing, "audit log")["detail"], "the audit log told of it")


def test_a_state_directory_that_is_read_only_is_said_at_the_start(daemon: Daemon, tmp_path: Path) -> None:
    """As file systems are whose disk has failed. No daemon could keep a promise there."""
    state = tmp_path / "fixed" / "state"
    state.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,mode=700", "tmpfs", state], check=True)
    try:
        process, ready = Daemon(tmp_path / "fixed").spawn()
        said = read_line(ready)
        assert process.wait(PATIENCE_S) == 1
        assert said.startswith("error: ")
        failure = json.loads(said.removeprefix("error: "))
        assert failure["brief"] == f"cannot use the state directory {state}"
        assert "Read-only file system" in failure["detail"]
        assert str(state) in failure["hint"]
    finally:
        subprocess.run(["umount", state], check=True)
