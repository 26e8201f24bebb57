"""One connection: decode, hand to the dispatch, reply.

One task group per connection, one task per request. A peer can only harm itself: what it sends is bounded before it
is decoded, what it does not read is bounded before it is queued, and both ends of that take its own connection and
no other.

Descriptors ride with the first byte of a request's frame (``framing.DescriptorQueue``). How many a request takes is
read from its own params, in the order of the frames and before its handler runs, so pipelined requests cannot
take each other's. Whatever is not taken is closed.
"""

from __future__ import annotations

import array
import inspect
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Annotated, Any, NamedTuple, Protocol

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import TaskGroup
from msgspec import Meta, Struct, UnsetType

from sandboxd import framing, openrpc, protocol
from sandboxd.failures import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    REQUEST_CANCELLED,
    CapacityExceeded,
    Failure,
    InvalidArgument,
)
from sandboxd.misfits import misfit
from sandboxd.peers import Peer
from sandboxd.protocol import (
    FRAME_BYTES_MAX,
    METHOD_BY_NAME,
    CancelParams,
    ErrorData,
    ErrorObject,
    Method,
    Notification,
    Params,
    ProgressParams,
    Request,
    Response,
)
from sandboxd.spelling import nearest

logger = logging.getLogger(__name__)

READ_BYTES = 64 * 1024

CONNECTIONS_MAX = 256
"""With what each may hold, within the usual 4096 or more open files of a daemon that raised its limit."""

REQUESTS_IN_FLIGHT_MAX = 256
"""Per connection. A command that somebody waits for is one."""

OUTBOUND_BYTES_MAX = 2 * FRAME_BYTES_MAX
"""Per connection, beyond what the kernel buffers. Room for the largest reply while another one drains."""

DESCRIPTORS_PENDING_MAX = 16
"""Per connection and direction: five requests' worth, and then some."""

ERROR_TEXT_CHARS_MAX = 8192
"""Of each text of an error. It may quote what the peer sent, and must fit into a message whatever that was."""

_ANCILLARY_BYTES = socket.CMSG_SPACE(DESCRIPTORS_PENDING_MAX * array.array("i").itemsize)

DISCOVER = "rpc.discover"
CANCEL = "$/cancelRequest"
PROGRESS = "$/progress"

RequestId = int | str | None
_UNDECODABLE = (msgspec.DecodeError, ValueError, RecursionError)
"""Malformed JSON, invalid UTF-8, and nesting that no honest message has."""


class Limits(NamedTuple):
    """What one server, and one peer, may take."""

    connections_max: int = CONNECTIONS_MAX
    requests_in_flight_max: int = REQUESTS_IN_FLIGHT_MAX
    outbound_bytes_max: int = OUTBOUND_BYTES_MAX
    frame_bytes_max: int = FRAME_BYTES_MAX


