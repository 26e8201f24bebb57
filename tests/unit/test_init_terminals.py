"""Terminals that init keeps for a daemon to come: they must not end with the one that is there."""

import asyncio
import contextlib
import errno
import os
import resource
import struct
import termios
from collections.abc import Iterator
from fcntl import ioctl

import pytest

from runtimes.init.channel import TerminalRefused
from runtimes.init.exchange import InitProtocolError
from runtimes.init.wire import CommandEntry, PtySize, Refused, SpawnRequest, Stage, encode_spawn
from tests.unit.init_harness import (
    Host,
    descriptor_count,
    devnull,
    open_descriptors,
    parent_of,
    running_init,
    state_of,
    until,
)
from tests.unit.test_init_channel import HELLO_2_BODY, fake_init, message
from tests.unit.test_init_hostile_peers import Peer

pytestmark = pytest.mark.anyio

SIZE = PtySize(24, 80)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.contextmanager
def owned(descriptor: int | None) -> Iterator[int]:
    assert descriptor is not None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def read_until(master: int, text: bytes) -> bytes:
    said = b""
    while text not in said:
        said += await asyncio.to_thread(os.read, master, 65536)
    return said


async def entry_of(host: Host, command_id: int) -> CommandEntry:
    (entry,) = [entry for entry in await host.channel.list_commands() if entry.command_id == command_id]
    return entry


async def test_a_terminal_goes_on_when_whoever_held_it_is_killed_and_another_takes_it() -> None:
    """The one that a person types into: a hangup would end vi and the shell around it."""
    async with running_init() as host:
        command_id, spawned = await host.shell("while read -r x; do echo got $x; done", pty=SIZE, keep_pty=True)
        with owned(spawned.pty_fd) as master:
            ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 44, 0, 0))
            os.write(master, b"one\n")
            await read_until(master, b"got one")
        host.channel.close()
        await host.connect()
        assert (await entry_of(host, command_id)).terminal_kept
        with owned(await host.channel.take_terminal(command_id)) as master:
            assert not os.get_inheritable(master)
            assert ioctl(master, termios.TIOCGWINSZ, bytes(8))[:4] == struct.pack("HH", 33, 44)
            os.write(master, b"two\n")
            await read_until(master, b"got two")
            with owned(await host.channel.take_terminal(command_id)) as again:
                os.write(again, b"\x04")
                assert (await host.ends.exited(command_id)).wait_status == 0


async def test_a_terminal_that_nobody_asked_to_keep_hangs_up() -> None:
    """Nobody would come back for it: what is attached to a caller ends with the caller."""
    async with running_init() as host:
        command_id, spawned = await host.spawn("cat", pty=SIZE)
        assert not (await entry_of(host, command_id)).terminal_kept
        with pytest.raises(TerminalRefused) as refused:
            await host.channel.take_terminal(command_id)
        assert refused.value.errno == errno.ENOTTY
        assert spawned.pty_fd is not None
        os.close(spawned.pty_fd)
        await host.ends.gone(command_id)


async def test_a_command_that_is_not_there_has_no_terminal() -> None:
    async with running_init() as host:
        with pytest.raises(TerminalRefused) as refused:
            await host.channel.take_terminal(77)
        assert refused.value.errno == errno.ENOENT


async def test_output_waits_in_the_terminal_for_whoever_comes_and_the_last_words_too() -> None:
    """Nobody reads while there is no daemon: a command writes as much as the kernel buffers, and then waits."""
    async with running_init() as host:
        chatty, spawned = await host.shell("seq 1 20000; echo end", pty=SIZE, keep_pty=True)
        brief, other = await host.shell("echo last words", pty=SIZE, keep_pty=True)
        for descriptor in (spawned.pty_fd, other.pty_fd):
            assert descriptor is not None
            os.close(descriptor)
        await host.ends.gone(brief)
        with owned(await host.channel.take_terminal(brief)) as master:
            assert b"last words" in await read_until(master, b"words")
        with owned(await host.channel.take_terminal(chatty)) as master:
            said = await read_until(master, b"end\r\n")
        assert said.replace(b"\r\n", b"\n") == b"".join(b"%d\n" % n for n in range(1, 20001)) + b"end\n"
        await host.ends.gone(chatty)


