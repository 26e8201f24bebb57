"""Shells that keep their state, on real engines: what texts leave behind, how they end, and the way back."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import (
    AsyncSandbox,
    CommandExitException,
    NotFoundException,
    Sandbox,
    SandboxException,
    TimeoutException,
)
from tests.engine.daemons import Daemon, wait_until
from tests.twins import Twin

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def reachable(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client finds the daemon where a user's would be found."""
    monkeypatch.setenv("SANDBOXD_SOCKET", str(daemon.socket))


@pytest.fixture
def shell(box: dict[str, Any]) -> Iterator[Any]:
    """A shell of the module's sandbox."""
    with Sandbox.connect(box["id"]).shells.open() as shell:
        yield shell


def refused(shell: Any, text: str, **options: Any) -> Any:
    """The result of a text that does not exit with 0."""
    with pytest.raises(CommandExitException) as raised:
        shell.run(text, **options)
    return raised.value.result


def test_a_text_finds_what_the_one_before_left(shell: Any) -> None:
    """Directory, variables exported or not, functions, aliases and options: all of it is the same shell."""
    shell.run("cd /usr && export A=1; B=2; f() { echo \"f $1\"; }; alias ll='echo aliased'; set -f")
    result = shell.run("echo $A $B; f x; pwd; echo err >&2; echo *\nll")
    assert result.stdout == "1 2\nf x\n/usr\n*\naliased\n"
    assert (result.stderr, result.exit_code, result.cwd) == ("err\n", 0, "/usr")
    assert (result.restarted, result.shell_ended, result.interrupted) == (False, False, False)


def test_both_clients_say_the_same(box: dict[str, Any]) -> None:
    """The async client is the blocking one's twin."""
    with asyncio.Runner() as runner:
        sandbox = Twin(AsyncSandbox, runner).connect(box["id"])
        heard: list[str] = []
        with sandbox.shells.open(envs={"A": "b"}, cwd="/usr") as shell:
            result = shell.run("pwd; echo $A", on_stdout=heard.append)
            assert (result.stdout, "".join(heard), result.cwd) == ("/usr\nb\n", "/usr\nb\n", "/usr")
            with pytest.raises(CommandExitException):
                shell.run("false")
            [row] = [row for row in sandbox.shells.list() if row.shell_id == shell.shell_id]
            assert (row.state, row.cwd) == ("idle", "/usr")
            assert sandbox.shells.connect(shell.shell_id).run("echo $A").stdout == "b\n"
            assert shell.interrupt() is False
        assert shell.close() is False
        with pytest.raises(NotFoundException):
            shell.run("true")


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [
        ("false", 1),
        ("(exit 42)", 42),
        ("return 7", 7),
        ("if true; then", 2),
        ("echo 'unclosed", 2),
        ("set -u; echo $nope", 2),
        ("echo ${nope?boom}", 2),
        ("exec 1>&- 2>&-; echo lost", 1),
        ("kill -9 $$x", 1),
        ("nosuchprogram", 127),
        ("/etc/passwd", 126),
        ("sh -c 'kill -9 $$'", 137),
    ],
)
def test_a_text_that_fails_has_its_exact_code_and_the_shell_lives(shell: Any, text: str, exit_code: int) -> None:
    """Errors of syntax and of expansion would end a shell that is not interactive."""
    shell.run("mark=kept")
    result = refused(shell, text)
    assert (result.exit_code, result.shell_ended, result.restarted) == (exit_code, False, False)
    assert shell.run("set +u; echo $mark").stdout == "kept\n"


def test_output_is_kept_byte_for_byte_whatever_it_holds(shell: Any) -> None:
    """Nothing in it can be taken for the shell's own report: that has a way of its own."""
    result = shell.run("printf '\\000\\377\\n'; printf '\\001' >&2; env; set")
    assert result.stdout_bytes.startswith(b"\0\xff\n")
    assert result.stderr_bytes == b"\x01"
    assert shell.run("head -c 3000000 /dev/zero").stdout_bytes == bytes(3_000_000)
    assert shell.run('cat; read x; echo "$x"; cat <<E\nhere\nE').stdout == "\nhere\n"
    assert refused(shell, "cat <<E\nunclosed\nfalse\nE\nfalse").stdout == "unclosed\nfalse\n"


def test_what_closes_descriptors_or_leaves_jobs_behind_does_not_hold_the_answer_up(shell: Any) -> None:
    """The redirections are a text's own, and the answer does not wait for who still holds its stdout."""
    shell.run("exec 0<&- 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-")
    shell.run("exec >/dev/null 2>&1")
    assert shell.run("sleep 1000 & echo started").stdout == "started\n"
    assert shell.run("echo next; kill %1 2>/dev/null || kill $!; wait").stdout == "next\n"


