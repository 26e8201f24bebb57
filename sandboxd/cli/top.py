"""``top``: sandboxes, warm slots, services and events on one screen, drawn anew until somebody has seen enough."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import time
from collections import deque

from sandboxd.cli import render_top, verb
from sandboxd.cli.attach import catch_signals, make_raw
from sandboxd.cli.session import call, connect, connect_after, show, show_json_line
from sandboxd.cli.verb import Verb
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from sandboxd.client import Connection, Message

INTERVAL_S = 1.0
INTERVAL_S_MIN = 0.1
INTERVAL_S_MAX = 3600.0
EVENTS_MAX = 64

ENTER = "\x1b[?1049h\x1b[?25l"
"""To the terminal's other screen, without a cursor."""

LEAVE = "\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"

LEAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LEAVING_KEYS = b"qQ\x03\x04\x1b"
"""Those, Ctrl-C, Ctrl-D, and Escape or what begins with it."""

SIGNAL_BASE = 128


def _interval(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not INTERVAL_S_MIN <= seconds <= INTERVAL_S_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds from {INTERVAL_S_MIN:g} to {INTERVAL_S_MAX:g}"
        )
    return seconds


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-d",
        "--interval",
        type=_interval,
        default=INTERVAL_S,
        metavar="SECONDS",
        help="between two looks; default: 1",
    )
    parser.add_argument(
        "-n", "--times", type=verb.lines, metavar="N", help="end after N looks; default: q, or Ctrl-C"
    )
    parser.add_argument("--json", action="store_true", help="print each look as one line of JSON")


class _Looking:
    """Looks, on the next daemon where this one is restarted."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last: int | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)

    def close(self) -> None:
        self._connection.close()

    def look(self) -> dict[str, Any]:
        """All that there is at this moment.

        Raises:
            RpcError: There is no daemon any more.
        """
        try:
            return self._look()
        except RpcError as error:
            self._connection.close()
            self._connection = connect_after(error)
            return self._look()

    def _look(self) -> dict[str, Any]:
        connection = self._connection
        view: dict[str, Any] = {
            "at_ms": int(time.time() * 1000),
            "sandboxes": call(connection, "sandbox/list")["sandboxes"],
            "metrics": call(connection, "sandbox/metrics")["sandboxes"],
            "pools": call(connection, "pool/list")["pools"],
            "services": call(connection, "service/list")["services"],
        }
        self._last = call(connection, "events/subscribe", self._take, since=self._last, follow=False)["last_seq"]
        return {**view, "events": list(self._events)}

    def _take(self, message: Message) -> None:
        if message.content["method"] == "events/event":
            self._events.append(message.content["params"])


def _top(arguments: argparse.Namespace) -> int:
    with contextlib.closing(_Looking(connect())) as looking:
        if not arguments.json and sys.stdout.isatty():
            return _on_screen(looking, arguments.interval, arguments.times)
        for number in _counted(arguments.times):
            if number:
                time.sleep(arguments.interval)
            view = looking.look()
            if arguments.json:
                show_json_line(view)
            else:
                show("\n".join([*([""] if number else []), *render_top.screen(view, None, None)]))
            sys.stdout.flush()
    return 0


def _counted(times: int | None) -> Iterator[int]:
    number = 0
    while times is None or number < times:
        yield number
        number += 1


def _on_screen(looking: _Looking, interval_s: float, times: int | None) -> int:
    typing = os.isatty(0)
    with contextlib.ExitStack() as stack:
        signals, restore_signals = catch_signals((*LEAVING, signal.SIGWINCH))
        stack.callback(restore_signals)
        if typing:
            stack.callback(make_raw(0))
        stack.callback(_write, LEAVE)
        _write(ENTER)
        for _ in _counted(times):
            view = looking.look()
            ends = time.monotonic() + interval_s
            while True:
                _draw(view)
                left_by = _wait(signals, ends - time.monotonic(), typing=typing)
                if left_by is not None:
                    return left_by
                if time.monotonic() >= ends:
                    break
    return 0


def _draw(view: dict[str, Any]) -> None:
    columns, rows = os.get_terminal_size(1)
    lines = render_top.screen(view, columns or verb.COLUMNS_DEFAULT, rows or None)
    _write(HOME + "\r\n".join(f"{line}{CLEAR_LINE}" for line in lines) + CLEAR_REST)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _wait(signals: int, seconds: float, *, typing: bool) -> int | None:
    """Wait so long, or until the size has changed; return the exit code where somebody has seen enough."""
    ready = select.select([signals, *([0] if typing else [])], [], [], max(seconds, 0.0))[0]
    if signals in ready:
        numbers = [number for number in os.read(signals, 64) if number != signal.SIGWINCH]
        if numbers:
            return SIGNAL_BASE + numbers[0]
    if 0 in ready and typing:
        typed = os.read(0, 64)
        if not typed or any(key in LEAVING_KEYS for key in typed):
            return 0
    return None


VERBS = {"top": Verb("watch sandboxes, warm slots, services and events on one screen", _add_top, _top)}
