"""The daemon is killed at every step of what changes anything, one after the other, and the next one finds its way.

    pytest tests/engine/test_fault_points.py --soak

A step is a statement of the journal or a call of an engine. In each round a daemon is told at which one to die, is
asked for something, dies, and is started again; the steps are all there are when it did what it was asked for. Rounds
build on each other: what one leaves behind, the next one would trip over. Without ``--soak`` only Podman, and only
the moment after each step, which is that before the next one but for what happens in between.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import NotRunning, RpcError
from tests.engine.daemons import ENGINES, Daemon, running, wait_until

pytestmark = pytest.mark.engine

Box = dict[str, Any]

STEPS_MAX = 60
"""More than anything takes."""

MOMENTS = ("before", "after")
SPARSE = ("podman", "after")

NAME = "again"
"""What every round calls its sandbox: a name that was not freed is noticed."""

COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"


class Story:
    """A daemon that dies and dies again, a sandbox beside what happens, and one that it happens to."""

    def __init__(self, daemon: Daemon, engine: str, armed: Path, slots: int) -> None:
        self.daemon = daemon
        self.engine = engine
        self.armed = armed
        self.slots = slots
        self.await_rest()
        self.bystander = daemon.create(engine)
        self.counter = daemon.call(
            "commands/start", sandbox=self.bystander["id"], argv=["sh", "-c", COUNT], stdio="spool"
        )["command_id"]
        self.counted = b""
        self.box = daemon.create(engine, limits={"memory": "64m"})

    def dies_at(self, point: str, act: Callable[[], object]) -> bool:
        """Do something with a daemon that dies at this point; whether it did. What it did not, it has done."""
        # In one go: a file that is there and says nothing yet would be counted.
        said = self.armed.with_suffix(".new")
        said.write_text(point)
        said.rename(self.armed)
        try:
            act()
        except RpcError as error:
            if error.type != "disconnected":
                raise
        self.armed.unlink()
        try:
            # What it began by itself may have killed it as well, a moment after it had answered.
            self.daemon.call("daemon/info")
        except (RpcError, NotRunning):
            self.daemon.wait()
            return True
        return False

    def follow(self) -> None:
        """Read on where the last daemon has stopped telling."""
        logs = self.daemon.call(
            "commands/logs", sandbox=self.bystander["id"], command_id=self.counter, offset=len(self.counted)
        )
        assert (logs["offset"], logs["dropped"], logs["ended"]) == (len(self.counted), [], False)
        self.counted += base64.b64decode(logs["data"])

    def assert_in_order(self) -> None:
        """No orphan, no double owner, no mount, no directory; and nobody beside has noticed anything."""
        daemon = self.daemon
        self.await_rest()
        written = daemon.journal()
        assert sorted(daemon.containers(self.engine)) == sorted(record["container_id"] for record in written)
        assert daemon.boxes_left() == sorted(record["id"] for record in written)
        assert daemon.mounts() == []
        listed = daemon.sandboxes()
        assert sorted(row["id"] for row in listed) == sorted(row["id"] for row in written if not row["slot"])
        assert len({row["name"] for row in listed if row["name"]}) == len([row for row in listed if row["name"]])
        for kept in ("spools", "layers"):
            with contextlib.suppress(FileNotFoundError):
                assert set(os.listdir(daemon.state / kept)) <= {record["id"] for record in written}
        beside = daemon.call("sandbox/get", sandbox=self.bystander["id"])
        assert (beside["state"], beside["pid"], beside["commands_running"]) == ("running", self.bystander["pid"], 1)
        self.follow()

    def await_rest(self) -> None:
        """What the new daemon has begun by itself is done: slots, removals."""

        def at_rest() -> bool:
            states = [record["state"] for record in self.daemon.journal()]
            return set(states) <= {"running", "warm"} and states.count("warm") == self.slots

        wait_until(at_rest, "nothing was under way")

    def await_more(self) -> None:
        """Wait until the command beside has written more than was read so far."""
        before = len(self.counted)

        def has_more() -> bool:
            self.follow()
            return len(self.counted) > before

        wait_until(has_more, "the command beside went on")

    def clear(self) -> None:
        """Remove what a round has made, if it is there."""
        for row in self.daemon.sandboxes():
            if row["name"] == NAME:
                self.daemon.remove(row)


def create(story: Story, project: Path) -> object:
    workspace = {"path": str(project), "mode": "overlay"}
    return story.daemon.create(story.engine, name=NAME, workspace=workspace, env={"A": "b"}, launch="cold")


def claim(story: Story, project: Path) -> object:
    workspace = {"path": str(project)}
    made = story.daemon.create(
        story.engine, name=NAME, workspace=workspace, limits={"memory": "48m"}, launch="wait", wait="30s"
    )
    assert made["launch"] == "warm"
    return made


def start(story: Story, project: Path) -> object:
    return story.daemon.call("commands/start", sandbox=story.box["id"], argv=["sleep", "4321"], stdio="spool")


def run(story: Story, project: Path) -> object:
    """In the foreground it is its caller's, and nothing of it is written down: no step, and no death."""
    return story.daemon.sh(story.box, "true")


