"""Commands in a sandbox over the socket: what goes in, what comes out, how they end, on each engine."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import RpcError
from tests.engine import kernel
from tests.engine.conftest import Box
from tests.engine.daemons import PATIENCE_S, Daemon, wait_until

pytestmark = pytest.mark.engine

EVERY_BYTE = bytes(range(256)) * 16
LARGE_BYTES = 64 * 1024 * 1024
MANY = 50

ESCAPES = """
    trap '' TERM
    (setsid sh -c 'trap "" TERM; sleep 1001') &
    (sh -c 'trap "" TERM HUP; sleep 1002' &) &
    sleep 1003 &
    while true; do sleep 1004; done
"""
"""A tree that does not mean to go: deaf to TERM, in sessions of its own, children of nobody."""
ESCAPED_PROCESSES_MIN = 6


def nothing_runs(box: Box) -> bool:
    return kernel.processes(box["pid"]) == [box["pid"]]


def start(daemon: Daemon, box: Box, *argv: str, **params: Any) -> dict[str, Any]:
    """A command in the background; what names it."""
    started = daemon.call("commands/start", sandbox=box["id"], argv=list(argv), **params)
    return {"sandbox": box["id"], "command_id": started["command_id"]}


@pytest.mark.parametrize("code", [0, 1, 7, 137, 255])
def test_an_exit_code_is_an_outcome(daemon: Daemon, box: Box, code: int) -> None:
    end = daemon.run(box, "sh", "-c", f"exit {code}").end
    assert (end["exit_code"], end["signal"]) == (code, None)
    assert end["status"] == ("ok" if code == 0 else "nonzero")


@pytest.mark.parametrize(
    ("argv", "errno_name"),
    [
        (["no-such-program"], "ENOENT"),
        (["/no/such/program"], "ENOENT"),
        (["/etc/passwd"], "EACCES"),
        (["/workspace"], "EACCES"),
    ],
)
def test_what_cannot_be_executed_is_an_error_with_the_kernels_reason(
    daemon: Daemon, box: Box, argv: list[str], errno_name: str
) -> None:
    """An error and no exit code: 127 may also be what a command itself says."""
    refusal = daemon.refusal("commands/run", sandbox=box["id"], argv=argv)
    assert refusal.type == "command_not_started"
    assert refusal.detail.startswith(errno_name)


def test_stdout_and_stderr_stay_apart(daemon: Daemon, box: Box) -> None:
    ran = daemon.run(box, "sh", "-c", "echo out; echo err >&2; echo out again")
    assert (ran.stdout, ran.stderr) == (b"out\nout again\n", b"err\n")


def test_every_byte_passes_as_it_is(daemon: Daemon, box: Box) -> None:
    assert daemon.run(box, "cat", stdin=EVERY_BYTE).stdout == EVERY_BYTE


def test_a_large_stream_passes_through_pipes_unchanged(daemon: Daemon, box: Box) -> None:
    """The command writes to the caller's own pipe: nothing is kept, cut or re-framed on the way."""
    data = os.urandom(1024 * 1024)
    (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()

    def feed() -> None:
        with os.fdopen(in_write, "wb") as file:
            for _ in range(LARGE_BYTES // len(data)):
                file.write(data)

    feeder = threading.Thread(target=feed)
    fields = {"sandbox": box["id"], "argv": ["cat"], "stdio": "descriptors"}
    with daemon.connect() as connection, os.fdopen(out_read, "rb") as out:
        request = connection.send("commands/run", fields, (in_read, out_write, out_write))
        os.close(in_read)
        os.close(out_write)
        feeder.start()
        received = hashlib.file_digest(out, "sha256")
        feeder.join()
        end = connection.wait(request, timeout_s=PATIENCE_S)
    expected = hashlib.sha256()
    for _ in range(LARGE_BYTES // len(data)):
        expected.update(data)
    assert received.digest() == expected.digest()
    assert end["exit_code"] == 0


def test_a_command_without_stdio_reads_nothing_and_shows_nothing(daemon: Daemon, box: Box) -> None:
    end = daemon.call("commands/run", sandbox=box["id"], argv=["sh", "-c", "cat; echo lost"])
    assert end["status"] == "ok"


def test_variables_are_taken_literally(daemon: Daemon, box: Box) -> None:
    env = {"PLAIN": "1", "SPACED": "a b  c", "QUOTED": '"$HOME" `id` \'', "LINES": "a\nb", "EMPTY": "", "Ä": "é=ü"}
    said = daemon.run(box, "env", "-0", env=env).stdout.decode()
    inside = dict(entry.partition("=")[::2] for entry in said.split("\0") if entry)
    assert inside.items() >= env.items()
    assert inside["HOME"] == "/home/sandbox"


@pytest.mark.parametrize("name", ["", "A=B", "A\0B"])
def test_a_variable_that_cannot_be_one_is_refused(daemon: Daemon, box: Box, name: str) -> None:
    refusal = daemon.refusal("commands/run", sandbox=box["id"], argv=["true"], env={name: "1"})
    assert refusal.type == "invalid_argument"


def test_the_variables_of_a_sandbox_reach_every_command(daemon: Daemon, engine: str) -> None:
    with daemon.box(engine, env={"OF_BOX": "1", "OVERRIDDEN": "no"}) as box:
        said = daemon.sh(box, "echo $OF_BOX $OVERRIDDEN", env={"OVERRIDDEN": "yes"})
        assert said == "1 yes\n"


def test_a_command_starts_in_the_project_or_where_it_is_told(
    daemon: Daemon, engine: str, box: Box, project: Path
) -> None:
    (project / "below").mkdir()
    with daemon.box(engine, workspace={"path": str(project)}) as with_project:
        for cwd, expected in ((None, "/workspace"), ("below", "/workspace/below"), ("/tmp", "/tmp")):
            fields = {} if cwd is None else {"cwd": cwd}
            assert daemon.run(with_project, "pwd", **fields).stdout.decode() == f"{expected}\n"
        refusal = daemon.refusal("commands/run", sandbox=with_project["id"], argv=["pwd"], cwd="nowhere")
    assert (refusal.type, refusal.brief) == ("command_not_started", "cannot enter '/workspace/nowhere'")
    assert daemon.run(box, "pwd").stdout == b"/workspace\n", (
        "without a project it is empty, and goes with the sandbox"
    )


@pytest.mark.parametrize("grace", [0, "200ms"])
def test_a_timeout_ends_the_whole_tree_whatever_it_does(daemon: Daemon, box: Box, grace: object) -> None:
    end = daemon.run(box, "sh", "-c", ESCAPES, timeout="500ms", grace=grace).end
    assert end["status"] == "timeout"
    wait_until(lambda: nothing_runs(box), "nothing of the command was left")


def test_a_timeout_lets_a_command_tidy_up(daemon: Daemon, box: Box) -> None:
    ran = daemon.run(box, "sh", "-c", "trap 'echo tidy; exit 3' TERM; sleep 1000 & wait", timeout="200ms", grace=30)
    assert ran.stdout == b"tidy\n"
    assert (ran.end["status"], ran.end["exit_code"]) == ("timeout", 3)


def test_a_client_that_goes_away_takes_its_command_along(daemon: Daemon, box: Box) -> None:
    """Nobody is left to read what it says, or to end it."""
    with daemon.connect() as connection:
        connection.send("commands/run", {"sandbox": box["id"], "argv": ["sh", "-c", ESCAPES]})
        wait_until(lambda: len(kernel.processes(box["pid"])) > ESCAPED_PROCESSES_MIN, "the tree stood")
    wait_until(lambda: nothing_runs(box), "nothing of the command was left")


def test_a_cancelled_request_ends_its_command(daemon: Daemon, box: Box) -> None:
    with daemon.connect() as connection:
        request = connection.send("commands/run", {"sandbox": box["id"], "argv": ["sh", "-c", ESCAPES]})
        wait_until(lambda: len(kernel.processes(box["pid"])) > ESCAPED_PROCESSES_MIN, "the tree stood")
        connection.cancel(request)
        with pytest.raises(RpcError) as caught:
            connection.wait(request, timeout_s=PATIENCE_S)
    assert caught.value.code == -32800
    wait_until(lambda: nothing_runs(box), "nothing of the command was left")


def test_a_command_can_be_told_to_outlive_its_client(daemon: Daemon, box: Box) -> None:
    argv = ["sh", "-c", "sleep 1000"]
    with daemon.connect() as connection:
        connection.send("commands/run", {"sandbox": box["id"], "argv": argv, "on_disconnect": "keep"})
        wait_until(lambda: not nothing_runs(box), "the command ran")
    (row,) = (row for row in _rows(daemon, box) if row["state"] == "running")
    daemon.call("commands/kill", sandbox=box["id"], command_id=row["command_id"])
    assert row["argv"] == argv


def _rows(daemon: Daemon, box: Box) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = daemon.call("commands/list", sandbox=box["id"])["commands"]
    return rows


def test_a_command_in_the_background_is_listed_signalled_and_waited_for(daemon: Daemon, box: Box) -> None:
    reference = start(daemon, box, "sh", "-c", "trap 'exit 5' USR1; echo > /tmp/up; sleep 1000 & wait")
    (row,) = (row for row in _rows(daemon, box) if row["command_id"] == reference["command_id"])
    assert (row["state"], row["end"], row["argv"][0]) == ("running", None, "sh")
    wait_until(lambda: daemon.run(box, "rm", "/tmp/up").end["exit_code"] == 0, "the trap was set")
    daemon.call("commands/signal", **reference, signal=10, scope="process")
    end = daemon.call("commands/wait", **reference)
    assert (end["exit_code"], end["status"]) == (5, "nonzero")
    assert daemon.call("commands/wait", **reference) == end, "an end can be asked for again"
    daemon.call("commands/kill", **reference)
    wait_until(lambda: nothing_runs(box), "what it had left behind was gone")


def test_what_a_command_leaves_behind_is_known_and_can_be_killed(daemon: Daemon, box: Box) -> None:
    reference = start(daemon, box, "sh", "-c", "(setsid sleep 1000 &)")
    assert daemon.call("commands/wait", **reference)["status"] == "ok"
    (row,) = (row for row in _rows(daemon, box) if row["command_id"] == reference["command_id"])
    assert row["state"] == "lingering"
    daemon.call("commands/kill", **reference)
    assert nothing_runs(box)


def test_a_kill_returns_when_nothing_is_left(daemon: Daemon, box: Box) -> None:
    reference = start(daemon, box, "sh", "-c", ESCAPES)
    wait_until(lambda: len(kernel.processes(box["pid"])) > ESCAPED_PROCESSES_MIN, "the tree stood")
    assert daemon.call("commands/kill", **reference)["status"] == "killed"
    assert nothing_runs(box)


def test_a_command_that_never_was_is_not_found(daemon: Daemon, box: Box) -> None:
    refusal = daemon.refusal("commands/wait", sandbox=box["id"], command_id="0123456789ab")
    assert refusal.type == "not_found"


def test_the_verdict_tells_137_from_137(daemon: Daemon, box: Box) -> None:
    """Four ways to the same number. The kernel's counter tells them apart, and not a guess from the number."""
    out_of_memory = daemon.run(box, "tail", "/dev/zero").end
    assert (out_of_memory["status"], out_of_memory["signal"]) == ("oom", 9)
    assert out_of_memory["oom_kills"] >= 1

    own_doing = daemon.run(box, "sh", "-c", "kill -9 $$").end
    assert (own_doing["status"], own_doing["signal"], own_doing["oom_kills"]) == ("signaled", 9, 0)

    said_so = daemon.run(box, "sh", "-c", "exit 137").end
    assert (said_so["status"], said_so["exit_code"]) == ("nonzero", 137)

    reference = start(daemon, box, "sleep", "1000")
    assert daemon.call("commands/kill", **reference)["status"] == "killed"

    too_long = daemon.run(box, "sleep", "1000", timeout="100ms", grace=0).end
    assert (too_long["status"], too_long["signal"]) == ("timeout", 9)


def test_an_oom_in_a_child_is_told_by_the_command_that_failed_for_it(daemon: Daemon, box: Box) -> None:
    end = daemon.run(box, "sh", "-c", "tail /dev/zero; exit 3").end
    assert (end["status"], end["exit_code"]) == ("oom", 3)


def test_an_end_says_what_it_cost(daemon: Daemon, box: Box) -> None:
    end = daemon.run(box, "sh", "-c", "n=0; while [ $n -lt 20000 ]; do n=$((n + 1)); done").end
    assert end["cpu_ms"] > 0
    assert end["wall_ms"] > 0
    assert end["memory_bytes_peak"] > 100_000
    assert end["timings_ms"]["total"] >= end["timings_ms"]["command"]


def test_another_user_is_possible_and_gains_no_capability(daemon: Daemon, box: Box) -> None:
    ran = daemon.run(box, "sh", "-c", "id -u; cat; grep CapEff /proc/self/status; exit 9", stdin=b"in\n", user="0")
    assert ran.stdout == b"0\nin\nCapEff:\t0000000000000000\n"
    assert (ran.end["exit_code"], ran.end["status"]) == (9, "nonzero")


def test_fifty_commands_at_once_do_not_mix(daemon: Daemon, box: Box) -> None:
    script = "read line; echo $line; exit $line"
    outcomes: dict[int, Any] = {}

    def one(number: int) -> None:
        ran = daemon.run(box, "sh", "-c", script, stdin=f"{number}\n".encode())
        outcomes[number] = (ran.end["exit_code"], ran.stdout)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(MANY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {number: (number, f"{number}\n".encode()) for number in range(MANY)}
    wait_until(lambda: nothing_runs(box), "all of them were gone")


def test_the_daemon_keeps_no_descriptor_of_a_command_that_ended(daemon: Daemon, box: Box) -> None:
    """A daemon that runs for months would run out of them."""

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{daemon.pid}/fd"))

    daemon.run(box, "true")
    before = descriptors()
    for _ in range(20):
        for _ in range(9):
            daemon.run(box, "true")
        with pytest.raises(RpcError):
            daemon.run(box, "no-such-program")
    wait_until(lambda: descriptors() <= before, f"the daemon was back at {before} descriptors")


def test_a_command_that_a_full_sandbox_cannot_start_says_so(daemon: Daemon, engine: str) -> None:
    """``fork: Resource temporarily unavailable`` from nowhere is a riddle.

    Ten processes are init, the keeper of one command, its shell, and seven more.
    """
    with daemon.box(engine, limits={"pids": 10}) as box:
        reference = start(daemon, box, "sh", "-c", "for n in $(seq 1 7); do sleep 1000 & done; wait")
        wait_until(lambda: len(kernel.processes(box["pid"])) == 10, "the sandbox was full")
        refusal = daemon.refusal("commands/run", sandbox=box["id"], argv=["true"])
        assert refusal.type == "capacity_exceeded"
        daemon.call("commands/kill", **reference)
        assert daemon.run(box, "true").end["status"] == "ok"


@pytest.mark.parametrize("what", ["directory", "file", "terminal"])
def test_a_descriptor_that_grants_more_than_a_stream_is_refused(
    daemon: Daemon, box: Box, what: str, tmp_path: Path
) -> None:
    """A directory leads out of the sandbox, a file can be opened anew with other rights, a terminal listens later."""
    master, terminal = os.openpty()
    (tmp_path / "file").write_text("x")
    path = {"directory": tmp_path, "file": tmp_path / "file", "terminal": Path(os.ttyname(terminal))}[what]
    handed = os.open(path, os.O_RDONLY | os.O_NOCTTY)
    null = os.open(os.devnull, os.O_RDWR)
    try:
        params = {"sandbox": box["id"], "argv": ["cat"], "stdio": "descriptors"}
        with daemon.connect() as connection, pytest.raises(RpcError) as refusal:
            connection.call("commands/run", params, (handed, null, null), timeout_s=PATIENCE_S)
        assert refusal.value.type == "invalid_argument"
    finally:
        for descriptor in (master, terminal, handed, null):
            os.close(descriptor)