class Context:
    """What a handler may know and do beside its params. It belongs to one request."""

    __slots__ = ("_connection", "_descriptors", "_scope", "peer", "request_id")

    def __init__(
        self, connection: Connection, request_id: RequestId, peer: Peer, descriptors: tuple[int, ...] = ()
    ) -> None:
        self._connection = connection
        self._descriptors = descriptors
        self._scope = anyio.CancelScope()
        self.request_id = request_id
        self.peer = peer

    @property
    def closed(self) -> bool:
        """Whether the connection has ended; what is sent now goes nowhere."""
        return self._connection.closed

    def take_descriptors(self) -> tuple[int, ...]:
        """The descriptors that came with the request, as many as its params say. Who takes them closes them.

        Those that nobody took are closed when the handler ends. A second call returns none.
        """
        descriptors, self._descriptors = self._descriptors, ()
        return descriptors

    def notify(self, method: str, params: Struct, descriptors: Sequence[int] = ()) -> None:
        """Send a notification; never blocks. A peer that does not read its notifications is disconnected.

        The descriptors become the server's: it closes them once they are sent, or can no longer be.
        """
        self._connection.send(Notification(jsonrpc="2.0", method=method, params=params), descriptors)

    async def deliver(self, method: str, params: Struct) -> None:
        """Send a notification, and wait until the peer has taken it: for what comes faster than a peer may read."""
        self.notify(method, params)
        await self._connection.flushed()

    def progress(
        self, message: str, done: int | None = None, total: int | None = None, entries: int | None = None
    ) -> None:
        """Send ``$/progress`` for this request; nothing when the request has no id to name."""
        if self.request_id is not None:
            told = ProgressParams(token=self.request_id, message=message, done=done, total=total, entries=entries)
            self.notify(PROGRESS, told)

    def on_close(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback`` called once when the connection ends; at once if it has ended.

        It is called before the connection's handlers are cancelled, and must not block.

        Returns:
            What takes the callback back.
        """
        return self._connection.on_close(callback)


class Dispatch(Protocol):
    """Carries out a decoded request.

    It is cancelled when the peer cancels the request or goes away. What must not stop half-way stands under a shield;
    a request that finishes although it was cancelled gets its normal reply. A ``Failure`` becomes the error reply,
    any other exception is logged and becomes an internal error.
    """

    async def __call__(self, method: str, params: Params, context: Context) -> Struct:
        """Return the method's result struct."""


class _Outbound(NamedTuple):
    data: memoryview
    descriptors: tuple[int, ...]


class Connection:
    """One peer."""

    def __init__(self, peer_socket: socket.socket, peer: Peer, dispatch: Dispatch, limits: Limits) -> None:
        self._socket = peer_socket
        self._peer = peer
        self._dispatch = dispatch
        self._limits = limits
        self._decoder = framing.Decoder(limits.frame_bytes_max)
        self._received_bytes = 0
        self._received_descriptors = framing.DescriptorQueue()
        self._outbound: deque[_Outbound] = deque()
        self._outbound_bytes = 0
        self._flushing = False
        self._in_flight: set[Context] = set()
        self._by_id: dict[int | str, Context] = {}
        self._idle = anyio.Event()
        self._sent = anyio.Event()
        self._hooks: dict[object, Callable[[], None]] = {}
        self._tasks: TaskGroup
        self.closed = False

    async def run(self) -> None:
        """Serve this peer until it goes, or has to go."""
        try:
            async with anyio.create_task_group() as self._tasks:
                try:
                    await self._read()
                finally:
                    self._close()
                    self._tasks.cancel_scope.cancel()
        finally:
            # Only now: the numbers of closed descriptors are given out again, and a task that
            # still waited for this socket would then wait for somebody else's.
            self._socket.close()
            for context in self._in_flight:
                _close_all(context.take_descriptors())

    # --- reading

    async def _read(self) -> None:
        while True:
            await anyio.wait_readable(self._socket)
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except OSError:
                return
            start, self._received_bytes = self._received_bytes, self._received_bytes + len(data)
            self._receive_descriptors(start, ancillary)
            if flags & socket.MSG_CTRUNC or len(self._received_descriptors) > DESCRIPTORS_PENDING_MAX:
                self._reply_failure(None, CapacityExceeded("cannot take so many descriptors at once"))
                return
            items = self._decoder.feed(data) if data else self._decoder.finish()
            if not self._take_frames(items):
                return
            _close_all(self._received_descriptors.take_unclaimed(self._decoder.position))
            if not data:
                await self._drain()
                return

    def _receive_descriptors(self, start: int, ancillary: list[tuple[int, int, bytes]]) -> None:
        numbers = array.array("i")
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(raw[: len(raw) - len(raw) % numbers.itemsize])
        if numbers:
            self._received_descriptors.add(start, self._received_bytes, list(numbers))

    def _take_frames(self, items: list[framing.Frame | framing.FramingError]) -> bool:
        for item in items:
            if isinstance(item, framing.FramingError):
                self._reply_error(None, INVALID_REQUEST, "cannot read this stream", item.detail)
                return False
            self._take_frame(item)
            if self.closed:
                return False
        return True

    async def _drain(self) -> None:
        """The peer says no more, but may still listen, as socat does: finish what it asked for.

        A peer that is gone altogether hangs up, which an epoll set without any event asked for still tells; the set
        is itself something to wait for. Where the process can have no such set, the peer counts as gone: it would be
        waited for without end.
        """
        try:
            hangup = select.epoll()
        except OSError as error:
            logger.warning("cannot wait for pid %d any longer: %s", self._peer.pid, error)
            return
        try:
            hangup.register(self._socket, 0)
            async with anyio.create_task_group() as waiting:

                async def wait_for_hangup() -> None:
                    await anyio.wait_readable(hangup.fileno())
                    waiting.cancel_scope.cancel()

                waiting.start_soon(wait_for_hangup)
                while self._in_flight or self._outbound:
                    self._idle = anyio.Event()
                    await self._idle.wait()
                waiting.cancel_scope.cancel()
        finally:
            hangup.close()

    # --- requests

    def _take_frame(self, frame: framing.Frame) -> None:
        try:
            request = _decode_request(frame.body)
        except msgspec.ValidationError as error:
            batch = frame.body.lstrip()[:1] == b"["
            detail = "batches are not supported; send the requests one after the other" if batch else str(error)
            self._reply_error(_id_of(frame.body), INVALID_REQUEST, "this is not a JSON-RPC 2.0 request", detail)
        except _UNDECODABLE as error:
            self._reply_error(None, PARSE_ERROR, "this is not JSON", _describe(error))
        else:
            if isinstance(request.id, UnsetType):
                self._take_notification(request)
            else:
                self._take_request(request, request.id, frame.start)

    def _take_notification(self, request: Request) -> None:
        """A request without an id has nobody who could learn that it failed, so nothing but cancelling is done."""
        if request.method != CANCEL:
            logger.debug("ignored the notification %r", request.method)
            return
        try:
            target = self._by_id.get(msgspec.json.decode(request.params, type=CancelParams).id)
        except _UNDECODABLE as error:
            logger.debug("ignored a cancellation: %s", _describe(error))
            return
        if target is not None:
            target._scope.cancel()

    def _take_request(self, request: Request, request_id: RequestId, frame_start: int) -> None:
        if request.method == DISCOVER:
            self._start(_discover, DISCOVER, _NO_PARAMS, Context(self, request_id, self._peer))
            return
        method = METHOD_BY_NAME.get(request.method)
        if method is None:
            self._reply_unknown_method(request_id, request.method)
            return
        try:
            params = _params_decoder(method.params).decode(_named_params(request.params))
        except msgspec.ValidationError as error:
            self._reply_failure(request_id, misfit(method, bytes(request.params), error))
            return
        except _UNDECODABLE as error:
            self._reply_error(request_id, PARSE_ERROR, "the params are not JSON", _describe(error))
            return
        wanted = params.descriptors_taken()
        descriptors = self._received_descriptors.take(frame_start, wanted) if wanted else ()
        context = Context(self, request_id, self._peer, descriptors)
        refusal = self._request_refusal(method, request_id, wanted, len(descriptors))
        if refusal is not None:
            _close_all(context.take_descriptors())
            self._reply_failure(request_id, refusal)
            return
        self._start(self._dispatch, method.name, params, context)

    def _request_refusal(self, method: Method, request_id: RequestId, wanted: int, got: int) -> Failure | None:
        brief = f"cannot take the request {method.name!r}"
        if request_id is not None and request_id in self._by_id:
            return InvalidArgument(brief, detail=f"the id {request_id!r} is of a request that has not ended")
        if got != wanted:
            return InvalidArgument(brief, detail=f"it carries {got} descriptors, and its params say {wanted}")
        if len(self._in_flight) >= self._limits.requests_in_flight_max:
            return CapacityExceeded(
                brief, detail=f"{self._limits.requests_in_flight_max} requests of this connection have not ended"
            )
        return None

    def _start(self, dispatch: Dispatch, method: str, params: Params, context: Context) -> None:
        self._in_flight.add(context)
        if context.request_id is not None:
            self._by_id[context.request_id] = context
        self._tasks.start_soon(self._handle, dispatch, method, params, context, name=method)

    async def _handle(self, dispatch: Dispatch, method: str, params: Params, context: Context) -> None:
        request_id = context.request_id
        try:
            with context._scope as scope:
                self._reply(request_id, await dispatch(method, params, context))
            if scope.cancelled_caught:
                self._reply_error(request_id, REQUEST_CANCELLED, f"{method!r} was cancelled", kind="cancelled")
        except Exception as error:  # noqa: BLE001 - the edge: logged unless it is one of ours
            self._reply_exception(request_id, method, error)
        finally:
            _close_all(context.take_descriptors())
            self._in_flight.discard(context)
            if request_id is not None:
                self._by_id.pop(request_id, None)
            self._idle.set()

    # --- replying

    def _reply(self, request_id: RequestId, result: object) -> None:
        self.send(Response(jsonrpc="2.0", id=request_id, result=result))

    def _reply_exception(self, request_id: RequestId, method: str, error: Exception) -> None:
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, Failure):
            self._reply_failure(request_id, error)
            return
        logger.error("cannot carry out %s", method, exc_info=error)
        detail = "an unexpected error; the daemon's log has it"
        self._reply_error(request_id, INTERNAL_ERROR, f"cannot carry out {method!r}", detail, kind="internal")

    def _reply_failure(self, request_id: RequestId, failure: Failure) -> None:
        self.send(_error_response(request_id, _error_object(failure)))

    def _reply_error(
        self,
        request_id: RequestId,
        code: int,
        brief: str,
        detail: str = "",
        hint: str = "",
        *,
        kind: str = "invalid_argument",
    ) -> None:
        self.send(_error_response(request_id, _error(code, kind, brief, detail, hint)))

    def _reply_unknown_method(self, request_id: RequestId, method: str) -> None:
        near = nearest(method, [*METHOD_BY_NAME, DISCOVER])
        hint = f"did you mean {near!r}?" if near else f"{DISCOVER!r} lists the methods"
        self._reply_error(
            request_id, METHOD_NOT_FOUND, f"cannot call {method!r}", "no such method", hint, kind="unsupported"
        )

    def send(self, message: Struct, descriptors: Sequence[int] = ()) -> None:
        """Queue one message, and send at once what the kernel takes. The descriptors are ours from here.

        Raises:
            CapacityExceeded: the message is larger than one may be.
        """
        if self.closed:
            _close_all(descriptors)
            return
        body = _encode_json(message)
        if len(body) > FRAME_BYTES_MAX:
            _close_all(descriptors)
            raise CapacityExceeded(
                "cannot send the answer",
                detail=f"the answer is larger than one message: {len(body)} bytes, {FRAME_BYTES_MAX} are allowed",
                hint="ask for less at once: one sandbox, one command, or fewer bytes of output",
            )
        data = memoryview(framing.encode(body, lines=bool(self._decoder.lines)))
        self._outbound.append(_Outbound(data, tuple(descriptors)))
        self._outbound_bytes += len(data)
        if not self._flushing:
            self._send_queued()
        if not self._outbound:
            return
        if self._outbound_bytes > self._limits.outbound_bytes_max or self._outbound_descriptors() > (
            DESCRIPTORS_PENDING_MAX
        ):
            logger.warning("dropped pid %d: it does not read its replies", self._peer.pid)
            self._drop()
        elif not self._flushing:
            self._flushing = True
            self._sent = anyio.Event()
            self._tasks.start_soon(self._flush, name="flush")

    async def flushed(self) -> None:
        """Wait until nothing waits to be sent, or nothing can be."""
        while self._outbound and not self.closed:
            await self._sent.wait()

    def _outbound_descriptors(self) -> int:
        return sum(len(item.descriptors) for item in self._outbound)

    async def _flush(self) -> None:
        while self._outbound:
            await anyio.wait_writable(self._socket)
            self._send_queued()
        self._flushing = False
        self._sent.set()
        self._idle.set()

    def _send_queued(self) -> None:
        while self._outbound:
            data, descriptors = self._outbound[0]
            try:
                sent = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
            except BlockingIOError:
                return
            except OSError as error:
                logger.debug("pid %d is gone: %s", self._peer.pid, error)
                self._drop()
                return
            _close_all(descriptors)
            self._outbound_bytes -= sent
            if sent < len(data):
                self._outbound[0] = _Outbound(data[sent:], ())
            else:
                self._outbound.popleft()

    # --- ending

    def on_close(self, callback: Callable[[], None]) -> Callable[[], None]:
        """See ``Context.on_close``."""
        if self.closed:
            callback()
            return lambda: None
        key = object()
        self._hooks[key] = callback

        def take_back() -> None:
            self._hooks.pop(key, None)

        return take_back

    def _drop(self) -> None:
        self._close()
        self._tasks.cancel_scope.cancel()

    def _close(self) -> None:
        """End it towards the peer; the socket's number itself is kept until nobody waits for it."""
        if self.closed:
            return
        self.closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        _close_all(self._received_descriptors.take_all())
        for _, descriptors in self._outbound:
            _close_all(descriptors)
        self._outbound.clear()
        hooks = list(self._hooks.values())
        self._hooks.clear()
        for callback in hooks:
            try:
                callback()
            except Exception:
                logger.exception("a callback for the end of a connection failed")


