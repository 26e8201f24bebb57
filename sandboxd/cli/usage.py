"""``stats`` and ``metrics``: what sandboxes use, and how the daemon fares."""

from __future__ import annotations

import argparse
import sys
import time

from sandboxd.cli import render, verb
from sandboxd.cli.session import call, columns, connect, request, show, show_json
from sandboxd.cli.verb import Verb

WATCH_INTERVAL_S = 1.0
CLEAR_SCREEN = "\x1b[H\x1b[2J"


def _add_stats(parser: argparse.ArgumentParser) -> None:
    verb.add_sandboxes(parser, optional=True)
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    verb.add_json(parser)


def _stats(arguments: argparse.Namespace) -> int:
    with connect() as connection:
        while True:
            reply = call(connection, "sandbox/metrics", sandboxes=arguments.sandboxes)
            if arguments.watch and not arguments.json and sys.stdout.isatty():
                sys.stdout.write(CLEAR_SCREEN)
            if arguments.json:
                show_json(reply)
            else:
                show(render.metrics_table(reply["sandboxes"], columns()))
            if not arguments.watch:
                return 0
            sys.stdout.flush()
            time.sleep(WATCH_INTERVAL_S)


def _metrics(arguments: argparse.Namespace) -> int:
    reply = request("daemon/metrics")
    if arguments.json:
        show_json(reply)
    else:
        show(reply["text"])
    return 0


VERBS = {
    "stats": Verb("show what sandboxes use, against their limits", _add_stats, _stats),
    "metrics": Verb("print figures of the daemon, as OpenMetrics text", verb.add_json, _metrics),
}
