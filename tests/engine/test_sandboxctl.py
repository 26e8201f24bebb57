"""``sandboxctl`` with a command in a sandbox: as a person or a script uses it, on each engine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engine import kernel
from tests.engine.conftest import Box
from tests.engine.daemons import PATIENCE_S, Daemon, ended, wait_until
from tests.engine.test_commands import ESCAPED_PROCESSES_MIN, ESCAPES, EVERY_BYTE, nothing_runs

pytestmark = pytest.mark.engine

LARGE_BYTES = 64 * 1024 * 1024


def spawn(daemon: Daemon, *words: str) -> subprocess.Popen[bytes]:
    """``sandboxctl`` in a session of its own, its pipes ours."""
    return subprocess.Popen(
        daemon.ctl_argv(*words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=daemon.env,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["no-such-program"], 127),
        (["/etc/passwd"], 126),
        (["sh", "-c", "kill -15 $$"], 128 + 15),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
    ],
    ids=["0", "7", "not found", "not executable", "TERM", "KILL"],
)
def test_exec_exits_as_the_command_did(daemon: Daemon, box: Box, argv: list[str], code: int) -> None:
    assert daemon.ctl("exec", box["id"], *argv).returncode == code


def test_failures_of_our_own_have_a_code_that_is_no_commands(daemon: Daemon, box: Box) -> None:
    done = daemon.ctl("exec", "no-such-box", "true")
    assert done.returncode == 125
    assert b"no-such-box" in done.stderr
    assert daemon.ctl("inspect", "no-such-box").returncode == 5
    assert daemon.ctl("exec", box["id"]).returncode == 2


def test_pipes_pass_every_byte_and_keep_errors_apart(daemon: Daemon, box: Box) -> None:
    done = daemon.ctl("exec", "-i", box["id"], "sh", "-c", "cat; echo problem >&2", stdin=EVERY_BYTE)
    assert (done.stdout, done.stderr) == (EVERY_BYTE, b"problem\n")


def test_without_i_stdin_is_empty(daemon: Daemon, box: Box) -> None:
    """As ``docker exec`` has it: a loop over a file of names must not lose them to the first command."""
    done = daemon.ctl("exec", box["id"], "cat", stdin=b"mine\n")
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_large_stream_passes_unchanged(daemon: Daemon, box: Box, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1024 * 1024) * (LARGE_BYTES // 1024 // 1024))
    with (
        source.open("rb") as stdin,
        subprocess.Popen(["cat"], stdin=stdin, stdout=subprocess.PIPE) as feeder,
        subprocess.Popen(
            daemon.ctl_argv("exec", "-i", box["id"], "cat"),
            stdin=feeder.stdout,
            stdout=subprocess.PIPE,
            env=daemon.env,
        ) as through,
    ):
        assert through.stdout is not None
        received = hashlib.file_digest(through.stdout, "sha256").digest()
    assert through.returncode == 0
    with source.open("rb") as file:
        assert received == hashlib.file_digest(file, "sha256").digest()


def test_variables_and_directory_are_as_given(daemon: Daemon, box: Box) -> None:
    words = ("exec", "-e", "ONE=a b", "--env", "LANG", "--cwd", "/tmp", box["id"], "sh", "-c", "echo $ONE; pwd")
    assert daemon.ctl(*words).stdout == b"a b\n/tmp\n"


def test_flags_after_the_command_are_the_commands(daemon: Daemon, box: Box) -> None:
    assert daemon.ctl("exec", box["id"], "echo", "--json", "-i").stdout == b"--json -i\n"
    assert daemon.ctl("exec", box["id"], "--", "echo", "--", "x").stdout == b"-- x\n"


def test_a_timeout_is_exit_code_124_and_leaves_nothing(daemon: Daemon, box: Box) -> None:
    done = daemon.ctl("exec", "--timeout", "1s", box["id"], "sh", "-c", ESCAPES)
    assert done.returncode == 124
    assert b"time limit" in done.stderr
    wait_until(lambda: nothing_runs(box), "nothing of the command was left")


def test_a_killed_client_takes_its_command_along(daemon: Daemon, box: Box) -> None:
    """SIGKILL: it can say nothing any more. Orphans of a crashed editor would fill the sandbox."""
    with ended(spawn(daemon, "exec", box["id"], "sh", "-c", ESCAPES)) as client:
        wait_until(lambda: len(kernel.processes(box["pid"])) > ESCAPED_PROCESSES_MIN, "the tree stood")
        client.kill()
    wait_until(lambda: nothing_runs(box), "nothing of the command was left")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_a_signal_reaches_the_command(daemon: Daemon, box: Box, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 42' {number.name[3:]}; echo ready; while true; do sleep 0.05; done"
    with ended(spawn(daemon, "exec", box["id"], "sh", "-c", script)) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(number)
        assert client.stdout.read() == b"caught\n"
        assert client.wait(PATIENCE_S) == 42


def test_an_interrupt_ends_what_does_not_catch_it(daemon: Daemon, box: Box) -> None:
    with ended(spawn(daemon, "exec", box["id"], "sh", "-c", "echo ready; sleep 1000")) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        client.send_signal(signal.SIGINT)
        assert client.wait(PATIENCE_S) == 130
    wait_until(lambda: nothing_runs(box), "nothing of the command was left")


def test_detached_it_prints_the_commands_id_and_does_not_wait(daemon: Daemon, box: Box) -> None:
    done = daemon.ctl("exec", "-d", box["id"], "sleep", "1000")
    command_id = done.stdout.decode().strip()
    rows = daemon.call("commands/list", sandbox=box["id"])["commands"]
    assert [row["state"] for row in rows if row["command_id"] == command_id] == ["running"]
    started = json.loads(daemon.ctl("exec", "-d", "--json", box["id"], "sleep", "1000").stdout)
    for each in (command_id, started["command_id"]):
        daemon.call("commands/kill", sandbox=box["id"], command_id=each)


def test_another_user_through_the_engines_own_exec(daemon: Daemon, box: Box) -> None:
    done = daemon.ctl("exec", "-i", "--user", "0", box["id"], "sh", "-c", "id -u; cat; exit 6", stdin=b"x\n")
    assert (done.returncode, done.stdout) == (6, b"0\nx\n")


def test_out_of_memory_is_said_in_words(daemon: Daemon, box: Box) -> None:
    done = daemon.ctl("exec", box["id"], "tail", "/dev/zero")
    assert done.returncode == 137
    assert b"memory" in done.stderr


def test_one_line_makes_a_sandbox_on_a_project_and_runs_a_command_in_it(
    daemon: Daemon, engine: str, project: Path
) -> None:
    """The first thing that anybody tries."""
    (project / "a file").write_text("")
    words = "run --rm --memory 64m --cpus 0.5 --pids 32 --workspace .".split()
    done = daemon.ctl(*words, "--engine", engine, "--", "sh", "-c", "id -u; ls /workspace; exit 4", cwd=project)
    assert (done.returncode, done.stdout) == (4, b"1000\na file\n")
    assert done.stderr == b""
    wait_until(
        lambda: (
            daemon.containers(engine) == [row["container_id"] for row in daemon.journal() if row["engine"] == engine]
        ),
        "it had removed its own",
    )


def test_a_run_that_cannot_start_its_command_leaves_nothing_either(daemon: Daemon, engine: str) -> None:
    before = len(daemon.sandboxes())
    assert daemon.ctl("run", "--rm", "--engine", engine, "--", "no-such-program").returncode == 127
    assert len(daemon.sandboxes()) == before


def test_create_prints_an_id_that_all_other_verbs_take(daemon: Daemon, engine: str) -> None:
    created = daemon.ctl_json("create", "--engine", engine, "--name", f"named-{engine}", "--label", "a=b")
    assert created["verified"] is True
    assert daemon.ctl_json("inspect", created["id"][:8])["name"] == f"named-{engine}"
    listed = daemon.ctl_json("ls", "--label", "a=b")["sandboxes"]
    assert [row["id"] for row in listed] == [created["id"]]
    assert created["id"] in daemon.ctl("ls").stdout.decode() or f"named-{engine}" in daemon.ctl("ls").stdout.decode()
    assert daemon.ctl_json("stats", created["id"])["sandboxes"][0]["pids"] == 1
    assert daemon.ctl("stop", f"named-{engine}").returncode == 0
    assert daemon.ctl("start", f"named-{engine}").returncode == 0
    assert daemon.ctl("exec", f"named-{engine}", "echo", "up").stdout == b"up\n"
    assert daemon.ctl("rm", f"named-{engine}").returncode == 0
    assert daemon.ctl("rm", f"named-{engine}").returncode == 5
    assert daemon.ctl("rm", "--force", f"named-{engine}").returncode == 0


def test_the_daemons_status_names_its_process_and_its_socket(daemon: Daemon) -> None:
    status = daemon.ctl_json("daemon", "status")
    assert (status["pid"], status["socket"]) == (daemon.pid, str(daemon.socket))
    assert daemon.ctl_json("version")["daemon"] == status["version"]


# --- commands that go on without us

COUNT = "for i in 1 2 3 4 5; do echo $i; echo err $i >&2; sleep 0.1; done; exit 5"


def detached(daemon: Daemon, box: Box, script: str, flags: str = "-d") -> str:
    done = daemon.ctl("exec", flags, box["id"], "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def test_output_is_followed_to_the_end_and_read_again(daemon: Daemon, box: Box) -> None:
    command = detached(daemon, box, COUNT)
    for flags in (["-f"], []):
        done = daemon.ctl("logs", *flags, box["id"], command)
        assert (done.returncode, done.stdout) == (0, b"1\n2\n3\n4\n5\n")
        assert done.stderr == b"err 1\nerr 2\nerr 3\nerr 4\nerr 5\n"
    assert daemon.ctl("logs", "--tail", "4", "--stdout", box["id"], command).stdout == b"4\n5\n"
    assert daemon.ctl("wait", box["id"], command).returncode == 5


def test_logs_of_what_runs_end_where_it_is_now(daemon: Daemon, box: Box) -> None:
    command = detached(daemon, box, "printf '\\377\\000'; echo up; sleep 1000")
    wait_until(lambda: daemon.ctl("logs", box["id"], command).stdout == b"\xff\x00up\n", "it had written")
    assert daemon.ctl("kill", box["id"], command).returncode == 0


def test_ps_wait_and_kill_agree_on_what_there_is(daemon: Daemon, box: Box) -> None:
    runs = detached(daemon, box, "trap 'exit 4' USR1; echo up; while true; do sleep 0.05; done")
    tree = detached(daemon, box, ESCAPES)
    states = {row["command_id"]: row["state"] for row in daemon.ctl_json("ps", box["id"])["commands"]}
    assert (states[runs], states[tree]) == ("running", "running")
    table = daemon.ctl("ps", box["id"]).stdout.decode()
    assert f"\n{runs} " in table
    wait_until(lambda: daemon.ctl("logs", box["id"], runs).stdout, "the trap was set")
    assert daemon.ctl("kill", "--signal", "USR1", box["id"], runs).returncode == 0
    assert daemon.ctl("wait", box["id"], runs[:-1]).returncode == 4
    wait_until(lambda: len(kernel.processes(box["pid"])) > ESCAPED_PROCESSES_MIN, "the tree stood")
    assert daemon.ctl("kill", box["id"], tree).stdout.decode() == f"{tree}\n"
    assert nothing_runs(box)
    assert daemon.ctl("wait", box["id"], tree).returncode == 128 + 9


def test_a_stdin_that_the_daemon_holds_is_typed_into_from_outside(daemon: Daemon, box: Box) -> None:
    command = detached(daemon, box, "cat; exit 6", "-di")
    done = daemon.ctl("attach", box["id"], command, stdin=EVERY_BYTE)
    assert (done.returncode, done.stdout) == (6, EVERY_BYTE)


def test_what_was_not_started_detached_was_not_kept(daemon: Daemon, box: Box) -> None:
    started = daemon.call("commands/start", sandbox=box["id"], argv=["sleep", "1000"])
    done = daemon.ctl("logs", box["id"], started["command_id"])
    assert done.returncode == 1
    assert b"not kept" in done.stderr
    daemon.ctl("kill", box["id"], started["command_id"])
