"""The command line as people and scripts use it: exit codes, stdout, stderr, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.cli.main import FAMILIES
from tests.daemon.sandboxctl import CTL, PATIENCE_S, Ctl, environment, stub_daemon


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    with stub_daemon(tmp_path_factory.mktemp("daemon")) as env:
        yield Ctl(env)


@pytest.fixture
def box(ctl: Ctl) -> Iterator[str]:
    """A sandbox of this test's own."""
    sandbox = ctl("create").stdout.strip()
    yield sandbox
    ctl("rm", "-f", sandbox)


def replies(text: str) -> list[dict[str, Any]]:
    """A stream of JSON values, as jq reads it."""
    decoder, values = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:]
    return values


def inspected(ctl: Ctl, sandbox: str) -> dict[str, Any]:
    [reply] = replies(ctl("inspect", sandbox, "--json").stdout)
    return reply


# --- create


def test_create_prints_the_id_and_nothing_else(ctl: Ctl) -> None:
    """``box=$(sandboxctl create)`` is how scripts begin."""
    done = ctl("create")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"[0-9a-f]{32}\n", done.stdout)


def test_create_json_is_the_reply(ctl: Ctl) -> None:
    """The same struct as on the wire, so that there is one thing to learn."""
    [reply] = replies(ctl("create", "--json").stdout)
    assert {"id", "limits", "verified", "timings_ms"} <= reply.keys()


def test_create_flags_reach_the_daemon(ctl: Ctl, tmp_path: Path) -> None:
    """Each flag is one field of the request."""
    done = ctl(
        *("create", "--name", "flags", "--engine", "docker", "--image", "i", "-w", ".", "--ro", "--network", "full"),
        *("-m", "512m", "--cpus", "0.5", "--pids", "64", "--degraded", "--label", "a=b", "--metadata", "c=d=e"),
        cwd=tmp_path,
    )
    assert done.returncode == 0
    reply = inspected(ctl, "flags")
    assert (reply["engine"], reply["image"], reply["network"]) == ("docker", "i", "full")
    assert reply["workspace"] == {
        "path": str(tmp_path),
        "path_bytes": None,
        "mode": "ro",
        "mounted": "as-is",
        "backend": "bind",
    }
    assert reply["metadata"] == {"a": "b", "c": "d=e"}
    assert reply["limits_policy"] == "degraded"


def test_variables_come_from_flags_files_and_the_callers_environment(ctl: Ctl, tmp_path: Path) -> None:
    """As with docker: a name alone takes the caller's value, and nothing if there is none; flags win over files."""
    (tmp_path / "env").write_text("# a comment\n\nFILE=1\nBOTH=file\nCALLER\n")
    box = ctl(
        *("create", "-e", "A=b=c", "-e", "CALLER2", "-e", "ABSENT", "-e", "BOTH=flag", "-e", "EMPTY="),
        *("--env-file", str(tmp_path / "env")),
        env={"CALLER": "x", "CALLER2": "y"},
    ).stdout.strip()
    assert inspected(ctl, box)["env"] == {
        "A": "b=c",
        "FILE": "1",
        "BOTH": "flag",
        "CALLER": "x",
        "CALLER2": "y",
        "EMPTY": "",
    }


