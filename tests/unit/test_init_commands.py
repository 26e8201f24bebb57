"""What init does with commands, on a real init that was built with sanitizers and runs on the host."""

import asyncio
import contextlib
import errno
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from fcntl import ioctl

import pytest

from runtimes.init.channel import InitChannel, RequestRefused, SpawnFailed
from runtimes.init.wire import CommandState, PtySize, Rlimit, Scope, SpawnRequest, Stage
from tests.unit.init_harness import (
    DEADLINE_S,
    Ends,
    Host,
    descriptor_count,
    open_descriptors,
    parent_of,
    running_init,
    sanitized_init,
    stat_of,
    state_of,
    status_of,
    storm,
    until,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def entry_states(host: Host) -> dict[int, CommandState]:
    return {entry.command_id: entry.state for entry in await host.channel.list_commands()}


# ---- starting


async def test_a_command_runs_and_its_end_is_told() -> None:
    async with running_init() as host:
        command_id, spawned = await host.spawn("true")
        exited = await host.ends.exited(command_id)
        gone = await host.ends.gone(command_id)
        assert spawned.pid > 1
        assert exited.wait_status == 0
        assert not gone.keeper_lost
        assert host.ends.log == [exited, gone]


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7 << 8), ("kill -TERM $$", 15), ("kill -SEGV $$", 11)])
async def test_the_wait_status_is_the_kernels(script: str, status: int) -> None:
    """The verdict of an end record is derived from it: 128+n from a shell would be a guess."""
    async with running_init() as host:
        command_id, _ = await host.shell(f"ulimit -c 0; {script}")
        assert (await host.ends.exited(command_id)).wait_status == status


async def test_the_environment_is_exactly_what_was_asked_for() -> None:
    async with running_init() as host:
        env = [b"ONE=1", b"TWO=a=b\xff", b"PATH=/usr/bin:/bin"]
        assert (await host.output("env", "-0", env=env)).split(b"\0")[:-1] == env


async def test_a_command_inherits_three_descriptors_and_no_other() -> None:
    """Anything else would be init's socket, its pipe, or another command's files."""
    async with running_init() as host:
        read, write = os.pipe()
        command_id, spawned = await host.spawn("sleep", "1000", stdin=read, stdout=write)
        passed = open_descriptors()
        os.close(read)
        os.close(write)
        three = {0: passed[read], 1: passed[write], 2: passed[write]}
        # An exec lets its parent go on before it has closed what it is to close.
        await until(lambda: open_descriptors(spawned.pid) == three, "it has three and no other")
        await host.kill_and_check(command_id)


async def test_a_pipe_ends_when_the_command_ends_it() -> None:
    """Neither init nor the keeper may hold a command's descriptors open."""
    async with running_init() as host:
        read, write = os.pipe()
        command_id, _ = await host.shell("echo said; exec >/dev/null 2>&1; exec sleep 1000", stdout=write)
        os.close(write)
        assert await asyncio.to_thread(os.read, read, 100) == b"said\n"
        assert await asyncio.to_thread(os.read, read, 100) == b""
        os.close(read)
        await host.kill_and_check(command_id)


async def test_signals_are_as_in_a_fresh_process_and_the_session_is_its_own() -> None:
    """Init blocks every signal; a command that inherited that could not be interrupted."""
    async with running_init() as host:
        command_id, spawned = await host.spawn("sleep", "1000")
        status = status_of(spawned.pid)
        assert int(status["SigBlk"], 16) == int(status["SigIgn"], 16) == int(status["SigCgt"], 16) == 0
        assert stat_of(spawned.pid)[2:4] == [str(spawned.pid), str(spawned.pid)]
        await host.kill_and_check(command_id)


async def test_resource_limits_are_set() -> None:
    async with running_init() as host:
        rlimits = (Rlimit(resource.RLIMIT_NOFILE, 17, 23), Rlimit(resource.RLIMIT_CORE, 0, 0))
        said = await host.output("sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c", rlimits=rlimits)
        assert said.split() == [b"17", b"23", b"0"]


