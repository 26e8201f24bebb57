"""The door: accept, check who it is, and serve each connection in a task of its own."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable

import anyio

from sandboxd.connection import Connection, Dispatch, Limits, refused
from sandboxd.failures import CapacityExceeded, Failure, Unauthorized
from sandboxd.peers import Peer, peer_of

logger = logging.getLogger(__name__)

ACCEPT_RETRY_S = 0.2
"""Pause after an accept that failed, most likely for want of descriptors: a listening socket would stay readable."""


async def serve(
    listener: socket.socket,
    dispatch: Dispatch,
    *,
    limits: Limits | None = None,
    accepting: anyio.CancelScope | None = None,
    on_refused: Callable[[Peer, Failure], None] | None = None,
) -> None:
    """Serve connections of our own user on a listening Unix stream socket, until cancelled.

    Cancelling ends every connection and its handlers; shielded ones are waited for. The listener stays open.

    Args:
        listener: Where they come from.
        dispatch: Who carries out requests.
        limits: What each may take.
        accepting: Cancelled when nobody else is to be let in: who connects from then on waits in the listener's
            queue, for whoever takes it over. Connections that are there are served as before.
        on_refused: Told who was turned away, and why.
    """
    limits = limits or Limits()
    listener.setblocking(False)
    connections: set[Connection] = set()
    async with anyio.create_task_group() as tasks:
        with accepting or anyio.CancelScope():
            while True:
                peer_socket = await _accept(listener)
                peer = peer_of(peer_socket)
                refusal = _refusal(peer, len(connections), limits)
                if refusal is not None:
                    _refuse(peer_socket, peer, refusal)
                    if on_refused is not None:
                        on_refused(peer, refusal)
                    continue
                connection = Connection(peer_socket, peer, dispatch, limits)
                connections.add(connection)
                tasks.start_soon(_run_connection, connection, connections)
        await anyio.sleep_forever()


async def _accept(listener: socket.socket) -> socket.socket:
    while True:
        await anyio.wait_readable(listener)
        try:
            peer_socket, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as error:
            logger.warning("cannot accept a connection: %s", error)
            await anyio.sleep(ACCEPT_RETRY_S)
            continue
        peer_socket.setblocking(False)
        return peer_socket


def _refusal(peer: Peer, connections: int, limits: Limits) -> Failure | None:
    if peer.uid != os.geteuid():
        return Unauthorized(
            "cannot serve another user",
            detail=f"you are uid {peer.uid}, this daemon is uid {os.geteuid()}'s",
            hint="start your own: sandboxctl daemon start",
        )
    if connections >= limits.connections_max:
        return CapacityExceeded(
            "cannot serve another connection", detail=f"{limits.connections_max} are open, which is the most"
        )
    return None


def _refuse(peer_socket: socket.socket, peer: Peer, refusal: Failure) -> None:
    logger.warning("refused pid %d of uid %d: %s", peer.pid, peer.uid, refusal)
    with peer_socket:
        try:
            peer_socket.send(refused(refusal))
        except OSError:
            logger.debug("the refused peer was gone already")


async def _run_connection(connection: Connection, connections: set[Connection]) -> None:
    try:
        await connection.run()
    except Exception:
        logger.exception("a connection ended by an unexpected error")
    finally:
        connections.discard(connection)
