"""Commands that run without us: started, listed, read, followed, attached to, waited for, ended."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.sandboxctl import CTL, PATIENCE_S, Ctl, stub_daemon
from tests.daemon.test_cli import HEAVY, SHOW_MODULES, replies
from tests.daemon.test_cli_tty import Terminal, running, terminal

__all__ = ["terminal"]


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    with stub_daemon(tmp_path_factory.mktemp("daemon")) as env:
        yield Ctl(env)


@pytest.fixture
def box(ctl: Ctl) -> str:
    return ctl("create").stdout.strip()


def started(ctl: Ctl, *words: str) -> str:
    """Start it detached and return its id."""
    done = ctl("exec", *words)
    assert re.fullmatch(r"[0-9a-f]{12}\n", done.stdout), done.stderr
    return done.stdout.strip()


def shell(ctl: Ctl, box: str, script: str, flags: str = "-d") -> str:
    return started(ctl, flags, box, "sh", "-c", script)


def logs(ctl: Ctl, *words: str) -> "subprocess.CompletedProcess[bytes]":
    """With bytes for output."""
    command = [*CTL, "logs", *words]
    return subprocess.run(command, env=ctl.env, capture_output=True, timeout=PATIENCE_S, check=False)


def rows(ctl: Ctl, box: str) -> list[dict[str, Any]]:
    [reply] = replies(ctl("ps", box, "--json").stdout)
    commands: list[dict[str, Any]] = reply["commands"]
    return commands


# --- ps


def test_ps_shows_what_runs_and_how_the_rest_ended(ctl: Ctl, box: str) -> None:
    """One line each, the id first, whole: it can be typed."""
    ended = shell(ctl, box, "exit 7")
    ctl("wait", box, ended)
    runs = started(ctl, "-d", box, "sleep", "60")
    header, first, second = ctl("ps", box).stdout.splitlines()
    assert header.split() == ["ID", "PID", "STATE", "AGE", "END", "COMMAND"]
    assert re.fullmatch(rf"{ended} +\d+ +ended +\w+ +exit 7 +sh -c exit 7", first)
    assert re.fullmatch(rf"{runs} +\d+ +running +\w+ +- +sleep 60", second)
    assert [row["command_id"] for row in rows(ctl, box)] == [ended, runs]
    ctl("kill", box, runs)


def test_ps_cuts_long_lines_at_the_edge_of_a_terminal(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """And nowhere else: whoever greps wants the whole."""
    command = shell(ctl, box, f": {'x' * 200}")
    assert "x" * 200 in ctl("ps", box).stdout
    with running(ctl, terminal, "ps", box) as process:
        terminal.read_until(f"{command} ")
        terminal.read_until("xxx...\r\n")
        assert process.wait(PATIENCE_S) == 0


def test_ps_prints_no_control_characters(ctl: Ctl, box: str) -> None:
    """An argument may hold what a terminal obeys."""
    shell(ctl, box, ": '\x1b[2J'")
    assert "\x1b" not in ctl("ps", box).stdout


# --- naming a command


def test_a_command_is_named_by_the_beginning_of_its_id(ctl: Ctl, box: str) -> None:
    """As sandboxes are, where only one begins so."""
    first = shell(ctl, box, "exit 3")
    assert ctl("wait", box, first[:-1]).returncode == 3
    shell(ctl, box, "exit 3")
    ambiguous = ctl("kill", box, "0")
    assert (ambiguous.returncode, first in ambiguous.stderr) == (2, True)
    absent = ctl("logs", box, "f")
    assert (absent.returncode, f"sandboxctl ps {box}" in absent.stderr) == (5, True)


# --- logs


def test_output_is_kept_byte_for_byte_and_apart(ctl: Ctl, box: str) -> None:
    """Read as often as one likes, also in part."""
    command = shell(ctl, box, "head -c 300000 /dev/zero; printf '\\377\\000end'; echo error >&2; exit 3")
    ctl("wait", box, command)
    whole = bytes(300_000) + b"\xff\x00end"
    both = logs(ctl, box, command)
    assert (both.returncode, both.stdout, both.stderr) == (0, whole, b"error\n")
    out = logs(ctl, box, command, "--stdout", "--tail", "1k")
    assert (out.stdout, out.stderr) == (whole[-1024:], b"")
    err = logs(ctl, box, command, "--stderr", "--tail", "3")
    assert (err.stdout, err.stderr) == (b"", b"or\n")


def test_logs_of_a_command_that_runs_end_where_it_is_now(ctl: Ctl, box: str) -> None:
    """Following is something else."""
    command = shell(ctl, box, "echo one; echo two >&2; sleep 60", "-d")
    with ctl.start("logs", "-f", box, command, stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "one\n"
        follower.kill()
    done = logs(ctl, box, command)
    assert (done.returncode, done.stdout) == (0, b"one\n")
    assert logs(ctl, box, command, "--tail", "0").stdout == b""
    ctl("kill", box, command)


def test_logs_follow_to_the_end_and_succeed(ctl: Ctl, box: str) -> None:
    """The code is ours: the command's own is what ``wait`` tells."""
    command = shell(ctl, box, "for i in 1 2 3; do echo $i; sleep 0.05; done; exit 9")
    done = logs(ctl, "-f", box, command)
    assert (done.returncode, done.stdout) == (0, b"1\n2\n3\n")


