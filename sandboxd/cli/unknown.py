"""What to type instead of a command or a flag that does not exist."""

from __future__ import annotations

import difflib
import sys

from sandboxd.cli.session import USAGE, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

ELSEWHERE = {
    "build": "image build",
    "cat": "files cat",
    "cp": "exec -i SANDBOX sh -c 'cat > FILE' < FILE",
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
    "top": "stats",
    "watch": "files watch",
    "write": "files write",
    "-v": "--version",
    "-V": "--version",
}
"""Words of other programs, or older ones, and what means the same here."""


def refuse(word: str, verbs: Iterable[str]) -> int:
    """Refuse a first word that is no verb and return the exit code."""
    kind = "flag" if word.startswith("-") else "command"
    say(f"unknown {kind} {word!r}")
    better = ELSEWHERE.get(word) or nearest(word, (*verbs, "--help", "--version")) or "--help"
    sys.stderr.write(f"hint: sandboxctl {better}\n")
    return USAGE


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of the words that was probably meant, if any."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return found[0] if found else None
