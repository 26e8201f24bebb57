"""HTTP/1.1 between hostile peers: each side is parsed by h11 and said anew, nothing is passed through unread.

A message that two readers could understand in two ways never gets further: framing headers of the one side are not
those of the other, both lengths at once are refused, and so is whatever h11 does not take.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
from collections.abc import Iterable, Sequence

import h11
import msgspec

from sandboxd.network.streams import CHUNK_BYTES, Traffic, receive, send

HEAD_BYTES_MAX = 64 * 1024
"""A request line and its headers. Index pages of package servers are asked for with a few hundred bytes."""

HEAD_LINES_MAX = 200
"""Header lines of one message. Browsers send some twenty; each costs more to look at than its bytes do."""

HEAD_DEADLINE_S = 20.0
"""From the first wait for a request to its last header: a peer that drips is let go."""

IDLE_S = 120.0
"""Nothing moved in the middle of a message."""

LINGER_S = 2.0
LINGER_BYTES_MAX = 64 * 1024 * 1024
"""How long, and how much of a request that was refused, is listened to for nothing."""

_BLANK_LINE = re.compile(rb"\n\r?\n")

Headers = Sequence[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
    }
)
"""What concerns one connection only (RFC 9110, 7.6.1)."""

REASONS = {400: b"Bad Request", 403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed", 502: b"Bad Gateway"}
REASONS |= {
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}


class BadMessage(Exception):
    """The peer said what is no HTTP, or ended in the middle of it. ``status`` answers a request that was so."""

    def __init__(self, said: str, *, status: int = 400) -> None:
        super().__init__(said)
        self.status = status


class Peer:
    """One side of a connection.

    Args:
        connected: Not owned.
        role: Which side we are.
    """

    def __init__(self, connected: socket.socket, role: type[h11.CLIENT | h11.SERVER]) -> None:
        self.socket = connected
        self.method = b""
        """Of the request that was heard last."""
        self.wire = h11.Connection(role, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def event(self) -> h11.Event | type[h11.PAUSED]:
        """What the peer says next.

        Raises:
            BadMessage: nothing that can be understood.
            OSError: the connection broke.
            TimeoutError: the peer was silent for too long.
        """
        while True:
            self._bound_head()
            try:
                event = self.wire.next_event()
                if isinstance(event, h11.Event) or event is h11.PAUSED:
                    return event
                if self.wire.they_are_waiting_for_100_continue:
                    await self.say(h11.InformationalResponse(status_code=100, headers=[]))
                async with asyncio.timeout(IDLE_S):
                    self.wire.receive_data(await self.hear())
            except h11.RemoteProtocolError as error:
                raise BadMessage(str(error)) from None

    def _bound_head(self) -> None:
        """Judge a head by what was heard of it: h11 takes a hundred times as long, and bounds none that is complete.

        Raises:
            BadMessage: it is too long.
        """
        if self.wire.their_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        heard, _ = self.wire.trailing_data
        if len(heard) <= HEAD_BYTES_MAX and heard.count(b"\n") <= HEAD_LINES_MAX:
            return
        blank = _BLANK_LINE.search(heard)
        # What ends with a line may be in the middle of a blank one.
        end = len(heard) - 2 if blank is None else blank.start()
        if heard.count(b"\n", 0, end) > HEAD_LINES_MAX:
            raise BadMessage(f"a head of more than {HEAD_LINES_MAX} lines", status=431)
        if end > HEAD_BYTES_MAX:
            raise BadMessage(f"a head of more than {HEAD_BYTES_MAX} bytes", status=431)

    async def say(self, event: h11.Event) -> None:
        """Say something, and wait until the peer has taken it.

        Raises:
            BadMessage: it cannot be said so: it came from another peer, who is hostile.
            OSError: the connection broke.
        """
        try:
            data = self.wire.send(event)
        except h11.LocalProtocolError as error:
            raise BadMessage(str(error)) from None
        if data:
            async with asyncio.timeout(IDLE_S):
                await self.utter(data)

    async def hear(self) -> bytes:
        """Some bytes from the other side, or none at the end.

        Raises:
            OSError: the connection broke.
        """
        return await receive(self.socket, CHUNK_BYTES)

    async def utter(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            OSError: the connection broke.
        """
        await send(self.socket, data)

    async def answer(self, status: int, content: object, headers: Headers = ()) -> None:
        """Answer a request with JSON, if it can still be answered, and end the connection after it."""
        if self.wire.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = msgspec.json.encode(content)
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *headers,
        ]
        await self.say(h11.Response(status_code=status, headers=head, reason=REASONS.get(status, b"")))
        if self.method != b"HEAD":
            await self.say(h11.Data(data=body))
        await self.say(h11.EndOfMessage())

    def ready_for_next(self) -> bool:
        """Whether another message may follow on this connection; it is then ready for it."""
        if self.wire.our_state is h11.DONE and self.wire.their_state is h11.DONE:
            self.wire.start_next_cycle()
            return True
        return False


async def next_request(peer: Peer) -> h11.Request | None:
    """The next request, or None when the peer has ended, or waited for too long.

    Raises:
        BadMessage: it is none, or one that two readers could understand in two ways.
    """
    try:
        async with asyncio.timeout(HEAD_DEADLINE_S):
            event = await peer.event()
    except (TimeoutError, OSError):
        return None
    if not isinstance(event, h11.Request):
        return None
    peer.method = event.method
    names = [name for name, _ in event.headers]
    if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
        raise BadMessage("a request with two lengths")
    if any(names.count(name) > 1 for name in (b"host", b"content-length", b"transfer-encoding")):
        raise BadMessage("a request that says something twice")
    return event


