"""``daemon doctor config version``: the daemon itself, and the host that it runs on."""

from __future__ import annotations

import argparse
import os
import time

from sandboxd import __version__
from sandboxd.cli import render, verb
from sandboxd.cli.session import FAILURE, call, request, say, show, show_json
from sandboxd.cli.verb import Verb
from sandboxd.client import Connection, NotRunning, RpcError
from sandboxd.paths import socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STOP_TIMEOUT_S = 30.0


def _add_daemon(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("start", "stop", "status"), help="status does not start it")
    verb.add_json(parser)


def _daemon(arguments: argparse.Namespace) -> int:
    actions = {"start": _start, "stop": _stop, "status": _status}
    return actions[arguments.action](arguments)


def _start(arguments: argparse.Namespace) -> int:
    return _show_info(request("daemon/info"), arguments)


def _status(arguments: argparse.Namespace) -> int:
    connection = _connect_if_running()
    if connection is None:
        path = socket_path(os.environ)
        if arguments.json:
            show_json({"pid": None, "socket": path})
        else:
            show(f"not running; its socket would be {path}")
        return FAILURE
    with connection:
        return _show_info(call(connection, "daemon/info"), arguments)


def _show_info(info: dict[str, Any], arguments: argparse.Namespace) -> int:
    if arguments.json:
        show_json(info)
    else:
        show(render.daemon(info, int(time.time() * 1000)))
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    """Ask it to stop, and wait until it hangs up."""
    connection = _connect_if_running()
    if connection is None:
        say("the daemon is not running")
        return 0
    with connection:
        reply = connection.call("daemon/shutdown", {}, timeout_s=STOP_TIMEOUT_S)
        try:
            # No such request was sent, so nothing but the end of the connection ends this.
            connection.wait(0, timeout_s=STOP_TIMEOUT_S)
        except RpcError as error:
            if error.type != "disconnected":
                raise
    if arguments.json:
        show_json(reply)
    return 0


def _connect_if_running() -> Connection | None:
    try:
        return Connection.connect(socket_path(os.environ))
    except NotRunning:
        return None


def _doctor(arguments: argparse.Namespace) -> int:
    report = request("daemon/doctor")
    if arguments.json:
        show_json(report)
    else:
        show(render.doctor(report))
    return 0 if report["healthy"] else FAILURE


def _config(arguments: argparse.Namespace) -> int:
    reply = request("daemon/config")
    if arguments.json:
        show_json(reply)
    else:
        show(render.config(reply["entries"]))
    return 0


def _version(arguments: argparse.Namespace) -> int:
    connection = _connect_if_running()
    info = None
    if connection is not None:
        with connection:
            info = call(connection, "daemon/info")
    if arguments.json:
        show_json({"client": __version__, "daemon": info["version"] if info else None})
    else:
        show(f"sandboxctl {__version__}")
        show(f"sandboxd {info['version']} (pid {info['pid']})" if info else "sandboxd is not running")
    return 0


VERBS = {
    "daemon": Verb("start or stop the daemon, or see whether it runs", _add_daemon, _daemon),
    "doctor": Verb("check the host, and say what mends it", verb.add_json, _doctor),
    "config": Verb("show every setting in force, and where it comes from", verb.add_json, _config),
    "version": Verb("show the versions of this command and of the daemon", verb.add_json, _version),
}
