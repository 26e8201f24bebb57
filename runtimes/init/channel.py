"""The daemon's end of a sandbox's init: requests out, replies and events in.

Works directly on the asyncio loop (the backend that the daemon's anyio runs on): one `add_reader` per sandbox,
replies resolve futures, events are plain calls. No task stands between the kernel and the caller.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import stat
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from runtimes.init import wire
from runtimes.init.peer import PeerCredentials, peer_credentials
from runtimes.init.wire import (
    Acknowledged,
    CommandEntry,
    Exited,
    Gone,
    HelloReply,
    InitError,
    ListPage,
    Refused,
    Reply,
    Scope,
    SpawnReply,
    SpawnRequest,
    Stage,
    WireError,
)

# Init answers in well under a millisecond; only a sandbox that is paused, throttled or thrashing takes longer.
REQUEST_DEADLINE_S = 10.0
# A container is "started" before its PID 1 has bound the socket, by a millisecond or so, and nothing tells when.
CONNECT_RETRY_S_MIN = 0.001
CONNECT_RETRY_S_MAX = 0.02
# Messages taken per wake-up, so that a babbling init cannot keep the loop from others.
MESSAGES_PER_TURN = 64
# Init never sends more than one descriptor at a time; room for more shows the surplus instead of hiding it.
DESCRIPTORS_RECEIVED_MAX = 4
# sun_path, less its NUL.
UNIX_PATH_BYTES_MAX = 107

_Expected = TypeVar("_Expected", bound=Reply)
_Answer = tuple[Reply, list[int]]


class ChannelClosed(InitError):
    """The connection is closed, by us or by init; the request may or may not have been carried out."""


class InitTimeout(InitError):
    """Init did not answer in time; the request may still be carried out."""


class InitProtocolError(InitError):
    """Init broke the protocol; the channel is closed."""


class SendFailed(InitError):
    """The kernel would not take the message (EBADF: a descriptor to pass is not open). Nothing was sent."""

    def __init__(self, errno: int) -> None:
        super().__init__(f"cannot send to init: {os.strerror(errno)}")
        self.errno = errno


class InitUnavailable(InitError):
    """There is no init listening at this path."""


class RequestRefused(InitError):
    """Init refused: ENOENT no such command, EBUSY not gone yet, ESRCH nobody to signal, EBADMSG not understood."""

    def __init__(self, errno: int, stage: Stage) -> None:
        super().__init__(f"init refused: {os.strerror(errno)} (at {stage.name.lower()})")
        self.errno = errno
        self.stage = stage


class SpawnFailed(RequestRefused):
    """The command did not start; `stage` says where it failed, `errno` why."""


class Spawned(msgspec.Struct, frozen=True):
    """A command runs. `pty_fd` is the caller's to close; it is not inheritable."""

    pid: int
    pty_fd: int | None


class _Outgoing(msgspec.Struct, frozen=True):
    request_id: int
    message: bytes
    descriptors: Sequence[int]


