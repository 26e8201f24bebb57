"""How the daemon comes to a service that runs on the host: through the service's own loopback, where it has one.

Every user of the host can connect to a port on its loopback, and a service such as ChromaDB asks nobody who he is. So
the launcher gives the service a network of its own and leaves a small process in it, which hands out sockets of that
network when it is asked to: the daemon connects them itself. Nobody else can have one. Where the kernel grants this
user no namespaces, the launcher says so, and the service is on the host's loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket

import anyio

from sandboxd.network.streams import connect
from sandboxd.services.launcher import ASK, OWN_NETWORK

LOOPBACK = "127.0.0.1"


class WayIn:
    """Connections to one service, from its start to its end; ``close`` must follow."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._asking = asyncio.Lock()
        self._is_owed = False
        self.own: bool | None = None
        """Whether the service has a network of its own; None: the launcher has not said so yet."""

    @property
    def passed(self) -> int:
        """The launcher's end, to be inherited."""
        return self._theirs.fileno()

    def started(self) -> None:
        """The launcher has its end, and nobody else keeps it: when it is gone, that is seen here."""
        self._theirs.close()

    def close(self) -> None:
        """No more connections; the process in the service's network ends. Idempotent."""
        self._theirs.close()
        self._ours.close()

    async def connect(self, port: int, *, deadline_s: float) -> socket.socket:
        """A connected non-blocking socket to a port of the service's loopback.

        Raises:
            OSError: nobody listens there, or the service is gone.
            TimeoutError: nobody answered in time.
        """
        async with asyncio.timeout(deadline_s):
            async with self._asking:
                if self.own is None:
                    said, _ = await self._heard()
                    self.own = said == OWN_NETWORK
                if not self.own:
                    return await connect(socket.AF_INET, (LOOPBACK, port), deadline_s=deadline_s)
                connecting = await self._new_socket()
            try:
                await asyncio.get_running_loop().sock_connect(connecting, (LOOPBACK, port))
                connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BaseException:
                connecting.close()
                raise
            return connecting

    async def _new_socket(self) -> socket.socket:
        """An unconnected socket of the service's network.

        One that comes too late for who asked is the next one's, who asks for none then. So never more than one is on
        its way, and however many stop waiting, neither end has to wait for the other to read.
        """
        if not self._is_owed:
            await asyncio.get_running_loop().sock_sendall(self._ours, ASK)
            self._is_owed = True
        _, descriptors = await self._heard()
        self._is_owed = False
        if len(descriptors) != 1:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        made = socket.socket(fileno=descriptors[0])
        # What is at the other end belongs to the service's user.
        if (made.family, made.type) != (socket.AF_INET, socket.SOCK_STREAM):
            made.close()
            raise OSError(errno.EPROTO, "the service's network gave what is no TCP socket")
        made.setblocking(False)
        return made

    async def _heard(self) -> tuple[bytes, list[int]]:
        await anyio.wait_readable(self._ours)
        said, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not said:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return said, descriptors


def free_port() -> int:
    """A port of the host's loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def listens(pid: int, port: int) -> bool:
    """Whether this process itself has the listening socket: somebody else may have taken the port in between."""
    wanted = f"0100007F:{port:04X}"
    with open(f"/proc/{pid}/net/tcp", encoding="ascii") as table:
        rows = [line.split() for line in table]
    inodes = {f"socket:[{row[9]}]" for row in rows if len(row) > 9 and row[1] == wanted and row[3] == "0A"}
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") in inodes:
                    return True
    return False
