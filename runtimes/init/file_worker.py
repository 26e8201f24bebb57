"""The file worker of one sandbox, as somebody to ask: taken when needed, given up when stuck, replaced when lost."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from typing import TypeVar

from runtimes.init import files_wire as wire
from runtimes.init.exchange import ChannelClosed, Exchange, InitProtocolError, InitTimeout, close_all
from runtimes.init.files_wire import (
    Done,
    FileRefusal,
    FilesReply,
    FileType,
    PageReply,
    RequestType,
    TempReply,
    WatchReply,
)
from runtimes.init.wire import InitError

# Of one request. A worker answers in microseconds; only a hung file system, or a paused sandbox, takes longer.
OPERATION_DEADLINE_S = 10.0

# Half of the places that a worker has.
WATCHERS_WALKS_MAX = 4

# One life of a worker. Tokens that it gave out mean something to it alone.
Life = Exchange[FilesReply]
_Expected = TypeVar("_Expected", bound=FilesReply)


class FilesUnsupported(InitError):
    """This sandbox's init has no file worker that we understand."""


class WorkerLost(ChannelClosed):
    """The worker ended before it answered; what was asked for may have been done or not."""


class FileRefused(InitError):
    """It was not done: `errno` as from the kernel, inside; `type` of what is in the way, if that is the reason."""

    def __init__(self, errno: int, kind: FileType, path: bytes) -> None:
        super().__init__(f"cannot use {os.fsdecode(path)!r} in the sandbox: {os.strerror(errno)}")
        self.errno = errno
        self.type = kind
        self.path = path


class FileWorker:
    """Whoever is the sandbox's file worker at the moment. Use from the loop that made it.

    `base` is where relative paths start. Whatever asks raises, if nothing else is said:
        FileRefused: it cannot be done.
        InitTimeout, WorkerLost: it may have been done or not.
        InitProtocolError: the worker broke the protocol, and is gone.
        ChannelClosed, and what `take` raises: there was no worker, and none could be had.
    """

    def __init__(self, take: Callable[[], Awaitable[socket.socket]], base: bytes) -> None:
        self._take = take
        self._base = base
        self._life: Life | None = None
        self._taking = asyncio.Lock()
        self.closed = False
        self.on_close: set[Callable[[], None]] = set()
        """Called once, by `close`. May not block."""
        self.walks = asyncio.Semaphore(WATCHERS_WALKS_MAX)
        """Held by a watcher while it looks at a tree: places for listings are few, and others list, too."""

    def close(self) -> None:
        """Ends the worker, and takes no other. Idempotent."""
        self.closed = True
        if self._life is not None:
            self._life.close()
        callbacks, self.on_close = self.on_close, set()
        for callback in callbacks:
            callback()

    def base_of(self, path: bytes) -> bytes:
        """An absolute path does not need the base, which may not even be there."""
        return b"/" if path.startswith(b"/") else self._base

    async def living(self) -> Life:
        """A worker that is not known to be dead."""
        if self._life is not None and not self._life.closed:
            return self._life
        async with self._taking:
            self._refuse_if_closed()
            if self._life is None or self._life.closed:
                self._life = _life_with(await self._take())
                self._refuse_if_closed()
            return self._life

    def _refuse_if_closed(self) -> None:
        if self.closed:
            self.close()
            raise ChannelClosed("the files were closed")

    async def ask(
        self, encode: Callable[[int], bytes], path: bytes, *, again: bool = False, life: Life | None = None
    ) -> tuple[FilesReply, list[int], Life]:
        """An answer that is no refusal, its descriptors, and who gave it.

        With `life` nobody else is asked. With `again` a request that a lost worker did not answer is repeated.
        """
        for may_repeat in (again and life is None, False):
            asked = life if life is not None else await self.living()
            try:
                reply, received = await asked.ask(encode, deadline_s=OPERATION_DEADLINE_S)
            except InitTimeout:
                asked.close()
                raise
            except ChannelClosed as error:
                if may_repeat and not self.closed:
                    continue
                raise WorkerLost(str(error)) from error
            if isinstance(reply, FileRefusal):
                close_all(received)
                raise FileRefused(reply.errno, reply.type, path)
            return reply, received, asked
        raise AssertionError

    async def request(
        self,
        encode: Callable[[int], bytes],
        path: bytes,
        kind: type[_Expected],
        *,
        again: bool = False,
        life: Life | None = None,
    ) -> _Expected:
        """As `ask`, for an answer of this kind, that brings no descriptors."""
        reply, received, answered = await self.ask(encode, path, again=again, life=life)
        if received or not isinstance(reply, kind):
            raise mismatch(answered, received)
        return reply

    async def do(
        self,
        encode: Callable[[int], bytes],
        path: bytes,
        request: RequestType,
        *,
        again: bool = False,
        life: Life | None = None,
    ) -> None:
        """As `ask`, for a request that is answered by having been done."""
        reply, received, answered = await self.ask(encode, path, again=again, life=life)
        if received or reply != Done(request):
            raise mismatch(answered, received)


def mismatch(life: Life, received: list[int]) -> InitProtocolError:
    """Ends a worker that answered something else than it was asked; the error to raise."""
    close_all(received)
    return life.broken("the file worker answered with something else")


def regular_file(life: Life, received: list[int], *, read: bool, write: bool) -> int:
    """The descriptor, made blocking, if it is of a regular file that is open as it was asked for."""
    descriptor = received[0]
    flags: int = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = os.O_RDWR if read and write else os.O_WRONLY if write else os.O_RDONLY
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or flags & (os.O_ACCMODE | os.O_PATH) != wanted:
        raise mismatch(life, received)
    os.set_blocking(descriptor, True)
    return descriptor


def _life_with(connected: socket.socket) -> Life:
    def drop(reply: FilesReply, received: list[int]) -> None:
        """What came too late must not keep a place in the worker."""
        close_all(received)
        if isinstance(reply, PageReply | TempReply | WatchReply) and reply.token is not None:
            life.tell(wire.encode_close(0, reply.token))

    life: Life = Exchange(
        connected,
        who="the file worker",
        message_bytes_max=wire.REPLY_BYTES_MAX,
        decode=wire.decode_files_message,
        on_unclaimed=drop,
        on_closed=lambda _: None,
    )
    return life
