"""Commands whose output the daemon keeps: naming one, and showing what it wrote from some byte on."""

from __future__ import annotations

import binascii
import os

from sandboxd.cli.session import call, say
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from sandboxd.client import Connection

COMMAND_ID_CHARACTERS = 12
PLACES = {"stdout": 1, "stderr": 2}


def find(connection: Connection, sandbox: str, beginning: str) -> dict[str, str]:
    """The params that name a command, from an unambiguous beginning of its id.

    Raises:
        RpcError: There is none, or more than one.
    """
    command_id = beginning
    if len(beginning) != COMMAND_ID_CHARACTERS:
        rows = call(connection, "commands/list", sandbox=sandbox)["commands"]
        ids = [row["command_id"] for row in rows if row["command_id"].startswith(beginning)]
        hint = f"sandboxctl ps {sandbox}"
        if not ids:
            raise RpcError(0, "not_found", f"cannot find command {beginning!r}", "none begins so", hint)
        if len(ids) > 1:
            raise RpcError(0, "invalid_argument", f"cannot tell which command {beginning!r} is", ", ".join(ids), hint)
        [command_id] = ids
    return {"sandbox": sandbox, "command_id": command_id}


def look(connection: Connection, command: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The last byte of each stream that a command has, as ``commands/logs`` tells it.

    A terminal, and merged output, have no ``stderr``.
    """
    streams = {"stdout": call(connection, "commands/logs", None, **command, stream="stdout", length=1)}
    try:
        streams["stderr"] = call(connection, "commands/logs", None, **command, stream="stderr", length=1)
    except RpcError as error:
        if error.type != "not_found":
            raise
    return streams


class Output:
    """Shows the output of a command as it comes, each stream in its place.

    Args:
        positions: The byte at which each stream begins that is wanted.
        on_dropped: Told of bytes that were not kept: how many, and of which stream.
    """

    def __init__(self, positions: Mapping[str, int], on_dropped: Callable[[int, str], object]) -> None:
        self.positions = dict(positions)
        """The byte at which each goes on."""
        self._on_dropped = on_dropped

    def take(self, told: dict[str, Any], end: int | None = None) -> None:
        """Show what a ``commands/output`` brings, up to ``end``.

        Raises:
            OSError: Nobody is there to see it.
        """
        stream = told["stream"]
        if stream not in self.positions:
            return
        if told["dropped_bytes"]:
            self._on_dropped(told["dropped_bytes"], stream)
        data = binascii.a2b_base64(told["data"])
        self.positions[stream] = told["offset"] + len(data)
        if end is not None:
            data = data[: max(end - told["offset"], 0)]
        while data:
            data = data[os.write(PLACES[stream], data) :]

    def reached(self, ends: Mapping[str, int]) -> bool:
        """Whether everything before these bytes was shown."""
        return all(self.positions[stream] >= end for stream, end in ends.items())

    def finish(self, end: dict[str, Any]) -> None:
        """Take the end of the command: what was written and did not come was not kept."""
        for stream, position in self.positions.items():
            missing = (end[f"{stream}_bytes"] or 0) - position
            if missing > 0:
                self._on_dropped(missing, stream)


def say_dropped(count: int, stream: str) -> None:
    """Say that something is missing here."""
    say(f"{count} bytes of {stream} were not kept")
