"""A name server on the loopback that changes its mind, and what the way out makes of it; run by test_rebinding.

In a network of its own, so that port 53 is there to be had and nothing leads anywhere, and with a resolv.conf of its
own, so that it is the system's resolver that asks. Prints JSON: what each connection came to, and what was asked.
"""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import sys
import threading
from collections.abc import Sequence

import anyio

from sandboxd.egress_rules import Address
from sandboxd.network.outside import NoWayOut, Outside

SET_FLAGS, UP = 0x8914, 1
TYPE_A = 1
HEAD = struct.Struct("!6H")
RESPONSE, FOUND = 0x8180, 0xC00C


class Noted(Outside):
    """Goes nowhere, and says where it would have gone."""

    async def _connect_to(self, addresses: Sequence[Address], port: int) -> socket.socket:
        raise NoWayOut(f"connecting to {' '.join(map(str, addresses))}", denied=False)


def answer(server: socket.socket, addresses: list[str], asked: list[str]) -> None:
    """To each question for an IPv4 address the next one; to all others, that there is none."""
    while True:
        query, client = server.recvfrom(512)
        number, *_ = HEAD.unpack_from(query)
        end = query.index(b"\0", HEAD.size) + 5
        question = query[HEAD.size : end]
        (kind,) = struct.unpack_from("!H", question, len(question) - 4)
        reply = HEAD.pack(number, RESPONSE, 1, int(kind == TYPE_A), 0, 0) + question
        if kind == TYPE_A:
            address = addresses[min(len(asked), len(addresses) - 1)]
            asked.append(address)
            reply += struct.pack("!HHHIH", FOUND, TYPE_A, 1, 0, 4) + socket.inet_aton(address)
        server.sendto(reply, client)


async def attempts(count: int) -> list[list[object]]:
    came_to: list[list[object]] = []
    for _ in range(count):
        try:
            await Noted().connect("rebind.example", 80, by_address=False)
        except NoWayOut as error:
            came_to.append([error.denied, error.reason])
    return came_to


def main(*addresses: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sH14x", b"lo", UP))
    asked: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        threading.Thread(target=answer, args=(server, list(addresses), asked), daemon=True).start()
        came_to = anyio.run(attempts, len(addresses))
    print(json.dumps({"came_to": came_to, "asked": asked}))


if __name__ == "__main__":
    main(*sys.argv[1:])
