"""After a bed went down and came up: what ran is told as what it is, goes on when asked to, and nothing dangles.

In the order of the file: one test leaves to the next what it has found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import wait_until
from tests.stock.bed import COMMAND_ENDED, ended_with_the_host, sudo
from tests.stock.boot.left import (
    DEGRADED,
    NAMES,
    OUTSIDE,
    PROJECT,
    TOLD,
    containers,
    directories,
    lasting,
    mounts_at_home,
    processes,
)
from tests.stock.installed import SOCKET, Ctl, show


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What was written down before."""
    told: dict[str, Any] = json.loads(TOLD.read_text())
    return told


@pytest.fixture(scope="module")
def ctl() -> Ctl:
    sudo("systemctl stop docker.socket docker.service")
    return lasting()


def test_nobody_has_to_log_in_or_to_start_it(ctl: Ctl) -> None:
    """The user lingers: their systemd listens, and the first request starts the daemon."""
    assert SOCKET.exists()
    assert show("sandboxd.service", "ActiveState") == "inactive"
    assert processes() == [], "nothing is started that nobody asked for"
    ctl.out("ls")
    assert show("sandboxd.service", "ActiveState") == "active"


def test_each_is_told_as_what_it_is(ctl: Ctl, told: dict[str, Any]) -> None:
    # Of an engine that does not answer yet, which right after a boot may take a while, nothing is known.
    wait_until(
        lambda: {row["state"] for row in ctl.json("ls")["sandboxes"]} == {"stopped"}, "all are known to have stopped"
    )
    found = {name: ctl.json("inspect", name) for name in NAMES}
    assert {name: box["state"] for name, box in found.items()} == dict.fromkeys(NAMES, "stopped")
    assert {name: box["container_id"] for name, box in found.items()} == told["boxes"]
    for name in ("working", "layered"):
        assert ended_with_the_host(found[name]), found[name]
    assert found["stopped"]["state_reason"] == ""


def test_a_command_that_ran_has_ended_and_its_output_is_not(ctl: Ctl, told: dict[str, Any]) -> None:
    (row,) = (row for row in ctl.json("ps", "working")["commands"] if row["command_id"] == told["command"])
    assert row["end"]["status"] in COMMAND_ENDED
    assert ctl.out("logs", "working", told["command"]) == "begun\n"


def test_the_project_is_as_it_was_left(told: dict[str, Any]) -> None:
    assert (PROJECT / "outside").read_text() == OUTSIDE
    assert (PROJECT / "written").read_text() == "from inside\n"
    assert (PROJECT / "written").stat().st_uid == os.getuid()
    assert sorted(path.name for path in PROJECT.iterdir()) == ["outside", "written"]


def test_slots_of_the_last_boot_are_gone_and_there_is_a_new_one(ctl: Ctl, told: dict[str, Any]) -> None:
    boxes = set(told["boxes"].values())
    old_slots = set(told["containers"]) - boxes
    assert len(old_slots) == 1

    def settled() -> bool:
        found = set(containers())
        return boxes <= found and not found & old_slots and len(found) == len(boxes) + 1

    wait_until(settled, "there are the sandboxes, and one slot that is new")
    box = ctl.json("create", *DEGRADED, "--launch", "wait")
    assert box["launch"] == "warm"
    ctl.out("rm", box["id"])


def test_they_start_again_with_all_that_they_had(ctl: Ctl) -> None:
    ctl.out("start", *NAMES)
    assert (
        ctl.out("exec", "working", "cat", "outside", "written", "/run/secrets/token")
        == f"{OUTSIDE}from inside\ncanary"
    )
    assert ctl.out("exec", "layered", "cat", "outside") == "changed\n"
    (change,) = ctl.json("workspace", "diff", "layered")["changes"]
    assert (change["path"], change["kind"]) == ("outside", "modified")
    assert (PROJECT / "outside").read_text() == OUTSIDE
    ctl.out("exec", "stopped", "true")


def test_in_the_end_nothing_is_left(ctl: Ctl) -> None:
    pid = ctl.json("daemon", "status")["pid"]
    ctl.out("rm", "--wait", *NAMES)
    ctl.out("pool", "drain")
    ctl.out("secret", "rm", "token")
    # A slot is drained in the background: its directory goes when its container has gone.
    wait_until(
        lambda: [*containers(), *processes(), *mounts_at_home(), *directories()] == [],
        "containers, processes, mounts and directories are gone",
    )
    ctl.json("daemon", "uninstall")
    assert not Path(f"/proc/{pid}").exists()
