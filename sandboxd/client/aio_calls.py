"""One awaited call to the daemon: the twin of ``calls``."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from sandboxd.client.again import ATTEMPTS_MAX, worth_it
from sandboxd.client.calls import late, only, take_opened
from sandboxd.client.connection import Connection, NotRunning, RpcError, result_of
from sandboxd.client.errors import translated
from sandboxd.client.starting import start
from sandboxd.paths import socket_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sandboxd.client.connection import Message


async def connect() -> Connection:
    """A connection to the daemon, which is started if it does not run."""
    path = socket_path(os.environ)
    try:
        return Connection.connect(path)
    except NotRunning:
        return await anyio.to_thread.run_sync(start, path, os.environ)


async def call(
    method: str,
    params: dict[str, Any],
    timeout_s: float | None = None,
    descriptors: Sequence[int] = (),
    on_notification: Callable[[Message], None] | None = None,
) -> dict[str, Any]:
    """One request over a connection of its own; the daemon is started if it does not run.

    Sent again, to the next daemon, where this one went away and nothing can be done twice.

    Raises:
        SandboxException: What it answered, or that it did not.
    """
    with translated():
        for _ in range(ATTEMPTS_MAX - 1):
            try:
                return await _call_once(method, params, timeout_s, descriptors, on_notification)
            except RpcError as error:
                if not worth_it(method, error):
                    raise
        return await _call_once(method, params, timeout_s, descriptors, on_notification)


async def _call_once(
    method: str,
    params: dict[str, Any],
    timeout_s: float | None,
    descriptors: Sequence[int],
    on_notification: Callable[[Message], None] | None,
) -> dict[str, Any]:
    connection = await connect()
    with connection:
        return await call_on(connection, method, params, timeout_s, descriptors, on_notification)


async def call_on(
    connection: Connection,
    method: str,
    params: dict[str, Any],
    timeout_s: float | None = None,
    descriptors: Sequence[int] = (),
    on_notification: Callable[[Message], None] | None = None,
) -> dict[str, Any]:
    """One request, the only one that is under way.

    Raises:
        RpcError: The error reply, or ``timeout``, ``disconnected``, ``bad_reply``.
    """
    with anyio.move_on_after(timeout_s):
        request_id = connection.send(method, params, descriptors)
        while True:
            await anyio.wait_readable(connection.fileno())
            for message in connection.read():
                if "method" not in message.content:
                    connection.keep(message)
                elif on_notification is not None:
                    on_notification(message)
            reply = connection.take_reply(request_id)
            if reply is not None:
                return result_of(reply)
    raise late()


async def settled(answer: object) -> None:
    """Wait for what a callback returned, if it is a coroutine's."""
    if inspect.isawaitable(answer):
        await answer


async def open_file(params: Mapping[str, Any], timeout_s: float | None = None) -> int:
    """A descriptor to read a file of a sandbox from; the caller's to close.

    Raises:
        SandboxException: As ``call``.
    """
    opened: list[int] = []
    try:
        with translated():
            connection = await connect()
            with connection:

                def take(message: Message) -> None:
                    opened.extend(take_opened(connection, message))

                await call_on(connection, "files/read", {**params, "descriptor": True}, timeout_s, (), take)
            return only(opened)
    except BaseException:
        for number in opened:
            os.close(number)
        raise
