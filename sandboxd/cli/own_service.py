"""``service status|logs`` without a name, and ``daemon logs``: the daemon as a service of systemd, or without one.

Nothing here starts the daemon: units that listen would, at the first connection.
"""

from __future__ import annotations

import os

from sandboxd.cli import install, units
from sandboxd.client import RpcError
from sandboxd.paths import DAEMON_LOG_NAME, socket_path, state_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

LINES = 100
LOG_BYTES_MAX = 16 * 1024 * 1024

_PROPERTIES = ("ActiveState", "SubState", "MainPID", "StatusText", "NRestarts", "WatchdogUSec", "Result")


def state(env: Mapping[str, str]) -> dict[str, Any]:
    """What there is to know of the daemon's units; null where there are none, or nobody to ask."""
    found: dict[str, Any] = {
        "installed": bool(install.installed(env)),
        "lingers": install.lingers() if os.geteuid() != 0 else None,
        "socket": socket_path(env),
        "listening": None,
        "state": None,
        "pid": None,
        "status": None,
        "restarts": None,
        "watchdog": None,
        "result": None,
    }
    if found["installed"]:
        shown = _properties(env, units.SERVICE_UNIT, *_PROPERTIES)
        pid, restarts = shown.get("MainPID", ""), shown.get("NRestarts", "")
        found.update(
            listening=_properties(env, units.SOCKET_UNIT, "ActiveState").get("ActiveState"),
            state=f"{shown.get('ActiveState', 'unknown')} ({shown.get('SubState', 'unknown')})",
            pid=int(pid) if pid.isdigit() and pid != "0" else None,
            status=shown.get("StatusText") or None,
            restarts=int(restarts) if restarts.isdigit() else None,
            watchdog=_watchdog(shown.get("WatchdogUSec", "")),
            result=shown.get("Result") or None,
        )
    return found


def runs(env: Mapping[str, str]) -> bool:
    """Whether the daemon that runs is that of the units."""
    if not install.installed(env):
        return False
    try:
        return _properties(env, units.SERVICE_UNIT, "ActiveState").get("ActiveState") == "active"
    except RpcError:
        return False


def _properties(env: Mapping[str, str], unit: str, *names: str) -> dict[str, str]:
    said = install.systemctl(env, "show", f"--property={','.join(names)}", unit)
    return {name: value for name, _, value in (line.partition("=") for line in said.splitlines())}


def _watchdog(text: str) -> str | None:
    """Its word for a time, such as ``1min``; None: it does not watch."""
    return None if text in ("", "0", "infinity") else text


def show_log(env: Mapping[str, str], *, lines: int, follow: bool) -> int:
    """Print what the daemon logged: to the journal, where systemd starts it, else to its file. The exit status.

    Raises:
        RpcError: There is no log, or no program that shows it.
    """
    return _end_of(_spawn(_log_command(env, lines=lines, follow=follow), env, ()))


def log_text(env: Mapping[str, str], *, lines: int) -> str:
    """The same as text, a bounded part of it.

    Raises:
        RpcError: There is no log, or no program that shows it.
    """
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as pipe:
        try:
            actions = ((os.POSIX_SPAWN_DUP2, write_end, 1),)
            child = _spawn(_log_command(env, lines=lines, follow=False), env, actions)
        finally:
            os.close(write_end)
        text = pipe.read(LOG_BYTES_MAX)
    _end_of(child)
    return text.decode(errors="replace")


def _log_command(env: Mapping[str, str], *, lines: int, follow: bool) -> list[str]:
    count = f"--lines={lines}"
    if install.installed(env):
        words = ["journalctl", "--user", f"--unit={units.SERVICE_UNIT}", "--no-pager", count]
        return [*words, "--follow"] if follow else words
    path = os.path.join(state_dir(env), DAEMON_LOG_NAME)
    if not os.path.exists(path):
        raise RpcError(
            0,
            "not_running",
            "cannot find a log of the daemon",
            f"it has no units, and there is no {path}: nobody has started it in the background",
            "sandboxctl daemon start",
        )
    return ["tail", count, *(["-F"] if follow else []), "--", path]


def _spawn(command: list[str], env: Mapping[str, str], actions: Sequence[tuple[int, int, int]]) -> int:
    try:
        return os.posix_spawnp(command[0], command, dict(env), file_actions=actions)
    except OSError as error:
        raise RpcError(
            0, "prerequisite_missing", f"cannot run {command[0]}", error.strerror or "", "sandboxctl doctor"
        ) from None


def _end_of(child: int) -> int:
    """The exit status of a program; one that Ctrl-C has ended is as good as done."""
    while True:
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except KeyboardInterrupt:
            continue
        return max(status, 0)
