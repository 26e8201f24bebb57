"""Engine clients that a killed daemon left behind: they are found, and waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import anyio
import pytest

from runtimes.argv import Client, events_argv, events_filter_argument, list_argv, owner_label_argument, run_argv
from runtimes.clients import end_followers, wait_for_clients
from runtimes.model import ContainerSpec, EngineName, User

LeftBehind = Callable[..., "subprocess.Popen[bytes]"]

pytestmark = pytest.mark.anyio

UNTIL_STDIN_ENDS = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def left_behind() -> Iterator[LeftBehind]:
    """Starts a client as the engines' are started; it runs until its stdin ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(engine: EngineName, owner: str) -> subprocess.Popen[bytes]:
        spec = ContainerSpec(
            sandbox_id="s1",
            owner=owner,
            image="image:1",
            command=("/init",),
            user=User(uid=1000, gid=1000),
            seccomp_profile="/seccomp.json",
        )
        words = run_argv(Client(engine=engine, program=sys.executable, global_flags=("-c", UNTIL_STDIN_ENDS)), spec)
        client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(client)
        assert client.stdout is not None
        client.stdout.readline()
        return client

    yield start
    for client in started:
        client.kill()
        client.wait()
        for pipe in (client.stdin, client.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("engine", EngineName)
async def test_a_client_that_still_runs_is_waited_for(left_behind: LeftBehind, engine: EngineName) -> None:
    """It may make a container at any moment, and who looked before would never know of it."""
    client = left_behind(engine, "owner-of-mine")
    assert client.stdin is not None
    ended_when_waited_for = False

    async def end_later() -> None:
        nonlocal ended_when_waited_for
        await anyio.sleep(0.1)
        ended_when_waited_for = client.poll() is None
        assert client.stdin is not None
        client.stdin.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end_later)
        assert await wait_for_clients(owner_label_argument("owner-of-mine"), deadline_s=10) == 1
        assert ended_when_waited_for
    assert client.wait(timeout=10) == 0


async def test_a_client_that_hangs_is_not_waited_for_without_end(left_behind: LeftBehind) -> None:
    """The daemon must come up: what the client makes later is found by the next look."""
    left_behind(EngineName.PODMAN, "owner-of-mine")
    with anyio.fail_after(10):
        assert await wait_for_clients(owner_label_argument("owner-of-mine"), deadline_s=0.1) == 1


async def test_nobody_elses_clients_are_waited_for(left_behind: LeftBehind) -> None:
    """Two daemons may use one engine."""
    left_behind(EngineName.PODMAN, "owner-of-another")
    assert await wait_for_clients(owner_label_argument("owner-of-mine"), deadline_s=10) == 0


def test_followers_of_a_killed_daemon_are_ended_and_nobody_elses() -> None:
    """Nobody reads what they say, and each killed daemon would leave one more. Who lists containers is none."""
    client = Client(engine=EngineName.PODMAN, program=sys.executable, global_flags=("-c", UNTIL_STDIN_ENDS))
    started = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for words in (
            events_argv(client, owner="owner-of-mine"),
            events_argv(client, owner="owner-of-others"),
            list_argv(client, owner="owner-of-mine"),
        )
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        assert end_followers(events_filter_argument("owner-of-mine")) == 1
        assert started[0].wait(timeout=10) == -signal.SIGKILL
        assert [process.poll() for process in started[1:]] == [None, None]
        assert end_followers(events_filter_argument("owner-of-mine")) == 0
    finally:
        for process in started:
            process.kill()
            process.communicate()
