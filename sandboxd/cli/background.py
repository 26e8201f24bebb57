"""``ps logs attach wait kill``: commands that run without us, and what is left of those that did."""

from __future__ import annotations

import argparse
import signal
import time

from sandboxd.cli import detach_keys, render, verb, wire
from sandboxd.cli.execution import SIGNAL_BASE, exit_code_of_end, fail
from sandboxd.cli.session import call, columns, connect, connect_after, request, say, show, show_json
from sandboxd.cli.spooled import Output, find, look, say_dropped
from sandboxd.cli.verb import Verb
from sandboxd.client import RpcError, result_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from sandboxd.client import Connection

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def _add_command(parser: argparse.ArgumentParser) -> None:
    verb.add_sandbox(parser)
    named = parser.add_argument(
        "command", metavar="COMMAND", help="id, or unambiguous beginning of one: see sandboxctl ps"
    )
    verb.complete_commands(named)


# --- ps


def _add_ps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-a", "--all", action="store_true", help="also those that have ended, which are shown without it as well"
    )
    verb.add_sandbox(parser)
    verb.add_json(parser)


def _ps(arguments: argparse.Namespace) -> int:
    reply = request("commands/list", sandbox=arguments.sandbox)
    if arguments.json:
        show_json(reply)
    else:
        show(render.command_list(reply["commands"], int(time.time() * 1000), columns()))
    return 0


# --- logs


def _size(text: str) -> int:
    """Bytes, or such as ``64k``."""
    digits = text.lower().rstrip("kmg")
    unit = text[len(digits) :].lower()
    if not (digits.isascii() and digits.isdigit()) or unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: a number, or such as 64k or 2m")
    return int(digits) * _UNITS[unit]


def _add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the command ends; exit code 0")
    streams = parser.add_mutually_exclusive_group()
    for name in ("stdout", "stderr"):
        streams.add_argument(f"--{name}", dest="stream", action="store_const", const=name, help=f"only its {name}")
    parser.add_argument("--tail", metavar="SIZE", type=_size, help="only the last bytes of each stream, such as 64k")
    _add_command(parser)


def _logs(arguments: argparse.Namespace) -> int:
    with connect() as connection:
        command = find(connection, arguments.sandbox, arguments.command)
        streams = look(connection, command)
        if arguments.stream is not None and arguments.stream not in streams:
            call(connection, "commands/logs", None, **command, stream=arguments.stream, length=1)
        totals = {name: reply["bytes_total"] for name, reply in streams.items()}
        wanted = {name: total for name, total in totals.items() if arguments.stream in (None, name)}
        tails = {name: total if arguments.tail is None else arguments.tail for name, total in wanted.items()}
        positions = {name: max(total - tails[name], 0) for name, total in wanted.items()}
        ends = None
        if not (arguments.follow or streams["stdout"]["ended"]):
            ends = {name: _end_to_wait_for(name, streams[name]) for name in wanted}
        _show(connection, command, {**totals, **positions}, Output(positions, say_dropped), ends)
    return 0


def _show(
    connection: Connection,
    command: Mapping[str, str],
    offsets: Mapping[str, int],
    output: Output,
    ends: Mapping[str, int] | None,
) -> None:
    """Show output up to these ends, or up to the command's; when the daemon is restarted, from there on."""
    try:
        _show_on(connection, command, offsets, output, ends)
    except RpcError as error:
        with connect_after(error) as following:
            _show(following, command, {**offsets, **output.positions}, output, ends)


def _end_to_wait_for(name: str, last: dict[str, Any]) -> int:
    """Up to where the output of a running command comes for certain: its last byte may not have been kept."""
    if last["bytes_total"] and not last["data"]:
        say(f"the end of {name} was not kept")
        return 0
    return int(last["bytes_total"])


