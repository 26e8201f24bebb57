"""A terminal in front, a terminal inside, and the terminal as it was afterwards."""

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.sandboxctl import CTL, PATIENCE_S, Ctl, stub_daemon


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    with stub_daemon(tmp_path_factory.mktemp("daemon")) as env:
        yield Ctl(env)


@pytest.fixture(scope="module")
def box(ctl: Ctl) -> str:
    return ctl("create").stdout.strip()


class Terminal:
    """A terminal with a person in front of it."""

    def __init__(self) -> None:
        self.master, self.slave = os.openpty()
        self.resize(30, 100)
        self.seen = b""

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    def attributes(self) -> list[object]:
        return list(termios.tcgetattr(self.slave))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read_until(self, text: str) -> None:
        """Wait for it on the screen, and look no further than that next time."""
        while text.encode() not in self.seen:
            assert select.select([self.master], [], [], PATIENCE_S)[0], f"{text!r} did not come: {self.seen!r}"
            self.seen += os.read(self.master, 4096)
        self.seen = self.seen.partition(text.encode())[2]

    def take(self) -> None:
        """Become the controlling terminal of this new session."""
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    os.close(opened.master)
    os.close(opened.slave)


@contextlib.contextmanager
def running(ctl: Ctl, terminal: Terminal, *arguments: str, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(
        [*CTL, *arguments],
        env={**ctl.env, **env},
        stdin=terminal.slave,
        stdout=terminal.slave,
        stderr=terminal.slave,
        start_new_session=True,
        preexec_fn=terminal.take,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_shell_is_usable_and_the_terminal_is_as_before_at_the_end(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """Typing, its echo, Ctrl-C for what runs inside and not for us, the exit code."""
    before = terminal.attributes()
    with running(ctl, terminal, "exec", "-it", box, "sh") as process:
        prompt = "$ " if os.geteuid() else "# "
        terminal.read_until(prompt)
        assert terminal.attributes() != before
        terminal.type("sh -c 'tty; echo $((6 * 7)); exec sleep 60'\r")
        terminal.read_until("/dev/pts/")
        terminal.read_until("42\r\n")
        terminal.type("\x03")
        terminal.read_until(prompt)
        terminal.type("exit 5\r")
        assert process.wait(PATIENCE_S) == 5
    assert terminal.attributes() == before


def test_the_window_size_is_passed_on_and_follows(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """Editors inside draw for it."""
    script = "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.01; done"
    with running(ctl, terminal, "exec", "-it", box, "sh", "-c", script) as process:
        terminal.read_until("30 100\r\n")
        terminal.resize(40, 120)
        terminal.read_until("40 120\r\n")
        assert process.wait(PATIENCE_S) == 0


def test_nothing_that_was_printed_last_is_lost(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """The end of the command is told on another way than its output comes."""
    with running(ctl, terminal, "exec", "-it", box, "sh", "-c", "seq 1 5000") as process:
        terminal.read_until("5000\r\n")
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_is_restored_when_we_are_told_to_go(
    ctl: Ctl, box: str, terminal: Terminal, number: signal.Signals
) -> None:
    """A shell inside would ignore it, so we leave, and the command with us."""
    before = terminal.attributes()
    with running(ctl, terminal, "exec", "-it", box, "sh", "-c", "echo up; sleep 60") as process:
        terminal.read_until("up")
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
    assert terminal.attributes() == before


def test_a_terminal_is_restored_when_the_command_cannot_start(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """The most common mistake must not cost a ``reset``."""
    before = terminal.attributes()
    with running(ctl, terminal, "exec", "-it", box, "/no/such/program") as process:
        terminal.read_until("cannot execute")
        assert process.wait(PATIENCE_S) == 127
    assert terminal.attributes() == before


def test_a_terminal_is_restored_when_the_daemon_dies(tmp_path: Path, terminal: Terminal) -> None:
    """Restarting it is a thing that happens."""
    before = terminal.attributes()
    with stub_daemon(tmp_path) as env:
        ctl = Ctl(env)
        box = ctl("create").stdout.strip()
        with running(ctl, terminal, "exec", "-it", box, "sh", "-c", "echo up; sleep 60") as process:
            terminal.read_until("up")
            ctl("daemon", "stop")
            assert process.wait(PATIENCE_S) == 125
    assert terminal.attributes() == before


def test_the_kind_of_terminal_is_passed_on(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """Without it, colours and cursor keys fail in ways that are hard to guess."""
    with running(ctl, terminal, "exec", "-it", box, "sh", "-c", "echo is $TERM", TERM="screen") as process:
        terminal.read_until("is screen")
        assert process.wait(PATIENCE_S) == 0


def test_a_terminal_without_input_leaves_the_keyboard_alone(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """``-t`` alone is for colours; Ctrl-C is ours then, and forwarded."""
    before = terminal.attributes()
    script = "trap 'echo got; exit 9' INT; echo up; while :; do sleep 0.01; done"
    with running(ctl, terminal, "exec", "-t", box, "sh", "-c", script) as process:
        terminal.read_until("up")
        assert terminal.attributes() == before
        terminal.type("\x03")
        terminal.read_until("got")
        assert process.wait(PATIENCE_S) == 9


def test_run_with_a_terminal_opens_a_shell_and_removes_the_sandbox(ctl: Ctl, terminal: Terminal) -> None:
    """The line that people type first."""
    with running(ctl, terminal, "run", "--rm", "--label", "test=tty") as process:
        terminal.type("echo $((6 * 7)); exit 3\r")
        terminal.read_until("42\r\n")
        assert process.wait(PATIENCE_S) == 3
    assert "test" not in ctl("ls", "--label", "test=tty", "-q").stdout


def test_progress_is_drawn_where_somebody_watches(ctl: Ctl, terminal: Terminal) -> None:
    """And the result is a table all the same."""
    with running(ctl, terminal, "image", "build", TERM="xterm") as process:
        terminal.read_until("ENGINE")
        assert process.wait(PATIENCE_S) == 0


# --- a terminal in front, and none inside

WHICH = 'for n in 0 1 2; do test -t $n && echo "terminal $n"; done; echo none; echo error >&2; exit 6'


@pytest.mark.parametrize("flags", [(), ("-i",)], ids=["", "-i"])
def test_without_t_no_descriptor_of_ours_is_a_terminal_inside(
    ctl: Ctl, box: str, terminal: Terminal, flags: tuple[str, ...]
) -> None:
    """Whatever stays behind inside could read keys from it, change its settings and write to it for ever."""
    before = terminal.attributes()
    with running(ctl, terminal, "exec", *flags, box, "sh", "-c", WHICH) as process:
        terminal.read_until("none\r\n")
        terminal.read_until("error\r\n")
        assert process.wait(PATIENCE_S) == 6
    assert b"terminal" not in terminal.seen
    assert terminal.attributes() == before


def test_a_pipe_is_not_replaced(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """A pipe stays the caller's own: no byte is copied that need not be."""
    read_end, write_end = os.pipe()
    command = [*CTL, "exec", box, "sh", "-c", "test -t 2 || echo plain >&2; exec readlink /proc/self/fd/1"]
    with subprocess.Popen(command, env=ctl.env, stdout=write_end, stderr=terminal.slave) as process:
        terminal.read_until("plain\r\n")
        assert process.wait(PATIENCE_S) == 0
    assert os.read(read_end, 4096).decode().strip() == os.readlink(f"/proc/self/fd/{read_end}")
    os.close(read_end)
    os.close(write_end)


def test_output_to_a_terminal_arrives_whole(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """More than a pipe holds, and its end is told on another way."""
    with running(ctl, terminal, "exec", box, "sh", "-c", "seq 1 50000; echo problem >&2") as process:
        shown = b""
        while b"problem" not in shown or b"50000\r\n" not in shown:
            shown += os.read(terminal.master, 65536)
        assert process.wait(PATIENCE_S) == 0
    assert shown.replace(b"problem\r\n", b"").split() == [b"%d" % number for number in range(1, 50001)]


@pytest.mark.parametrize("left", ["sleep 60", "yes"])
def test_what_is_left_behind_does_not_keep_us(ctl: Ctl, box: str, terminal: Terminal, left: str) -> None:
    """It holds the pipe, silent or not; the command has ended, and what it wrote was shown."""
    with running(ctl, terminal, "exec", box, "sh", "-c", f"echo said; setsid {left} & exit 4") as process:
        terminal.read_until("said\r\n")
        shown = True
        while process.poll() is None or shown:
            shown = bool(select.select([terminal.master], [], [], 0.05)[0])
            if shown:
                os.read(terminal.master, 65536)
        assert process.returncode == 4


def test_what_is_typed_reaches_a_command_without_a_terminal_and_ends(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """Line by line, as the terminal edits them, until Ctrl-D."""
    with running(ctl, terminal, "exec", "-i", box, "sh", "-c", "sed -u 's/^/got /'; echo end") as process:
        terminal.type("one\r")
        terminal.read_until("got one\r\n")
        terminal.type("two\r")
        terminal.read_until("got two\r\n")
        terminal.type("\x04")
        terminal.read_until("end\r\n")
        assert process.wait(PATIENCE_S) == 0


def test_ctrl_c_reaches_a_command_without_a_terminal(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """The terminal makes a signal to us of it, and we forward that."""
    script = "trap 'echo caught; exit 9' INT; echo up; while :; do sleep 0.01; done"
    with running(ctl, terminal, "exec", "-i", box, "sh", "-c", script) as process:
        terminal.read_until("up\r\n")
        terminal.type("\x03")
        terminal.read_until("caught\r\n")
        assert process.wait(PATIENCE_S) == 9


def test_keys_that_nobody_reads_stay_in_the_terminal(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """What is typed ahead is for the program after this one, once this one has closed its stdin."""
    with running(ctl, terminal, "exec", "-i", box, "sh", "-c", "exec <&-; echo up; read line < /dev/null") as process:
        terminal.read_until("up\r\n")
        assert process.wait(PATIENCE_S) == 1
    terminal.type("ahead\r")
    assert os.read(terminal.slave, 100) == b"ahead\n"


# --- files in front


def test_no_file_of_ours_is_one_inside(ctl: Ctl, box: str, tmp_path: Path) -> None:
    """Inside it could be opened anew for writing, and O_APPEND be taken from it."""
    (tmp_path / "in").write_text("given\n")
    script = 'cat; for n in 0 1 2; do readlink /proc/self/fd/$n; done | sed "s/:.*//"; echo more >&2'
    with (tmp_path / "in").open() as given, (tmp_path / "out").open("a") as out:
        out.write("earlier\n")
        out.flush()
        done = ctl("exec", "-i", box, "sh", "-c", script, capture_output=False, stdin=given, stdout=out, stderr=out)
    assert done.returncode == 0
    assert (tmp_path / "out").read_text() == "earlier\ngiven\npipe\npipe\npipe\nmore\n"


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_files_are_copied_whole(ctl: Ctl, box: str, tmp_path: Path, mode: str) -> None:
    """Both ways, and more than any pipe holds."""
    data = os.urandom(9_000_001)
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as given, (tmp_path / "out").open(mode) as out:
        done = ctl("exec", "-i", box, "cat", capture_output=False, stdin=given, stdout=out)
    assert done.returncode == 0
    assert (tmp_path / "out").read_bytes() == data


def test_output_that_cannot_be_written_is_a_failure(ctl: Ctl, box: str) -> None:
    """The command may have ended well, but what it wrote is lost."""
    with open("/dev/full", "w") as full:
        done = ctl("exec", box, "echo", "x", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (125, "sandboxctl: cannot write: No space left on device\n")


@pytest.mark.parametrize("keys", ["q", "\x03"])
def test_top_is_drawn_on_the_other_screen_and_gives_the_terminal_back(
    ctl: Ctl, box: str, terminal: Terminal, keys: str
) -> None:
    """What was on the terminal before is there again. Its size is followed at once."""
    before = terminal.attributes()
    with running(ctl, terminal, "top", "--interval", "3600") as process:
        terminal.read_until("\x1b[?1049h")
        terminal.read_until("removed")
        terminal.resize(8, 40)
        terminal.read_until("\x1b[H")
        terminal.type(keys)
        terminal.read_until("\x1b[?1049l")
        assert process.wait(PATIENCE_S) == 0
    assert terminal.attributes() == before


def test_top_gives_the_terminal_back_when_it_is_told_to_go(ctl: Ctl, terminal: Terminal) -> None:
    before = terminal.attributes()
    with running(ctl, terminal, "top", "--interval", "3600") as process:
        terminal.read_until("sandboxes")
        process.terminate()
        terminal.read_until("\x1b[?1049l")
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert terminal.attributes() == before


def test_top_gives_the_terminal_back_when_nobody_answers(tmp_path: Path, terminal: Terminal) -> None:
    """And only then says why, where one can read it."""
    before = terminal.attributes()
    with stub_daemon(tmp_path) as env, running(Ctl(env), terminal, "top", "--interval", "0.1") as process:
        terminal.read_until("sandboxes")
        Ctl(env)("daemon", "stop")
        terminal.read_until("\x1b[?1049l")
        terminal.read_until("sandboxctl: ")
        assert process.wait(PATIENCE_S) == 1
    assert terminal.attributes() == before