@pytest.mark.parametrize("flags", [(), ("-f",)], ids=["", "-f"])
def test_what_was_not_kept_is_said(ctl: Ctl, box: str, flags: tuple[str, ...]) -> None:
    """On stderr, so that nobody takes a part for the whole."""
    command = shell(ctl, box, "head -c 3000000 /dev/zero; printf end")
    ctl("wait", box, command)
    done = logs(ctl, *flags, box, command)
    assert done.stdout == bytes((1 << 20) - 3) + b"end"
    assert done.stderr == f"sandboxctl: {3_000_003 - (1 << 20)} bytes of stdout were not kept\n".encode()


def test_a_terminal_has_no_stderr(ctl: Ctl, box: str) -> None:
    """Both streams are one there: asked for alone, it is an error, and else nothing is missing."""
    command = shell(ctl, box, "echo both >&2", "-dt")
    ctl("wait", box, command)
    assert logs(ctl, box, command).stdout == b"both\r\n"
    assert logs(ctl, box, command, "--stderr").returncode == 5


def test_a_size_that_is_none_is_refused(ctl: Ctl, box: str) -> None:
    """Before anything is asked for."""
    done = ctl("logs", "--tail", "much", box, "0")
    assert (done.returncode, "'much' is no size" in done.stderr) == (2, True)


# --- wait, kill


def test_wait_exits_as_the_command_did(ctl: Ctl, box: str) -> None:
    """And tells the rest as JSON."""
    command = shell(ctl, box, "kill -9 $$")
    done = ctl("wait", box, command, "--json")
    assert done.returncode == 128 + 9
    assert replies(done.stdout)[0]["signal"] == 9
    assert ctl("wait", box, "000000ffffff").returncode == 125


