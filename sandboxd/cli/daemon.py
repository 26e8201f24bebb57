"""``daemon doctor config version``: the daemon itself, and the host that it runs on."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time

from sandboxd import __version__
from sandboxd.cli import install, own_service, render_host, units, verb, versions
from sandboxd.cli.session import FAILURE, call, columns, connect, request, say, say_starting, show, show_json
from sandboxd.cli.verb import Verb
from sandboxd.client import Connection, NotRunning, RpcError, starting
from sandboxd.paths import lock_path, socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandboxd.client import Message

STOP_TIMEOUT_S = 45.0


def _add_daemon(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("start", "stop", "restart", "reload", "status", "logs", "install", "uninstall"),
        help="status and logs do not start it; install makes units, with which your systemd starts it on demand",
    )
    parser.add_argument(
        "--drain", action="store_true", help="with stop: remove warm slots before, which otherwise go on"
    )
    parser.add_argument(
        "-y", "--yes", action="store_true", help="with stop and restart: end attached commands without a question"
    )
    add_log_flags(parser)
    verb.add_json(parser)


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    """``--lines`` and ``--follow``, of the daemon's own log."""
    parser.add_argument(
        "-n", "--lines", type=verb.lines, default=own_service.LINES, metavar="N", help="how many lines logs shows"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="with logs: and what is logged from now on")


def _daemon(arguments: argparse.Namespace) -> int:
    actions = {
        "start": _start,
        "stop": _stop,
        "restart": _restart,
        "reload": _reload,
        "status": _status,
        "logs": logs,
        "install": install_units,
        "uninstall": uninstall_units,
    }
    return actions[arguments.action](arguments)


def _start(arguments: argparse.Namespace) -> int:
    return _show_info(request("daemon/info"), arguments)


def _status(arguments: argparse.Namespace) -> int:
    connection = _connect_if_running()
    if connection is None:
        return _not_running(arguments)
    with connection:
        return _show_info(call(connection, "daemon/info"), arguments)


def _not_running(arguments: argparse.Namespace) -> int:
    path = socket_path(os.environ)
    if arguments.json:
        show_json({"pid": None, "socket": path})
    else:
        show(f"not running; its socket would be {path}")
    return FAILURE


def _show_info(info: dict[str, Any], arguments: argparse.Namespace) -> int:
    if arguments.json:
        show_json(info)
    else:
        show(render_host.daemon(info, int(time.time() * 1000), columns()))
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    # Slots outlive a daemon: to be rid of them takes one.
    connection = connect() if arguments.drain else _connect_if_running()
    if connection is None:
        say("the daemon is not running")
        if arguments.json:
            show_json({"stopped": False, "commands_ended": 0, "sandboxes": 0, "slots": 0, "drained": 0})
        return 0
    with connection:
        if not _may_end(connection, arguments):
            return FAILURE
        drained = _drain(connection) if arguments.drain else 0
        sandboxes, slots = _what_goes_on(connection)
    ended = _shut_down() or 0
    if arguments.json:
        counts = {"commands_ended": ended, "sandboxes": sandboxes, "slots": slots, "drained": drained}
        show_json({"stopped": True, **counts})
        return 0
    told = [f"{_commands(ended)} ended with it"] if ended else []
    if drained:
        told.append(f"{_number(drained, 'warm slot')} removed")
    going = [_number(sandboxes, "sandbox")] if sandboxes else []
    if slots:
        going.append(_number(slots, "warm slot"))
    if going:
        told.append(f"{' and '.join(going)} {'goes' if sandboxes + slots == 1 else 'go'} on")
    show("; ".join(["stopped", *told]))
    return 0


def _drain(connection: Connection) -> int:
    """Have all warm slots removed, and none made; return how many there were."""
    templates = {row["template"] for row in call(connection, "pool/list")["pools"]}
    return sum(call(connection, "pool/drain", template=template)["drained"] for template in sorted(templates))


def _what_goes_on(connection: Connection) -> tuple[int, int]:
    """How many sandboxes, and how many warm slots, outlive the daemon with what runs in them."""
    rows = call(connection, "sandbox/list")["sandboxes"]
    pools = call(connection, "pool/list")["pools"]
    return sum(row["state"] in ("running", "paused") for row in rows), sum(row["warm"] for row in pools)


