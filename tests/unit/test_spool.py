"""Spools on real files: followed, bounded, tampered with, adopted and removed."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest

from runtimes.inotify import Inotify, WatchRefused
from sandboxd import spool as spool_module
from sandboxd.failures import CapacityExceeded, Failure, NotFound, Unauthorized, Unsupported
from sandboxd.spool import Spool, SpoolDirectory, punch_hole, sweep
from sandboxd.spool_plan import Chunk, Dropped, Excerpt, Item, Stream, Truncated

pytestmark = pytest.mark.anyio
DEADLINE_S = 120
KIB = 1024
MIB = 1024 * KIB
CAP = MIB
EVERY_BYTE = bytes(range(256))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def inotify() -> AsyncIterator[Inotify]:
    with Inotify() as instance:
        yield instance


@pytest.fixture
def spools(tmp_path: Path, inotify: Inotify) -> SpoolDirectory:
    return SpoolDirectory(str(tmp_path / "box"), inotify, cap_bytes=CAP)


@pytest.fixture
def output(spools: SpoolDirectory) -> Iterator[tuple[Spool, int]]:
    spool, fd = spools.create(1, Stream.OUT)
    yield spool, fd
    spool.close()
    os.close(fd)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def ended() -> anyio.Event:
    event = anyio.Event()
    event.set()
    return event


def allocated(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def punch(fd: int, start: int, end: int) -> None:
    """Punch through a descriptor of our own, as the command could if it may open the file again."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    punch_hole(again, start, end)
    os.close(again)


async def collect(spool: Spool, offset: int, event: anyio.Event, **options: int) -> list[Item]:
    with anyio.fail_after(DEADLINE_S), spool.follow(offset, until_ended=event, **options) as items:
        return [item async for item in items]


def joined(items: list[Item] | tuple[Item, ...]) -> bytes:
    assert all(isinstance(item, Chunk) for item in items), items
    return b"".join(item.data for item in items if isinstance(item, Chunk))


async def run_writer(program: str, fd: int, *arguments: str) -> None:
    process = await anyio.open_process([sys.executable, "-c", program, *arguments], stdout=fd, stderr=None)
    with anyio.fail_after(DEADLINE_S):
        assert await process.wait() == 0


# --- the directory ------------------------------------------------------------------------------------------


async def test_files_are_private_named_by_command_and_stream_and_only_appended_to(spools: SpoolDirectory) -> None:
    for stream in Stream:
        spool, fd = spools.create(0xABC, stream)
        os.write(fd, b"one")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two")
        path = Path(spools.path) / f"000000000abc.{stream.value}"
        assert path.read_bytes() == b"onetwo"
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(fd, 1)
        spool.close()
        os.close(fd)
    assert Path(spools.path).stat().st_mode & 0o777 == 0o700
    assert spools.list() == [(0xABC, stream) for stream in sorted(Stream)]


async def test_a_spool_that_was_closed_is_read_all_the_same_and_holds_nothing_open(spools: SpoolDirectory) -> None:
    """Ends of commands are kept by the hundred; a daemon may have a thousand descriptors."""
    spool, fd = spools.create(1, Stream.OUT)
    write_all(fd, b"output")
    os.close(fd)
    spool.close()
    before = open_descriptors()
    assert spool.bytes_written == (await spool.stat()).bytes_written == len(b"output")
    assert joined((await spool.read_range(0, 100)).items) == b"output"
    assert joined(await collect(spool, 0, ended())) == b"output"
    assert open_descriptors() == before
    await spools.remove(1)
    with pytest.raises(NotFound):
        await spool.stat()


async def test_a_directory_that_others_can_enter_is_refused(spools: SpoolDirectory) -> None:
    Path(spools.path).mkdir(mode=0o755)
    Path(spools.path).chmod(0o755)
    with pytest.raises(Unauthorized, match="mode 0755"):
        spools.create(1, Stream.OUT)


