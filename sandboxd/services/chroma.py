"""The shared ChromaDB: what it is started with, and the proxy through which each sandbox sees its part of it.

Never imports the package: it is an extra, costs a second to import, and runs in a process of its own. Known of 1.5.9:
a busy port makes it print a line and end with 0, which is a failure here like any other end; its configuration file
would have it listen on all addresses, so it is given flags alone; it is ready by its heartbeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence

import h11
import msgspec

from sandboxd.network.http import (
    BadMessage,
    Peer,
    UpstreamFailed,
    ask_over,
    body_framing,
    exchange,
    let_go,
    next_request,
    passed_on,
    refuse_quietly,
)
from sandboxd.network.streams import Traffic
from sandboxd.services.chroma_scope import PRIVATE_PREFIX, PRIVATE_TENANT, Forward, Refused, Scope, judge
from sandboxd.services.supervisor import Service, ServiceSpec

logger = logging.getLogger(__name__)

NAME = "chroma"
API = "/api/v2"
HEARTBEAT = f"{API}/heartbeat"

READY_PATIENCE_S = 15.0
"""How long a request waits for ChromaDB to be there again: a restart takes two seconds."""
ASK_DEADLINE_S = 15.0
COLLECTIONS_KNOWN_MAX = 10_000
"""Ids remembered for one sandbox."""
RETRY_AFTER_S = 2
DATABASES_PAGE = 100


_PROGRAM = """
import sys
try:
    from chromadb_rust_bindings import cli
except ImportError:
    from chromadb.cli.cli import app
    app()
else:
    cli(["chroma", *sys.argv[1:]])
