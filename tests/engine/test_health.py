"""A sandbox that is broken says so in the next answer: each way of breaking, on real engines."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.daemons import Daemon, Ran, wait_until

pytestmark = pytest.mark.engine

FORKS = "while :; do sleep 1000 & done"
"""A shell ends where it cannot fork, and what it started goes on."""


@pytest.fixture
def frail(daemon: Daemon, engine: str) -> Iterator[dict[str, Any]]:
    """A sandbox that is easily broken."""
    with daemon.box(engine, limits={"memory": "48m", "pids": 24, "tmp": "4m"}) as box:
        yield box


def kinds(answer: dict[str, Any]) -> list[str]:
    """What it says is wrong."""
    return [problem["kind"] for problem in answer["problems"]]


def row(daemon: Daemon, box: dict[str, Any]) -> dict[str, Any]:
    """Its row in the list."""
    [found] = [row for row in daemon.call("sandbox/list")["sandboxes"] if row["id"] == box["id"]]
    return found


def failed(daemon: Daemon, box: dict[str, Any], script: str) -> Ran:
    """Run what is to fail."""
    ran = daemon.run(box, "sh", "-c", script)
    assert ran.end["status"] != "ok"
    return ran


def test_nothing_is_wrong_with_a_command_that_just_fails(daemon: Daemon, frail: dict[str, Any]) -> None:
    """And looking leaves nothing running."""
    assert kinds(failed(daemon, frail, "exit 1").end) == []
    assert kinds(daemon.call("sandbox/get", sandbox=frail["id"])) == []
    assert kinds(row(daemon, frail)) == []
    wait_until(lambda: daemon.call("sandbox/metrics", sandboxes=[frail["id"]])["sandboxes"][0]["pids"] == 1, "alone")


def test_a_full_disk_is_said_with_the_failure(daemon: Daemon, frail: dict[str, Any]) -> None:
    """Whichever of the places that can be written to it is; and no more once there is room."""
    for count, path in enumerate(("/tmp", "$HOME"), 1):
        end = failed(daemon, frail, f"dd if=/dev/zero of={path}/big bs=64k 2>/dev/null").end
        assert kinds(end) == ["disk_full"] * count
    told = daemon.call("sandbox/get", sandbox=frail["id"])
    assert [problem["detail"].split()[0] for problem in told["problems"]] == ["/tmp", "/home/sandbox"]
    done = daemon.ctl("exec", frail["id"], "sh", "-c", "echo more > /tmp/more")
    assert b"sandboxctl: disk_full: /tmp has no room left\nhint: remove files below /tmp\n" in done.stderr
    assert b"disk_full" in daemon.ctl("inspect", frail["id"]).stdout
    daemon.sh(frail, "rm /tmp/big $HOME/big")
    assert kinds(failed(daemon, frail, "false").end) == []


def test_exhausted_pids_are_said_with_the_failure_and_while_they_are(daemon: Daemon, frail: dict[str, Any]) -> None:
    """Also when those that used them up have ended with the command."""
    end = failed(daemon, frail, f"trap 'exit 1' TERM; ({FORKS}); kill 0; exit 1").end
    assert kinds(end) == ["pids_exhausted"]
    assert "refused" in end["problems"][0]["detail"]
    wait_until(lambda: daemon.call("sandbox/metrics", sandboxes=[frail["id"]])["sandboxes"][0]["pids"] == 1, "alone")
    # The shell that could not fork has ended, and left room for one.
    held = f"mkfifo /tmp/pipe; exec 3<>/tmp/pipe; ({FORKS}); sleep 1000 & read -r _ <&3"
    storm = daemon.call("commands/start", sandbox=frail["id"], argv=["sh", "-c", held])
    wait_until(lambda: kinds(row(daemon, frail)) == ["pids_exhausted"], "it is told in the list")
    refusal = daemon.refusal("commands/run", sandbox=frail["id"], argv=["true"])
    assert "pids_exhausted" in refusal.detail
    assert b"pids_exhausted" in daemon.ctl("ls").stdout
    daemon.call("commands/kill", sandbox=frail["id"], command_id=storm["command_id"])
    wait_until(lambda: kinds(row(daemon, frail)) == [], "nothing is wrong any more")


def test_memory_at_its_limit_is_said(daemon: Daemon, engine: str) -> None:
    """Held by files in /tmp, which count: no process is to blame, and the next one dies for it."""
    with daemon.box(engine, limits={"memory": "48m", "tmp": "128m"}) as box:
        end = failed(daemon, box, "dd if=/dev/zero of=/tmp/big bs=64k 2>/dev/null; exit 1").end
        assert end["status"] == "oom"
        wait_until(lambda: "memory_at_limit" in kinds(row(daemon, box)), "it is told in the list")
        told = daemon.call("sandbox/get", sandbox=box["id"])
        assert "memory_at_limit" in kinds(told)


def test_a_lost_init_is_said(daemon: Daemon, frail: dict[str, Any]) -> None:
    """By whatever is asked next, with what to do."""
    os.kill(frail["pid"], signal.SIGKILL)
    wait_until(lambda: row(daemon, frail)["state"] != "running", "the loss is known")
    [problem] = row(daemon, frail)["problems"]
    assert (problem["kind"], problem["hint"]) == ("init_gone", f"sandboxctl start {frail['id']}")
    assert "137" in problem["detail"]
    assert kinds(daemon.call("sandbox/get", sandbox=frail["id"])) == ["init_gone"]
    assert "init_gone" in daemon.refusal("commands/run", sandbox=frail["id"], argv=["true"]).detail


def test_nothing_is_wrong_with_a_sandbox_that_was_stopped(daemon: Daemon, frail: dict[str, Any]) -> None:
    """It is as somebody wanted it."""
    daemon.call("sandbox/stop", sandbox=frail["id"])
    assert kinds(row(daemon, frail)) == []
