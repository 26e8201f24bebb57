"""File operations inside of a sandbox, by its file worker: `await channel.open_files()`.

Every path is resolved by the worker, as the sandbox's user and inside of its mounts; see `files.c` for what hostile
trees can do, and `files_wire.py` for what is said. The daemon never sees a directory: a listing is made there too,
because a directory's descriptor in the hands of a process that is root on the host is one `..` away from the rest
of the container, and because a `stat` that hangs should hang there. What comes out is regular files, checked to be
just that, and facts.

A worker serves one request after the other. One that does not answer in time is given up: its socket is closed, by
which it ends, and the next call takes another. A command can kill the worker at any time, as both have the same
uid; calls that change nothing are then repeated once, others raise `WorkerLost`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Self

import msgspec

from runtimes.init import files_wire as wire
from runtimes.init.exchange import InitTimeout
from runtimes.init.file_worker import FileWorker, Life, mismatch, regular_file
from runtimes.init.files_walk import Walk
from runtimes.init.files_watch import Watcher
from runtimes.init.files_wire import (
    DEPTH_MAX,
    CommitReply,
    Entry,
    Facts,
    Flag,
    MadeReply,
    OpenReply,
    RemovedReply,
    RequestType,
    StatReply,
    TempReply,
)

# Of a whole removal, which is many requests.
REMOVE_DEADLINE_S = 120.0
LIST_ENTRIES_MAX = 100_000
# Read on the loop if it is in the page cache; more goes to a thread, so that the loop is not held up by copying.
READ_AT_ONCE_BYTES_MAX = 256 * 1024
READ_CHUNK_BYTES = 1024 * 1024


class OpenedFile(msgspec.Struct, frozen=True):
    """A regular file. `descriptor` is the caller's to close; it is blocking and not inheritable."""

    descriptor: int
    facts: Facts


class FileStat(msgspec.Struct, frozen=True):
    """`target` is that of a link, otherwise empty."""

    facts: Facts
    target: bytes


class Listing(msgspec.Struct, frozen=True):
    """`root` is what was listed. `truncated`: there is more than this."""

    root: Facts
    entries: list[Entry]
    truncated: bool


