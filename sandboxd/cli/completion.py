"""``completion``: what a shell needs to complete our command lines."""

from __future__ import annotations

import argparse

from sandboxd.cli.session import show
from sandboxd.cli.verb import Verb


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="to use it: source <(sandboxctl completion bash)")


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    from sandboxd.cli.main import build_parser

    show(shtab.complete(build_parser(), shell=arguments.shell))
    return 0


VERBS = {"completion": Verb("print a script that makes the shell complete sandboxctl", _add_completion, _completion)}
