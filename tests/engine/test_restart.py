"""A daemon that starts where many sandboxes are: all of them are there at once, on each engine.

    pytest tests/engine/test_restart.py --soak

does it with a hundred, and then the figures that were promised must hold; without it there are a few, and what must
hold on any host: the engines are asked no more often the more sandboxes there are.
"""

from __future__ import annotations

import base64
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandboxd.client import Message, RpcError
from tests.engine.daemons import PATIENCE_S, Daemon, running

pytestmark = pytest.mark.engine

FEW, MANY, MANY_SOAK = 2, 6, 100
CREATED_AT_ONCE = 3

READY_S_MAX = 1.0
STATS_S_MAX = 0.020
RSS_BYTES_MAX = 80 * 1024 * 1024
IDLE_CPU_SHARE_MAX = 0.01
IDLE_S = 10.0
SETTLED_S = 10.0
"""After a start, until all that it looks at once more has been looked at."""
RESTARTS = 5

LINES = 200
"""What the followed command writes before the restart, and once more after it."""

COUNTING = r"""
count() { i=$1; while [ $i -lt $2 ]; do echo line-$i; i=$((i + 1)); done; }
count 0 LINES
while [ ! -e /tmp/go ]; do sleep 0.01; done
count LINES $((LINES * 2))
""".replace("LINES", str(LINES))

PROGRAM = """#!/bin/sh
echo "$1 $2" >> {calls}
exec {program} "$@"
"""


class Counted:
    """A daemon whose calls of the engines are counted."""

    def __init__(self, directory: Path) -> None:
        self._calls = directory / "calls"
        programs = directory / "programs"
        programs.mkdir()
        for engine in ("podman", "docker"):
            (programs / engine).write_text(PROGRAM.format(calls=self._calls, program=shutil.which(engine)))
            (programs / engine).chmod(0o755)
        self.daemon = Daemon(directory / "own", env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"})

    def restart(self) -> tuple[float, list[str]]:
        """Kill it, and start it again; how long that took until it was ready, and what the engines were asked for."""
        self.daemon.kill()
        self._calls.write_text("")
        began_s = time.perf_counter()
        self.daemon.start()
        took_s = time.perf_counter() - began_s
        return took_s, self._calls.read_text().splitlines()


@pytest.fixture
def counted(daemon: Daemon, tmp_path: Path) -> Iterator[Counted]:
    """One of a test's own. The shared one has seen to the image."""
    counted = Counted(tmp_path)
    with running(counted.daemon):
        yield counted


def populate(daemon: Daemon, engine: str, count: int) -> None:
    """More sandboxes, with a command in each."""

    def make(_: int) -> None:
        box = daemon.create(engine, limits={"memory": "32m", "pids": 50})
        daemon.call("commands/start", sandbox=box["id"], argv=["sleep", "100000"], stdio="spool")

    with ThreadPoolExecutor(CREATED_AT_ONCE) as threads:
        list(threads.map(make, range(count)))


def all_there(daemon: Daemon, count: int) -> None:
    rows = daemon.sandboxes()
    assert [row["state"] for row in rows] == ["running"] * count
    assert [row["commands_running"] for row in rows] == [1] * count
    assert all(row["verified"] for row in rows)


def test_a_restart_takes_no_engine_call_per_sandbox_and_loses_none(
    counted: Counted, engine: str, request: pytest.FixtureRequest, say: Callable[[str], None]
) -> None:
    """Somebody who has a hundred of them must not wait for a hundred answers of an engine."""
    soak: bool = request.config.getoption("--soak")
    daemon, many = counted.daemon, MANY_SOAK if soak else MANY
    populate(daemon, engine, FEW)
    _, asked_for_few = counted.restart()
    all_there(daemon, FEW)
    populate(daemon, engine, many - FEW)
    taken = [counted.restart() for _ in range(RESTARTS if soak else 1)]
    for _, asked in taken:
        assert sorted(asked) == sorted(asked_for_few)
    all_there(daemon, many)
    ready_s = statistics.median(took_s for took_s, _ in taken)
    process = psutil.Process(daemon.pid)
    began_s = time.perf_counter()
    usage = daemon.call("sandbox/metrics")["sandboxes"]
    stats_s = time.perf_counter() - began_s
    assert len(usage) == many
    rss_bytes = process.memory_info().rss
    say(
        f"{engine}: {many} sandboxes: ready after {', '.join(f'{took_s:.3f}' for took_s, _ in taken)} s, "
        f"stats of all in {stats_s * 1000:.1f} ms, RSS {rss_bytes / 2**20:.1f} MiB"
    )
    if soak:
        time.sleep(SETTLED_S)
        before = process.cpu_times()
        time.sleep(IDLE_S)
        after = process.cpu_times()
        idle_share = (after.user + after.system - before.user - before.system) / IDLE_S
        say(f"{engine}: idle with {many}: {idle_share:.2%} of a CPU")
        assert ready_s <= READY_S_MAX
        assert stats_s <= STATS_S_MAX
        assert rss_bytes <= RSS_BYTES_MAX
        assert idle_share <= IDLE_CPU_SHARE_MAX


def test_a_follower_goes_on_at_its_byte(counted: Counted, engine: str) -> None:
    """Whoever reads a long build must have each line once, whatever happens to the daemon in between."""
    daemon = counted.daemon
    box = daemon.create(engine)
    started = daemon.call("commands/start", sandbox=box["id"], argv=["sh", "-c", COUNTING], stdio="spool")
    ref = {"sandbox": box["id"], "command_id": started["command_id"]}
    first_half = b"".join(b"line-%d\n" % number for number in range(LINES))
    whole = first_half + b"".join(b"line-%d\n" % number for number in range(LINES, 2 * LINES))
    taken = bytearray()

    def take(message: Message) -> None:
        told: dict[str, Any] = message.content["params"]
        assert told["offset"] == len(taken)
        taken.extend(base64.b64decode(told["data"]))
        if bytes(taken) == first_half:
            daemon.kill()

    with daemon.connect() as connection, pytest.raises(RpcError) as caught:
        connection.call("commands/connect", ref, on_notification=take, timeout_s=PATIENCE_S)
    assert caught.value.type == "disconnected"
    assert bytes(taken) == first_half
    daemon.start()
    daemon.sh(box, "touch /tmp/go")
    with daemon.connect() as connection:
        params = {**ref, "stdout_offset": len(taken)}
        end = connection.call("commands/connect", params, on_notification=take, timeout_s=PATIENCE_S)
    assert end["status"] == "ok"
    assert bytes(taken) == whole
