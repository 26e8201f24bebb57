"""Terminals that the daemon holds go on without it, killed or stopped, and the next one has them, on each engine."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, ended, running, wait_until
from tests.engine.test_full_screen import ESCAPE, LEAVE, end_of, started
from tests.engine.test_spooled_commands import followed, logs, start
from tests.engine.test_terminal import Terminal
from tests.unit.init_harness import GOLDEN, old_init

pytestmark = pytest.mark.engine

SIZE = {"rows": 24, "cols": 80}
LINES = 20_000


@pytest.fixture
def mortal(daemon: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of one test's own. The shared one has seen to the image."""
    with running(Daemon(tmp_path / "mortal")) as mortal:
        yield mortal


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(24, 80)
    yield terminal
    terminal.close()


def typed(daemon: Daemon, ref: dict[str, str], keys: bytes) -> None:
    daemon.call("commands/send_stdin", **ref, data=base64.b64encode(keys).decode())


def test_vi_is_come_back_to_after_a_kill_and_after_a_stop(mortal: Daemon, engine: str, terminal: Terminal) -> None:
    """What was typed and not saved is what a person would miss most."""
    with mortal.box(engine) as box:
        command = started(mortal, box, "vi", "/tmp/text")
        with terminal.runs(mortal, "attach", box["id"], command) as client:
            terminal.wait_for(end_of(24))
            terminal.type(b"ifirst daemon")
            terminal.wait_for(b"first daemon")
            mortal.kill()
            assert client.wait(PATIENCE_S) != 0
        mortal.start()
        with terminal.runs(mortal, "attach", box["id"], command) as client:
            terminal.wait_for(b"first daemon")
            terminal.type(b", second")
            terminal.wait_for(b"second")
            terminal.type(LEAVE)
            terminal.wait_for(b"goes on")
            assert client.wait(PATIENCE_S) == 0
        assert mortal.stop() == 0
        mortal.start()
        terminal.resize(33, 90)
        with terminal.runs(mortal, "attach", box["id"], command) as client:
            terminal.wait_for(end_of(33))
            terminal.type(b", third" + ESCAPE)
            terminal.wait_for(b"third")
            terminal.type(b":wq\r")
            assert client.wait(PATIENCE_S) == 0
        assert mortal.run(box, "cat", "/tmp/text").stdout == b"first daemon, second, third\n"


def test_what_is_written_while_nobody_is_there_waits_in_the_terminal(
    mortal: Daemon, engine: str, project: Path
) -> None:
    """The program blocks once the terminal is full, and goes on where it was: no line is lost or twice."""
    os.chmod(project, 0o755)
    with mortal.box(engine, workspace={"path": str(project), "mode": "ro"}) as box:
        script = f"echo ready; until [ -e go ]; do sleep 0.02; done; seq 1 {LINES}; echo end"
        ref = start(mortal, box, "sh", "-c", script, pty=SIZE)
        wait_until(lambda: b"ready" in logs(mortal, ref), "it is ready")
        mortal.kill()
        (project / "go").touch()
        mortal.start()
        end, output, dropped = followed(mortal, "commands/connect", **ref, stdout_offset=len(b"ready\r\n"))
        assert (end["status"], dropped) == ("ok", 0)
        expected = b"".join(b"%d\r\n" % number for number in range(1, LINES + 1)) + b"end\r\n"
        assert output == {"stdout": expected}


def test_who_says_the_size_that_it_has_has_it_drawn_anew(mortal: Daemon, engine: str) -> None:
    """Whoever attaches has only what was written lately, which of a program that fills the screen is a part."""
    with mortal.box(engine) as box:
        script = "trap 'echo drawn' WINCH; echo ready; while :; do sleep 0.02; done"
        ref = start(mortal, box, "sh", "-c", script, pty=SIZE)
        wait_until(lambda: b"ready" in logs(mortal, ref), "it is ready")
        mortal.kill()
        mortal.start()
        assert b"drawn" not in logs(mortal, ref)
        mortal.call("commands/resize", **ref, size=SIZE)
        wait_until(lambda: b"drawn" in logs(mortal, ref), "it drew itself anew")
        assert mortal.call("commands/kill", **ref)["status"] == "killed"


