"""Docker is stopped, killed and started again under sandboxes: what goes on, and what is told of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import RpcError
from tests.engine.daemons import IMAGE, Daemon, running, wait_until
from tests.engine.own_docker import OwnDocker

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("daemon")]

Box = dict[str, Any]

DOCKER = ("docker",)


@contextlib.contextmanager
def on_own_docker(*, live_restore: bool) -> Iterator[tuple[OwnDocker, Daemon]]:
    """A daemon whose Docker is its own."""
    with tempfile.TemporaryDirectory(prefix="restarts-") as directory:
        own = OwnDocker(Path(directory) / "docker", live_restore=live_restore)
        with (
            own.standing(),
            running(Daemon(Path(directory) / "own", env={"DOCKER_HOST": own.host}), DOCKER) as daemon,
        ):
            daemon.call("image/build", engine="docker", source="busybox", reference=IMAGE)
            try:
                yield own, daemon
            finally:
                if not own.running:
                    own.start()


def sleeper(daemon: Daemon, box: Box) -> str:
    """A command in the background that ends when it is told to."""
    argv = ["sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.02; done; echo went on"]
    command_id: str = daemon.call("commands/start", sandbox=box["id"], argv=argv, stdio="spool")["command_id"]
    return command_id


def assert_told_that_docker_is_not_there(daemon: Daemon) -> None:
    refusal = daemon.refusal("sandbox/create", engine="docker")
    assert (refusal.type, bool(refusal.hint)) == ("engine_unavailable", True)


def removed(daemon: Daemon, box: Box) -> bool:
    return all(row["id"] != box["id"] for row in daemon.sandboxes())


def test_with_live_restore_sandboxes_do_not_notice() -> None:
    """They need Docker to be made and to be removed, and not in between."""
    with on_own_docker(live_restore=True) as (own, mine):
        box, paused, condemned = (mine.create("docker", limits={"memory": "64m"}) for _ in range(3))
        mine.call("sandbox/pause", sandbox=paused["id"])
        command = sleeper(mine, box)
        own.kill()
        assert mine.sh(box, "echo here") == "here\n"
        assert_told_that_docker_is_not_there(mine)
        with pytest.raises(RpcError, match="docker"):
            mine.remove(condemned)
        wait_until(lambda: not Path(f"/proc/{condemned['pid']}").exists(), "what runs in it was ended all the same")
        mine.kill()
        mine.start()
        found = mine.call("sandbox/get", sandbox=box["id"])
        assert (found["state"], found["state_reason"]) == ("broken", "docker does not answer")
        assert found["commands_running"] == 1, "nobody has said that it ended"
        own.start()
        # Now, and not with the next sweep: a daemon that has never seen an engine follows none.
        mine.call("daemon/gc", dry_run=False)
        wait_until(lambda: mine.state_of(box) == "running", "it was found again")
        wait_until(lambda: removed(mine, condemned), "what was removed meanwhile is gone")
        found = mine.call("sandbox/get", sandbox=box["id"])
        assert (found["pid"], found["verified"], found["commands_running"]) == (box["pid"], True, 1)
        mine.sh(box, "touch /tmp/go")
        assert mine.call("commands/wait", sandbox=box["id"], command_id=command)["status"] == "ok"
        own.stop()
        own.start()
        assert mine.call("sandbox/get", sandbox=box["id"])["pid"] == box["pid"]
        assert mine.call("sandbox/resume", sandbox=paused["id"])["pid"] == paused["pid"]


def test_without_live_restore_they_are_stopped_and_say_so() -> None:
    """And can be started again, or removed."""
    with on_own_docker(live_restore=False) as (own, mine):
        box, other = (mine.create("docker", limits={"memory": "64m"}) for _ in range(2))
        command = sleeper(mine, box)
        own.stop()
        assert_told_that_docker_is_not_there(mine)
        wait_until(lambda: mine.state_of(box) != "running", "it was missed")
        own.start()
        both = (box, other)
        wait_until(lambda: {mine.state_of(each) for each in both} == {"stopped"}, "both were seen to be stopped")
        for each in both:
            # By its container, or by how its init ended, if Docker still said that.
            assert mine.call("sandbox/get", sandbox=each["id"])["state_reason"].startswith("its ")
        (row,) = mine.call("commands/list", sandbox=box["id"])["commands"]
        assert (row["command_id"], row["state"]) == (command, "ended")
        mine.remove(other)
        assert mine.call("sandbox/start", sandbox=box["id"])["verified"]
        own.kill()
        assert mine.sh(box, "echo here") == "here\n", "its containers go on until it is there again"
        own.start()
        mine.call("daemon/gc", dry_run=False)
        wait_until(lambda: mine.state_of(box) == "stopped", "they were stopped by its start")
