"""``secret``: values go in from a file or a pipe, never from the command line, which others can read."""

from __future__ import annotations

import argparse
import base64
import sys
import time

from sandboxd.cli import render, verb
from sandboxd.cli.session import USAGE, request, say, show, show_json
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _add_secret(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    setting = actions.add_parser("set", help="keep a secret, from a file or from stdin")
    setting.set_defaults(action=_set)
    setting.add_argument("name", metavar="NAME")
    setting.add_argument("--file", metavar="FILE", help="default: stdin")
    listing = actions.add_parser("list", help="the names of the secrets")
    listing.set_defaults(action=_list)
    removing = actions.add_parser("rm", help="forget a secret")
    removing.set_defaults(action=_remove)
    removing.add_argument("name", metavar="NAME")
    giving = actions.add_parser("give", help="give secrets to a sandbox that runs, as files at /run/secrets")
    giving.set_defaults(action=_give)
    verb.add_sandbox(giving)
    giving.add_argument("names", metavar="NAME", nargs="+")
    for action in (setting, listing, removing, giving):
        verb.add_json(action)


def _secret(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _set(arguments: argparse.Namespace) -> int:
    if arguments.file is not None:
        with open(arguments.file, "rb") as file:
            value = file.read()
    elif sys.stdin.isatty():
        import getpass

        value = getpass.getpass(f"value of {arguments.name}: ").encode()
    else:
        value = sys.stdin.buffer.read()
    if not value:
        say("the value is empty")
        return USAGE
    return _acknowledged(arguments, "secret/set", name=arguments.name, value=base64.b64encode(value).decode())


def _list(arguments: argparse.Namespace) -> int:
    reply = request("secret/list")
    if arguments.json:
        show_json(reply)
        return 0
    now_ms = int(time.time() * 1000)
    rows = [
        (
            row["name"],
            render.size(row["size_bytes"]),
            render.age(row["changed_at_ms"], now_ms),
            str(len(row["sandboxes"])),
        )
        for row in reply["secrets"]
    ]
    show(render.table(("NAME", "SIZE", "CHANGED", "SANDBOXES"), rows))
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    return _acknowledged(arguments, "secret/remove", name=arguments.name)


def _give(arguments: argparse.Namespace) -> int:
    return _acknowledged(arguments, "secret/give", sandbox=arguments.sandbox, secrets=arguments.names)


def _acknowledged(arguments: argparse.Namespace, method: str, **fields: object) -> int:
    reply = request(method, **fields)
    if arguments.json:
        show_json(reply)
    return 0


VERBS = {"secret": Verb("secrets for sandboxes: set, list, rm, give", _add_secret, _secret)}
