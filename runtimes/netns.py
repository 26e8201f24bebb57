"""What the network of a container is, read from the kernel: its interfaces, and whether a route leads out.

A file of ``/proc/PID/net`` shows the network namespace of that process, and needs no right to enter it.
"""

from __future__ import annotations

import msgspec

LOOPBACK = "lo"
TABLE_BYTES_MAX = 256 * 1024
_RECEIVED_FIELD, _SENT_FIELD = 0, 8
_ROUTE_UP = 1
_IPV6_ANY = "0" * 32


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """One network interface, with what went through it since it was made."""

    name: str
    received_bytes: int
    sent_bytes: int


class NetworkView(msgspec.Struct, frozen=True, kw_only=True):
    """The network of one container."""

    interfaces: tuple[Interface, ...]
    """All but the loopback."""
    routed: bool
    """Some default route leads out through one of them."""

    @property
    def closed(self) -> bool:
        """There is nothing that could be one."""
        return not self.interfaces and not self.routed


def look(pid: int) -> NetworkView:
    """The network of the namespace of this process.

    Raises:
        OSError: it is gone, or may not be looked at.
    """
    interfaces = _interfaces(_table(pid, "dev"))
    routed = _routed(_table(pid, "route")) or _routed_ipv6(_optional_table(pid, "ipv6_route"))
    return NetworkView(interfaces=interfaces, routed=routed)


def _interfaces(text: str) -> tuple[Interface, ...]:
    found = []
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        counters = rest.split()
        if name.strip() != LOOPBACK and len(counters) > _SENT_FIELD:
            found.append(
                Interface(
                    name=name.strip(),
                    received_bytes=int(counters[_RECEIVED_FIELD]),
                    sent_bytes=int(counters[_SENT_FIELD]),
                )
            )
    return tuple(found)


def _routed(text: str) -> bool:
    for line in text.splitlines()[1:]:
        fields = line.split()
        # Destination and mask of a default route are zero.
        if len(fields) > 7 and fields[1] == fields[7] == "00000000" and int(fields[3], 16) & _ROUTE_UP:
            return True
    return False


def _routed_ipv6(text: str) -> bool:
    for line in text.splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[0] == _IPV6_ANY and fields[1] == "00" and fields[9] != LOOPBACK:
            return True
    return False


def _optional_table(pid: int, name: str) -> str:
    try:
        return _table(pid, name)
    except FileNotFoundError:
        return ""  # a kernel without IPv6


def _table(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/net/{name}", encoding="ascii", errors="replace") as file:
        return file.read(TABLE_BYTES_MAX)
