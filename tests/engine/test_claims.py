"""Many claims: what a later user finds of an earlier one, what racing and dying callers get, and what is left.

    pytest tests/engine/test_claims.py --soak

runs them at full size: 500 claims one after the other, 200 callers at once. Without it these are fewer, and show the
same. The figures are printed at the end of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from sandboxd.client import Connection, RpcError
from tests.engine import kernel
from tests.engine.daemons import PATIENCE_S, Daemon, running, wait_until

pytestmark = pytest.mark.engine

CYCLES, CYCLES_SOAK = 12, 500
CALLERS, CALLERS_SOAK = 24, 200
CRASHES = 2
SLOTS = 4

Say = Callable[[str], None]


@pytest.fixture
def own(daemon: Daemon, engine: str, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with a pool on one engine. The shared one has seen to the image."""
    env = {"SANDBOXD_POOL_MAX": str(SLOTS), "SANDBOXD_POOL_MIN": "2", "SANDBOXD_DEFAULTS_ENGINE": engine}
    with running(Daemon(tmp_path / "own", env=env), (engine,)) as own:
        yield own
        own.remove_everything()
        own.call("pool/drain", template="default")
        wait_until(lambda: not own.containers(engine), "all slots are gone")


def claim(daemon: Daemon, **params: Any) -> dict[str, Any]:
    box = daemon.call("sandbox/create", launch="wait", wait=PATIENCE_S, **params)
    assert box["launch"] == "warm"
    return box


# --- one user after the other ---------------------------------------------------------------------------


def test_a_claimed_sandbox_sees_its_own_project_as_it_is_now(own: Daemon, project: Path) -> None:
    own.call("pool/warm", template="default", count=1)
    (project / "later").write_text("written after the slot was made")
    os.chown(project, 1000, 1000)
    box = claim(own, workspace={"path": str(project)})
    assert own.sh(box, "cat later; echo back > answer") == "written after the slot was made"
    answer = project / "answer"
    assert (answer.read_text(), answer.stat().st_uid) == ("back\n", 1000)
    told = [json.loads(line) for line in own.ctl("events", "--json").stdout.splitlines()]
    (created,) = (event for event in told if (event["kind"], event["sandbox"]) == ("created", box["id"]))
    assert (created["data"]["launch"], created["data"]["miss_reason"]) == ("warm", "")
    assert 0 < created["data"]["ready_us"] <= box["timings_ms"]["total"] * 1000
    own.remove(box)


def test_an_overlay_leaves_the_project_as_it_is(own: Daemon, project: Path) -> None:
    own.call("pool/warm", template="default", count=1)
    (project / "file").write_text("mine")
    box = claim(own, workspace={"path": str(project), "mode": "overlay"})
    assert own.sh(box, "cat file; echo changed > file; echo new > other; cat file") == "minechanged\n"
    assert [path.name for path in project.iterdir()] == ["file"]
    assert (project / "file").read_text() == "mine"
    own.remove(box)


def test_nothing_of_an_earlier_user_is_there_for_a_later_one(own: Daemon, project: Path, tmp_path: Path) -> None:
    """Files, processes, variables, mounts, sockets, shared memory: a slot is used once."""
    mark = "earlier-user"
    first = claim(own, workspace={"path": str(project)}, env={"SECRET": mark}, name="first", metadata={"who": mark})
    own.sh(first, f"for place in /tmp /dev/shm /run /home/sandbox /workspace; do echo {mark} > $place/{mark}; done")
    own.call("commands/start", sandbox=first["id"], argv=["sleep", "12345"])
    own.remove(first)
    other = tmp_path / "other"
    other.mkdir()
    seen = set()
    for _ in range(SLOTS + 1):
        box = claim(own, workspace={"path": str(other)})
        seen.add(box["container_id"])
        found = own.sh(
            box,
            "env; hostname; ps; mount; cat /etc/hosts; ls -aR /tmp /dev/shm /run /home /workspace",
        )
        assert mark not in found
        assert "12345" not in found
        assert str(project) not in found
        assert box["metadata"] == {}
        own.remove(box)
    assert first["container_id"] not in seen
    assert len(seen) == SLOTS + 1, "each was used once"


# --- many ------------------------------------------------------------------------------------------------


class Left(NamedTuple):
    """What there is of a daemon on this host."""

    descriptors: int
    children: int
    mounts: int
    directories: int
    cgroups: int
    containers: int
    processes: int