"""
"""What its own ``chroma`` does, without importing all of the package first: 0.2 s and 40 MB, not 2.9 s and 115 MB."""


def chroma_spec(*, port_inside: int, memory_bytes_max: int, python: str) -> ServiceSpec:
    """How ChromaDB is started.

    Args:
        port_inside: Where sandboxes see it.
        memory_bytes_max: Of its own data; what it maps from files does not count.
        python: The interpreter that has it; empty: this one, if the extra is installed.
    """
    interpreter = python or sys.executable
    missing = ""
    roots: tuple[str, ...] = ()
    if not python:
        found = importlib.util.find_spec("chromadb")
        if found is None or found.origin is None:
            missing = "it is not installed"
        else:
            roots = (os.path.dirname(os.path.dirname(found.origin)),)
    return ServiceSpec(
        name=NAME,
        argv=(interpreter, "-c", _PROGRAM, "run", "--path", "{data}", "--host", "127.0.0.1", "--port", "{port}"),
        env={"PYTHONPATH": ":".join(roots), "ANONYMIZED_TELEMETRY": "False"},
        port_inside=port_inside,
        health_path=HEARTBEAT,
        memory_bytes_max=memory_bytes_max,
        missing=missing,
        hint="pip install 'sandboxd[chroma]', or set chroma.python" if missing else "",
        keep=(*(_prefix(path) for path in (interpreter, os.path.realpath(interpreter))), *roots),
    )


def _prefix(interpreter: str) -> str:
    return os.path.dirname(os.path.dirname(interpreter))


class Chroma:
    """What this daemon keeps in ChromaDB, and how sandboxes come to it.

    Args:
        service: It runs there.
        sandbox_ids: Those that there are: what is private to others is removed.
    """

    def __init__(self, service: Service, sandbox_ids: Callable[[], Sequence[str]]) -> None:
        self._service = service
        self._sandbox_ids = sandbox_ids
        self._made: set[tuple[str, str]] = set()
        service.on_ready = self.tidy

    def proxy(self, scopes: Sequence[Scope]) -> ChromaProxy:
        """What serves the connections of one sandbox."""
        return ChromaProxy(self, scopes)

    async def ready(self) -> bool:
        """Whether it is there; it was waited for."""
        return await self._service.ready(patience_s=READY_PATIENCE_S)

    async def connect(self) -> socket.socket:
        """A connection to it.

        Raises:
            OSError, TimeoutError: it takes none.
        """
        return await self._service.connect()

    async def _ask(self, method: str, target: str, content: object = None) -> tuple[int, bytes]:
        async with asyncio.timeout(ASK_DEADLINE_S):
            with await self._service.connect() as connected:
                return await ask_over(connected, method, target, content)

    @property
    def trouble(self) -> str:
        """Why it is not there, for those inside: no more than that it is not."""
        return "it cannot be started here" if self._service.spec.missing else "it is being started, or does not start"

    async def tidy(self) -> None:
        """Make ours what is needed, and remove what was private to sandboxes that are gone."""
        self._made.clear()
        await self._ask("POST", f"{API}/tenants", {"name": PRIVATE_TENANT})
        alive = {f"{PRIVATE_PREFIX}{sandbox_id}" for sandbox_id in self._sandbox_ids()}
        for name in await self._databases():
            if name.startswith(PRIVATE_PREFIX) and name not in alive:
                await self._drop(name)

    async def _databases(self) -> list[str]:
        names: list[str] = []
        while True:
            target = f"{API}/tenants/{PRIVATE_TENANT}/databases?limit={DATABASES_PAGE}&offset={len(names)}"
            status, body = await self._ask("GET", target)
            page = _names_in(body) if status == 200 else []
            names += page
            if len(page) < DATABASES_PAGE:
                return names

    async def _drop(self, name: str) -> None:
        target = f"{API}/tenants/{PRIVATE_TENANT}/databases/{name}"
        status, _ = await self._ask("DELETE", target)
        logger.info("removed the private database %s: %d", name, status)

    async def forget(self, sandbox_id: str) -> None:
        """Remove what was private to a sandbox. What cannot be removed now is, when it starts the next time."""
        name = f"{PRIVATE_PREFIX}{sandbox_id}"
        self._made.discard((PRIVATE_TENANT, name))
        with contextlib.suppress(OSError, TimeoutError):
            await self._drop(name)

    async def make_sure(self, scope: Scope) -> None:
        """Have the database of a scope.

        Raises:
            OSError, TimeoutError: it does not answer, or says no.
        """
        key = (scope.tenant, scope.database)
        if scope.tenant != PRIVATE_TENANT or key in self._made:
            return
        target = f"{API}/tenants/{scope.tenant}/databases"
        status, body = await self._ask("POST", target, {"name": scope.database})
        if status not in (200, 201, 409):
            raise OSError(errno.EPROTO, f"cannot make the database {scope.database}: {body[:200]!r}")
        self._made.add(key)

    async def belongs(self, scope: Scope, collection: str) -> bool:
        """Whether a collection is in the database of a scope.

        Raises:
            OSError, TimeoutError: it does not answer.
        """
        target = f"{API}/tenants/{scope.tenant}/databases/{scope.database}/collections/by-id/{collection}"
        status, _ = await self._ask("GET", target)
        return status == 200


def _names_in(body: bytes) -> list[str]:
    try:
        return [row["name"] for row in msgspec.json.decode(body, type=list[dict[str, str | None]]) if row["name"]]
    except (msgspec.MsgspecError, KeyError):
        return []


class ChromaProxy:
    """Serves the connections of one sandbox, within its scopes."""

    def __init__(self, chroma: Chroma, scopes: Sequence[Scope]) -> None:
        self._chroma = chroma
        self._scopes = scopes
        self._known: set[tuple[str, str]] = set()
        """Collections that belong to a scope: none ever moves."""
        self.traffic = Traffic()

    async def serve(self, accepted: socket.socket) -> None:
        """Serve one connection to its end."""
        peer = Peer(accepted, h11.SERVER)
        way = _Way()
        try:
            while (request := await next_request(peer)) is not None:
                await self._serve_one(peer, request, way)
                if not peer.ready_for_next():
                    await let_go(peer)
                    return
        except BadMessage as error:
            await refuse_quietly(peer, error.status, _said("InvalidArgumentError", str(error)))
            await let_go(peer)
        except TimeoutError:
            return
        finally:
            way.close()

    async def _serve_one(self, peer: Peer, request: h11.Request, way: _Way) -> None:
        decision = judge(request.method.decode("latin-1"), request.target.decode("latin-1"), self._scopes)
        if isinstance(decision, Refused):
            await peer.answer(decision.status, _said(decision.error, decision.message))
            return
        if not await self._chroma.ready():
            await _answer_unavailable(peer, self._chroma.trouble)
            return
        try:
            if not await self._may_pass(peer, decision):
                return
            upstream = await way.open(self._chroma.connect)
        except (OSError, TimeoutError) as error:
            await _answer_unavailable(peer, str(error))
            return
        head = [(b"host", b"localhost"), *passed_on(request.headers, without=_NOT_PASSED), *body_framing(request)]
        rewritten = h11.Request(method=request.method, target=decision.target, headers=head)
        try:
            await exchange(peer, upstream, rewritten, self.traffic)
        except UpstreamFailed as error:
            way.close()
            await _answer_unavailable(peer, str(error))

    async def _may_pass(self, peer: Peer, decision: Forward) -> bool:
        """Whether what is asked for is there; else the peer was told."""
        scope, collection = decision.scope, decision.collection
        if scope is None:
            return True
        await self._chroma.make_sure(scope)
        if collection is None or (scope.database, collection) in self._known:
            return True
        if not await self._chroma.belongs(scope, collection):
            await peer.answer(404, _said("NotFoundError", f"Collection [{collection}] does not exist."))
            return False
        if len(self._known) >= COLLECTIONS_KNOWN_MAX:
            self._known.clear()
        self._known.add((scope.database, collection))
        return True


_NOT_PASSED = frozenset({b"host", b"origin", b"x-chroma-token", b"authorization", b"cookie"})


class _Way:
    """The connection to ChromaDB of one connection from inside: kept between requests."""

    def __init__(self) -> None:
        self._peer: Peer | None = None

    async def open(self, connect: Callable[[], Awaitable[socket.socket]]) -> Peer:
        """A peer that is ready for a request."""
        if self._peer is not None and self._peer.ready_for_next() and not self._stale():
            return self._peer
        self.close()
        self._peer = Peer(await connect(), h11.CLIENT)
        return self._peer

    def _stale(self) -> bool:
        """Whether the other side has ended it, or said something unasked."""
        assert self._peer is not None
        try:
            self._peer.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        if self._peer is not None:
            self._peer.socket.close()
        self._peer = None


async def _answer_unavailable(peer: Peer, why: str) -> None:
    said = _said("ServiceUnavailable", f"the shared ChromaDB does not answer: {why}")
    await peer.answer(503, said, [(b"retry-after", str(RETRY_AFTER_S).encode())])


def _said(error: str, message: str) -> dict[str, str]:
    return {"error": error, "message": message}
