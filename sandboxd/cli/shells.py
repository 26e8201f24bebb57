"""``session``: shells that keep their state from one text to the next."""

from __future__ import annotations

import argparse
import binascii
import sys
import time

from sandboxd.cli import render, verb
from sandboxd.cli.execution import exit_code_of_end, fail
from sandboxd.cli.session import call, columns, connect, env_of, request, say, show, show_json
from sandboxd.cli.spooled import Output, say_dropped
from sandboxd.cli.verb import Parser, Verb
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandboxd.client import Connection, Message

SHELL_ID_CHARACTERS = 12


def _add_session(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shells that keep their working directory, variables, functions and aliases from one run to the next, for"
        " agents and scripts. For one to type into, see sandboxctl shell."
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    opening = actions.add_parser("open", help="open one, and print its id")
    opening.set_defaults(action=_open)
    verb.add_env(opening)
    opening.add_argument("-C", "--cwd", metavar="DIR", help="absolute, or relative to /workspace")
    opening.add_argument("--shell", metavar="PROGRAM", help="default: bash, or sh where the image has none")
    verb.add_sandbox(opening)
    running = actions.add_parser("run", help="let one evaluate a text, and exit as that did")
    running.set_defaults(action=_run)
    running.add_argument("--timeout", metavar="TIME", help="such as 90s: then it is interrupted, if need be replaced")
    _add_shell(running)
    running.add_argument("text", metavar="TEXT", help="as if it were sourced; - for what stdin holds")
    interrupting = actions.add_parser("interrupt", help="end what one evaluates, and get it back")
    interrupting.set_defaults(action=_interrupt)
    _add_shell(interrupting)
    closing = actions.add_parser("close", help="end one, and all that it left running")
    closing.set_defaults(action=_close)
    _add_shell(closing)
    listing = actions.add_parser("ls", help="list those of a sandbox")
    listing.set_defaults(action=_list)
    verb.add_sandbox(listing)
    for action in (opening, running, interrupting, closing, listing):
        verb.add_json(action)


def _add_shell(parser: argparse.ArgumentParser) -> None:
    verb.add_sandbox(parser)
    named = parser.add_argument(
        "shell_id", metavar="SHELL", help="id, or unambiguous beginning of one: see sandboxctl session ls"
    )
    verb.complete_shells(named)


def _session(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _find(connection: Connection, arguments: argparse.Namespace) -> dict[str, str]:
    """The params that name a shell, from an unambiguous beginning of its id."""
    beginning, sandbox = arguments.shell_id, arguments.sandbox
    if len(beginning) == SHELL_ID_CHARACTERS:
        return {"sandbox": sandbox, "shell_id": beginning}
    rows = call(connection, "shells/list", sandbox=sandbox)["shells"]
    ids = [row["shell_id"] for row in rows if row["shell_id"].startswith(beginning)]
    hint = f"sandboxctl session ls {sandbox}"
    if not ids:
        raise RpcError(0, "not_found", f"cannot find shell {beginning!r}", "none begins so", hint)
    if len(ids) > 1:
        raise RpcError(0, "invalid_argument", f"cannot tell which shell {beginning!r} is", ", ".join(ids), hint)
    return {"sandbox": sandbox, "shell_id": ids[0]}


def _open(arguments: argparse.Namespace) -> int:
    reply = request(
        "shells/open",
        sandbox=arguments.sandbox,
        shell=arguments.shell,
        env=env_of(arguments.env_file, arguments.env),
        cwd=arguments.cwd,
    )
    if arguments.json:
        show_json(reply)
    else:
        show(reply["shell_id"])
    return 0


def _run(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    kept: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    output = Output({"stdout": 0, "stderr": 0}, say_dropped)

    def take(message: Message) -> None:
        if message.content["method"] != "commands/output":
            return
        told = message.content["params"]
        if arguments.json:
            kept[told["stream"]].append(binascii.a2b_base64(told["data"]))
        else:
            output.take(told)

    try:
        with connect() as connection:
            shell = _find(connection, arguments)
            end = call(connection, "shells/run", take, **shell, text=text, timeout=arguments.timeout, follow=True)
    except RpcError as error:
        return fail(error)
    if arguments.json:
        written = {name: b"".join(parts).decode(errors="replace") for name, parts in kept.items()}
        show_json({**end, **written})
    else:
        output.finish(end)
        _say_what_became(end)
    if end["interrupted"] and end["status"] == "killed":
        end["status"] = "interrupted"
    return exit_code_of_end(end, arguments.sandbox, arguments.timeout)


def _say_what_became(end: dict[str, Any]) -> None:
    if end["ended"]:
        say("the shell has ended")
    elif end["restarted"]:
        kept = "kept its directory and exported variables" if end["restored"] else "kept nothing"
        say(f"the shell was lost, and a new one is in its place: it {kept}")


def _interrupt(arguments: argparse.Namespace) -> int:
    with connect() as connection:
        reply = call(connection, "shells/interrupt", None, **_find(connection, arguments))
    if arguments.json:
        show_json(reply)
    elif not reply["interrupted"]:
        say("nothing was running")
    elif reply["restarted"]:
        say("the shell was lost, and a new one is in its place")
    return 0


def _close(arguments: argparse.Namespace) -> int:
    with connect() as connection:
        shell = _find(connection, arguments)
        reply = call(connection, "shells/close", None, **shell)
    if arguments.json:
        show_json(reply)
    else:
        show(shell["shell_id"])
    return 0


def _list(arguments: argparse.Namespace) -> int:
    reply = request("shells/list", sandbox=arguments.sandbox)
    if arguments.json:
        show_json(reply)
    else:
        show(render.shell_list(reply["shells"], int(time.time() * 1000), columns()))
    return 0


VERBS = {"session": Verb("shells that keep their state from run to run, for agents", _add_session, _session)}