def test_a_secret_is_never_repeated(ctl: Ctl) -> None:
    """Terminals are recorded and logs are kept."""
    done = ctl("create", "-e", "=hunter2")
    assert done.returncode == 2
    box = ctl("create", "-e", "TOKEN=hunter2").stdout.strip()
    shown = ctl("inspect", box)
    assert "TOKEN" in shown.stdout
    assert "hunter2" not in done.stderr + shown.stdout + shown.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--shell",),
        ("--command", "pass 'show"),
        ("--command", "a", "--file", "b"),
        ("--command", "a", "--credential", "b"),
        ("--command", " "),
        ("--raw", "--command", "a"),
        ("--raw", "--credential", "b"),
    ],
)
def test_a_source_of_a_secret_that_cannot_be_meant_is_refused_before_anybody_is_asked(
    ctl: Ctl, words: tuple[str, ...]
) -> None:
    done = ctl("secret", "set", "token", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", [("create",), ("run", "-i")])
def test_a_bad_limit_is_one_line_and_exit_code_2(ctl: Ctl, verb: tuple[str, ...]) -> None:
    """It says what is allowed, and there is nothing else to read."""
    done = ctl(*verb, "--memory", "banana")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sandboxctl: cannot use memory 'banana': a size is a number, or such as 512m\n"


def test_limits_that_are_not_verified_are_shown(ctl: Ctl) -> None:
    """Nobody should have to ask whether what they asked for is in force."""
    done = ctl("create", "--image", "unverified")
    assert "LIMIT" in done.stderr
    assert "LIMIT" not in done.stdout


def test_warnings_go_to_stderr(ctl: Ctl) -> None:
    """Data to stdout, the rest to stderr."""
    assert ctl("create", "--image", "warned").stderr == "sandboxctl: warning: the sky is low\n"


def test_ctrl_c_cancels_a_create(ctl: Ctl) -> None:
    """And the daemon is told, so that nothing is left half-made."""
    with ctl.start("create", "--image", "slow", stderr=subprocess.PIPE) as process:
        wait_for_request(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


def wait_for_request(process: "subprocess.Popen[str]") -> None:
    """Until the process sleeps in a read from its socket, which is after it has sent its request."""
    stack = Path(f"/proc/{process.pid}/syscall")
    recvmsg = {"x86_64": "47", "aarch64": "212"}[os.uname().machine]
    while not stack.read_text().startswith(f"{recvmsg} "):
        assert process.poll() is None, "it ended instead"


# --- audit


def test_the_audit_log_is_shown_a_line_per_request_whatever_is_in_it(ctl: Ctl) -> None:
    """Its arguments are a caller's words, and must not reach the terminal as they are."""
    done = ctl("audit", "query", "--limit", "2", env={"TZ": "UTC"})
    assert done.returncode == 0
    header, hostile, begun, more = done.stdout.splitlines()
    assert header.split() == ["SEQ", "AT", "WHO", "METHOD", "SANDBOX", "RESULT", "TOOK"]
    assert "1000:42 'a b\\x1b[2J'" in hostile
    assert hostile.split()[:3] == ["7", "1970-01-01", "00:00:00"]
    assert hostile.endswith("commands/run   sb-a      not_found   1.2ms   argv=[echo 'a\\nb']")
    assert begun.split()[3:6] == ["-", "begun", "-"]
    assert "--limit" in more
    [reply] = replies(ctl("audit", "query", "--json").stdout)
    assert reply["entries"][0]["arguments"]["argv"] == ["echo", "a\nb"]


def test_what_is_asked_of_the_audit_log_reaches_the_daemon(ctl: Ctl) -> None:
    """Each flag is one field; times are ages or dates."""
    [reply] = replies(
        ctl(
            *("audit", "query", "--json", "--since", "1970-01-01T00:01", "--until", "1d", "--sandbox", "box"),
            *("--method", "commands", "--uid", "7", "--result", "failed", "--limit", "5"),
            env={"TZ": "UTC"},
        ).stdout
    )
    asked = reply["entries"][1]["data"]
    assert abs(int(asked.pop("until_ms")) / 1000 - time.time() + 86_400) < PATIENCE_S
    assert asked == {
        "since_ms": "60000",
        "sandbox": "box",
        "method": "commands",
        "uid": "7",
        "result": "failed",
        "limit": "5",
    }


def test_an_audit_log_that_is_not_intact_is_an_exit_code_of_its_own_and_says_which_line(ctl: Ctl) -> None:
    """A cron job looks at the code, a person at the line."""
    intact = ctl("audit", "verify")
    assert (intact.returncode, intact.stderr) == (0, "")
    said = "intact: 20 lines in 1 files, numbers 1 to 20; 3 lines could not be written, which it says; 1 cut short by"
    assert intact.stdout.startswith(said)
    assert intact.stdout.endswith(f"head {'ab' * 32}\n")
    ctl("create", "--name", "tampered")
    broken = ctl("audit", "verify")
    ctl("rm", "tampered")
    assert broken.returncode == 1
    first, more, verdict, _ = broken.stdout.splitlines()
    assert first == "audit-000001.jsonl:12: changed, number 11: '\\x1b[2J it is not'"
    assert more == "and 1 more"
    assert verdict.startswith("NOT intact: ")


# --- metrics


def test_metrics_are_text_as_it_came(ctl: Ctl) -> None:
    """For a pipe into a file that a node exporter reads."""
    assert ctl("metrics").stdout == "# TYPE a gauge\na 1\n# EOF\n"
    [reply] = replies(ctl("metrics", "--json").stdout)
    assert reply["content_type"] == "text/plain"


# --- exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("inspect", "absent"), 5, "hint: sandboxctl ls"),
        (("create", "--image", "no-engine"), 3, "hint: sandboxctl doctor"),
        (("create", "--no-such-flag"), 2, "hint: sandboxctl create --help"),
        (("create", "--label", "novalue"), 2, "NAME=VALUE"),
        (("create", "--env-file", "/absent"), 2, "cannot read '/absent'"),
        (("no-such-verb",), 2, "unknown command 'no-such-verb'"),
        (("lss",), 2, "hint: sandboxctl ls\n"),
        (("images",), 2, "hint: sandboxctl image list\n"),
        (("-v",), 2, "hint: sandboxctl --version\n"),
        (("create", "--memroy", "1g"), 2, "did you mean --memory?"),
        (("create", "--workspace", ""), 2, "must not be empty"),
        (("create", "--image", ""), 2, "must not be empty"),
        (("create", "--ro"), 2, "--workspace"),
        (("run", "--ro", "true"), 2, "--workspace"),
        (("run",), 2, "hint: sandboxctl run [FLAG ...] COMMAND"),
        (("exec", "--json", "absent", "true"), 2, "--json goes with --detach"),
        (("cp", "a", "b"), 2, "written SANDBOX:PATH"),
        (("forward", "absent", "65536"), 2, "ports go from 1 to 65535"),
        (("forward", "absent", "0"), 2, "ports go from 1 to 65535"),
        (("events", "--kind", "gone"), 2, "removed"),
        (("audit", "query", "--since", "yesterday"), 2, "is no time"),
        (("secret", "set", "x", "--file", "/absent"), 2, "cannot read '/absent': No such file or directory"),
        (("service", "status", "absent"), 5, "hint: sandboxctl service list"),
        (("completion", "fish"), 2, "there is no completion for 'fish': bash and zsh have one"),
        (("audit",), 2, "ACTION"),
        ((), 2, "usage:"),
        (("update", "absent"), 2, "which limit?"),
        (("rm",), 2, "which sandboxes?"),
        (("rm", "--all", "x"), 2, "which sandboxes?"),
        (("exec", "absent", "true"), 125, "cannot find 'absent'"),
        (
            ("run", "--rm", "no.such/image:1", "sh"),
            127,
            "hint: if no.such/image:1 is an image: sandboxctl run --image",
        ),
        (("wait", "absent", "0000000000ff"), 125, "cannot find command 0000000000ff"),
        (("kill", "absent", "0000000000ff"), 5, "cannot find command 0000000000ff"),
        (("exec", "absent"), 2, "which command?"),
        (("exec", "-t", "absent", "true"), 2, "stdin is not a terminal"),
    ],
)
def test_failures_have_their_exit_codes_and_say_what_to_do(
    ctl: Ctl, arguments: tuple[str, ...], code: int, says: str
) -> None:
    """Scripts react to the code, people to the hint."""
    done = ctl(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("true",), 0),
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -TERM $$"), 128 + 15),
        (("/no/such/program",), 127),
        (("/etc/passwd",), 126),
    ],
)
def test_exec_exits_as_its_command_did(ctl: Ctl, box: str, command: tuple[str, ...], code: int) -> None:
    """And with the shells' codes when there was no command to speak of."""
    assert ctl("exec", box, *command).returncode == code