class FilesChannel:
    """The files of one sandbox. Use from the loop that made it; close it in the end.

    Every method raises:
        FileRefused: it cannot be done; nothing was.
        InvalidPath: a NUL inside, too long, out of range; nothing was sent.
        InitTimeout, WorkerLost: it may have been done or not.
        InitProtocolError: the worker broke the protocol, and is gone.
        RequestRefused, ChannelClosed: there was no worker, and none could be had from init.
    """

    def __init__(self, take_worker: Callable[[], Awaitable[socket.socket]], base: bytes) -> None:
        self._worker = FileWorker(take_worker, base)
        self.base = base
        """Where relative paths start."""

    async def connect(self) -> None:
        """Takes a worker, if there is none. Every method does this by itself."""
        await self._worker.living()

    def close(self) -> None:
        """Ends the worker. Temporary files that were not committed vanish, watches fall silent. Idempotent."""
        self._worker.close()

    # ---- one file

    async def open(
        self,
        path: bytes,
        *,
        read: bool = True,
        write: bool = False,
        create: bool = False,
        exclusive: bool = False,
        truncate: bool = False,
        append: bool = False,
        follow: bool = True,
        make_parents: bool = False,
        mode: int = 0o644,
    ) -> OpenedFile:
        """A regular file, open. With `create` it is made with exactly `mode` if it is missing.

        Never waits for a FIFO, a device or a lease. What is read from or written to the descriptor may still take
        long where the file lies on a slow file system: use `read_bytes`, or a thread.
        """
        flags = (
            (Flag.READ if read else Flag.NONE)
            | (Flag.WRITE if write else Flag.NONE)
            | (Flag.CREATE if create else Flag.NONE)
            | (Flag.EXCLUSIVE if exclusive else Flag.NONE)
            | (Flag.TRUNCATE if truncate else Flag.NONE)
            | (Flag.APPEND if append else Flag.NONE)
            | (Flag.FOLLOW if follow else Flag.NONE)
            | (Flag.PARENTS if make_parents else Flag.NONE)
        )
        base = self._worker.base_of(path)
        reply, received, life = await self._worker.ask(
            lambda n: wire.encode_open(n, flags, base, mode, path), path, again=not (exclusive or truncate)
        )
        if not isinstance(reply, OpenReply) or len(received) != 1:
            raise mismatch(life, received)
        return OpenedFile(regular_file(life, received, read=read, write=write), reply.facts)

    async def stat(self, path: bytes, *, follow: bool = False) -> FileStat:
        """What is there. Idempotent."""
        base, flags = self._worker.base_of(path), Flag.FOLLOW if follow else Flag.NONE
        reply = await self._worker.request(
            lambda n: wire.encode_stat(n, flags, base, path), path, StatReply, again=True
        )
        return FileStat(reply.facts, reply.target)

    async def make_dir(self, path: bytes, *, mode: int = 0o755, make_parents: bool = True) -> bool:
        """Whether the directory is new. Without `make_parents` one that is there is EEXIST."""
        base, flags = self._worker.base_of(path), Flag.PARENTS if make_parents else Flag.NONE
        reply = await self._worker.request(
            lambda n: wire.encode_make_dir(n, flags, base, mode, path), path, MadeReply
        )
        return reply.created

    async def rename(self, old: bytes, new: bytes, *, no_replace: bool = False, exchange: bool = False) -> None:
        """Within one file system, replacing what bears the new name, or changing places with it."""
        flags = (Flag.NO_REPLACE if no_replace else Flag.NONE) | (Flag.EXCHANGE if exchange else Flag.NONE)
        base = self._worker.base_of(old if new.startswith(b"/") else new)
        await self._worker.do(lambda n: wire.encode_rename(n, flags, base, old, new), old, RequestType.RENAME)

    async def remove(self, path: bytes, *, recursive: bool = False, deadline_s: float = REMOVE_DEADLINE_S) -> None:
        """Removes a file, a link, an empty directory; with `recursive` a tree, without following links.

        A removal that fails or is cancelled has removed a part, and may have moved deep directories up.

        Raises:
            InitTimeout: not done by `deadline_s`: the tree is large, or somebody keeps filling it.
        """
        base, flags = self._worker.base_of(path), Flag.RECURSIVE if recursive else Flag.NONE
        ends = asyncio.get_running_loop().time() + deadline_s
        more = True
        while more:
            reply = await self._worker.request(lambda n: wire.encode_remove(n, flags, base, path), path, RemovedReply)
            more = reply.more
            if more and asyncio.get_running_loop().time() >= ends:
                raise InitTimeout(f"cannot remove {os.fsdecode(path)!r} within {deadline_s:g} s")

    async def symlink(self, target: bytes, path: bytes, *, make_parents: bool = False) -> None:
        """Makes a link to whatever `target` says."""
        base, flags = self._worker.base_of(path), Flag.PARENTS if make_parents else Flag.NONE
        await self._worker.do(lambda n: wire.encode_symlink(n, flags, base, target, path), path, RequestType.SYMLINK)

    async def chmod(self, path: bytes, mode: int, *, follow: bool = True) -> None:
        """Sets the permission bits. Idempotent."""
        base, flags = self._worker.base_of(path), Flag.FOLLOW if follow else Flag.NONE
        await self._worker.do(
            lambda n: wire.encode_chmod(n, flags, base, mode, path), path, RequestType.CHMOD, again=True
        )

    async def temp(
        self,
        path: bytes,
        *,
        mode: int = 0o644,
        keep_mode: bool = False,
        follow: bool = False,
        make_parents: bool = False,
    ) -> TempFile:
        """A new file, to be written, that takes the place of `path` when it is committed, or of nothing.

        With `keep_mode` it gets that of the file that is there, without its setuid bits. With `follow`, a link at
        `path` stays, and what it leads to is replaced. Use as an async context manager.
        """
        flags = (
            (Flag.KEEP_MODE if keep_mode else Flag.NONE)
            | (Flag.FOLLOW if follow else Flag.NONE)
            | (Flag.PARENTS if make_parents else Flag.NONE)
        )
        base = self._worker.base_of(path)
        reply, received, life = await self._worker.ask(
            lambda n: wire.encode_temp(n, flags, base, mode, path), path, again=True
        )
        if not isinstance(reply, TempReply) or len(received) != 1:
            raise mismatch(life, received)
        return TempFile(path, regular_file(life, received, read=True, write=True), reply.token, self._worker, life)

    # ---- many files

    def walk(
        self,
        path: bytes,
        *,
        depth: int = DEPTH_MAX,
        follow: bool = True,
        directories_only: bool = False,
    ) -> Walk:
        """The tree below a directory, page by page. No IO yet."""
        flags = (Flag.DIRECTORIES_ONLY if directories_only else Flag.NONE) | (Flag.FOLLOW if follow else Flag.NONE)
        return Walk(self._worker, path, flags, depth, None)

    async def list_dir(
        self, path: bytes, *, depth: int = 1, follow: bool = True, entries_max: int = LIST_ENTRIES_MAX
    ) -> Listing:
        """What is below a directory, `depth` levels of it, in the file system's order. Idempotent."""
        entries: list[Entry] = []
        async with self.walk(path, depth=depth, follow=follow) as walk:
            while len(entries) <= entries_max and (page := await walk.next_page()) is not None:
                entries += page
            truncated = walk.truncated or len(entries) > entries_max
            del entries[entries_max:]
            return Listing(walk.root, entries, truncated)

    async def watch(self, path: bytes, *, recursive: bool = True, follow: bool = True) -> Watcher:
        """Changes of a file, of a directory's entries, or with `recursive` of all below. Close it in the end."""
        watcher = Watcher(self._worker, path, recursive=recursive, follow=follow)
        try:
            await watcher.start()
        except BaseException:
            watcher.close()
            raise
        return watcher


