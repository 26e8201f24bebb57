"""Whatever a command became, and however it is ended: nothing of it is left, on each engine.

A process that got away would hold the sandbox's memory, pids and files for as long as the sandbox lives, and nobody
would know of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import pytest

from tests.engine import kernel
from tests.engine.conftest import Box
from tests.engine.daemons import Daemon, wait_until

pytestmark = pytest.mark.engine

LIMITS = {"memory": "64m", "pids": 60}
"""Enough for each shape; a storm fills it."""

STORM_PROCESSES_MIN = 50

TIMEOUTS_MS = (500, 2_000, 8_000, 30_000)
"""A host that is so busy that the shape does not stand before the first has passed gets the next."""

SLEEP = "sleep 1000"


class Shape(NamedTuple):
    """What a command becomes."""

    script: str
    processes: int
    """How many there are, at least, once it stands."""
    stopped: bool = False
    """Each of them has stopped itself by then."""


SHAPES = {
    "plain": Shape(f"exec {SLEEP}", 1),
    "child": Shape(f"{SLEEP} & wait", 2),
    "grandchild": Shape(f"sh -c '{SLEEP} & wait' & wait", 3),
    "setsid": Shape(f"setsid {SLEEP} & wait", 2),
    "double fork": Shape(f"(setsid sh -c '{SLEEP} & wait' &); exec {SLEEP}", 3),
    "TERM ignored": Shape(f"trap '' TERM HUP INT; setsid {SLEEP} & while :; do {SLEEP}; done", 3),
    "stopped": Shape("sh -c 'kill -STOP $$' & kill -STOP $$", 2, stopped=True),
    "fork storm": Shape('exec awk "$STORM"', STORM_PROCESSES_MIN),
}

STORM = r"""BEGIN { while (1) system("setsid awk \"$STORM\" &") }"""
"""Starts itself for ever, each in a session of its own. None of them ends because it cannot fork: it tries again."""


def others(box: Box) -> list[psutil.Process]:
    """What runs in the sandbox besides its init, identified for good: a pid may be used again."""
    found = []
    for pid in kernel.processes(box["pid"]):
        if pid != box["pid"]:
            try:
                found.append(psutil.Process(pid))
            except psutil.NoSuchProcess:
                continue
    return found


def commands_of(box: Box) -> list[psutil.Process]:
    """The same, without the keepers: one of ours goes a moment after it has told that nothing is left below it."""
    found = []
    for process in others(box):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() != "sandbox-keeper":
                found.append(process)
    return found


def stands(box: Box, shape: Shape) -> list[psutil.Process]:
    """The command's keeper and its processes, if the shape is what it is to become; else nothing."""
    tree = others(box)
    if len(tree) <= shape.processes:
        return []
    try:
        stopped = [process for process in tree if process.status() == psutil.STATUS_STOPPED]
    except psutil.NoSuchProcess:
        return []
    return tree if len(stopped) >= shape.processes * shape.stopped else []


def params_of(box: Box, shape: Shape) -> dict[str, Any]:
    return {"sandbox": box["id"], "argv": ["sh", "-c", shape.script], "env": {"STORM": STORM}}


def by_timeout(daemon: Daemon, box: Box, shape: Shape) -> list[psutil.Process]:
    for timeout_ms in TIMEOUTS_MS:
        times = {"timeout": f"{timeout_ms}ms", "grace": "100ms"}
        started = daemon.call("commands/start", **params_of(box, shape), **times)
        ref = {"sandbox": box["id"], "command_id": started["command_id"]}

        def over(ref: dict[str, Any] = ref) -> bool:
            rows = daemon.call("commands/list", sandbox=ref["sandbox"])["commands"]
            return all(row["end"] is not None for row in rows if row["command_id"] == ref["command_id"])

        tree = wait_until(lambda over=over: stands(box, shape) or over(), "the shape stood, or its time was over")
        assert daemon.call("commands/wait", **ref)["status"] == "timeout"
        wait_until(lambda: not others(box), "nothing of the command was left")
        if isinstance(tree, list):
            return tree
    pytest.fail("it never stood")


def by_kill(daemon: Daemon, box: Box, shape: Shape) -> list[psutil.Process]:
    started = daemon.call("commands/start", **params_of(box, shape))
    tree: list[psutil.Process] = wait_until(lambda: stands(box, shape), "the shape stood")
    end = daemon.call("commands/kill", sandbox=box["id"], command_id=started["command_id"])
    assert end["status"] == "killed"
    assert commands_of(box) == [], "a kill returns when nothing is left"
    return tree


def by_going_away(daemon: Daemon, box: Box, shape: Shape) -> list[psutil.Process]:
    with daemon.connect() as connection:
        connection.send("commands/run", params_of(box, shape))
        tree: list[psutil.Process] = wait_until(lambda: stands(box, shape), "the shape stood")
    wait_until(lambda: not others(box), "nothing of the command was left")
    return tree


ENDINGS: dict[str, Callable[[Daemon, Box, Shape], list[psutil.Process]]] = {
    "timeout": by_timeout,
    "kill": by_kill,
    "client gone": by_going_away,
}


@pytest.fixture(scope="module")
def box(daemon: Daemon, engine: str) -> Any:
    """One sandbox for all of them: what one leaves behind, the next would find."""
    with daemon.box(engine, limits=LIMITS) as box:
        yield box


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_left_of_a_command(daemon: Daemon, box: Box, shape: str, ending: str) -> None:
    tree = ENDINGS[ending](daemon, box, SHAPES[shape])
    wait_until(lambda: not any(process.is_running() for process in tree), "the keeper went too")
    assert daemon.run(box, "true").end["status"] == "ok", "the sandbox is as good as before"

    def states() -> set[str]:
        return {row["state"] for row in daemon.call("commands/list", sandbox=box["id"])["commands"]}

    wait_until(lambda: states() <= {"ended"}, "nothing of any command was left")
    wait_until(lambda: not others(box), "no keeper was left")


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_left_of_a_command_whose_sandbox_is_removed(daemon: Daemon, engine: str, shape: str) -> None:
    with daemon.box(engine, limits=LIMITS) as box:
        daemon.call("commands/start", **params_of(box, SHAPES[shape]))
        tree = wait_until(lambda: stands(box, SHAPES[shape]), "the shape stood")
        init = psutil.Process(box["pid"])
        daemon.remove(box)
        assert [process for process in (init, *tree) if process.is_running()] == []
        assert kernel.processes(box["pid"]) == []
