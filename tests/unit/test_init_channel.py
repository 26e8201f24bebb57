"""The daemon's end, against inits that lie, stall or vanish: what crosses is untrusted."""

import asyncio
import contextlib
import errno
import os
import socket
import struct
import tempfile
from array import array
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from runtimes.init import wire
from runtimes.init.channel import InitChannel, InitUnavailable, RequestRefused
from runtimes.init.exchange import ChannelClosed, InitProtocolError, InitTimeout, SendFailed
from runtimes.init.peer import is_container_init
from runtimes.init.wire import PtySize, SpawnRequest
from tests.unit.init_harness import DEADLINE_S, Ends, devnull, open_descriptors, running_init, until

pytestmark = pytest.mark.anyio
HELLO_BODY = struct.pack("<HH16sIII", 1, 0, b"n" * 16, 0, 1024, 3) + b"0.1\0"
HELLO_2_BODY = struct.pack("<HH16sIII", 2, 0, b"n" * 16, 0, 1024, 3) + b"0.4\0"
TRUE = SpawnRequest(command_id=1, argv=[b"true"], env=[], cwd=b"/")
TRUE_ON_PTY = SpawnRequest(command_id=1, argv=[b"true"], env=[], cwd=b"/", pty=PtySize(1, 1))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def message(kind: int, request_id: int, body: bytes = b"") -> bytes:
    return struct.pack("<HHI", wire.MAGIC, kind, request_id) + body


class FakeInit:
    """Says hello like init, and after that only what a test has it say."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.listener.bind(path)
        self.listener.listen(1)
        self.accepted: socket.socket

    async def serve_hello(self, answer: Callable[[int], bytes] = lambda n: message(0x8001, n, HELLO_BODY)) -> None:
        self.accepted, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        self.say(answer(await self.heard()))

    async def heard(self) -> int:
        """The id of the next request."""
        data = await asyncio.get_running_loop().sock_recv(self.accepted, 200_000)
        return int.from_bytes(data[4:8], "little")

    def say(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        self.accepted.sendmsg([data], rights)

    def close(self) -> None:
        self.listener.close()
        if hasattr(self, "accepted"):
            self.accepted.close()


@contextlib.asynccontextmanager
async def fake_init(hello: bytes = HELLO_BODY) -> AsyncIterator[tuple[FakeInit, InitChannel, Ends]]:
    """A connected pair; in the end no descriptor is left."""
    before = open_descriptors().keys()
    with tempfile.TemporaryDirectory() as folder:
        fake, ends = FakeInit(folder + "/init.sock"), Ends()
        serving = asyncio.ensure_future(fake.serve_hello(lambda n: message(0x8001, n, hello)))
        channel = await InitChannel.connect(
            fake.path, timeout_s=DEADLINE_S, on_event=ends.on_event, on_closed=ends.on_closed
        )
        await serving
        try:
            yield fake, channel, ends
        finally:
            channel.close()
            fake.close()
    assert open_descriptors().keys() == before


async def test_it_says_who_listens_and_what_that_one_is() -> None:
    """The daemon goes on only if the listener's pid is the container's PID 1."""
    async with fake_init() as (_, channel, _ends):
        assert (channel.peer.pid, channel.peer.uid) == (os.getpid(), os.getuid())
        assert channel.hello == wire.HelloReply(1, b"n" * 16, 0, 1024, "0.1")


@pytest.mark.parametrize(
    "garbage",
    [
        b"x",
        message(0x8004, 0, b"x"),
        message(0x4002, 0, b"x"),
        bytes(20_000),
        message(0x0001, 1),
    ],
)
async def test_garbage_closes_the_channel_and_fails_who_waits(garbage: bytes) -> None:
    async with fake_init() as (fake, channel, ends):
        asking = asyncio.ensure_future(channel.kill(1))
        await fake.heard()
        fake.say(garbage)
        with pytest.raises(InitProtocolError):
            await asking
        assert isinstance(await ends.closed, InitProtocolError)
        with pytest.raises(ChannelClosed):
            await channel.kill(1)


async def test_descriptors_that_nobody_asked_for_are_closed() -> None:
    """A hostile init could otherwise fill the daemon's table."""
    for data, count in (
        (message(0x4002, 0, struct.pack("<QI", 1, 0)), 1),
        (message(0x8004, 1), 1),
        (message(0x8004, 1), 4),
        (message(0x8004, 1), 100),
        (message(0x8004, 99), 1),
        (b"x", 1),
    ):
        async with fake_init() as (fake, _channel, _ends):
            with devnull() as null:
                before = open_descriptors().keys()
                fake.say(data, [null] * count)
                fake.say(b"end")
                await _ends.closed
                assert open_descriptors().keys() < before


