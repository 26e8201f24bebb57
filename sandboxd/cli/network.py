"""``network``: what a sandbox may reach, what it did with that, and what it was refused."""

from __future__ import annotations

import argparse
import time

from sandboxd.cli import render_network, verb
from sandboxd.cli.session import request, show, show_json
from sandboxd.cli.verb import Verb

RULE_HELP = "let it reach [METHOD ]HOST[:PORT], *.HOST, or a preset: pypi npm debian ubuntu github crates go"


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``create``, ``run`` and ``network`` have in common."""
    parser.add_argument("--allow", action="append", default=[], metavar="RULE", type=verb.not_empty, help=RULE_HELP)
    parser.add_argument(
        "--deny", action="append", default=[], metavar="RULE", type=verb.not_empty, help="whatever allows it"
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
        help="none: loopback only; allow: a proxy that obeys the rules; full: the engine's own, from its making",
    )
    add_network_arguments(parser)
    parser.add_argument("--reset", action="store_true", help="forget the rules that it had")
    parser.add_argument("--no-services", action="store_true", help="take all services away")
    verb.add_sandbox(parser)
    verb.add_json(parser)


def _network(arguments: argparse.Namespace) -> int:
    services = [] if arguments.no_services else arguments.services
    changes = bool(arguments.mode or arguments.allow or arguments.deny or arguments.reset or services is not None)
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
            services=services,
        )
    else:
        reply = request("network/get", sandbox=arguments.sandbox)
    if arguments.json:
        show_json(reply)
    else:
        show(render_network.network(reply, int(time.time() * 1000)))
    return 0


VERBS = {"network": Verb("show or change what a sandbox may reach", _add_network, _network)}
