"""The egress proxy of one sandbox: HTTP and CONNECT on the sandbox's own loopback, by its rules.

Who speaks is known without a token: the listening socket is in that sandbox's network namespace, and only there.
"""

from __future__ import annotations

import collections
import logging
import socket
import time
from collections.abc import Awaitable, Callable

import h11
import msgspec

from sandboxd.egress_rules import Egress, authority, http_target
from sandboxd.network.http import (
    BadMessage,
    Peer,
    UpstreamFailed,
    body_framing,
    exchange,
    let_go,
    next_request,
    passed_on,
    refuse_quietly,
)
from sandboxd.network.injecting import REFLECTING, CannotInject, Injector, without_replaced
from sandboxd.network.outside import NoWayOut, Outside
from sandboxd.network.streams import Traffic, relay, send
from sandboxd.timings import now_ms

logger = logging.getLogger(__name__)

PROXY_PORT = 3128
PROXY_URL = f"http://127.0.0.1:{PROXY_PORT}"

_NOT_PROXIED = "localhost,127.0.0.1,::1"

PROXY_ENV = {
    "HTTP_PROXY": PROXY_URL,
    "HTTPS_PROXY": PROXY_URL,
    "NO_PROXY": _NOT_PROXIED,
    "http_proxy": PROXY_URL,
    "https_proxy": PROXY_URL,
    "no_proxy": _NOT_PROXIED,
}
"""Both ways in which programs spell them: curl and git know the small ones, Go both, pip, npm and apt either."""

TUNNEL_IDLE_S = 600.0
DENIALS_KEPT_MAX = 100
LOOK_PAUSE_S = 0.2
"""To find out who asked costs a look at all processes, and a log costs disk. Of a program that is refused and tries
again at once all tries are counted, and the first is looked into and logged."""
HOST_CHARS_SHOWN_MAX = 260