def test_a_shell_that_is_exited_says_so_and_is_gone(box: dict[str, Any], shell: Any) -> None:
    """By ``exit``, by ``set -e`` or by ``exec``: the code is the text's, and the next run is told."""
    result = refused(shell, "echo out; exit 3")
    assert (result.exit_code, result.stdout, result.shell_ended, result.restarted) == (3, "out\n", True, False)
    with pytest.raises(NotFoundException):
        shell.run("true")
    shells = Sandbox.connect(box["id"]).shells
    with shells.open() as other:
        result = refused(other, "set -e; false; echo never")
        assert (result.exit_code, result.stdout, result.shell_ended) == (1, "", True)
    with shells.open() as other:
        result = other.run("exec echo replaced")
        assert (result.stdout, result.shell_ended) == ("replaced\n", True)


BUSY = "while :; do :; done"

TRIES = {BUSY: 4}
"""Busybox leaves its signal handler by a jump: at times it was allocating memory, and hangs in its lock for ever.
Such a shell is replaced. Of a few one must come back by itself, as all others must at once."""


@pytest.mark.parametrize(
    "text",
    [
        "sleep 1000",
        BUSY,
        "sh -c 'trap \"\" INT; sleep 1000'",
        "sh -c 'trap \"\" INT TERM; while :; do sleep 1000; done'",
        "sh -c 'kill -STOP $$'",
        "sleep 1000 | cat; cat /dev/zero > /dev/null",
    ],
)
def test_what_hangs_is_ended_and_the_shell_comes_back_with_its_state(box: dict[str, Any], text: str) -> None:
    """As by Ctrl-C, and by TERM and KILL to what began with the text; the job of an earlier text stays."""
    for _ in range(TRIES.get(text, 1)):
        with Sandbox.connect(box["id"]).shells.open() as shell:
            shell.run("cd /usr; mark=kept; sleep 1000 & job=$!")
            with pytest.raises(TimeoutException) as raised:
                shell.run(f"echo before; {text}", timeout=0.5)
            result = raised.value.result
            assert (result.stdout, result.status, result.interrupted) == ("before\n", "timeout", True)
            assert not result.shell_ended
            if not result.restarted:
                assert (
                    shell.run("echo $mark; pwd; kill -0 $job && echo lives; kill $job").stdout
                    == "kept\n/usr\nlives\n"
                )
                return
    pytest.fail("no shell came back by itself")


def test_a_shell_that_does_not_come_back_is_replaced_and_keeps_what_it_exported(shell: Any) -> None:
    """The answer says what is lost; the next run finds the directory and the exported variables."""
    shell.run("cd /usr; export A='1 \"2'\\'' 3'; B=2; f() { :; }")
    with pytest.raises(TimeoutException) as raised:
        shell.run("trap '' INT; while :; do :; done", timeout=0.5)
    result = raised.value.result
    assert (result.restarted, result.restored, result.shell_ended, result.cwd) == (True, True, False, "/usr")
    assert shell.run('echo "$A|$B"; pwd; command -v f || echo gone').stdout == "1 \"2' 3|\n/usr\ngone\n"


def test_a_shell_that_is_killed_is_replaced(shell: Any) -> None:
    """Also when the text takes everything of its user with it, the daemon's helpers included."""
    shell.run("export A=1")
    result = refused(shell, "kill -9 $$")
    assert (result.exit_code, result.signal, result.restarted, result.restored) == (137, 9, True, True)
    result = refused(shell, "echo before; kill -9 -1; sleep 1000")
    assert (result.restarted, result.shell_ended) == (True, False)
    assert shell.run("echo $A").stdout == "1\n"


def test_an_interrupt_from_elsewhere_ends_the_text(shell: Any) -> None:
    """It waits until the shell can be used again; meanwhile a second text is refused."""
    results: list[Any] = []
    began = threading.Event()
    thread = threading.Thread(
        target=lambda: results.append(
            refused(shell, "mark=1; echo began; sleep 1000", on_stdout=lambda _: began.set(), timeout=60)
        )
    )
    thread.start()
    assert began.wait(20)
    with pytest.raises(SandboxException, match="at once"):
        shell.run("true")
    assert shell.interrupt() is True
    assert shell.run("echo $mark").stdout == "1\n"
    thread.join()
    assert (results[0].status, results[0].interrupted, results[0].restarted) == ("killed", True, False)


def test_a_caller_that_goes_away_interrupts_its_text(daemon: Daemon, box: dict[str, Any], shell: Any) -> None:
    """Nobody would take the answer; the shell is to be there for the next caller."""
    ref = {"sandbox": box["id"], "shell_id": shell.shell_id}
    with daemon.connect() as connection:
        connection.send("shells/run", {**ref, "text": "mark=1; : > /tmp/began; sleep 1000"})
        # The shell is busy before it has read a word of the text.
        began = {"sandbox": box["id"], "path": "/tmp/began"}
        wait_until(lambda: daemon.call("files/exists", **began)["exists"], "the text runs")
    wait_until(lambda: rows(daemon, box)[shell.shell_id] == "idle", "it was interrupted")
    assert shell.run("echo $mark").stdout == "1\n"


def test_a_killed_daemon_costs_no_shell(daemon: Daemon, box: dict[str, Any], shell: Any) -> None:
    """The next one finds it with all its state, for the sandbox holds it."""
    shell.run("cd /usr; f() { echo kept; }")
    daemon.kill()
    daemon.start()
    assert shell.run("f; pwd").stdout == "kept\n/usr\n"
    assert [row["shell_id"] for row in daemon.call("shells/list", sandbox=box["id"])["shells"]] == [shell.shell_id]


