"""``secret``: values go in from a file, a pipe or a command, never from the command line, which others can read."""

from __future__ import annotations

import argparse
import base64
import sys
import time

from sandboxd.cli import tables, verb
from sandboxd.cli.session import USAGE, request, say, show, show_json
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _add_secret(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    setting = actions.add_parser("set", help="keep a secret, from a file, from stdin, or where it is to be had")
    setting.set_defaults(action=_set)
    setting.add_argument("name", metavar="NAME")
    source = setting.add_mutually_exclusive_group()
    source.add_argument("--file", metavar="FILE", help="default: stdin")
    source.add_argument(
        "--command",
        metavar="COMMAND",
        type=verb.not_empty,
        help="what prints it, run by the daemon each time it is given: --command 'pass show token'",
    )
    source.add_argument(
        "--credential", metavar="NAME", type=verb.not_empty, help="of those that systemd gives to the daemon's unit"
    )
    setting.add_argument(
        "--raw", action="store_true", help="to the last byte; else a line feed is left out that ends a single line"
    )
    setting.add_argument("--shell", action="store_true", help="COMMAND is a line for a shell")
    listing = actions.add_parser("list", help="the names of the secrets, and where they come from")
    listing.set_defaults(action=_list)
    removing = actions.add_parser("rm", help="forget a secret")
    removing.set_defaults(action=_remove)
    removing.add_argument("name", metavar="NAME")
    removing.add_argument("-f", "--force", action="store_true", help="even if sandboxes have it")
    giving = actions.add_parser("give", help="give secrets to a sandbox that runs, as files at /run/secrets")
    giving.set_defaults(action=_give)
    verb.add_sandbox(giving)
    giving.add_argument("names", metavar="NAME", nargs="+")
    taking = actions.add_parser("take", help="take secrets from a sandbox, running or stopped")
    taking.set_defaults(action=_take)
    verb.add_sandbox(taking)
    taking.add_argument("names", metavar="NAME", nargs="+")
    for action in (setting, listing, removing, giving, taking):
        verb.add_json(action)


def _secret(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _set(arguments: argparse.Namespace) -> int:
    if arguments.shell and arguments.command is None:
        say("--shell goes with --command")
        return USAGE
    if arguments.raw and (arguments.command is not None or arguments.credential is not None):
        say("--raw goes with a value from a file or from stdin")
        return USAGE
    if arguments.credential is not None:
        return _acknowledged(arguments, "secret/set", name=arguments.name, credential=arguments.credential)
    if arguments.command is not None:
        words = _words(arguments.command, shell=arguments.shell)
        if not words:
            say(f"cannot take {arguments.command!r} apart: quotes that do not end? for a shell's line: --shell")
            return USAGE
        return _acknowledged(arguments, "secret/set", name=arguments.name, command=words)
    if arguments.file is not None:
        try:
            with open(arguments.file, "rb") as file:
                value = file.read()
        except OSError as error:
            say(f"cannot read {arguments.file!r}: {error.strerror}")
            return USAGE
    elif sys.stdin.isatty():
        import getpass

        value = getpass.getpass(f"value of {arguments.name}: ").encode()
    else:
        value = sys.stdin.buffer.read()
    if not arguments.raw:
        value = _line(value)
    if not value:
        say("the value is empty")
        return USAGE
    return _acknowledged(arguments, "secret/set", name=arguments.name, value=base64.b64encode(value).decode())


def _line(value: bytes) -> bytes:
    """A single line of text without its line feed; what has several lines, such as a key, needs its last."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return value
    return value[:-1] if value.find(b"\n") == len(value) - 1 else value


def _words(command: str, *, shell: bool) -> list[str]:
    """Program and arguments; none: it cannot be taken apart."""
    if shell:
        return ["/bin/sh", "-c", command]
    import shlex

    try:
        return shlex.split(command)
    except ValueError:
        return []


def _list(arguments: argparse.Namespace) -> int:
    reply = request("secret/list")
    if arguments.json:
        show_json(reply)
        return 0
    now_ms = int(time.time() * 1000)
    rows = [
        (
            row["name"],
            tables.UNKNOWN if row["size_bytes"] is None else tables.size(row["size_bytes"]),
            tables.age(row["changed_at_ms"], now_ms),
            str(len(row["sandboxes"])),
            f"{row['source']} {row['origin']}".rstrip(),
        )
        for row in reply["secrets"]
    ]
    show(tables.table(("NAME", "SIZE", "CHANGED", "SANDBOXES", "SOURCE"), rows))
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    return _acknowledged(arguments, "secret/remove", name=arguments.name, force=arguments.force)


def _give(arguments: argparse.Namespace) -> int:
    return _acknowledged(arguments, "secret/give", sandbox=arguments.sandbox, secrets=arguments.names)


def _take(arguments: argparse.Namespace) -> int:
    return _acknowledged(arguments, "secret/take", sandbox=arguments.sandbox, secrets=arguments.names)


def _acknowledged(arguments: argparse.Namespace, method: str, **fields: object) -> int:
    reply = request(method, **fields)
    if arguments.json:
        show_json(reply)
    return 0


VERBS = {"secret": Verb("secrets for sandboxes: set, list, rm, give, take", _add_secret, _secret)}
