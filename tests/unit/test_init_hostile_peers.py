"""What init does with peers that break the rules: it answers or drops them, and serves the others."""

import asyncio
import contextlib
import errno
import os
import random
import resource
import signal
import socket
import struct
from array import array
from collections.abc import Iterator, Sequence

import pytest

from runtimes.init import wire
from runtimes.init.channel import RequestRefused, SpawnFailed
from runtimes.init.wire import PtySize, Refused, Scope, Stage
from tests.unit.init_harness import DEADLINE_S, Host, descriptor_count, devnull, running_init, until

pytestmark = pytest.mark.anyio
CONNECTIONS_MAX = 8
SPAWN = wire.SpawnRequest(command_id=1, argv=[b"/bin/true"], env=[b"A=1"], cwd=b"/", rlimits=[wire.Rlimit(4, 0, 0)])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Peer:
    """A connection without manners."""

    def __init__(self, host: Host, *, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(host.socket_path)
        if hello:
            self.send(wire.encode_hello(1))
            assert isinstance(self.reply()[1], wire.HelloReply)

    def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([message], rights)

    def reply(self) -> tuple[int, wire.Reply | wire.Event]:
        return wire.decode_message(self.socket.recv(65536))

    def is_dropped(self) -> bool:
        try:
            return self.socket.recv(65536) == b""
        except ConnectionResetError:
            return True


@contextlib.contextmanager
def peer_of(host: Host, *, hello: bool = True) -> Iterator[Peer]:
    peer = Peer(host, hello=hello)
    with peer.socket:
        yield peer


async def assert_serves(host: Host) -> None:
    command_id, _ = await host.spawn("true")
    await host.ends.gone(command_id)
    await host.channel.forget(command_id)


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        b"SB\x01\x00\x01\x00\x00",
        bytes(8),
        b"XX\x01\x00\x01\x00\x00\x00",
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(196609),
    ],
)
async def test_a_message_without_a_header_ends_the_connection(message: bytes) -> None:
    """Who cannot say what he wants cannot be answered either: there is no request id."""
    async with running_init() as host:
        with peer_of(host) as peer:
            peer.send(message)
            assert peer.is_dropped()
        await assert_serves(host)


def bodies() -> Iterator[tuple[bytes, int]]:
    """Messages with a good header and something wrong behind it, and the errno that answers them."""
    spawn = wire.encode_spawn(7, SPAWN)
    for end in range(8, len(spawn), 5):
        yield spawn[:end], errno.EBADMSG
    yield spawn + b"\0", errno.EBADMSG
    for whole in (wire.encode_kill(7, 1), wire.encode_forget(7, 1), wire.encode_list(7), wire.encode_terminal(7, 1)):
        yield whole[:-1], errno.EBADMSG
        yield whole + b"\0", errno.EBADMSG
    yield wire.encode_hello(7)[:-1], errno.EBADMSG
    yield wire.encode_hello(7) + b"\0", errno.EBADMSG
    yield wire.encode_signal(7, 1, 9, Scope.TREE)[:-1], errno.EBADMSG
    yield struct.pack("<HHIQII", wire.MAGIC, 3, 7, 1, 9, 3), errno.EBADMSG
    yield struct.pack("<HHIQII", wire.MAGIC, 3, 7, 1, 2**31, 0), errno.EBADMSG
    yield struct.pack("<HHIQ", wire.MAGIC, 4, 7, 2**63), errno.EBADMSG
    yield struct.pack("<HHI", wire.MAGIC, 0x13, 7), errno.EOPNOTSUPP
    for kind in (wire.MessageType.LISTEN, wire.MessageType.DIAL):
        for flags, port, zero in ((2, 80, 0), (0, 0, 0), (0, 80, 1)):
            yield struct.pack("<HHIIHH", wire.MAGIC, kind, 7, flags, port, zero), errno.EBADMSG
        yield struct.pack("<HHII", wire.MAGIC, kind, 7, 0), errno.EBADMSG
    yield wire.encode_files(7)[:-1], errno.EBADMSG
    yield struct.pack("<HHII", wire.MAGIC, 0x10, 7, 1), errno.EBADMSG
    yield struct.pack("<HHI", wire.MAGIC, 0x8001, 7), errno.EOPNOTSUPP
    yield wire.encode_hello(7, 3, 9), errno.EPROTONOSUPPORT
    yield wire.encode_kill(7, 12345), errno.ENOENT
    yield wire.encode_forget(7, 12345), errno.ENOENT
    yield wire.encode_terminal(7, 12345), errno.ENOENT
    yield wire.encode_signal(7, 12345, 9, Scope.TREE), errno.ENOENT