async def test_a_spool_is_made_once_and_opened_only_where_it_is(spools: SpoolDirectory, tmp_path: Path) -> None:
    assert spools.list() == []
    with pytest.raises(NotFound):
        spools.open(1, Stream.OUT)
    spool, fd = spools.create(1, Stream.OUT)
    before = open_descriptors()
    with pytest.raises(Failure, match="File exists"):
        spools.create(1, Stream.OUT)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (Path(spools.path) / "000000000002.out").symlink_to(secret)
    with pytest.raises(Failure, match="Too many levels"):
        spools.open(2, Stream.OUT)
    with pytest.raises(Failure, match="File exists"):
        spools.create(2, Stream.OUT)
    os.mkfifo(Path(spools.path) / "000000000003.out")
    with pytest.raises(NotFound, match="not a file"):
        spools.open(3, Stream.OUT)
    assert open_descriptors() == before
    spool.close()
    spool.close()
    os.close(fd)


async def test_removing_takes_the_streams_of_one_command_and_erasing_all_and_nothing_outside(
    spools: SpoolDirectory, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "000000000001.out").touch()
    for command_id in (1, 2):
        for stream in (Stream.OUT, Stream.ERR):
            spool, fd = spools.create(command_id, stream)
            spool.close()
            os.close(fd)
    (Path(spools.path) / "link").symlink_to(outside)
    for _ in range(2):
        await spools.remove(1)
        assert spools.list() == [(2, Stream.ERR), (2, Stream.OUT)]
    for _ in range(2):
        await spools.erase()
        assert not Path(spools.path).exists()
    await spools.remove(1)
    assert [path.name for path in outside.iterdir()] == ["000000000001.out"]


async def test_a_sweep_removes_what_no_record_knows(tmp_path: Path, inotify: Inotify) -> None:
    for box in ("known", "unknown"):
        for command_id in (1, 2):
            spool, fd = SpoolDirectory(str(tmp_path / box), inotify).create(command_id, Stream.BOTH)
            spool.close()
            os.close(fd)
    (tmp_path / "known" / "notes").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "known")
    assert await sweep(str(tmp_path), {"known": {2}}) == ["known/000000000001.both", "unknown"]
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["file", "known", "known/000000000002.both", "known/notes", "link"]
    assert await sweep(str(tmp_path / "none"), {}) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, None])
async def test_a_file_system_without_holes_is_refused_before_the_command_starts(
    tmp_path: Path, inotify: Inotify, code: int | None
) -> None:
    """Output that cannot be bounded could fill the disk; None: holes can be punched, but not be found."""

    def fake(*_: int) -> None:
        if code is not None:
            raise OSError(code, os.strerror(code))

    spools = SpoolDirectory(str(tmp_path / "box"), inotify, punch=fake)
    before = open_descriptors()
    with pytest.raises(Unsupported, match="cannot punch holes") as refused:
        spools.create(1, Stream.OUT)
    assert "SANDBOXD_STATE_DIR" in refused.value.hint
    assert spools.list() == []
    assert open_descriptors() == before


async def test_a_full_disk_is_a_capacity_that_is_exceeded(tmp_path: Path, inotify: Inotify) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CapacityExceeded):
        SpoolDirectory(str(tmp_path / "box"), inotify, punch=full).create(1, Stream.OUT)


# --- following ----------------------------------------------------------------------------------------------


async def test_followers_from_different_offsets_get_the_same_bytes_as_they_are_written(
    output: tuple[Spool, int], inotify: Inotify
) -> None:
    """A process writes in odd pieces. One follower is so slow that it reads on only when the writer is done."""
    spool, fd = output
    end, written = anyio.Event(), anyio.Event()
    program = "import os\ndata = bytes(range(256)) * 2400\nwhile data: data = data[os.write(1, data[:1357]) :]"
    expected = EVERY_BYTE * 4 + EVERY_BYTE * 2400
    write_all(fd, EVERY_BYTE * 4)
    results: dict[int, list[Item]] = {}
    before = open_descriptors()

    async def follow(offset: int, chunk_bytes_max: int) -> None:
        results[offset] = await collect(spool, offset, end, chunk_bytes_max=chunk_bytes_max)

    async def follow_slowly() -> None:
        with spool.follow(2, until_ended=end, chunk_bytes_max=100) as items:
            results[2] = [await anext(items)]
            await written.wait()
            results[2] += [item async for item in items]

    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            for offset, chunk_bytes_max in ((0, 65536), (1, 77), (500, 4096), (1024, 16384)):
                tasks.start_soon(follow, offset, chunk_bytes_max)
            tasks.start_soon(follow_slowly)
            await run_writer(program, fd)
            written.set()
            end.set()
    assert {offset: joined(items) == expected[offset:] for offset, items in results.items()} == dict.fromkeys(
        (0, 1, 2, 500, 1024), True
    )
    assert open_descriptors() == before
    assert inotify.armed_count == 0