def test_kill_ends_all_of_it_or_sends_a_signal(ctl: Ctl, box: str) -> None:
    """The whole tree unless somebody says what they want."""
    command = started(ctl, "-d", box, "sleep", "60")
    assert ctl("kill", box, command).stdout == f"{command}\n"
    assert ctl("wait", box, command).returncode == 128 + 9
    for name in ("USR1", "SIGUSR1", "10"):
        command = shell(ctl, box, "trap 'exit 4' USR1; echo up; while :; do sleep 0.01; done")
        with ctl.start("logs", "-f", box, command, stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            assert follower.stdout.readline() == "up\n"
            assert ctl("kill", "--signal", name, box, command).returncode == 0
        assert ctl("wait", box, command).returncode == 4
    assert ctl("kill", "-s", "NONSENSE", box, command).returncode == 2


# --- attach


def test_a_terminal_is_left_and_come_back_to(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """Ctrl-P Ctrl-Q; what was on the screen is shown again, and typing goes on."""
    before = terminal.attributes()
    command = shell(ctl, box, "stty -echo; echo ready; while read line; do echo got $line; done; exit 5", "-dt")
    with running(ctl, terminal, "attach", box, command) as process:
        terminal.read_until("ready\r\n")
        assert terminal.attributes() != before
        terminal.type("one\r")
        terminal.read_until("got one\r\n")
        terminal.type("\x10\x11")
        terminal.read_until(f"sandboxctl attach {box} {command}")
        assert process.wait(PATIENCE_S) == 0
    assert terminal.attributes() == before
    with running(ctl, terminal, "attach", box, command) as process:
        terminal.read_until("ready\r\ngot one\r\n")
        terminal.type("two\r")
        terminal.read_until("got two\r\n")
        terminal.type("\x04")
        assert process.wait(PATIENCE_S) == 5
    assert terminal.attributes() == before


def test_what_is_typed_fast_arrives_in_its_order(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """Requests that are sent at once may overtake each other."""
    command = shell(ctl, box, "stty -echo; echo ready; while read line; do echo got $line; done", "-dt")
    with running(ctl, terminal, "attach", box, command) as process:
        terminal.read_until("ready\r\n")
        for number in range(30):
            terminal.type(f"{number}\r" if number % 2 else f"{number} and more\r")
        for number in range(30):
            terminal.read_until(f"got {number}" if number % 2 else f"got {number} and more")
        terminal.type("\x04")
        assert process.wait(PATIENCE_S) == 0


def test_what_was_typed_before_leaving_is_not_lost(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """Leaving closes the connection, and what is under way on it with it."""
    command = shell(ctl, box, "stty -echo; echo ready; read line; echo got $line; read line; echo got $line", "-dt")
    with running(ctl, terminal, "attach", box, command) as process:
        terminal.read_until("ready\r\n")
        terminal.type("one\r")
        terminal.type("two\r\x10\x11")
        assert process.wait(PATIENCE_S) == 0
    assert ctl("wait", box, command).returncode == 0
    assert logs(ctl, box, command).stdout == b"ready\r\ngot one\r\ngot two\r\n"


def test_the_window_size_is_that_of_who_attaches_and_follows(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """The terminal inside was made where there was none."""
    script = "trap 'stty size' WINCH; echo up; while :; do sleep 0.01; done"
    command = shell(ctl, box, script, "-dt")
    with running(ctl, terminal, "attach", box, command) as process:
        terminal.read_until("30 100\r\n")
        terminal.resize(40, 120)
        terminal.read_until("40 120\r\n")
        ctl("kill", box, command)
        assert process.wait(PATIENCE_S) == 128 + 9


def test_detach_keys_can_be_others(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """For those who need Ctrl-P inside."""
    command = shell(ctl, box, "echo up; sleep 60", "-dt")
    with running(ctl, terminal, "attach", "--detach-keys", "ctrl-],x", box, command) as process:
        terminal.read_until("up\r\n")
        terminal.type("\x1dx")
        assert process.wait(PATIENCE_S) == 0
    ctl("kill", box, command)
    assert ctl("attach", "--detach-keys", "escape", box, command).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_go_it_restores_the_terminal_and_leaves_the_command(
    ctl: Ctl, box: str, terminal: Terminal, number: signal.Signals
) -> None:
    """It was never ours to end."""
    before = terminal.attributes()
    command = shell(ctl, box, "echo up; sleep 60", "-dt")
    with running(ctl, terminal, "attach", box, command) as process:
        terminal.read_until("up\r\n")
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
    assert terminal.attributes() == before
    assert [row["state"] for row in rows(ctl, box)] == ["running"]
    ctl("kill", box, command)


def test_a_daemon_that_goes_away_gives_the_terminal_back(tmp_path: Path, terminal: Terminal) -> None:
    """Restarting it is a thing that happens."""
    before = terminal.attributes()
    with stub_daemon(tmp_path) as env:
        ctl = Ctl(env)
        box = ctl("create").stdout.strip()
        command = shell(ctl, box, "echo up; sleep 60", "-dt")
        with running(ctl, terminal, "attach", box, command) as process:
            terminal.read_until("up\r\n")
            ctl("daemon", "stop")
            assert process.wait(PATIENCE_S) == 125
    assert terminal.attributes() == before


def test_a_stdin_that_is_a_pipe_is_typed_into_and_ended(ctl: Ctl, box: str) -> None:
    """``exec -di``: its caller is whoever attaches."""
    command = started(ctl, "-di", box, "sh", "-c", "cat; echo error >&2; exit 6")
    done = ctl("attach", box, command, input="typed\n")
    assert (done.returncode, done.stdout, done.stderr) == (6, "typed\n", "error\n")
    again = ctl("attach", box, command)
    assert (again.returncode, again.stdout) == (6, "typed\n"), "what ended can be looked at as well"


def test_ctrl_c_leaves_a_command_without_a_terminal(ctl: Ctl, box: str, terminal: Terminal) -> None:
    """No key is seen before its line ends there; so the signal is for us, and ``kill`` is for the command."""
    before = terminal.attributes()
    command = started(ctl, "-di", box, "sh", "-c", "echo up; sleep 60")
    with running(ctl, terminal, "attach", box, command) as process:
        terminal.read_until("up\r\n")
        assert terminal.attributes() == before
        terminal.type("\x03")
        terminal.read_until("goes on")
        assert process.wait(PATIENCE_S) == 130
    assert [row["state"] for row in rows(ctl, box)] == ["running"]
    ctl("kill", box, command)


def test_to_watch_is_to_type_nothing(ctl: Ctl, box: str) -> None:
    """A log collector must not end somebody's input."""
    command = started(ctl, "-di", box, "sh", "-c", "echo up; read line; echo got $line")
    with ctl.start("attach", "--no-stdin", box, command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "up\n"
        assert ctl("attach", box, command, input="word\n").stdout == "up\ngot word\n"
        assert watcher.stdout.read() == "got word\n"
        assert watcher.wait(PATIENCE_S) == 0


def test_only_the_last_of_the_output_is_shown_again(ctl: Ctl, box: str) -> None:
    """Whoever comes back after hours wants the screen and not the hours."""
    command = shell(ctl, box, "seq 1 100000")
    ctl("wait", box, command)
    shown = ctl("attach", "--no-stdin", box, command).stdout
    assert len(shown) == 64 * 1024
    assert shown.endswith("\n99999\n100000\n")


@pytest.mark.parametrize("verb", ["ps", "logs", "wait", "kill"])
def test_these_verbs_import_nothing_heavy(ctl: Ctl, box: str, verb: str) -> None:
    """They are typed, or looped over, as often as the others."""
    command = shell(ctl, box, "exit 0")
    arguments = [verb, box] if verb == "ps" else [verb, box, command]
    done = subprocess.run(
        [sys.executable, "-S", "-c", SHOW_MODULES, *arguments],
        env=ctl.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not HEAVY & set(done.stderr.split())
