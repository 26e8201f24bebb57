"""What listens in a network namespace is read from the kernel, whatever it speaks."""

from __future__ import annotations

import os
import socket

import pytest

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
        found = listening_ports(os.getpid())
        assert Listening(listens.getsockname()[1], address, "tcp") in found
        assert Listening(takes.getsockname()[1], address, "udp") in found
        assert Listening(asks.getsockname()[1], address, "udp") not in found
        assert Listening(connected.getsockname()[1], address, "tcp") not in found
    assert found == sorted(found)