def _show_on(
    connection: Connection,
    command: Mapping[str, str],
    offsets: Mapping[str, int],
    output: Output,
    ends: Mapping[str, int] | None,
) -> None:
    params = wire.build("commands/connect", **command, **{f"{name}_offset": at for name, at in offsets.items()})
    request_id = connection.send("commands/connect", params)
    while ends is None or not output.reached(ends):
        for message in connection.read():
            if "method" not in message.content:
                connection.keep(message)
            elif message.content["method"] == "commands/output":
                told = message.content["params"]
                output.take(told, None if ends is None else ends.get(told["stream"]))
        reply = connection.take_reply(request_id)
        if reply is not None:
            output.finish(result_of(reply))
            return


# --- attach


def _keys(text: str) -> bytes:
    try:
        return detach_keys.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_attach(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Follow a command that was started with exec -d, and type into it. It goes on when you leave: by the detach"
        " keys where it has a terminal (exec -dt), else by Ctrl-C."
    )
    parser.add_argument(
        "--detach-keys",
        metavar="KEYS",
        type=_keys,
        default=detach_keys.DEFAULT,
        help=f"what leaves it running; default: {detach_keys.DEFAULT}",
    )
    parser.add_argument("--no-stdin", action="store_true", help="only watch: nothing that is typed reaches it")
    _add_command(parser)


def _attach(arguments: argparse.Namespace) -> int:
    from sandboxd.cli.reattach import Reattached

    try:
        with connect() as connection:
            command = find(connection, arguments.sandbox, arguments.command)
            keys = detach_keys.DetachKeys(arguments.detach_keys)
            attached = Reattached(connection, command, keys, interactive=not arguments.no_stdin)
            end = attached.run()
    except RpcError as error:
        return fail(error)
    if end is not None:
        return exit_code_of_end(end, arguments.sandbox)
    again = f"sandboxctl attach {command['sandbox']} {command['command_id']}"
    say(f"command {command['command_id']} goes on; to come back: {again}")
    return SIGNAL_BASE + attached.left_by if attached.left_by else 0


# --- wait, kill


def _add_wait(parser: argparse.ArgumentParser) -> None:
    _add_command(parser)
    verb.add_json(parser)


def _wait(arguments: argparse.Namespace) -> int:
    try:
        with connect() as connection:
            end = _end(connection, arguments)
    except RpcError as error:
        return fail(error)
    if arguments.json:
        show_json(end)
    return exit_code_of_end(end, arguments.sandbox)


def _end(connection: Connection, arguments: argparse.Namespace) -> dict[str, Any]:
    """How it ended; when the daemon is restarted, the next one is asked."""
    try:
        return call(connection, "commands/wait", None, **find(connection, arguments.sandbox, arguments.command))
    except RpcError as error:
        with connect_after(error) as following:
            return _end(following, arguments)


def _signal_number(text: str) -> int:
    """A number, or a name with or without ``SIG``."""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is no signal") from None


def _add_kill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-s",
        "--signal",
        metavar="SIGNAL",
        type=_signal_number,
        help="send this to its process group, such as TERM or 15; default: kill all of it, and wait until it is gone",
    )
    _add_command(parser)
    verb.add_json(parser)


def _kill(arguments: argparse.Namespace) -> int:
    with connect() as connection:
        command = find(connection, arguments.sandbox, arguments.command)
        if arguments.signal is None:
            reply = call(connection, "commands/kill", None, **command)
        else:
            reply = call(connection, "commands/signal", None, **command, signal=int(arguments.signal))
    if arguments.json:
        show_json(reply)
    else:
        show(command["command_id"])
    return 0


VERBS = {
    "ps": Verb("list the commands of a sandbox", _add_ps, _ps),
    "logs": Verb("show what a command wrote that was started with exec -d", _add_logs, _logs),
    "attach": Verb("follow a command that was started with exec -d, and type into it", _add_attach, _attach),
    "wait": Verb("wait for a command's end, and exit as it did", _add_wait, _wait),
    "kill": Verb("end a command and all that it started, or send it a signal", _add_kill, _kill),
}
