"""``pool`` and ``template``: warm slots, and the recipes that they are made by."""

from __future__ import annotations

import argparse

from sandboxd.cli import render, verb
from sandboxd.cli.session import request, show, show_json
from sandboxd.cli.verb import Parser, Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def _add_pool(parser: Parser) -> None:
    parser.flag_of_word = "--template"
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="show warm slots, and how they were used")
    listing.set_defaults(action=_list)
    resizing = actions.add_parser("resize", help="change how many slots a template has, until the daemon ends")
    resizing.set_defaults(action=_resize)
    resizing.add_argument("--min", type=int, metavar="NUMBER", help="slots that are always kept warm")
    resizing.add_argument("--max", type=int, metavar="NUMBER", help="slots at most; 0: no pool")
    draining = actions.add_parser("drain", help="let all slots go, and make no more until resize or warm")
    draining.set_defaults(action=_drain)
    warming = actions.add_parser("warm", help="make slots now, and wait for them")
    warming.set_defaults(action=_warm)
    warming.add_argument("count", type=int, metavar="NUMBER", nargs="?", default=1, help="default: 1")
    warming.add_argument("--timeout", metavar="TIME", help="default: 2m")
    warming.flag_of_word = "--template"
    for action in (resizing, draining, warming):
        verb.add_template(action)
    for action in (listing, resizing, draining, warming):
        verb.add_json(action)


def _run(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _list(arguments: argparse.Namespace) -> int:
    reply = request("pool/list")
    if arguments.json:
        show_json(reply)
    else:
        show(render.pools(reply["pools"]))
    return 0


def _resize(arguments: argparse.Namespace) -> int:
    reply = request("pool/resize", template=arguments.template, min=arguments.min, max=arguments.max)
    if arguments.json:
        show_json(reply)
    else:
        show(render.pools(reply["pools"]))
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    reply = request("pool/drain", template=arguments.template)
    if arguments.json:
        show_json(reply)
    else:
        show(f"{reply['drained']} let go")
    return 0


def _warm(arguments: argparse.Namespace) -> int:
    reply = request("pool/warm", template=arguments.template, count=arguments.count, timeout=arguments.timeout)
    if arguments.json:
        show_json(reply)
    else:
        show(f"{reply['warm']} warm")
    return 0


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
        show(render.templates(reply["templates"]))
    return 0


def _get_template(arguments: argparse.Namespace) -> int:
    reply = request("template/get", template=arguments.template)
    if arguments.json:
        show_json(reply)
    else:
        show(render.template(reply))
    return 0


VERBS = {
    "pool": Verb("show and change warm slots", _add_pool, _run),
    "template": Verb("show the named recipes for sandboxes", _add_template, _run),
}
