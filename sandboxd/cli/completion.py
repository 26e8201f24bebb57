"""``completion``: what a shell needs to complete our command lines."""

from __future__ import annotations

import argparse

from sandboxd.cli.session import show
from sandboxd.cli.verb import NAMES_FUNCTION, PLACES_FUNCTION, Verb

_LIST = """sandboxctl daemon status >/dev/null 2>&1 &&
    sandboxctl ls 2>/dev/null | awk 'NR > 1 { print $1; if ($2 != "-") print $2 }'"""
"""To press a key is not to start a daemon."""

PREAMBLE = {
    "bash": f"""
{NAMES_FUNCTION}() {{
  compgen -W "$({_LIST})" -- "$1"
}}
{PLACES_FUNCTION}() {{
  compgen -S : -W "$({_LIST})" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": f"""
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


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="to use it: source <(sandboxctl completion bash)")


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    from sandboxd.cli.main import build_parser

    show(shtab.complete(build_parser(), shell=arguments.shell, preamble=PREAMBLE[arguments.shell]))
    return 0


VERBS = {"completion": Verb("print a script that makes the shell complete sandboxctl", _add_completion, _completion)}
