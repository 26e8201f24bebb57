"""``pool`` and ``template``: warm slots, and the recipes that they are made by."""

from __future__ import annotations

import argparse
import sys

from sandboxd.cli import render_host, verb
from sandboxd.cli.session import USAGE, columns, request, say, show, show_json
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


_EXAMPLES = """\
sandboxctl pool warm web
sandboxctl pool warm web 2
sandboxctl pool resize web 2 4
sandboxctl pool drain web
sandboxctl pool warm 2

A number without a template before it is meant for the template default.
"""


def _add_pool(parser: Parser) -> None:
    verb.add_text(parser, _EXAMPLES)
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="show warm slots, and how they were used")
    listing.set_defaults(action=_list)
    resizing = actions.add_parser("resize", help="change how many slots a template has, until the daemon ends")
    resizing.set_defaults(action=_resize)
    _add_words(resizing, "MIN", "MAX")
    resizing.add_argument("--min", type=int, metavar="NUMBER", help="slots that are always kept warm")
    resizing.add_argument("--max", type=int, metavar="NUMBER", help="slots at most; 0: no pool")
    draining = actions.add_parser("drain", help="let all slots go, and make no more until resize or warm")
    draining.set_defaults(action=_drain)
    _add_words(draining)
    warming = actions.add_parser("warm", help="make slots now, and wait for them")
    warming.set_defaults(action=_warm)
    _add_words(warming, "NUMBER")
    warming.add_argument("--timeout", metavar="TIME", help="default: 2m")
    for action in (resizing, draining, warming):
        verb.add_template(action)
    for action in (listing, resizing, draining, warming):
        verb.add_json(action)


def _add_words(parser: argparse.ArgumentParser, *numbers: str) -> None:
    """The template, and after it these numbers; all of them may be left out."""
    parser.add_argument("words", action="append", metavar="TEMPLATE", nargs="?", help="the same as --template")
    for name in numbers:
        parser.add_argument("words", action="append", metavar=name, nargs="?", help=_NUMBERS[name])


_NUMBERS = {"NUMBER": "how many; default: 1", "MIN": "the same as --min", "MAX": "the same as --max"}


def _take_words(arguments: argparse.Namespace, *numbers: str) -> bool:
    """Put the words where the flags are that mean the same. False: they make no sense, which is said."""
    words = [word for word in arguments.words if word is not None]
    given = {}
    if words and not words[0].isdecimal():
        given["template"] = words.pop(0)
    for word, name in zip(words, numbers, strict=False):
        if not (word.isascii() and word.isdecimal()):
            say(f"{word!r} is no number")
            return False
        given[name] = int(word)
    if len(words) > len(numbers):
        say(f"{words[-1]!r} is one word too many")
        return False
    for name, value in given.items():
        if getattr(arguments, name, None) is not None:
            say(f"{name} is given twice")
            return False
        setattr(arguments, name, value)
    return True


def _run(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _list(arguments: argparse.Namespace) -> int:
    reply = request("pool/list")
    if arguments.json:
        show_json(reply)
    else:
        show(render_host.pools(reply["pools"], columns()))
    return 0


def _resize(arguments: argparse.Namespace) -> int:
    if not _take_words(arguments, "min", "max"):
        return _usage("resize")
    reply = request("pool/resize", template=arguments.template, min=arguments.min, max=arguments.max)
    if arguments.json:
        show_json(reply)
    else:
        show(render_host.pools(reply["pools"], columns()))
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    if not _take_words(arguments):
        return _usage("drain")
    reply = request("pool/drain", template=arguments.template)
    if arguments.json:
        show_json(reply)
    else:
        show(f"{reply['drained']} let go")
    return 0


def _warm(arguments: argparse.Namespace) -> int:
    arguments.count = None
    if not _take_words(arguments, "count"):
        return _usage("warm")
    reply = request("pool/warm", template=arguments.template, count=arguments.count, timeout=arguments.timeout)
    if arguments.json:
        show_json(reply)
    else:
        show(f"{reply['warm']} warm")
    return 0


def _usage(action: str) -> int:
    sys.stderr.write(f"hint: sandboxctl pool {action} --help\n")
    return USAGE


def _add_template(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="list the named recipes for sandboxes")
    listing.set_defaults(action=_list_templates)
    getting = actions.add_parser("get", help="show one of them")
    getting.set_defaults(action=_get_template)
    getting.add_argument("template", metavar="TEMPLATE", nargs="?", default="default", help="default: default")
    for action in (listing, getting):
        verb.add_json(action)


def _list_templates(arguments: argparse.Namespace) -> int:
    reply = request("template/list")
    if arguments.json:
        show_json(reply)
    else:
        show(render_host.templates(reply["templates"], columns()))
    return 0


def _get_template(arguments: argparse.Namespace) -> int:
    reply = request("template/get", template=arguments.template)
    if arguments.json:
        show_json(reply)
    else:
        show(render_host.template(reply, columns()))
    return 0


VERBS = {
    "pool": Verb("show and change warm slots", _add_pool, _run),
    "template": Verb("show the named recipes for sandboxes", _add_template, _run),
}
