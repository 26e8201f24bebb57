"""The optional listener for a monitoring system: ``GET /metrics``, and nothing else.

Whoever asks gets figures and no names, and cannot make the daemon work: a text is used for all who ask within a
second, few connections are served at once, and each has a deadline for what it says.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable

import anyio
import h11

from sandboxd.egress_rules import address_of, authority
from sandboxd.failures import Failure
from sandboxd.network.forwards import listen_on_path, listen_on_port, remove_path
from sandboxd.network.http import BadMessage, Peer, let_go, next_request, refuse_quietly
from sandboxd.network.streams import Door

logger = logging.getLogger(__name__)

PATH = b"/metrics"
CONNECTIONS_MAX = 8
TEXT_S_MAX = 1.0
"""How old a text may be."""

RETRY_S = 5.0
"""Between two tries to listen where something else does."""


class MetricsDoor:
    """Serves the metrics over HTTP.

    Args:
        where: An IP address of this host and a port, or the path of a Unix socket.
        text: Makes the text.
        content_type: What it is.
    """

    def __init__(self, where: tuple[str, int] | str, text: Callable[[], str], *, content_type: str) -> None:
        self._where = where
        self._make_text = text
        self._content_type = content_type.encode()
        self._text = b""
        self._text_s = -TEXT_S_MAX
        self.problem = ""
        """Why it does not listen; empty: it does, or has not tried yet."""

    async def run(self) -> None:
        """Listen and serve, until cancelled; where that is not possible, try again."""
        while True:
            try:
                listening = self._listen()
            except Failure as error:
                if not self.problem:
                    logger.warning("cannot serve metrics: %s", error)
                self.problem = str(error)
                await anyio.sleep(RETRY_S)
                continue
            self.problem = ""
            try:
                await Door(listening, self._serve, connections_max=CONNECTIONS_MAX).run()
            finally:
                if isinstance(self._where, str):
                    remove_path(self._where)

    def _listen(self) -> socket.socket:
        if isinstance(self._where, str):
            return listen_on_path(self._where)
        listening = listen_on_port(*self._where)
        address = address_of(self._where[0])
        if address is None or not address.is_loopback:
            logger.warning("metrics can be read from other hosts: they are served on %s port %d", *self._where)
        return listening

    async def _serve(self, accepted: socket.socket) -> None:
        peer = Peer(accepted, h11.SERVER)
        try:
            while (request := await next_request(peer)) is not None:
                if not isinstance(await peer.event(), h11.EndOfMessage):
                    raise BadMessage("a body, where none is of use")
                await self._answer(peer, request)
                if not peer.ready_for_next():
                    await let_go(peer)
                    return
        except BadMessage as error:
            await refuse_quietly(peer, 400, {"error": "cannot understand this request", "detail": str(error)})
            await let_go(peer)
        except TimeoutError:
            return

    async def _answer(self, peer: Peer, request: h11.Request) -> None:
        if request.target.partition(b"?")[0] != PATH:
            await peer.answer(404, {"error": "there is nothing but /metrics"})
        elif request.method not in {b"GET", b"HEAD"}:
            await peer.answer(405, {"error": "GET it"}, [(b"allow", b"GET, HEAD")])
        elif not self._is_meant(request):
            await peer.answer(403, {"error": "ask by address: a name could have been led here by somebody else"})
        else:
            await self._say_text(peer, request)

    def _is_meant(self, request: h11.Request) -> bool:
        """Whether the peer knows whom it asks: a web page's own name that leads to our loopback is a trick."""
        if isinstance(self._where, str):
            return True
        hosts = [value.decode("latin-1") for name, value in request.headers if name == b"host"]
        if not hosts or not hosts[0]:
            return True  # no browser's
        # What is no name here may be one to a browser, such as ``-x.example.org``.
        named = authority(hosts[0], default_port=0)
        return named is not None and (named[0] == "localhost" or address_of(named[0]) is not None)

    async def _say_text(self, peer: Peer, request: h11.Request) -> None:
        if time.monotonic() - self._text_s >= TEXT_S_MAX:
            self._text = self._make_text().encode()
            self._text_s = time.monotonic()
        head = [(b"content-type", self._content_type), (b"content-length", str(len(self._text)).encode())]
        await peer.say(h11.Response(status_code=200, headers=head, reason=b"OK"))
        if request.method == b"GET":
            await peer.say(h11.Data(data=self._text))
        await peer.say(h11.EndOfMessage())
