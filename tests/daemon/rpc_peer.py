"""A server on a real socket for one test, and a peer that can say anything, right or wrong."""

import contextlib
import json
import os
import select
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from sandboxd.connection import Dispatch, Limits
from sandboxd.framing import Decoder, Frame, encode
from sandboxd.listener import open_listener
from sandboxd.server import serve

PATIENCE_S = 10
"""A bound for what must happen; nothing here takes that long unless it is broken."""


@contextlib.contextmanager
def serving(directory: Path, dispatch: Dispatch, limits: Limits | None = None) -> Iterator[str]:
    """A server in a thread of its own; yields the socket's path."""
    with (
        open_listener(str(directory / "s" / "sandboxd.sock")) as listener,
        serving_on(listener.socket, dispatch, limits),
    ):
        yield listener.path


@contextlib.contextmanager
def serving_on(
    listening: socket.socket, dispatch: Dispatch, limits: Limits | None = None
) -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:

        async def run() -> None:
            await serve(listening, dispatch, limits=limits)

        future = portal.start_task_soon(run)
        try:
            yield portal
        finally:
            future.cancel()


class Peer:
    """Speaks bytes to the server, and reads what comes back."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(path)
        self._decoder = Decoder(64 * 1024 * 1024)
        self._frames: list[Frame] = []
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send_bytes(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        sent = socket.send_fds(self.socket, [data], descriptors) if descriptors else 0
        if sent < len(data):  # of nothing, too, the kernel says when nobody reads it any more
            self.socket.sendall(data[sent:])

    def request(self, method: str, params: Any = None, request_id: Any = 1) -> bytes:
        body = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params or {}}
        return encode(json.dumps(body).encode(), lines=False)

    def send(self, method: str, params: Any = None, request_id: Any = 1, descriptors: Sequence[int] = ()) -> None:
        self.send_bytes(self.request(method, params, request_id), descriptors)

    def cancel(self, request_id: Any) -> None:
        body = {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": request_id}}
        self.send_bytes(encode(json.dumps(body).encode(), lines=False))

    def receive(self) -> dict[str, Any]:
        """The next message, in either framing."""
        while not self._frames:
            data = self.socket.recv(65536)
            assert data, "the server closed the connection"
            self._frames += [item for item in self._decoder.feed(data) if isinstance(item, Frame)]
        message: dict[str, Any] = json.loads(self._frames.pop(0).body)
        return message

    def ask(self, method: str, params: Any = None, request_id: Any = 1) -> dict[str, Any]:
        self.send(method, params, request_id)
        return self.receive()

    def is_closed(self) -> bool:
        """Wait until the server hangs up, whatever it still says."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(65536):
                pass
        return True


class Witnesses:
    """Pipes whose write ends are sent away: each tells when its last copy, wherever, is closed."""

    def __init__(self, count: int) -> None:
        pipes = [os.pipe() for _ in range(count)]
        self._read_ends = [read_end for read_end, _ in pipes]
        self.write_ends = [write_end for _, write_end in pipes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        for read_end in self._read_ends:
            os.close(read_end)

    def let_go(self) -> None:
        """Close our own copies."""
        for write_end in self.write_ends:
            os.close(write_end)
        self.write_ends = []

    def all_closed(self) -> bool:
        """Wait until nobody holds a write end any more."""
        self.let_go()
        for read_end in self._read_ends:
            ready, _, _ = select.select([read_end], [], [], PATIENCE_S)
            if not ready or os.read(read_end, 1) != b"":
                return False
        return True
