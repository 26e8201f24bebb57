"""Sockets on the loop: bounded reads, relays with flow control, and a door that lets in so many at once.

Nothing is read that cannot be passed on: a relay holds one buffer, or pipe, per direction, and the kernel's own
buffers make the faster side wait. Works on the asyncio loop, which is the backend of the daemon's anyio.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import socket
import time
from collections.abc import Awaitable, Callable

import anyio

from sandboxd.egress_rules import address_of
from sandboxd.network.bulk import BulkMover, Outcome

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
"""Most that is read at once; more costs memory and brings nothing."""

BULKY_BYTES = 4 * 1024 * 1024
BULKY_S = 0.5
"""A connection that carries so many bytes in this time goes on in a thread: see ``bulk``."""

NEAR_BUFFER_BYTES = 512 * 1024
"""Of connections that do not leave this machine: see ``_hold_near``."""

_BULK = BulkMover()

ACCEPT_RETRY_S = 0.2
"""Pause when this process has no descriptors left."""

LISTEN_BACKLOG = 128

_PASSING = frozenset({errno.ECONNABORTED, errno.EAGAIN, errno.EINTR, errno.EPROTO, errno.ENETDOWN, errno.ECONNRESET})


async def receive(source: socket.socket, bytes_max: int = CHUNK_BYTES) -> bytes:
    """Some bytes, or none at the end of the stream.

    Raises:
        OSError: the connection broke.
    """
    return await asyncio.get_running_loop().sock_recv(source, bytes_max)


async def send(target: socket.socket, data: bytes | memoryview) -> None:
    """Send all of it, waiting for the other side to take it.

    Raises:
        OSError: the connection broke.
    """
    await asyncio.get_running_loop().sock_sendall(target, data)


async def connect(family: int, address: tuple[str, int] | str, *, deadline_s: float) -> socket.socket:
    """A connected non-blocking socket.

    Raises:
        OSError: nobody is there.
        TimeoutError: nobody answered in time.
    """
    connected = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        async with asyncio.timeout(deadline_s):
            await asyncio.get_running_loop().sock_connect(connected, address)
        if family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connected.close()
        raise
    return connected


class Traffic:
    """What went through, in bytes, seen from inside."""

    __slots__ = ("received_bytes", "sent_bytes", "touched_s")

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self.touched_s = time.monotonic()

    def count(self, moved_bytes: int, *, sending: bool) -> None:
        """So many more were passed on just now."""
        self.touched_s = time.monotonic()
        if sending:
            self.sent_bytes += moved_bytes
        else:
            self.received_bytes += moved_bytes


async def relay(inside: socket.socket, outside: socket.socket, traffic: Traffic, *, idle_s: float) -> None:
    """Pass bytes both ways until both sides have ended, or nothing has moved for ``idle_s``.

    An end of one direction is passed on, and the other goes on: protocols rely on half-closed connections.
    """
    for end in (inside, outside):
        _hold_near(end)
    traffic.touched_s = time.monotonic()
    ways = [
        asyncio.ensure_future(_pass_on(inside, outside, traffic, sending=True)),
        asyncio.ensure_future(_pass_on(outside, inside, traffic, sending=False)),
    ]
    try:
        pending = set(ways)
        while pending:
            quiet_s = time.monotonic() - traffic.touched_s
            if quiet_s >= idle_s:
                return
            done, pending = await asyncio.wait(pending, timeout=idle_s - quiet_s, return_when=asyncio.FIRST_COMPLETED)
            if any(way.exception() is not None for way in done):
                return
    finally:
        for way in ways:
            way.cancel()
        # Whoever ends us closes the sockets next: not before nobody uses them any more.
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*ways, return_exceptions=True)


def _hold_near(end: socket.socket) -> None:
    """Have the bytes of a loopback connection read before they have left the processor's cache.

    The kernel lets megabytes queue up, for links that are long, and paces what it sends, for networks of others:
    here both only cost. Connections to elsewhere stay as the kernel has them. ADR 16 has the figures.
    """
    if end.family == socket.AF_UNIX:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR_BUFFER_BYTES)
        return
    with contextlib.suppress(OSError):
        address = address_of(end.getpeername()[0])
        if address is None or not address.is_loopback:
            return
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_BUFFER_BYTES)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR_BUFFER_BYTES)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


async def _pass_on(source: socket.socket, target: socket.socket, traffic: Traffic, *, sending: bool) -> None:
    outcome: Outcome = "quiet"
    while outcome != "ended" and await _pass_on_until_bulky(
        source, target, traffic, sending=sending, can_be=outcome == "quiet"
    ):
        outcome = await _BULK.move(source, target, functools.partial(traffic.count, sending=sending))
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


async def _pass_on_until_bulky(
    source: socket.socket, target: socket.socket, traffic: Traffic, *, sending: bool, can_be: bool
) -> bool:
    """Pass bytes on; whether there are more, and so many in so short a time that a thread is worth it."""
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    began_s, moved = time.monotonic(), 0
    while count := await loop.sock_recv_into(source, buffer):
        await loop.sock_sendall(target, buffer[:count])
        traffic.count(count, sending=sending)
        moved += count
        if traffic.touched_s - began_s > BULKY_S:
            began_s, moved = traffic.touched_s, 0
        elif can_be and moved >= BULKY_BYTES and _BULK.has_room:
            return True
    return False


class Door:
    """A listening socket, and those who came in through it. It owns the socket.

    Args:
        listening: Non-blocking.
        serve: Serves one connection; the door closes the socket. What it raises ends that connection alone.
        connections_max: At once. Whoever comes then waits in the kernel's queue, and costs nothing here.
    """

    def __init__(
        self,
        listening: socket.socket,
        serve: Callable[[socket.socket], Awaitable[None]],
        *,
        connections_max: int,
    ) -> None:
        self._listening = listening
        self._serve = serve
        self._places = asyncio.Semaphore(connections_max)
        self._scope = anyio.CancelScope()
        self.connections = 0
        """Open now."""
        self.closed = anyio.Event()
        """The port is free again."""

    async def run(self) -> None:
        """Let in and serve, until closed."""
        with self._scope:
            async with anyio.create_task_group() as inside:
                # Closed before those inside have left, so that the port is free again.
                try:
                    while True:
                        await self._places.acquire()
                        inside.start_soon(self._welcome, await self._accept())
                finally:
                    self._listening.close()
                    self.closed.set()

    def close(self) -> None:
        """Let nobody in any more and end the connections: as soon as the loop turns. Idempotent; never blocks."""
        self._scope.cancel()

    async def _accept(self) -> socket.socket:
        while True:
            await anyio.wait_readable(self._listening)
            try:
                accepted, _ = self._listening.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    logger.warning("cannot accept a connection: %s", error)
                    await anyio.sleep(ACCEPT_RETRY_S)
                continue
            accepted.setblocking(False)
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return accepted

    async def _welcome(self, accepted: socket.socket) -> None:
        self.connections += 1
        try:
            with accepted:
                await self._serve(accepted)
        except OSError:
            logger.debug("a connection broke", exc_info=True)
        except Exception:
            logger.exception("cannot serve a connection")
        finally:
            self.connections -= 1
            self._places.release()
