"""Room on this host, and what a sandbox is told of its CPUs, on each engine."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, running, wait_until

pytestmark = pytest.mark.engine


def test_tools_inside_are_told_of_the_cpus_that_they_may_use(daemon: Daemon, engine: str) -> None:
    """And of a change of the limit, with the next command; what the caller says wins."""
    many = len(os.sched_getaffinity(0))
    with daemon.box(engine, limits={"cpus": "0.5"}) as box:
        assert daemon.sh(box, "echo $OMP_NUM_THREADS $GOMAXPROCS") == "1 1\n"
        daemon.call("sandbox/update", sandbox=box["id"], limits={"cpus": many})
        assert daemon.sh(box, "echo $OMP_NUM_THREADS $GOMAXPROCS") == f"{many} {many}\n"
        assert daemon.sh(box, "echo $OMP_NUM_THREADS", env={"OMP_NUM_THREADS": "7"}) == "7\n"
        assert daemon.sh(box, "echo $OMP_NUM_THREADS", user="0") == f"{many}\n"
    with daemon.box(engine, limits={"cpus": "0.5"}, env={"GOMAXPROCS": "9"}) as box:
        assert daemon.sh(box, "echo $OMP_NUM_THREADS $GOMAXPROCS") == "1 9\n"


def test_a_full_host_refuses_at_once_or_lets_wait(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    """With the figures, the place in the queue, and a turn as soon as somebody goes. The image is the other one's."""
    factor = 100 * 2**20 / psutil.virtual_memory().total
    env: dict[str, str | None] = {"SANDBOXD_CAPACITY_MEMORY_OVERCOMMIT": f"{factor:.9f}"}
    params = {"engine": engine, "limits": {"memory": "64m"}}
    with running(Daemon(tmp_path, env=env)) as small:
        first = small.create(**params)
        refusal = small.refusal("sandbox/create", **params)
        assert refusal.type == "capacity_exceeded"
        assert "64 MiB" in refusal.detail
        assert "--wait-capacity" in refusal.hint
        assert small.refusal("sandbox/create", **params, wait_capacity=0.2).type == "capacity_exceeded"
        assert small.refusal("sandbox/update", sandbox=first["id"], limits={"memory": "128m"}).type == (
            "capacity_exceeded"
        )
        with small.connect() as connection:
            request = connection.send("sandbox/create", {**params, "wait_capacity": PATIENCE_S})
            (place,) = (message.content for message in connection.read())
            assert (place["method"], place["params"]["done"], place["params"]["total"]) == ("$/progress", 1, 1)
            small.call("sandbox/kill", sandbox=first["id"])
            second = connection.wait(request, timeout_s=PATIENCE_S)
        assert second["state"] == "running"
        small.call("sandbox/stop", sandbox=second["id"], grace=0)
        third = small.create(**params)
        assert small.refusal("sandbox/start", sandbox=second["id"]).type == "capacity_exceeded"
        small.remove(third)
        assert small.call("sandbox/start", sandbox=second["id"])["state"] == "running"
        wait_until(lambda: len(small.containers(engine)) == 1, "the others were gone")