async def test_a_request_that_is_not_understood_is_answered_and_the_connection_goes_on() -> None:
    """A newer daemon asks for what an older init does not know, and must learn just that."""
    async with running_init() as host:
        with peer_of(host) as peer:
            for message, expected in bodies():
                peer.send(message, (0, 1, 2) if message[2] == wire.MessageType.SPAWN else ())
                request_id, answer = peer.reply()
                assert request_id == 7, message
                assert isinstance(answer, Refused), message
                assert answer.errno == expected, message
        assert await host.channel.list_commands() == []


async def test_nothing_is_served_before_hello() -> None:
    async with running_init() as host:
        with peer_of(host, hello=False) as peer:
            peer.send(wire.encode_list(3))
            assert peer.reply() == (3, Refused(errno.EPROTO, Stage.REQUEST))


@pytest.mark.parametrize("count", [1, 2, 4, 16, 17, 253])
async def test_descriptors_that_do_not_belong_are_closed_at_once(count: int) -> None:
    """Each one kept would be a step towards an init that cannot open anything."""
    async with running_init() as host:
        before = descriptor_count(host.process.pid)
        with peer_of(host) as peer, devnull() as null:
            held = descriptor_count(host.process.pid)
            for message in (wire.encode_spawn(5, SPAWN), wire.encode_list(5), wire.encode_hello(5)):
                peer.send(message, [null] * count)
                assert peer.reply() == (5, Refused(errno.EBADMSG, Stage.DESCRIPTORS))
            await until(lambda: descriptor_count(host.process.pid) == held, "all is closed")
            peer.send(b"garbage", [null] * count)
            assert peer.is_dropped()
        await until(lambda: descriptor_count(host.process.pid) == before, "all is closed")


async def test_an_init_without_descriptors_says_so_and_still_kills() -> None:
    """What must never fail for want of anything is the kill."""
    async with running_init() as host:
        command_id, _ = await host.shell("setsid sleep 1000 & trap '' TERM; sleep 1000; true")
        await until(lambda: len(host.marked()) == 3, "all run")
        limits = resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE)
        full = descriptor_count(host.process.pid)
        resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE, (full, limits[1]))
        with pytest.raises(SpawnFailed) as caught:
            await host.spawn("true")
        assert (caught.value.errno, caught.value.stage) == (errno.EMFILE, Stage.DESCRIPTORS)
        with pytest.raises(SpawnFailed) as caught:
            await host.spawn("true", pty=PtySize(1, 1))
        assert (caught.value.errno, caught.value.stage) == (errno.EMFILE, Stage.PTY)
        await host.kill_and_check(command_id)
        waiting = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with waiting:
            waiting.connect(host.socket_path)
            resource.prlimit(host.process.pid, resource.RLIMIT_NOFILE, limits)
            waiting.send(wire.encode_hello(1))
            waiting.settimeout(DEADLINE_S)
            assert isinstance(wire.decode_message(waiting.recv(4096))[1], wire.HelloReply)
        await assert_serves(host)


def stuff(peer: Peer) -> int:
    """Asks without reading until init no longer takes anything; how many requests that took."""
    peer.socket.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            peer.send(wire.encode_list(sent + 1))
            sent += 1
    return sent


async def test_a_peer_that_never_reads_holds_up_nobody_and_loses_nothing_if_it_reads_at_last() -> None:
    async with running_init() as host:
        ids = [(await host.spawn("true"))[0] for _ in range(60)]
        with peer_of(host) as peer:
            sent = 0
            while (more := await asyncio.to_thread(stuff, peer)) > 0:
                sent += more
                await assert_serves(host)
            ids += [(await host.spawn("true"))[0] for _ in range(20)]
            await asyncio.gather(*map(host.ends.gone, ids))
            peer.socket.settimeout(DEADLINE_S)
            replies, gone = 0, set[int]()
            while replies < sent or not gone >= set(ids[60:]):
                request_id, message = await asyncio.to_thread(peer.reply)
                if isinstance(message, wire.Gone):
                    gone.add(message.command_id)
                elif request_id:
                    replies += 1
            assert sent > 60


async def test_places_are_bounded_and_a_peer_that_never_reads_has_to_leave_first() -> None:
    async with running_init() as host, contextlib.AsyncExitStack() as stack:
        for _ in range(60):
            await host.spawn("true")
        peers = [stack.enter_context(peer_of(host)) for _ in range(CONNECTIONS_MAX - 1)]
        with peer_of(host, hello=False) as surplus:
            assert surplus.is_dropped()
        while await asyncio.to_thread(stuff, peers[3]) > 0:
            pass
        with peer_of(host) as surplus:
            surplus.send(wire.encode_kill(9, 12345))
            assert surplus.reply()[0] == 9
        await assert_serves(host)


