"""Changes of a directory tree inside of a sandbox, read from an inotify instance that its file worker made."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

import msgspec

from runtimes.init import files_wire as wire
from runtimes.init.exchange import ChannelClosed
from runtimes.init.file_worker import FileRefused, FileWorker, WorkerLost, mismatch
from runtimes.init.files_walk import Walk, Watching
from runtimes.init.files_wire import DEPTH_MAX, Entry, FileType, Flag, RequestType, WatchReply

WATCHED_DIRECTORIES_MAX = 16_384
# Of the paths of these directories, which a sandbox can make as long as it likes.
WATCHED_PATH_BYTES_MAX = 4 * 1024 * 1024
# Of what waits to be told, and of its paths. What is beyond is told as an overflow.
CHANGES_MAX = 16_384
CHANGES_PATH_BYTES_MAX = 4 * 1024 * 1024
# After so much work at a stretch the loop is lent to others: a storm in one sandbox is nobody else's weather.
TURN_S = 0.002
# The two halves of a rename are put into the queue one after the other, not both at once.
RENAME_PAIR_S = 0.01

_INOTIFY_EVENT = struct.Struct("iIII")
# Some 500 events, which are looked at in one go.
_INOTIFY_BYTES = 16 * 1024
_IN_MODIFY = 0x2
_IN_ATTRIB = 0x4
_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_IN_ISDIR = 0x40000000


class ChangeKind(enum.Enum):
    """What happened to a path."""

    CREATED = "created"
    MODIFIED = "modified"
    CLOSED_AFTER_WRITE = "closed_after_write"
    ATTRIBUTES = "attributes"
    REMOVED = "removed"
    RENAMED = "renamed"
    OVERFLOW = "overflow"


class Change(msgspec.Struct, frozen=True):
    """A change below a watched path, which is itself the empty path.

    OVERFLOW: changes were lost, look again. `old_path` is that of RENAMED, when both are below the watched path.
    """

    kind: ChangeKind
    path: bytes
    is_directory: bool
    old_path: bytes | None = None


class _Event(msgspec.Struct, frozen=True):
    """As inotify has it."""

    watch: int
    mask: int
    cookie: int
    name: bytes


class Watcher:
    """Changes below a path: `await changes()`, again and again, and `close()` in the end.

    New directories are watched as they appear. What they hold by then is told as created, and may be told twice.
    When the watched path itself is gone, that is the last change.
    `truncated`: some directories are not watched, for there are too many, or they are too deep or not readable.
    All that it holds is bounded: what nobody fetches stays in the kernel's queue, which overflows, and that is told.
    """

    def __init__(self, worker: FileWorker, path: bytes, *, recursive: bool, follow: bool) -> None:
        self._worker = worker
        self._path = path
        self._recursive = recursive
        self._flags = Flag.FOLLOW if follow else Flag.NONE
        self._watching: Watching | None = None
        self._paths: dict[int, bytes] = {}
        self._path_bytes = 0
        # What was read and not yet told: it outlives a call that is cancelled.
        self._events: list[_Event] = []
        self._steps: deque[_Event | tuple[_Event, _Event]] = deque()
        self._changes: list[Change] = []
        self._changes_path_bytes = 0
        self._waiting: asyncio.Future[None] | None = None
        self.truncated = False

    async def start(self) -> None:
        """Begins to watch."""
        reply, received, life = await self._worker.ask(wire.encode_watch, self._path, again=True)
        if not isinstance(reply, WatchReply) or len(received) != 1 or not _is_inotify(received[0]):
            raise mismatch(life, received)
        os.set_blocking(received[0], False)
        self._stop()
        self._watching = Watching(received[0], reply.token, life)
        self._worker.on_close.add(self._wake)
        self._forget_paths()
        await self._add(b"")

    async def changes(self) -> list[Change]:
        """What happened since the last call, in order; waits until something has. Cancelled, it loses nothing.

        Raises:
            ChannelClosed: the watch, or the sandbox's files, were closed.
            As every method of `FilesChannel`, if the worker was lost and cannot be replaced.
        """
        while not self._changes:
            if self._watching is None or self._worker.closed:
                raise ChannelClosed("the watch was closed")
            try:
                if not self._steps:
                    await self._read(self._watching.descriptor)
                await self._apply_steps()
            except WorkerLost:
                # What was watched still is; but nothing can be added any more, and something may be missing.
                await self.start()
                self._events, self._steps = [], deque()
                self._changes, self._changes_path_bytes = [], 0
                self._tell(ChangeKind.OVERFLOW, b"", is_directory=True)
        changes, self._changes, self._changes_path_bytes = self._changes, [], 0
        return changes

    async def _apply_steps(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self._steps and not self._full():
            await self._apply(self._steps[0])
            self._steps.popleft()
            if loop.time() - began >= TURN_S:
                await asyncio.sleep(0)
                began = loop.time()

    def close(self) -> None:
        """Idempotent; who waits for changes is to be cancelled first."""
        self._stop()

    def _stop(self) -> None:
        self._worker.on_close.discard(self._wake)
        if self._watching is not None:
            os.close(self._watching.descriptor)
            self._watching.life.tell(wire.encode_close(0, self._watching.token))
            self._watching = None

    # ---- reading

    async def _read(self, descriptor: int) -> None:
        """Takes what there is, at least one event, and the second half of a rename if the first came last."""
        while not self._events:
            await self._readable(descriptor)
            self._events += _read_events(descriptor)
        if self._events[-1].mask & _IN_MOVED_FROM:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENAME_PAIR_S):
                    await self._readable(descriptor)
                self._events += _read_events(descriptor)
        self._steps.extend(_without_repeats(_paired(self._events)))
        self._events = []

    async def _readable(self, descriptor: int) -> None:
        """Waits until there are events, or the files are closed, which is an error."""
        loop = asyncio.get_running_loop()
        self._waiting = loop.create_future()
        loop.add_reader(descriptor, self._wake)
        try:
            await self._waiting
        finally:
            loop.remove_reader(descriptor)
            self._waiting = None
        if self._worker.closed:
            raise ChannelClosed("the files were closed")

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # ---- telling

    def _full(self) -> bool:
        return len(self._changes) >= CHANGES_MAX or self._changes_path_bytes >= CHANGES_PATH_BYTES_MAX

    def _tell(self, kind: ChangeKind, path: bytes, *, is_directory: bool, old_path: bytes | None = None) -> None:
        if not self._full():
            self._changes.append(Change(kind, path, is_directory, old_path))
            self._changes_path_bytes += len(path) + len(old_path or b"")
        elif self._changes[-1].kind is not ChangeKind.OVERFLOW:
            self._changes.append(Change(ChangeKind.OVERFLOW, b"", is_directory=True))

    async def _apply(self, event: _Event | tuple[_Event, _Event]) -> None:
        if isinstance(event, tuple):
            await self._apply_rename(*event)
            return
        if event.mask & _IN_Q_OVERFLOW:
            await self._look_again()
            self._tell(ChangeKind.OVERFLOW, b"", is_directory=True)
            return
        folder = self._paths.get(event.watch)
        if event.mask & _IN_IGNORED:
            self._drop(event.watch)
        if folder is None:
            return
        is_directory = bool(event.mask & _IN_ISDIR)
        if not event.name:
            self._apply_to_watched(event, folder)
            return
        path = _join(folder, event.name)
        for bit, kind in _KINDS.items():
            if event.mask & bit:
                self._tell(kind, path, is_directory=is_directory)
        if is_directory and self._recursive:
            if event.mask & (_IN_CREATE | _IN_MOVED_TO):
                await self._add(path)
            elif event.mask & _IN_MOVED_FROM:
                await self._forget(path)

    def _apply_to_watched(self, event: _Event, folder: bytes) -> None:
        """Of a directory below, its parent tells the same; of the watched path itself there is nobody else."""
        if folder:
            return
        for bit, kind in _OWN_KINDS.items():
            if event.mask & bit:
                self._tell(kind, b"", is_directory=bool(event.mask & _IN_ISDIR))

    async def _apply_rename(self, old: _Event, new: _Event) -> None:
        folders = self._paths.get(old.watch), self._paths.get(new.watch)
        if folders[0] is None or folders[1] is None:
            return
        before, after = _join(folders[0], old.name), _join(folders[1], new.name)
        self._tell(ChangeKind.RENAMED, after, is_directory=bool(new.mask & _IN_ISDIR), old_path=before)
        if not new.mask & _IN_ISDIR or not self._recursive:
            return
        moved = self._watched_in(before)
        for watch, path in moved.items():
            self._keep(watch, after + path[len(before) :])
        if before not in moved.values():  # it bore its old name too short a time to be found under it
            await self._add(after)

    # ---- what is watched

    async def _add(self, below: bytes) -> None:
        """Watches a directory, and with `recursive` what is below; tells what is there, unless it is the first."""
        assert self._watching is not None
        depth = DEPTH_MAX if self._recursive else 0
        flags = Flag.NONE if below else self._flags | Flag.DIRECTORIES_ONLY
        path = _join(self._path, below) if below else self._path
        try:
            async with self._worker.walks, Walk(self._worker, path, flags, depth, self._watching) as walk:
                while (page := await walk.next_page()) is not None:
                    self._note(below, walk.root_watch, page)
                    if len(self._paths) > WATCHED_DIRECTORIES_MAX or self._path_bytes > WATCHED_PATH_BYTES_MAX:
                        self.truncated = True
                        return
                self.truncated |= walk.truncated
        except FileRefused as error:
            if not below:
                raise
            # It is gone again, or is not ours to read.
            self.truncated |= error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

    def _note(self, below: bytes, own_watch: int, page: list[Entry]) -> None:
        if own_watch:
            self._keep(own_watch, below)
        for entry in page:
            path = _join(below, entry.path)
            if entry.watch:
                self._keep(entry.watch, path)
            self.truncated |= entry.errno != 0
            if below:
                self._tell(ChangeKind.CREATED, path, is_directory=entry.facts.type is FileType.DIRECTORY)

    def _keep(self, watch: int, path: bytes) -> None:
        self._path_bytes += len(path) - len(self._paths.get(watch, b""))
        self._paths[watch] = path

    def _drop(self, watch: int) -> None:
        self._path_bytes -= len(self._paths.pop(watch, b""))

    def _forget_paths(self) -> None:
        self._paths, self._path_bytes = {}, 0

    async def _look_again(self) -> None:
        before = set(self._paths)
        self._forget_paths()
        await self._add(b"")
        await self._unwatch(before - set(self._paths))

    async def _forget(self, below: bytes) -> None:
        """A directory was moved out of sight: what happens there is no longer ours to tell."""
        await self._unwatch(set(self._watched_in(below)))

    def _watched_in(self, folder: bytes) -> dict[int, bytes]:
        return {
            watch: path for watch, path in self._paths.items() if path == folder or path.startswith(folder + b"/")
        }

    async def _unwatch(self, watches: set[int]) -> None:
        assert self._watching is not None
        for watch in watches:
            self._drop(watch)
            encode = partial(wire.encode_unwatch, token=self._watching.token, watch=watch)
            with contextlib.suppress(FileRefused):  # EINVAL: it was removed meanwhile
                await self._worker.do(encode, self._path, RequestType.UNWATCH, life=self._watching.life)


_KINDS = {
    _IN_CREATE: ChangeKind.CREATED,
    _IN_MOVED_TO: ChangeKind.CREATED,
    _IN_MODIFY: ChangeKind.MODIFIED,
    _IN_CLOSE_WRITE: ChangeKind.CLOSED_AFTER_WRITE,
    _IN_ATTRIB: ChangeKind.ATTRIBUTES,
    _IN_DELETE: ChangeKind.REMOVED,
    _IN_MOVED_FROM: ChangeKind.REMOVED,
}
_OWN_KINDS = {
    _IN_MODIFY: ChangeKind.MODIFIED,
    _IN_CLOSE_WRITE: ChangeKind.CLOSED_AFTER_WRITE,
    _IN_ATTRIB: ChangeKind.ATTRIBUTES,
    _IN_DELETE_SELF: ChangeKind.REMOVED,
    _IN_MOVE_SELF: ChangeKind.REMOVED,
}


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name


def _is_inotify(descriptor: int) -> bool:
    """A path that the kernel makes up starts with a slash; this name is its own."""
    return os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:inotify"


def _read_events(descriptor: int) -> list[_Event]:
    try:
        data = os.read(descriptor, _INOTIFY_BYTES)
    except BlockingIOError:
        return []
    events = []
    at = 0
    while at < len(data):
        watch, mask, cookie, length = _INOTIFY_EVENT.unpack_from(data, at)
        at += _INOTIFY_EVENT.size
        events.append(_Event(watch, mask, cookie, data[at : at + length].rstrip(b"\0")))
        at += length
    return events


def _paired(events: list[_Event]) -> Iterator[_Event | tuple[_Event, _Event]]:
    waiting: _Event | None = None
    for event in events:
        if waiting is not None and event.mask & _IN_MOVED_TO and event.cookie == waiting.cookie:
            yield waiting, event
            waiting = None
            continue
        if waiting is not None:
            yield waiting
            waiting = None
        if event.mask & _IN_MOVED_FROM:
            waiting = event
        else:
            yield event
    if waiting is not None:
        yield waiting


def _without_repeats(
    events: Iterable[_Event | tuple[_Event, _Event]],
) -> Iterator[_Event | tuple[_Event, _Event]]:
    """A file that is written in small pieces is one change, not thousands."""
    last: object = None
    for event in events:
        if event != last or isinstance(event, tuple):
            yield event
        last = event
