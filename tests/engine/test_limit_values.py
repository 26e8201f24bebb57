"""What cannot be meant as a limit is refused, says what can, and makes nothing, on each engine."""

from __future__ import annotations

import os

import pytest

from tests.engine.daemons import Daemon

pytestmark = pytest.mark.engine

NONSENSE = ("banana", "-3", "0", "1e99", "nan", "", "0x10", "64q")


def _too_much() -> dict[str, str]:
    """For each limit more than this host has."""
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/sys/kernel/pid_max", encoding="ascii") as file:
        pid_max = int(file.read())
    cpus = os.sysconf("SC_NPROCESSORS_CONF")
    return {
        "memory": str(2 * host_bytes),
        "cpus": str(cpus + 1),
        "pids": str(pid_max + 1),
        "cpuset": str(cpus),
        "shm": str(2 * host_bytes),
        "tmp": str(2 * host_bytes),
        "nofile": "999999999",
    }


TOO_MUCH = _too_much()


def bad_values(limit: str) -> list[str]:
    """CPU 0 is one that every host has; of all else nothing is zero."""
    return [value for value in (*NONSENSE, TOO_MUCH[limit]) if (limit, value) != ("cpuset", "0")]


def there_is(daemon: Daemon, engine: str) -> tuple[list[str], list[str], list[str]]:
    """All that a create would add to."""
    return [row["id"] for row in daemon.sandboxes()], daemon.containers(engine), daemon.boxes_left()


@pytest.mark.parametrize("limit", TOO_MUCH)
def test_a_value_that_cannot_be_meant_is_refused_and_nothing_is_made(daemon: Daemon, engine: str, limit: str) -> None:
    """A limit that is misread is worse than one that is refused."""
    before = there_is(daemon, engine)
    for value in bad_values(limit):
        refusal = daemon.refusal("sandbox/create", engine=engine, limits={limit: value})
        assert (refusal.type, refusal.code) == ("invalid_argument", -32602), (value, refusal)
        assert f"--{limit}" in refusal.brief, value
        assert "give " in refusal.brief, value
    assert there_is(daemon, engine) == before


@pytest.mark.parametrize("limit", TOO_MUCH)
def test_on_the_command_line_it_is_exit_code_2_and_one_line(daemon: Daemon, engine: str, limit: str) -> None:
    before = there_is(daemon, engine)
    for value in bad_values(limit):
        done = daemon.ctl("create", "--engine", engine, f"--{limit}={value}")
        assert done.returncode == 2, (value, done)
        assert done.stdout == b""
        (line,) = done.stderr.decode().splitlines()
        assert f"--{limit}: give " in line, line
    assert there_is(daemon, engine) == before


@pytest.mark.parametrize("value", [-3, 0, 1e99, 0.0001, True, [], {}], ids=repr)
def test_numbers_that_cannot_be_meant_are_refused_as_texts_are(daemon: Daemon, engine: str, value: object) -> None:
    """An editor sends numbers; a JSON number has ways of its own to be wrong."""
    before = there_is(daemon, engine)
    for limit in ("memory", "cpus", "pids"):
        refusal = daemon.refusal("sandbox/create", engine=engine, limits={limit: value})
        assert (refusal.type, refusal.code) == ("invalid_argument", -32602), (limit, refusal)
    assert there_is(daemon, engine) == before


def test_a_limit_that_nobody_knows_is_refused(daemon: Daemon, engine: str) -> None:
    """A misspelt limit must not become no limit."""
    before = there_is(daemon, engine)
    refusal = daemon.refusal("sandbox/create", engine=engine, limits={"memroy": "64m"})
    assert refusal.type == "invalid_argument"
    assert daemon.ctl("create", "--engine", engine, "--memroy=64m").returncode == 2
    assert there_is(daemon, engine) == before


def test_a_run_with_a_bad_value_is_exit_code_2_and_runs_nothing(daemon: Daemon, engine: str) -> None:
    done = daemon.ctl("run", "--rm", "--engine", engine, "--memory=banana", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, b"")
    assert len(done.stderr.splitlines()) == 1
