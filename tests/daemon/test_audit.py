"""The audit log of a real daemon: who asked for what, over restarts, kills and a directory that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_daemon import without_engines
from tests.engine.daemons import CHECKOUT, Daemon, running, wait_until

LOG = "audit-000001.jsonl"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(without_engines(tmp_path), engines=()) as daemon:
        yield daemon


def entries(daemon: Daemon, **wanted: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.call("audit/query", **wanted)["entries"]
    return found


def test_who_asked_is_written_down_by_the_kernels_word(daemon: Daemon) -> None:
    """Not what the request says: a process of its own asks, and is known by its pid and its program."""
    script = (
        "import os, sys\n"
        "from sandboxd.client import Connection, RpcError\n"
        "with Connection.connect(sys.argv[1]) as connection:\n"
        "    try:\n"
        "        connection.call('sandbox/pause', {'sandbox': 'no\\nsuch'})\n"
        "    except RpcError as error:\n"
        "        print(os.getpid(), error.type)\n"
    )
    argv = [sys.executable, "-c", script, str(daemon.socket)]
    done = subprocess.run(argv, env={**daemon.env, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, check=True)
    pid, kind = done.stdout.split()
    [entry] = entries(daemon, method="sandbox/pause")
    assert (entry["uid"], entry["pid"], entry["result"]) == (os.geteuid(), int(pid), kind.decode())
    assert entry["exe"] == os.path.realpath(sys.executable)
    assert entry["arguments"] == {"sandbox": "no\nsuch"}
    raw = (daemon.state / "audit" / LOG).read_bytes()
    assert rb"no\nsuch" in raw
    assert all(json.loads(line) for line in raw.splitlines())


def test_the_log_goes_on_over_restarts_and_kills_and_stays_intact(tmp_path: Path) -> None:
    daemon = without_engines(tmp_path)
    for number in range(3):
        daemon.start()
        daemon.refusal("sandbox/pause", sandbox=f"box{number}")
        assert daemon.call("audit/verify")["intact"]
        if number == 1:
            daemon.kill()
        else:
            daemon.stop()
    daemon.start()
    try:
        found = [entry for entry in entries(daemon) if entry["method"] != "daemon/shutdown"]
        told = [entry["arguments"].get("sandbox", entry["kind"]) for entry in found]
        assert told == ["genesis", "begun", "box0", "ended", "begun", "box1", "begun", "box2", "ended", "begun"]
        verified = daemon.call("audit/verify")
        assert (verified["intact"], verified["problems"]) == (True, [])
        assert [entry["seq"] for entry in entries(daemon)] == list(range(1, verified["records"] + 1))
    finally:
        daemon.stop()


def test_sandboxctl_says_which_line_was_changed(daemon: Daemon) -> None:
    """With exit code 1: a job that runs at night can tell."""
    for number in range(5):
        daemon.refusal("sandbox/pause", sandbox=f"box{number}")
    assert daemon.ctl("audit", "verify").returncode == 0
    log = daemon.state / "audit" / LOG
    lines = log.read_bytes().splitlines(keepends=True)
    [number] = [number for number, line in enumerate(lines, 1) if b"box2" in line]
    lines[number - 1] = lines[number - 1].replace(b"box2", b"box7")
    log.write_bytes(b"".join(lines))
    done = daemon.ctl("audit", "verify")
    assert done.returncode == 1
    assert done.stdout.decode().startswith(f"{LOG}:{number}: changed, number {number}: ")


def test_a_log_that_cannot_be_written_is_told_by_doctor_and_stops_no_work(tmp_path: Path) -> None:
    """And is written again as soon as it can be, with what was asked meanwhile."""
    daemon = without_engines(tmp_path)
    daemon.state.mkdir(mode=0o700)
    (daemon.state / "audit").write_text("in the way")
    daemon.start()
    try:
        assert daemon.refusal("sandbox/pause", sandbox="box").type == "not_found"
        check = wait_until(lambda: audit_check(daemon, "warning"), "doctor told it")
        assert "work goes on" in check["detail"]
        assert daemon.refusal("audit/query").type == "audit_unavailable"
        (daemon.state / "audit").unlink()
        wait_until(lambda: audit_check(daemon, "ok"), "it was written again")
        assert [entry["arguments"] for entry in entries(daemon, method="sandbox/pause")] == [{"sandbox": "box"}]
        assert daemon.call("audit/verify")["intact"]
    finally:
        daemon.stop()


def test_where_the_log_is_required_nothing_is_changed_without_it(tmp_path: Path) -> None:
    daemon = without_engines(tmp_path, SANDBOXD_AUDIT_REQUIRED="true")
    daemon.state.mkdir(mode=0o700)
    (daemon.state / "audit").write_text("in the way")
    daemon.start()
    try:
        wait_until(lambda: audit_check(daemon, "failure"), "doctor told it")
        refusal = daemon.refusal("sandbox/pause", sandbox="box")
        assert (refusal.type, refusal.hint) == ("audit_unavailable", "sandboxctl doctor")
        assert daemon.ctl("pause", "box").returncode == 4
        assert daemon.sandboxes() == [], "looking changes nothing"
        (daemon.state / "audit").unlink()
        wait_until(lambda: daemon.refusal("sandbox/pause", sandbox="box").type == "not_found", "work went on")
    finally:
        daemon.stop()


def audit_check(daemon: Daemon, status: str) -> dict[str, Any] | None:
    checks = {check["name"]: check for check in daemon.call("daemon/doctor")["checks"]}
    found: dict[str, Any] = checks["audit log"]
    return found if found["status"] == status else None


def test_looking_is_written_down_where_that_is_wanted(tmp_path: Path) -> None:
    with running(without_engines(tmp_path, SANDBOXD_AUDIT_READS="true"), engines=()) as daemon:
        daemon.sandboxes()
        assert [entry["result"] for entry in entries(daemon, method="sandbox/list")] == ["ok"]


def test_a_log_that_is_switched_off_leaves_nothing(tmp_path: Path) -> None:
    with running(without_engines(tmp_path, SANDBOXD_AUDIT_ENABLED="false"), engines=()) as daemon:
        daemon.refusal("sandbox/pause", sandbox="box")
        assert daemon.refusal("audit/verify").type == "unsupported"
        assert not (daemon.state / "audit").exists()
