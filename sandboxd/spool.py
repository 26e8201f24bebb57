"""The files on the host that hold the output of commands.

A command writes into its spool through a descriptor that the daemon opened and passed to it. So the daemon is not in
the data path: no reader can block the command, and when the daemon is killed the command goes on writing. All there
is to know of a spool is its file, so the next daemon opens it and knows as much as the last one.

The command is not trusted. It can append, but also truncate the file, seek, write in the middle, grow it to exabytes
without writing, and allocate beyond its end. Hence:

- Holes are skipped (SEEK_DATA), and reported, never read: zeros that nobody wrote cost nothing.
- Holes are punched by the file's allocated blocks, not by its size.
- Seeking, punching, truncating and unlinking take the inode's lock, which a command holds for as long as one of its
  ``write`` calls lasts: a write of 1 GiB kept SEEK_DATA waiting for 2.8 s. They run in threads, one per spool for
  readers and one for punching, so that a hostile command delays nobody but its own readers.
- Reading takes no such lock and is done on the spot when the pages are in memory (RWF_NOWAIT; 64 KiB in 9 us, where
  the way through a thread takes 56 us) and the file has no holes:
  it is short, and has as many bytes allocated as it is long.
- A write through a shared mapping or by io_submit(2) makes no inotify event, so the size is also looked at every
  ``UNSEEN_S_MAX`` while the command lives; that of all spools at once, and whoever has nothing new is not woken.

What one write adds, at most 2 GiB, cannot be punched before it has returned, and another may get in first.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Self, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from runtimes.inotify import Inotify, WatchRefused, shape_of
from sandboxd.failures import CapacityExceeded, Failure, NotFound, Unauthorized, Unsupported
from sandboxd.spool_plan import (
    CAP_BYTES,
    DROPPED_MAX,
    PAUSE_S_MAX,
    RATE_MAX,
    RESERVED_BYTES_MAX,
    Bounds,
    Chunk,
    Dropped,
    Excerpt,
    Hole,
    Item,
    SpoolStat,
    Stream,
    Truncated,
    beyond_end,
    bounds_of,
    file_name,
    hole_to_punch,
    next_rate,
    parse_name,
    pause_s,
)

CHUNK_BYTES_MAX = 64 * 1024
THREAD_CHUNK_FACTOR = 4
"""A chunk read by a thread may be this much larger, which makes up for the way there: 256 KiB by default."""
EXCERPT_BYTES_MAX = 8 * 1024 * 1024
EXCERPT_ITEMS_MAX = 1024
FOLLOW_INTERVAL_S = 0.004
"""A follower that waits is woken at once, and then at most this often: a command that writes byte by byte would
otherwise keep the daemon busy."""
UNSEEN_S_MAX = 2.0
"""How long a growth that makes no event may go unseen."""
BLOCK_BYTES_MIN = 4096
RACES_MAX = 8
"""How often a range that changes while it is read is read again, before it counts as dropped."""

_SECTOR_BYTES = 512
"""The unit of st_blocks, whatever the file system's block is."""
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

Puncher = Callable[[int, int, int], None]
_Answer = TypeVar("_Answer")

_libc = ctypes.CDLL(None, use_errno=True)
# Plain ``fallocate`` takes offsets of 32 bits on some machines, and not every libc has the other name.
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, start: int, end: int) -> None:
    """Give the blocks of a range back to the file system. Size and offsets stay; the range reads as zeros.

    Raises:
        OSError: the kernel says no: EOPNOTSUPP where the file system cannot.
    """
    if _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, start, end - start) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "fallocate")