def _may_end(connection: Connection, arguments: argparse.Namespace) -> bool:
    """Whether attached commands may end with the daemon: at a terminal that is asked before they do."""
    if arguments.yes or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    count = _count_attached(connection)
    if not count:
        return True
    sys.stderr.write(f"{_commands(count)} will end with the daemon; go on? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _restart(arguments: argparse.Namespace) -> int:
    """Whoever connects meanwhile waits: the socket is handed over, or is systemd's."""
    running = _connect_if_running()
    if running is not None:
        with running:
            if not _may_end(running, arguments):
                return FAILURE
    if own_service.runs(os.environ):
        # So that systemd keeps for the next daemon what this one leaves.
        connection = _connect_if_running()
        if connection is not None:
            with connection:
                _say_ended(_count_attached(connection))
        install.systemctl(os.environ, "restart", units.SERVICE_UNIT)
        return _start(arguments)
    left: dict[str, int] = {}
    try:
        _say_ended(_shut_down(left))
        if not left:
            return _start(arguments)
        with starting.start(socket_path(os.environ), os.environ, left, say_starting) as connection:
            return _show_info(call(connection, "daemon/info"), arguments)
    finally:
        for number in left.values():
            os.close(number)


def _reload(arguments: argparse.Namespace) -> int:
    connection = _connect_if_running()
    if connection is None:
        return _not_running(arguments)
    with connection:
        reply = call(connection, "daemon/reload")
    if arguments.json:
        show_json(reply)
        return 0
    show(f"in force now: {', '.join(reply['changed']) or 'nothing else than before'}")
    if reply["waiting"]:
        say(f"in force after a restart: {', '.join(reply['waiting'])}")
        sys.stderr.write("hint: sandboxctl daemon restart\n")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """What the daemon logged."""
    if not arguments.json:
        return own_service.show_log(os.environ, lines=arguments.lines, follow=arguments.follow)
    show_json({"text": own_service.log_text(os.environ, lines=arguments.lines)})
    return 0


def unit_status(arguments: argparse.Namespace) -> int:
    """How the daemon's units are; fails unless a daemon runs."""
    found = own_service.state(os.environ)
    connection = _connect_if_running()
    if connection is not None:
        with connection:
            found["pid"] = call(connection, "daemon/info")["pid"]
    if arguments.json:
        show_json(found)
    else:
        show(render_host.own_service(found))
        if found["installed"] and found["lingers"] is False:
            sys.stderr.write(f"hint: {install.LINGER_HINT}\n")
    return 0 if found["pid"] is not None else FAILURE


def install_units(arguments: argparse.Namespace) -> int:
    """Have the user's systemd start the daemon."""
    install.check_manager(os.environ)
    _say_ended(_shut_down())
    paths = install.install(os.environ)
    if not install.lingers():
        say(f"it stops at your last logout, and sandboxes with it; to keep them: {install.LINGER_HINT}")
    if arguments.json:
        show_json({"installed": paths, "socket": socket_path(os.environ)})
    else:
        show("\n".join([*paths, f"installed: your systemd listens on {socket_path(os.environ)}"]))
    return 0


def uninstall_units(arguments: argparse.Namespace) -> int:
    """Have it start the daemon no more."""
    if install.installed(os.environ):
        install.check_manager(os.environ)
        _say_ended(_shut_down())
    paths = install.uninstall(os.environ)
    if arguments.json:
        show_json({"uninstalled": paths})
    elif paths:
        show("\n".join([*paths, "uninstalled"]))
    else:
        say("there are no units of ours")
    return 0


def _say_ended(count: int | None) -> None:
    if count:
        say(f"{_commands(count)} ended with the old daemon")


def _commands(count: int) -> str:
    return _number(count, "attached command")


def _number(count: int, what: str) -> str:
    ending = "" if count == 1 else "es" if what.endswith("x") else "s"
    return f"{count} {what}{ending}"


def _shut_down(left: dict[str, int] | None = None) -> int | None:
    """Ask it to stop, and wait until its process is gone; return how many attached commands ended, None: no daemon.

    Args:
        left: Gets its listening socket, if it is its own to give away, and what else is to go on; None: nobody comes.

    Raises:
        RpcError: It is still there.
    """
    connection = _connect_if_running()
    if connection is None:
        return None
    deadline = time.monotonic() + STOP_TIMEOUT_S
    with connection:
        pid = int(connection.call("daemon/info", {}, timeout_s=STOP_TIMEOUT_S)["pid"])
        # Held before it ends, so that it is this process for as long as we wait.
        process = _open_process(pid)
        try:
            ended = _count_attached(connection)
            if left is None or not _take_what_is_left(connection, left):
                connection.call("daemon/shutdown", {}, timeout_s=STOP_TIMEOUT_S)
            try:
                # No such request was sent, so nothing but the end of the connection ends this.
                connection.wait(0, timeout_s=max(deadline - time.monotonic(), 0.0))
            except RpcError as error:
                if error.type != "disconnected":
                    raise
            if process is not None and not select.select([process], [], [], max(deadline - time.monotonic(), 0.0))[0]:
                raise RpcError(
                    0,
                    "timeout",
                    "cannot stop the daemon",
                    f"it is still there after {STOP_TIMEOUT_S:g}s",
                    f"kill {pid}",
                )
        finally:
            if process is not None:
                os.close(process)
    return ended


def _take_what_is_left(connection: Connection, left: dict[str, int]) -> bool:
    """Have it stop, and give away what the next one goes on with. False: it is older than that."""

    def take(message: Message) -> None:
        if message.content["method"] == "daemon/left":
            for number in connection.take_descriptors(message, 1):
                left[message.content["params"]["name"]] = number

    try:
        connection.call("daemon/handover", {}, on_notification=take, timeout_s=STOP_TIMEOUT_S)
    except RpcError as error:
        if error.type != "unsupported":
            raise
        return False
    return True


def _open_process(pid: int) -> int | None:
    """A descriptor that is readable when the process has ended; None: it has, or this kernel has no such thing."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _count_attached(connection: Connection) -> int:
    """How many commands run whose output is somebody's own: those end with the daemon, the others outlive it."""
    count = 0
    for sandbox in call(connection, "sandbox/list")["sandboxes"]:
        if not sandbox["commands_running"]:
            continue
        # It may be gone by now, or stopping: nothing is lost but a figure.
        with contextlib.suppress(RpcError):
            for row in call(connection, "commands/list", sandbox=sandbox["id"])["commands"]:
                count += row["state"] == "running" and not _is_kept(connection, sandbox["id"], row["command_id"])
    return count


def _is_kept(connection: Connection, sandbox: str, command_id: str) -> bool:
    try:
        call(connection, "commands/logs", sandbox=sandbox, command_id=command_id, stream="stdout", length=1)
    except RpcError as error:
        return error.type != "conflict"
    return True


def _connect_if_running() -> Connection | None:
    """A connection, unless that would start a daemon: where systemd listens, each one does."""
    if install.installed(os.environ) and not _lock_is_held(lock_path(socket_path(os.environ))):
        return None
    try:
        return Connection.connect(socket_path(os.environ))
    except NotRunning:
        return None


def _lock_is_held(path: str) -> bool:
    """Whether some process has locked this file; true also where that cannot be seen.

    Read from the kernel's list: to try the lock could be what makes a daemon that starts now find it taken.
    """
    try:
        inode = os.stat(path).st_ino
    except OSError:
        return False
    try:
        with open("/proc/locks", encoding="ascii") as file:
            # 1: FLOCK  ADVISORY  WRITE 1234 00:2d:5678 0 EOF
            return any(f":{inode} " in line for line in file)
    except OSError:
        return True


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repair",
        action="store_true",
        help="write a damaged journal anew, from what is left of it, the containers and their init; then check",
    )
    verb.add_json(parser)


