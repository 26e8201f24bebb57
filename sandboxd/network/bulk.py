"""Bytes from socket to socket without a copy of ours, by a thread, for connections that carry many.

The kernel moves pages from one socket into a pipe, and from there into the other: half the CPU time of reading and
writing them, and none of the event loop's. A thread and a pipe are too much for a connection that is quiet or merely
chatty, so one begins on the loop, comes here when it has proven to be bulky, and goes back when it is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import os
import select
import socket
from collections.abc import Callable
from typing import Literal

import anyio
import anyio.to_thread

from sandboxd.streams import Patience, Stopped, Tally

PIPE_BYTES = 1024 * 1024
"""The most that an ordinary user may have; with less, the thread is woken more often than it saves."""

QUIET_S = 1.0
"""Without a byte for this long, a connection is bulky no more."""

THREADS_MAX = 16
"""Directions at once, of all sandboxes. Others stay on the loop, where they are only slower."""

LOOK_S = 0.5
"""How often is counted what a thread has moved."""

_CANNOT = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})

Outcome = Literal["ended", "quiet", "impossible"]


class BulkMover:
    """Moves what is bulky, for all relays of one event loop."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._limiter = anyio.CapacityLimiter(threads_max)

    @property
    def has_room(self) -> bool:
        """Whether one more can come now."""
        return self._limiter.available_tokens >= 1

    async def move(self, source: socket.socket, target: socket.socket, count: Callable[[int], None]) -> Outcome:
        """Move bytes until they end, until there are none for a while, or where the kernel cannot: not one.

        Args:
            source: Non-blocking; nobody else reads it meanwhile.
            target: Non-blocking; nobody else writes it meanwhile.
            count: Told on the loop what was moved, now and then and in the end.

        Raises:
            OSError: either connection broke.
        """
        patience, tally, told = Patience(None), Tally(), 0

        def tell() -> None:
            nonlocal told
            moved = tally.bytes - told
            told += moved
            if moved:
                count(moved)

        thread = asyncio.ensure_future(
            anyio.to_thread.run_sync(
                functools.partial(_move, source.fileno(), target.fileno(), patience, tally), limiter=self._limiter
            )
        )
        try:
            while not thread.done():
                await asyncio.wait({thread}, timeout=LOOK_S)
                tell()
            return await thread
        finally:
            # The sockets are closed by whoever cancels us, and their numbers given to others: not before it is over.
            patience.stop()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({thread})
            if not thread.cancelled():
                # Who was cancelled no longer asks how it ended; asyncio would report that as a mistake.
                thread.exception()
            patience.close()
            tell()


def _move(source: int, target: int, patience: Patience, tally: Tally) -> Outcome:
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # It may be refused to somebody who has many of them; it is only faster.
        with contextlib.suppress(OSError):
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        while True:
            try:
                held = os.splice(source, writing, PIPE_BYTES, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
            except BlockingIOError:
                if not patience.wait_for(source, select.POLLIN, QUIET_S):
                    return "quiet"
                continue
            except OSError as error:
                if error.errno in _CANNOT and not tally.bytes:
                    return "impossible"
                raise
            if not held:
                return "ended"
            _empty(reading, target, held, patience)
            tally.bytes += held
    except Stopped:
        return "quiet"
    finally:
        os.close(reading)
        os.close(writing)


def _empty(pipe: int, target: int, held: int, patience: Patience) -> None:
    while held:
        patience.check()
        try:
            held -= os.splice(pipe, target, held, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except BlockingIOError:
            patience.wait(target, select.POLLOUT)
