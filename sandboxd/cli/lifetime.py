"""``pause resume``: how long sandboxes last, and what they do meanwhile."""

from __future__ import annotations

import argparse

from sandboxd.cli import verb
from sandboxd.cli.sandboxes import each
from sandboxd.cli.verb import Verb


def _add_several(parser: argparse.ArgumentParser) -> None:
    verb.add_sandboxes(parser)
    verb.add_json(parser)


def _pause(arguments: argparse.Namespace) -> int:
    return each(arguments, "sandbox/pause", {})


def _resume(arguments: argparse.Namespace) -> int:
    return each(arguments, "sandbox/resume", {})


VERBS = {
    "pause": Verb("freeze sandboxes; they keep their memory, and take no CPU time", _add_several, _pause),
    "resume": Verb("let paused sandboxes go on", _add_several, _resume),
}