def left(daemon: Daemon, engine: str, marks: set[str]) -> Left:
    """Args: ``marks`` are in the lines of those mounts that are of this daemon: others mount things as well."""
    process = psutil.Process(daemon.pid)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = sum(any(mark in line for mark in marks) for line in file)
    containers = daemon.containers(engine)
    cgroups = sum(1 for root, _, _ in os.walk("/sys/fs/cgroup") for key in containers if key in root)
    return Left(
        descriptors=process.num_fds(),
        children=len(process.children(recursive=True)),
        mounts=mounts,
        directories=len(daemon.boxes_left()),
        cgroups=cgroups,
        containers=len(containers),
        processes=sum(len(kernel.processes(row["pid"])) for row in daemon.sandboxes() if row.get("pid")),
    )


def test_claims_one_after_the_other_leave_nothing(
    own: Daemon, engine: str, project: Path, say: Say, request: pytest.FixtureRequest
) -> None:
    cycles = CYCLES_SOAK if request.config.getoption("--soak") else CYCLES

    marks = {f"{project.parent}/", f"{own.directory}/"}

    def cycle() -> None:
        box = claim(own, workspace={"path": str(project)}, limits={"memory": "48m", "pids": 50}, name="mine")
        marks.update({box["container_id"], *_layer_of(box)})
        assert own.run(box, "true").end["status"] == "ok"
        own.remove(box)

    def settled() -> Left:
        own.call("pool/drain", template="default")
        wait_until(lambda: not any(row["filling"] for row in own.call("pool/list")["pools"]), "no slot is made")
        wait_until(lambda: not own.containers(engine) and not own.boxes_left(), "all slots are gone")
        helper = 2
        wait_until(
            lambda: len(psutil.Process(own.pid).children(recursive=True)) <= helper, "no client of the engine runs"
        )
        return left(own, engine, marks)

    cycle()
    before = settled()
    own.call("pool/resize", template="default", max=SLOTS)
    for _ in range(cycles):
        cycle()
    after = settled()
    say(f"{engine}: {cycles} claims and removals: {before} before, {after} after")
    assert after == before


def test_racing_and_dying_callers_and_daemons_lose_no_slot_and_share_none(
    own: Daemon, engine: str, project: Path, say: Say, request: pytest.FixtureRequest
) -> None:
    """Callers that hang up at any moment, daemons that are killed under them: whoever has an answer has a sandbox."""
    callers = CALLERS_SOAK if request.config.getoption("--soak") else CALLERS
    chance = random.Random(engine)
    answered: list[dict[str, Any]] = []
    lock = threading.Lock()

    def call(number: int, hang_up_s: float | None) -> None:
        with contextlib.suppress(RpcError, OSError):
            with own.connect() as connection:
                params = {"workspace": {"path": str(project)}, "env": {"CALLER": str(number)}, "launch": "wait"}
                if hang_up_s is not None:
                    timer = threading.Timer(hang_up_s, _hang_up, (connection,))
                    timer.start()
                box = connection.call("sandbox/create", {**params, "wait": PATIENCE_S})
            with lock:
                answered.append({**box, "caller": str(number)})

    plans = [None if chance.random() < 0.6 else chance.random() * 2 for _ in range(callers)]
    threads = [threading.Thread(target=call, args=(number, plan)) for number, plan in enumerate(plans)]
    crash_at = {callers * (turn + 1) // (CRASHES + 1) for turn in range(CRASHES)}
    for number, thread in enumerate(threads):
        thread.start()
        if number in crash_at:
            own.kill()
            own.start()
    for thread in threads:
        thread.join()
    assert len({box["id"] for box in answered}) == len(answered), "no slot was given twice"
    assert answered, "somebody was served"
    for box in answered:
        # An answer may be lost with its daemon, a sandbox that was answered for is not.
        assert own.sh(box, "echo $CALLER").strip() == box["caller"]
    rows = own.journal()
    assert not [row for row in rows if row["state"] == "reserved"]
    known = {row["container_id"] for row in rows}
    wait_until(lambda: set(own.containers(engine)) <= known | _ids(own), "no container is nobody's")
    say(f"{engine}: {callers} callers, {CRASHES} crashes: {len(answered)} served, none twice, none lost")


def _layer_of(box: dict[str, Any]) -> list[str]:
    """What the mounts of a container's root are known by on the host, where it has some."""
    table = Path(f"/proc/{box['pid']}/mountinfo").read_text()
    return re.findall(r"^\S+ \S+ \S+ \S+ / .*[,]upperdir=([^,\s]+)/diff", table, re.MULTILINE)


def _ids(daemon: Daemon) -> set[str]:
    return {row["container_id"] for row in daemon.journal() if row["container_id"]}


def _hang_up(connection: Connection) -> None:
    with contextlib.suppress(OSError):
        connection._socket.shutdown(socket.SHUT_RDWR)