def passed_on(headers: Iterable[tuple[bytes, bytes]], *, without: frozenset[bytes] = frozenset()) -> Headers:
    """The headers that go to the next hop: not those of this connection, nor what it names as such."""
    headers = list(headers)
    named = {
        option.strip().lower() for name, value in headers if name == b"connection" for option in value.split(b",")
    }
    dropped = HOP_BY_HOP | named | without
    # A length is what frames the body: what it names cannot be dropped from under it.
    return [(name, value) for name, value in headers if name == b"content-length" or name not in dropped]


def body_framing(request: h11.Request) -> Headers:
    """What frames the body towards the next hop, where a length does not."""
    chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
    return [(b"transfer-encoding", b"chunked")] if chunked else []


async def exchange(downstream: Peer, upstream: Peer, request: h11.Request, traffic: Traffic) -> None:
    """Say ``request`` to upstream, and pass its body up and the answer down.

    Returns when the answer is complete. The request's body may not be, for upstream answered early: then
    ``ready_for_next`` is false on both sides.

    Raises:
        UpstreamFailed: before anything of an answer was passed down.
        BadMessage, OSError, TimeoutError: one of the two sides; the connection is of no more use.
    """
    try:
        await upstream.say(request)
    except OSError as error:
        raise UpstreamFailed(str(error)) from error
    up = asyncio.ensure_future(_pass_body(downstream, upstream, traffic))
    down = asyncio.ensure_future(_pass_answer(upstream, downstream, traffic))
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if not down.done() and (cut_short := up.exception()) is not None:
            raise cut_short
        await down
    finally:
        for way in (up, down):
            way.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


class UpstreamFailed(Exception):
    """Upstream did not answer: nothing was said to the one who asked."""


async def _pass_body(source: Peer, target: Peer, traffic: Traffic) -> None:
    said: h11.Data | h11.EndOfMessage
    while True:
        event = await source.event()
        match event:
            case h11.Data():
                traffic.sent_bytes += len(event.data)
                said = h11.Data(data=event.data)
            case h11.EndOfMessage():
                said = h11.EndOfMessage()
            case _:
                raise BadMessage("a request that ends in the middle")
        try:
            await target.say(said)
        except OSError:
            # Upstream takes no more: what it answers says why.
            return
        if isinstance(said, h11.EndOfMessage):
            return


async def _pass_answer(upstream: Peer, downstream: Peer, traffic: Traffic) -> None:
    try:
        response = await upstream.event()
        while isinstance(response, h11.InformationalResponse):
            response = await upstream.event()
    except BadMessage as error:
        too_long = f"it answers with {error}" if error.status == 431 else ""
        raise UpstreamFailed(too_long or "it closed the connection, or said what is no HTTP") from error
    except (OSError, TimeoutError) as error:
        raise UpstreamFailed(str(error) or "it does not answer") from error
    if not isinstance(response, h11.Response):
        raise UpstreamFailed("it closed the connection")
    chunked = any(name == b"transfer-encoding" for name, _ in response.headers)
    head = passed_on(response.headers)
    if chunked:
        # Two lengths are one too many: whoever reads next could take the other.
        head = [*(entry for entry in head if entry[0] != b"content-length"), (b"transfer-encoding", b"chunked")]
    await downstream.say(h11.Response(status_code=response.status_code, headers=list(head), reason=response.reason))
    while True:
        event = await upstream.event()
        match event:
            case h11.Data():
                traffic.received_bytes += len(event.data)
                await downstream.say(h11.Data(data=event.data))
            case h11.EndOfMessage():
                await downstream.say(h11.EndOfMessage())
                return
            case _:
                raise BadMessage("an answer that ends in the middle")


async def let_go(peer: Peer) -> None:
    """Wait a while for the peer to end: to close on what it still says would take the answer away from it."""
    left = LINGER_BYTES_MAX
    with contextlib.suppress(OSError, TimeoutError):
        peer.socket.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER_S):
            while left > 0 and (data := await receive(peer.socket)):
                left -= len(data)


async def refuse_quietly(peer: Peer, status: int, content: object) -> None:
    """Answer if the peer still listens."""
    with contextlib.suppress(OSError, TimeoutError, BadMessage):
        await peer.answer(status, content)


async def ask_over(
    connected: socket.socket, method: str, target: str, content: object = None, *, bytes_max: int = 1024 * 1024
) -> tuple[int, bytes]:
    """One request of our own over a connection that is there, and closed by whoever has it: status and body.

    Raises:
        OSError: what comes is no HTTP, or too much of it, or the connection broke.
    """
    peer = Peer(connected, h11.CLIENT)
    body = b"" if content is None else msgspec.json.encode(content)
    head = [(b"host", b"localhost"), (b"connection", b"close"), (b"content-length", str(len(body)).encode())]
    if body:
        head.append((b"content-type", b"application/json"))
    await peer.say(h11.Request(method=method, target=target, headers=head))
    await peer.say(h11.Data(data=body))
    await peer.say(h11.EndOfMessage())
    return await _answer_of(peer, bytes_max)


async def _answer_of(peer: Peer, bytes_max: int) -> tuple[int, bytes]:
    status = 0
    body = bytearray()
    try:
        while not isinstance(event := await peer.event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif not isinstance(event, h11.InformationalResponse):
                raise BadMessage("it closed the connection")
            if len(body) > bytes_max:
                raise BadMessage(f"it answers with more than {bytes_max} bytes")
    except BadMessage as error:
        raise OSError(errno.EPROTO, str(error)) from error
    return status, bytes(body)
