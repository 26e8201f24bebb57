"""Commands, terminals, files and kills for an ordinary user with rootless Podman."""

from __future__ import annotations

import base64
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import Daemon, wait_until
from tests.engine.test_terminal import Terminal
from tests.stock.bed import BED, POLICY, quick_bed

EXECS = 3 if BED == "machine" else 15


@pytest.fixture(scope="module")
def box(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory, figures: list[str]) -> Iterator[dict[str, Any]]:
    """A sandbox on a project that the tests of this module share."""
    project = tmp_path_factory.mktemp("shared")
    (project / "outside").write_text("from outside\n")
    began = time.monotonic()
    with daemon.box("podman", workspace={"path": str(project)}, limits_policy=POLICY) as box:
        figures.append(
            f"cold create: {(time.monotonic() - began) * 1000:.0f} ms, engine's own part {engine_ms(box):.0f} ms"
        )
        yield {**box, "project": str(project)}


def engine_ms(reply: dict[str, Any]) -> float:
    timings: dict[str, float] = reply["timings_ms"]
    return timings.get("engine", max(timings.values()))


def test_podman_is_the_users_own(daemon: Daemon, box: dict[str, Any]) -> None:
    """Otherwise nothing here proves what it says."""
    (podman,) = (engine for engine in daemon.call("daemon/info")["engines"] if engine["name"] == "podman")
    assert (podman["rootless"], podman["cgroup_version"], podman["usable"]) == (True, "v2", True)
    assert os.getuid() != 0
    assert box["engine"] == "podman"


@quick_bed
def test_a_command_has_the_callers_streams_and_its_own_code(daemon: Daemon, box: dict[str, Any]) -> None:
    ran = daemon.run(box, "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"in")
    assert (ran.stdout, ran.stderr, ran.end["exit_code"]) == (b"in", b"err\n", 7)


def test_exec_is_fast(daemon: Daemon, box: dict[str, Any], figures: list[str]) -> None:
    """A figure, and no bound: the machine is emulated."""
    with daemon.connect() as connection:
        connection.call("daemon/info", {})
    walls = []
    for _ in range(EXECS):
        began = time.monotonic()
        assert daemon.run(box, "true").end["exit_code"] == 0
        walls.append((time.monotonic() - began) * 1000)
    began = time.monotonic()
    assert daemon.ctl("exec", box["id"], "true").returncode == 0
    ctl_ms = (time.monotonic() - began) * 1000
    figures.append(f"exec: {statistics.median(walls):.1f} ms over the socket, {ctl_ms:.0f} ms by sandboxctl")


def test_files_belong_to_the_user_on_both_sides(daemon: Daemon, box: dict[str, Any]) -> None:
    """By keep-id: the sandbox's user is the caller."""
    script = "id -u; cat outside; stat -c %u outside; echo x > inside; stat -c %u inside"
    uid = str(os.getuid())
    assert daemon.sh(box, script).split() == [uid, "from", "outside", uid, uid]
    made = Path(box["project"], "inside")
    assert (made.stat().st_uid, made.stat().st_gid) == (os.getuid(), os.getgid())
    made.unlink()
    assert box["workspace"]["mounted"] == "keep-id"


@quick_bed
def test_files_are_read_and_written_over_the_socket(daemon: Daemon, box: dict[str, Any]) -> None:
    data = base64.b64encode(b"written").decode()
    daemon.call("files/write", sandbox=box["id"], path="/workspace/by-socket", data=data)
    assert Path(box["project"], "by-socket").read_text() == "written"
    assert Path(box["project"], "by-socket").stat().st_uid == os.getuid()
    listed = daemon.call("files/list", sandbox=box["id"], path="/workspace")
    assert {"by-socket", "outside"} <= {entry["path"].rpartition("/")[2] for entry in listed["entries"]}


@quick_bed
def test_a_terminal(daemon: Daemon, box: dict[str, Any]) -> None:
    terminal = Terminal(24, 80)
    try:
        with terminal.runs(daemon, "exec", "-it", box["id"], "sh") as it:
            terminal.type(b"tty; stty size; echo $((6 * 7))\n")
            terminal.wait_for(b"/dev/pts/")
            terminal.wait_for(b"24 80")
            terminal.wait_for(b"42")
            terminal.type(b"exit 5\n")
            assert it.wait(60) == 5
    finally:
        terminal.close()


@quick_bed
def test_a_command_is_ended_with_all_that_it_started(daemon: Daemon, box: dict[str, Any]) -> None:
    started = daemon.ctl("exec", "-d", box["id"], "sh", "-c", "setsid sleep 3333 & sleep 3334")
    command = started.stdout.decode().strip()
    wait_until(lambda: b"sleep 3333" in daemon.run(box, "ps").stdout, "both run")
    assert daemon.ctl("kill", box["id"], command).returncode == 0
    wait_until(lambda: b"sleep 333" not in daemon.run(box, "ps").stdout, "both have ended")


@quick_bed
def test_a_time_limit(daemon: Daemon, box: dict[str, Any]) -> None:
    assert daemon.ctl("exec", "--timeout", "1s", box["id"], "sleep", "60").returncode == 124


@quick_bed
def test_it_is_isolated(daemon: Daemon, box: dict[str, Any]) -> None:
    script = """
        grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; ls /sys/class/net
        touch /probe 2>/dev/null || echo refused; touch /etc/probe 2>/dev/null || echo refused
    """
    none = "0000000000000000"
    expected = ["CapEff:", none, "CapBnd:", none, "NoNewPrivs:", "1", "Seccomp:", "2", "lo", "refused", "refused"]
    assert daemon.sh(box, script).split() == expected


@quick_bed
def test_stop_start_and_remove(daemon: Daemon, project: Path) -> None:
    box = daemon.create("podman", workspace={"path": str(project)}, limits_policy=POLICY)
    assert daemon.ctl("stop", box["id"]).returncode == 0
    assert daemon.ctl("start", box["id"]).returncode == 0
    assert daemon.sh(box, "cat outside") == "from outside\n"
    assert daemon.ctl("rm", box["id"]).returncode == 0
    wait_until(lambda: box["container_id"] not in daemon.containers("podman"), "its container is gone")