async def test_what_is_kept_goes_when_the_command_is_forgotten() -> None:
    async with running_init() as host:
        before = descriptor_count(host.process.pid)
        command_id, spawned = await host.spawn("cat", pty=SIZE, keep_pty=True)
        with owned(spawned.pty_fd):
            await until(lambda: descriptor_count(host.process.pid) == before + 1, "one copy is kept")
            await host.kill_and_check(command_id)
            await host.channel.forget(command_id)
            await until(lambda: descriptor_count(host.process.pid) == before, "nothing is kept")


async def test_a_terminal_whose_asker_went_before_the_answer_is_kept_all_the_same() -> None:
    """The daemon wrote the command down before it asked: the next one looks for it."""
    async with running_init() as host:
        request = SpawnRequest(command_id=5, argv=[b"cat"], env=host.env, cwd=b"/", pty=SIZE, keep_pty=True)
        peer = Peer(host)
        peer.send(encode_spawn(2, request))
        peer.socket.close()
        await until(lambda: len(host.marked()) == 1, "it runs")
        assert (await entry_of(host, 5)).terminal_kept
        with owned(await host.channel.take_terminal(5)) as master:
            os.write(master, b"\x04")
            await host.ends.gone(5)


async def held_by_a_worker(host: Host) -> int:
    """How many descriptors a file worker holds that starts now."""
    with contextlib.closing(await host.channel.open_files(b"/")) as files:
        await files.stat(b"/")  # it answers, so it has closed what is not its own
        (worker,) = host.file_workers()
        await until(lambda: state_of(worker) == "S", "it waits for a request")
        count = descriptor_count(worker)
    await until(lambda: not host.file_workers(), "the worker ends")
    return count


async def test_no_process_inside_holds_a_copy() -> None:
    """A keeper or a worker that held one could be a way to somebody else's keys, and would outlast a forget."""
    async with running_init() as host:
        before = await held_by_a_worker(host)
        first, spawned = await host.spawn("cat", pty=SIZE, keep_pty=True)
        with owned(spawned.pty_fd):
            second, other = await host.spawn("sleep", "1000")
            assert descriptor_count(parent_of(spawned.pid)) == 4
            assert descriptor_count(parent_of(other.pid)) == 4
            assert open_descriptors(spawned.pid).keys() == {0, 1, 2}
            assert await held_by_a_worker(host) == before
            await host.channel.kill(second)
            await host.ends.gone(second)
            await host.kill_and_check(first)


async def test_so_many_are_kept_that_init_has_descriptors_left() -> None:
    """With 64 for all, a quarter: what comes then runs as well, and ends with whoever holds it."""
    lowered = (64, 64)
    async with running_init(prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, lowered)) as host:
        masters = []
        ids = []
        for _ in range(17):
            command_id, spawned = await host.spawn("cat", pty=SIZE, keep_pty=True)
            ids.append(command_id)
            masters.append(spawned.pty_fd)
        entries = {entry.command_id: entry.terminal_kept for entry in await host.channel.list_commands()}
        assert [entries[command_id] for command_id in ids] == [True] * 16 + [False]
        for master in masters:
            assert master is not None
            os.close(master)
        await host.ends.gone(ids[16])
        for command_id in ids[:16]:
            await host.channel.kill(command_id)
            await host.ends.gone(command_id)


async def test_only_a_terminal_can_be_kept() -> None:
    """A request that asks for it without one is a mistake of ours."""
    async with running_init() as host:
        with devnull() as null:
            request = SpawnRequest(command_id=5, argv=[b"true"], env=[], cwd=b"/", pty=SIZE, keep_pty=True)
            encoded = bytearray(encode_spawn(9, request))
            encoded[16] = 4
            peer = Peer(host)
            with peer.socket:
                peer.send(bytes(encoded), [null, null, null])
                assert peer.reply() == (9, Refused(errno.EBADMSG, Stage.REQUEST))


async def test_what_is_no_terminal_is_not_taken_for_one() -> None:
    """Init is not trusted: its descriptor would be read from and written to."""
    async with fake_init(HELLO_2_BODY) as (fake, channel, ends):
        asking = asyncio.ensure_future(channel.take_terminal(3))
        request_id = await fake.heard()
        with devnull() as null:
            fake.say(message(0x8007, request_id), [null])
            with pytest.raises(InitProtocolError):
                await asking
        assert isinstance(await ends.closed, InitProtocolError)
