"""One blocking call to the daemon, and what a call may bring besides its result."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from sandboxd.client.again import ATTEMPTS_MAX, worth_it
from sandboxd.client.connection import RpcError
from sandboxd.client.errors import translated
from sandboxd.client.starting import connect_or_start

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sandboxd.client.connection import Connection, Message


def call(
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
                return _call_once(method, params, timeout_s, descriptors, on_notification)
            except RpcError as error:
                if not worth_it(method, error):
                    raise
        return _call_once(method, params, timeout_s, descriptors, on_notification)


def _call_once(
    method: str,
    params: dict[str, Any],
    timeout_s: float | None,
    descriptors: Sequence[int],
    on_notification: Callable[[Message], None] | None,
) -> dict[str, Any]:
    with connect_or_start(os.environ) as connection:
        return connection.call(method, params, descriptors, on_notification, timeout_s)


def late() -> RpcError:
    """A request took longer than its caller wanted to wait."""
    return RpcError(0, "timeout", "the daemon did not answer in time", hint="give request_timeout")


def open_file(connection: Connection, params: Mapping[str, Any], timeout_s: float | None = None) -> int:
    """A descriptor to read a file of a sandbox from; the caller's to close.

    Raises:
        RpcError: As ``Connection.call``.
    """
    opened: list[int] = []

    def take(message: Message) -> None:
        opened.extend(take_opened(connection, message))

    try:
        connection.call("files/read", {**params, "descriptor": True}, (), take, timeout_s)
        return only(opened)
    except BaseException:
        for number in opened:
            os.close(number)
        raise


def take_opened(connection: Connection, message: Message) -> Sequence[int]:
    """What a ``files/opened`` carries; nothing if the message is none."""
    return connection.take_descriptors(message, 1) if message.content["method"] == "files/opened" else ()


def only(opened: Sequence[int]) -> int:
    """The one descriptor that ``files/read`` is answered with.

    Raises:
        RpcError: There is none.
    """
    if len(opened) != 1:
        raise RpcError(0, "bad_reply", "cannot understand the daemon", "it opened a file and did not hand it out")
    return opened[0]
