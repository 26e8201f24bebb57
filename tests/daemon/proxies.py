"""A door as a sandbox sees one, servers on the loopback to go to, and clients that say exactly what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Self

import anyio

from sandboxd.egress_rules import Address, Egress, parse_rules
from sandboxd.failures import NotFound
from sandboxd.injections import Injection, parse_injections
from sandboxd.network import streams
from sandboxd.network.egress import EgressProxy, Ledger
from sandboxd.network.injecting import Injector
from sandboxd.network.outside import Outside
from sandboxd.network.streams import Door

PATIENCE_S = 20.0
"""A bound for what must happen; nothing takes that long unless it is broken."""

LOOPBACK = ipaddress.ip_address("127.0.0.1")

AUTHORITY = os.path.join(os.path.dirname(__file__), "tls", "authority.pem")
SERVER = os.path.join(os.path.dirname(__file__), "tls", "server.pem")
"""Of ``good.example`` and ``127.0.0.1``."""

Serve = Callable[[socket.socket], Awaitable[None]]


def listening() -> socket.socket:
    """A listening socket on a free port of the loopback."""
    made = socket.create_server(("127.0.0.1", 0))
    made.setblocking(False)
    return made


def port_of(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


@contextlib.asynccontextmanager
async def door(serve: Serve, *, connections_max: int = 8) -> AsyncIterator[tuple[int, Door]]:
    """A door on a port of the loopback, for the length of a ``with``."""
    bound = listening()
    opened = Door(bound, serve, connections_max=connections_max)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(opened.run)
        try:
            yield port_of(bound), opened
        finally:
            opened.close()


class Client:
    """Says bytes, hears bytes."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """All that comes until the other side closes."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""

    async def until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(mark)


async def said_to(port: int, data: bytes) -> bytes:
    """What is answered, to the end of the connection."""
    async with Client(port) as client:
        await client.say(data)
        return await client.rest()


class Recorder:
    """An upstream that answers each request with ``answer`` and keeps what it heard."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello") -> None:
        self.answer = answer
        self.heard: list[bytes] = []

    async def __call__(self, accepted: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data and (part := await streams.receive(accepted)):
            data += part
        if data:
            self.heard.append(data)
            await streams.send(accepted, self.answer)


class FakeOutside(Outside):
    """Names lead where a test says, each look-up to the next answer; to an answer's address, this host stands in."""

    def __init__(self, names: Mapping[str, Sequence[Sequence[str]]], port: int) -> None:
        super().__init__()
        self.names = {name: list(answers) for name, answers in names.items()}
        self.port = port
        self.looked_up: list[str] = []
        self.connected_to: list[Address] = []

    async def look_up(self, host: str) -> Sequence[Address]:
        self.looked_up.append(host)
        answers = self.names[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ipaddress.ip_address(text) for text in answer]

    async def _connect_to(self, addresses: Sequence[Address], port: int) -> socket.socket:
        self.connected_to.append(addresses[0])
        return await super()._connect_to([LOOPBACK], self.port)


class Egressing:
    """An egress proxy in front of a server on the loopback."""

    def __init__(self, port: int, outside: FakeOutside, allow: Sequence[str], deny: Sequence[str]) -> None:
        self.rules = Egress(parse_rules(allow), parse_rules(deny))
        self.ledger = Ledger()
        self.outside = outside
        self.asked_for: list[int] = []
        self.injections: Sequence[Injection] = ()
        self.secrets: dict[str, bytes] = {}
        self.port = port

    async def reveal(self, name: str) -> bytes:
        if name not in self.secrets:
            raise NotFound(f"cannot find the secret {name!r}")
        return self.secrets[name]

    async def culprit(self, port: int) -> str | None:
        self.asked_for.append(port)
        return "0123456789ab curl"

    def proxy(self) -> EgressProxy:
        injector = Injector(lambda: self.injections, self.reveal)
        return EgressProxy("box", lambda: self.rules, self.ledger, self.outside, self.culprit, injector)


PUBLIC = "151.101.0.223"


@contextlib.asynccontextmanager
async def egressing(
    server: Serve,
    *,
    allow: Sequence[str] = ("good.example:80,443",),
    deny: Sequence[str] = (),
    names: Mapping[str, Sequence[Sequence[str]]] | None = None,
    connections_max: int = 8,
) -> AsyncIterator[Egressing]:
    """A proxy whose names, ``good.example`` if nothing is said, lead to ``server``."""
    async with door(server) as (server_port, _):
        outside = FakeOutside(names or {"good.example": [[PUBLIC]]}, server_port)
        made = Egressing(0, outside, allow, deny)
        async with door(made.proxy().serve, connections_max=connections_max) as (port, _):
            made.port = port
            yield made


class TlsServer:
    """A server that speaks TLS, answers each connection's request with ``answer``, and keeps what it heard."""

    def __init__(self, answer: bytes, *, cuts_off: bool) -> None:
        self.answer = answer
        self.heard: list[bytes] = []
        self.port = 0
        self._cuts_off = cuts_off

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((line for line in head.split(b"\r\n") if line.startswith(b"content-length: ")), b": 0")
            self.heard.append(head + await reader.readexactly(int(length.split(b": ")[1])))
            writer.write(self.answer)
            await writer.drain()
        if self._cuts_off:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def tls_server(answer: bytes, *, cuts_off: bool = False) -> AsyncIterator[TlsServer]:
    """A server on the loopback that proves to be ``good.example``; ``cuts_off``: it ends without saying so."""
    made = TlsServer(answer, cuts_off=cuts_off)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(SERVER)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    async with server:
        made.port = port_of(server.sockets[0])
        yield made


@contextlib.asynccontextmanager
async def injecting(
    server_port: int,
    *inject: str,
    secrets: Mapping[str, bytes],
    names: Sequence[str] = ("good.example",),
    allow: Sequence[str] = ("good.example",),
) -> AsyncIterator[Egressing]:
    """A proxy that adds to requests, and whose names all lead to one server."""
    made = Egressing(0, FakeOutside({name: [[PUBLIC]] for name in names}, server_port), allow, ())
    made.injections = parse_injections(inject)
    made.secrets = dict(secrets)
    async with door(made.proxy().serve) as (port, _):
        made.port = port
        yield made