async def test_offsets_say_where_each_piece_belongs(output: tuple[Spool, int]) -> None:
    spool, fd = output
    write_all(fd, EVERY_BYTE * 100)
    for offset in (0, 1, 12_345, 25_599, 25_600):
        items = await collect(spool, offset, ended(), chunk_bytes_max=1000)
        position = offset
        for item in items:
            assert isinstance(item, Chunk)
            assert item.offset == position
            assert 0 < len(item.data) <= 4000
            position += len(item.data)
        assert joined(items) == (EVERY_BYTE * 100)[offset:]


async def test_a_follower_waits_for_output_and_then_for_the_end(output: tuple[Spool, int]) -> None:
    spool, fd = output
    end = anyio.Event()
    with anyio.fail_after(DEADLINE_S), spool.follow(0, until_ended=end) as items:
        for line in (b"one\n", b"two\n", b"three\n"):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, os.write, fd, line)
                item = await anext(items)
            assert isinstance(item, Chunk)
            assert item.data == line
        os.write(fd, b"last")
        end.set()
        assert joined([item async for item in items]) == b"last"
        os.write(fd, b"from a process that was left behind")
        assert [item async for item in items] == []


async def test_what_is_written_after_the_end_does_not_hold_a_follower(output: tuple[Spool, int]) -> None:
    spool, fd = output
    write_all(fd, b"x" * 1000)
    with anyio.fail_after(DEADLINE_S), spool.follow(0, until_ended=ended(), chunk_bytes_max=10) as items:
        read = 0
        async for item in items:
            assert isinstance(item, Chunk)
            read += len(item.data)
            os.write(fd, b"y" * 1000)
    assert read == 1000


async def test_a_follower_that_is_cancelled_leaves_nothing_behind(
    output: tuple[Spool, int], inotify: Inotify
) -> None:
    spool, _ = output
    before = open_descriptors()
    for _ in range(20):
        with anyio.CancelScope() as scope, spool.follow(0, until_ended=anyio.Event()) as items:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(items.__anext__)
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
    assert open_descriptors() == before
    assert inotify.armed_count == 0


