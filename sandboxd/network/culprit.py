"""Which process has one end of a connection inside a sandbox: read from /proc on the host, as far as that may be.

The owner of a socket is found by its inode, which is in a table of the network namespace, and in the process's list
of descriptors. A rootless engine's processes have other users, but in a namespace that is ours, and so may be looked
into. Those of an engine that is root, for a daemon that is not, may not: then nobody knows.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterable
from typing import Literal, NamedTuple

TABLE_BYTES_MAX = 4 * 1024 * 1024
LISTED_BYTES_MAX = 256 * 1024
"""Of a table that is shown, some 1 500 rows. The kernel counts UDP sockets from the first again for each page of
theirs, so that tens of thousands in a sandbox would cost the host many seconds."""

LISTED_MAX = 1024
PROCESSES_MAX = 512
DESCRIPTORS_MAX = 1024
PROGRAM_CHARS_MAX = 64
ANCESTORS_MAX = 64

_STATE_LISTENING = {"tcp": "0A", "udp": "07"}
"""``TCP_LISTEN``; and ``TCP_CLOSE``, which is what the kernel writes for a UDP socket without a peer."""


def process_with_port(init_pid: int, port: int, pids: Iterable[int]) -> int | None:
    """The process among ``pids`` that has a connection from this port of the loopback, in the namespace of init."""
    inode = _inode_of(init_pid, port)
    if inode is None:
        return None
    for pid in list(pids)[:PROCESSES_MAX]:
        if _has(pid, f"socket:[{inode}]"):
            return pid
    return None


def _inode_of(init_pid: int, port: int) -> str | None:
    wanted = f":{port:04X}"
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{init_pid}/net/{name}", encoding="ascii") as table:
            for line in table.read(TABLE_BYTES_MAX).splitlines()[1:]:
                fields = line.split()
                if len(fields) > 9 and fields[1].endswith(wanted) and fields[3] != "0A" and fields[9] != "0":
                    return fields[9]
    return None


def _has(pid: int, link: str) -> bool:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd")[:DESCRIPTORS_MAX]:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == link:
                    return True
    return False


def program_of(pid: int) -> str:
    """Its name, fit to be printed."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            raw = file.read(PROGRAM_CHARS_MAX)
    except OSError:
        return "?"
    text = raw.decode(errors="replace").strip()
    return "".join(character if character.isprintable() else "?" for character in text)


def pids_inside(pid: int) -> list[int]:
    """The numbers that a process and its ancestors have inside of its namespace, from itself upwards."""
    found: list[int] = []
    while len(found) < ANCESTORS_MAX and (facts := _status(pid)) is not None:
        inside, pid = facts
        found.append(inside)
        if inside <= 1:
            break
    return found


def _status(pid: int) -> tuple[int, int] | None:
    """Number inside, and the parent's number outside."""
    inside = parent = None
    with (
        contextlib.suppress(OSError, ValueError),
        open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file,
    ):
        for line in file:
            name, _, value = line.partition(":")
            if name == "PPid":
                parent = int(value)
            elif name == "NSpid":
                inside = int(value.split()[-1])
    return None if inside is None or parent is None else (inside, parent)


class Listening(NamedTuple):
    """A socket that takes what comes to a port."""

    port: int
    address: str
    protocol: Literal["tcp", "udp"]


class Listed(NamedTuple):
    """What was found, by port; ``truncated``: there is more."""

    sockets: list[Listening]
    truncated: bool


def listening_ports(init_pid: int) -> Listed:
    """What listens in the network namespace of init, as far as a list of it is bounded.

    A UDP socket does not listen; it is told of where it has a port and no peer, so that anybody may send to it.

    Raises:
        OSError: it cannot be read.
    """
    found: dict[Listening, None] = {}
    truncated = False
    for protocol in ("tcp", "udp"):
        for name in (protocol, f"{protocol}6"):
            rows, cut = _rows_of(init_pid, name)
            taking = [row for row in rows if row[3] == _STATE_LISTENING[protocol]]
            for row in taking:
                address, port = _address_in(row[1])
                found[Listening(port, address, protocol)] = None
            # TCP sockets that listen come before those that are connected.
            truncated |= cut and (protocol == "udp" or rows[-1:] == taking[-1:])
    sockets = list(found)
    return Listed(sorted(sockets[:LISTED_MAX]), truncated or len(sockets) > LISTED_MAX)


def _rows_of(init_pid: int, name: str) -> tuple[list[list[str]], bool]:
    """The fields of the first rows of a table, and whether there are more."""
    try:
        with open(f"/proc/{init_pid}/net/{name}", encoding="ascii") as table:
            lines = table.read(LISTED_BYTES_MAX).splitlines()
            cut = bool(table.read(1))
    except FileNotFoundError:
        return [], False
    return [fields for line in lines[1:] if len(fields := line.split()) > 9], cut


def _address_in(text: str) -> tuple[str, int]:
    raw, _, port = text.partition(":")
    words = [bytes.fromhex(raw[at : at + 8])[::-1] for at in range(0, len(raw), 8)]
    return str(ipaddress.ip_address(b"".join(words))), int(port, 16)