async def test_an_acknowledgement_with_a_descriptor_is_a_breach() -> None:
    async with fake_init() as (fake, channel, _ends):
        asking = asyncio.ensure_future(channel.kill(1))
        request_id = await fake.heard()
        with devnull() as null:
            fake.say(message(0x8004, request_id), [null])
            with pytest.raises(InitProtocolError):
                await asking


async def test_a_master_that_is_no_terminal_is_not_handed_out() -> None:
    """A regular file, a fifo or /dev/null in its place would be read from or blocked on."""
    async with fake_init() as (fake, channel, ends):
        asking = asyncio.ensure_future(channel.spawn(TRUE_ON_PTY))
        request_id = await fake.heard()
        with devnull() as null:
            fake.say(message(0x8002, request_id, struct.pack("<II", 5, 1)), [null])
            with pytest.raises(InitProtocolError):
                await asking
        assert isinstance(await ends.closed, InitProtocolError)


@pytest.mark.parametrize(
    ("request_", "flags", "answer_type"), [(TRUE_ON_PTY, 1, 0x8002), (TRUE_ON_PTY, 0, 0x8002), (TRUE, 1, 0x8002)]
)
async def test_a_spawn_whose_answer_does_not_fit_is_a_breach(
    request_: SpawnRequest, flags: int, answer_type: int
) -> None:
    async with fake_init() as (fake, channel, _ends):
        with devnull() as null:
            asking = asyncio.ensure_future(channel.spawn(request_, () if request_.pty else (null, null, null)))
            request_id = await fake.heard()
            fake.say(message(answer_type, request_id, struct.pack("<II", 5, flags)))
            with pytest.raises(InitProtocolError):
                await asking


async def test_a_master_that_comes_after_its_asker_gave_up_is_closed() -> None:
    async with fake_init() as (fake, channel, ends):
        asking = asyncio.ensure_future(channel.spawn(TRUE_ON_PTY))
        request_id = await fake.heard()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        master, slave = os.openpty()
        fake.say(message(0x8002, request_id, struct.pack("<II", 5, 1)), [master])
        fake.say(message(0x4002, 0, struct.pack("<QI", 1, 0)))
        os.close(master)
        os.close(slave)
        await ends.gone(1)


async def test_a_master_that_arrives_in_the_turn_of_the_cancellation_is_closed() -> None:
    """The answer is there, the asker is not: the future held the only reference to a descriptor."""
    async with fake_init() as (fake, channel, _ends):
        asking = asyncio.ensure_future(channel.spawn(TRUE_ON_PTY))
        request_id = await fake.heard()
        master, slave = os.openpty()
        fake.say(message(0x8002, request_id, struct.pack("<II", 5, 1)), [master])
        os.close(master)
        os.close(slave)
        channel._exchange._readable()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_an_init_that_is_silent_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A paused sandbox must not hold its callers for ever; the channel stays, for when it goes on."""
    async with fake_init() as (fake, channel, ends):
        monkeypatch.setattr(InitChannel._ask, "__kwdefaults__", {"deadline_s": 0.01})
        with pytest.raises(InitTimeout):
            await channel.kill(1)
        monkeypatch.undo()
        late = await fake.heard()
        fake.say(message(0x8004, late))
        asking = asyncio.ensure_future(channel.kill(1))
        fake.say(message(0x8004, await fake.heard()))
        await asking
        assert not ends.closed.done()


async def test_an_init_that_vanishes_fails_who_waits() -> None:
    async with fake_init() as (fake, channel, ends):
        asking = asyncio.ensure_future(channel.list_commands())
        await fake.heard()
        fake.accepted.close()
        with pytest.raises(ChannelClosed):
            await asking
        assert isinstance(await ends.closed, ChannelClosed)


async def test_closing_fails_who_waits_and_is_told_once() -> None:
    async with fake_init() as (_, channel, ends):
        asking = asyncio.ensure_future(channel.kill(1))
        await asyncio.sleep(0)
        channel.close()
        channel.close()
        with pytest.raises(ChannelClosed):
            await asking
        assert await ends.closed is None


async def test_a_list_without_end_is_a_breach() -> None:
    async with fake_init() as (fake, channel, _ends):
        asking = asyncio.ensure_future(channel.list_commands())
        fake.say(message(0x8005, await fake.heard(), struct.pack("<II", 0, 0)))
        with pytest.raises(InitProtocolError):
            await asking


async def test_a_refusal_carries_errno() -> None:
    async with fake_init() as (fake, channel, _ends):
        asking = asyncio.ensure_future(channel.forget(1))
        fake.say(message(0xFFFF, await fake.heard(), struct.pack("<II", errno.EBUSY, 0)))
        with pytest.raises(RequestRefused) as caught:
            await asking
        assert caught.value.errno == errno.EBUSY


async def test_requests_wait_for_room_and_one_that_is_withdrawn_is_never_sent() -> None:
    """Its descriptors' numbers belong to others by then."""
    big = SpawnRequest(command_id=1, argv=[b"x" * 100_000], env=[], cwd=b"/")
    async with fake_init() as (fake, channel, _ends):
        with devnull() as null:
            asking = [asyncio.ensure_future(channel.spawn(big, (null,) * 3)) for _ in range(6)]
            await asyncio.sleep(0)
            assert channel._exchange._outgoing
            asking[-1].cancel()
            for task in asking[:-1]:
                fake.say(message(0x8002, await fake.heard(), struct.pack("<II", 5, 0)))
                assert (await task).pid == 5
            with pytest.raises(asyncio.CancelledError):
                await asking[-1]
            ending = asyncio.ensure_future(channel.kill(7))
            request_id = await fake.heard()
            assert request_id == 8  # hello was 1; 7 was withdrawn
            fake.say(message(0x8004, request_id))
            await ending


