"""The only spawner, against programs that misbehave in every way that an engine's client ever did."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import psutil
import pytest

from runtimes.errors import EngineTimeout, EngineUnavailable, UnreadableAnswer, Unsupported
from runtimes.process import Finished, client_environment, run
from tests.unit.init_harness import until

pytestmark = pytest.mark.anyio

AT_ONCE_S = 3.0
"""Far below the programs' own duration, far above what a loaded machine takes."""

FOLLOWED = """
import sys
from runtimes.process import start
env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
print(start(["sleep", "600"], what="it", env=env, ends_with_us=True).pid, flush=True)
sys.stdin.read()
"""

Program = Callable[[str], str]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Put a shell script on the PATH, under the name ``client``."""

    def write(body: str) -> str:
        path = tmp_path / "client"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return "client"

    return write


def followed() -> subprocess.Popen[bytes]:
    """A process that has started another one, and says which."""
    return subprocess.Popen([sys.executable, "-c", FOLLOWED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def call(name: str, env: dict[str, str], **options: object) -> Finished:
    given: dict[str, object] = {"what": "`client run`", "deadline_s": 30, **options}
    return await run([name], env=env, **given)  # type: ignore[arg-type]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def zombies() -> int:
    return sum(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process().children())


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def pid_in(path: Path) -> int:
    await until(lambda: path.exists() and path.read_text().strip().isdigit(), "the client has started")
    return int(path.read_text())


async def test_status_and_both_outputs_come_back(program: Program, environment: dict[str, str]) -> None:
    finished = await call(program("echo out; echo err >&2; exit 7"), environment)
    assert (finished.returncode, finished.stdout, finished.stderr) == (7, b"out\n", b"err\n")
    assert finished.wall_ms > 0


async def test_a_client_that_is_killed_shows_its_signal(program: Program, environment: dict[str, str]) -> None:
    assert (await call(program("kill -9 $$"), environment)).returncode == -signal.SIGKILL


async def test_stdin_is_empty_and_the_working_directory_neutral(
    program: Program, environment: dict[str, str]
) -> None:
    """A client that asks a question must not read the daemon's own stdin, nor keep its folder busy."""
    assert (await call(program("cat; pwd"), environment)).stdout == b"/\n"


async def test_the_environment_is_the_one_given(program: Program, environment: dict[str, str]) -> None:
    environment["ONLY"] = "this"
    printed = (await call(program("env"), environment)).stdout.decode()
    assert "ONLY=this" in printed
    assert "HOME=" not in printed


def test_what_systemd_tells_a_service_does_not_reach_a_client() -> None:
    told = {"LISTEN_FDS": "1", "LISTEN_PID": "7", "INVOCATION_ID": "x", "NOTIFY_SOCKET": "/s", "WATCHDOG_USEC": "1"}
    assert client_environment({**told, "PATH": "/bin", "TMPDIR": "/t"}) == {"PATH": "/bin", "TMPDIR": "/t"}


async def test_a_missing_program_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(EngineUnavailable, match="no-such-client"):
        await call("no-such-client", environment)


async def test_a_program_that_cannot_be_executed_is_unavailable(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "client").write_text("not a program")
    (tmp_path / "client").chmod(0o755)
    with pytest.raises(EngineUnavailable):
        await call("client", environment)


@pytest.mark.parametrize("argument", ["a\0b", "x" * 200_000])
async def test_an_argument_that_the_kernel_cannot_take_is_unsupported(
    argument: str, environment: dict[str, str]
) -> None:
    with pytest.raises(Unsupported):
        await run(["true", argument], what="`true`", env=environment, deadline_s=5)


@pytest.mark.parametrize(
    "body",
    [
        "sleep 600",
        "trap '' TERM INT HUP; sleep 600 & wait; sleep 600",
        "kill -STOP $$",
        "exec >/dev/null 2>&1; sleep 600",
    ],
    ids=["hangs", "ignores-term", "stopped", "closed-its-output"],
)
async def test_the_deadline_ends_any_client(program: Program, environment: dict[str, str], body: str) -> None:
    before = descriptors()
    with anyio.fail_after(AT_ONCE_S), pytest.raises(EngineTimeout, match="client run"):
        await call(program(body), environment, deadline_s=0.2)
    assert descriptors() == before


async def test_the_deadline_ends_the_whole_group(
    program: Program, environment: dict[str, str], tmp_path: Path
) -> None:
    name = program(f"sleep 600 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(EngineTimeout):
        await call(name, environment, deadline_s=0.3)
    child = await pid_in(tmp_path / "child")
    await until(lambda: is_gone(child), "the child is gone with the client")


async def test_a_grandchild_that_holds_the_pipes_delays_nothing(
    program: Program, environment: dict[str, str], tmp_path: Path
) -> None:
    """Monitors such as conmon outlive the client: its own end is the answer, and they are left alone."""
    name = program(f"setsid sleep 600 & echo $! > {tmp_path}/monitor; echo done")
    with anyio.fail_after(AT_ONCE_S):
        finished = await call(name, environment)
    assert finished.stdout == b"done\n"
    monitor = await pid_in(tmp_path / "monitor")
    assert not is_gone(monitor)
    os.kill(monitor, signal.SIGKILL)


@pytest.mark.parametrize("where", ["stdout", "stderr"])
async def test_a_flood_is_cut_off(program: Program, environment: dict[str, str], where: str) -> None:
    redirect = ">&2" if where == "stderr" else ""
    with anyio.fail_after(AT_ONCE_S), pytest.raises(UnreadableAnswer, match=where):
        await call(program(f"yes {redirect}"), environment, stdout_bytes_max=100_000, stderr_bytes_max=100_000)


async def test_an_answer_as_large_as_its_bound_is_whole(program: Program, environment: dict[str, str]) -> None:
    """More than a pipe holds, and the last of it is written just before the end."""
    name = program("head -c 300000 /dev/zero")
    assert (await call(name, environment, stdout_bytes_max=300_000)).stdout == bytes(300_000)
    with pytest.raises(UnreadableAnswer):
        await call(name, environment, stdout_bytes_max=299_999)


async def test_a_cancelled_call_kills_its_client(
    program: Program, environment: dict[str, str], tmp_path: Path
) -> None:
    before = descriptors()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, program(f"echo $$ > {tmp_path}/pid; sleep 600"), environment)
        pid = await pid_in(tmp_path / "pid")
        tasks.cancel_scope.cancel()
    assert is_gone(pid)
    assert descriptors() == before


