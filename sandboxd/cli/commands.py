"""``run``, ``exec``, ``shell``: commands in a sandbox, with the caller's own stdin, stdout and stderr."""

from __future__ import annotations

import argparse
import os
import sys

from sandboxd.cli import verb
from sandboxd.cli.execution import execute, fail, is_not_found, run_in, tty_is_possible
from sandboxd.cli.sandboxes import add_create_arguments, check_create_arguments, create
from sandboxd.cli.session import USAGE, call, complain, connect, env_of, say
from sandboxd.cli.shortcut import without_dashes
from sandboxd.cli.verb import Verb
from sandboxd.client import Connection, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _add_command_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--interactive", action="store_true", help="hand over stdin; else it is empty")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal of its own")
    parser.add_argument("--user", metavar="USER", help="another user than the sandbox's; slower, and without -t")
    parser.add_argument(
        "--timeout", metavar="TIME", help="end the command after this time, such as 90s: exit code 124"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [FLAG ...] [COMMAND [ARGUMENT ...]]"
    add_create_arguments(parser)
    _add_command_flags(parser)
    parser.add_argument("--cwd", metavar="DIR", help="directory inside; default: /workspace")
    parser.add_argument("--rm", action="store_true", help="remove the sandbox at the end, whatever happens")
    parser.add_argument(
        "command", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: a shell, at a terminal as with -it"
    )


def _add_exec(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [FLAG ...] SANDBOX COMMAND [ARGUMENT ...]"
    _add_command_flags(parser)
    verb.add_env(parser)
    parser.add_argument("-w", "--cwd", metavar="DIR", help="directory inside; default: /workspace")
    parser.add_argument(
        "-d", "--detach", action="store_true", help="do not wait; print the command's id, for logs and attach"
    )
    parser.add_argument("--json", action="store_true", help="with --detach: print the daemon's reply as JSON")
    verb.add_sandbox(parser)
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command and its arguments")


def _add_shell(parser: argparse.ArgumentParser) -> None:
    verb.add_env(parser)
    parser.add_argument("-w", "--cwd", metavar="DIR", help="directory inside; default: /workspace")
    verb.add_sandbox(parser)


def _run(arguments: argparse.Namespace) -> int:
    if not tty_is_possible(arguments.tty):
        return USAGE
    argv = without_dashes(arguments.command)
    if not (argv or arguments.interactive or arguments.tty):
        if not os.isatty(0):
            say("which command? there is no terminal here to open a shell on")
            sys.stderr.write("hint: sandboxctl run [FLAG ...] COMMAND, or -i for a shell that reads stdin\n")
            return USAGE
        arguments.interactive = arguments.tty = True
    try:
        check_create_arguments(arguments)
        with connect() as connection:
            sandbox = create(connection, arguments, ephemeral=arguments.rm)
            unused = arguments.rm
            try:
                return run_in(connection, sandbox["id"], argv, arguments, env={})
            except RpcError as error:
                # What was asked for makes no sense: nothing ran, and nobody wants the sandbox that was made for it.
                unused = unused or error.type == "invalid_argument"
                if arguments.image is None and is_not_found(error) and not error.hint:
                    error.hint = _as_image(argv)
                raise
            finally:
                _leave(connection, sandbox, remove=unused)
    except RpcError as error:
        return fail(error)


def _as_image(argv: list[str]) -> str:
    """What to type where the first word was meant as an image, as other programs have it."""
    import shlex

    words = shlex.join(argv)
    return f"if {shlex.quote(argv[0])} is an image: sandboxctl run --image {words}" if words.isprintable() else ""


def _leave(connection: Connection, sandbox: dict[str, Any], *, remove: bool) -> None:
    name = sandbox["name"] or sandbox["id"]
    if not remove:
        say(f"sandbox {name} stays; to remove it: sandboxctl rm {name}")
        return
    try:
        call(connection, "sandbox/kill", sandbox=sandbox["id"])
    except RpcError as error:
        # When the connection is gone, so is the sandbox: the daemon removes what is ephemeral.
        if error.type not in {"disconnected", "not_found", "sandbox_gone"}:
            complain(error)


def _shell(arguments: argparse.Namespace) -> int:
    arguments.interactive = True
    arguments.tty = os.isatty(0)
    arguments.user = arguments.timeout = None
    try:
        with connect() as connection:
            return run_in(connection, arguments.sandbox, [], arguments, env_of(arguments.env_file, arguments.env))
    except RpcError as error:
        return fail(error)


VERBS = {
    "run": Verb("make a sandbox and run a command in it", _add_run, _run),
    "exec": Verb("run a command in a sandbox", _add_exec, execute),
    "shell": Verb("open a shell in a sandbox", _add_shell, _shell),
}
