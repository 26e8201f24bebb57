"""What somebody does with an engine's own client is noticed when it is done, and not a minute later."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, running, wait_until

pytestmark = pytest.mark.engine


def followers_of(daemon: Daemon) -> list[psutil.Process]:
    followers = []
    for child in psutil.Process(daemon.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "events" in child.cmdline():
                followers.append(child)
    return followers


def test_what_is_done_behind_our_back_is_noticed_at_once(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    """By a daemon that sweeps for the first time after a minute."""
    quiet = Daemon(tmp_path / "quiet", env={"DYING_ARMED": str(tmp_path / "never")}, module="tests.engine.dying")
    with running(quiet), quiet.box(engine) as box:
        container_id = box["container_id"]

        def is_paused() -> bool:
            if quiet.state_of(box) == "paused":
                return True
            # From when on an engine tells, nobody knows: it is told again.
            quiet.client(engine, "unpause", container_id)
            quiet.client(engine, "pause", container_id)
            return False

        quiet.client(engine, "pause", container_id)
        wait_until(is_paused, "it was paused")
        assert (
            quiet.call("sandbox/get", sandbox=box["id"])["state_reason"]
            == "its container is paused, and not by sandboxd"
        )
        quiet.client(engine, "unpause", container_id)
        wait_until(lambda: quiet.state_of(box) == "running", "it went on")
        assert quiet.sh(box, "echo here") == "here\n"
        followers = wait_until(lambda: followers_of(quiet), "its events are followed")
        quiet.kill()
        _, left = psutil.wait_procs(followers, PATIENCE_S)
        assert not left, "nobody reads what they say"
        quiet.start()
        quiet.call("sandbox/stop", sandbox=box["id"], grace=0)
        quiet.client(engine, "rm", container_id)
        wait_until(lambda: quiet.state_of(box) == "lost", "it was removed")
