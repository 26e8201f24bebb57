"""Carries out ``exec``, and what ``run`` and ``shell`` share with it: a command to its end, and its exit code."""

from __future__ import annotations

import os
import sys

from sandboxd.cli.attach import Attached, terminal_size
from sandboxd.cli.session import USAGE, call, complain, connect, env_of, say, show, show_json
from sandboxd.cli.shortcut import without_dashes
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from sandboxd.cli.shortcut import ExecArguments
    from sandboxd.client import Connection, Message

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
    "interrupted": "the command was interrupted",
    "expired": "the command was ended with its sandbox, whose time was over",
    "killed": "the command was killed: its sandbox was stopped or removed, or somebody ended it",
    "lost": "nobody knows how the command ended: its sandbox was stopped or removed, or broke",
}
MORE_WHILE_THERE = "sandboxctl update -m SIZE {}"
MORE_ANEW = "sandboxctl run -m SIZE"
"""What gives it more memory: while the sandbox is there, and where it is removed with the command."""

CRASHES = {4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 11: "SIGSEGV", 31: "SIGSYS"}
"""Signals that nobody sends: the program itself went wrong. No shell of the caller's says so in our place."""


def execute(arguments: argparse.Namespace | ExecArguments) -> int:
    """Run the command of ``exec`` and return the exit code."""
    argv = without_dashes(arguments.command)
    if not argv:
        say("which command?")
        sys.stderr.write("hint: sandboxctl exec --help\n")
        return USAGE
    if arguments.json and not arguments.detach:
        say("--json goes with --detach")
        return USAGE
    env = env_of(arguments.env_file, arguments.env)
    try:
        if arguments.detach:
            return _start(arguments, argv, env)
        if not tty_is_possible(arguments.tty):
            return USAGE
        with connect() as connection:
            return run_in(connection, arguments.sandbox, argv, arguments, env)
    except RpcError as error:
        return fail(error)


def _start(arguments: argparse.Namespace | ExecArguments, argv: list[str], env: dict[str, str]) -> int:
    """Start it, its output kept by the daemon; with ``-t`` in a terminal that the daemon holds."""
    pty = None
    if arguments.tty:
        _set_term(env)
        rows, cols = terminal_size()
        pty = {"rows": rows, "cols": cols}
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
            stdio="spool",
            stdin="pipe" if arguments.interactive and pty is None else None,
            pty=pty,
        )
    if arguments.json:
        show_json(started)
    else:
        show(started["command_id"])
    return 0


def run_in(
    connection: Connection,
    sandbox: str,
    argv: list[str],
    arguments: argparse.Namespace | ExecArguments,
    env: dict[str, str],
) -> int:
    """Run ``argv``, or the first shell that there is, and return the exit code."""
    if arguments.tty:
        _set_term(env)
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
            end = attached.run({**fields, "argv": candidate})
            if end["status"] == "killed" and _expired(connection, sandbox):
                end["status"] = "expired"
            gone = getattr(arguments, "rm", False)
            return exit_code_of_end(
                end, sandbox, arguments.timeout, more_memory=MORE_ANEW if gone else MORE_WHILE_THERE
            )
        except RpcError as error:
            if candidate is candidates[-1] or not is_not_found(error):
                raise
    raise AssertionError("there is always a last candidate")


def _expired(connection: Connection, sandbox: str) -> bool:
    """Whether the end of its time has removed a sandbox, or is about to."""
    found = []

    def take(message: Message) -> None:
        if message.content["method"] == "events/event":
            found.append(message.content["params"]["data"].get("action"))

    try:
        call(connection, "events/subscribe", take, sandbox=sandbox, kinds=["expired"], follow=False)
    except RpcError:
        # The command's end is what was asked for, and it is known.
        return False
    return found[-1:] == ["kill"]


def _set_term(env: dict[str, str]) -> None:
    env.setdefault("TERM", os.environ.get("TERM", DEFAULT_TERM))


def exit_code_of_end(
    end: dict[str, Any], sandbox: str, timeout: str | None = None, *, more_memory: str = MORE_WHILE_THERE
) -> int:
    """The exit code that a command's end gives us. A verdict that no code tells is said on stderr."""
    status = end["status"]
    if status == "timeout" and timeout is not None:
        say(f"the command ran into its time limit of {timeout}{'s' if timeout[-1:].isdigit() else ''}")
    elif status in VERDICTS:
        say(VERDICTS[status])
    elif end["signal"] in CRASHES:
        say(f"the command was ended by signal {end['signal']} ({CRASHES[end['signal']]})")
    if status == "oom":
        sys.stderr.write(f"hint: {more_memory.format(sandbox)}\n")
    for problem in end.get("problems", ()):
        say(f"{problem['kind']}: {problem['detail']}")
        sys.stderr.write(f"hint: {problem['hint']}\n")
    if status == "timeout":
        return TIMED_OUT
    if end["exit_code"] is not None:
        return int(end["exit_code"])
    return SIGNAL_BASE + int(end["signal"]) if end["signal"] else EXEC_FAILED


def is_not_found(error: RpcError) -> bool:
    """Whether there is no such program."""
    return error.type == "command_not_started" and error.detail.startswith("ENOENT")


def fail(error: RpcError) -> int:
    """Complain; our own failures have codes that are not the command's, as those of ``docker run``."""
    complain(error)
    if error.type == "invalid_argument":
        return USAGE
    if error.type == "command_not_started":
        return NOT_FOUND if is_not_found(error) else NOT_EXECUTABLE
    return EXEC_FAILED


def tty_is_possible(wanted: bool) -> bool:
    """Whether there is a terminal to give, if one is wanted; says so if not."""
    if wanted and not os.isatty(0):
        say("cannot use -t: stdin is not a terminal")
        return False
    return True