async def test_a_client_that_is_left_comes_to_its_own_end_before_the_cancellation_goes_on(
    program: Program, environment: dict[str, str], tmp_path: Path
) -> None:
    """A create that is cut short leaves a container that appears after its caller has cleaned up."""
    name = program(f"echo $$ > {tmp_path}/pid; sleep 0.3; touch {tmp_path}/made")
    async with anyio.create_task_group() as tasks:

        async def create() -> None:
            await call(name, environment, on_cancel="leave")

        tasks.start_soon(create)
        await pid_in(tmp_path / "pid")
        tasks.cancel_scope.cancel()
    assert (tmp_path / "made").exists()


async def test_a_client_that_is_left_still_has_its_deadline(
    program: Program, environment: dict[str, str], tmp_path: Path
) -> None:
    name = program(f"echo $$ > {tmp_path}/pid; sleep 600")
    with anyio.fail_after(AT_ONCE_S):
        async with anyio.create_task_group() as tasks:

            async def create() -> None:
                await call(name, environment, on_cancel="leave", deadline_s=0.5)

            tasks.start_soon(create)
            pid = await pid_in(tmp_path / "pid")
            tasks.cancel_scope.cancel()
    assert is_gone(pid)


async def test_waiting_for_a_turn_counts_against_the_deadline(program: Program, environment: dict[str, str]) -> None:
    turn = anyio.Semaphore(1)
    await turn.acquire()
    with anyio.fail_after(AT_ONCE_S), pytest.raises(EngineTimeout, match="cannot start"):
        await call(program("true"), environment, limiter=turn, deadline_s=0.1)
    turn.release()
    assert (await call("client", environment, limiter=turn)).returncode == 0
    assert turn.value == 1


@pytest.mark.parametrize("body", ["sleep 600", "yes"])
async def test_a_failed_call_gives_its_turn_back(program: Program, environment: dict[str, str], body: str) -> None:
    turn = anyio.Semaphore(1)
    with pytest.raises((EngineTimeout, UnreadableAnswer)):
        await call(program(body), environment, limiter=turn, deadline_s=0.3, stdout_bytes_max=1000)
    assert turn.value == 1


async def test_no_more_clients_run_at_once_than_there_are_turns(
    program: Program, environment: dict[str, str], tmp_path: Path
) -> None:
    name = program(f"mkdir {tmp_path}/only || exit 1; sleep 0.02; rmdir {tmp_path}/only")
    turn = anyio.Semaphore(1)
    codes: list[int] = []

    async def one() -> None:
        codes.append((await call(name, environment, limiter=turn)).returncode)

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(one)
    assert codes == [0] * 8


async def test_given_descriptors_become_the_clients_own(program: Program, environment: dict[str, str]) -> None:
    reading, writing = os.pipe()
    nothing = os.open(os.devnull, os.O_RDONLY)
    finished = await call(program("echo out; echo err >&2"), environment, descriptors=(nothing, writing, writing))
    assert (finished.stdout, finished.stderr) == (b"", b"")
    assert os.read(reading, 100) == b"out\nerr\n"
    for descriptor in (reading, writing, nothing):
        os.close(descriptor)


async def test_hundreds_of_calls_leave_no_descriptor_and_no_zombie(environment: dict[str, str]) -> None:
    before = descriptors(), zombies()
    turn = anyio.Semaphore(4)

    async def one() -> None:
        assert (await run(["true"], what="`true`", env=environment, deadline_s=60, limiter=turn)).returncode == 0

    async with anyio.create_task_group() as tasks:
        for _ in range(200):
            tasks.start_soon(one)
    assert (descriptors(), zombies()) == before


async def test_a_call_costs_little_more_than_a_bare_spawn(environment: dict[str, str]) -> None:
    """A thread or a child watcher for every call would show here."""

    def bare() -> float:
        started = time.perf_counter()
        os.waitpid(os.posix_spawn("/bin/true", ["true"], environment), 0)
        return time.perf_counter() - started

    async def ours() -> float:
        started = time.perf_counter()
        await run(["/bin/true"], what="`true`", env=environment, deadline_s=10)
        return time.perf_counter() - started

    bare_s = sorted([bare() for _ in range(40)])[10]
    ours_s = sorted([await ours() for _ in range(40)])[10]
    assert ours_s < 3 * bare_s + 0.002


async def test_a_client_that_is_to_end_with_us_does_so_when_we_are_killed() -> None:
    """Who follows events writes nothing for hours, and would not notice that nobody reads them any more."""
    with followed() as ours:
        assert ours.stdout is not None
        pid = int(ours.stdout.readline())
        try:
            await until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "it runs")
            ours.kill()
            await until(lambda: is_gone(pid), "it has ended")
        finally:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
