"""``image list`` and ``image build``."""

from __future__ import annotations

import argparse
import sys
import time

from sandboxd.cli import render_host, verb
from sandboxd.cli.session import call, columns, connect, request, say, show, show_json
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from rich.progress import Progress, TaskID

    from sandboxd.client import Message


def _add_image(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="list the images that the engines hold")
    listing.set_defaults(action=_list)
    building = actions.add_parser("build", help="make the default image, without a registry if need be")
    building.set_defaults(action=_build)
    building.add_argument(
        "--source",
        choices=("auto", "registry", "distribution", "busybox"),
        default="auto",
        help="auto: the first of the others that works here",
    )
    building.add_argument("--reference", metavar="REFERENCE", help="default: the daemon's default image")
    building.add_argument("--force", action="store_true", help="even if the engine holds it already")
    for action in (listing, building):
        verb.add_engine(action)
        verb.add_json(action)


def _image(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _list(arguments: argparse.Namespace) -> int:
    reply = request("image/list", engine=arguments.engine)
    _show(reply, arguments)
    return 0


def _build(arguments: argparse.Namespace) -> int:
    with connect() as connection, _Bar() if sys.stderr.isatty() else _Lines() as progress:
        reply = call(
            connection,
            "image/build",
            progress,
            engine=arguments.engine,
            source=arguments.source,
            reference=arguments.reference,
            force=arguments.force,
        )
    if reply["source"] == "present" and not arguments.json:
        say("it is there already; to make it anew: sandboxctl image build --force")
    _show(reply, arguments)
    return 0


def _show(reply: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        show_json(reply)
    else:
        show(render_host.images(reply["images"], int(time.time() * 1000), columns()))


class _Lines:
    """Progress where nobody watches: a line when there is something new to say."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing was opened."""

    def __call__(self, message: Message) -> None:
        if message.content["method"] != "$/progress":
            return
        text = message.content["params"]["message"]
        if text != self._last:
            self._last = text
            say(text)


class _Bar:
    """Progress where somebody watches."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress: Progress = Progress(console=Console(stderr=True), transient=True)
        self._task: TaskID = self._progress.add_task("image", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, message: Message) -> None:
        if message.content["method"] != "$/progress":
            return
        params = message.content["params"]
        self._progress.update(
            self._task, description=params["message"], completed=params["done"] or 0, total=params["total"]
        )


VERBS = {"image": Verb("list images, or make the default one", _add_image, _image)}
