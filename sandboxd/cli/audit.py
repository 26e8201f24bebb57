"""``audit``: who asked the daemon for what, and whether the log of that is as it was written."""

from __future__ import annotations

import argparse
import time

from sandboxd.cli import render_audit, verb
from sandboxd.cli.session import FAILURE, columns, request, show, show_json
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

_EXAMPLES = """\
sandboxctl audit query --since 2h --result failed
sandboxctl audit query --method commands --sandbox box --limit 20
sandboxctl audit verify

What is written down, and what is not: docs/AUDIT.md
"""


def _add_audit(parser: argparse.ArgumentParser) -> None:
    verb.add_text(parser, _EXAMPLES)
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    querying = actions.add_parser("query", help="show requests, and what came of them")
    querying.set_defaults(action=_query)
    querying.add_argument(
        "--since", type=_moment, metavar="TIME", help="not before: 2h or 3d ago, or such as 2026-01-31T12:00"
    )
    querying.add_argument("--until", type=_moment, metavar="TIME", help="not after")
    verb.complete_names(
        querying.add_argument("--sandbox", metavar="SANDBOX", help="id or name, of one that is gone as well")
    )
    querying.add_argument("--method", metavar="NAME", help="such as sandbox/create, or commands for all of them")
    querying.add_argument("--uid", type=int, metavar="NUMBER", help="only those of this user")
    querying.add_argument("--result", metavar="WORD", help="ok, failed, or the type of an error such as not_found")
    querying.add_argument("--limit", type=int, metavar="NUMBER", help="how many at most, the last ones; default: 100")
    verifying = actions.add_parser("verify", help="follow the chain of lines; exit code 1 if one is not as it was")
    verifying.set_defaults(action=_verify)
    for action in (querying, verifying):
        verb.add_json(action)


def _moment(text: str) -> int:
    """A point in time as milliseconds since the epoch: an age, or a date and time of day in the local time zone."""
    number, unit = text[:-1], text[-1:]
    if unit in _UNITS_S and number.isascii() and number.isdigit():
        return max(0, int((time.time() - int(number) * _UNITS_S[unit]) * 1000))
    from datetime import datetime

    try:
        return max(0, int(datetime.fromisoformat(text).timestamp() * 1000))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: write 90s, 10m, 2h or 3d for so long ago, or such as 2026-01-31T12:00"
        ) from None


def _run(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _query(arguments: argparse.Namespace) -> int:
    reply = request(
        "audit/query",
        since_ms=arguments.since,
        until_ms=arguments.until,
        sandbox=arguments.sandbox,
        method=arguments.method,
        uid=arguments.uid,
        result=arguments.result,
        limit=arguments.limit,
    )
    if arguments.json:
        show_json(reply)
    else:
        show(render_audit.entries(reply, columns()))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    reply = request("audit/verify")
    if arguments.json:
        show_json(reply)
    else:
        show(render_audit.verified(reply))
    return 0 if reply["intact"] else FAILURE


VERBS = {"audit": Verb("show who asked for what, and prove that the log of it is intact", _add_audit, _run)}
