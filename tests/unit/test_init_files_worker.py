"""The daemon's end, against workers that lie, stall or vanish, and inits that have none to give."""

import asyncio
import contextlib
import errno
import os
import socket
import struct
import tempfile
from array import array
from collections.abc import AsyncIterator, Sequence

import pytest

from runtimes.init import files_wire as wire
from runtimes.init.exchange import ChannelClosed, InitProtocolError, InitTimeout
from runtimes.init.file_worker import FilesUnsupported, WorkerLost
from runtimes.init.files import FilesChannel
from tests.unit.init_harness import open_descriptors
from tests.unit.test_init_channel import fake_init
from tests.unit.test_init_channel import message as init_message

pytestmark = pytest.mark.anyio
FACTS = struct.pack("<IIIIQQqqIIQQ", 0o100644, 1, 0, 0, 5, 0, 0, 0, 0, 0, 1, 1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def message(kind: int, request_id: int, body: bytes = b"") -> bytes:
    return struct.pack("<HHI", wire.MAGIC, kind, request_id) + body


class FakeWorkers:
    """Hands out workers that say only what a test has them say."""

    def __init__(self) -> None:
        self.ends: list[socket.socket] = []

    async def take(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends.append(ours)
        return theirs

    async def heard(self) -> tuple[int, int]:
        """Type and id of the next request to the newest worker."""
        data = await asyncio.get_running_loop().sock_recv(self.ends[-1], 65536)
        _, kind, request_id = struct.unpack_from("<HHI", data)
        return kind, request_id

    def say(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        self.ends[-1].sendmsg([data], rights)


@contextlib.asynccontextmanager
async def fake_workers() -> AsyncIterator[tuple[FakeWorkers, FilesChannel]]:
    """In the end no descriptor is left."""
    before = open_descriptors().keys()
    workers = FakeWorkers()
    files = FilesChannel(workers.take, b"/workspace")
    await files.connect()
    try:
        yield workers, files
    finally:
        files.close()
        for end in workers.ends:
            end.close()
    assert open_descriptors().keys() == before


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
@pytest.mark.parametrize("path", ["/dev/null", "/", "/dev/zero"])
async def test_a_descriptor_of_something_else_is_not_handed_out(path: str, flags: int) -> None:
    """The daemon would block on a FIFO, or be root in a directory of the sandbox."""
    async with fake_workers() as (workers, files):
        opening = asyncio.ensure_future(files.open(b"file"))
        _, request_id = await workers.heard()
        descriptor = os.open(path, flags)
        workers.say(message(0x8001, request_id, FACTS), [descriptor])
        os.close(descriptor)
        with pytest.raises(InitProtocolError):
            await opening


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_PATH])
async def test_a_descriptor_that_is_open_for_more_or_less_than_asked_is_not_handed_out(flags: int) -> None:
    async with fake_workers() as (workers, files):
        opening = asyncio.ensure_future(files.open(b"file"))
        _, request_id = await workers.heard()
        with tempfile.NamedTemporaryFile() as file:
            descriptor = os.open(file.name, flags)
            workers.say(message(0x8001, request_id, FACTS), [descriptor])
            os.close(descriptor)
        with pytest.raises(InitProtocolError):
            await opening


async def test_a_watch_that_is_no_inotify_is_a_breach() -> None:
    async with fake_workers() as (workers, files):
        watching = asyncio.ensure_future(files.watch(b"."))
        _, request_id = await workers.heard()
        with tempfile.NamedTemporaryFile(prefix="anon_inode:inotify") as file:
            workers.say(message(0x800E, request_id, struct.pack("<I", 1)), [file.fileno()])
        with pytest.raises(InitProtocolError):
            await watching


@pytest.mark.parametrize(
    "answer",
    [
        (0x8001, FACTS),
        (0x8002, FACTS),
        (0x8003, struct.pack("<III", 0, 0, 0)),
        (0x8005, b""),
        (0x8005, b"x"),
        (0x1234, b""),
    ],
)
async def test_an_answer_to_something_else_is_a_breach_and_the_next_call_has_another_worker(
    answer: tuple[int, bytes],
) -> None:
    async with fake_workers() as (workers, files):
        for attempt in (files.list_dir(b"."), files.rename(b"a", b"b"), files.temp(b"a"), files.make_dir(b"a")):
            asking = asyncio.ensure_future(attempt)
            await asyncio.sleep(0)
            _, request_id = await workers.heard()
            workers.say(message(answer[0], request_id, answer[1]))
            with pytest.raises(InitProtocolError):
                await asking
        assert len(workers.ends) == 4


async def test_a_listing_that_begins_again_is_a_breach() -> None:
    root = FACTS + struct.pack("<II", 0, 0) + 2 * (struct.pack("<I", 0) + b"\0")
    async with fake_workers() as (workers, files):
        listing = asyncio.ensure_future(files.list_dir(b"."))
        _, request_id = await workers.heard()
        workers.say(message(0x8003, request_id, struct.pack("<III", 5, 0, 1) + root))
        _, request_id = await workers.heard()
        workers.say(message(0x8004, request_id, struct.pack("<III", 5, 0, 1) + root))
        with pytest.raises(InitProtocolError):
            await listing


async def test_a_worker_that_is_silent_is_given_up_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.init.file_worker.OPERATION_DEADLINE_S", 0.02)
    async with fake_workers() as (workers, files):
        stuck = [asyncio.ensure_future(files.make_dir(b"a")) for _ in range(3)]
        results = await asyncio.gather(*stuck, return_exceptions=True)
        assert isinstance(results[0], InitTimeout)
        assert all(isinstance(result, InitTimeout | WorkerLost) for result in results)
        assert await asyncio.get_running_loop().sock_recv(workers.ends[0], 65536) != b""
        monkeypatch.undo()
        asking = asyncio.ensure_future(files.make_dir(b"a"))
        await asyncio.sleep(0)
        _, request_id = await workers.heard()
        workers.say(message(0x8006, request_id, struct.pack("<I", 1)))
        assert await asking
        assert len(workers.ends) == 2


async def test_what_changes_nothing_is_asked_again_when_a_worker_is_lost_and_nothing_else() -> None:
    async with fake_workers() as (workers, files):
        asking = asyncio.ensure_future(files.stat(b"a"))
        await workers.heard()
        workers.ends[-1].close()
        while len(workers.ends) == 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
        _, request_id = await workers.heard()
        workers.say(message(0x8002, request_id, FACTS + struct.pack("<I", 0) + b"\0"))
        assert (await asking).facts.size == 5
        for attempt in (files.rename(b"a", b"b"), files.open(b"a", write=True, truncate=True)):
            asking_once = asyncio.ensure_future(attempt)
            await asyncio.sleep(0)
            await workers.heard()
            workers.ends[-1].close()
            with pytest.raises(WorkerLost):
                await asking_once


async def test_what_arrives_too_late_is_closed_and_gives_its_place_back() -> None:
    async with fake_workers() as (workers, files):
        for attempt, kind, body in (
            (files.temp(b"a"), 0x800C, struct.pack("<I", 77)),
            (files.watch(b"a"), 0x800E, struct.pack("<I", 77)),
            (files.list_dir(b"a"), 0x8003, struct.pack("<III", 77, 0, 0)),
        ):
            asking = asyncio.ensure_future(attempt)
            await asyncio.sleep(0)
            _, request_id = await workers.heard()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            with tempfile.TemporaryFile() as file:
                workers.say(message(kind, request_id, body), [file.fileno()])
            assert await workers.heard() == (wire.RequestType.CLOSE, 0)


async def test_closing_fails_who_waits_and_takes_no_other_worker() -> None:
    async with fake_workers() as (workers, files):
        asking = asyncio.ensure_future(files.stat(b"a"))
        await workers.heard()
        files.close()
        with pytest.raises(WorkerLost):
            await asking
        with pytest.raises(ChannelClosed):
            await files.stat(b"a")
        assert len(workers.ends) == 1


async def test_an_init_that_is_older_is_told_apart() -> None:
    async with fake_init() as (fake, channel, _ends):
        asking = asyncio.ensure_future(channel.open_files())
        fake.say(init_message(0xFFFF, await fake.heard(), struct.pack("<II", errno.EOPNOTSUPP, 0)))
        with pytest.raises(FilesUnsupported):
            await asking


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
async def test_a_worker_of_another_version_or_kind_is_not_spoken_to(kind: socket.SocketKind) -> None:
    version = 2 if kind == socket.SOCK_SEQPACKET else 1
    async with fake_init() as (fake, channel, _ends):
        asking = asyncio.ensure_future(channel.open_files())
        request_id = await fake.heard()
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with ours, theirs:
            fake.say(init_message(0x8010, request_id, struct.pack("<II", 5, version)), [theirs.fileno()])
            with pytest.raises(FilesUnsupported):
                await asking


async def test_a_worker_that_is_no_socket_is_a_breach() -> None:
    async with fake_init() as (fake, channel, _ends):
        asking = asyncio.ensure_future(channel.open_files())
        request_id = await fake.heard()
        with tempfile.TemporaryFile() as file:
            fake.say(init_message(0x8010, request_id, struct.pack("<II", 5, 1)), [file.fileno()])
            with pytest.raises(InitProtocolError):
                await asking
