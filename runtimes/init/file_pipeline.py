"""A file worker of one thread's own, asked many things ahead: for moving trees.

The worker serves one request after the other and answers in order, so what is to happen with an answer waits in a
queue, and the next request is under way while the last answer is worked on. Nothing of asyncio: whoever moves trees
does so in a thread, and pays for a request with two system calls.

Everything here raises, if nothing else is said:
    InitTimeout: the worker did not answer; it may have been done or not.
    WorkerLost: it ended, or was ended.
    InitProtocolError: it broke the protocol.
    Whatever `wait` raises.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable
from typing import Self

from runtimes.init import files_wire as wire
from runtimes.init.exchange import InitProtocolError, InitTimeout, close_all
from runtimes.init.file_worker import OPERATION_DEADLINE_S, WorkerLost
from runtimes.init.files_wire import FilesReply, OpenReply, TempReply
from runtimes.init.wire import WireError

# Requests under way at a time; less than the worker has places for temporary files.
AHEAD_MAX = 24
_DESCRIPTORS_RECEIVED_MAX = 4

# What happens with an answer, and with the descriptors that came with it: they are its own from then on.
Then = Callable[[FilesReply, list[int]], None]
# Whether a descriptor is ready within so many seconds; raises to give up altogether.
Wait = Callable[[int, int, float], bool]


class FilePipeline:
    """One worker, for one thread. Owns the socket; closing it lets uncommitted files vanish."""

    def __init__(self, connected: socket.socket, wait: Wait) -> None:
        self._socket = connected
        self._wait = wait
        self._waiting: deque[tuple[int, Then]] = deque()
        self._number = 0
        self._buffer = bytearray(wire.REPLY_BYTES_MAX)
        connected.setblocking(False)

    def close(self) -> None:
        """Ends the worker. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def send(self, encode: Callable[[int], bytes], then: Then) -> None:
        """Asks; `then` is called in this thread by a later `send`, `settle` or `ask`. It may ask more.

        Raises:
            InvalidPath: a NUL inside, too long, out of range; nothing was sent.
        """
        self._number = self._number % 0xFFFFFFFF + 1
        number = self._number
        message = encode(number)
        self.settle(AHEAD_MAX - 1)
        while True:
            try:
                self._socket.send(message, socket.MSG_NOSIGNAL)
                break
            except BlockingIOError:
                if self._waiting:
                    self._take_one()
                elif not self._wait(self._socket.fileno(), select.POLLOUT, OPERATION_DEADLINE_S):
                    raise self._timed_out() from None
            except OSError as error:
                raise WorkerLost(f"the file worker closed the connection: {error.strerror}") from error
        self._waiting.append((number, then))

    def settle(self, under_way_max: int = 0) -> None:
        """Waits until at most so many requests are under way, those that answers lead to included."""
        while len(self._waiting) > under_way_max:
            self._take_one()

    def ask(self, encode: Callable[[int], bytes]) -> tuple[FilesReply, list[int]]:
        """Asks, and waits for the answer. Everything asked before is done by then.

        Raises:
            InvalidPath: as `send`.
        """
        answers: list[tuple[FilesReply, list[int]]] = []
        self.send(encode, lambda reply, received: answers.append((reply, received)))
        self.settle()
        return answers[0]

    def _take_one(self) -> None:
        message, received = self._receive()
        try:
            number, reply = wire.decode_files_message(message)
        except WireError as error:
            close_all(received)
            raise InitProtocolError(str(error)) from error
        asked, then = self._waiting.popleft()
        if number != asked or len(received) != isinstance(reply, OpenReply | TempReply):
            close_all(received)
            raise InitProtocolError("the file worker answered something else than it was asked")
        then(reply, received)

    def _receive(self) -> tuple[bytes, list[int]]:
        while True:
            try:
                length, ancillary, flags, _ = self._socket.recvmsg_into(
                    [self._buffer],
                    socket.CMSG_SPACE(_DESCRIPTORS_RECEIVED_MAX * array.array("i").itemsize),
                    socket.MSG_CMSG_CLOEXEC,
                )
                break
            except BlockingIOError:
                if not self._wait(self._socket.fileno(), select.POLLIN, OPERATION_DEADLINE_S):
                    raise self._timed_out() from None
            except OSError as error:
                raise WorkerLost(f"the file worker closed the connection: {error.strerror}") from error
        received = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
        if length == 0 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(received.tolist())
            if length == 0:
                raise WorkerLost("the file worker ended")
            raise InitProtocolError("the file worker sent more than a message may hold")
        return bytes(memoryview(self._buffer)[:length]), received.tolist()

    @staticmethod
    def _timed_out() -> InitTimeout:
        return InitTimeout(f"the file worker did not answer within {OPERATION_DEADLINE_S:g} s")


def taken_file(received: list[int], *, write: bool) -> int:
    """The one descriptor of an answer, if it is of a regular file that is open as it was asked for; made blocking.

    Raises:
        InitProtocolError: it is something else, and closed.
    """
    (descriptor,) = received
    flags: int = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = os.O_RDWR if write else os.O_RDONLY
    if not stat.S_ISREG(os.fstat(descriptor).st_mode) or flags & (os.O_ACCMODE | os.O_PATH) != wanted:
        close_all(received)
        raise InitProtocolError("the file worker passed something else than it was asked for")
    if flags & os.O_NONBLOCK:
        with contextlib.suppress(OSError):
            os.set_blocking(descriptor, True)
    return descriptor
