"""``sandbox-shell``, built with sanitizers, around the shells of this host: bash, and the one that is sh."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.init_harness import FOLDER_OF_INIT, load_build_hook

DEADLINE_S = 20


class Ran(NamedTuple):
    """How a text ended."""

    status: int
    stdout: bytes
    stderr: bytes
    cwd: str
    exports: bytes


class Host:
    """A shell, and the process that stands for init's keeper above it."""

    def __init__(self, program: Path, shell: str) -> None:
        self._program = program
        script = f"setsid {program} open {shell} & echo $!; wait $!; exit $?"
        self.keeper = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
        assert self.keeper.stdout is not None
        self.pid = int(self.keeper.stdout.readline())

    def run(self, text: str, *orders: signal.Signals, patience_s: float = 0.4) -> Ran:
        """Let it evaluate a text; each order is given if the one before did not end it in time."""
        ours, theirs = socket.socketpair()
        with ours, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            with theirs:
                argv = [self._program, "run", str(self.pid)]
                run = subprocess.Popen(argv, stdin=theirs, stdout=stdout, stderr=stderr, start_new_session=True)
            with contextlib.suppress(ConnectionError):
                ours.sendall(text.encode())
                ours.shutdown(socket.SHUT_WR)
            for order in orders:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(patience_s)
                    break
                run.send_signal(order)
            status = run.wait(DEADLINE_S)
            ours.setblocking(False)
            left = b""
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while data := ours.recv(1 << 20):
                    left += data
            (length,) = struct.unpack("=I", left[:4]) if left else (0,)
            outputs = []
            for file in (stdout, stderr):
                file.seek(0)
                outputs.append(file.read())
        return Ran(status, *outputs, left[4 : 4 + length].decode(), left[4 + length :])

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.keeper.wait(DEADLINE_S)
        assert self.keeper.stdout is not None
        self.keeper.stdout.close()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program under test."""
    output = tmp_path_factory.mktemp("shell") / "sandbox-shell"
    load_build_hook().compile_init(output, sources=(FOLDER_OF_INIT / "shell.c",), sanitize=True)
    return output


@pytest.fixture(params=["bash", "sh", "busybox"])
def host(request: pytest.FixtureRequest, program: Path, tmp_path: Path) -> Iterator[Host]:
    """Each shell in turn."""
    found = shutil.which(request.param)
    if found is None:
        pytest.fail(f"{request.param} is not installed: run hack/engines")
    shell = tmp_path / "sh"
    if request.param == "busybox":
        shell.symlink_to(found)
    host = Host(program, str(shell) if shell.exists() else found)
    yield host
    host.close()


def test_the_state_of_a_shell_stays_and_is_handed_out(host: Host) -> None:
    """Directory and exports come with each end, for the day on which the shell is lost."""
    ran = host.run("cd /usr && export A='a b'; B=2; f() { echo \"f $1\"; }; alias g='echo g'")
    assert (ran.status, ran.cwd) == (0, "/usr")
    assert b" A=" in ran.exports
    assert b" B=" not in ran.exports
    assert host.run("echo $A $B; f x\ng").stdout == b"a b 2\nf x\ng\n"


def test_errors_that_end_other_shells_do_not_end_this_one(host: Host) -> None:
    """Of syntax, of expansion, of built-in commands."""
    host.run("mark=kept")
    for text in ("if true; then", "echo 'unclosed", "set -u; echo $nope", "echo ${nope?}", "readonly R=1; R=2"):
        assert host.run(text).status not in (0, -signal.SIGABRT)
        assert host.run("set +u; echo $mark").stdout == b"kept\n"


def test_a_text_cannot_end_itself_by_what_it_writes(host: Host) -> None:
    """What it says, and what it does to its descriptors, is no report."""
    assert host.run("echo 0 $$; exec 1>&-; exec 2>&-; (exit 5)").status == 5
    assert host.run("set; printf '\\000'; exit_code=0; (exit 6)").status == 6


def test_each_order_ends_more_and_the_shell_stays(host: Host) -> None:
    """INT is for the text, TERM and KILL are for what began with it; an earlier job stays."""
    host.run("mark=kept; sleep 1000 & job=$!")
    orders = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    for text in ("sleep 1000", "while :; do :; done", "sh -c 'trap \"\" INT TERM; while :; do sleep 1000; done'"):
        assert host.run(f"echo begun; {text}", *orders).stdout == b"begun\n"
        ran = host.run("echo $mark; kill -0 $job && echo lives")
        assert ran.stdout == b"kept\nlives\n"
    host.run("kill $job")


def test_an_interrupt_of_its_own_does_not_fall_on_the_next_text(host: Host) -> None:
    """Some shells take a signal only with the next line, and drop the line."""
    assert host.run("echo before; kill -INT $$; echo after", signal.SIGINT).stdout == b"before\n"
    for number in range(5):
        assert host.run(f"echo {number}").stdout == f"{number}\n".encode()


def test_a_text_that_interrupts_its_own_shell_ends_by_itself(host: Host) -> None:
    """Nobody has to wait for its timeout; and a text that takes its time is not taken for one."""
    ran = host.run("echo before; kill -INT $$; echo after")
    assert (ran.status, ran.stdout) == (128 + signal.SIGINT, b"before\n")
    for number in range(3):
        ran = host.run(f"sleep 0.6; cd /usr; echo {number}; (exit {number})")
        assert (ran.status, ran.stdout, ran.cwd) == (number, f"{number}\n".encode(), "/usr")


def test_the_end_of_the_shell_is_no_status(host: Host) -> None:
    """It is said by the end of the host, which has the shell's code."""
    assert host.run("echo out; exit 3") == Ran(-signal.SIGABRT, b"out\n", b"", "", b"")
    assert host.keeper.wait(DEADLINE_S) == 3
    assert host.run("true").status == -signal.SIGABRT


def test_exports_without_end_cost_only_themselves(host: Host) -> None:
    """A report that is too long has its status all the same."""
    ran = host.run("export LONG=$(head -c 100000 /dev/zero | tr '\\0' x); cd /usr; false")
    assert (ran.status, ran.cwd, ran.exports) == (1, "/usr", b"")
    assert host.run("unset LONG; (exit 9)").status == 9
