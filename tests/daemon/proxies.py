"""A door as a sandbox sees one, servers on the loopback to go to, and clients that say exactly what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Self

import anyio

from sandboxd.egress_rules import Address, Egress, parse_rules
from sandboxd.network.egress import EgressProxy, Ledger
from sandboxd.network.outside import Outside
from sandboxd.network.streams import Door

PATIENCE_S = 20.0
"""A bound for what must happen; nothing takes that long unless it is broken."""

LOOPBACK = ipaddress.ip_address("127.0.0.1")

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
        self.port = port

    async def culprit(self, port: int) -> str | None:
        self.asked_for.append(port)
        return "0123456789ab curl"

    def proxy(self) -> EgressProxy:
        return EgressProxy("box", lambda: self.rules, self.ledger, self.outside, self.culprit)


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