async def test_the_working_directory_is_set() -> None:
    async with running_init() as host:
        assert await host.output("pwd", cwd=b"/usr/bin") == b"/usr/bin\n"


async def test_what_a_command_used_is_measured() -> None:
    async with running_init() as host:
        command_id, _ = await host.shell("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
        usage = (await host.ends.exited(command_id)).usage
        assert usage.utime_us + usage.stime_us > 10_000
        assert usage.maxrss_kib > 500
        assert usage.wall_us >= (usage.utime_us + usage.stime_us) * 0.9


async def test_the_largest_request_arrives_whole() -> None:
    """One datagram of 192 KiB, in one piece, on default socket buffers."""
    async with running_init() as host:
        env = [*host.env, *(f"V{n}=".encode() + b"x" * 90_000 for n in range(2))]
        assert len(await host.output("env", env=env)) == sum(map(len, env)) + len(env)


@pytest.mark.parametrize(
    ("argv", "cwd", "rlimits", "failure"),
    [
        (["/no/such/program"], b"/", (), (errno.ENOENT, Stage.EXEC)),
        (["no-such-program"], b"/", (), (errno.ENOENT, Stage.EXEC)),
        ([""], b"/", (), (errno.ENOENT, Stage.EXEC)),
        (["/etc/passwd"], b"/", (), (errno.EACCES, Stage.EXEC)),
        (["/usr/bin"], b"/", (), (errno.EACCES, Stage.EXEC)),
        (["true"], b"/no/such/folder", (), (errno.ENOENT, Stage.CHDIR)),
        (["true"], b"/etc/passwd", (), (errno.ENOTDIR, Stage.CHDIR)),
        (["true"], b"/", (Rlimit(999, 1, 1),), (errno.EINVAL, Stage.RLIMIT)),
        (["true"], b"/", (Rlimit(resource.RLIMIT_NOFILE, 2, 1),), (errno.EINVAL, Stage.RLIMIT)),
    ],
)
async def test_a_command_that_cannot_start_says_where_and_why(
    argv: list[str], cwd: bytes, rlimits: tuple[Rlimit, ...], failure: tuple[int, Stage]
) -> None:
    """126 or 127 from a wrapper would look like the command's own exit."""
    async with running_init() as host:
        with pytest.raises(SpawnFailed) as caught:
            await host.spawn(*argv, cwd=cwd, rlimits=rlimits)
        assert (caught.value.errno, caught.value.stage) == failure
        assert await host.channel.list_commands() == []


async def test_an_id_in_use_is_refused_even_after_the_end() -> None:
    """A daemon that asks twice after a timeout must not start a command twice."""
    async with running_init() as host:
        command_id, _ = await host.spawn("true")
        await host.ends.gone(command_id)
        host._last_id -= 1
        with pytest.raises(SpawnFailed) as caught:
            await host.spawn("true")
        assert (caught.value.errno, caught.value.stage) == (errno.EEXIST, Stage.ADMIT)


async def test_two_hundred_commands_at_once_all_end_as_they_should() -> None:
    async with running_init() as host:
        started = await asyncio.gather(*(host.shell(f"exit {n % 256}") for n in range(200)))
        ids = [command_id for command_id, _ in started]
        ends = await asyncio.gather(*map(host.ends.exited, ids))
        await asyncio.gather(*map(host.ends.gone, ids))
        assert [end.wait_status for end in ends] == [n << 8 for n in range(200)]
        await asyncio.gather(*map(host.channel.forget, ids))
        assert await host.channel.list_commands() == []


# ---- terminals


@contextlib.contextmanager
def owned(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def test_a_pty_is_the_controlling_terminal_with_the_size_asked_for() -> None:
    async with running_init() as host:
        command_id, spawned = await host.shell(
            "tty; stty size; ps -o tty= -p $$; read x; stty size; echo got $x", pty=PtySize(50, 132)
        )
        assert spawned.pty_fd is not None
        with owned(spawned.pty_fd) as master:
            assert not os.get_inheritable(master)
            said = b""
            while said.count(b"\n") < 3:
                said += await asyncio.to_thread(os.read, master, 4096)
            name, size, session_terminal = said.split(b"\r\n")[:3]
            assert name == b"/dev/" + session_terminal.strip()
            assert size == b"50 132"
            ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 20, 0, 0))
            os.write(master, b"line\n")
            while b"got line\r\n" not in said:
                said += await asyncio.to_thread(os.read, master, 4096)
            assert b"10 20\r\n" in said
            await host.ends.gone(command_id)


