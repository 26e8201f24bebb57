"""The daemon is started when it is needed, once, and says why if it cannot."""

import json
import os
import select
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.sandboxctl import PATIENCE_S, STUB, Ctl, environment

WITH_STUB = """
import sys
from sandboxd.client import starting
from sandboxd.cli.main import main
starting.COMMAND = (sys.executable, {stub!r}, *{flags!r})
sys.exit(main())
"""


def start(
    directory: Path, *arguments: str, flags: tuple[str, ...] = (), stderr: int = subprocess.PIPE
) -> "subprocess.Popen[str]":
    script = WITH_STUB.format(stub=str(STUB), flags=flags)
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=environment(directory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    Ctl(environment(tmp_path))("daemon", "stop")


def test_the_first_call_starts_the_daemon(directory: Path) -> None:
    """Nobody should have to set anything up to try it."""
    with start(directory, "ls", "-q") as process:
        assert process.communicate(timeout=PATIENCE_S) == ("", "")
        assert process.returncode == 0
    assert Ctl(environment(directory))("daemon", "status").returncode == 0


def test_the_daemon_does_not_hold_the_callers_descriptors(directory: Path) -> None:
    """A pipeline ends when the command ends, not when the daemon does; and its session is its own."""
    with start(directory, "ls") as process:
        assert process.stdout is not None
        process.stdout.read()
    pid = int(Ctl(environment(directory))("daemon", "status").stdout.split()[2].rstrip(","))
    links = [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
    log = directory / "state" / "daemon.log"
    assert [str(link) for link in links[:3]] == ["/dev/null", str(log), str(log)]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_many_first_calls_at_once_all_succeed(directory: Path) -> None:
    """An agent's tools start in parallel."""
    processes = [start(directory, "daemon", "start", "--json") for _ in range(5)]
    outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * 5
    assert len({output for output, _ in outputs}) == 1


def test_a_daemon_that_is_starting_elsewhere_is_waited_for(directory: Path) -> None:
    """Somebody's service manager may be at it at the same moment."""
    with start(directory, "ls") as first:
        first.communicate(timeout=PATIENCE_S)
    (directory / "run" / "sandboxd.sock").rename(directory / "run" / "aside")
    with start(directory, "ls", "-q") as second:
        log = directory / "state" / "start.lock"
        assert log.exists()
        (directory / "run" / "aside").rename(directory / "run" / "sandboxd.sock")
        assert second.communicate(timeout=PATIENCE_S) == ("", "")
        assert second.returncode == 0


def test_who_watches_is_told_that_the_daemon_is_started_where_that_takes_long(directory: Path) -> None:
    """An engine that is slow to answer costs seconds, in which nothing else is to be seen."""
    fifo = directory / "late"
    os.mkfifo(fifo)
    master, slave = os.openpty()
    with start(directory, "ls", "-q", flags=("--late", str(fifo)), stderr=slave) as process:
        assert select.select([master], [], [], PATIENCE_S)[0]
        assert os.read(master, 4096).decode() == "sandboxctl: starting the daemon…\r\n"
        fifo.write_bytes(b"")
        assert process.communicate(timeout=PATIENCE_S)[0] == ""
        assert process.returncode == 0
    os.close(slave)
    os.close(master)


def test_a_daemon_that_cannot_start_says_why(directory: Path) -> None:
    """Its typed error travels, with the exit code that belongs to it."""
    with start(directory, "ls", flags=("--broken",)) as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3
    assert stderr == "sandboxctl: cannot find an engine: none\nhint: get one\n"


def test_a_daemon_that_dies_without_a_word_is_quoted_from_its_log(directory: Path) -> None:
    """The last line of a traceback is usually the one that matters."""
    with start(directory, "ls", flags=("--silent",)) as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert stderr == f"sandboxctl: cannot start the daemon: it hurts\nhint: see {directory}/state/daemon.log\n"


def test_a_state_directory_that_cannot_be_made_is_an_error_in_words(directory: Path) -> None:
    """Read-only homes exist."""
    (directory / "state").write_text("a file")
    with start(directory, "ls") as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "SANDBOXD_STATE_DIR" in stderr


def test_restart_is_another_daemon(directory: Path) -> None:
    """And the old one is gone by then, or it would have answered."""
    pids = []
    for action in ("start", "restart"):
        with start(directory, "daemon", action, "--json") as process:
            pids.append(json.loads(process.communicate(timeout=PATIENCE_S)[0])["pid"])
        assert process.returncode == 0
    assert pids[0] != pids[1]