class Denial(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that a sandbox wanted and was not granted."""

    at_ms: int
    method: str
    host: str
    port: int
    reason: str
    command: str | None
    """Id and program of the command that asked, where it could be found out."""


class Ledger:
    """What one sandbox did with its way out, since the daemon knows it."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.requests = 0
        self.denied = 0
        self.denials: collections.deque[Denial] = collections.deque(maxlen=DENIALS_KEPT_MAX)
        self.looked_s = -LOOK_PAUSE_S


class EgressProxy:
    """Serves the connections of one sandbox.

    Args:
        name: Of the sandbox, for logs and hints.
        rules: What it may do, asked for each request: rules change while connections live.
        ledger: Where it is counted.
        outside: The way out.
        culprit: Which command of the sandbox has this port of its loopback; for the log.
        injector: What is added to its requests.
    """

    def __init__(
        self,
        name: str,
        rules: Callable[[], Egress],
        ledger: Ledger,
        outside: Outside,
        culprit: Callable[[int], Awaitable[str | None]],
        injector: Injector,
    ) -> None:
        self._name = name
        self._rules = rules
        self._ledger = ledger
        self._outside = outside
        self._culprit = culprit
        self._injector = injector

    async def serve(self, accepted: socket.socket) -> None:
        """Serve one connection to its end."""
        peer = Peer(accepted, h11.SERVER)
        try:
            while (request := await next_request(peer)) is not None:
                self._ledger.requests += 1
                if request.method == b"CONNECT":
                    await self._tunnel(peer, request)
                else:
                    await self._forward(peer, request)
                if not peer.ready_for_next():
                    await let_go(peer)
                    return
        except BadMessage as error:
            await refuse_quietly(peer, error.status, _said("cannot understand this request", str(error)))
            await let_go(peer)
        except TimeoutError:
            return

    async def _tunnel(self, peer: Peer, request: h11.Request) -> None:
        where = authority(request.target.decode("latin-1"))
        if where is None or not isinstance(await peer.event(), h11.EndOfMessage):
            raise BadMessage("CONNECT takes HOST:PORT, and no body")
        upstream = await self._open(peer, *where, "CONNECT")
        if upstream is None:
            return
        with upstream:
            await peer.say(h11.Response(status_code=200, headers=[], reason=b"Connected"))
            early, _ = peer.wire.trailing_data
            if early:
                self._ledger.traffic.sent_bytes += len(early)
                await send(upstream, early)
            await relay(peer.socket, upstream, self._ledger.traffic, idle_s=TUNNEL_IDLE_S)

    async def _forward(self, peer: Peer, request: h11.Request) -> None:
        target = http_target(request.target.decode("latin-1"))
        if target is None:
            raise BadMessage("this is a proxy: it takes http://HOST/PATH, and CONNECT for everything else")
        host, port, path = target
        injected = self._injector.fitting(host, port)
        # Judged as a server may take it: many have their methods in capital letters, however they are written.
        method = request.method.decode("ascii").upper()
        if injected:
            port = injected[0].port
            if method in REFLECTING:
                await self._refuse(peer, host, port, method, f"{method} would be answered with what is added to it")
                return
        connected = await self._open(peer, host, port, method)
        if connected is None:
            return
        with connected:
            try:
                added = await self._injector.added(injected)
                secure = bool(injected) and injected[0].secure
                upstream = await self._outside.secured(connected, host) if secure else Peer(connected, h11.CLIENT)
            except CannotInject as error:
                # Which secret, and why, is for those outside.
                await self._note_denial(peer.socket, host, port, method, str(error))
                await peer.answer(502, _said(f"cannot send this to {host}", "what is to be added cannot be had"))
                return
            except NoWayOut as error:
                await peer.answer(502, _said(f"cannot connect to {host}:{port}", error.reason))
                return
            shown = f"[{host}]" if ":" in host else host
            head = [
                (b"host", (shown if port == (443 if secure else 80) else f"{shown}:{port}").encode()),
                *without_replaced(passed_on(request.headers, without=frozenset({b"host"})), injected),
                *added,
                *body_framing(request),
                (b"connection", b"close"),
            ]
            rewritten = h11.Request(method=request.method, target=path.encode("latin-1"), headers=head)
            try:
                await exchange(peer, upstream, rewritten, self._ledger.traffic)
            except UpstreamFailed as error:
                await peer.answer(502, _said(f"cannot get an answer from {host}", str(error)))

    async def _refuse(self, peer: Peer, host: str, port: int, method: str, reason: str) -> None:
        await self._note_denial(peer.socket, host, port, method, reason)
        await peer.answer(403, _said(f"cannot connect to {host}:{port}", reason))

    async def _open(self, peer: Peer, host: str, port: int, method: str) -> socket.socket | None:
        """A connection to where the rules let it go; None: the peer was told that there is none."""
        verdict = self._rules().judge(host, port, method)
        try:
            if verdict.outcome == "denied":
                raise NoWayOut(verdict.reason, denied=True)
            return await self._outside.connect(host, port, by_address=verdict.by_address)
        except NoWayOut as error:
            if error.denied:
                await self._note_denial(peer.socket, host, port, method, error.reason)
            hint = f"sandboxctl network {self._name} --allow {verdict.useful_rule}" if verdict.useful_rule else ""
            await peer.answer(
                403 if error.denied else 502, _said(f"cannot connect to {host}:{port}", error.reason, hint)
            )
            return None

    async def _note_denial(self, accepted: socket.socket, host: str, port: int, method: str, reason: str) -> None:
        self._ledger.denied += 1
        now_s = time.monotonic()
        told = now_s - self._ledger.looked_s >= LOOK_PAUSE_S
        command = None
        if told:
            self._ledger.looked_s = now_s
            command = await self._culprit(accepted.getpeername()[1])
        denial = Denial(
            at_ms=now_ms(),
            method=method[:16],
            host=host[:HOST_CHARS_SHOWN_MAX],
            port=port,
            reason=reason,
            command=command,
        )
        self._ledger.denials.append(denial)
        if not told:
            return
        logger.warning(
            "denied %s of sandbox %s: %s %s:%d: %s", command or "a command", self._name, method, host, port, reason
        )


def _said(error: str, detail: str, hint: str = "") -> dict[str, str]:
    return {"error": error, "detail": detail, "hint": hint}