async def test_an_interrupt_typed_at_the_terminal_reaches_the_command() -> None:
    async with running_init() as host:
        command_id, spawned = await host.spawn("cat", pty=PtySize(24, 80))
        assert spawned.pty_fd is not None
        with owned(spawned.pty_fd) as master:
            assert open_descriptors(spawned.pid).keys() == {0, 1, 2}
            os.write(master, b"\x03")
            assert (await host.ends.exited(command_id)).wait_status == signal.SIGINT


# ---- signals


async def test_a_signal_to_the_main_process_spares_its_children() -> None:
    async with running_init() as host:
        command_id, _ = await host.shell("sleep 1000 & exec sleep 1000")
        await until(lambda: len(host.marked()) == 2, "both run")
        await host.channel.signal(command_id, signal.SIGTERM, Scope.MAIN)
        assert (await host.ends.exited(command_id)).wait_status == signal.SIGTERM
        assert len(host.marked()) == 1
        with pytest.raises(RequestRefused) as caught:
            await host.channel.signal(command_id, signal.SIGTERM, Scope.MAIN)
        assert caught.value.errno == errno.ESRCH
        await host.kill_and_check(command_id)


async def test_a_signal_to_the_group_spares_who_left_it_and_works_after_the_leader_ended() -> None:
    async with running_init() as host:
        command_id, _ = await host.shell("setsid sleep 1000 & sleep 1000 & exec true")
        await host.ends.exited(command_id)
        await until(lambda: len([pid for pid in host.marked() if _is_sleep(pid)]) == 2, "both sleep")
        await host.channel.signal(command_id, signal.SIGTERM, Scope.GROUP)
        await until(lambda: len(host.marked()) == 1, "one is left")
        await host.kill_and_check(command_id)


async def test_a_signal_to_the_tree_reaches_who_left_the_group() -> None:
    async with running_init() as host:
        command_id, _ = await host.shell("setsid sleep 1000 & sleep 1000 & wait")
        await until(lambda: len([pid for pid in host.marked() if _is_sleep(pid)]) == 2, "both sleep")
        await host.channel.signal(command_id, signal.SIGTERM, Scope.TREE)
        await host.ends.gone(command_id)
        assert host.marked() == []


