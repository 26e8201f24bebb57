"""``network forward ports``: what a sandbox may reach and was refused, and what leads into it."""

from __future__ import annotations

import argparse
import os
import time

from sandboxd.cli import render_network, verb
from sandboxd.cli.session import USAGE, columns, request, say, show, show_json
from sandboxd.cli.verb import Verb
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PORT_MAX = 65_535
PORT_DIGITS_MAX = len(str(PORT_MAX))

RULE_HELP = "let it reach [METHOD ]HOST[:PORT], *.HOST, or a preset: pypi npm debian ubuntu github crates go"


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``create``, ``run`` and ``network`` have in common."""
    parser.add_argument("--allow", action="append", default=[], metavar="RULE", type=verb.not_empty, help=RULE_HELP)
    parser.add_argument(
        "--deny", action="append", default=[], metavar="RULE", type=verb.not_empty, help="whatever allows it"
    )
    parser.add_argument(
        "--inject",
        action="append",
        default=[],
        metavar="RULE",
        type=verb.not_empty,
        help="what its proxy adds to requests: 'HOST[:PORT] HEADER: VALUE', with secrets as {NAME}",
    )
    parser.add_argument(
        "--service",
        dest="services",
        action="append",
        metavar="NAME[=SCOPE]",
        type=verb.not_empty,
        help="what it finds on its loopback, such as chroma, chroma=shared-ro or chroma=private",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("none", "allow", "full"),
        help="none: loopback only; allow: a proxy that obeys the rules; full: the engine's own",
    )
    add_network_arguments(parser)
    parser.add_argument("--reset", action="store_true", help="forget the rules that it had")
    parser.add_argument("--no-services", action="store_true", help="take all services away")
    verb.add_sandbox(parser)
    verb.add_json(parser)


def _network(arguments: argparse.Namespace) -> int:
    services = [] if arguments.no_services else arguments.services
    rules = bool(arguments.allow or arguments.deny or arguments.inject or arguments.reset)
    changes = rules or arguments.mode is not None or services is not None
    if changes:
        kept: list[str] | None = [] if arguments.reset else None
        reply = request(
            "network/set",
            sandbox=arguments.sandbox,
            mode=arguments.mode,
            allow=kept,
            deny=kept,
            add_allow=arguments.allow,
            add_deny=arguments.deny,
            inject=kept,
            add_inject=arguments.inject,
            services=services,
        )
    else:
        reply = request("network/get", sandbox=arguments.sandbox)
    if arguments.json:
        show_json(reply)
    else:
        show(render_network.network(reply, int(time.time() * 1000), columns()))
    return 0


def _add_forward(parser: argparse.ArgumentParser) -> None:
    verb.add_sandbox(parser)
    parser.add_argument(
        "place",
        metavar="[[ADDRESS:]HOST_PORT:]PORT | PATH:PORT",
        nargs="?",
        help="from a port, or a Unix socket, of the host to a port inside; on 127.0.0.1, on a free port",
    )
    parser.add_argument("--close", metavar="ID | HOST_PORT", help="close a forward, by its id or where it begins")
    verb.add_json(parser)


def _forward(arguments: argparse.Namespace) -> int:
    if (arguments.place is None) == (arguments.close is None):
        say("forward what? give a port, or --close HOST_PORT")
        return USAGE
    if arguments.close is not None:
        forward_id = _forward_at(arguments.sandbox, arguments.close)
        reply = request("ports/close", sandbox=arguments.sandbox, forward_id=forward_id)
        if arguments.json:
            show_json(reply)
        return 0
    place = _place(arguments.place)
    if place is None:
        say(f"{arguments.place!r} is neither [[ADDRESS:]HOST_PORT:]PORT nor PATH:PORT; ports go from 1 to {PORT_MAX}")
        return USAGE
    reply = request("ports/forward", sandbox=arguments.sandbox, **place)
    if arguments.json:
        show_json(reply)
    else:
        show(render_network.place(reply))
    return 0


def _forward_at(sandbox: str, text: str) -> str:
    """The id of the forward that begins at this port of the host; whatever is no port is an id.

    Raises:
        RpcError: None begins there, or more than one.
    """
    if not _is_port(text):
        return text
    forwards = request("ports/list", sandbox=sandbox)["forwards"]
    found = [forward["forward_id"] for forward in forwards if forward["host_port"] == int(text)]
    if len(found) == 1:
        return str(found[0])
    hint = f"sandboxctl ports {sandbox}"
    if found:
        brief = f"cannot tell which forward is meant: {' and '.join(found)} begin at port {text}"
        raise RpcError(0, "invalid_argument", brief, hint=hint)
    raise RpcError(0, "not_found", f"cannot find a forward of sandbox {sandbox!r} from port {text}", hint=hint)


def _place(text: str) -> dict[str, Any] | None:
    """The fields of a request; None: it is none."""
    before, _, port = text.rpartition(":")
    if not _is_port(port) or int(port) == 0:
        return None
    if "/" in before:
        return {"port": int(port), "path": os.path.abspath(before)}
    address, _, host_port = before.rpartition(":")
    if host_port and not _is_port(host_port):
        return None
    fields: dict[str, Any] = {"port": int(port), "host_port": int(host_port or 0)}
    return {**fields, "address": address.strip("[]")} if address else fields


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= PORT_DIGITS_MAX and int(text) <= PORT_MAX


def _add_ports(parser: argparse.ArgumentParser) -> None:
    verb.add_sandbox(parser)
    verb.add_json(parser)


def _ports(arguments: argparse.Namespace) -> int:
    reply = request("ports/list", sandbox=arguments.sandbox)
    if arguments.json:
        show_json(reply)
    else:
        show(render_network.ports(reply, columns()))
    if reply.get("truncated"):
        say("more listens than this: only a part is shown")
    return 0


VERBS = {
    "network": Verb("show or change what a sandbox may reach", _add_network, _network),
    "forward": Verb("lead a port or a Unix socket of the host into a sandbox", _add_forward, _forward),
    "ports": Verb("what listens in a sandbox, and what leads into it", _add_ports, _ports),
}