def test_a_command_beyond_its_time_is_124(ctl: Ctl, box: str) -> None:
    """As ``timeout`` has it; and it says so, for 124 could be the command's own."""
    done = ctl("exec", "--timeout", "0.05s", box, "sleep", "60")
    assert done.returncode == 124
    assert "time limit of 0.05s" in done.stderr


def test_a_crash_is_said(ctl: Ctl, box: str) -> None:
    """139 alone is a riddle."""
    done = ctl("exec", box, "sh", "-c", "kill -SEGV $$")
    assert (done.returncode, done.stderr) == (139, "sandboxctl: the command was ended by signal 11 (SIGSEGV)\n")


@pytest.mark.parametrize("arguments", [("ls",), ("--help",), ("ls", "--help")])
def test_output_that_cannot_be_written_is_one_line(ctl: Ctl, arguments: tuple[str, ...]) -> None:
    """A full disk is nothing that a traceback helps with."""
    with open("/dev/full", "w") as full:
        done = ctl(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "sandboxctl: cannot write: No space left on device\n")


def test_a_current_directory_that_is_gone_is_said(ctl: Ctl, tmp_path: Path) -> None:
    """It happens in the other window."""
    script = 'cd "$0" && rmdir "$0" && exec "$@"'
    done = subprocess.run(
        ["/bin/sh", "-c", script, str(tmp_path), *CTL, "create", "--workspace", "."],
        env=ctl.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "sandboxctl: cannot use '.' as a workspace: the current directory was removed; cd\n"


# --- exec


def test_exec_hands_over_output_byte_for_byte(ctl: Ctl, box: str) -> None:
    """Stdout and stderr are the caller's own; nothing is decoded, merged or cut."""
    script = "head -c 3000000 /dev/zero; printf '\\377\\000' ; echo oops >&2"
    done = subprocess.run([*CTL, "exec", box, "sh", "-c", script], env=ctl.env, capture_output=True, check=True)
    assert done.stdout == bytes(3_000_000) + b"\xff\x00"
    assert done.stderr == b"oops\n"


def test_stdin_is_handed_over_only_when_asked(ctl: Ctl, box: str) -> None:
    """A loop over ``read`` that calls exec must not lose its input, as docker's users learned."""
    assert ctl("exec", "-i", box, "cat", input="hello").stdout == "hello"
    assert ctl("exec", box, "cat", input="hello").stdout == ""


def test_a_commands_own_flags_are_its_own(ctl: Ctl, box: str) -> None:
    """Everything after the sandbox belongs to the command, also what looks like ours."""
    for dashes in ((), ("--",)):
        done = ctl("exec", box, *dashes, "echo", "--json", "-it", "-e", "--", "--help")
        assert done.stdout == "--json -it -e -- --help\n"


def test_variables_and_directory_reach_the_command(ctl: Ctl, box: str) -> None:
    """The two things that every command needs."""
    assert ctl("exec", "-e", "A=b", "-w", "/usr", box, "sh", "-c", "echo $A; pwd").stdout == "b\n/usr\n"


def test_a_closed_stdout_does_no_harm(ctl: Ctl, box: str) -> None:
    """``>&-`` is rare and legal."""
    command = [*CTL, "exec", box, "sh", "-c", "echo x; exit 3"]
    done = subprocess.run(["/bin/sh", "-c", '"$@" >&-', "sh", *command], env=ctl.env, check=False)
    assert done.returncode == 3


def test_a_reader_that_has_seen_enough_does_no_harm(ctl: Ctl) -> None:
    """``| head -1``: no traceback."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = ctl("ls", capture_output=False, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert done.stderr == ""


TRAP = "trap 'echo got; exit 9' {name}; echo up; while :; do sleep 0.01; done"


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT"])
def test_a_signal_to_us_reaches_the_command(ctl: Ctl, box: str, name: str) -> None:
    """Supervisors stop what they started by signals."""
    script = TRAP.format(name=name)
    with ctl.start("exec", box, "sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(getattr(signal, f"SIG{name}"))
        assert process.stdout.readline() == "got\n"
        assert process.wait(PATIENCE_S) == 9


def test_a_second_ctrl_c_kills(ctl: Ctl, box: str) -> None:
    """Some commands do not want to go."""
    script = "trap 'echo no' INT; echo up; while :; do sleep 0.01; done"
    with ctl.start("exec", box, "sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "no\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 128 + 9


def test_a_signal_that_the_caller_ignores_stays_ignored(ctl: Ctl, box: str) -> None:
    """``nohup`` means it."""
    script = TRAP.format(name="HUP")
    command = [*CTL, "exec", box, "sh", "-c", script]
    with subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command], env=ctl.env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + 15
        assert process.stdout.read() == ""


def test_a_detached_command_prints_its_id(ctl: Ctl, box: str) -> None:
    """Other verbs name it by that."""
    assert re.fullmatch(r"[0-9a-f]{12}\n", ctl("exec", "-d", box, "sleep", "0").stdout)
    [reply] = replies(ctl("exec", "-d", "--json", box, "sleep", "0").stdout)
    assert reply["command_id"]


# --- run


def test_run_prints_only_what_the_command_prints(ctl: Ctl) -> None:
    """Its stdout is data for the next program; the sandbox that stays is a matter for stderr."""
    done = ctl("run", "--label", "test=run", "sh", "-c", "echo hello; exit 4")
    assert (done.returncode, done.stdout) == (4, "hello\n")
    [row] = replies(ctl("ls", "--json", "--label", "test=run").stdout)[0]["sandboxes"]
    assert f"sandboxctl rm {row['id']}" in done.stderr


@pytest.mark.parametrize(
    ("command", "code"), [(("true",), 0), (("/no/such/program",), 127), (("sh", "-c", "kill -9 $$"), 137)]
)
def test_run_rm_leaves_nothing(ctl: Ctl, command: tuple[str, ...], code: int) -> None:
    """Whatever happens to the command."""
    done = ctl("run", "--rm", "--label", "test=rm", *command)
    assert done.returncode == code
    assert replies(ctl("ls", "--json", "--label", "test=rm").stdout)[0]["sandboxes"] == []


def test_run_rm_leaves_nothing_when_it_is_killed(ctl: Ctl) -> None:
    """The daemon sees the connection end, and removes what was made for it."""
    with ctl.start(
        "run", "--rm", "--label", "test=k", "sh", "-c", "echo up; sleep 60", stdout=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "up\n"
        run.kill()
        # The command held the other end; it is gone when this reads to the end.
        assert run.stdout.read() == ""
    assert replies(ctl("ls", "--json", "--label", "test=k").stdout)[0]["sandboxes"] == []


def test_run_takes_the_first_word_as_the_command(ctl: Ctl) -> None:
    """With or without dashes before it, flags after it are its own."""
    for dashes in ((), ("--",)):
        assert ctl("run", "--rm", "-m", "1g", *dashes, "echo", "-m", "--rm").stdout == "-m --rm\n"


def test_run_without_a_command_runs_a_shell(ctl: Ctl) -> None:
    """As ``docker run`` of most images does."""
    assert ctl("run", "--rm", "-i", input="echo $((6 * 7))\n").stdout == "42\n"


def test_a_shell_reads_commands_also_without_a_terminal(ctl: Ctl, box: str) -> None:
    """A heredoc is a way to use it."""
    assert ctl("shell", box, input="echo $((6 * 7))\n").stdout == "42\n"


# --- the other verbs


def test_ls_can_be_a_table_ids_or_json(ctl: Ctl, box: str) -> None:
    """For people, for xargs, for programs."""
    assert ctl("ls").stdout.startswith("ID ")
    assert f"\n{box} " in ctl("ls").stdout
    assert box in ctl("ls", "-q").stdout.split()
    assert box in [row["id"] for row in replies(ctl("ls", "--json").stdout)[0]["sandboxes"]]


def test_several_replies_are_one_array_of_json(ctl: Ctl) -> None:
    """In the order asked, each exactly as on the wire."""
    names = [ctl("create").stdout.strip() for _ in range(12)]
    assert [reply["id"] for reply in json.loads(ctl("inspect", "--json", *names).stdout)] == names
    assert ctl("rm", *names).stdout.split() == names


def test_nothing_is_an_empty_array_of_json(ctl: Ctl) -> None:
    """Whatever was left to remove, the output can be read."""
    assert json.loads(ctl("rm", "-f", "--json", "absent").stdout) == []
    assert json.loads(ctl("rm", "-f", "--json", "absent", "gone").stdout) == []


def test_what_was_typed_is_echoed(ctl: Ctl) -> None:
    """Whoever names it by its id goes on with the id."""
    box = ctl("create", "--name", "echoed").stdout.strip()
    assert ctl("stop", "echoed").stdout == "echoed\n"
    assert ctl("rm", box).stdout == f"{box}\n"


def test_one_failure_does_not_stop_the_others_and_gives_the_code(ctl: Ctl) -> None:
    """Half done and silent would be the worst of both."""
    one, two = (ctl("create").stdout.strip() for _ in range(2))
    done = ctl("rm", one, "absent", two)
    assert (done.returncode, done.stdout.split()) == (5, [one, two])
    assert "'absent'" in done.stderr


def test_rm_force_forgives_what_is_not_there(ctl: Ctl) -> None:
    """Cleanup scripts do not know what is left."""
    done = ctl("rm", "-f", "absent")
    assert (done.returncode, done.stderr) == (0, "")


def test_rm_all_wants_to_be_sure(tmp_path: Path) -> None:
    """It is the one line that loses everything."""
    with stub_daemon(tmp_path) as env:
        ctl = Ctl(env)
        ctl("create")
        refused = ctl("rm", "--all")
        assert (refused.returncode, "--yes" in refused.stderr) == (1, True)
        assert "would remove 1 sandbox;" in refused.stderr
        assert ctl("rm", "--all", "--yes").returncode == 0
        assert ctl("rm", "--all", "--json").stdout == "[]\n"
        assert ctl("ls", "-q").stdout == ""


def test_verify_fails_when_a_limit_is_not_proven(ctl: Ctl, box: str) -> None:
    """It is a check, so it has a verdict."""
    proven = ctl("verify", "--provoke", box)
    assert proven.returncode == 0
    assert "oom_kill 0 -> 1" in proven.stdout
    unproven = ctl("create", "--image", "unverified").stdout.strip()
    assert ctl("verify", unproven).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "code", "shows"),
    [
        (("stats",), 0, "MEMORY"),
        (("doctor",), 1, "  systemctl fix-it"),
        (("config",), 0, "ORIGIN"),
        (("image", "list"), 0, "default"),
        (("image", "build"), 0, "default"),
        (("daemon", "start"), 0, "running"),
        (("daemon", "status"), 0, "running"),
        (("version",), 0, "sandboxd 0.0.0"),
        (("--version",), 0, "sandboxctl"),
        (("--help",), 0, "verbs:"),
        (("exec", "--help"), 0, "--interactive"),
    ],
)
def test_the_quiet_verbs_show_what_they_found(ctl: Ctl, arguments: tuple[str, ...], code: int, shows: str) -> None:
    """Each has a text for people."""
    done = ctl(*arguments)
    assert done.returncode == code
    assert shows in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("stats",),
        ("doctor",),
        ("config",),
        ("image", "list"),
        ("image", "build"),
        ("daemon", "status"),
        ("version",),
        ("ls",),
    ],
)
def test_json_is_one_object_and_nothing_else(ctl: Ctl, arguments: tuple[str, ...]) -> None:
    """Whatever else there is to say goes to stderr."""
    [reply] = replies(ctl(*arguments, "--json").stdout)
    assert isinstance(reply, dict)


def test_progress_is_lines_where_nobody_watches(ctl: Ctl) -> None:
    """A log wants each step once and no moving bar."""
    assert ctl("image", "build").stderr == "sandboxctl: copying files\nsandboxctl: importing\n"


def test_an_image_that_is_there_is_said_to_be(ctl: Ctl) -> None:
    """Else one waits for a build that there was none of."""
    done = ctl("image", "build", "--reference", "present")
    assert done.stderr == "sandboxctl: it is there already; to make it anew: sandboxctl image build --force\n"
    assert ctl("image", "build", "--reference", "present", "--json").stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_verb(ctl: Ctl, shell: str) -> None:
    """It is generated from the same parser."""
    script = ctl("completion", shell).stdout
    assert all(verb in script for verb in FAMILIES)
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_knows_the_sandboxes_there_are(ctl: Ctl, tmp_path: Path) -> None:
    """By id and by name, after any verb that takes one; and the shells and commands of the one before."""
    box = ctl("create", "--name", "completed").stdout.strip()
    shell = ctl("session", "open", "completed").stdout.strip()
    command = ctl("exec", "-d", "completed", "sleep", "1000").stdout.strip()
    (tmp_path / "sandboxctl").write_text(f'#!/bin/sh\nexec {" ".join(CTL)} "$@"\n')
    (tmp_path / "sandboxctl").chmod(0o755)
    (tmp_path / "script").write_text(ctl("completion", "bash").stdout)
    presses = """
        . "$0"
        function=$(complete -p sandboxctl | sed 's/.* -F //; s/ .*//')
        for typed in "exec comp" "rm $1" "rm completed $1" "session run completed $2" "logs completed $3"; do
            COMP_WORDS=(sandboxctl $typed) COMP_CWORD=${#COMP_WORDS[@]}
            let COMP_CWORD--
            $function; echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(
        ["bash", "-c", presses, str(tmp_path / "script"), box[:12], shell[:3], command[:3]],
        env={**ctl.env, "PATH": f"{tmp_path}:{ctl.env['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["completed", box, box, shell, command], done.stderr


def test_stats_show_ids_that_can_be_typed(ctl: Ctl, box: str) -> None:
    """Whole, as ``ls`` does: half an id is no name."""
    assert f"\n{box} " in ctl("stats").stdout


# --- without a daemon


def test_status_and_version_do_not_start_a_daemon(tmp_path: Path) -> None:
    """To look is not to start."""
    ctl = Ctl(environment(tmp_path))
    status = ctl("daemon", "status")
    assert (status.returncode, status.stdout.startswith("not running")) == (1, True)
    [reply] = replies(ctl("daemon", "status", "--json").stdout)
    assert reply == {"pid": None, "socket": str(tmp_path / "run" / "sandboxd.sock")}
    assert ctl("version").returncode == 0
    assert ctl("daemon", "stop").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_reload_needs_a_daemon_and_says_what_has_to_wait(tmp_path: Path) -> None:
    """One that is not there reads its settings when it starts."""
    ctl = Ctl(environment(tmp_path))
    assert ctl("daemon", "reload").returncode == 1
    assert list(tmp_path.iterdir()) == []
    with stub_daemon(tmp_path) as env:
        done = Ctl(env)("daemon", "reload")
    assert (done.returncode, done.stdout) == (0, "in force now: defaults.memory\n")
    assert done.stderr == "sandboxctl: in force after a restart: chroma.port\nhint: sandboxctl daemon restart\n"


def test_stop_returns_when_the_daemon_is_gone(tmp_path: Path) -> None:
    """Whoever starts the next one wants the socket free."""
    with stub_daemon(tmp_path) as env:
        ctl = Ctl(env)
        pid = replies(ctl("daemon", "status", "--json").stdout)[0]["pid"]
        assert ctl("daemon", "stop").stdout == "stopped\n"
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        assert ctl("daemon", "status").returncode == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "stopped; 2 sandboxes and 2 warm slots go on\n"),
        (("--drain",), "stopped; 2 warm slots removed; 2 sandboxes go on\n"),
    ],
)
def test_stop_says_what_goes_on_and_drain_leaves_no_slots(tmp_path: Path, flags: tuple[str, ...], told: str) -> None:
    """What is nobody's is not seen in ls, and goes on: it would be left behind by who removes the state directory."""
    with stub_daemon(tmp_path) as env:
        ctl = Ctl(env)
        ctl("create")
        ctl("create", "--template", "pooled")
        done = ctl("daemon", "stop", *flags)
        assert (done.stdout, done.stderr, done.returncode) == (told, "", 0)


HEAVY = {
    "msgspec",
    "psutil",
    "python_on_whales",
    "runtimes",
    "anyio",
    "asyncio",
    "subprocess",
    "shutil",
    "typing",
    "rich",
    "shtab",
    "sandboxd.protocol",
    "sandboxd.failures",
    "importlib.metadata",
}
SHOW_MODULES = """
import sys
from sandboxd.cli.main import main
main()
print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("verb", ["ls", "stats", "exec", "run"])
def test_a_hot_verb_imports_nothing_heavy(ctl: Ctl, box: str, verb: str) -> None:
    """Each of these would cost more than the work itself."""
    arguments = {"exec": ["exec", box, "true"], "run": ["run", "--rm", "true"]}.get(verb, [verb])
    done = subprocess.run(
        [sys.executable, "-S", "-c", SHOW_MODULES, *arguments],
        env=ctl.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not HEAVY & set(done.stderr.split())


WRAPPERS = {
    *("re", "enum", "argparse", "json", "socket", "signal", "selectors", "gettext", "locale", "typing", "functools"),
    *("collections", "importlib", "contextlib", "fcntl", "termios"),
}


def imported(command: tuple[str, ...], env: dict[str, str]) -> set[str]:
    """All modules that a Python process imports."""
    interpreter, *arguments = command
    done = subprocess.run(
        [interpreter, "-X", "importtime", *arguments], env=env, capture_output=True, text=True, check=True
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("flags", [(), ("-i", "-e", "A=b", "-w", "/"), ("--timeout", "9s"), ("-d",), ("-dt",)])
def test_exec_imports_no_more_than_it_needs(ctl: Ctl, box: str, flags: tuple[str, ...]) -> None:
    """Each call of it is a process: what these cost together is more than all the rest, the interpreter included."""
    anyway = imported((sys.executable, "-c", "pass"), ctl.env)
    ours = imported((*CTL, "exec", *flags, box, "true"), ctl.env) - anyway
    assert "sandboxd.cli.execution" in ours
    assert not (WRAPPERS | {"sandboxd.cli.standins", "sandboxd.cli.spooled"}) & ours


# --- lifetimes and events


def test_top_is_a_line_of_json_or_a_table_for_each_look_where_there_is_no_terminal(ctl: Ctl, box: str) -> None:
    """All that the daemon told, for who draws it elsewhere."""
    looks = replies(ctl("top", "--json", "-n", "2", "--interval", "0.1").stdout)
    assert len(looks) == 2
    for look in looks:
        assert {"at_ms", "pools", "services"} <= look.keys()
        assert box in {row["id"] for row in look["sandboxes"]} & {row["id"] for row in look["metrics"]}
        assert look["events"][-1]["kind"] == "removed"
    shown = ctl("top", "-n", "1").stdout
    assert box in shown
    assert "\x1b" not in shown
    assert ctl("top", "--interval", "0").returncode == 2


def test_a_lifetime_is_shown_as_it_was_given(ctl: Ctl, box: str) -> None:
    done = ctl("timeout", box, "10m", "--on-timeout", "pause")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"pause in (9|10)m\n", done.stdout)
    [reply] = replies(ctl("timeout", "--json", box, "10m").stdout)
    assert (reply["lifetime_ms"], reply["on_timeout"]) == (600_000, "kill")


def test_a_timeout_of_nothing_is_a_question(ctl: Ctl, box: str) -> None:
    done = ctl("timeout", box)
    assert (done.returncode, done.stderr) == (2, "sandboxctl: how long?\nhint: sandboxctl timeout --help\n")


def test_events_are_a_line_each_and_say_what_is_missing(ctl: Ctl) -> None:
    done = ctl("events")
    assert done.returncode == 0
    lost, event = done.stdout.splitlines()
    assert lost == "1-6   not kept any longer"
    assert re.fullmatch(r"7   \d\d:\d\d:\d\d   removed   box   reason=old", event)
    lost, event = (json.loads(line) for line in ctl("events", "--json").stdout.splitlines())
    assert (lost["method"], lost["last_seq"]) == ("events/lost", 6)
    assert (event["method"], event["kind"], event["sandbox"]) == ("events/event", "removed", "sb-gone")
