"""``workspace diff``, ``workspace apply`` and ``workspace reset``: what a sandbox did to its project."""

from __future__ import annotations

import argparse
import os
import sys

from sandboxd.cli import render, tables, verb
from sandboxd.cli.session import FAILURE, call, connect, request, say, show, show_json
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from sandboxd.client import Connection


def _add_workspace(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    diff = actions.add_parser("diff", help="show what it changed, as a patch for git apply or patch -p1")
    diff.set_defaults(action=_diff)
    diff.add_argument("--stat", action="store_true", help="a line per file, instead of the patch")
    apply = actions.add_parser("apply", help="carry changes back to the project")
    apply.set_defaults(action=_apply)
    apply.add_argument("--force", action="store_true", help="also over what was changed in the project meanwhile")
    apply.add_argument("--dry-run", action="store_true", help="only say what would be done")
    reset = actions.add_parser("reset", help="undo what it changed")
    reset.set_defaults(action=_reset)
    for action in (diff, apply, reset):
        verb.add_json(action)
        verb.add_sandbox(action)
        action.add_argument(
            "paths", metavar="PATH", nargs="*", default=[], help="only what is at or below, relative to the project"
        )


def _workspace(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _paths(arguments: argparse.Namespace) -> dict[str, Any]:
    """Paths as the protocol takes them: text, and bytes for those that are none."""
    texts, raw = [], []
    for path in arguments.paths:
        encoded = verb.base64_unless_utf8(path)
        if encoded is None:
            texts.append(path)
        else:
            raw.append(encoded)
    return {"paths": texts, "paths_bytes": raw}


def _diff(arguments: argparse.Namespace) -> int:
    with connect() as connection:
        pages = _pages(connection, arguments)
        if arguments.json:
            whole = next(pages)
            for page in pages:
                whole["changes"] += page["changes"]
            whole["next_offset"] = None
            show_json(whole)
        elif arguments.stat:
            show(render.changes([change for page in pages for change in page["changes"]]))
        else:
            for page in pages:
                for change in page["changes"]:
                    _write_patch(change)
    return 0


def _pages(connection: Connection, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    offset: int | None = 0
    while offset is not None:
        page = call(
            connection,
            "workspace/diff",
            sandbox=arguments.sandbox,
            patch=not arguments.stat,
            offset=offset,
            **_paths(arguments),
        )
        offset = page["next_offset"]
        yield page


def _write_patch(change: dict[str, Any]) -> None:
    """The patch, byte for byte; at a terminal without what would move its cursor.

    What a patch cannot tell goes to stderr, so that stdout stays a patch.
    """
    if change["patch_bytes"] is not None:
        import base64

        data = base64.b64decode(change["patch_bytes"])
    elif change["patch"] is not None:
        data = change["patch"].encode()
    else:
        say(render.change_in_words(change))
        return
    if sys.stdout.isatty():
        show(tables.harmless(data.decode(errors="backslashreplace")))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)


def _apply(arguments: argparse.Namespace) -> int:
    reply = request(
        "workspace/apply",
        sandbox=arguments.sandbox,
        force=arguments.force,
        dry_run=arguments.dry_run,
        **_paths(arguments),
    )
    return _report(reply, arguments)


def _reset(arguments: argparse.Namespace) -> int:
    return _report(request("workspace/reset", sandbox=arguments.sandbox, **_paths(arguments)), arguments)


def _report(reply: dict[str, Any], arguments: argparse.Namespace) -> int:
    """What was done, on stdout; what was not, on stderr and in the exit code."""
    if arguments.json:
        show_json(reply)
    else:
        sys.stdout.writelines(f"{tables.one_line(path)}\n" for path in reply["applied"])
        more = reply["applied_total"] - len(reply["applied"])
        if more > 0:
            show(f"and {more} more")
        sys.stdout.flush()
        if not (reply["applied_total"] or reply["conflicts"] or reply["failed"]):
            say("nothing was changed there" if arguments.paths else "nothing was changed")
        for problem in (*reply["conflicts"], *reply["failed"]):
            say(f"{tables.one_line(problem['path'])}: {problem['reason']}")
    stands = reply["failed"] or (reply["conflicts"] and not getattr(arguments, "force", False))
    return FAILURE if stands else os.EX_OK


VERBS = {"workspace": Verb("show, apply or undo what a sandbox did to its project", _add_workspace, _workspace)}
