"""What listens in a network namespace is read from the kernel, whatever it speaks."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from sandboxd.network import culprit
from sandboxd.network.culprit import Listening, listening_ports


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_listens_and_what_takes_datagrams_is_told_and_who_asks_is_not(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_STREAM) as listens,
        socket.socket(family, socket.SOCK_DGRAM) as takes,
        socket.socket(family, socket.SOCK_DGRAM) as asks,
        socket.socket(family, socket.SOCK_STREAM) as connected,
    ):
        listens.bind((address, 0))
        listens.listen()
        takes.bind((address, 0))
        asks.connect(takes.getsockname())
        connected.connect(listens.getsockname())
        found, _ = listening_ports(os.getpid())
        assert Listening(listens.getsockname()[1], address, "tcp") in found
        assert Listening(takes.getsockname()[1], address, "udp") in found
        assert Listening(asks.getsockname()[1], address, "udp") not in found
        assert Listening(connected.getsockname()[1], address, "tcp") not in found
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("bound", "value", "kind", "most"),
    [
        ("LISTED_MAX", 2, socket.SOCK_STREAM, 2),
        ("LISTED_MAX", 2, socket.SOCK_DGRAM, 2),
        ("LISTED_BYTES_MAX", 300, socket.SOCK_DGRAM, 4),  # a row of each table
    ],
)
def test_a_list_that_is_longer_than_may_be_is_cut_and_says_so(
    monkeypatch: pytest.MonkeyPatch, bound: str, value: int, kind: socket.SocketKind, most: int
) -> None:
    """What a sandbox opens, it opens at no cost of its own; the host reads it, and an answer has to fit a frame."""
    monkeypatch.setattr(culprit, bound, value)
    with contextlib.ExitStack() as opened:
        for _ in range(3):
            one = opened.enter_context(socket.socket(socket.AF_INET, kind))
            one.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                one.listen()
        found, truncated = listening_ports(os.getpid())
    assert truncated
    assert len(found) <= most
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("name", "states", "cut", "truncated"),
    [
        ("tcp", ["0A", "0A"], False, False),
        ("tcp", ["0A", "0A"], True, True),
        ("tcp6", ["0A", "06"], True, False),
        ("udp", ["07", "01"], False, False),
        ("udp6", ["07", "01"], True, True),
    ],
)
def test_connections_that_are_not_read_are_nothing_that_a_list_lacks(
    monkeypatch: pytest.MonkeyPatch, name: str, states: list[str], cut: bool, truncated: bool
) -> None:
    """A server under load has thousands, and what listens is told first by the kernel; not so of UDP."""
    rows = [["0:", f"0100007F:{port:04X}", "", state] for port, state in enumerate(states, 80)]
    monkeypatch.setattr(culprit, "_rows_of", lambda _, table: (rows, cut) if table == name else ([], False))
    found = listening_ports(os.getpid())
    assert len(found.sockets) == sum(state in {"0A", "07"} for state in states)
    assert found.truncated is truncated