def _doctor(arguments: argparse.Namespace) -> int:
    repaired = request("daemon/repair") if arguments.repair else None
    report = request("daemon/doctor")
    if repaired is not None:
        report["repair"] = repaired
        say(render_host.repaired(repaired))
    if arguments.json:
        show_json(report)
    else:
        show(render_host.doctor(report, columns()))
    return 0 if report["healthy"] else FAILURE


def _add_gc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, and why")
    verb.add_json(parser)


def _gc(arguments: argparse.Namespace) -> int:
    report = request("daemon/gc", dry_run=arguments.dry_run)
    if arguments.json:
        show_json(report)
    elif report["found"]:
        show(render_host.gc(report["found"], columns()))
    else:
        say("nothing is nobody's")
    if report["unseen_engines"] and not arguments.json:
        say(f"not looked at, for they did not answer: {' '.join(report['unseen_engines'])}")
    return 0


def _config(arguments: argparse.Namespace) -> int:
    reply = request("daemon/config")
    if arguments.json:
        show_json(reply)
    else:
        show(render_host.config(reply["entries"], columns()))
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
    if info is not None and versions.differ(info):
        versions.say_so(info)
    return 0


VERBS = {
    "daemon": Verb(
        "start, stop or restart the daemon, see whether it runs, or hand it to systemd", _add_daemon, _daemon
    ),
    "doctor": Verb("check the host, and say what mends it; repair the journal", _add_doctor, _doctor),
    "gc": Verb("remove what no sandbox owns: containers, outputs, layers, directories", _add_gc, _gc),
    "config": Verb("show every setting in force, and where it comes from", verb.add_json, _config),
    "version": Verb("show the versions of this command and of the daemon", verb.add_json, _version),
}
