"""``timeout touch pause resume events``: how long sandboxes last, and what happens to them."""

from __future__ import annotations

import argparse
import sys
import time

from sandboxd.cli import render, verb
from sandboxd.cli.sandboxes import each
from sandboxd.cli.session import USAGE, call, connect, connect_after, request, say, show, show_json, show_json_line
from sandboxd.cli.verb import Verb
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxd.client import Message

EVENT_KINDS = (
    *("created", "started", "adopted", "recovered", "paused", "resumed", "stopping", "stopped", "broken", "lost"),
    *("expiring", "expired", "timeout_changed", "removing", "removed", "oom", "limits_restored", "stray_removed"),
    *("command_started", "command_ended"),
)
"""As in the protocol, whose module is not imported here: it costs more than the rest of the command."""


def _add_several(parser: argparse.ArgumentParser) -> None:
    verb.add_sandboxes(parser)
    verb.add_json(parser)


def _pause(arguments: argparse.Namespace) -> int:
    return each(arguments, "sandbox/pause", {})


def _resume(arguments: argparse.Namespace) -> int:
    return each(arguments, "sandbox/resume", {})


def _touch(arguments: argparse.Namespace) -> int:
    return each(arguments, "sandbox/touch", {})


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    verb.add_idle(parser)
    verb.add_sandbox(parser)
    parser.add_argument(
        "lifetime", metavar="TIME", nargs="?", help="how long it lasts from now on, such as 10m; none: no limit"
    )
    verb.add_json(parser)


def _timeout(arguments: argparse.Namespace) -> int:
    if arguments.lifetime is arguments.idle_timeout is arguments.on_timeout is None:
        say("how long?")
        sys.stderr.write("hint: sandboxctl timeout --help\n")
        return USAGE
    reply = request(
        "sandbox/set_timeout",
        sandbox=arguments.sandbox,
        lifetime=arguments.lifetime,
        idle_timeout=arguments.idle_timeout,
        on_timeout=arguments.on_timeout,
    )
    if arguments.json:
        show_json(reply)
    else:
        show(render.lifetime(reply, int(time.time() * 1000)))
    return 0


def _add_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what happens from now on")
    parser.add_argument("-n", "--lines", type=verb.lines, metavar="N", help="of what is kept, only the last N")
    parser.add_argument(
        "--since", type=int, metavar="NUMBER", help="only what came after this one; default: all that is kept"
    )
    parser.add_argument(
        "--kind",
        action="append",
        default=[],
        choices=EVENT_KINDS,
        metavar="KIND",
        help="only these, such as removed; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    verb.add_sandbox(parser, optional=True)


def _events(arguments: argparse.Namespace) -> int:
    """When the daemon is restarted, it goes on with the next one, after the last number that it was told."""
    last: int | None = arguments.since
    wanted = {"sandbox": arguments.sandbox, "kinds": arguments.kind}
    ending = None if arguments.lines is None else _Ending(arguments.lines)

    def take(message: Message) -> None:
        nonlocal last
        method, params = message.content["method"], message.content["params"]
        match method:
            case "events/begun":
                last = params["next_seq"] - 1
            case "events/event":
                last = params["seq"]
            case "events/lost":
                last = params["last_seq"]
        _show_event(message, as_json=arguments.json)

    connection = connect()
    while True:
        with connection:
            try:
                if ending is not None:
                    reply = call(connection, "events/subscribe", ending, since=last, follow=False, **wanted)
                    for message in ending.messages:
                        _show_event(message, as_json=arguments.json)
                    last, ending = reply["last_seq"], None
                if arguments.follow or arguments.lines is None:
                    call(connection, "events/subscribe", take, since=last, follow=arguments.follow, **wanted)
            except RpcError as error:
                failed = error
            else:
                return 0
        connection = connect_after(failed)


class _Ending:
    """Keeps the last of what is told. Begun anew by each ``events/begun``: the next daemon tells all of it again."""

    def __init__(self, count: int) -> None:
        from collections import deque

        self.messages: deque[Message] = deque(maxlen=count)

    def __call__(self, message: Message) -> None:
        if message.content["method"] == "events/begun":
            self.messages.clear()
        else:
            self.messages.append(message)


def _show_event(message: Message, *, as_json: bool) -> None:
    method, params = message.content["method"], message.content["params"]
    if method not in {"events/event", "events/lost"}:
        return
    if as_json:
        show_json_line({"method": method, **params})
    else:
        show(render.event(params) if method == "events/event" else render.events_lost(params))
    sys.stdout.flush()


VERBS = {
    "timeout": Verb("change how long a sandbox lasts", _add_timeout, _timeout),
    "touch": Verb("say that sandboxes are still needed: they are not idle", _add_several, _touch),
    "pause": Verb("freeze sandboxes; they keep their memory, and take no CPU time", _add_several, _pause),
    "resume": Verb("let paused sandboxes go on", _add_several, _resume),
    "events": Verb("show what happened to sandboxes, and what happens", _add_events, _events),
}