async def test_a_descriptor_that_is_not_open_is_the_callers_error_alone() -> None:
    async with fake_init() as (fake, channel, _ends):
        with pytest.raises(SendFailed) as caught:
            await channel.spawn(TRUE, (10**6,) * 3)
        assert caught.value.errno == errno.EBADF
        asking = asyncio.ensure_future(channel.kill(1))
        fake.say(message(0x8004, await fake.heard()))
        await asking


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda n: message(0xFFFF, n, struct.pack("<II", errno.EPROTONOSUPPORT, 0)), RequestRefused),
        (lambda n: message(0x8004, n), InitProtocolError),
        (lambda n: b"SSH-2.0-OpenSSH", InitProtocolError),
    ],
)
async def test_a_connect_to_who_is_not_our_init_fails_and_leaves_nothing(
    answer: Callable[[int], bytes], error: type[Exception]
) -> None:
    before = open_descriptors().keys()
    with tempfile.TemporaryDirectory() as folder:
        fake, ends = FakeInit(folder + "/init.sock"), Ends()
        serving = asyncio.ensure_future(fake.serve_hello(answer))
        with pytest.raises(error):
            await InitChannel.connect(fake.path, timeout_s=5, on_event=ends.on_event, on_closed=ends.on_closed)
        await serving
        fake.close()
        assert not ends.closed.done()
    assert open_descriptors().keys() == before


async def test_a_connect_waits_for_a_socket_but_not_for_ever() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ends, path = Ends(), folder + "/init.sock"
        with pytest.raises(InitUnavailable):
            await InitChannel.connect(path, timeout_s=0.01, on_event=ends.on_event, on_closed=ends.on_closed)
        connecting = asyncio.ensure_future(
            InitChannel.connect(path, timeout_s=5, on_event=ends.on_event, on_closed=ends.on_closed)
        )
        await asyncio.sleep(0)
        fake = FakeInit(path)
        await fake.serve_hello()
        (await connecting).close()
        fake.close()


async def test_a_path_longer_than_the_kernel_takes_is_reached_all_the_same() -> None:
    """$XDG_RUNTIME_DIR and a sandbox's id make long paths; 107 bytes are few."""
    with tempfile.TemporaryDirectory() as folder:
        deep = os.path.join(folder, *["d" * 60] * 3)
        os.makedirs(deep)
        fake = FakeInit(folder + "/init.sock")
        os.rename(fake.path, deep + "/init.sock")
        serving, ends = asyncio.ensure_future(fake.serve_hello()), Ends()
        channel = await InitChannel.connect(
            deep + "/init.sock", timeout_s=5, on_event=ends.on_event, on_closed=ends.on_closed
        )
        await serving
        channel.close()
        fake.close()


async def test_an_event_handler_that_fails_does_not_stop_the_channel() -> None:
    """The error goes to the loop's handler; the next event is still delivered."""
    complaints: list[object] = []
    async with fake_init() as (fake, channel, ends):
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))
        channel._on_event = lambda event: (_ for _ in ()).throw(RuntimeError("handler"))
        fake.say(message(0x4002, 0, struct.pack("<QI", 1, 0)))
        await until(lambda: bool(complaints), "the loop hears of it")
        channel._on_event = ends.on_event
        fake.say(message(0x4002, 0, struct.pack("<QI", 2, 0)))
        await ends.gone(2)


async def test_a_process_of_our_own_namespace_is_no_containers_init() -> None:
    """Neither a lying listener on the host nor a number that is nobody's may pass."""
    async with running_init() as host:
        assert not is_container_init(host.process.pid, "0" * 64)
    assert not is_container_init(1, "0" * 64)
    assert not is_container_init(0, "0" * 64)
    assert not is_container_init(2**22 + 1, "0" * 64)
    assert not is_container_init(os.getpid(), "")