async def test_a_peer_that_leaves_in_the_middle_of_a_spawn_leaves_nothing_open() -> None:
    async with running_init() as host:
        before = descriptor_count(host.process.pid)
        for n in range(50):
            with peer_of(host) as peer:
                request = wire.SpawnRequest(
                    command_id=1000 + n, argv=[b"/bin/true"], env=[], cwd=b"/", pty=PtySize(1, 1)
                )
                peer.send(wire.encode_spawn(1, request))
        await until(lambda: descriptor_count(host.process.pid) == before, "all is closed")
        await assert_serves(host)


async def test_a_stale_socket_is_replaced_and_a_renamed_one_still_serves() -> None:
    """The daemon moves the socket to where nothing inside of the sandbox can reach it."""
    async with running_init() as host:
        moved = host.socket_path + ".moved"
        os.rename(host.socket_path, moved)
        host.channel.close()
        host.socket_path = moved
        await host.connect()
        await assert_serves(host)


def mutated(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """A valid message with a few things changed, or none of the kind."""
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(1, 200))
    message = bytearray(chance.choice(seeds))
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(message))
        match chance.randrange(5):
            case 0:
                message[at] = chance.randrange(256)
            case 1:
                message[at] ^= 1 << chance.randrange(8)
            case 2:
                del message[at + 1 :]
            case 3:
                message[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                message[at : at + 4] = chance.choice(
                    (bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f")
                )
    return bytes(message)


def fuzz_seeds(chance: random.Random) -> list[bytes]:
    size = PtySize(24, 80)
    spawns = [
        wire.SpawnRequest(command_id=n, argv=[b"/bin/true", b"x"], env=[b"A=1"], cwd=b"/", pty=pty)
        for n, pty in ((1, None), (2, size), (chance.randrange(2**63), None), (chance.randrange(2**63), size))
    ]
    return [
        *(wire.encode_spawn(7, request) for request in [SPAWN, *spawns]),
        wire.encode_hello(7),
        wire.encode_list(7),
        wire.encode_files(7),
        *(encode(7, 47213, ipv6=v6) for encode in (wire.encode_listen, wire.encode_dial) for v6 in (False, True)),
        *(wire.encode_signal(7, n, signal.SIGTERM, scope) for n in (1, 2) for scope in Scope),
        *(encode(7, n) for encode in (wire.encode_kill, wire.encode_forget) for n in (1, 2)),
    ]


class Fuzzer:
    """One peer that says mutated things, and holds init to the format in what it answers."""

    def __init__(self, host: Host, seed: int) -> None:
        self.host = host
        self.chance = random.Random(seed)
        self.peer = Peer(host)
        self.answers = 0
        self.null = os.open("/dev/null", os.O_RDWR)

    def step(self) -> None:
        message = mutated(fuzz_seeds(self.chance), self.chance)
        count = self.chance.choice((0, 0, 3, 3, 3, self.chance.randrange(1, 20)))
        try:
            with contextlib.suppress(BlockingIOError):  # init has enough to do
                self.peer.send(message, [self.null] * count)
            self.listen()
        except (BrokenPipeError, ConnectionResetError, EOFError):
            self.peer.socket.close()
            self.peer = Peer(self.host)

    def listen(self) -> None:
        self.peer.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                data, rights, _, _ = self.peer.socket.recvmsg(65536, 64)
                for _, _, descriptors in rights:
                    for descriptor in array("i", descriptors):
                        os.close(descriptor)
                if not data:
                    raise EOFError
                wire.decode_message(data)
                self.answers += 1

    def close(self) -> None:
        self.peer.socket.close()
        os.close(self.null)


@pytest.mark.parametrize("seed", range(4))
async def test_three_thousand_mutated_messages_do_no_harm(seed: int) -> None:
    """Sanitizers watch init, the decoder watches what it says, and it must still serve in the end."""
    async with running_init() as host:
        before = descriptor_count(host.process.pid)
        fuzzer = Fuzzer(host, seed)
        try:
            for _ in range(3000):
                fuzzer.step()
                await asyncio.sleep(0)  # the host's own channel hears of every end
        finally:
            fuzzer.close()
        assert fuzzer.answers > 100
        for entry in await host.channel.list_commands():
            with contextlib.suppress(RequestRefused):  # what the fuzzer said last may be heard after the list
                await host.channel.kill(entry.command_id)
        await until(lambda: descriptor_count(host.process.pid) == before, "all is closed")
        host._last_id = 10**6
        with contextlib.suppress(SpawnFailed):  # ENOSPC, if the mutations filled the table
            await assert_serves(host)
