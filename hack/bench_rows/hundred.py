"""The rows of hack/bench with a hundred sandboxes: a restart among them, and what they cost when nothing happens."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.engine.daemons import Daemon

CREATED_AT_ONCE = 3
RESTARTS, STATS = 5, 15
IDLE_S = 10.0
LIMITS = {"memory": "32m", "pids": 50}


class Measured(NamedTuple):
    """What was seen of one daemon with so many sandboxes, a command in each."""

    ready_ms: list[float]
    ready_cpu_ms: list[float]
    """The CPU time of its own until then: that which does not depend on who else is busy."""
    stats_ms: list[float]
    rss_bytes: int
    idle_cpu_share: float


def measure(directory: Path, engine: str, count: int, image: str) -> Measured:
    """Kill a daemon that has ``count`` sandboxes, start it again, and so on; then leave it alone."""
    # Whoever sets that has the daemon compiled at each start: 0.2 s that no user has, and that would be measured too.
    daemon = Daemon(directory, env={"SANDBOXD_DEFAULTS_IMAGE": image, "PYTHONDONTWRITEBYTECODE": None})
    daemon.start()
    try:
        with ThreadPoolExecutor(CREATED_AT_ONCE) as threads:
            for box in list(threads.map(lambda _: daemon.create(engine, limits=LIMITS), range(count))):
                daemon.call("commands/start", sandbox=box["id"], argv=["sleep", "100000"], stdio="spool")
        before_s = _cpu_s(daemon)
        time.sleep(IDLE_S)
        idle = (_cpu_s(daemon) - before_s) / IDLE_S
        ready_ms, ready_cpu_ms = [], []
        for _ in range(RESTARTS):
            daemon.kill()
            began_s = time.perf_counter()
            daemon.start()
            ready_ms.append((time.perf_counter() - began_s) * 1000)
            ready_cpu_ms.append(_cpu_s(daemon) * 1000)
            states = [row["state"] for row in daemon.sandboxes()]
            if states != ["running"] * count:
                raise SystemExit(f"bench: not all are there after a restart: {states}")
        stats_ms = []
        with daemon.connect() as connection:
            for _ in range(STATS):
                began_s = time.perf_counter()
                connection.call("sandbox/metrics", {})
                stats_ms.append((time.perf_counter() - began_s) * 1000)
        return Measured(ready_ms, ready_cpu_ms, stats_ms, psutil.Process(daemon.pid).memory_info().rss, idle)
    finally:
        if not daemon.running:
            daemon.start()
        with ThreadPoolExecutor(CREATED_AT_ONCE) as threads:
            list(threads.map(daemon.remove, daemon.sandboxes()))
        daemon.stop()


def _cpu_s(daemon: Daemon) -> float:
    spent = psutil.Process(daemon.pid).cpu_times()
    return spent.user + spent.system
