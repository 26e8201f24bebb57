"""One connection to the daemon, blocking. Light, for the command line's hot verbs: it imports almost nothing.

Not even ``socket``, which is 7 ms of ``selectors`` and ``enum`` around ``_socket``, whose sockets do all it needs.

It knows frames, ids and descriptors. What a method's params and result look like is the caller's business.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from sandboxd import framing, jsontext

try:
    import _socket as socket
except ImportError:
    import socket  # type: ignore[no-redef]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any, Self

FRAME_BYTES_MAX = 4 * 1024 * 1024
"""As in ``protocol``, which is too heavy to ask."""

DESCRIPTORS_MAX = 16
"""More than any notification carries."""

CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 64 * 1024

_ADDRESS_BYTES_MAX = 107
_INT_BYTES = 4
_CREDENTIALS_BYTES = 3 * _INT_BYTES
_ANCILLARY_BYTES = socket.CMSG_LEN(DESCRIPTORS_MAX * _INT_BYTES)


class RpcError(Exception):
    """The daemon refused, failed, or cannot be reached: what happened, why, and what to type next.

    Args:
        type: As in ``protocol.ErrorData``, or ``not_running``, ``disconnected``, ``bad_reply`` for what the daemon
            could not say itself.
    """

    def __init__(self, code: int, type: str, brief: str, detail: str = "", hint: str = "") -> None:  # noqa: A002
        super().__init__(brief)
        self.code = code
        self.type = type
        self.brief = brief
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.brief}: {self.detail}" if self.detail else self.brief


class NotRunning(RpcError):
    """Nobody listens on the socket."""

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(0, "not_running", f"cannot reach the daemon at {path!r}", detail, "sandboxctl daemon start")


class Message:
    """What the daemon sent: a reply or a notification."""

    __slots__ = ("content", "start")

    def __init__(self, content: dict[str, Any], start: int) -> None:
        self.content = content
        self.start = start


class Connection:
    """One connection. Not for use by several threads; closed by ``close`` or at the end of a ``with``."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._decoder = framing.Decoder(FRAME_BYTES_MAX)
        self._received_bytes = 0
        self._descriptors = framing.DescriptorQueue()
        self._messages: list[Message] = []
        self._replies: dict[int, dict[str, Any]] = {}
        self._last_id = 0

    @classmethod
    def connect(cls, path: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Self:
        """Connect to the daemon's socket.

        Raises:
            NotRunning: There is no socket, or nobody behind it.
            RpcError: It is not ours, or it does not answer.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # A socket with a timeout of its own would fail at once where the daemon is only slow to accept.
            bound = int(timeout_s).to_bytes(8, sys.byteorder) + int(timeout_s % 1 * 1e6).to_bytes(8, sys.byteorder)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
            _connect(connected, path)
            _check_owner(connected, path)
        except BaseException:
            connected.close()
            raise
        return cls(connected)

    def fileno(self) -> int:
        """For select and poll: readable means that ``read`` does not block."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it, and the descriptors that nobody took. Idempotent."""
        self._socket.close()
        _close_all(self._descriptors.take_all())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- one call after the other

    def call(
        self,
        method: str,
        params: dict[str, Any],
        descriptors: Sequence[int] = (),
        on_notification: Callable[[Message], None] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Send a request and wait for its result. The descriptors stay the caller's.

        Raises:
            RpcError: The error reply, or ``timeout``, ``disconnected``, ``bad_reply``.
        """
        return self.wait(self.send(method, params, descriptors), on_notification, timeout_s)

    def wait(
        self,
        request_id: int,
        on_notification: Callable[[Message], None] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Wait for the result of a request that was sent; replies to others are kept for their own ``wait``."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while request_id not in self._replies:
            message = self._receive(deadline)
            if "method" not in message.content:
                self.keep(message)
            elif on_notification is not None:
                on_notification(message)
        return result_of(self._replies.pop(request_id))

    def keep(self, message: Message) -> None:
        """File a reply under its id. One without id is about the connection itself, and raised."""
        request_id = message.content.get("id")
        if not isinstance(request_id, int):
            result_of(message.content)
            raise _bad_reply("it answered a request that was never sent")
        self._replies[request_id] = message.content

    def take_reply(self, request_id: int) -> dict[str, Any] | None:
        """The reply to a request, if ``keep`` has it."""
        return self._replies.pop(request_id, None)

    # --- the parts, for callers that wait for other things too

    def send(self, method: str, params: dict[str, Any], descriptors: Sequence[int] = ()) -> int:
        """Send a request and return its id."""
        self._last_id += 1
        self._send({"jsonrpc": "2.0", "id": self._last_id, "method": method, "params": params}, descriptors)
        return self._last_id

    def cancel(self, request_id: int) -> None:
        """Ask the daemon to stop working on a request. Its reply still comes."""
        self._send({"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": request_id}})

    def read(self) -> list[Message]:
        """Wait for one portion of what the daemon sends; return the messages that it completes, perhaps none."""
        # What came with earlier messages and was not taken by now is nobody's.
        _close_all(self._descriptors.take_unclaimed(self._decoder.position))
        try:
            data, ancillary, _, _ = self._socket.recvmsg(READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise RpcError(0, "timeout", "the daemon did not answer in time") from None
        except OSError as error:
            raise _disconnected(error.strerror or "") from error
        start, self._received_bytes = self._received_bytes, self._received_bytes + len(data)
        numbers = _descriptors_in(ancillary)
        if numbers:
            self._descriptors.add(start, self._received_bytes, numbers)
        if not data:
            raise _disconnected("it closed the connection")
        return [_message_of(item) for item in self._decoder.feed(data)]

    def take_descriptors(self, message: Message, count: int) -> tuple[int, ...]:
        """Up to ``count`` descriptors that came with a message; they are the caller's to close.

        To be called before the next ``read``.
        """
        return self._descriptors.take(message.start, count)

    def _receive(self, deadline: float | None) -> Message:
        while not self._messages:
            if deadline is not None:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                self._messages = self.read()
            finally:
                if deadline is not None:
                    self._socket.settimeout(None)
        return self._messages.pop(0)

    def _send(self, content: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        try:
            body = jsontext.encode(content)
        except UnicodeEncodeError as error:
            text = error.object[max(error.start - 16, 0) : error.end + 16]
            raise RpcError(
                -32602, "invalid_argument", "cannot send text that is not UTF-8", ascii(text), "use UTF-8"
            ) from error
        except ValueError as error:
            raise RpcError(-32602, "invalid_argument", "cannot send what JSON has no word for", str(error)) from error
        data = framing.encode(body, lines=False)
        try:
            sent = self._socket.sendmsg([data], [_ancillary_of(descriptors)]) if descriptors else 0
            self._socket.sendall(memoryview(data)[sent:])
        except (BrokenPipeError, ConnectionResetError):
            self._read_farewell()
        except OSError as error:
            raise _disconnected(error.strerror or "") from error

    def _read_farewell(self) -> None:
        """The daemon hung up while we were sending: it has said why, if anything."""
        while True:
            for message in self.read():
                if "method" not in message.content:
                    self.keep(message)


def result_of(reply: dict[str, Any]) -> dict[str, Any]:
    """The result in a reply, or the error that it is, raised."""
    error = reply.get("error")
    if isinstance(error, dict):
        data = error.get("data")
        data = data if isinstance(data, dict) else {}
        raise RpcError(
            error.get("code", 0),
            data.get("type", "internal"),
            data.get("brief") or str(error.get("message", "the daemon failed")),
            data.get("detail", ""),
            data.get("hint", ""),
        )
    result = reply.get("result")
    if not isinstance(result, dict):
        raise _bad_reply("a reply has neither a result nor an error")
    return result


def _connect(connected: socket.socket, path: str) -> None:
    directory = -1
    address = path
    try:
        if len(os.fsencode(path)) > _ADDRESS_BYTES_MAX:
            parent, name = os.path.split(path)
            directory = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            address = f"/proc/self/fd/{directory}/{name}"
        connected.connect(address)
    except FileNotFoundError:
        raise NotRunning(path, "there is no such socket") from None
    except ConnectionRefusedError:
        raise NotRunning(path, "nobody listens there") from None
    except BlockingIOError:
        raise RpcError(0, "timeout", f"cannot reach the daemon at {path!r}", "it does not accept") from None
    except PermissionError as error:
        raise RpcError(
            0, "unauthorized", f"cannot reach the daemon at {path!r}", error.strerror or "", "is it another user's?"
        ) from None
    except OSError as error:
        detail = error.strerror or str(error)
        hint = "check SANDBOXD_SOCKET" if error.errno in (errno.ENOTSOCK, errno.EPROTOTYPE, errno.ENOTDIR) else ""
        raise RpcError(0, "invalid_argument", f"cannot reach the daemon at {path!r}", detail, hint) from None
    finally:
        if directory >= 0:
            os.close(directory)


def _check_owner(connected: socket.socket, path: str) -> None:
    """Hand our descriptors and environment to nobody else than ourselves."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS_BYTES)
    uid = int.from_bytes(raw[_INT_BYTES : 2 * _INT_BYTES], sys.byteorder)
    if uid != os.geteuid():
        raise RpcError(
            0, "unauthorized", f"cannot use the daemon at {path!r}", f"it is uid {uid}'s, and you are {os.geteuid()}"
        )


def _ancillary_of(descriptors: Sequence[int]) -> tuple[int, int, bytes]:
    numbers = b"".join(number.to_bytes(_INT_BYTES, sys.byteorder) for number in descriptors)
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers


def _descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    return [
        int.from_bytes(numbers[at : at + _INT_BYTES], sys.byteorder)
        for level, kind, numbers in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for at in range(0, len(numbers) - len(numbers) % _INT_BYTES, _INT_BYTES)
    ]


def _message_of(item: framing.Frame | framing.FramingError) -> Message:
    if isinstance(item, framing.FramingError):
        raise _bad_reply(item.detail)
    try:
        content = jsontext.decode(item.body)
    except (ValueError, RecursionError) as error:
        raise _bad_reply(str(error)) from None
    if not isinstance(content, dict):
        raise _bad_reply("a message is no object")
    return Message(content, item.start)


def _bad_reply(detail: str) -> RpcError:
    return RpcError(0, "bad_reply", "cannot understand the daemon", detail, "is something else on its socket?")


def _disconnected(detail: str) -> RpcError:
    return RpcError(0, "disconnected", "the daemon went away", detail, "sandboxctl daemon status")


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