class InitChannel:
    """One connection to one sandbox's init.

    Use from the loop that connected it. `on_event` and `on_closed` are called on that loop and must not block.
    `on_closed` is called once: with None after `close()`, else with what went wrong.
    """

    peer: PeerCredentials
    hello: HelloReply

    def __init__(
        self,
        connected: socket.socket,
        on_event: Callable[[Exited | Gone], None],
        on_closed: Callable[[Exception | None], None],
    ) -> None:
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._on_closed = on_closed
        self._closed = False
        self._last_request_id = 0
        self._waiting: dict[int, asyncio.Future[_Answer]] = {}
        self._outgoing: deque[_Outgoing] = deque()
        self._buffer = bytearray(wire.REPLY_BYTES_MAX)
        self.peer = peer_credentials(connected)
        self._loop.add_reader(connected.fileno(), self._readable)

    @classmethod
    async def connect(
        cls,
        path: str,
        *,
        timeout_s: float,
        on_event: Callable[[Exited | Gone], None],
        on_closed: Callable[[Exception | None], None],
    ) -> InitChannel:
        """A channel that has said hello; from then on events arrive.

        Waits for a socket that is not there yet, up to `timeout_s`. `on_closed` is not called if this fails.

        Raises:
            InitUnavailable: nobody listens there, within the time.
            InitTimeout: connected, but init does not answer.
            InitProtocolError: whoever answers is not init.
            RequestRefused: init speaks no version of the protocol that we do.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        connected = await _connect(path, deadline)
        established = False

        def closed(error: Exception | None) -> None:
            if established:
                on_closed(error)

        channel = cls(connected, on_event, closed)
        try:
            left_s = max(deadline - channel._loop.time(), 0.0)
            answer = await channel._ask(wire.encode_hello(channel._next_id()), deadline_s=left_s)
            channel.hello = channel._expect(answer, HelloReply)
        except BaseException:
            channel.close()
            raise
        established = True
        return channel

    async def spawn(self, request: SpawnRequest, descriptors: Sequence[int] = ()) -> Spawned:
        """Starts a command. Its descriptors stay the caller's, to be kept open until this returns.

        Its `Exited` and `Gone` may be delivered before this returns: be ready for the id first.
        Not idempotent, but a repeated `command_id` is refused with EEXIST. If cancelled or timed out, the command
        may run all the same: `kill` it by its id.

        Raises:
            SpawnFailed: init could not start it.
            SpawnTooLarge, InvalidSpawn: nothing was sent.
            InitTimeout, ChannelClosed, InitProtocolError: it may run.
        """
        if len(descriptors) != (0 if request.pty is not None else 3):
            raise wire.InvalidSpawn("cannot spawn: a command needs three descriptors, or a pty and none")
        reply, received = await self._ask(wire.encode_spawn(self._next_id(), request), descriptors)
        if isinstance(reply, Refused):
            _close_all(received)
            raise SpawnFailed(reply.errno, reply.stage)
        if (
            not isinstance(reply, SpawnReply)
            or reply.pty is not (request.pty is not None)
            or len(received) != int(reply.pty)
            or not all(_is_terminal(fd) for fd in received)
        ):
            _close_all(received)
            raise self._broken("init answered a spawn with something else")
        return Spawned(reply.pid, received[0] if received else None)

    async def signal(self, command_id: int, signal_number: int, scope: Scope) -> None:
        """Sends a signal to a command's main process, its process group or its whole tree.

        Raises:
            RequestRefused: ENOENT no such command, ESRCH nobody there, EBADMSG no such signal.
        """
        await self._do(wire.encode_signal(self._next_id(), command_id, signal_number, scope), wire.MessageType.SIGNAL)

    async def kill(self, command_id: int) -> None:
        """Begins to SIGKILL the whole tree until nothing is left; a `Gone` event says when. Idempotent.

        Raises:
            RequestRefused: ENOENT no such command.
        """
        await self._do(wire.encode_kill(self._next_id(), command_id), wire.MessageType.KILL)

    async def list_commands(self) -> list[CommandEntry]:
        """Every command in init's table, ended ones until they are forgotten."""
        entries: list[CommandEntry] = []
        slot: int | None = 0
        while slot is not None:
            page = self._expect(await self._ask(wire.encode_list(self._next_id(), slot)), ListPage)
            entries.extend(page.entries)
            if (page.next_slot is not None and page.next_slot <= slot) or len(entries) > self.hello.commands_max:
                raise self._broken("init lists commands without end")
            slot = page.next_slot
        return entries

    async def forget(self, command_id: int) -> None:
        """Frees the table entry of a command that is gone.

        Raises:
            RequestRefused: ENOENT no such command, EBUSY it is not gone.
        """
        await self._do(wire.encode_forget(self._next_id(), command_id), wire.MessageType.FORGET)

    def close(self) -> None:
        """Ends the connection; commands go on. Idempotent."""
        self._shut(None)

    # ---- asking

    def _next_id(self) -> int:
        self._last_request_id = self._last_request_id % 0xFFFFFFFF + 1
        return self._last_request_id

    async def _do(self, message: bytes, request: wire.MessageType) -> None:
        acknowledged = self._expect(await self._ask(message), Acknowledged)
        if acknowledged.request != request:
            raise self._broken("init acknowledged something else")

    def _expect(self, answer: _Answer, kind: type[_Expected]) -> _Expected:
        reply, received = answer
        _close_all(received)
        if isinstance(reply, Refused):
            raise RequestRefused(reply.errno, reply.stage)
        if received or not isinstance(reply, kind):
            raise self._broken(f"init answered with {type(reply).__name__} where {kind.__name__} belongs")
        return reply

    async def _ask(
        self, message: bytes, descriptors: Sequence[int] = (), *, deadline_s: float = REQUEST_DEADLINE_S
    ) -> _Answer:
        """Sends the request that was numbered last, and waits for its answer."""
        if self._closed:
            raise ChannelClosed("the connection to init is closed")
        request_id = self._last_request_id
        future: asyncio.Future[_Answer] = self._loop.create_future()
        self._waiting[request_id] = future
        timer = self._loop.call_later(deadline_s, _expire, future, deadline_s)
        try:
            self._send(_Outgoing(request_id, message, descriptors))
            return await future
        except asyncio.CancelledError:
            # Answered and cancelled in the same turn: the descriptors would have no owner.
            if future.done() and not future.cancelled() and future.exception() is None:
                _close_all(future.result()[1])
            raise
        finally:
            timer.cancel()
            self._waiting.pop(request_id, None)
            if self._outgoing:
                self._withdraw(request_id)

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
            self._shut(ChannelClosed("init closed the connection"))
        except OSError as error:
            future = self._waiting.get(outgoing.request_id)
            if future is not None and not future.done():
                future.set_exception(SendFailed(error.errno or 0))
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
                self._broken(str(error))
                return
            except OSError as error:
                self._shut(ChannelClosed(f"init closed the connection: {error.strerror}"))
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
            _close_all(received)
            raise WireError("init sent more than a message may hold, or this process has no descriptors left")
        if length == 0:
            _close_all(received)
            raise ConnectionResetError(0, "end of stream")
        return bytes(memoryview(self._buffer)[:length]), received

    def _take(self, message: bytes, received: list[int]) -> None:
        try:
            request_id, content = wire.decode_message(message)
        except WireError as error:
            _close_all(received)
            self._broken(str(error))
            return
        if isinstance(content, Exited | Gone):
            if received:
                _close_all(received)
                self._broken("init sent a descriptor with an event")
                return
            self._on_event(content)
            return
        future = self._waiting.get(request_id)
        if future is None or future.done():
            # Cancelled or expired meanwhile, or an answer to nothing: nobody to give it to.
            _close_all(received)
            return
        future.set_result((content, received))

    def _broken(self, what: str) -> InitProtocolError:
        error = InitProtocolError(what)
        self._shut(error)
        return error

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
                future.set_exception(error or ChannelClosed("the connection to init was closed"))
        self._on_closed(error)


def _expire(future: asyncio.Future[_Answer], deadline_s: float) -> None:
    if not future.done():
        future.set_exception(InitTimeout(f"init did not answer within {deadline_s:g} s"))


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    received = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    return received.tolist()


def _is_terminal(descriptor: int) -> bool:
    return stat.S_ISCHR(os.fstat(descriptor).st_mode) and os.isatty(descriptor)


async def _connect(path: str, deadline: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    pause_s = CONNECT_RETRY_S_MIN
    while True:
        try:
            return _connect_now(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            if loop.time() + pause_s > deadline:
                raise InitUnavailable(f"cannot reach init at {path}: {error.strerror}") from error
        except OSError as error:
            raise InitUnavailable(f"cannot reach init at {path}: {error.strerror}") from error
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, CONNECT_RETRY_S_MAX)


def _connect_now(path: str) -> socket.socket:
    """Never blocks: to a Unix socket, connect succeeds, is refused, or the backlog is full (EAGAIN)."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX:
            connected.connect(path)
        else:
            _connect_through_directory(connected, path)
    except BaseException:
        connected.close()
        raise
    return connected


def _connect_through_directory(connected: socket.socket, path: str) -> None:
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connected.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)
