"""The daemon's end of a sandbox's init: requests out, replies and events in.

Replies resolve futures (see `exchange.py`), events are plain calls.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from runtimes.init import wire
from runtimes.init.exchange import Exchange, InitTimeout, close_all
from runtimes.init.file_worker import FilesUnsupported
from runtimes.init.files import FilesChannel
from runtimes.init.files_wire import FILES_VERSION
from runtimes.init.peer import PeerCredentials, peer_credentials
from runtimes.init.wire import (
    Acknowledged,
    CommandEntry,
    DescriptorReply,
    Event,
    Exited,
    FilesReply,
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
)

# Init answers in well under a millisecond; only a sandbox that is paused, throttled or thrashing takes longer.
REQUEST_DEADLINE_S = 10.0
# Of a connection over a loopback: only a listener whose backlog is full makes anybody wait.
DIAL_DEADLINE_S = 10.0
# A container is "started" before its PID 1 has bound the socket, by a millisecond or so, and nothing tells when.
CONNECT_RETRY_S_MIN = 0.001
CONNECT_RETRY_S_MAX = 0.02
# sun_path, less its NUL.
UNIX_PATH_BYTES_MAX = 107

_Expected = TypeVar("_Expected", bound=Reply)
_Answer = tuple[Reply | Event, list[int]]


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


class SocketRefused(RequestRefused):
    """There is no such socket; `errno` says why."""


class TerminalRefused(RequestRefused):
    """There is no such terminal: ENOENT no such command, ENOTTY its terminal is not kept."""


class Spawned(msgspec.Struct, frozen=True):
    """A command runs. `pty_fd` is the caller's to close; it is not inheritable."""

    pid: int
    pty_fd: int | None


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
        self._on_event = on_event
        self.peer = peer_credentials(connected)
        self._exchange: Exchange[Reply | Event] = Exchange(
            connected,
            who="init",
            message_bytes_max=wire.REPLY_BYTES_MAX,
            decode=wire.decode_message,
            on_unclaimed=self._take_unclaimed,
            on_closed=on_closed,
        )

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
            left_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
            answer = await channel._ask(wire.encode_hello, deadline_s=left_s)
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
        may run all the same: `kill` it by its id. An init that cannot keep terminals is not asked to.

        Raises:
            SpawnFailed: init could not start it.
            SpawnTooLarge, InvalidSpawn: nothing was sent.
            InitTimeout, ChannelClosed, InitProtocolError: it may run.
        """
        if len(descriptors) != (0 if request.pty is not None else 3):
            raise wire.InvalidSpawn("cannot spawn: a command needs three descriptors, or a pty and none")
        if request.keep_pty and self.hello.version < wire.TERMINALS_VERSION:
            request = msgspec.structs.replace(request, keep_pty=False)
        reply, received = await self._ask(lambda n: wire.encode_spawn(n, request), descriptors)
        if isinstance(reply, Refused):
            close_all(received)
            raise SpawnFailed(reply.errno, reply.stage)
        if (
            not isinstance(reply, SpawnReply)
            or reply.pty is not (request.pty is not None)
            or len(received) != int(reply.pty)
            or not all(_is_terminal(fd) for fd in received)
        ):
            close_all(received)
            raise self._exchange.broken("init answered a spawn with something else")
        return Spawned(reply.pid, received[0] if received else None)

    async def signal(self, command_id: int, signal_number: int, scope: Scope) -> None:
        """Sends a signal to a command's main process, its process group or its whole tree.

        Raises:
            RequestRefused: ENOENT no such command, ESRCH nobody there, EBADMSG no such signal.
        """
        await self._do(lambda n: wire.encode_signal(n, command_id, signal_number, scope), wire.MessageType.SIGNAL)

    async def kill(self, command_id: int) -> None:
        """Begins to SIGKILL the whole tree until nothing is left; a `Gone` event says when. Idempotent.

        Raises:
            RequestRefused: ENOENT no such command.
        """
        await self._do(lambda n: wire.encode_kill(n, command_id), wire.MessageType.KILL)

    async def list_commands(self) -> list[CommandEntry]:
        """Every command in init's table, ended ones until they are forgotten."""
        entries: list[CommandEntry] = []
        slot: int | None = 0
        while slot is not None:
            page = self._expect(await self._ask(partial(wire.encode_list, slot=slot)), ListPage)
            entries.extend(page.entries)
            if (page.next_slot is not None and page.next_slot <= slot) or len(entries) > self.hello.commands_max:
                raise self._exchange.broken("init lists commands without end")
            slot = page.next_slot
        return entries

    async def forget(self, command_id: int) -> None:
        """Frees the table entry of a command that is gone.

        Raises:
            RequestRefused: ENOENT no such command, EBUSY it is not gone.
        """
        await self._do(lambda n: wire.encode_forget(n, command_id), wire.MessageType.FORGET)

    async def take_terminal(self, command_id: int) -> int:
        """The master of a terminal that init keeps, as `CommandEntry.terminal_kept` says; the caller's to close.

        Raises:
            TerminalRefused: none is kept.
        """
        reply, received = await self._ask(lambda n: wire.encode_terminal(n, command_id))
        if isinstance(reply, Refused):
            close_all(received)
            raise TerminalRefused(reply.errno, reply.stage)
        if reply != DescriptorReply(wire.MessageType.TERMINAL) or len(received) != 1 or not _is_terminal(received[0]):
            close_all(received)
            raise self._exchange.broken("init answered a request for a terminal with something else")
        return received[0]

    async def open_files(self, base: bytes = b"/workspace") -> FilesChannel:
        """File operations inside of the sandbox, by a process of their own; relative paths start at `base`.

        Raises:
            FilesUnsupported: this init is older than its file worker.
            RequestRefused: ENOSPC as many as there may be are open, EAGAIN no process can be started.
        """
        files = FilesChannel(self.take_file_worker, base)
        await files.connect()
        return files

    async def take_file_worker(self) -> socket.socket:
        """A file worker as a socket that does not block: the caller's, who ends the worker by closing it.

        Raises:
            FilesUnsupported, RequestRefused: as `open_files`.
        """
        reply, received = await self._ask(wire.encode_files)
        if isinstance(reply, Refused) and reply.errno == errno.EOPNOTSUPP:
            close_all(received)
            raise FilesUnsupported(f"init {self.hello.program} has no file worker")
        if isinstance(reply, Refused):
            close_all(received)
            raise RequestRefused(reply.errno, reply.stage)
        if (
            not isinstance(reply, FilesReply)
            or len(received) != 1
            or not stat.S_ISSOCK(os.fstat(received[0]).st_mode)
        ):
            close_all(received)
            raise self._exchange.broken("init answered a request for a file worker with something else")
        worker = socket.socket(fileno=received[0])
        if reply.version != FILES_VERSION or (worker.family, worker.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            worker.close()
            raise FilesUnsupported(f"init {self.hello.program} has a file worker of version {reply.version}")
        worker.setblocking(False)
        return worker

    async def listen(self, port: int, *, ipv6: bool = False) -> socket.socket:
        """A socket that listens on 127.0.0.1 inside, or on ::1; the caller's to close. Non-blocking, not inheritable.

        As long as it is open the port is taken inside; it can be had again as soon as it is closed.

        Raises:
            SocketRefused: EADDRINUSE something inside has that port, EACCES it is below the unprivileged ones,
                EAFNOSUPPORT or EADDRNOTAVAIL there is no IPv6, EOPNOTSUPP this init is older than the request.
            InvalidPort: nothing was sent.
        """
        return await self._take_socket(
            lambda n: wire.encode_listen(n, port, ipv6=ipv6), wire.MessageType.LISTEN, listens=True
        )

    async def dial(self, port: int, *, ipv6: bool = False) -> socket.socket:
        """A socket connected to a port on 127.0.0.1 inside, or on ::1; the caller's to close.

        Non-blocking, not inheritable.

        Raises:
            SocketRefused: ECONNREFUSED nothing listens there; and see `listen`.
            InitTimeout: what listens there does not take the connection in time.
            InvalidPort: nothing was sent.
        """
        dialled = await self._take_socket(
            lambda n: wire.encode_dial(n, port, ipv6=ipv6), wire.MessageType.DIAL, listens=False
        )
        try:
            await _connected(dialled)
        except BaseException:
            dialled.close()
            raise
        return dialled

    def close(self) -> None:
        """Ends the connection; commands go on. Idempotent."""
        self._exchange.close()

    # ---- asking

    async def _take_socket(
        self, encode: Callable[[int], bytes], request: wire.MessageType, *, listens: bool
    ) -> socket.socket:
        reply, received = await self._ask(encode)
        if isinstance(reply, Refused):
            close_all(received)
            raise SocketRefused(reply.errno, reply.stage)
        taken = _tcp_socket(received, listens=listens)
        if taken is None or not isinstance(reply, DescriptorReply) or reply.request != request:
            if taken is not None:
                taken.close()
            raise self._exchange.broken("init answered a request for a socket with something else")
        return taken

    async def _do(self, encode: Callable[[int], bytes], request: wire.MessageType) -> None:
        acknowledged = self._expect(await self._ask(encode), Acknowledged)
        if acknowledged.request != request:
            raise self._exchange.broken("init acknowledged something else")

    def _expect(self, answer: _Answer, kind: type[_Expected]) -> _Expected:
        reply, received = answer
        close_all(received)
        if isinstance(reply, Refused):
            raise RequestRefused(reply.errno, reply.stage)
        if received or not isinstance(reply, kind):
            raise self._exchange.broken(f"init answered with {type(reply).__name__} where {kind.__name__} belongs")
        return reply

    async def _ask(
        self,
        encode: Callable[[int], bytes],
        descriptors: Sequence[int] = (),
        *,
        deadline_s: float = REQUEST_DEADLINE_S,
    ) -> _Answer:
        return await self._exchange.ask(encode, descriptors, deadline_s=deadline_s)

    def _take_unclaimed(self, content: Reply | Event, received: list[int]) -> None:
        close_all(received)
        if isinstance(content, Exited | Gone):
            if received:
                self._exchange.broken("init sent a descriptor with an event")
            else:
                self._on_event(content)


def _tcp_socket(received: list[int], *, listens: bool) -> socket.socket | None:
    """The one descriptor, if it is what it should be; else all are closed."""
    if len(received) != 1 or not stat.S_ISSOCK(os.fstat(received[0]).st_mode):
        close_all(received)
        return None
    taken = socket.socket(fileno=received[0])
    fits = (
        taken.family in (socket.AF_INET, socket.AF_INET6)
        and taken.type == socket.SOCK_STREAM
        and bool(taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) is listens
    )
    if not fits:
        taken.close()
        return None
    taken.setblocking(False)
    return taken


async def _connected(dialled: socket.socket) -> None:
    """Returns once it has connected."""
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not writable.done():
            writable.set_result(None)

    loop.add_writer(dialled.fileno(), wake)
    try:
        async with asyncio.timeout(DIAL_DEADLINE_S):
            await writable
    except TimeoutError:
        raise InitTimeout(f"nothing took the connection within {DIAL_DEADLINE_S:g} s") from None
    finally:
        loop.remove_writer(dialled.fileno())
    error = dialled.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise SocketRefused(error, Stage.SOCKET)


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
