"""What a verb of the command line is, and the flags that several of them share."""

from __future__ import annotations

import argparse
import os
import sys

from sandboxd.cli.session import USAGE
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

COLUMNS_DEFAULT = 80
COLUMNS_MAX = 120
"""Longer lines are hard to read."""

LINES_MAX = 1_000_000

NAMES_FUNCTION = "_sandboxctl_names"
"""The shell's function that completes ids and names of sandboxes."""

SHELLS_FUNCTION = "_sandboxctl_shells"
"""That for ids of shells, of the sandbox that is the word before."""

COMMANDS_FUNCTION = "_sandboxctl_commands"
"""The same, of commands."""

PLACES_FUNCTION = "_sandboxctl_places"
"""That for paths, and for sandboxes that a path is to follow."""


class Verb:
    """One verb: what it is for, its flags, and what carries it out and returns the exit code."""

    __slots__ = ("add_arguments", "run", "summary")

    def __init__(
        self,
        summary: str,
        add_arguments: Callable[[Parser], object],
        run: Callable[[argparse.Namespace], int],
    ) -> None:
        self.summary = summary
        self.add_arguments = add_arguments
        self.run = run


class _Help(argparse.HelpFormatter):
    """Knows its width: argparse makes one per flag, and to find the width itself it would import shutil."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_help_columns())


class _HelpWithText(_Help):
    """Leaves the text below the flags as it was written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _help_columns() -> int:
    try:
        columns = os.get_terminal_size(1).columns
    except OSError:
        columns = 0
    return min(columns or COLUMNS_DEFAULT, COLUMNS_MAX) - 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to read more."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)
        self.flag_of_word = ""
        """Of a word too many: the flag that it was probably meant for."""

    def error(self, message: str) -> NoReturn:
        """Exit with the code for wrong usage."""
        from sandboxd.cli import unknown

        message, hint = unknown.explained(message, self)
        sys.stderr.write(f"sandboxctl: {message}\nhint: {hint}\n")
        raise SystemExit(USAGE)


def add_text(parser: argparse.ArgumentParser, text: str) -> None:
    """Text below the flags, with lines of its own: what there is to know, and examples."""
    parser.epilog = text
    parser.formatter_class = _HelpWithText


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print the daemon's reply as JSON")


