"""``completion``: what a shell needs to complete our command lines."""

from __future__ import annotations

import argparse

from sandboxd.cli.session import show
from sandboxd.cli.verb import COMMANDS_FUNCTION, NAMES_FUNCTION, PLACES_FUNCTION, SHELLS_FUNCTION, Verb

_LIST = """sandboxctl daemon status >/dev/null 2>&1 &&
    sandboxctl ls 2>/dev/null | awk 'NR > 1 { print $1; if ($2 != "-") print $2 }'"""
"""To press a key is not to start a daemon."""

_LIST_OF = {SHELLS_FUNCTION: "session ls", COMMANDS_FUNCTION: "ps"}
"""What lists the things of a sandbox, with their ids at the beginning of each line."""


def _ids(verb: str, word_before: str) -> str:
    """The script that prints the ids of the things of a sandbox."""
    return f"""sandboxctl daemon status >/dev/null 2>&1 &&
    sandboxctl {verb} -- "{word_before}" 2>/dev/null | awk 'NR > 1 {{ print $1 }}'"""


def _functions_for_bash() -> str:
    return "".join(
        f"""
{function}() {{
  compgen -W "$({_ids(verb, "${COMP_WORDS[COMP_CWORD-1]}")})" -- "$1"
}}
"""
        for function, verb in _LIST_OF.items()
    )


def _functions_for_zsh() -> str:
    return "".join(
        f"""
{function}() {{
  local -a ids
  ids=(${{(f)"$({_ids(verb, "${words[CURRENT-1]}")})"}})
  compadd -a ids
}}
"""
        for function, verb in _LIST_OF.items()
    )


PREAMBLE = {
    "bash": f"""{_functions_for_bash()}
{NAMES_FUNCTION}() {{
  compgen -W "$({_LIST})" -- "$1"
}}
{PLACES_FUNCTION}() {{
  compgen -S : -W "$({_LIST})" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": f"""{_functions_for_zsh()}
{NAMES_FUNCTION}() {{
  local -a names
  names=(${{(f)"$({_LIST})"}})
  compadd -a names
}}
{PLACES_FUNCTION}() {{
  local -a names
  names=(${{(f)"$({_LIST})"}})
  compadd -S : -a names
  _files
}}
""",
}


def _shell(name: str) -> str:
    if name not in PREAMBLE:
        raise argparse.ArgumentTypeError(f"there is no completion for {name!r}: {' and '.join(PREAMBLE)} have one")
    return name


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", type=_shell, choices=tuple(PREAMBLE), help="to use it: source <(sandboxctl completion bash)"
    )


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    from sandboxd.cli.main import build_parser

    show(shtab.complete(build_parser(), shell=arguments.shell, preamble=PREAMBLE[arguments.shell]))
    return 0


VERBS = {"completion": Verb("print a script that makes the shell complete sandboxctl", _add_completion, _completion)}
