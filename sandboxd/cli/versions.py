"""A command and a daemon of different versions: what is said where one does not know what the other talks about."""

from __future__ import annotations

import os
import sys

from sandboxd import __version__
from sandboxd.cli.session import METHOD_NOT_FOUND, say
from sandboxd.cli.wire_table import PROTOCOL_VERSION
from sandboxd.client import Connection, RpcError
from sandboxd.paths import socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

INFO_TIMEOUT_S = 5.0

UNKNOWN_FIELD = "unknown field"
"""What the daemon says of a field that it does not know."""


def differ(info: dict[str, Any]) -> bool:
    """Whether a daemon is of another version than this command."""
    return (info["version"], info["protocol_version"]) != (__version__, PROTOCOL_VERSION)


def say_so(info: dict[str, Any]) -> None:
    """Say which two versions there are, and what makes them one."""
    say(
        f"the daemon is sandboxd {info['version']}, protocol {info['protocol_version']}; "
        f"this is sandboxctl {__version__}, protocol {PROTOCOL_VERSION}"
    )
    sys.stderr.write("hint: sandboxctl daemon restart\n")


def explain(error: RpcError) -> None:
    """Say so where a request was refused because the daemon is of another version; nothing where it is not."""
    if error.code != METHOD_NOT_FOUND and UNKNOWN_FIELD not in error.detail:
        return
    try:
        with Connection.connect(socket_path(os.environ)) as connection:
            info = connection.call("daemon/info", {}, timeout_s=INFO_TIMEOUT_S)
    except RpcError:
        return
    if differ(info):
        say_so(info)
