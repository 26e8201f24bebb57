"""``sandboxctl``: finds the verb, builds its parser and no other, and turns failures into exit codes.

Verbs are one module per family, imported only when one of them is asked for. The hot ones (``exec``, ``run``, ``ls``,
``stats``) import hardly more than argparse, and the everyday forms of ``exec`` not even that: see ``shortcut``.
"""

from __future__ import annotations

import errno
import os
import sys

from sandboxd.cli.session import FAILURE, INTERRUPTED, USAGE, complain, exit_code_of, say
from sandboxd.client import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sandboxd.cli.verb import Parser, Verb

FAMILIES = {
    "run": "commands",
    "create": "sandboxes",
    "exec": "commands",
    "shell": "commands",
    "session": "shells",
    "cp": "copy",
    "ps": "background",
    "logs": "background",
    "attach": "background",
    "wait": "background",
    "kill": "background",
    "files": "files",
    "ls": "sandboxes",
    "inspect": "sandboxes",
    "stats": "usage",
    "top": "top",
    "metrics": "usage",
    "update": "sandboxes",
    "workspace": "workspaces",
    "verify": "sandboxes",
    "stop": "sandboxes",
    "start": "sandboxes",
    "timeout": "lifetime",
    "touch": "lifetime",
    "pause": "lifetime",
    "resume": "lifetime",
    "rm": "sandboxes",
    "events": "lifetime",
    "audit": "audit",
    "network": "network",
    "forward": "network",
    "ports": "network",
    "service": "services",
    "pool": "pools",
    "template": "pools",
    "secret": "secrets",
    "image": "images",
    "doctor": "daemon",
    "gc": "daemon",
    "daemon": "daemon",
    "config": "daemon",
    "version": "daemon",
    "completion": "completion",
}
"""In the order of ``--help``."""

_FLAGS = ("-h", "--help", "--version")
_STDERR = 2
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def program() -> NoReturn:
    """Run this process's command line and end the process: at once, for tearing an interpreter down takes 3 ms."""
    code = main()
    try:
        sys.stderr.flush()
    except OSError:
        code = code or FAILURE
    finally:
        os._exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    _fill_standard_descriptors()
    try:
        try:
            code = _run(words)
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except RpcError as error:
        complain(error)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _forget_output()
        return FAILURE
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        _forget_output()
        try:
            say(f"cannot write: {error.strerror}")
        except OSError:
            return FAILURE
        return FAILURE
    return code


def _forget_output() -> None:
    """What is still buffered must not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill_standard_descriptors() -> None:
    """Put /dev/null where the caller left stdin, stdout or stderr closed: our socket must not get that number."""
    while (number := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= _STDERR:
        continue
    os.close(number)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - for the life of the process


def _run(words: list[str]) -> int:
    name = words[0] if words else ""
    if name == "exec":
        from sandboxd.cli import execution, shortcut

        arguments = shortcut.exec_arguments(words[1:])
        if arguments is not None:
            return execution.execute(arguments)
    if name not in FAMILIES:
        return _without_verb(words)
    from sandboxd.cli.verb import Parser

    verb = find_verb(name)
    parser = Parser(prog=f"sandboxctl {name}", description=verb.summary)
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words[1:]))


def _without_verb(words: list[str]) -> int:
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return USAGE
    if words[0] not in _FLAGS:
        from sandboxd.cli import unknown

        return unknown.refuse(words[0], FAMILIES)
    parser.parse_args(words)
    return 0


def find_verb(name: str) -> Verb:
    """The verb, from its family's module."""
    import importlib

    family = importlib.import_module(f"sandboxd.cli.{FAMILIES[name]}")
    verb: Verb = family.VERBS[name]
    return verb


def build_parser() -> Parser:
    """The parser of everything, for help and for completion."""
    from sandboxd import __version__
    from sandboxd.cli.verb import Parser

    parser = Parser(prog="sandboxctl", description="Local sandboxes in milliseconds, with limits that are proven.")
    parser.add_argument("--version", action="version", version=f"sandboxctl {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name in FAMILIES:
        verb = find_verb(name)
        verb.add_arguments(verbs.add_parser(name, help=verb.summary, description=verb.summary))
    return parser


if __name__ == "__main__":
    program()
