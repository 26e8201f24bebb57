"""``files``: what is in a sandbox, read, written and watched. Paths are resolved inside, as its user."""

from __future__ import annotations

import argparse
import sys
import time

from sandboxd.cli import render, verb, wire
from sandboxd.cli.session import call, connect, request, say, show, show_json, show_json_line
from sandboxd.cli.tables import shown
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandboxd.client import Message

_OCTAL = 8
_MODE_MAX = 0o777
_HERE = "."
_PATH_HELP = "absolute, or relative to /workspace"


def _add_files(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    for name, (text, add, run) in _ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        verb.add_sandbox(action)
        add(action)
        action.set_defaults(action=run)


def _files(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _add_path(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    text = f"{_PATH_HELP}; default: there" if optional else _PATH_HELP
    parser.add_argument("path", metavar="PATH", nargs="?" if optional else None, default=_HERE, help=text)


def _named(arguments: argparse.Namespace, path: str) -> dict[str, str]:
    """What names a file; as bytes, where it is not UTF-8."""
    from sandboxd.client.file_model import text_params

    return {"sandbox": arguments.sandbox, **text_params("path", path)}


# --- looking


def _add_ls(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, optional=True)
    parser.add_argument("--depth", metavar="NUMBER", type=int, default=1, help="levels of directories; default: 1")
    verb.add_json(parser)


def _ls(arguments: argparse.Namespace) -> int:
    entries: list[dict[str, Any]] = []

    def take(message: Message) -> None:
        if message.content["method"] == "files/listed":
            entries.extend(message.content["params"]["entries"])

    fields = {**_named(arguments, arguments.path), "depth": arguments.depth, "pages": True}
    with connect() as connection:
        reply = call(connection, "files/list", take, **fields)
    entries.sort(key=lambda entry: str(entry["path"]))
    if arguments.json:
        show_json({**reply, "entries": entries})
    else:
        show(render.files(entries, int(time.time() * 1000)))
    if reply["truncated"]:
        say("there is more than this: too deep, or not readable")
    return 0


def _add_stat(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    parser.add_argument("-L", "--follow", action="store_true", help="look at what a link leads to")
    verb.add_json(parser)


def _stat(arguments: argparse.Namespace) -> int:
    _show_file(request("files/stat", **_named(arguments, arguments.path), follow=arguments.follow), arguments)
    return 0


def _show_file(info: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        show_json(info)
    else:
        show(render.files([info], int(time.time() * 1000)))


# --- content


def _cat(arguments: argparse.Namespace) -> int:
    from sandboxd.client.calls import open_file
    from sandboxd.client.content import FileStream

    with connect() as connection:
        number = open_file(connection, wire.build("files/read", **_named(arguments, arguments.path)))
    with FileStream(number) as pieces:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
    return 0


def _mode(text: str) -> int:
    try:
        mode = int(text, _OCTAL)
    except ValueError:
        mode = -1
    if not 0 <= mode <= _MODE_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no mode: octal, such as 644")
    return mode


def _add_write(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    parser.add_argument(
        "--mode", metavar="MODE", type=_mode, help="octal; default: that of the file that is there, else 644"
    )
    verb.add_json(parser)


def _write(arguments: argparse.Namespace) -> int:
    from sandboxd.client.content import source

    fields = _named(arguments, arguments.path)
    with source(sys.stdin.buffer) as (content, descriptors), connect() as connection:
        params = wire.build("files/write", **fields, **content, mode=arguments.mode)
        info = connection.call("files/write", params, descriptors)
    if arguments.json:
        show_json(info)
    return 0


# --- names


def _add_mkdir(parser: argparse.ArgumentParser) -> None:
    _add_path(parser)
    parser.add_argument(
        "-p", "--parents", action="store_true", help="make those above it, too; that it is there is no error"
    )
    verb.add_json(parser)


def _mkdir(arguments: argparse.Namespace) -> int:
    named = _named(arguments, arguments.path)
    _done(request("files/make_dir", **named, make_parents=arguments.parents), arguments)
    return 0


def _add_mv(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="OLD", help=_PATH_HELP)
    parser.add_argument("new_path", metavar="NEW", help="in the same file system")
    parser.add_argument("-n", "--no-replace", action="store_true", help="fail if NEW is there")
    verb.add_json(parser)


def _mv(arguments: argparse.Namespace) -> int:
    from sandboxd.client.file_model import text_params

    fields = {**_named(arguments, arguments.path), **text_params("new_path", arguments.new_path)}
    _done(request("files/rename", **fields, replace=not arguments.no_replace), arguments)
    return 0


def _add_rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="+", help=_PATH_HELP)
    parser.add_argument("-r", "--recursive", action="store_true", help="directories, with all that is in them")
    parser.add_argument("-f", "--force", action="store_true", help="that there is none is no error")
    verb.add_json(parser)


def _rm(arguments: argparse.Namespace) -> int:
    flags = {"recursive": arguments.recursive, "missing_ok": arguments.force}
    with connect() as connection:
        for path in arguments.paths:
            reply = call(connection, "files/remove", None, **_named(arguments, path), **flags)
    _done(reply, arguments)
    return 0


def _done(reply: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Nothing is said of what was done as asked."""
    if arguments.json:
        show_json(reply)


# --- watching


def _add_watch(parser: argparse.ArgumentParser) -> None:
    _add_path(parser, optional=True)
    parser.add_argument("-r", "--recursive", action="store_true", help="all that is below, and will be")
    parser.add_argument("--json", action="store_true", help="print each change as one line of JSON")


def _watch(arguments: argparse.Namespace) -> int:
    truncated = False

    def take(message: Message) -> None:
        nonlocal truncated
        params = message.content["params"]
        if params.get("truncated") and not truncated:
            truncated = True
            say("some directories are not watched: they are too many, too deep, or not readable")
        for change in params.get("changes", ()):
            _show_change(change, arguments)
        sys.stdout.flush()

    with connect() as connection:
        call(connection, "files/watch", take, **_named(arguments, arguments.path), recursive=arguments.recursive)
    say(f"{shown(arguments.path)} is gone")
    return 0


def _show_change(change: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        show_json_line(change)
    else:
        show(render.change(change))


_ACTIONS: dict[
    str,
    tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]],
] = {
    "ls": ("list a directory", _add_ls, _ls),
    "cat": ("write what is in a file to stdout", _add_path, _cat),
    "write": ("make a file of what comes from stdin, or replace one: whole or not at all", _add_write, _write),
    "stat": ("show everything about one file", _add_stat, _stat),
    "mkdir": ("make a directory", _add_mkdir, _mkdir),
    "mv": ("rename a file or a directory", _add_mv, _mv),
    "rm": ("remove files", _add_rm, _rm),
    "watch": ("print what changes, until interrupted", _add_watch, _watch),
}

VERBS = {"files": Verb("list, read, write, change and watch files in a sandbox", _add_files, _files)}
