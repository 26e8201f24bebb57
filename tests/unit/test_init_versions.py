"""Old inits and new ones, old daemons and new ones: each pair speaks the highest version that both know.

A sandbox keeps the init that it was made with, so a daemon that was upgraded meets those of all versions before it.
"""

import errno
import os
import socket

import pytest

from runtimes.init import wire
from runtimes.init.channel import InitChannel, RequestRefused, TerminalRefused
from runtimes.init.wire import CommandState, PtySize, Scope
from tests.unit.init_harness import DEADLINE_S, GOLDEN, Ends, old_init, running_init
from tests.unit.test_init_hostile_peers import Peer
from tests.unit.test_init_sockets import free_port

pytestmark = pytest.mark.anyio

OLD_VERSIONS = sorted(
    path.name.removeprefix("init-").removesuffix(".tar.xz") for path in GOLDEN.glob("init-*.tar.xz")
)
SPEAKS = {"0.3.0": 1}
"""The version of the protocol that an init of each old version speaks."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_each_old_init_that_is_kept_is_known() -> None:
    """One that is added without being listed would be tested for nothing."""
    assert SPEAKS.keys() == set(OLD_VERSIONS)


@pytest.mark.parametrize("version", OLD_VERSIONS)
async def test_an_old_init_does_all_that_it_could_do_when_it_was_new(version: str) -> None:
    """Its commands, files and sockets are somebody's, who has only upgraded the daemon."""
    async with running_init(program=old_init(version)) as host:
        assert (host.channel.hello.version, host.channel.hello.program) == (SPEAKS[version], version)
        assert await host.output("echo", "hello") == b"hello\n"
        command_id, _ = await host.spawn("sleep", "1000")
        (entry,) = [e for e in await host.channel.list_commands() if e.state is CommandState.RUNNING]
        assert entry.command_id == command_id
        await host.channel.signal(command_id, 15, Scope.TREE)
        assert (await host.ends.exited(command_id)).wait_status == 15
        await host.ends.gone(command_id)
        await host.channel.forget(command_id)
        files = await host.channel.open_files(b"/")
        assert (await files.stat(os.fsencode(host.folder))).target == b""
        files.close()
        port = free_port()
        with await host.channel.listen(port), await host.channel.dial(port) as dialled:
            assert dialled.type == socket.SOCK_STREAM


@pytest.mark.parametrize("version", [version for version in OLD_VERSIONS if SPEAKS[version] < wire.TERMINALS_VERSION])
async def test_an_old_init_is_not_asked_to_keep_a_terminal(version: str) -> None:
    """It would refuse the whole command; so the terminal is as it was then, and ends with the daemon."""
    async with running_init(program=old_init(version)) as host:
        command_id, spawned = await host.spawn("cat", pty=PtySize(24, 80), keep_pty=True)
        (entry,) = await host.channel.list_commands()
        assert not entry.terminal_kept
        with pytest.raises(TerminalRefused) as refused:
            await host.channel.take_terminal(command_id)
        assert refused.value.errno == errno.EOPNOTSUPP
        assert spawned.pty_fd is not None
        os.close(spawned.pty_fd)
        await host.ends.gone(command_id)


async def test_an_old_daemon_is_told_nothing_that_it_would_take_for_a_breach() -> None:
    """After a downgrade: version 1 knew no kept terminals, and refused flags that it did not know."""
    async with running_init() as host:
        kept, spawned = await host.spawn("cat", pty=PtySize(24, 80), keep_pty=True)
        peer = Peer(host, hello=False)
        with peer.socket:
            peer.send(wire.encode_hello(1, 1, 1))
            hello = peer.reply()[1]
            assert isinstance(hello, wire.HelloReply)
            assert hello.version == 1
            peer.send(wire.encode_list(2))
            page = peer.reply()[1]
            assert isinstance(page, wire.ListPage)
            assert [(entry.command_id, entry.terminal_kept) for entry in page.entries] == [(kept, False)]
            request = wire.SpawnRequest(
                command_id=9, argv=[b"true"], env=[], cwd=b"/", pty=PtySize(1, 1), keep_pty=True
            )
            peer.send(wire.encode_spawn(3, request))
            assert peer.reply() == (3, wire.Refused(errno.EBADMSG, wire.Stage.REQUEST))
            peer.send(wire.encode_terminal(4, kept))
            assert peer.reply() == (4, wire.Refused(errno.EOPNOTSUPP, wire.Stage.REQUEST))
        assert spawned.pty_fd is not None
        os.close(spawned.pty_fd)
        await host.kill_and_check(kept)


@pytest.mark.parametrize(("lowest", "highest", "agreed"), [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 9, 2), (2, 65535, 2)])
async def test_the_highest_that_both_speak_is_agreed_on(lowest: int, highest: int, agreed: int) -> None:
    async with running_init() as host:
        peer = Peer(host, hello=False)
        with peer.socket:
            peer.send(wire.encode_hello(7, lowest, highest))
            hello = peer.reply()[1]
            assert isinstance(hello, wire.HelloReply)
            assert hello.version == agreed


@pytest.mark.parametrize(("lowest", "highest"), [(3, 9), (0, 0), (2, 1)])
async def test_without_a_word_in_common_it_says_so(
    lowest: int, highest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the daemon hears why, instead of waiting."""
    plain = wire.encode_hello
    monkeypatch.setattr(wire, "encode_hello", lambda number: plain(number, lowest, highest))
    async with running_init(connected=False) as host:
        ends = Ends()
        with pytest.raises(RequestRefused) as refused:
            await InitChannel.connect(
                host.socket_path, timeout_s=DEADLINE_S, on_event=ends.on_event, on_closed=ends.on_closed
            )
        assert refused.value.errno == errno.EPROTONOSUPPORT
