"""The way out: names are looked up here, and connections made to the very addresses that were judged."""

from __future__ import annotations

import functools
import ipaddress
import socket
import ssl
from collections.abc import Sequence

import anyio
import anyio.to_thread
import psutil

from sandboxd.egress_rules import Address, address_of, forbidden
from sandboxd.network.streams import connect
from sandboxd.network.tls import TlsPeer

LOOKUP_DEADLINE_S = 10.0
CONNECT_DEADLINE_S = 10.0
ADDRESSES_TRIED_MAX = 4
LOOKUPS_AT_ONCE_MAX = 16
"""Each holds a thread, and a name server that is silent holds it for seconds."""


class NoWayOut(Exception):
    """There is no connection: ``denied`` if there must be none, else the network's fault."""

    def __init__(self, reason: str, *, denied: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.denied = denied


class Outside:
    """Looks up names and connects, for all sandboxes."""

    def __init__(self) -> None:
        self._lookups = anyio.CapacityLimiter(LOOKUPS_AT_ONCE_MAX)
        self._trust: ssl.SSLContext | None = None

    async def connect(self, host: str, port: int, *, by_address: bool) -> socket.socket:
        """A connection to a host that the rules grant.

        A name is looked up once, and the connection goes to an address that was seen and judged: a name server that
        answers differently the next time is not asked a next time.

        Args:
            host: Canonical.
            port: TCP.
            by_address: A rule names this very address.

        Raises:
            NoWayOut: the name leads to where no sandbox may go, or nobody answers.
        """
        address = address_of(host)
        if address is not None:
            if not by_address:
                raise NoWayOut("no rule names this address", denied=True)
            return await self._connect_to([address], port)
        addresses = await self.look_up(host)
        own = await anyio.to_thread.run_sync(self.own_addresses)
        for found in addresses:
            reason = forbidden(found, own)
            if reason:
                raise NoWayOut(f"{host} leads to a place that no name may lead to: {reason}", denied=True)
        return await self._connect_to(addresses, port)

    async def secured(self, connected: socket.socket, host: str) -> TlsPeer:
        """The peer at the other end, spoken to over TLS, once it has proven to be ``host``.

        Raises:
            NoWayOut: it has not.
        """
        if self._trust is None:
            self._trust = await anyio.to_thread.run_sync(self.trust)
        try:
            return await TlsPeer.introduced(connected, host, self._trust)
        except ssl.SSLCertVerificationError as error:
            raise NoWayOut(f"{host} does not prove who it is: {error.verify_message}", denied=False) from None
        except TimeoutError:
            raise NoWayOut(f"{host} does not speak TLS, or not in time", denied=False) from None
        except OSError as error:
            raise NoWayOut(f"cannot speak TLS to {host}: {error.strerror or error}", denied=False) from None

    def trust(self) -> ssl.SSLContext:
        """Whom to believe: the authorities of this system, or of SSL_CERT_FILE."""
        made = ssl.create_default_context()
        made.options |= ssl.OP_NO_RENEGOTIATION
        return made

    async def look_up(self, host: str) -> Sequence[Address]:
        """The addresses of a name.

        Raises:
            NoWayOut: it has none, or the name server is silent.
        """
        try:
            with anyio.fail_after(LOOKUP_DEADLINE_S):
                found = await anyio.to_thread.run_sync(
                    functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM),
                    abandon_on_cancel=True,
                    limiter=self._lookups,
                )
        except (OSError, UnicodeError) as error:
            raise NoWayOut(f"cannot look up {host}: {error}", denied=False) from None
        except TimeoutError:
            raise NoWayOut(f"cannot look up {host}: the name server is silent", denied=False) from None
        return list(dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in found))

    def own_addresses(self) -> frozenset[Address]:
        """The addresses of this host."""
        return frozenset(
            address
            for entries in psutil.net_if_addrs().values()
            for entry in entries
            if (address := address_of(entry.address)) is not None
        )

    async def _connect_to(self, addresses: Sequence[Address], port: int) -> socket.socket:
        problem = "it has no address"
        for address in addresses[:ADDRESSES_TRIED_MAX]:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            try:
                return await connect(family, (str(address), port), deadline_s=CONNECT_DEADLINE_S)
            except TimeoutError:
                problem = f"{address} does not answer"
            except OSError as error:
                problem = f"{address}: {error.strerror}"
        raise NoWayOut(f"cannot connect: {problem}", denied=False)