def test_a_sandbox_has_only_so_many_shells_and_they_leave_nothing_behind(daemon: Daemon, engine: str) -> None:
    """And closing one ends what it left running."""
    with daemon.box(engine, limits={"memory": "64m", "pids": 200}) as box:
        shells = Sandbox.connect(box["id"]).shells
        opened = [shells.open() for _ in range(16)]
        with pytest.raises(SandboxException, match="more than 16"):
            shells.open()
        opened[0].run("sleep 1000 & (setsid sleep 1000 &)")
        for shell in opened:
            assert shell.close() is True
        wait_until(lambda: daemon.sh(box, "ps | grep -c '[s]leep 1000' || true") == "0\n", "no process is left")
        assert daemon.call("shells/list", sandbox=box["id"]) == {"shells": []}


def test_a_shell_that_the_image_does_not_have_is_refused(box: dict[str, Any]) -> None:
    """With what to do about it, and without a trace."""
    shells = Sandbox.connect(box["id"]).shells
    before = len(shells.list())
    with pytest.raises(SandboxException, match="fish"):
        shells.open(shell="fish")
    assert len(shells.list()) == before


def test_the_command_line_opens_runs_and_closes(daemon: Daemon, box: dict[str, Any]) -> None:
    """The exit code is the text's, and what became of the shell is said on stderr."""
    shell_id = daemon.ctl("session", "open", "--cwd", "/usr", box["id"]).stdout.decode().strip()
    done = daemon.ctl("session", "run", box["id"], shell_id[:8], "pwd; echo err >&2; (exit 4)")
    assert (done.stdout, done.stderr, done.returncode) == (b"/usr\n", b"err\n", 4)
    told = daemon.ctl_json("session", "run", "--json", box["id"], shell_id, "echo hi")
    assert (told["stdout"], told["cwd"], told["ended"]) == ("hi\n", "/usr", False)
    done = daemon.ctl("session", "run", "--timeout", "0.5", box["id"], shell_id, "trap '' INT; while :; do :; done")
    assert done.returncode == 124
    assert b"a new one is in its place: it kept its directory and exported variables" in done.stderr
    assert shell_id.encode() in daemon.ctl("session", "ls", box["id"]).stdout
    assert daemon.ctl("session", "run", box["id"], shell_id, "-", stdin=b"pwd\nexit 5").returncode == 5
    assert daemon.ctl("session", "close", box["id"], shell_id).returncode == 5
    assert daemon.ctl_json("session", "ls", "--json", box["id"])["shells"] == []


def rows(daemon: Daemon, box: dict[str, Any]) -> dict[str, str]:
    """The states of the sandbox's shells."""
    return {row["shell_id"]: row["state"] for row in daemon.call("shells/list", sandbox=box["id"])["shells"]}


@pytest.fixture(scope="session")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the host's bash in it, and all that it needs, for an image that has none."""
    program = shutil.which("bash")
    if program is None:
        pytest.skip("bash is not installed on this host, so there is none to take into a sandbox: apt install bash")
    project = tmp_path_factory.mktemp("bash")
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+)", linked):
        shutil.copy(library, project)
    (loader,) = project.glob("ld-*")
    loader.rename(project / "loader")
    shutil.copy(program, project / "bash-program")
    wrapper = project / "bash"
    wrapper.write_text('#!/bin/sh\nexec /workspace/loader --library-path /workspace /workspace/bash-program "$@"\n')
    wrapper.chmod(0o755)
    project.chmod(0o755)
    return project


def test_bash_keeps_what_only_bash_has_and_comes_back(daemon: Daemon, engine: str, bash: Path) -> None:
    """Arrays and functions stay; an interrupt, its own too, costs nothing; a lost one is replaced by a bash."""
    with (
        daemon.box(engine, workspace={"path": str(bash)}) as box,
        Sandbox.connect(box["id"]).shells.open(shell="/workspace/bash", cwd="/tmp") as shell,
    ):
        shell.run('items=(one "two three"); f() { echo "${#items[@]} ${items[1]}"; }; export KEPT=yes')
        assert shell.run("f; [[ $BASH_VERSION == 5* ]] && pwd").stdout == "2 two three\n/tmp\n"
        assert refused(shell, "kill -INT $$; echo never").stdout == ""
        with pytest.raises(TimeoutException) as late:
            shell.run("sleep 1000", timeout=1)
        assert late.value.result is not None
        assert shell.run("f").stdout == "2 two three\n"
        with pytest.raises(TimeoutException) as lost:
            shell.run("trap '' INT; while :; do :; done", timeout=1)
        assert lost.value.result is not None
        assert (lost.value.result.restarted, lost.value.result.restored) == (True, True)
        assert shell.run("echo $KEPT ${#items[@]} ${BASH_VERSION%%.*}; pwd").stdout == "yes 0 5\n/tmp\n"
