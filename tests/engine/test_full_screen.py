"""Programs that take the whole screen, in a terminal that the daemon holds: typed into, resized, left, come back to.

They are what a terminal is for, and what breaks first when sizes, signals or modes do not arrive.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Box
from tests.engine.daemons import PATIENCE_S, Daemon, wait_until
from tests.engine.test_commands import nothing_runs
from tests.engine.test_terminal import Terminal

pytestmark = pytest.mark.engine

LEAVE = b"\x10\x11"
"""Ctrl-P Ctrl-Q, to ``sandboxctl attach``."""
ESCAPE = b"\x1b"
TERMINFO_ROOTS = ("/lib/terminfo", "/usr/share/terminfo", "/etc/terminfo")
LOCALE = "/usr/lib/locale/C.utf8"
TERMS = ("xterm-256color", "screen", "tmux-256color")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(24, 80)
    yield terminal
    terminal.close()


def started(daemon: Daemon, box: Box, *argv: str) -> str:
    """A command with a terminal that the daemon holds."""
    done = daemon.ctl("exec", "-dt", "-e", "TERM=xterm-256color", box["id"], *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def end_of(row: int) -> bytes:
    """Where a program that fills the screen writes its last line."""
    return b"\x1b[%d;1H" % row


def test_vi_edits_a_file_over_two_windows(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    """It draws to the size that it is told, redraws at another, and keeps what was typed while nobody looked."""
    command = started(daemon, box, "vi", "/tmp/text")
    with terminal.runs(daemon, "attach", box["id"], command) as client:
        terminal.wait_for(end_of(24))
        terminal.type(b"ifirst window")
        terminal.wait_for(b"first window")
        terminal.resize(33, 90)
        terminal.wait_for(end_of(33))
        terminal.type(LEAVE)
        terminal.wait_for(b"goes on")
        assert client.wait(PATIENCE_S) == 0
    terminal.resize(44, 100)
    with terminal.runs(daemon, "attach", box["id"], command) as client:
        terminal.wait_for(end_of(44))
        terminal.type(b", second window" + ESCAPE)
        terminal.wait_for(b"second window")
        terminal.type(b":wq\r")
        assert client.wait(PATIENCE_S) == 0
    assert daemon.run(box, "cat", "/tmp/text").stdout == b"first window, second window\n"
    wait_until(lambda: nothing_runs(box), "vi was gone")


def test_top_redraws_by_itself_and_ends_at_a_key(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    """Output nobody asked for goes on while nobody is there."""
    command = started(daemon, box, "top", "-d", "1")
    with terminal.runs(daemon, "attach", box["id"], command) as client:
        for _ in range(2):
            terminal.wait_for(b"Mem:")
            terminal.wait_for(b"COMMAND")
        terminal.type(LEAVE)
        terminal.wait_for(b"goes on")
        assert client.wait(PATIENCE_S) == 0
    terminal.resize(12, 60)
    with terminal.runs(daemon, "attach", box["id"], command) as client:
        terminal.wait_for(b"Mem:")
        terminal.type(b"q")
        assert client.wait(PATIENCE_S) == 0
    wait_until(lambda: nothing_runs(box), "top was gone")


@pytest.fixture(scope="session")
def tmux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the host's tmux in it, and all that it needs, for an image that has none."""
    program = shutil.which("tmux")
    if program is None:
        pytest.skip("tmux is not installed on this host, so there is none to take into a sandbox: apt install tmux")
    project = tmp_path_factory.mktemp("tmux")
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+)", linked):
        shutil.copy(library, project)
    (loader,) = project.glob("ld-*")
    loader.rename(project / "loader")
    shutil.copy(program, project / "tmux-program")
    for term in TERMS:
        (found, *_) = (root for root in TERMINFO_ROOTS if Path(root, term[0], term).exists())
        (project / "terminfo" / term[0]).mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(found, term[0], term), project / "terminfo" / term[0] / term)
    shutil.copytree(LOCALE, project / "locale/C.UTF-8")
    wrapper = project / "tmux"
    wrapper.write_text(
        "#!/bin/sh\n"
        "export TERMINFO=/workspace/terminfo LOCPATH=/workspace/locale LC_ALL=C.UTF-8\n"
        'exec /workspace/loader --library-path /workspace /workspace/tmux-program -u -f /dev/null "$@"\n'
    )
    wrapper.chmod(0o755)
    project.chmod(0o755)
    return project


def test_tmux_keeps_its_session_when_both_kinds_of_window_are_left(
    daemon: Daemon, engine: str, tmux: Path, terminal: Terminal
) -> None:
    """Left by our keys its client goes on; left by its own it ends, and its server stays for the next command."""
    with daemon.box(engine, workspace={"path": str(tmux)}, limits={"memory": "128m", "pids": 100}) as box:
        command = started(daemon, box, "./tmux", "new-session", "sh")
        with terminal.runs(daemon, "attach", box["id"], command) as client:
            terminal.wait_for(b"0:sh*")
            terminal.type(b"echo $((6 * 7))\r")
            terminal.wait_for(b"42")
            terminal.type(LEAVE)
            terminal.wait_for(b"goes on")
            assert client.wait(PATIENCE_S) == 0
        terminal.resize(50, 132)
        with terminal.runs(daemon, "attach", box["id"], command) as client:
            terminal.wait_for(b"0:sh*")
            terminal.type(b"stty size\r")
            terminal.wait_for(b"49 132")
            terminal.type(b"\x02d")
            terminal.wait_for(b"[detached")
            assert client.wait(PATIENCE_S) == 0
        again = started(daemon, box, "./tmux", "attach-session")
        with terminal.runs(daemon, "attach", box["id"], again) as client:
            terminal.wait_for(b"49 132")
            terminal.type(b"exit\r")
            terminal.wait_for(b"[exited]")
            assert client.wait(PATIENCE_S) == 0
        wait_until(lambda: nothing_runs(box), "its server was gone")
