"""Between a verb and the daemon: connect, call, and turn what went wrong into words and an exit code."""

from __future__ import annotations

import os
import sys

from sandboxd.cli import wire
from sandboxd.cli.wire_table import EXIT_CODES
from sandboxd.client import Connection, NotRunning, RpcError
from sandboxd.paths import socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from sandboxd.client import Message

FAILURE = 1
USAGE = 2
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
"""As in JSON-RPC."""

INTERRUPTED = 130
"""128 and SIGINT."""

CANCEL_TIMEOUT_S = 30.0
"""How long an interrupted request may take to end in good order. A second Ctrl-C does not wait."""

AT_ONCE_MAX = 8
"""Requests under way in a verb that is given many sandboxes: the engines slow each other down beyond that."""

_CONTROLS_IN_JSON = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}
"""What JSON leaves as it is, and a terminal obeys."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came, and the request had its result all the same."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__()
        self.result = result


def connect() -> Connection:
    """A connection to the daemon, which is started if it does not run."""
    path = socket_path(os.environ)
    try:
        return Connection.connect(path)
    except NotRunning:
        from sandboxd.client import starting

        return starting.start(path, os.environ, on_slow=say_starting)


def say_starting() -> None:
    """Say to who watches what takes its time."""
    if sys.stderr.isatty():
        say("starting the daemon…")


def call(
    connection: Connection, method: str, on_notification: Callable[[Message], None] | None = None, /, **fields: object
) -> dict[str, Any]:
    """Call a method. Ctrl-C cancels it and waits until that is done, so that nothing is left half-made.

    Raises:
        Interrupted: It was cancelled too late.
    """
    request_id = connection.send(method, wire.build(method, **fields))
    try:
        return connection.wait(request_id, on_notification)
    except KeyboardInterrupt:
        connection.cancel(request_id)
        try:
            result = connection.wait(request_id, timeout_s=CANCEL_TIMEOUT_S)
        except RpcError:
            raise KeyboardInterrupt from None
        raise Interrupted(result) from None


def call_each(
    connection: Connection, method: str, requests: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any] | RpcError]:
    """Call a method for each set of fields, several at once; yield results and errors in the order asked."""
    under_way: list[int] = []
    for fields in requests:
        under_way.append(connection.send(method, wire.build(method, **fields)))
        if len(under_way) == AT_ONCE_MAX:
            yield _outcome(connection, under_way.pop(0))
    for request_id in under_way:
        yield _outcome(connection, request_id)


def _outcome(connection: Connection, request_id: int) -> dict[str, Any] | RpcError:
    try:
        return connection.wait(request_id)
    except RpcError as error:
        if not error.code:
            raise
        return error


def request(method: str, /, **fields: object) -> dict[str, Any]:
    """Connect, call, and close; once more where the daemon was restarted meanwhile, and nothing can be done twice."""
    try:
        with connect() as connection:
            return call(connection, method, None, **fields)
    except RpcError as error:
        from sandboxd.client import again

        if not again.worth_it(method, error):
            raise
    with connect() as connection:
        return call(connection, method, None, **fields)


def connect_after(error: RpcError) -> Connection:
    """A connection to the next daemon, for who followed something on the one before.

    Raises:
        RpcError: What went wrong before, where nobody comes, or the daemon is not what went away.
    """
    if error.type not in ("stopping", "disconnected"):
        raise error
    try:
        return Connection.connect(socket_path(os.environ))
    except NotRunning:
        raise error from None


def env_of(files: Iterable[Iterable[str]], flags: Iterable[str]) -> dict[str, str]:
    """The variables that were given; one without a value has the caller's, and is left out if there is none."""
    env: dict[str, str] = {}
    for text in (line for lines in (*files, flags) for line in lines):
        name, equals, value = text.partition("=")
        if equals:
            env[name] = value
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


def exit_code_of(error: RpcError) -> int:
    """The exit code that a failure of this type has."""
    return EXIT_CODES.get(error.type, FAILURE)


def complain(error: RpcError) -> None:
    """Say on stderr what happened, why, and what to type next. A wrong value gets a single line."""
    if error.type == "invalid_argument":
        say("; ".join(text for text in (str(error), error.hint) if text))
    else:
        say(str(error))
        if error.hint:
            sys.stderr.write(f"hint: {_harmless(error.hint)}\n")
    if error.code in (METHOD_NOT_FOUND, INVALID_PARAMS):
        from sandboxd.cli import versions

        versions.explain(error)


def say(text: str) -> None:
    """One line on stderr. It may hold names that a sandbox chose."""
    sys.stderr.write(f"sandboxctl: {_harmless(text)}\n")


def _harmless(text: str) -> str:
    if text.isprintable():
        return text
    from sandboxd.cli.tables import harmless

    return harmless(text)


def columns() -> int | None:
    """The width of the terminal that we write to, if it is one."""
    try:
        return os.get_terminal_size(1).columns or None
    except OSError:
        return None


def show(text: str) -> None:
    """Text on stdout, with a newline at its end."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def show_json_line(value: dict[str, Any]) -> None:
    """One of many, each on a line of its own."""
    import json

    show(json.dumps(value, ensure_ascii=False).translate(_CONTROLS_IN_JSON))


def show_json(reply: dict[str, Any] | list[dict[str, Any]]) -> None:
    """A reply as it came, or several as one array."""
    import json

    show(json.dumps(reply, indent=2, ensure_ascii=False).translate(_CONTROLS_IN_JSON))