def _is_sleep(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read() == "sleep\n"
    except OSError:
        return False


async def test_a_signal_that_does_not_exist_is_refused() -> None:
    async with running_init() as host:
        command_id, _ = await host.spawn("sleep", "1000")
        for number in (0, 65):
            with pytest.raises(RequestRefused) as caught:
                await host.channel.signal(command_id, number, Scope.TREE)
            assert caught.value.errno == errno.EBADMSG
        await host.kill_and_check(command_id)


# ---- killing

SLEEPERS = {
    "the command": ("exec sleep 1000", 1),
    "a child": ("sleep 1000", 2),
    "a grandchild": ("sh -c 'sleep 1000; true'; true", 3),
    "another session": ("setsid sleep 1000 & wait", 2),
    "a double fork": ("(setsid sh -c 'sleep 1000 & sleep 1000; true' &) & exec sleep 1000", 4),
    "who ignores TERM": ("trap '' TERM HUP INT; sleep 1000 & sleep 1000; true", 3),
    "who is stopped": ("sleep 1000 & kill -STOP $!; setsid sh -c 'kill -STOP $$' & wait", 3),
    "orphans of an ended command": ("sleep 1000 & setsid sleep 1000 & exec true", 2),
}


@pytest.mark.parametrize("who", SLEEPERS)
async def test_a_kill_leaves_nobody(who: str) -> None:
    """Everything that descends from a command, wherever it fled; gone means gone."""
    script, count = SLEEPERS[who]
    async with running_init() as host:
        command_id, _ = await host.shell(script)
        other_id, other = await host.spawn("sleep", "1000", env=[])
        await until(lambda: len(host.marked()) >= count, "all run")
        await host.kill_and_check(command_id)
        assert state_of(other.pid) == "S", "another command was hit"
        await host.kill_and_check(other_id)


@pytest.mark.parametrize(("kind", "total"), [("swarm", 300), ("comet", 100_000)])
async def test_a_kill_outruns_a_storm_of_forks(kind: str, total: int) -> None:
    """Each process makes a session of its own, so no single signal reaches two of them."""
    async with running_init() as host:
        command_id, spawned = await host.spawn(storm(), kind, str(total))
        await until(lambda: len(host.marked()) > 50 or (kind == "comet" and not stat_of(spawned.pid)), "it storms")
        await host.kill_and_check(command_id)


async def test_a_kill_can_be_repeated_and_asked_for_after_the_end() -> None:
    async with running_init() as host:
        command_id, _ = await host.spawn("sleep", "1000")
        await asyncio.gather(host.channel.kill(command_id), host.channel.kill(command_id))
        await host.ends.gone(command_id)
        await host.channel.kill(command_id)
        assert len(host.ends.log) == 2


async def test_a_kill_is_over_when_the_keeper_is_gone_too() -> None:
    """It lives in the sandbox's control group: whoever counts the processes there right after a kill counts it."""
    async with running_init() as host:
        for _ in range(200):
            command_id, spawned = await host.spawn("sleep", "1000")
            keeper = parent_of(spawned.pid)
            await host.channel.kill(command_id)
            assert not (await host.ends.gone(command_id)).keeper_lost
            assert not stat_of(keeper)


async def test_a_kill_that_comes_before_the_command_exists_still_kills_it() -> None:
    """The first wave finds nobody below a keeper that has not started it yet: others have to follow."""
    async with running_init() as host:
        for _ in range(20):
            starting = asyncio.ensure_future(host.spawn("sleep", "1000"))
            await asyncio.sleep(0)  # the request is sent
            await host.kill_and_check(host._last_id)
            command_id, _ = await starting
            assert (await host.ends.exited(command_id)).wait_status == signal.SIGKILL


async def test_a_chain_of_processes_deeper_than_a_pass_is_killed() -> None:
    async with running_init() as host:
        script = 'd=$1; if [ $d -gt 0 ]; then setsid sh -c "$2" sh $((d-1)) "$2" & wait; else sleep 1000; fi'
        command_id, _ = await host.spawn("sh", "-c", script, "sh", "60", script)
        await until(lambda: any(_is_sleep(pid) for pid in host.marked()), "the last one runs")
        await host.kill_and_check(command_id)


# ---- keepers under attack


async def test_a_killed_keeper_takes_its_command_with_it_and_nobody_else() -> None:
    """A command may kill its keeper, it has the same uid; what it cannot do is to run on unseen."""
    async with running_init() as host:
        command_id, spawned = await host.shell("setsid sleep 1000 & sleep 1000")
        other_id, other = await host.spawn("sleep", "1000", env=[])
        await until(lambda: len(host.marked()) == 3, "all run")
        os.kill(parent_of(spawned.pid), signal.SIGKILL)
        exited = await host.ends.exited(command_id)
        gone = await host.ends.gone(command_id)
        assert gone.keeper_lost
        assert exited.wait_status == signal.SIGKILL
        assert host.marked() == []
        assert state_of(other.pid) == "S"
        assert (await entry_states(host))[command_id] == CommandState.GONE
        await host.kill_and_check(other_id)


async def test_a_keeper_killed_after_the_main_process_ended_leaves_nobody() -> None:
    async with running_init() as host:
        command_id, _ = await host.shell("setsid sleep 1000 & exec true")
        await host.ends.exited(command_id)
        await until(lambda: any(_is_sleep(pid) for pid in host.marked()), "the child runs")
        os.kill(parent_of(host.marked()[0]), signal.SIGKILL)
        assert (await host.ends.gone(command_id)).keeper_lost
        assert host.marked() == []


async def test_a_stopped_keeper_is_continued() -> None:
    async with running_init() as host:
        command_id, spawned = await host.spawn("sleep", "1000")
        keeper = parent_of(spawned.pid)
        os.kill(keeper, signal.SIGSTOP)
        os.kill(spawned.pid, signal.SIGTERM)
        assert (await host.ends.exited(command_id)).wait_status == signal.SIGTERM
        assert not (await host.ends.gone(command_id)).keeper_lost


async def test_a_keeper_that_is_stopped_over_and_over_is_given_up() -> None:
    async with running_init() as host:
        command_id, spawned = await host.spawn("sleep", "1000")
        keeper = parent_of(spawned.pid)

        def stop_again() -> bool:
            try:
                os.kill(keeper, signal.SIGSTOP)
            except ProcessLookupError:
                return True
            return False

        await until(stop_again, "the keeper is killed")
        assert (await host.ends.gone(command_id)).keeper_lost
        assert host.marked() == []


async def test_the_keeper_holds_no_descriptor_but_its_report() -> None:
    """One that kept a connection open would hide its end from the daemon."""
    async with running_init() as host:
        command_id, spawned = await host.spawn("sleep", "1000")
        keeper = parent_of(spawned.pid)
        assert descriptor_count(keeper) == 4
        await host.kill_and_check(command_id)


ATTACKS = {
    "prlimit": "resource.prlimit(init, resource.RLIMIT_CPU, (1, 1))",
    "setpriority": "os.setpriority(os.PRIO_PROCESS, init, 19)",
    "setpriority of a user": "os.setpriority(os.PRIO_USER, 0, os.getpriority(os.PRIO_USER, 0))",
    "sched_setaffinity": "os.sched_setaffinity(init, {0})",
    "sched_setscheduler": "os.sched_setscheduler(init, os.SCHED_IDLE, os.sched_param(0))",
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_command_cannot_lower_the_limits_or_the_share_of_init(attack: str) -> None:
    """The kernel allows it to the same uid: RLIMIT_CPU alone would end init, and the sandbox with it."""
    async with running_init() as host:
        script = f"import os, resource, sys; init = int(sys.argv[1]); {ATTACKS[attack]}"
        said = await host.output(sys.executable, "-c", script, str(host.process.pid))
        assert b"PermissionError" in said


async def test_a_command_can_still_set_its_own_limits_and_priority() -> None:
    async with running_init() as host:
        script = (
            "import os, resource; resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE, (5, 5)); "
            "os.setpriority(os.PRIO_PROCESS, 0, 5); os.sched_setaffinity(os.getpid(), {0}); print('done')"
        )
        assert await host.output(sys.executable, "-c", script) == b"done\n"


# ---- the table


async def test_ended_commands_are_kept_until_they_are_forgotten() -> None:
    """A daemon that was away learns of the ends that it missed."""
    async with running_init() as host:
        ended, _ = await host.shell("exit 3")
        running, spawned = await host.spawn("sleep", "1000")
        await host.ends.gone(ended)
        nonce = host.channel.hello.nonce
        host.channel.close()
        assert await host.ends.closed is None
        await host.connect()
        assert host.channel.hello.nonce == nonce
        assert host.channel.hello.commands == 2
        first, second = await host.channel.list_commands()
        assert (first.command_id, first.state, first.wait_status) == (ended, CommandState.GONE, 3 << 8)
        assert (second.command_id, second.state, second.pid) == (running, CommandState.RUNNING, spawned.pid)
        with pytest.raises(RequestRefused) as caught:
            await host.channel.forget(running)
        assert caught.value.errno == errno.EBUSY
        await host.channel.forget(ended)
        with pytest.raises(RequestRefused) as caught:
            await host.channel.forget(ended)
        assert caught.value.errno == errno.ENOENT
        await host.kill_and_check(running)


async def test_a_full_table_refuses_and_forgets_nothing() -> None:
    async with running_init() as host:
        limit = host.channel.hello.commands_max
        for _ in range(0, limit, 64):
            started = await asyncio.gather(*(host.spawn("/bin/true") for _ in range(64)))
            await asyncio.gather(*(host.ends.gone(command_id) for command_id, _ in started))
        with pytest.raises(SpawnFailed) as caught:
            await host.spawn("true")
        assert (caught.value.errno, caught.value.stage) == (errno.ENOSPC, Stage.ADMIT)
        listed = await host.channel.list_commands()
        assert [entry.command_id for entry in listed] == list(range(1, limit + 1))
        await host.channel.forget(limit // 2)
        await host.spawn("true")


async def test_every_connection_hears_of_an_end() -> None:
    async with running_init() as host:
        others = [Ends() for _ in range(3)]
        channels = [
            await InitChannel.connect(
                host.socket_path, timeout_s=DEADLINE_S, on_event=ends.on_event, on_closed=ends.on_closed
            )
            for ends in others
        ]
        command_id, _ = await host.spawn("true")
        for ends in [host.ends, *others]:
            await ends.gone(command_id)
        for channel in channels:
            channel.close()


async def test_a_command_outlives_the_connection_that_started_it() -> None:
    async with running_init() as host:
        with tempfile.TemporaryFile() as file:
            request = SpawnRequest(command_id=99, argv=[b"sleep", b"1000"], env=host.env, cwd=b"/")
            asking = asyncio.ensure_future(host.channel.spawn(request, (file.fileno(),) * 3))
            await asyncio.sleep(0)  # the request is sent; the answer cannot have been read yet
            host.channel.close()
            with pytest.raises(Exception, match="closed"):
                await asking
        await host.connect()
        await until(lambda: len(host.marked()) == 1, "it runs")
        assert 99 in await entry_states(host)
        await host.kill_and_check(99)


# ---- the end


async def test_a_term_ends_everything_within_a_second() -> None:
    """`docker stop` waits for ten seconds and then kills; nobody wants to wait."""
    async with running_init() as host:
        await host.shell("trap '' TERM; setsid sleep 1000 & sleep 1000; sleep 1000; true")
        await host.spawn("sleep", "1000")
        await until(lambda: len([pid for pid in host.marked() if _is_sleep(pid)]) == 3, "all sleep")
        loop = asyncio.get_running_loop()
        began = loop.time()
        host.process.send_signal(signal.SIGTERM)
        await until(lambda: host.process.poll() is not None, "init ends")
        assert loop.time() - began < 1.5  # 0.8 s by its own clock, and the machine's load
        assert host.process.returncode == 0
        assert host.marked() == []


async def test_an_idle_init_is_not_woken_by_itself() -> None:
    """A hundred idle sandboxes must cost nothing: no timers, one poll."""
    async with running_init() as host:
        command_id, _ = await host.spawn("sleep", "1000")
        await until(lambda: state_of(host.process.pid) == "S", "init waits")
        before = status_of(host.process.pid)["voluntary_ctxt_switches"]
        await asyncio.to_thread(subprocess.run, ["sleep", "0.3"], check=True)
        assert status_of(host.process.pid)["voluntary_ctxt_switches"] == before
        await host.kill_and_check(command_id)


def test_it_refuses_to_run_where_it_is_not_pid_1() -> None:
    """As a plain process it would neither protect its commands nor reap them."""
    done = subprocess.run([sanitized_init(), "/tmp"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not PID 1" in done.stderr


def test_it_says_its_version() -> None:
    done = subprocess.run([sanitized_init(), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sandbox-init", "0.4.0", "protocol", "2"]
