"""``session`` and ``sandbox.shells`` without an engine: what is shown of shells, and how their ends are told."""

import asyncio
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import AsyncSandbox, CommandExitException, NotFoundException, Sandbox, TimeoutException
from tests.daemon.sandboxctl import Ctl, stub_daemon
from tests.daemon.test_cli import replies
from tests.twins import Twin

TIMED_OUT = 124
NOT_FOUND = 5
USAGE = 2


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    with stub_daemon(tmp_path_factory.mktemp("daemon")) as env:
        yield Ctl(env)


@pytest.fixture
def box(ctl: Ctl) -> str:
    return ctl("create").stdout.strip()


@pytest.fixture
def shell(ctl: Ctl, box: str) -> str:
    opened = ctl("session", "open", "-C", "/usr", box)
    assert re.fullmatch(r"[0-9a-f]{12}\n", opened.stdout), opened.stderr
    return opened.stdout.strip()


def test_a_text_ends_as_the_command_line_does(ctl: Ctl, box: str, shell: str) -> None:
    """Its code, its output on both streams, and the directory that the one before left."""
    ran = ctl("session", "run", box, shell, "pwd; echo said >&2; cd /tmp; (exit 7)")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "/usr\n", "said")
    assert ctl("session", "run", box, shell, "pwd").stdout == "/tmp\n"


def test_a_text_comes_from_stdin(ctl: Ctl, box: str, shell: str, tmp_path: Path) -> None:
    """For what is long, or has quotes of its own."""
    (tmp_path / "text").write_text("echo 'it is here'\n")
    with open(tmp_path / "text", "rb") as file:
        assert ctl("session", "run", box, shell, "-", stdin=file).stdout == "it is here\n"


def test_json_has_the_end_and_the_output(ctl: Ctl, box: str, shell: str) -> None:
    [end] = replies(ctl("session", "run", "--json", box, shell, "echo out; echo err >&2; (exit 3)").stdout)
    assert (end["exit_code"], end["stdout"], end["stderr"], end["cwd"]) == (3, "out\n", "err", "/usr")
    [listed] = replies(ctl("session", "ls", "--json", box).stdout)
    assert [row["shell_id"] for row in listed["shells"]] == [shell]
    [interrupted] = replies(ctl("session", "interrupt", "--json", box, shell).stdout)
    assert interrupted == {"interrupted": False, "restarted": False}


def test_what_became_of_the_shell_is_said(ctl: Ctl, box: str, shell: str) -> None:
    """A new one in its place is not the one that somebody set up; and what is wrong with the sandbox."""
    hung = ctl("session", "run", "--timeout", "1s", box, shell, "hang")
    assert hung.returncode == TIMED_OUT
    assert "a new one is in its place: it kept its directory and exported variables" in hung.stderr
    full = ctl("session", "run", box, shell, "(exit 28)")
    assert "sandboxctl: disk_full: /tmp has no room left\nhint: remove files below /tmp\n" in full.stderr
    assert "nothing was running" in ctl("session", "interrupt", box, shell).stderr
    ended = ctl("session", "run", box, shell, "exit 4")
    assert (ended.returncode, "the shell has ended" in ended.stderr) == (4, True)
    gone = ctl("session", "run", box, shell, "true")
    assert "cannot find shell" in gone.stderr


def test_a_shell_is_named_by_the_beginning_of_its_id(ctl: Ctl, box: str, shell: str) -> None:
    """As long as that means one only."""
    assert shell in ctl("session", "ls", box).stdout
    last = next(at for at in range(12) if shell[at] != "5")
    assert ctl("session", "run", box, shell[: last + 1], "pwd").stdout == "/usr\n"
    other = ctl("session", "open", box).stdout.strip()
    assert "cannot tell which shell" in ctl("session", "run", box, "555", "pwd").stderr
    assert "cannot find shell" in ctl("session", "run", box, "abc", "pwd").stderr
    assert ctl("session", "close", box, other).stdout == f"{other}\n"
    assert other not in ctl("session", "ls", box).stdout


@pytest.fixture(params=["blocking", "async"])
def shells(request: pytest.FixtureRequest, ctl: Ctl, box: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The shells of a sandbox, by either client."""
    monkeypatch.setenv("SANDBOXD_SOCKET", ctl.env["SANDBOXD_SOCKET"])
    with asyncio.Runner() as runner:
        client: Any = Sandbox if request.param == "blocking" else Twin(AsyncSandbox, runner)
        yield client.connect(box).shells


def test_the_clients_tell_what_became_of_a_text(shells: Any) -> None:
    """By results and exceptions, as for commands."""
    heard: list[str] = []
    with shells.open(cwd="/usr") as shell:
        result = shell.run("pwd; cd /tmp", on_stdout=heard.append)
        assert (result.stdout, heard, result.cwd, result.restarted) == ("/usr\n", ["/usr\n"], "/tmp", False)
        with pytest.raises(CommandExitException) as failed:
            shell.run("(exit 28)")
        assert [problem.kind for problem in failed.value.result.problems] == ["disk_full"]
        with pytest.raises(TimeoutException) as late:
            shell.run("hang", timeout=1)
        assert late.value.result is not None
        assert late.value.result.exit_code == 128 + signal.SIGKILL
        assert (late.value.result.restarted, late.value.result.restored) == (True, True)  # type: ignore[attr-defined]
        assert [row.shell_id for row in shells.list()] == [shell.shell_id]
        assert shells.connect(shell.shell_id).run("pwd").stdout == "/tmp\n"
    assert shells.list() == []
    with pytest.raises(NotFoundException):
        shell.run("true")