def add_sandbox(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """One sandbox."""
    text = "id, unambiguous beginning of one, or name"
    if optional:
        complete_names(parser.add_argument("sandbox", metavar="SANDBOX", nargs="?", help=text))
    else:
        complete_names(parser.add_argument("sandbox", metavar="SANDBOX", help=text))


def add_sandboxes(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Several sandboxes."""
    names = parser.add_argument(
        "sandboxes",
        metavar="SANDBOX",
        nargs="*" if optional else "+",
        help="ids, unambiguous beginnings of ids, or names",
    )
    complete_names(names)


def complete_names(action: argparse.Action) -> None:
    """Have the shell complete ids and names of sandboxes."""
    # What shtab looks for; see ``completion`` for the function.
    action.complete = {"bash": NAMES_FUNCTION, "zsh": NAMES_FUNCTION}  # type: ignore[attr-defined]


def complete_shells(action: argparse.Action) -> None:
    """Have the shell complete ids of shells of the sandbox that was named before."""
    action.complete = {"bash": SHELLS_FUNCTION, "zsh": SHELLS_FUNCTION}  # type: ignore[attr-defined]


def complete_commands(action: argparse.Action) -> None:
    """The same, of commands."""
    action.complete = {"bash": COMMANDS_FUNCTION, "zsh": COMMANDS_FUNCTION}  # type: ignore[attr-defined]


def complete_places(action: argparse.Action) -> None:
    """Have the shell complete paths, and sandboxes that a path is to follow."""
    action.complete = {"bash": PLACES_FUNCTION, "zsh": PLACES_FUNCTION}  # type: ignore[attr-defined]


def add_labels(parser: argparse.ArgumentParser, text: str) -> None:
    """``--label``, which may be repeated."""
    parser.add_argument(
        *("--label", "--metadata"),
        dest="metadata",
        action="append",
        default=[],
        type=pair,
        metavar="NAME=VALUE",
        help=text,
    )


def add_engine(parser: argparse.ArgumentParser) -> None:
    """``--engine``."""
    parser.add_argument("--engine", choices=("podman", "docker"), help="default: the daemon's")


def add_template(parser: argparse.ArgumentParser) -> None:
    """``--template``."""
    parser.add_argument("--template", type=not_empty, metavar="NAME", help="a named recipe; default: default")


LIMITS = (
    (("-m", "--memory"), "SIZE", "memory and swap together, such as 512m or 2g"),
    (("--cpus",), "NUMBER", "CPUs, such as 0.5"),
    (("--pids",), "NUMBER", "processes and threads at once"),
    (("--cpuset",), "LIST", "host CPUs to run on, such as 0-2,4"),
)
LIMITS_OF_CREATE = (
    (("--shm",), "SIZE", "size of /dev/shm"),
    (("--tmp",), "SIZE", "size of /tmp, and of the home directory"),
    (("--nofile",), "NUMBER", "open files per process"),
)


def add_limits(parser: argparse.ArgumentParser, *, create: bool) -> None:
    """The limits: all of them on create, those that can change on update."""
    group = parser.add_argument_group("limits")
    for names, metavar, text in (*LIMITS, *LIMITS_OF_CREATE) if create else LIMITS:
        group.add_argument(*names, metavar=metavar, help=text)
    group.add_argument(
        "--degraded",
        action="store_const",
        const="degraded",
        help="go on, and say so, where this host cannot enforce a limit",
    )


def limits_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The limits that were given."""
    names = (names[-1].lstrip("-") for names, _, _ in (*LIMITS, *LIMITS_OF_CREATE))
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def add_idle(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--idle-timeout`` and ``--on-timeout``."""
    parser.add_argument(
        "--idle-timeout", metavar="TIME", help="how long nothing may happen in it, such as 10m; none: no limit"
    )
    parser.add_argument(
        "--on-timeout", choices=("kill", "pause"), help="what happens then: kill removes it, pause keeps its memory"
    )


def add_env(parser: argparse.ArgumentParser) -> None:
    """``--env`` and ``--env-file``."""
    parser.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        type=_assignment_or_name,
        metavar="NAME[=VALUE]",
        help="set a variable; without a value it is taken from the caller's environment",
    )
    parser.add_argument(
        "--env-file",
        action="append",
        default=[],
        type=_env_file,
        metavar="FILE",
        help="the same, one per line; lines that start with # are comments",
    )


def not_empty(text: str) -> str:
    """Some text: an unset variable of a script's must not mean the default."""
    if not text:
        raise argparse.ArgumentTypeError("it must not be empty")
    return text


def host_path(path: str, what: str) -> str:
    """A path as it was typed, made absolute: ``~`` is the caller's home, the rest begins where the caller is.

    Raises:
        RpcError: The directory that the caller is in was removed.
    """
    try:
        return os.path.abspath(os.path.expanduser(path))
    except FileNotFoundError:
        raise RpcError(
            0, "invalid_argument", f"cannot use {path!r} as {what}", "the current directory was removed", "cd"
        ) from None


def base64_unless_utf8(path: str) -> str | None:
    """The bytes of a path that is not UTF-8, as the protocol takes them; None: it is."""
    try:
        path.encode()
    except UnicodeEncodeError:
        import base64

        return base64.b64encode(os.fsencode(path)).decode("ascii")
    return None


MOUNT_KEYS = {"src": "src", "source": "src", "dst": "dst", "target": "dst", "destination": "dst"}


def mount(text: str) -> dict[str, str]:
    """One ``--mount``: ``SRC:DST[:ro]``, or ``type=bind,src=SRC,dst=DST[,ro]``, in which CSV quotes may stand."""
    if "=" in text.partition(",")[0]:
        return _mount_of_fields(text)
    parts = text.split(":")
    mode = parts.pop() if len(parts) > 2 and parts[-1] in {"ro", "rw"} else "rw"
    if len(parts) != 2 or not all(parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form SRC:DST[:ro]; with other colons: type=bind,src=SRC,dst=DST"
        )
    return {"src": parts[0], "dst": parts[1], "mode": mode}


def _mount_of_fields(text: str) -> dict[str, str]:
    import csv

    found = {"mode": "rw"}
    try:
        fields = next(csv.reader([text], strict=True))
    except csv.Error:
        raise argparse.ArgumentTypeError(f"{text!r} has a quote that does not end") from None
    for field in fields:
        name, equals, value = field.partition("=")
        if name in MOUNT_KEYS and value:
            found[MOUNT_KEYS[name]] = value
        elif name in {"ro", "readonly"} and (not equals or value in {"true", "false"}):
            found["mode"] = "rw" if value == "false" else "ro"
        elif field != "type=bind":
            raise argparse.ArgumentTypeError(f"{field!r} is none of type=bind, src=PATH, dst=PATH and ro")
    if "src" not in found or "dst" not in found:
        raise argparse.ArgumentTypeError(f"{text!r} needs src=PATH and dst=PATH")
    return found


def lines(text: str) -> int:
    """How many lines."""
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(LINES_MAX)) or int(text) > LINES_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number up to {LINES_MAX}")
    return int(text)


def pair(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _assignment_or_name(text: str) -> str:
    # The value may be a secret, so it is not repeated in the message.
    if not text.partition("=")[0]:
        raise argparse.ArgumentTypeError("a variable needs a name: NAME=VALUE or NAME")
    return text


def _env_file(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise argparse.ArgumentTypeError(f"cannot read {path!r}: {reason}") from None
    return [_assignment_or_name(line) for line in lines if line and not line.startswith("#")]
