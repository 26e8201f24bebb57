"""What to type instead of a command or a flag that does not exist."""

from __future__ import annotations

import re
import sys

from sandboxd.cli.session import USAGE, say
from sandboxd.spelling import nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandboxd.cli.verb import Parser

ELSEWHERE = {
    "build": "image build",
    "cat": "files cat",
    "cp": "exec -i SANDBOX sh -c 'cat > FILE' < FILE",
    "dashboard": "top",
    "delete": "rm",
    "help": "--help",
    "images": "image list",
    "info": "daemon status",
    "list": "ls",
    "mkdir": "files mkdir",
    "mv": "files mv",
    "new": "create",
    "pull": "image build",
    "remove": "rm",
    "restart": "daemon restart",
    "sh": "shell",
    "stat": "files stat",
    "status": "daemon status",
    "watch": "files watch",
    "write": "files write",
    "-v": "--version",
    "-V": "--version",
}
"""Words of other programs, or older ones, and what means the same here."""


FLAGS_ELSEWHERE = {
    "--full": "--mode",
    "--none": "--mode",
    "--network": "--mode",
    "--mode": "--network",
    "--read-only": "--ro",
    "--readonly": "--ro",
    "-v": "--mount",
    "--volume": "--mount",
    "--workdir": "--cwd",
}
"""Flags of other programs or verbs, and those that mean the same where there are such."""

VALUES_ELSEWHERE = {"--full": "full", "--none": "none", "-v": "SRC:DST[:ro]", "--volume": "SRC:DST[:ro]"}
"""With what these go."""

VERBS_ELSEWHERE = {
    "-p": "sandboxctl forward SANDBOX [HOST_PORT:]PORT",
    "--publish": "sandboxctl forward SANDBOX [HOST_PORT:]PORT",
}
"""Flags of other programs for what is a verb here."""

SAME = {"ls": "list", "list": "ls"}
"""Actions, each by the name that another verb has for it."""

_CHOICE = re.compile(r"invalid choice: '(?P<word>.*)' \(choose from (?P<words>[^()]*)\)\Z", re.DOTALL)
_STRAY = "unrecognized arguments: "


def explained(message: str, parser: Parser) -> tuple[str, str]:
    """What argparse says is wrong, as we say it, and the hint."""
    more = f"{parser.prog} --help"
    if message.startswith(_STRAY):
        word = message.removeprefix(_STRAY).split()[0]
        if word.startswith("-"):
            flag = word.partition("=")[0]
            return f"unknown flag {flag!r}", _instead_of(flag, parser) or more
        return message, _as_flag(word, parser) or more
    choice = _CHOICE.search(message)
    if choice is not None:
        words = re.findall(r"[\w-]+", choice["words"])
        same = SAME.get(choice["word"])
        meant = same if same in words else nearest(choice["word"], words)
        return message, f"did you mean {meant}?" if meant else more
    return message, more


def _as_flag(word: str, parser: Parser) -> str:
    return f"{parser.flag_of_word} {word}" if parser.flag_of_word else ""


def _instead_of(flag: str, parser: Parser) -> str:
    if flag in VERBS_ELSEWHERE:
        return VERBS_ELSEWHERE[flag]
    flags = parser._option_string_actions
    meant = FLAGS_ELSEWHERE.get(flag)
    if meant in flags:
        return f"did you mean {meant}{' ' + VALUES_ELSEWHERE[flag] if flag in VALUES_ELSEWHERE else ''}?"
    meant = nearest(flag, flags)
    return f"did you mean {meant}?" if meant else ""


def refuse(word: str, verbs: Iterable[str]) -> int:
    """Refuse a first word that is no verb and return the exit code."""
    kind = "flag" if word.startswith("-") else "command"
    say(f"unknown {kind} {word!r}")
    better = ELSEWHERE.get(word) or nearest(word, (*verbs, "--help", "--version")) or "--help"
    sys.stderr.write(f"hint: sandboxctl {better}\n")
    return USAGE