def refused(failure: Failure) -> bytes:
    """The one message of a connection that is not served, framed."""
    return framing.encode(_encode_json(_error_response(None, _error_object(failure))), lines=False)


# --- encoding and decoding

_encode_json = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(Request).decode
_NO_PARAMS = protocol.NoParams()


class _IdOnly(Struct):
    id: int | Annotated[str, Meta(max_length=64)] | None = None


@cache
def _params_decoder(params: type[Params]) -> msgspec.json.Decoder[Params]:
    return msgspec.json.Decoder(params)


def _named_params(raw: msgspec.Raw) -> bytes:
    """The params as an object: clients that have none to give send null or an empty list."""
    params = bytes(raw)
    return b"{}" if params in (b"null", b"[]") else params


def _id_of(body: bytes) -> RequestId:
    """The id of something that is not a request, so that the answer can name it."""
    try:
        return msgspec.json.decode(body, type=_IdOnly).id
    except _UNDECODABLE:
        return None


def _describe(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _error_object(failure: Failure) -> ErrorObject:
    return _error(failure.code, failure.type, failure.brief, failure.detail, failure.hint)


def _error(code: int, kind: str, brief: str, detail: str, hint: str) -> ErrorObject:
    brief, detail, hint = (_shortened(text) for text in (brief, detail, hint))
    return ErrorObject(code=code, message=brief, data=ErrorData(type=kind, brief=brief, detail=detail, hint=hint))


def _shortened(text: str) -> str:
    return text if len(text) <= ERROR_TEXT_CHARS_MAX else f"{text[:ERROR_TEXT_CHARS_MAX]}..."


def _error_response(request_id: RequestId, error: ErrorObject) -> Response:
    return Response(jsonrpc="2.0", id=request_id, error=error)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)


@cache
def _discovery() -> msgspec.Raw:
    return msgspec.Raw(_encode_json(openrpc.document(inspect.getsource(protocol))))


async def _discover(method: str, params: Params, context: Context) -> Any:
    return await anyio.to_thread.run_sync(_discovery)