class SpoolDirectory:
    """The spools of one sandbox: a directory of mode 0700, in which the files are 0600.

    Args:
        path: Where; made when the first spool is.
        inotify: What followers are woken by.
        cap_bytes: How much of each stream is kept on disk.
        punch: How a hole is punched.
    """

    def __init__(
        self, path: str, inotify: Inotify, *, cap_bytes: int = CAP_BYTES, punch: Puncher = punch_hole
    ) -> None:
        self.path = path
        self._inotify = inotify
        self._cap_bytes = cap_bytes
        self._punch = punch
        self._can_punch = False

    def create(self, command_id: int, stream: Stream) -> tuple[Spool, int]:
        """Make the spool of a command that is about to start.

        Returns:
            The spool, and the descriptor to pass to the command (write only, appending); the caller closes both.

        Raises:
            Unauthorized: the directory is not ours alone.
            Unsupported: the file system cannot punch holes, so that the spool could not be bounded.
            CapacityExceeded: the disk is full, or the daemon has no descriptor left.
        """
        name = file_name(command_id, stream)
        with _failing_as(f"cannot keep the output of command {name}"), contextlib.ExitStack() as undo:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            with _directory(self.path) as directory_fd:
                self._require_private(directory_fd)
                fd = os.open(name, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory_fd)
                undo.callback(os.close, fd)
                with contextlib.ExitStack() as discard:
                    discard.callback(os.unlink, name, dir_fd=directory_fd)
                    self._require_holes(fd)
                    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
                    writer_fd = os.open(name, flags, dir_fd=directory_fd)
                    discard.pop_all()
            undo.pop_all()
        return self._spool(fd, command_id, stream), writer_fd

    def open(self, command_id: int, stream: Stream) -> Spool:
        """Open a spool that is there, whoever made it: this daemon or one before. The caller closes it.

        Raises:
            NotFound: it is not there.
        """
        return self._spool(self._open(file_name(command_id, stream)), command_id, stream)

    def append(self, command_id: int, stream: Stream) -> int:
        """A descriptor to go on writing a spool with, of which we are the only writer; the caller closes it.

        Raises:
            NotFound: it is not there.
        """
        name = file_name(command_id, stream)
        with _failing_as(f"cannot continue the output of command {name}"), _directory(self.path) as directory_fd:
            return os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)

    def _open(self, name: str) -> int:
        with _failing_as(f"cannot open the output of command {name}"), _directory(self.path) as directory_fd:
            fd = os.open(name, _OPEN_FLAGS, dir_fd=directory_fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NotFound(f"cannot open the output of command {name}", detail="it is not a file")
        return fd

    def list(self) -> list[tuple[int, Stream]]:
        """The spools that are there, in the order of their names."""
        return sorted(_spools_in(self.path))

    async def remove(self, command_id: int) -> None:
        """Remove what a command has written. Who reads it goes on reading. Idempotent."""
        await anyio.to_thread.run_sync(_unlink, self.path, {(command_id, stream) for stream in Stream})

    async def erase(self) -> None:
        """Remove the directory and all that is in it. Follows no symlink. Idempotent."""
        await anyio.to_thread.run_sync(_erase, self.path)

    def _spool(self, fd: int, command_id: int, stream: Stream) -> Spool:
        block_bytes = max(BLOCK_BYTES_MIN, os.fstat(fd).st_blksize)
        bounds = bounds_of(self._cap_bytes, block_bytes)
        reopen = partial(self._open, file_name(command_id, stream))
        return Spool(fd, command_id, stream, self._inotify, bounds, self._punch, reopen)

    def _require_private(self, directory_fd: int) -> None:
        status = os.fstat(directory_fd)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise Unauthorized(
                f"cannot keep the output of commands in {self.path}",
                detail=f"it belongs to user {status.st_uid}, with mode {stat.S_IMODE(status.st_mode):04o}",
            )

    def _require_holes(self, fd: int) -> None:
        """Make sure, once per directory, that a hole can be punched and found, on a file that is empty so far.

        There is no other way to bound an output that leaves the command alone: RLIMIT_FSIZE would hold for every
        file that the command writes, and truncating would lose the tail and shift all offsets.
        """
        if self._can_punch:
            return
        block_bytes = max(BLOCK_BYTES_MIN, os.fstat(fd).st_blksize)
        os.pwrite(fd, bytes(block_bytes), 0)
        try:
            self._punch(fd, 0, block_bytes)
            found = _next_data(fd, 0) is None
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            found = False
        if not found:
            raise Unsupported(
                f"cannot keep the output of commands in {self.path}",
                detail="its file system cannot punch holes, so that output could not be bounded",
                hint="set SANDBOXD_STATE_DIR to a directory on ext4, XFS, Btrfs or tmpfs",
            )
        os.ftruncate(fd, 0)
        self._can_punch = True


async def sweep(root: str, known: Mapping[str, Collection[int]], spared: Collection[str] = ()) -> list[str]:
    """Remove, after a start, the spools that no record knows.

    Args:
        root: The directory that holds one directory per sandbox.
        known: Names of those directories, each with the ids of the commands whose spools stay.
        spared: Names of those that stay as they are.

    Returns:
        What was removed, relative to ``root``.
    """
    return await anyio.to_thread.run_sync(_sweep, root, known, spared)


class Spool:
    """One stream of one command's output. Keeps one descriptor, until it is closed; followers keep one each.

    Every method opens the file anew where it was closed, and raises NotFound where it was removed.
    """

    def __init__(
        self,
        fd: int,
        command_id: int,
        stream: Stream,
        inotify: Inotify,
        bounds: Bounds,
        punch: Puncher,
        reopen: Callable[[], int],
    ) -> None:
        self.command_id = command_id
        self.stream = stream
        self._fd = fd
        self._inotify = inotify
        self._bounds = bounds
        self._punch = punch
        self._reopen = reopen
        self._readers = anyio.CapacityLimiter(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Keep no descriptor any longer. Followers, and a ``keep_bounded`` that runs, go on. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def bytes_written(self) -> int:
        """How long the output is, including what was dropped. The command can make it anything."""
        with self._opened() as fd:
            return os.fstat(fd).st_size

    async def stat(self) -> SpoolStat:
        """What is there and what is not."""
        return await self._in_thread(_stat)

    async def read_range(self, start: int, length: int, *, bytes_max: int = EXCERPT_BYTES_MAX) -> Excerpt:
        """Read the output from ``start``, in order. The range may reach beyond the end.

        Args:
            start: Byte offset.
            length: How far, counting what was dropped.
            bytes_max: How much may be read into memory.

        Returns:
            What is there. Its ``end`` is short of ``start + length`` at the end of the output, and when one answer
            may not hold more.

        Raises:
            ValueError: a number is negative.
        """
        if start < 0 or length < 0 or bytes_max < 0:
            raise ValueError(f"cannot read {length} bytes at {start}, {bytes_max} at most")
        return await self._in_thread(lambda fd: _read_range(fd, start, start + length, bytes_max))

    def follow(self, offset: int, *, until_ended: anyio.Event, chunk_bytes_max: int = CHUNK_BYTES_MAX) -> Follower:
        """Follow the output from a byte offset; to be used in ``with``.

        Args:
            offset: Where to begin. Beyond the end, the first item is a ``Truncated``.
            until_ended: Set by the caller when the command has ended. Items then end with what is written by then.
            chunk_bytes_max: The size of the pieces; up to four times that when a thread must read them.

        Raises:
            ValueError: a number that cannot be meant.
        """
        if offset < 0 or chunk_bytes_max < 1:
            raise ValueError(f"cannot follow from {offset} by {chunk_bytes_max} bytes")
        whole_bytes_max = self._bounds.head_bytes + self._bounds.tail_bytes
        waiter = _Waiter(self._inotify, self._descriptor(), until_ended)
        return Follower(waiter, self._readers, offset, chunk_bytes_max, whole_bytes_max)

    async def keep_bounded(self, ended: anyio.Event) -> None:
        """Punch holes as they become due, until the command has ended. To be run as a task while it lives.

        A hole that cannot be punched is tried again; if the file outgrows the ceiling meanwhile, its tail goes. Where
        no descriptor is to be had, it begins when there is one.
        """
        threads = anyio.CapacityLimiter(1)
        waiter = _Waiter(self._inotify, await self._descriptor_at_last(), ended)
        punched_until, rate, size, looked_s = 0, float(RATE_MAX), 0, time.monotonic()
        try:
            while True:
                last = waiter.ended
                if _due(waiter.fd, self._bounds, punched_until):
                    punched_until = await anyio.to_thread.run_sync(
                        _bound, waiter.fd, self._bounds, punched_until, self._punch, limiter=threads
                    )
                if last:
                    return
                status, now_s = os.fstat(waiter.fd), time.monotonic()
                rate = next_rate(rate, grown_bytes=status.st_size - size, elapsed_s=now_s - looked_s)
                size, looked_s = status.st_size, now_s
                await waiter.pause(
                    pause_s(
                        self._bounds,
                        size_bytes=size,
                        allocated_bytes=_allocated(status),
                        punched_until=punched_until,
                        rate=rate,
                    )
                )
                try:
                    # Still due: it could not be punched, and is tried again though nothing changes.
                    still_due = _due(waiter.fd, self._bounds, punched_until)
                    with anyio.move_on_after(UNSEEN_S_MAX if still_due else None):
                        await waiter.changed(status)
                except WatchRefused:
                    # The cap holds without a watch too, only less cheaply.
                    await waiter.pause(PAUSE_S_MAX)
        finally:
            waiter.close()

    async def _in_thread(self, look: Callable[[int], _Answer]) -> _Answer:
        with self._opened() as fd:
            return await anyio.to_thread.run_sync(look, fd, limiter=self._readers)

    def _descriptor(self) -> int:
        return os.dup(self._fd) if self._fd >= 0 else self._reopen()

    async def _descriptor_at_last(self) -> int:
        while True:
            try:
                return self._descriptor()
            except CapacityExceeded:
                pass
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
            await anyio.sleep(PAUSE_S_MAX)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        fd = self._descriptor()
        try:
            yield fd
        finally:
            os.close(fd)


class Follower:
    """The items of one spool from some offset on: an async iterator for one task, made by `Spool.follow`.

    Holds a descriptor and a position, and no output: a slow one falls behind, and is told what was dropped meanwhile.
    Raises `WatchRefused` when the kernel gives no watch.
    """

    def __init__(
        self,
        waiter: _Waiter,
        threads: anyio.CapacityLimiter,
        offset: int,
        chunk_bytes_max: int,
        whole_bytes_max: int,
    ) -> None:
        self.offset = offset
        self._waiter = waiter
        self._threads = threads
        self._chunk_bytes_max = chunk_bytes_max
        self._whole_bytes_max = whole_bytes_max
        self._end: int | None = None
        self._at_end = False
        self._turned_s = -FOLLOW_INTERVAL_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Follow no longer. Idempotent."""
        self._waiter.close()

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> Item:
        while not self._waiter.closed:
            status = os.fstat(self._waiter.fd)
            end = self._end_of(status)
            if self.offset < end and self._at_end:
                await self._take_turn()
                self._at_end = False
            elif self.offset < end:
                item = await self._read(end)
                if item is not None:
                    self.offset = item.end if isinstance(item, Dropped) else item.offset + len(item.data)
                    self._at_end = self.offset == end
                    return item
                await self._take_turn()
            elif self.offset > end:
                await self._take_turn()
                truncated, self.offset = Truncated(self.offset, end), end
                return truncated
            elif self._end is not None:
                self.close()
            else:
                await self._take_turn()
                await self._waiter.changed(status)
                self._at_end = False
                self._turned_s = time.monotonic()
        raise StopAsyncIteration

    def _end_of(self, status: os.stat_result) -> int:
        """Up to where there is something to read."""
        if self._waiter.ended:
            # What a process that was left behind appends after the end is not waited for, and what it cuts off is
            # cut off once.
            self._end = status.st_size if self._end is None else min(self._end, status.st_size)
        return status.st_size if self._end is None else self._end

    async def _read(self, end: int) -> Chunk | Dropped | None:
        if end <= self._whole_bytes_max:
            bytes_max = min(end - self.offset, self._chunk_bytes_max)
            chunk = _read_if_in_memory(self._waiter.fd, self.offset, bytes_max, self._whole_bytes_max)
            if chunk is not None:
                await anyio.lowlevel.checkpoint()
                return chunk
        bytes_max = self._chunk_bytes_max * THREAD_CHUNK_FACTOR
        return await anyio.to_thread.run_sync(
            _read_item, self._waiter.fd, self.offset, end, bytes_max, limiter=self._threads
        )

    async def _take_turn(self) -> None:
        """Before something that a command can make happen over and over."""
        await self._waiter.pause(self._turned_s + FOLLOW_INTERVAL_S - time.monotonic())
        self._turned_s = time.monotonic()


class _Waiter:
    """Waits for a file to change, or for a command to end. Owns the file's descriptor."""

    def __init__(self, inotify: Inotify, fd: int, ended: anyio.Event) -> None:
        self.fd = fd
        self._ended = ended
        self._watch = inotify.watch(fd)
        self._ending = asyncio.ensure_future(ended.wait())
        self._ending.add_done_callback(lambda _: self._watch.wake())

    @property
    def closed(self) -> bool:
        return self.fd < 0

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def close(self) -> None:
        if self.fd >= 0:
            self._ending.cancel()
            self._watch.close()
            os.close(self.fd)
            self.fd = -1

    async def pause(self, duration_s: float) -> None:
        """Let time pass; not after the end."""
        if duration_s > 0:
            with anyio.move_on_after(duration_s):
                await self._ended.wait()

    async def changed(self, seen: os.stat_result) -> None:
        """Return when the file is not as it was seen, or at the end.

        Raises:
            WatchRefused: the kernel gives no watch.
        """
        self._watch.arm()
        if self.ended or self._watch.shape != shape_of(seen):
            await anyio.lowlevel.checkpoint()
            return
        await self._watch.wait_for_change(shape_of(seen), look_s=UNSEEN_S_MAX)


# --- what takes the inode's lock: in threads only -----------------------------------------------------------


def _next_data(fd: int, start: int) -> int | None:
    """The first offset from ``start`` on where there is data; None: only a hole, or the end, follows."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def _next_hole(fd: int, start: int) -> int:
    """The first offset from ``start`` on where there is none; ``start`` when the file ends before."""
    try:
        return os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return start


def _read_item(fd: int, start: int, end: int, bytes_max: int) -> Chunk | Dropped | None:
    """Read from ``start``, which is less than ``end``. None: the file ends before ``start`` by now."""
    for _ in range(RACES_MAX):
        end = min(end, os.fstat(fd).st_size)
        if end <= start:
            return None
        data_start = _next_data(fd, start)
        if data_start is None or data_start > start:
            return Dropped(start, end if data_start is None else min(data_start, end))
        data = os.pread(fd, min(bytes_max, end - start), start)
        # Asked after reading: what was punched while it was read must not pass for zeros that the command wrote.
        data = data[: _next_hole(fd, start) - start]
        if data:
            return Chunk(start, data)
    return Dropped(start, end)


def _read_range(fd: int, start: int, end: int, bytes_max: int) -> Excerpt:
    items: list[Chunk | Dropped] = []
    end = min(end, os.fstat(fd).st_size)
    while start < end and bytes_max > 0 and len(items) < EXCERPT_ITEMS_MAX:
        item = _read_item(fd, start, end, bytes_max)
        if item is None:
            break
        items.append(item)
        if isinstance(item, Dropped):
            start = item.end
        else:
            start += len(item.data)
            bytes_max -= len(item.data)
    return Excerpt(tuple(items), start)


def _stat(fd: int) -> SpoolStat:
    status = os.fstat(fd)
    size, position = status.st_size, 0
    dropped: list[Dropped] = []
    while position < size and len(dropped) < DROPPED_MAX:
        hole = _next_hole(fd, position)
        if hole >= size:
            position = size
            break
        data = _next_data(fd, hole)
        position = size if data is None else min(data, size)
        dropped.append(Dropped(hole, position))
    more = position < size
    kept = min(size, _allocated(status)) if more else size - sum(hole.end - hole.start for hole in dropped)
    return SpoolStat(bytes_written=size, bytes_kept=kept, dropped=tuple(dropped), dropped_more=more)


def _bound(fd: int, bounds: Bounds, punched_until: int, punch: Puncher) -> int:
    """Make a file smaller on disk; return where its last hole ends."""
    hole = _hole(os.fstat(fd), bounds, punched_until)
    try:
        if hole is not None:
            punch(fd, hole.start, hole.end)
            punched_until = hole.end
    except OSError:
        # The disk must not fill: the tail goes, and the command goes on after the head.
        if _allocated(os.fstat(fd)) > bounds.ceiling_bytes:
            os.ftruncate(fd, bounds.head_bytes)
        return punched_until
    _give_back(fd, bounds, punched_until)
    return punched_until


def _give_back(fd: int, bounds: Bounds, punched_until: int) -> None:
    """Take blocks beyond the end of a file from it, if they are too many; no output with them.

    Truncating to a size that was read a moment ago would cut off what was written since. So the file must be the
    same before and after waiting for its lock, which says that no write is under way, or hold more than any write
    reserves.
    """
    for _ in range(RACES_MAX):
        seen = os.fstat(fd)
        beyond = beyond_end(
            bounds, size_bytes=seen.st_size, allocated_bytes=_allocated(seen), punched_until=punched_until
        )
        if beyond <= bounds.ceiling_bytes:
            return
        _next_data(fd, seen.st_size)
        if beyond > RESERVED_BYTES_MAX or shape_of(os.fstat(fd)) == shape_of(seen):
            os.ftruncate(fd, seen.st_size)
            return


def _unlink(path: str, spools: Collection[tuple[int, Stream]]) -> None:
    with contextlib.suppress(FileNotFoundError), _directory(path) as directory_fd:
        for command_id, stream in spools:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file_name(command_id, stream), dir_fd=directory_fd)


def _erase(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _sweep(root: str, known: Mapping[str, Collection[int]], spared: Collection[str]) -> list[str]:
    removed: list[str] = []
    with contextlib.suppress(FileNotFoundError), os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False) or entry.name in spared:
                continue
            if entry.name not in known:
                _erase(entry.path)
                removed.append(entry.name)
                continue
            unknown = [spool for spool in _spools_in(entry.path) if spool[0] not in known[entry.name]]
            _unlink(entry.path, unknown)
            removed += [os.path.join(entry.name, file_name(*spool)) for spool in unknown]
    return sorted(removed)


# --- what does not ------------------------------------------------------------------------------------------


def _allocated(status: os.stat_result) -> int:
    return status.st_blocks * _SECTOR_BYTES


def _hole(status: os.stat_result, bounds: Bounds, punched_until: int) -> Hole | None:
    return hole_to_punch(
        bounds, size_bytes=status.st_size, allocated_bytes=_allocated(status), punched_until=punched_until
    )


def _due(fd: int, bounds: Bounds, punched_until: int) -> bool:
    status = os.fstat(fd)
    return _allocated(status) > bounds.ceiling_bytes or _hole(status, bounds, punched_until) is not None


def _read_if_in_memory(fd: int, start: int, bytes_max: int, whole_bytes_max: int) -> Chunk | None:
    """Read what needs neither disk nor lock, of a file that is still whole; None: a thread must see to it."""
    buffer = bytearray(bytes_max)
    try:
        count = os.preadv(fd, [buffer], start, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        return None
    # Asked after reading, as in `_read_item`. Nothing is punched out of a file that is as short as this; a hole that
    # the command made itself leaves it shorter on disk than it is long.
    status = os.fstat(fd)
    if count == 0 or status.st_size > whole_bytes_max or _allocated(status) < status.st_size:
        return None
    return Chunk(start, bytes(memoryview(buffer)[:count]))


def _spools_in(path: str) -> Iterator[tuple[int, Stream]]:
    with contextlib.suppress(FileNotFoundError), _directory(path) as directory_fd:
        for name in os.listdir(directory_fd):
            spool = parse_name(name)
            if spool is not None:
                yield spool


@contextlib.contextmanager
def _directory(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _failing_as(brief: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(brief, detail="there is none, or it was removed") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
            raise CapacityExceeded(brief, detail=error.strerror or "", hint="sandboxctl doctor") from error
        raise Failure(brief, detail=str(error), hint="sandboxctl doctor") from error