async def test_without_a_watch_a_follower_says_so_and_the_cap_holds(
    output: tuple[Spool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise WatchRefused("cannot follow a file")

    monkeypatch.setattr(Inotify, "arm", refuse)
    spool, fd = output
    with spool.follow(0, until_ended=anyio.Event()) as items, pytest.raises(WatchRefused):
        await anext(items)
    end = anyio.Event()
    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(spool.keep_bounded, end)
            await anyio.wait_all_tasks_blocked()
            write_all(fd, bytes(3 * CAP))
            while allocated(fd) > CAP:
                await anyio.lowlevel.checkpoint()
            end.set()


async def test_a_deleted_file_is_followed_to_its_end(spools: SpoolDirectory, output: tuple[Spool, int]) -> None:
    spool, fd = output
    end = anyio.Event()
    os.write(fd, b"before ")
    with anyio.fail_after(DEADLINE_S), spool.follow(0, until_ended=end) as items:
        assert await anext(items) == Chunk(0, b"before ")
        await spools.remove(1)
        spool.close()
        os.write(fd, b"after")
        end.set()
        assert [item async for item in items] == [Chunk(7, b"after")]


@pytest.mark.parametrize(("offset", "chunk_bytes_max"), [(-1, 1), (0, 0)])
async def test_numbers_that_cannot_be_meant_are_refused(
    output: tuple[Spool, int], offset: int, chunk_bytes_max: int
) -> None:
    before = open_descriptors()
    with pytest.raises(ValueError, match="cannot follow"):
        output[0].follow(offset, until_ended=ended(), chunk_bytes_max=chunk_bytes_max)
    with pytest.raises(ValueError, match="cannot read"):
        await output[0].read_range(offset, -1)
    assert open_descriptors() == before


# --- bounding -----------------------------------------------------------------------------------------------


async def test_a_fast_writer_is_bounded_and_head_and_tail_are_kept(output: tuple[Spool, int]) -> None:
    """64 MiB through a cap of 1 MiB, with a follower; each line is its number, so what is read can be checked."""
    spool, fd = output
    end = anyio.Event()
    items: list[Item] = []

    async def follow() -> None:
        items.extend(await collect(spool, 0, end))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(spool.keep_bounded, end)
        tasks.start_soon(follow)
        await run_writer(
            "import os\nfor k in range(1024):\n"
            "  os.write(1, b''.join(b'%015d\\n' % n for n in range(k * 4096, (k + 1) * 4096)))",
            fd,
        )
        end.set()
    assert spool.bytes_written == 64 * MIB
    assert allocated(fd) <= CAP
    position = 0
    for item in items:
        if isinstance(item, Dropped):
            assert item.start == position
            assert item.start >= CAP // 4
            position = item.end
        else:
            assert isinstance(item, Chunk)
            assert item.offset == position
            position += len(item.data)
            assert item.data == lines(item.offset, position)
    assert position == 64 * MIB

    stat = await spool.stat()
    (hole,) = stat.dropped
    assert hole.start == CAP // 4
    assert 64 * MIB - hole.end >= CAP // 2
    assert (stat.bytes_written, stat.bytes_kept) == (64 * MIB, 64 * MIB - (hole.end - hole.start))
    assert stat.truncated
    assert not stat.dropped_more
    whole = await spool.read_range(0, 2**62)
    assert whole.end == 64 * MIB
    head, middle, *tail = whole.items
    assert head == Chunk(0, lines(0, CAP // 4))
    assert middle == hole
    assert joined(tail) == lines(hole.end, 64 * MIB)


def lines(start: int, end: int) -> bytes:
    """What the writer of numbered lines wrote there."""
    first = start // 16
    text = b"".join(b"%015d\n" % number for number in range(first, -(-end // 16)))
    return text[start - first * 16 : end - first * 16]


async def test_a_short_output_is_left_alone(output: tuple[Spool, int]) -> None:
    spool, fd = output
    write_all(fd, EVERY_BYTE)
    with anyio.fail_after(DEADLINE_S):
        await spool.keep_bounded(ended())
    stat = await spool.stat()
    assert (stat.bytes_written, stat.bytes_kept, stat.dropped, stat.truncated) == (256, 256, (), False)


async def test_an_output_is_bounded_as_soon_as_there_is_a_descriptor_for_it(
    output: tuple[Spool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that has none left for a moment must not leave a command's output to grow for as long as it runs."""
    spool, fd = output
    write_all(fd, EVERY_BYTE * 16 * KIB)
    left, dup = [errno.EMFILE, errno.ENFILE], os.dup

    def none_left(descriptor: int) -> int:
        if left:
            raise OSError(left.pop(), "none left")
        return dup(descriptor)

    monkeypatch.setattr(os, "dup", none_left)
    with anyio.fail_after(DEADLINE_S):
        await spool.keep_bounded(ended())
    assert not left
    assert (await spool.stat()).truncated


async def test_the_next_daemon_knows_what_the_last_one_knew(
    spools: SpoolDirectory, output: tuple[Spool, int], inotify: Inotify
) -> None:
    spool, fd = output
    write_all(fd, EVERY_BYTE * 16 * KIB)
    await spool.keep_bounded(ended())
    before = await spool.stat()
    spool.close()
    again = SpoolDirectory(spools.path, inotify, cap_bytes=CAP)
    assert again.list() == [(1, Stream.OUT)]
    with again.open(1, Stream.OUT) as adopted:
        assert await adopted.stat() == before
        end = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(adopted.keep_bounded, end)
            write_all(fd, EVERY_BYTE * 16 * KIB)
            end.set()
        assert allocated(fd) <= CAP
        tail = await adopted.read_range(adopted.bytes_written - 1000, 1000)
        assert joined(tail.items) == (EVERY_BYTE * 4)[-1000:]
        assert await collect(adopted, adopted.bytes_written - 256, ended()) == [Chunk(8 * MIB - 256, EVERY_BYTE)]


async def test_growth_that_makes_no_event_is_seen(output: tuple[Spool, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that may open its spool again can map it and write without inotify noticing."""
    monkeypatch.setattr(spool_module, "UNSEEN_S_MAX", 0.01)
    monkeypatch.setattr(Inotify, "arm", lambda *_: 1)
    spool, fd = output
    end = anyio.Event()
    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(spool.keep_bounded, end)
            await anyio.wait_all_tasks_blocked()
            write_all(fd, bytes(3 * CAP))
            while allocated(fd) > CAP:
                await anyio.lowlevel.checkpoint()
            end.set()


async def test_a_hole_that_cannot_be_punched_is_tried_again_though_nothing_is_written_any_more(
    tmp_path: Path, inotify: Inotify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spool over its cap must not stay there because its command fell silent while the disk refused."""
    monkeypatch.setattr(spool_module, "UNSEEN_S_MAX", 0.01)
    refusals = iter([errno.ENOSPC] * 3)
    probed: list[int] = []

    def refusing(fd: int, start: int, end: int) -> None:
        # The first is the look whether this file system can punch at all.
        if probed and (code := next(refusals, None)) is not None:
            raise OSError(code, os.strerror(code))
        probed.append(fd)
        punch_hole(fd, start, end)

    spool, fd = SpoolDirectory(str(tmp_path / "full"), inotify, cap_bytes=CAP, punch=refusing).create(1, Stream.OUT)
    end = anyio.Event()
    with spool, anyio.fail_after(DEADLINE_S):
        write_all(fd, bytes(2 * CAP))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(spool.keep_bounded, end)
            while allocated(fd) > CAP:
                await anyio.lowlevel.checkpoint()
            end.set()
    os.close(fd)


async def test_bounding_that_is_cancelled_leaves_nothing_behind(output: tuple[Spool, int], inotify: Inotify) -> None:
    spool, fd = output
    before = open_descriptors()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(spool.keep_bounded, anyio.Event())
        write_all(fd, bytes(2 * CAP))
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert open_descriptors() == before
    assert inotify.armed_count == 0


# --- commands that tamper with their output -----------------------------------------------------------------


def grow(fd: int) -> int:
    """Make a file as large as its file system allows, without writing."""
    for exponent in range(62, 30, -1):
        try:
            os.ftruncate(fd, 2**exponent)
        except OSError as error:
            assert error.errno == errno.EFBIG  # noqa: PT017  (any other is a failure of the test)
        else:
            return 2**exponent
    raise AssertionError("no file system is as small as this")


async def test_a_file_grown_without_writing_is_skipped_and_not_read(output: tuple[Spool, int]) -> None:
    spool, fd = output
    os.write(fd, b"head")
    size = grow(fd)
    os.write(fd, b"tail")
    await spool.keep_bounded(ended())
    items = await collect(spool, 0, ended())
    read = sum(len(item.data) for item in items if isinstance(item, Chunk))
    assert read <= 2 * 4096 + 8
    assert items[-1] == Chunk(size, b"tail")
    stat = await spool.stat()
    assert stat.bytes_written == size + 4
    assert stat.bytes_kept <= 2 * 4096 + 8
    assert stat.truncated
    excerpt = await spool.read_range(size // 2, 2**62)
    assert excerpt == Excerpt((Dropped(size // 2, size), Chunk(size, b"tail")), size + 4)


async def test_a_file_that_is_cut_short_is_reported_and_followed_on(output: tuple[Spool, int]) -> None:
    """As a shell does with ``> /dev/stderr`` where the command may open its own output."""
    spool, fd = output
    end = anyio.Event()
    os.write(fd, b"0123456789")
    with anyio.fail_after(DEADLINE_S), spool.follow(0, until_ended=end) as items:
        assert await anext(items) == Chunk(0, b"0123456789")
        os.ftruncate(fd, 4)
        assert await anext(items) == Truncated(10, 4)
        os.write(fd, b"more")
        assert await anext(items) == Chunk(4, b"more")
        end.set()
        os.ftruncate(fd, 0)
        assert [item async for item in items] == [Truncated(8, 0)]


async def test_truncating_over_and_over_after_the_end_holds_no_follower(output: tuple[Spool, int]) -> None:
    spool, fd = output
    os.write(fd, b"0123456789")
    seen: list[Item] = []
    with anyio.fail_after(DEADLINE_S), spool.follow(0, until_ended=ended()) as items:
        async for item in items:
            seen.append(item)
            os.ftruncate(fd, 0 if len(seen) % 2 else 100)
    assert seen == [Chunk(0, b"0123456789"), Truncated(10, 0)]


async def test_a_hole_in_the_middle_is_reported_and_what_is_written_there_is_bounded(
    output: tuple[Spool, int],
) -> None:
    spool, fd = output
    write_all(fd, b"x" * 64 * KIB)
    punch(fd, 16 * KIB, 32 * KIB)
    items = await collect(spool, 0, ended())
    assert [item for item in items if isinstance(item, Dropped)] == [Dropped(16 * KIB, 32 * KIB)]
    assert sum(len(item.data) for item in items if isinstance(item, Chunk)) == 48 * KIB
    write_all(fd, b"x" * 8 * MIB)
    await spool.keep_bounded(ended())
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    os.pwrite(again, b"y" * 6 * MIB, MIB)
    os.close(again)
    assert allocated(fd) > 4 * CAP
    await spool.keep_bounded(ended())
    assert allocated(fd) <= CAP


async def test_blocks_beyond_the_end_are_given_back(output: tuple[Spool, int]) -> None:
    """``fallocate`` with KEEP_SIZE fills a disk without a byte written, and no hole reaches there."""
    spool, fd = output
    os.write(fd, b"output")
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate64(fd, 1, ctypes.c_int64(MIB), ctypes.c_int64(32 * MIB)) == 0
    assert allocated(fd) > 4 * CAP
    await spool.keep_bounded(ended())
    assert allocated(fd) <= CAP
    assert await collect(spool, 0, ended()) == [Chunk(0, b"output")]


async def test_a_write_that_gets_in_before_the_next_look_loses_nothing(tmp_path: Path, inotify: Inotify) -> None:
    """A program that writes a GiB at a time is above the ceiling again at once, and is honest all the same."""
    writers: list[int] = []

    def slow(fd: int, start: int, end: int) -> None:
        punch_hole(fd, start, end)
        for writer in writers:
            write_all(writer, EVERY_BYTE * 32 * KIB)

    spool, fd = SpoolDirectory(str(tmp_path / "box"), inotify, cap_bytes=CAP, punch=slow).create(1, Stream.OUT)
    write_all(fd, EVERY_BYTE * 32 * KIB)
    writers.append(fd)
    await spool.keep_bounded(ended())
    assert spool.bytes_written == 16 * MIB
    assert joined((await spool.read_range(8 * MIB, 8 * MIB)).items) == EVERY_BYTE * 32 * KIB
    spool.close()
    os.close(fd)


async def test_where_holes_fail_later_the_tail_goes_and_the_disk_does_not_fill(
    tmp_path: Path, inotify: Inotify
) -> None:
    works = True

    def fake(fd: int, start: int, end: int) -> None:
        if not works:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        punch_hole(fd, start, end)

    spool, fd = SpoolDirectory(str(tmp_path / "box"), inotify, cap_bytes=CAP, punch=fake).create(1, Stream.OUT)
    works = False
    write_all(fd, EVERY_BYTE * 32 * KIB)
    await spool.keep_bounded(ended())
    assert await collect(spool, 8 * MIB, ended()) == [Truncated(8 * MIB, CAP // 4)]
    assert joined((await spool.read_range(0, MIB)).items) == EVERY_BYTE * (CAP // 4 // 256)
    spool.close()
    os.close(fd)


async def test_a_file_in_shreds_has_bounded_answers(output: tuple[Spool, int]) -> None:
    spool, fd = output
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    for index in range(3000):
        os.pwrite(again, b"z", index * 3 * 4096)
    os.close(again)
    stat = await spool.stat()
    assert len(stat.dropped) == 64
    assert stat.dropped_more
    excerpt = await spool.read_range(0, 2**62)
    assert len(excerpt.items) == 1024
    rest = await spool.read_range(excerpt.end, 2**62)
    assert rest.items
    assert rest.end > excerpt.end


async def test_a_range_that_is_punched_while_it_is_read_is_no_output(
    output: tuple[Spool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros that the command never wrote must not reach a reader."""
    spool, fd = output
    write_all(fd, b"x" * 64 * KIB)
    original = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        punch(fd, 16 * KIB, 32 * KIB)
        return original(descriptor, length, offset)

    monkeypatch.setattr(spool_module.os, "pread", pread)
    excerpt = await spool.read_range(0, 64 * KIB)
    dropped = [item for item in excerpt.items if isinstance(item, Dropped)]
    assert dropped == [Dropped(16 * KIB, 32 * KIB)]
    assert all(set(item.data) == {ord("x")} for item in excerpt.items if isinstance(item, Chunk))


async def test_a_range_that_changes_each_time_it_is_read_counts_as_dropped(
    output: tuple[Spool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, fd = output
    write_all(fd, b"x" * 8 * KIB)
    monkeypatch.setattr(spool_module, "_next_hole", lambda _, start: start)
    assert (await spool.read_range(0, 8 * KIB)).items == (Dropped(0, 8 * KIB),)


# --- ranges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 10, slice(0, 10)), (250, 10, slice(250, 260)), (700, 2**62, slice(700, 768)), (768, 5, slice(0, 0))],
)
async def test_a_range_is_what_was_written_there(
    output: tuple[Spool, int], start: int, length: int, expected: slice
) -> None:
    spool, fd = output
    write_all(fd, EVERY_BYTE * 3)
    excerpt = await spool.read_range(start, length)
    assert joined(excerpt.items) == (EVERY_BYTE * 3)[expected]
    assert excerpt.end == start + len(joined(excerpt.items))


async def test_one_answer_holds_no_more_than_it_may(output: tuple[Spool, int]) -> None:
    spool, fd = output
    write_all(fd, EVERY_BYTE)
    excerpt = await spool.read_range(1, 200, bytes_max=50)
    assert excerpt == Excerpt((Chunk(1, EVERY_BYTE[1:51]),), 51)


@pytest.mark.parametrize("tool", ["direct", "thread"])
async def test_both_ways_of_reading_give_the_same(
    output: tuple[Spool, int], monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    """Reading on the spot is only faster."""
    if tool == "thread":
        monkeypatch.setattr(spool_module, "_read_if_in_memory", lambda *_: None)
    spool, fd = output
    write_all(fd, EVERY_BYTE * 1000)
    assert joined(await collect(spool, 5, ended(), chunk_bytes_max=999)) == (EVERY_BYTE * 1000)[5:]


async def test_a_read_where_the_kernel_cannot_say_nowait_goes_to_a_thread(
    output: tuple[Spool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every file system knows RWF_NOWAIT, and a page may be on disk only."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(spool_module.os, "preadv", refuse)
    spool, fd = output
    write_all(fd, EVERY_BYTE)
    assert await collect(spool, 0, ended()) == [Chunk(0, EVERY_BYTE)]


async def test_two_streams_of_one_process_stay_apart_and_merged_ones_keep_their_order(
    spools: SpoolDirectory,
) -> None:
    program = "import os\nfor n in range(500):\n  os.write(1, b'out %d\\n' % n)\n  os.write(2, b'err %d\\n' % n)"
    opened = [spools.create(1, Stream.OUT), spools.create(1, Stream.ERR), spools.create(2, Stream.BOTH)]
    (out, out_fd), (err, err_fd), (both, both_fd) = opened
    for stdout, stderr in ((out_fd, err_fd), (both_fd, both_fd)):
        with anyio.fail_after(DEADLINE_S):
            await anyio.run_process([sys.executable, "-c", program], stdout=stdout, stderr=stderr)
    for spool, word in ((out, b"out"), (err, b"err")):
        assert joined(await collect(spool, 0, ended())) == b"".join(b"%s %d\n" % (word, n) for n in range(500))
    merged = b"".join(b"out %d\nerr %d\n" % (n, n) for n in range(500))
    assert joined(await collect(both, 0, ended())) == merged
    for spool, fd in opened:
        spool.close()
        os.close(fd)
