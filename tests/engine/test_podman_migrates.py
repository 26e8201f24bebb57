"""``podman system migrate`` under sandboxes that are there: it stops what runs, and Podman's user is to be told."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.engine.daemons import IMAGE, Daemon, running, wait_until
from tests.engine.own_podman import OwnPodman

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("daemon")]

PODMAN = ("podman",)


def test_what_a_migration_stops_says_so_and_can_be_started_or_removed() -> None:
    """Packages run it when they are upgraded, and a user after a change of subordinate ids."""
    with tempfile.TemporaryDirectory(prefix="migrates-") as directory:
        own = OwnPodman(Path(directory) / "podman")
        try:
            with running(Daemon(Path(directory) / "own", env=own.env), PODMAN) as daemon:
                daemon.call("image/build", engine="podman", source="busybox", reference=IMAGE)
                box, other, paused = (daemon.create("podman", limits={"memory": "64m"}) for _ in range(3))
                daemon.call("sandbox/pause", sandbox=paused["id"])
                started = daemon.call("commands/start", sandbox=box["id"], argv=["sleep", "1000"], stdio="spool")
                assert box["container_id"] in own.call("system", "migrate")
                both = (box, other)
                wait_until(lambda: {daemon.state_of(each) for each in both} == {"stopped"}, "both were seen stopped")
                for each in both:
                    assert daemon.call("sandbox/get", sandbox=each["id"])["state_reason"].startswith("its init ended")
                (row,) = daemon.call("commands/list", sandbox=box["id"])["commands"]
                assert (row["command_id"], row["state"]) == (started["command_id"], "ended")
                daemon.remove(other)
                assert daemon.call("sandbox/start", sandbox=box["id"])["verified"]
                assert daemon.sh(box, "echo here") == "here\n"
                resumed = daemon.call("sandbox/resume", sandbox=paused["id"])
                assert (resumed["state"], resumed["pid"]) == ("running", paused["pid"]), (
                    "what is frozen is left alone"
                )
        finally:
            own.clear()
