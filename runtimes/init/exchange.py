"""Questions and answers over one `SOCK_SEQPACKET` socket, with descriptors in both directions.

What init and its file workers have in common: whoever asks numbers the question, the answer bears the number. Works
directly on the asyncio loop (the backend that the daemon's anyio runs on): one `add_reader` per socket, answers
resolve futures. No task stands between the kernel and the caller.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec

from runtimes.init.wire import InitError, WireError

# Messages taken per wake-up, so that a babbling peer cannot keep the loop from others.
MESSAGES_PER_TURN = 64
# Nobody sends more than one descriptor at a time to us; room for more shows the surplus instead of hiding it.
DESCRIPTORS_RECEIVED_MAX = 4

_Content = TypeVar("_Content")


class ChannelClosed(InitError):
    """The connection is closed, by us or by the other end; the request may or may not have been carried out."""


class InitTimeout(InitError):
    """There was no answer in time; the request may still be carried out."""


class InitProtocolError(InitError):
    """The other end broke the protocol; the channel is closed."""


class SendFailed(InitError):
    """The kernel would not take the message (EBADF: a descriptor to pass is not open). Nothing was sent."""

    def __init__(self, who: str, errno: int) -> None:
        super().__init__(f"cannot send to {who}: {os.strerror(errno)}")
        self.errno = errno


class _Outgoing(msgspec.Struct, frozen=True):
    request_id: int
    message: bytes
    descriptors: Sequence[int]


class Exchange(Generic[_Content]):
    """One socket, whose owner this is from now on. Use from the loop that made it.

    `decode` turns a message into the number of the question and the content, or raises `WireError`, which closes.
    `on_unclaimed` gets what no asker waits for, with descriptors that it must close: events, and late answers.
    `on_closed` is called once: with None after `close()`, else with what went wrong. Neither may block.
    """

    def __init__(
        self,
        connected: socket.socket,
        *,
        who: str,
        message_bytes_max: int,
        decode: Callable[[bytes], tuple[int, _Content]],
        on_unclaimed: Callable[[_Content, list[int]], None],
        on_closed: Callable[[Exception | None], None],
    ) -> None:
        self._socket = connected
        self._who = who
        self._decode = decode
        self._on_unclaimed = on_unclaimed
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._last_request_id = 0
        self._waiting: dict[int, asyncio.Future[tuple[_Content, list[int]]]] = {}
        self._outgoing: deque[_Outgoing] = deque()
        self._buffer = bytearray(message_bytes_max)
        self._loop.add_reader(connected.fileno(), self._readable)

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._closed

    async def ask(
        self, encode: Callable[[int], bytes], descriptors: Sequence[int] = (), *, deadline_s: float
    ) -> tuple[_Content, list[int]]:
        """The answer to what `encode` makes of a number, and the descriptors that came with it: the caller's.

        Raises:
            ChannelClosed, InitTimeout, InitProtocolError, SendFailed.
        """
        self._last_request_id = self._last_request_id % 0xFFFFFFFF + 1
        request_id = self._last_request_id
        message = encode(request_id)
        if self._closed:
            raise ChannelClosed(f"the connection to {self._who} is closed")
        future: asyncio.Future[tuple[_Content, list[int]]] = self._loop.create_future()
        self._waiting[request_id] = future
        timer = self._loop.call_later(deadline_s, self._expire, future, deadline_s)
        try:
            self._send(_Outgoing(request_id, message, descriptors))
            return await future
        except asyncio.CancelledError:
            # Answered and cancelled in the same turn: what came would have no owner.
            if future.done() and not future.cancelled() and future.exception() is None:
                self._on_unclaimed(*future.result())
            raise
        finally:
            timer.cancel()
            self._waiting.pop(request_id, None)
            if self._outgoing:
                self._withdraw(request_id)

    def tell(self, message: bytes) -> None:
        """Sends what wants no answer; the answer that comes all the same is unclaimed."""
        if not self._closed:
            self._send(_Outgoing(0, message, ()))

    def broken(self, what: str) -> InitProtocolError:
        """Closes, for the other end broke the protocol; the error to raise."""
        error = InitProtocolError(what)
        self._shut(error)
        return error

    def close(self) -> None:
        """Ends the connection. Idempotent."""
        self._shut(None)

    # ---- speaking

    def _send(self, outgoing: _Outgoing) -> None:
        if self._outgoing or not self._send_now(outgoing):
            if not self._outgoing and not self._closed:
                self._loop.add_writer(self._socket.fileno(), self._writable)
            self._outgoing.append(outgoing)

    def _send_now(self, outgoing: _Outgoing) -> bool:
        """False when the socket is full. Whatever else goes wrong counts as sent, and fails whoever waits."""
        ancillary = []
        if outgoing.descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", outgoing.descriptors))]
        try:
            self._socket.sendmsg([outgoing.message], ancillary, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return False
        except (BrokenPipeError, ConnectionError):
            self._shut(ChannelClosed(f"{self._who} closed the connection"))
        except OSError as error:
            future = self._waiting.get(outgoing.request_id)
            if future is not None and not future.done():
                future.set_exception(SendFailed(self._who, error.errno or 0))
        return True

    def _writable(self) -> None:
        while self._outgoing and self._send_now(self._outgoing[0]):
            if self._outgoing:
                self._outgoing.popleft()
        if not self._outgoing and not self._closed:
            self._loop.remove_writer(self._socket.fileno())

    def _withdraw(self, request_id: int) -> None:
        """Forgets an unsent request whose asker is gone: its descriptors' numbers may be reused any time."""
        self._outgoing = deque(item for item in self._outgoing if item.request_id != request_id)
        if not self._outgoing and not self._closed:
            self._loop.remove_writer(self._socket.fileno())

    # ---- hearing

    def _readable(self) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if self._closed:
                return
            try:
                message, received = self._receive()
            except (BlockingIOError, InterruptedError):
                return
            except WireError as error:
                self.broken(str(error))
                return
            except OSError as error:
                self._shut(ChannelClosed(f"{self._who} closed the connection: {error.strerror}"))
                return
            self._take(message, received)

    def _receive(self) -> tuple[bytes, list[int]]:
        length, ancillary, flags, _ = self._socket.recvmsg_into(
            [self._buffer],
            socket.CMSG_SPACE(DESCRIPTORS_RECEIVED_MAX * array.array("i").itemsize),
            socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT,
        )
        received = _descriptors_in(ancillary) if ancillary else []
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(received) > 1:
            close_all(received)
            raise WireError(f"{self._who} sent more than a message may hold, or this process has no descriptors left")
        if length == 0:
            close_all(received)
            raise ConnectionResetError(0, "end of stream")
        return bytes(memoryview(self._buffer)[:length]), received

    def _take(self, message: bytes, received: list[int]) -> None:
        try:
            request_id, content = self._decode(message)
        except WireError as error:
            close_all(received)
            self.broken(str(error))
            return
        future = self._waiting.get(request_id)
        if future is None or future.done():
            # An event, or its asker was cancelled or has given up meanwhile.
            self._on_unclaimed(content, received)
            return
        future.set_result((content, received))

    def _expire(self, future: asyncio.Future[tuple[_Content, list[int]]], deadline_s: float) -> None:
        if not future.done():
            future.set_exception(InitTimeout(f"{self._who} did not answer within {deadline_s:g} s"))

    def _shut(self, error: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        descriptor = self._socket.fileno()
        self._loop.remove_reader(descriptor)
        self._loop.remove_writer(descriptor)
        self._socket.close()
        self._outgoing.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error or ChannelClosed(f"the connection to {self._who} was closed"))
        self._on_closed(error)


def close_all(descriptors: Sequence[int]) -> None:
    """Closes each; one that is not open is no matter."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    received = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    return received.tolist()
