"""Trees into a sandbox and out of it, by a real file worker, and what hostile trees and archives make of that."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from runtimes.init import files_wire as wire
from runtimes.init.exchange import InitProtocolError
from runtimes.init.file_pipeline import FilePipeline
from runtimes.init.file_worker import FileRefused, WorkerLost
from sandboxd import tarstream
from sandboxd.failures import CapacityExceeded
from sandboxd.packing import Packing
from sandboxd.streams import EndedEarly, Incoming, NotAStream, Outgoing, Patience, Stalled, Stopped, Tally, copy_file
from sandboxd.tarstream import DIRECTORY, FILE, HARDLINK, SYMLINK, Member, TarError
from sandboxd.unpacking import HELD_BYTES_MAX, Bounds
from tests.unit.init_files import make_deep, refuse_unnamed_files, tree
from tests.unit.transfers import WIDE, describe, pack, unpack

pytestmark = pytest.mark.anyio

TIME_NS = 1_600_000_000_123_456_789
ODD = b"line\nfeed \xff"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def archive(*entries: tuple[Member, bytes]) -> bytes:
    pieces = []
    for member, data in entries:
        member.size = member.size or len(data)
        pieces += [tarstream.header_of(member), data, bytes(tarstream.padding_of(len(data)))]
    return b"".join(pieces) + tarstream.END


def entry(
    name: bytes, kind: str = FILE, data: bytes = b"", target: bytes = b"", mode: int = 0o644
) -> tuple[Member, bytes]:
    return Member(name, kind, mode=mode, mtime_ns=TIME_NS, target=target), data


def make_tree(root: Path) -> None:
    """One of everything that can be moved."""
    root.mkdir()
    (root / "empty").mkdir()
    (root / "shut").mkdir()
    (root / "shut/inside").write_bytes(b"x")
    (root / "small").write_bytes(b"small")
    (root / "nothing").touch(mode=0o600)
    (root / "large").write_bytes(os.urandom(3 * HELD_BYTES_MAX + 7))
    (root / "program").write_bytes(b"#!")
    (root / "program").chmod(0o755)
    (root / "link").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("x" * 200)
    (root / os.fsdecode(ODD)).mkdir()
    (root / os.fsdecode(ODD) / ("n" * 255)).write_bytes(b"long")
    os.link(root / "large", root / "second")
    (root / "shut").chmod(0o555)
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(TIME_NS, TIME_NS), follow_symlinks=False)


@pytest.mark.parametrize("unnamed", [True, False])
async def test_a_tree_comes_back_as_it_was(unnamed: bool) -> None:
    """Modes, times to the nanosecond, links, names of any bytes, empty directories, and those that are read-only."""
    async with tree(prepare=None if unnamed else refuse_unnamed_files) as t:
        make_tree(t.root / "one")
        packed = await pack(t, b"one")
        assert packed.skips.count == 0
        (t.root / "two").mkdir()
        moved = await unpack(t, packed.data, into=b"two")
        assert moved.skips.count == 0
        assert moved.tally.entries == packed.tally.entries == len(describe(t.root / "one")) + 1
        assert describe(t.root / "two") == describe(t.root / "one")


async def test_the_standard_library_reads_what_is_packed() -> None:
    """The archive has the directory first, files with their bytes, and a second name as a hard link."""
    async with tree() as t:
        make_tree(t.root / "one")
        packed = await pack(t, b"one", name=None)
        with tarfile.open(fileobj=io.BytesIO(packed.data), encoding="utf-8") as tar:
            members = {os.fsencode(member.name): member for member in tar.getmembers()}
            large = tar.extractfile(members[b"one/large"])
            assert large is not None
            assert large.read() == (t.root / "one/large").read_bytes()
        assert next(iter(members)) == b"one"
        assert b"one/" + ODD + b"/" + b"n" * 255 in members
        pair = {members[b"one/large"].islnk(), members[b"one/second"].islnk()}
        assert pair == {True, False}
        packed = await pack(t, b"one/link", name=b"l")
        with tarfile.open(fileobj=io.BytesIO(packed.data)) as tar:
            assert [(member.name, member.linkname) for member in tar] == [("l", "/etc/passwd")]
        packed = await pack(t, b"one/link", name=b"l", follow=True)
        with tarfile.open(fileobj=io.BytesIO(packed.data)) as tar:
            assert [(member.name, member.isfile()) for member in tar] == [("l", True)]


async def test_nothing_is_unpacked_outside_of_where_it_belongs() -> None:
    """Names that lead elsewhere, links that came along, second names of files that did not, devices and FIFOs."""
    async with tree() as t:
        (t.root / "in").mkdir()
        (t.root / "secret").write_bytes(b"secret")
        (t.root / "outside").mkdir()
        moved = await unpack(
            t,
            archive(
                entry(b"../up", data=b"x"),
                entry(b"a/../../up", data=b"x"),
                entry(b"/absolute", data=b"x"),
                entry(b"link", SYMLINK, target=b"../outside"),
                entry(b"link/through", data=b"x"),
                entry(b"link/deeper/through", data=b"x"),
                entry(b"link", DIRECTORY),
                entry(b"link/./again", DIRECTORY),
                entry(b"stolen", HARDLINK, target=b"../secret"),
                entry(b"stolen", HARDLINK, target=b"link/secret"),
                entry(b"to-secret", SYMLINK, target=b"../secret"),
                entry(b"to-secret", data=b"replaces the link"),
                entry(b"plain", data=b"x", mode=0o6755),
                entry(b"", data=b"x"),
            ),
            into=b"in",
        )
        assert set(moved.reasons()) == {
            b"../up", b"a/../../up", b"link/through", b"link/deeper/through",
            b"link/", b"link/./again/", b"stolen", b"",
        }  # fmt: skip
        assert set(describe(t.root)) == {
            b"in", b"secret", b"outside", b"in/absolute", b"in/link", b"in/to-secret", b"in/plain"
        }  # fmt: skip
        assert (t.root / "secret").read_bytes() == b"secret"
        assert (t.root / "in/plain").stat().st_mode & 0o7777 == 0o755, "nobody gets setuid bits"


async def test_entries_that_depend_on_each_other_are_made_in_order() -> None:
    """Small files wait for the worker: what refers to them waits with them, and the last of one name stays."""
    async with tree() as t:
        for _ in range(20):
            moved = await unpack(
                t,
                archive(
                    entry(b"first", data=b"x"),
                    entry(b"second", HARDLINK, target=b"first"),
                    entry(b"twice", data=b"x"),
                    entry(b"twice", SYMLINK, target=b"first"),
                ),
            )
            assert moved.skips.count == 0
            assert (t.root / "second").read_bytes() == b"x"
            assert (t.root / "twice").is_symlink()
            for path in t.root.iterdir():
                path.unlink()


async def test_devices_and_fifos_in_an_archive_are_told_of() -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind in {"fifo": tarfile.FIFOTYPE, "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("file"))
    async with tree() as t:
        moved = await unpack(t, made.getvalue())
        assert moved.reasons() == {
            b"fifo": "it is a FIFO", b"char": "it is a character device", b"block": "it is a block device"
        }  # fmt: skip
        assert await t.names() == {b"file"}


async def test_what_is_in_the_way_is_replaced_if_it_is_a_file_and_told_of_if_not() -> None:
    """A directory that is there keeps its mode and time, a link that is there is not written through."""
    async with tree() as t:
        (t.root / "file").write_bytes(b"old")
        (t.root / "link").symlink_to("file")
        (t.root / "old-link").symlink_to("nowhere")
        (t.root / "directory").mkdir(mode=0o700)
        (t.root / "full").mkdir()
        (t.root / "full/x").touch()
        os.mkfifo(t.root / "fifo")
        moved = await unpack(
            t,
            archive(
                entry(b"file", data=b"new"),
                entry(b"link", data=b"not through it"),
                entry(b"old-link", SYMLINK, target=b"new-target"),
                entry(b"directory", DIRECTORY, mode=0o777),
                entry(b"full", data=b"x"),
                entry(b"full", SYMLINK, target=b"x"),
                entry(b"fifo", data=b"x"),
                entry(b"file/below", data=b"x"),
                entry(b"last", data=b"last"),
            ),
        )
        assert set(moved.reasons()) == {b"full", b"fifo", b"file/below"}
        assert (t.root / "file").read_bytes() == b"new"
        assert (t.root / "link").read_bytes() == b"not through it"
        assert os.readlink(t.root / "old-link") == "new-target"
        assert (t.root / "directory").stat().st_mode & 0o777 == 0o700
        assert (t.root / "last").read_bytes() == b"last"


@pytest.mark.parametrize("size", [100, 5 * HELD_BYTES_MAX])
async def test_a_file_that_does_not_come_whole_has_no_name(size: int) -> None:
    async with tree() as t:
        whole = archive(entry(b"before", data=b"x"), entry(b"cut", data=bytes(size)))
        with pytest.raises(EndedEarly):
            await unpack(t, whole[: -(tarstream.padding_of(size) + len(tarstream.END) + 1)])
        assert await t.names() <= {b"before"}
        with pytest.raises(TarError):
            await unpack(t, b"x" * 2000)


@pytest.mark.parametrize("bounds", [Bounds(bytes_max=2500, entries_max=100), Bounds(bytes_max=10**6, entries_max=2)])
async def test_more_than_is_allowed_is_refused_either_way(bounds: Bounds) -> None:
    async with tree() as t:
        (t.root / "from").mkdir()
        for name in "abc":
            (t.root / "from" / name).write_bytes(bytes(1000))
        with pytest.raises(CapacityExceeded):
            await pack(t, b"from", bounds=bounds)
        packed = await pack(t, b"from")
        with pytest.raises(CapacityExceeded):
            await unpack(t, packed.data, bounds=bounds)


async def test_an_archive_that_promises_more_than_is_allowed_is_refused_before_it_is_sent() -> None:
    """A size that lies costs nothing: neither disk, nor a wait for what never comes."""
    async with tree() as t:
        head = tarstream.header_of(Member(b"huge", FILE, mode=0o644, mtime_ns=0, size=2**62))
        with pytest.raises(CapacityExceeded):
            await unpack(t, head)
        assert await t.names() == set()


async def test_a_sparse_tebibyte_is_refused_by_its_size() -> None:
    async with tree() as t:
        (t.root / "sparse").touch()
        os.truncate(t.root / "sparse", 2**40)
        with pytest.raises(CapacityExceeded, match="bytes"):
            await pack(t, b"sparse", bounds=Bounds(bytes_max=2**30, entries_max=10))


async def test_what_is_no_file_is_skipped_and_never_waited_for() -> None:
    async with tree() as t:
        os.mkfifo(t.root / "fifo")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(os.fspath(t.root / "socket"))
            packed = await pack(t, b".")
        assert packed.reasons() == {b"./fifo": "it is a FIFO", b"./socket": "it is a socket"}
        packed = await pack(t, b"/dev/zero", name=b"zero")
        assert packed.reasons() == {b"zero": "it is a character device"}
        packed = await pack(t, b"/proc/sys/kernel/random", name=b"made-up")
        assert packed.tally.bytes == 0
        assert "it is the kernel's own, and no file of the sandbox" in packed.reasons().values()
        with pytest.raises(FileRefused):
            await pack(t, b"missing")


async def test_links_that_change_during_a_walk_lead_nowhere_on_the_host() -> None:
    """A directory that becomes a link to /proc, a file that becomes a FIFO: skipped, or packed as what they were."""
    async with tree() as t:
        for number in range(50):
            (t.root / f"d{number}").mkdir()
            (t.root / f"d{number}/file").write_bytes(b"mine")
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                for number in range(50):
                    victim = t.root / f"d{number}/file"
                    with contextlib.suppress(OSError):
                        victim.unlink()
                        victim.symlink_to("/proc/self/environ")
                        victim.unlink()
                        os.mkfifo(victim)
                        victim.unlink()
                        victim.write_bytes(b"mine")

        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            for _ in range(5):
                packed = await asyncio.wait_for(pack(t, b"."), 30)
                with tarfile.open(fileobj=io.BytesIO(packed.data)) as tar:
                    for member in tar:
                        if member.isfile():
                            file = tar.extractfile(member)
                            assert file is not None
                            assert file.read() in (b"mine", b"")
        finally:
            stop.set()
            swapper.join()


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(bytes(10**6))


def cut(path: Path) -> None:
    os.truncate(path, 10)


@pytest.mark.parametrize(("change", "told"), [(append, 0), (cut, 1)])
async def test_an_archive_is_whole_when_a_file_changes_under_it(change: Callable[[Path], None], told: int) -> None:
    """It has the size that was promised, whatever the file has become; more than a pipe holds was not sent yet."""
    async with tree() as t:
        (t.root / "file").write_bytes(b"x" * 5_000_000)
        read_end, write_end = os.pipe()
        worker = await t.host.channel.take_file_worker()
        patience = Patience(10)
        with FilePipeline(worker, patience.wait_for) as pipeline:
            packing = Packing(pipeline, base=os.fsencode(t.root), bounds=WIDE, tally=Tally(), patience=patience)

            def work() -> None:
                with contextlib.closing(Outgoing(write_end, patience, Tally())) as outgoing:
                    packing.run(outgoing, b"file", b"file", follow=False)

            thread = threading.Thread(target=work)
            thread.start()
            packed = await asyncio.to_thread(os.read, read_end, 512)
            change(t.root / "file")
            with os.fdopen(read_end, "rb") as pipe:
                packed += await asyncio.to_thread(pipe.read)
            thread.join()
        patience.close()
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            (member,) = tar.getmembers()
            assert member.size == 5_000_000
        assert packing.skips.count == told


async def test_trees_deeper_than_a_listing_are_packed_whole() -> None:
    async with tree() as t:
        (t.root / "deep").mkdir()
        make_deep(t.root / "deep", 150)
        packed = await pack(t, b"deep")
        assert packed.skips.count == 0
        (t.root / "copy").mkdir()
        moved = await unpack(t, packed.data, into=b"copy")
        assert moved.skips.count == 0
        assert describe(t.root / "copy").keys() == describe(t.root / "deep").keys()


async def test_a_worker_that_is_killed_ends_the_transfer() -> None:
    async with tree() as t:
        (t.root / "file").touch()
        before = set(t.host.file_workers())
        patience = Patience(10)
        worker = await t.host.channel.take_file_worker()
        with FilePipeline(worker, patience.wait_for) as pipeline:
            pipeline.ask(lambda n: stat_request(n, t.root))
            (mine,) = set(t.host.file_workers()) - before
            os.kill(mine, 9)
            with pytest.raises(WorkerLost):
                await asyncio.to_thread(pipeline.ask, lambda n: stat_request(n, t.root))
        patience.close()


def stat_request(number: int, root: Path) -> bytes:
    return wire.encode_stat(number, wire.Flag.NONE, os.fsencode(root), b"file")


@pytest.mark.parametrize("answer", [b"", b"x" * 8, bytes(70_000), b"FS\x00\x80\x01\x00\x00\x00"])
async def test_a_worker_that_answers_nonsense_is_not_believed(answer: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    patience = Patience(10)
    with contextlib.closing(theirs), FilePipeline(ours, patience.wait_for) as pipeline:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
        theirs.send(answer)
        with pytest.raises((InitProtocolError, WorkerLost)):
            pipeline.ask(lambda n: stat_request(n, Path("/")))
    patience.close()


# --- streams


def test_a_silent_stream_is_given_up() -> None:
    read_end, write_end = os.pipe()
    patience = Patience(0.05)
    with contextlib.closing(Incoming(read_end, patience, Tally())) as incoming, pytest.raises(Stalled):
        incoming.take(1)
    os.close(write_end)
    read_end, write_end = os.pipe()
    with contextlib.closing(Outgoing(write_end, patience, Tally())) as outgoing, pytest.raises(Stalled):
        outgoing.fill(64 * 1024 * 1024)
    os.close(read_end)
    patience.close()


def test_a_waiting_thread_can_be_stopped() -> None:
    read_end, write_end = os.pipe()
    patience = Patience(None)
    caught: list[type[BaseException]] = []

    def wait() -> None:
        try:
            with contextlib.closing(Incoming(read_end, patience, Tally())) as incoming:
                incoming.take(1)
        except Stopped:
            caught.append(Stopped)

    thread = threading.Thread(target=wait)
    thread.start()
    patience.stop()
    thread.join(20)
    assert caught == [Stopped]
    os.close(write_end)
    patience.close()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full", "/"])
def test_devices_and_directories_are_no_streams(path: str) -> None:
    patience = Patience(1)
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(NotAStream):
        Incoming(descriptor, patience, Tally())
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    read_end, write_end = os.pipe()
    with pytest.raises(NotAStream):
        Incoming(write_end, patience, Tally())
    os.close(read_end)
    patience.close()


@pytest.mark.parametrize("kind", ["pipe", "socket", "file", "appended"])
def test_every_kind_of_stream_moves_all_bytes_both_ways(kind: str, tmp_path: Path) -> None:
    """What was read ahead, and what the kernel moves by itself, in order."""
    data = os.urandom(5_000_003)
    (tmp_path / "source").write_bytes(data)
    patience, tally = Patience(20), Tally()
    if kind == "pipe":
        there, here = os.pipe()
    elif kind == "socket":
        there, here = (end.detach() for end in socket.socketpair())
    else:
        flags = os.O_APPEND if kind == "appended" else 0
        here = os.open(tmp_path / "stream", os.O_WRONLY | os.O_CREAT | flags)
        there = os.open(tmp_path / "stream", os.O_RDONLY)

    def send() -> None:
        source = os.open(tmp_path / "source", os.O_RDONLY)
        with contextlib.closing(Outgoing(here, patience, tally)) as outgoing:
            outgoing.write(b"head")
            assert outgoing.copy_from(source, 10) == 10
            assert outgoing.copy_from(source, len(data)) == len(data) - 10
            outgoing.flush()
        os.close(source)

    sender = threading.Thread(target=send)
    sender.start()
    if kind in ("file", "appended"):
        sender.join()
    target = os.open(tmp_path / "target", os.O_WRONLY | os.O_CREAT)
    with contextlib.closing(Incoming(there, patience, Tally())) as incoming:
        assert incoming.take(4) == b"head"
        incoming.copy_to(target, 100)
        assert incoming.copy_up_to(target, 10**9) == len(data) - 100
    sender.join()
    os.close(target)
    assert (tmp_path / "target").read_bytes() == data
    assert tally.bytes == len(data)
    patience.close()


def test_holes_stay_holes_and_cost_nothing(tmp_path: Path) -> None:
    """A tebibyte of nothing with a little in it."""
    with open(tmp_path / "sparse", "wb") as file:
        file.write(b"begin")
        file.seek(2**39)
        file.write(b"middle")
        file.truncate(2**40)
    source, target = os.open(tmp_path / "sparse", os.O_RDONLY), os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    patience, tally = Patience(1), Tally()
    assert copy_file(source, target, bytes_max=2**20, patience=patience, tally=tally)
    assert os.fstat(target).st_size == 2**40
    assert os.fstat(target).st_blocks * 512 < 2**20
    assert (os.pread(target, 5, 0), os.pread(target, 6, 2**39)) == (b"begin", b"middle")
    os.ftruncate(target, 0)
    assert not copy_file(source, target, bytes_max=5, patience=patience, tally=tally)
    os.close(source)
    os.close(target)
    patience.close()