def age_journal(daemon: Daemon) -> None:
    """Make the journal one of the first schema, with no more in a record than the daemons of that time wrote."""
    with contextlib.closing(sqlite3.connect(":memory:")) as golden:
        golden.executescript((GOLDEN / "journal-schema-1.sql").read_text())
        ((then,),) = golden.execute("SELECT record FROM sandboxes").fetchall()
    with contextlib.closing(sqlite3.connect(daemon.state / "journal.sqlite3")) as database:
        for sandbox_id, record in database.execute("SELECT id, record FROM sandboxes").fetchall():
            old = {key: value for key, value in json.loads(record).items() if key in json.loads(then)}
            assert len(old) < len(json.loads(record))
            values = (json.dumps(old).encode(), sandbox_id)
            database.execute("UPDATE sandboxes SET record = ? WHERE id = ?", values)
        database.commit()
        database.execute("PRAGMA user_version = 1")


def test_a_sandbox_of_an_older_version_is_taken_over_with_what_its_init_could_do(mortal: Daemon, engine: str) -> None:
    """Its commands go on; only a terminal ends with the daemon, as it did in that version."""
    (programs,) = (mortal.state / "bin").iterdir()
    (programs / "sandbox-init").unlink()
    shutil.copy(old_init("0.3.0"), programs / "sandbox-init")
    with mortal.box(engine) as box:
        going_on = start(mortal, box, "sh", "-c", "read x; echo got $x; sleep 1000", stdin="pipe")
        typed(mortal, going_on, b"line\n")
        ref = start(mortal, box, "cat", pty=SIZE)
        wait_until(lambda: b"got line" in logs(mortal, going_on), "it has begun")
        mortal.kill()
        age_journal(mortal)
        mortal.start()
        assert mortal.state_of(box) == "running"
        assert mortal.call("commands/wait", **ref)["status"] in {"signaled", "nonzero", "ok"}
        assert mortal.sh(box, "cat /proc/1/comm").strip() == "sandbox-init"
        assert logs(mortal, going_on) == b"got line\n"
        assert mortal.call("commands/kill", **going_on)["status"] == "killed"


def test_followers_go_on_at_their_byte_when_the_daemon_is_restarted(
    mortal: Daemon, terminal: Terminal, project: Path
) -> None:
    """A pause is all that they see: nothing is missing, nothing comes twice, and nobody has to type anything."""
    os.chmod(project, 0o755)
    mortal.stop()
    assert mortal.ctl("daemon", "start").returncode == 0
    try:
        with mortal.box("podman", workspace={"path": str(project), "mode": "ro"}) as box:
            wait = "until [ -e go ]; do sleep 0.02; done"
            script = f"i=0; while [ $i -lt 500 ]; do echo line $i; i=$((i+1)); [ $i -ne 100 ] || {wait}; done"
            command = mortal.ctl("exec", "-d", box["id"], "sh", "-c", script).stdout.decode().strip()
            shell = started(mortal, box, "sh")
            reading = start(mortal, box, "sh", "-c", "while read x; do echo got $x; done; echo end", stdin="pipe")
            argv = mortal.ctl_argv("logs", "-f", box["id"], command)
            with (
                ended(subprocess.Popen(argv, stdout=subprocess.PIPE, env=mortal.env)) as follower,
                terminal.runs(mortal, "attach", box["id"], shell) as client,
            ):
                assert follower.stdout is not None
                first = follower.stdout.read(len(b"line 0\nline 1\n"))
                terminal.type(b"echo $((6 * 7))\r")
                terminal.wait_for(b"\r\n42\r\n")
                assert mortal.ctl("daemon", "restart").returncode == 0
                (project / "go").touch()
                assert first + follower.stdout.read() == b"".join(b"line %d\n" % number for number in range(500))
                assert follower.wait(PATIENCE_S) == 0
                terminal.type(b"echo $((6 * 9))\r")
                terminal.wait_for(b"\r\n54\r\n")
                terminal.type(b"exit 3\r")
                assert client.wait(PATIENCE_S) == 3
            typed(mortal, reading, b"line\n")
            mortal.call("commands/close_stdin", **reading)
            assert followed(mortal, "commands/connect", **reading)[1] == {"stdout": b"got line\nend\n"}
    finally:
        assert mortal.ctl("daemon", "stop").returncode == 0
