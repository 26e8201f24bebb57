"""``service``: what sandboxes may share, such as ChromaDB, and without a name the daemon's own units."""

from __future__ import annotations

import argparse
import os
import sys
import time

from sandboxd.cli import daemon, render_network, verb
from sandboxd.cli.session import FAILURE, columns, request, say, show, show_json
from sandboxd.cli.tables import harmless
from sandboxd.cli.verb import Parser, Verb
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def _add_service(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    for name, action, text in (
        ("list", _list, "list the services"),
        ("status", _status, "how a service is; without a name, how the daemon's own is. Fails unless it is ready"),
        ("logs", _logs, "what a service printed; without a name, what the daemon logged"),
        ("restart", _restart, "end a service and start it anew"),
        ("backup", _backup, "copy a service's data into a new file, as it is at one moment"),
        ("restore", _restore, "put such a copy back; the data that is there now is kept beside it"),
        ("install", daemon.install_units, "have your systemd start the daemon on demand: daemon install"),
        ("uninstall", daemon.uninstall_units, "take those units away: daemon uninstall"),
    ):
        parsed = actions.add_parser(name, help=text, description=text)
        parsed.set_defaults(action=action)
        if name in ("status", "logs"):
            parsed.add_argument("service", metavar="SERVICE", nargs="?", help="such as chroma; none: the daemon")
        elif name in ("restart", "backup", "restore"):
            parsed.add_argument("service", metavar="SERVICE", help="such as chroma")
        if name == "logs":
            daemon.add_log_flags(parsed)
        if name in ("backup", "restore"):
            parsed.add_argument("file", metavar="FILE")
        verb.add_json(parsed)


def _service(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _show(arguments: argparse.Namespace, reply: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if arguments.json:
        show_json(reply)
    else:
        show(render_network.services(rows, int(time.time() * 1000), columns()))


def _list(arguments: argparse.Namespace) -> int:
    reply = request("service/list")
    _show(arguments, reply, reply["services"])
    return 0


def _status(arguments: argparse.Namespace) -> int:
    if arguments.service is None:
        return daemon.unit_status(arguments)
    services = request("service/list")["services"]
    rows = [row for row in services if row["name"] == arguments.service]
    if not rows:
        from sandboxd import spelling

        names = [row["name"] for row in services]
        hint = spelling.hint(arguments.service, names, "sandboxctl service list")
        raise RpcError(0, "not_found", f"cannot find a service {arguments.service!r}", "", hint)
    _show(arguments, rows[0], rows)
    if rows[0]["hint"]:
        sys.stderr.write(f"hint: {rows[0]['hint']}\n")
    return 0 if rows[0]["state"] == "ready" else FAILURE


def _logs(arguments: argparse.Namespace) -> int:
    if arguments.service is None:
        return daemon.logs(arguments)
    reply = request("service/logs", service=arguments.service)
    if arguments.json:
        show_json(reply)
    else:
        sys.stdout.write(harmless(reply["text"]) if sys.stdout.isatty() else reply["text"])
    return 0


def _restart(arguments: argparse.Namespace) -> int:
    reply = request("service/restart", service=arguments.service)
    _show(arguments, reply, [reply])
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    reply = request("service/backup", service=arguments.service, path=os.path.abspath(arguments.file))
    if arguments.json:
        show_json(reply)
    else:
        show(reply["path"])
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    reply = request("service/restore", service=arguments.service, path=os.path.abspath(arguments.file))
    if arguments.json:
        show_json(reply)
    elif reply["former_data_dir"]:
        say(f"what was there before is in {reply['former_data_dir']}")
    return 0


VERBS = {
    "service": Verb(
        "what sandboxes may share: list, status, logs, restart, backup, restore; and the daemon's own units",
        _add_service,
        _service,
    )
}