def update(story: Story, project: Path) -> object:
    now = story.daemon.call("sandbox/get", sandbox=story.box["id"])["limits"]
    memory = next(limit["effective"] for limit in now if limit["name"] == "memory")
    other = "96m" if memory == 64 * 1024 * 1024 else "64m"
    return story.daemon.call("sandbox/update", sandbox=story.box["id"], limits={"memory": other, "pids": 40})


def remove(story: Story, project: Path) -> object:
    return story.daemon.call("sandbox/kill", sandbox=NAME, wait=True)


def assert_commands_are_what_runs(story: Story) -> None:
    """None is lost, none runs that is not known."""
    rows = story.daemon.call("commands/list", sandbox=story.box["id"])["commands"]
    running_ids = [row["command_id"] for row in rows if row["state"] == "running"]
    assert story.daemon.sh(story.box, "ps -o args").count("sleep 4321") == len(running_ids)
    for command_id in running_ids:
        story.daemon.call("commands/kill", sandbox=story.box["id"], command_id=command_id)


def assert_limits_are_proven(story: Story) -> None:
    found = story.daemon.call("sandbox/get", sandbox=story.box["id"])
    assert found["verified"], found["limits"]


def nothing(story: Story) -> None:
    """Beyond what is true in any case."""


Act = Callable[[Story, Path], object]

ACTS: dict[Act, tuple[Callable[[Story], None], int]] = {
    create: (nothing, 3),
    start: (assert_commands_are_what_runs, 1),
    run: (assert_commands_are_what_runs, 0),
    update: (assert_limits_are_proven, 2),
    remove: (nothing, 3),
    claim: (nothing, 2),
}
"""What is done, what must be true afterwards, and the least number of steps that it has; with 0 it has none."""


@contextlib.contextmanager
def told(engine: str, directory: Path, slots: int) -> Iterator[Story]:
    directory.mkdir()
    armed = directory / "armed"
    env = {
        "DYING_ARMED": str(armed),
        "SANDBOXD_DEFAULTS_ENGINE": engine,
        "SANDBOXD_POOL_MIN": str(slots),
        "SANDBOXD_POOL_MAX": str(slots),
    }
    with running(Daemon(directory / "daemon", env=env, module="tests.engine.dying")) as dying:
        yield Story(dying, engine, armed, slots)
        if slots:
            dying.call("pool/drain", template="default")
        wait_until(lambda: all(not record["slot"] for record in dying.journal()), "the slots are gone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Which engine, and which moment of each step."""
    if "moment" in metafunc.fixturenames:
        every = [(engine, moment) for engine in ENGINES for moment in MOMENTS]
        metafunc.parametrize(("on", "moment"), every if metafunc.config.getoption("--soak") else [SPARSE])


def test_a_daemon_may_be_killed_at_any_step(
    daemon: Daemon, on: str, moment: str, project: Path, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """The shared daemon has seen to the image."""
    deaths = []
    for slots in (0, 1):
        with told(on, tmp_path / f"slots-{slots}", slots) as story:
            deaths += [
                f"{act.__name__} {die_at_each_step(story, act, project, moment)}"
                for act in ACTS
                if slots == (act is claim)
            ]
            story.await_more()
        numbers = story.counted.rsplit(b"\n", 1)[0].split(b"\n")
        assert numbers == [str(number).encode() for number in range(len(numbers))], "each line once, in order"
    say(f"{on}: killed {moment} so many steps of each: {', '.join(deaths)}")


def die_at_each_step(story: Story, act: Act, project: Path, moment: str) -> int:
    """Let a daemon die at each step of something; return how many there were."""
    holds, steps_min = ACTS[act]
    for number in range(STEPS_MAX):
        if act is remove:
            create(story, project)
        if not story.dies_at(f"{moment} {number}", lambda: act(story, project)):
            story.await_rest()
            story.clear()
            assert number >= steps_min if steps_min else number == 0, f"{act.__name__} has {number} steps"
            return number
        story.daemon.start()
        story.assert_in_order()
        holds(story)
        story.clear()
    raise AssertionError(f"{act.__name__} has no end")
