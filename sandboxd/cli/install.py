"""``daemon install`` and ``daemon uninstall``: the user's systemd starts the daemon when somebody connects."""

from __future__ import annotations

import os
import pwd

from sandboxd.cli import units
from sandboxd.client import RpcError
from sandboxd.client.starting import COMMAND
from sandboxd.paths import socket_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

LINGER_HINT = 'sudo loginctl enable-linger "$USER"'
BOOTED = "/run/systemd/system"
"""There where systemd is PID 1; as sd_booted(3) says."""
SAID_BYTES_MAX = 64 * 1024


def units_directory(env: Mapping[str, str]) -> str:
    """Where the user's own units are."""
    base = env.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(env.get("HOME") or os.path.expanduser("~"), ".config")
    return os.path.join(base, "systemd", "user")


def installed(env: Mapping[str, str]) -> list[str]:
    """The paths of those units that are there."""
    paths = [os.path.join(units_directory(env), name) for name in units.UNITS]
    return [path for path in paths if os.path.lexists(path)]


def check_manager(env: Mapping[str, str]) -> None:
    """Raise where the user has no systemd that could be told anything."""
    if not os.path.exists(os.path.join(env.get("XDG_RUNTIME_DIR") or "/nonexistent", "systemd", "private")):
        if not os.path.isdir(BOOTED):
            raise RpcError(
                0,
                "prerequisite_missing",
                "cannot install units",
                "systemd does not run here: nothing to install; the daemon starts by itself when it is needed",
                "sandboxctl daemon start",
            )
        raise RpcError(
            0,
            "prerequisite_missing",
            "cannot reach a systemd of yours",
            "there is none in XDG_RUNTIME_DIR: it runs from login to logout, or always where lingering is on",
            LINGER_HINT,
        )


def install(env: Mapping[str, str]) -> list[str]:
    """Write the units, and have systemd listen. Any daemon must have ended. Returns the paths. Idempotent."""
    directory = units_directory(env)
    texts = {
        units.SOCKET_UNIT: units.socket_unit(socket_path(env)),
        units.SERVICE_UNIT: units.service_unit(COMMAND, units.handed_on(env)),
        units.SLICE_UNIT: units.slice_unit(),
    }
    try:
        os.makedirs(directory, exist_ok=True)
        for name, text in texts.items():
            _write(os.path.join(directory, name), text)
    except OSError as error:
        raise RpcError(0, "unauthorized", f"cannot write into {directory}", error.strerror or "", "") from None
    systemctl(env, "daemon-reload")
    # A socket that is active already goes on with the old settings otherwise.
    systemctl(env, "stop", units.SOCKET_UNIT, units.SERVICE_UNIT)
    systemctl(env, "enable", "--now", units.SOCKET_UNIT)
    return installed(env)


def uninstall(env: Mapping[str, str]) -> list[str]:
    """Take the units away, and what listens with them. Sandboxes go on. Returns the paths that were there."""
    paths = installed(env)
    if paths:
        systemctl(env, "disable", "--now", units.SOCKET_UNIT, units.SERVICE_UNIT)
        for path in paths:
            os.unlink(path)
        systemctl(env, "daemon-reload")
    return paths


def lingers() -> bool:
    """Whether the user's systemd goes on after the last logout."""
    return os.path.exists(f"/var/lib/systemd/linger/{pwd.getpwuid(os.geteuid()).pw_name}")


def systemctl(env: Mapping[str, str], *words: str) -> str:
    """Tell the user's systemd, or ask it; return what it said.

    Raises:
        RpcError: It said no, and why.
    """
    read_end, write_end = os.pipe()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, write_end, 1),
        (os.POSIX_SPAWN_DUP2, write_end, 2),
    ]
    try:
        child = os.posix_spawnp("systemctl", ["systemctl", "--user", *words], dict(env), file_actions=actions)
    except OSError as error:
        os.close(read_end)
        raise RpcError(
            0, "prerequisite_missing", "cannot run systemctl", error.strerror or "", "sandboxctl daemon start"
        ) from None
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read(SAID_BYTES_MAX).decode(errors="replace").strip()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        raise RpcError(
            0, "unsupported", f"cannot {words[0]} {' '.join(words[1:])}".rstrip(), said, "systemctl --user status"
        )
    return said


def _write(path: str, text: str) -> None:
    """Whole or not at all."""
    scratch = f"{path}.{os.getpid()}"
    with open(scratch, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.rename(scratch, path)