class TempFile:
    """A file that is not yet in its place. `descriptor` is closed by `commit` and `discard`, one of which must be."""

    def __init__(self, path: bytes, descriptor: int, token: int, worker: FileWorker, life: Life) -> None:
        self.path = path
        self.descriptor = descriptor
        self._token = token
        self._worker = worker
        self._life = life
        self._ended = False

    async def commit(self, *, no_replace: bool = False) -> Facts:
        """Puts the file in its place: whoever opens the path sees all of the old one or all of the new one.

        Raises:
            FileRefused: EEXIST with `no_replace`, EISDIR a directory is there by now; the file has vanished.
            WorkerLost, InitTimeout: the file is in its place or has vanished.
        """
        self._close()
        flags = Flag.NO_REPLACE if no_replace else Flag.NONE
        reply = await self._worker.request(
            partial(wire.encode_commit, flags=flags, token=self._token), self.path, CommitReply, life=self._life
        )
        return reply.facts

    def discard(self) -> None:
        """Lets the file vanish. Idempotent, and nothing after a commit."""
        if not self._ended:
            self._close()
            self._life.tell(wire.encode_close(0, self._token))

    def _close(self) -> None:
        if self._ended:
            raise ValueError("this file was committed or discarded before")
        self._ended = True
        os.close(self.descriptor)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.discard()


async def read_bytes(descriptor: int, *, offset: int = 0, bytes_max: int) -> bytes:
    """What is in a file from `offset` on, at most `bytes_max`.

    What is in the page cache is read at once, without a thread; for the rest the caller's loop goes on meanwhile.
    The file may change, and its size says nothing: the end is where nothing more comes.
    """
    pieces: list[bytes] = []
    taken = 0
    while taken < bytes_max:
        wanted = min(bytes_max - taken, READ_CHUNK_BYTES)
        piece = _read_cached(descriptor, offset + taken, wanted) if taken < READ_AT_ONCE_BYTES_MAX else None
        if piece is None:
            piece = await asyncio.to_thread(os.pread, descriptor, wanted, offset + taken)
        if not piece:
            break
        pieces.append(piece)
        taken += len(piece)
    return b"".join(pieces)


def _read_cached(descriptor: int, offset: int, wanted: int) -> bytes | None:
    """None: the kernel would have to wait, or cannot tell."""
    buffer = bytearray(min(wanted, READ_AT_ONCE_BYTES_MAX))
    try:
        length = os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return None
        raise
    return bytes(memoryview(buffer)[:length])
