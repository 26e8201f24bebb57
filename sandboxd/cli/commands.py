"""``run``, ``exec``, ``shell``: commands in a sandbox, with the caller's own stdin, stdout and stderr."""

from __future__ import annotations

import argparse
import os
import sys

from sandboxd.cli import verb
from sandboxd.cli.attach import Attached
from sandboxd.cli.sandboxes import add_create_arguments, create
from sandboxd.cli.session import call, complain, connect, say, show, show_json
from sandboxd.cli.verb import USAGE, Verb
from sandboxd.client import Connection, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EXEC_FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127
TIMED_OUT = 124
"""As ``timeout`` of the coreutils has it."""
SIGNAL_BASE = 128

SHELLS = ("bash", "sh")
DEFAULT_TERM = "xterm"

VERDICTS = {
    "timeout": "the command ran into its time limit",
    "oom": "the kernel ended processes of this sandbox because its memory limit was reached",
    "lost": "nobody knows how the command ended",
}


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
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: a shell")


def _add_exec(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [FLAG ...] SANDBOX COMMAND [ARGUMENT ...]"
    _add_command_flags(parser)
    verb.add_env(parser)
    parser.add_argument("-w", "--cwd", metavar="DIR", help="directory inside; default: /workspace")
    parser.add_argument("-d", "--detach", action="store_true", help="do not wait; print the command's id")
    parser.add_argument("--json", action="store_true", help="with --detach: print the daemon's reply as JSON")
    verb.add_sandbox(parser)
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command and its arguments")


def _add_shell(parser: argparse.ArgumentParser) -> None:
    verb.add_env(parser)
    parser.add_argument("-w", "--cwd", metavar="DIR", help="directory inside; default: /workspace")
    verb.add_sandbox(parser)


def _run(arguments: argparse.Namespace) -> int:
    if not _tty_is_possible(arguments.tty):
        return USAGE
    argv = _without_dashes(arguments.command)
    try:
        with connect() as connection:
            sandbox = create(connection, arguments, ephemeral=arguments.rm)
            try:
                return _run_in(connection, sandbox["id"], argv, arguments, env={})
            finally:
                _leave(connection, sandbox, remove=arguments.rm)
    except RpcError as error:
        return _fail(error)


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


def _exec(arguments: argparse.Namespace) -> int:
    argv = _without_dashes(arguments.command)
    if not argv:
        say("which command?")
        sys.stderr.write("hint: sandboxctl exec --help\n")
        return USAGE
    env = verb.env_of(arguments)
    try:
        if arguments.detach:
            return _start(arguments, argv, env)
        if not _tty_is_possible(arguments.tty):
            return USAGE
        with connect() as connection:
            return _run_in(connection, arguments.sandbox, argv, arguments, env)
    except RpcError as error:
        return _fail(error)


def _start(arguments: argparse.Namespace, argv: list[str], env: dict[str, str]) -> int:
    with connect() as connection:
        started = call(
            connection,
            "commands/start",
            sandbox=arguments.sandbox,
            argv=argv,
            env=env,
            cwd=arguments.cwd,
            user=arguments.user,
            timeout=arguments.timeout,
        )
    if arguments.json:
        show_json(started)
    else:
        show(started["command_id"])
    return 0


def _shell(arguments: argparse.Namespace) -> int:
    arguments.interactive = True
    arguments.tty = os.isatty(0)
    arguments.user = arguments.timeout = None
    try:
        with connect() as connection:
            return _run_in(connection, arguments.sandbox, [], arguments, verb.env_of(arguments))
    except RpcError as error:
        return _fail(error)


def _run_in(
    connection: Connection, sandbox: str, argv: list[str], arguments: argparse.Namespace, env: dict[str, str]
) -> int:
    """Run ``argv``, or the first shell that there is, and return the exit code."""
    if arguments.tty:
        env.setdefault("TERM", os.environ.get("TERM", DEFAULT_TERM))
    fields = {
        "sandbox": sandbox,
        "env": env,
        "cwd": arguments.cwd,
        "user": arguments.user,
        "timeout": arguments.timeout,
    }
    candidates = [argv] if argv else [[shell] for shell in SHELLS]
    for candidate in candidates:
        attached = Attached(connection, tty=arguments.tty, interactive=arguments.interactive)
        try:
            return _exit_code_of(attached.run({**fields, "argv": candidate}))
        except RpcError as error:
            if candidate is candidates[-1] or not _is_not_found(error):
                raise
    raise AssertionError("there is always a last candidate")


def _exit_code_of(end: dict[str, Any]) -> int:
    status = end["status"]
    if status in VERDICTS:
        say(VERDICTS[status])
    if status == "timeout":
        return TIMED_OUT
    if end["exit_code"] is not None:
        return int(end["exit_code"])
    return SIGNAL_BASE + int(end["signal"]) if end["signal"] else EXEC_FAILED


def _is_not_found(error: RpcError) -> bool:
    return error.type == "command_not_started" and error.detail.startswith("ENOENT")


def _fail(error: RpcError) -> int:
    """Our own failures have codes that are not the command's, as those of ``docker run``."""
    complain(error)
    if error.type == "invalid_argument":
        return USAGE
    if error.type == "command_not_started":
        return NOT_FOUND if _is_not_found(error) else NOT_EXECUTABLE
    return EXEC_FAILED


def _tty_is_possible(wanted: bool) -> bool:
    if wanted and not os.isatty(0):
        say("cannot use -t: stdin is not a terminal")
        return False
    return True


def _without_dashes(command: list[str]) -> list[str]:
    return command[1:] if command[:1] == ["--"] else command


VERBS = {
    "run": Verb("make a sandbox and run a command in it", _add_run, _run),
    "exec": Verb("run a command in a sandbox", _add_exec, _exec),
    "shell": Verb("open a shell in a sandbox", _add_shell, _shell),
}
