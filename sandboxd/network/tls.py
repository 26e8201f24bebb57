"""A peer that is spoken to over TLS: the certificate is the host's, by the word of the system's authorities."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Self

import h11

from sandboxd.network.http import Peer
from sandboxd.network.streams import CHUNK_BYTES, receive, send

HANDSHAKE_DEADLINE_S = 15.0

RECORD_BYTES_MAX = 32 * 1024
"""What is read at once from the network: a record is 16 KiB."""


class TlsPeer(Peer):
    """The client's side of a connection that is encrypted.

    The engine of ``ssl`` works on bytes in memory and waits for nobody, so that both directions can be under way at
    once; what it has to say goes out in its order, by one sender at a time.
    """

    def __init__(self, connected: socket.socket, host: str, context: ssl.SSLContext) -> None:
        super().__init__(connected, h11.CLIENT)
        self._heard = ssl.MemoryBIO()
        self._to_say = ssl.MemoryBIO()
        self._engine = context.wrap_bio(self._heard, self._to_say, server_hostname=host)
        self._saying = asyncio.Lock()

    @classmethod
    async def introduced(cls, connected: socket.socket, host: str, context: ssl.SSLContext) -> Self:
        """A peer that has proven to be ``host``.

        Raises:
            OSError: it has not, or the connection broke (``ssl.SSLError`` is one).
            TimeoutError: it took too long.
        """
        peer = cls(connected, host, context)
        async with asyncio.timeout(HANDSHAKE_DEADLINE_S):
            while True:
                try:
                    peer._engine.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await peer._flush()
                    await peer._listen()
                except ssl.SSLError:
                    await peer._flush()  # the alert, which says why
                    raise
            await peer._flush()
        return peer

    async def hear(self) -> bytes:
        """Some bytes, or none at the end, where the other side has said that it is the end."""
        while True:
            try:
                return self._engine.read(CHUNK_BYTES)
            except ssl.SSLWantReadError:
                await self._flush()
                await self._listen()
            except ssl.SSLZeroReturnError:
                return b""

    async def utter(self, data: bytes) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            view = view[self._engine.write(view[:CHUNK_BYTES]) :]
            await self._flush()

    async def _listen(self) -> None:
        data = await receive(self.socket, RECORD_BYTES_MAX)
        if data:
            self._heard.write(data)
        else:
            self._heard.write_eof()

    async def _flush(self) -> None:
        async with self._saying:
            if self._to_say.pending:
                await send(self.socket, self._to_say.read())
