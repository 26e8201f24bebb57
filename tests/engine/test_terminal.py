"""``sandboxctl exec -it``: a terminal of its own inside, and the caller's as it was before, on each engine."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.engine.conftest import Box
from tests.engine.daemons import PATIENCE_S, Daemon, ended, wait_until
from tests.engine.test_commands import nothing_runs

pytestmark = pytest.mark.engine


class Terminal:
    """A terminal with a person before it."""

    def __init__(self, rows: int, cols: int) -> None:
        self.master, self.slave = os.openpty()
        self.said = b""
        self.resize(rows, cols)

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)

    def resize(self, rows: int, cols: int) -> None:
        """The kernel tells the foreground process group by SIGWINCH."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, text: bytes) -> None:
        """Read until this was shown."""
        while text not in self.said:
            assert select.select([self.master], [], [], PATIENCE_S)[0], f"{text!r} was not shown: {self.said!r}"
            self.said += os.read(self.master, 65536)
        self.said = self.said.partition(text)[2]

    @contextmanager
    def runs(self, daemon: Daemon, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """``sandboxctl`` with this for its controlling terminal."""
        argv = ["setsid", "--ctty", "--wait", *daemon.ctl_argv(*words)]
        with ended(
            subprocess.Popen(argv, stdin=self.slave, stdout=self.slave, stderr=self.slave, env=daemon.env)
        ) as it:
            yield it


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(40, 100)
    yield terminal
    terminal.close()


def test_it_is_a_terminal_inside_with_the_size_of_the_one_outside(
    daemon: Daemon, box: Box, terminal: Terminal
) -> None:
    before = termios.tcgetattr(terminal.slave)
    script = """
        tty; echo "<$(stty size)>"
        until [ "$(stty size)" = "50 120" ]; do sleep 0.05; done
        echo resized; read line; echo "<$line>"; exit 9
    """
    with terminal.runs(daemon, "exec", "-it", box["id"], "sh", "-c", script) as client:
        terminal.wait_for(b"/dev/pts/")
        terminal.wait_for(b"<40 100>")
        terminal.resize(50, 120)
        terminal.wait_for(b"resized")
        terminal.type(b"typed\r")
        terminal.wait_for(b"<typed>")
        assert client.wait(PATIENCE_S) == 9
    assert termios.tcgetattr(terminal.slave) == before, "the caller's terminal is as it was"


def test_ctrl_c_is_the_commands_to_take(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    """The caller's terminal passes it on as a byte, and the one inside makes a signal of it."""
    script = "trap 'echo caught; exit 3' INT; echo ready; while true; do sleep 0.05; done"
    with terminal.runs(daemon, "exec", "-it", box["id"], "sh", "-c", script) as client:
        terminal.wait_for(b"ready")
        terminal.type(b"\x03")
        terminal.wait_for(b"caught")
        assert client.wait(PATIENCE_S) == 3


def test_a_shell_is_one_line_away(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    with terminal.runs(daemon, "shell", box["id"]) as client:
        terminal.wait_for(b"$ ")
        terminal.type(b"echo $((6 * 7)) $TERM\r")
        terminal.wait_for(b"42 " + os.environ.get("TERM", "xterm").encode())
        # Between two lines the shell's terminal is not raw, and would drop the key.
        terminal.wait_for(b"$ ")
        terminal.type(b"\x04")
        assert client.wait(PATIENCE_S) == 0
    wait_until(lambda: nothing_runs(box), "the shell was gone")


def test_the_last_words_are_not_lost(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    with terminal.runs(daemon, "exec", "-it", box["id"], "sh", "-c", "seq 1 20000; echo end") as client:
        terminal.wait_for(b"19999\r\n20000\r\nend\r\n")
        assert client.wait(PATIENCE_S) == 0


def test_a_terminal_that_is_closed_takes_its_command_along(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    """As when a window is closed: the kernel hangs up."""
    with terminal.runs(daemon, "exec", "-it", box["id"], "sh", "-c", "trap '' HUP; echo ready; sleep 1000") as client:
        terminal.wait_for(b"ready")
        os.close(terminal.master)
        terminal.master = os.open(os.devnull, os.O_RDWR)
        assert client.wait(PATIENCE_S) != 0
    wait_until(lambda: nothing_runs(box), "nothing of the command was left")


def test_a_terminal_that_there_is_not_is_refused(daemon: Daemon, box: Box) -> None:
    done = daemon.ctl("exec", "-it", box["id"], "true")
    assert done.returncode == 2
    assert b"not a terminal" in done.stderr


def test_without_t_the_callers_terminal_stays_outside(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    """Whatever stays behind inside could read keys from it, change its settings and write to it for ever."""
    script = "for n in 0 1 2; do test -t $n && echo terminal $n; done; echo none; echo whole >&2; exit 6"
    with terminal.runs(daemon, "exec", "-i", box["id"], "sh", "-c", script) as client:
        terminal.wait_for(b"none\r\n")
        terminal.wait_for(b"whole\r\n")
        assert client.wait(PATIENCE_S) == 6


def test_what_is_left_behind_holds_a_pipe_and_not_us(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    """The command has ended, what it wrote was shown, and its child goes on alone."""
    script = "seq 1 20000; sleep 60 >&1 & exit 4"
    with terminal.runs(daemon, "exec", box["id"], "sh", "-c", script) as client:
        terminal.wait_for(b"\r\n20000\r\n")
        assert client.wait(PATIENCE_S) == 4
    [left] = [row for row in daemon.call("commands/list", sandbox=box["id"])["commands"] if row["state"] != "ended"]
    daemon.call("commands/kill", sandbox=box["id"], command_id=left["command_id"])


def test_ctrl_c_reaches_a_command_without_a_terminal(daemon: Daemon, box: Box, terminal: Terminal) -> None:
    """The caller's terminal makes a signal of it, and that is forwarded."""
    script = "trap 'echo caught; exit 3' INT; echo ready; while true; do sleep 0.05; done"
    with terminal.runs(daemon, "exec", box["id"], "sh", "-c", script) as client:
        terminal.wait_for(b"ready")
        terminal.type(b"\x03")
        terminal.wait_for(b"caught")
        assert client.wait(PATIENCE_S) == 3


def test_a_terminal_that_the_daemon_holds_is_left_and_come_back_to(
    daemon: Daemon, box: Box, terminal: Terminal
) -> None:
    """From two windows at once, if need be; what was on the screen is shown again."""
    before = termios.tcgetattr(terminal.slave)
    other = Terminal(24, 80)
    started = daemon.ctl("exec", "-dt", box["id"], "sh")
    command = started.stdout.decode().strip()
    try:
        with terminal.runs(daemon, "attach", box["id"], command) as client:
            terminal.type(b"stty size; echo $((6 * 7))\r")
            terminal.wait_for(b"40 100\r\n42\r\n")
            terminal.resize(50, 120)
            with other.runs(daemon, "attach", box["id"], command) as second:
                other.wait_for(b"42\r\n")
                other.type(b"echo $((7 * 8))\r")
                terminal.wait_for(b"56\r\n")
                other.type(b"\x10\x11")
                other.wait_for(b"goes on")
                assert second.wait(PATIENCE_S) == 0
            terminal.type(b"\x10\x11")
            terminal.wait_for(b"goes on")
            assert client.wait(PATIENCE_S) == 0
        assert termios.tcgetattr(terminal.slave) == before, "the caller's terminal is as it was"
        with terminal.runs(daemon, "attach", box["id"], command) as client:
            terminal.wait_for(b"56\r\n")
            terminal.type(b"exit 4\r")
            assert client.wait(PATIENCE_S) == 4
    finally:
        other.close()
    assert termios.tcgetattr(terminal.slave) == before
    wait_until(lambda: nothing_runs(box), "the shell was gone")
