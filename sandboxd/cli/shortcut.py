"""The everyday forms of ``exec``, read without argparse, which costs as much as all the rest of such a call.

It takes what it is certain of and declines everything else: wrong or unusual command lines, and ``--help``, are
argparse's, the only one that explains or refuses. What it takes means the same to both, which a property holds.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SWITCHES = {
    "-i": "interactive",
    "--interactive": "interactive",
    "-t": "tty",
    "--tty": "tty",
    "-d": "detach",
    "--detach": "detach",
    "--json": "json",
}
_VALUES = {"-e": "env", "--env": "env", "-w": "cwd", "--cwd": "cwd", "--timeout": "timeout", "--user": "user"}


class ExecArguments:
    """What argparse makes of the command line of ``exec``, under the same names."""

    def __init__(self) -> None:
        self.interactive = False
        self.tty = False
        self.detach = False
        self.json = False
        self.user: str | None = None
        self.timeout: str | None = None
        self.cwd: str | None = None
        self.env: list[str] = []
        self.env_file: list[list[str]] = []
        self.sandbox = ""
        self.command: list[str] = []


def exec_arguments(words: Sequence[str]) -> ExecArguments | None:
    """The meaning of the words after ``exec``, or None if argparse must be asked."""
    arguments = ExecArguments()
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            arguments.sandbox = word
            arguments.command = without_dashes(list(rest))
            return arguments if word and _is_plain(arguments.command) else None
        if word in _VALUES:
            taken = _take_value(arguments, _VALUES[word], next(rest, ""))
        elif "=" in word:
            name, _, value = word.partition("=")
            taken = name.startswith("--") and name in _VALUES and _take_value(arguments, _VALUES[name], value)
        else:
            taken = _take_switches(arguments, word)
        if not taken:
            return None
    return None


def without_dashes(command: list[str]) -> list[str]:
    """The command, without the ``--`` that may stand before it."""
    return command[1:] if command[:1] == ["--"] else command


def _is_plain(command: Sequence[str]) -> bool:
    """Whether this is a command, and not a second ``--``, of which each version of argparse thinks its own."""
    return bool(command) and command[0] != "--"


def _take_value(arguments: ExecArguments, name: str, value: str) -> bool:
    if not value or value.startswith("-"):
        return False
    if name != "env":
        setattr(arguments, name, value)
    elif value.startswith("="):
        return False
    else:
        arguments.env.append(value)
    return True


def _take_switches(arguments: ExecArguments, word: str) -> bool:
    """Take one switch, or several in one word, as in ``-it``."""
    switches = [word] if word in _SWITCHES else [f"-{letter}" for letter in word[1:]]
    for switch in switches:
        if switch not in _SWITCHES:
            return False
        setattr(arguments, _SWITCHES[switch], True)
    return bool(switches)
