"""What a service manager is told, and when it is told nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from sandboxd import supervision
from sandboxd.activation import Activation
from sandboxd.supervision import Supervision, answers, status_text

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Manager:
    """The other end of the notify socket."""

    def __init__(self, path: str, name: str) -> None:
        self.name = name
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._socket.setblocking(False)

    def close(self) -> None:
        self._socket.close()

    def heard(self) -> list[str]:
        """All that was said since the last time."""
        said = []
        with contextlib.suppress(BlockingIOError):
            while True:
                said.append(self._socket.recv(4096).decode())
        return said


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    manager = Manager(path, path) if request.param == "path" else Manager(f"\0{path}", f"@{path}")
    yield manager
    manager.close()


@contextlib.contextmanager
def shut_door(path: Path) -> Iterator[str]:
    """A socket that the kernel takes connections for, and nobody else."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(16)
        listening.setblocking(False)
        yield str(path)


async def serve(path: Path) -> None:
    async def answer(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b"answer")

    async with await anyio.create_unix_listener(path) as listener:
        await listener.serve(answer)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


def test_the_status_says_what_wants_a_look() -> None:
    assert status_text([], 0, []) == "0 sandboxes, 0 running; no engine"
    assert status_text(["running"], 2, ["podman"]) == "1 sandbox, 1 running, 2 warm; podman"
    states = ["running", "paused", "broken", "running", "stopped"]
    assert status_text(states, 0, ["podman", "docker"]) == (
        "5 sandboxes, 2 running, 1 paused, 1 broken; podman and docker"
    )


async def test_it_is_ready_once_and_then_says_how_it_is_at_a_bounded_rate(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst of changes is one line; a change that comes to nothing is none."""
    monkeypatch.setattr(supervision, "STATUS_PERIOD_S", 0.02)
    states: list[str] = []
    told = Supervision(Activation(None, manager.name), "/nobody", lambda: f"{len(states)} there")
    heard: list[str] = []
    async with anyio.create_task_group() as tasks:
        told.ready(tasks)
        assert manager.heard() == ["READY=1\nSTATUS=0 there"]
        await anyio.wait_all_tasks_blocked()
        for _ in range(100):
            states.append("running")
            told.note()
        await until(lambda: bool(heard.extend(manager.heard()) or heard))
        assert heard == ["STATUS=100 there"]
        told.note()
        await anyio.sleep(0.05)
        assert manager.heard() == []
        tasks.cancel_scope.cancel()


async def test_the_watchdog_is_fed_while_the_door_is_answered(manager: Manager, tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    told = Supervision(Activation(None, manager.name, 0.15), str(path), lambda: "well")
    heard: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, path)
        await until(path.exists)
        told.ready(tasks)
        await until(lambda: heard.extend(manager.heard()) or heard.count("WATCHDOG=1") >= 3)
        tasks.cancel_scope.cancel()


async def test_the_watchdog_goes_hungry_when_nobody_opens(manager: Manager, tmp_path: Path) -> None:
    """A loop that turns is not enough: the kernel takes connections for a daemon that accepts none."""
    with shut_door(tmp_path / "s.sock") as path:
        told = Supervision(Activation(None, manager.name, 0.09), path, lambda: "well")
        async with anyio.create_task_group() as tasks:
            told.ready(tasks)
            began = time.monotonic()
            await until(lambda: time.monotonic() - began > 0.3)
            tasks.cancel_scope.cancel()
    assert manager.heard() == ["READY=1\nSTATUS=well"]


async def test_a_door_that_is_not_there_answers_nobody(tmp_path: Path) -> None:
    assert not await answers(str(tmp_path / "nothing"))


async def test_a_stop_and_a_start_ask_for_patience(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, while the loop turns: a fixed time would be too long for one that hangs."""
    monkeypatch.setattr(supervision, "EXTENSION_PERIOD_S", 0.01)
    told = Supervision(Activation(None, manager.name), "/nobody", lambda: "well")
    heard: list[str] = []
    async with told.busy("STOPPING=1", "stopping"):
        await until(lambda: heard.extend(manager.heard()) or len(heard) >= 3)
    assert heard[:3] == ["STOPPING=1\nSTATUS=stopping", *["EXTEND_TIMEOUT_USEC=30000000"] * 2]
    manager.heard()
    await anyio.sleep(0.05)
    assert manager.heard() == []


async def test_patience_ends(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes for ever must not be given for ever: the unit's own limit holds then."""
    monkeypatch.setattr(supervision, "EXTENSION_PERIOD_S", 0.01)
    monkeypatch.setattr(supervision, "EXTENDED_S_MAX", 0.03)
    told = Supervision(Activation(None, manager.name), "/nobody", lambda: "well")
    async with told.busy("", "starting"):
        await anyio.sleep(0.1)
        manager.heard()
        await anyio.sleep(0.05)
        assert manager.heard() == []


async def test_a_reload_is_told_with_the_time_and_ends_ready_whatever_comes(manager: Manager) -> None:
    told = Supervision(Activation(None, manager.name), "/nobody", lambda: "well")
    with told.reloading():
        pass
    assert manager.heard() == [], "it does not serve yet, and must not say that it is ready"
    async with anyio.create_task_group() as tasks:
        told.ready(tasks)
        manager.heard()
        before = time.monotonic_ns() // 1000
        with contextlib.suppress(ValueError), told.reloading():
            raise ValueError
        first, second = manager.heard()
        tasks.cancel_scope.cancel()
    fields = dict(line.split("=", 1) for line in first.splitlines())
    assert fields["RELOADING"] == "1"
    assert before <= int(fields["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert second == "READY=1\nSTATUS=well"


async def test_without_a_service_manager_nothing_runs() -> None:
    told = Supervision(Activation(None, ""), "/nobody", lambda: "well")
    async with anyio.create_task_group() as tasks:
        told.ready(tasks)
        async with told.busy("STOPPING=1", "stopping"):
            told.note()
    # The group has ended by itself, so nothing was left in it.
