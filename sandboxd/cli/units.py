"""The systemd user units that start the daemon when somebody connects: their text. Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SOCKET_UNIT = "sandboxd.socket"
SERVICE_UNIT = "sandboxd.service"
SLICE_UNIT = "sandboxd.slice"
UNITS = (SOCKET_UNIT, SERVICE_UNIT, SLICE_UNIT)

HANDED_ON = frozenset(
    [
        *("PYTHONPATH", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"),
        *("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF"),
    ]
)
"""What the daemon goes by, beside SANDBOXD_*, and the user's systemd may not know: kept as it is at the install."""

_SOCKET = """\
[Unit]
Description=Socket of sandboxd, which starts it when somebody connects

[Socket]
ListenStream={path}
SocketMode=0600
DirectoryMode=0700
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""

# The sandboxes are in it where Podman asks systemd for their groups; it is never stopped with the service.
_SLICE = """\
[Unit]
Description=Sandboxes of sandboxd, all of them together
"""

# Type=notify-reload would do the same as ExecReload, from systemd 253 on; Debian 12 has 252.
# KillMode: commands that run in sandboxes, and what keeps their output, are to outlive the daemon.
# Delegate: engine clients make groups of their own below the service's, and systemd keeps its hands off them.
# OOMPolicy: an engine's client that is killed for memory is no reason to end the daemon with it.
# What is left out, and why, is in docs/INSTALL.md: in a user's manager most hardening implies no_new_privileges or a
# user namespace of its own, and with either rootless Podman starts nothing.
_SERVICE = """\
[Unit]
Description=sandboxd, the daemon of this user's sandboxes
Requires=sandboxd.socket
After=sandboxd.socket

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
ExecReload=/bin/kill -HUP $MAINPID
{environment}KillMode=process
Delegate=yes
Restart=on-failure
TimeoutStartSec=120
TimeoutStopSec=60
WatchdogSec=60
FileDescriptorStoreMax=256
OOMPolicy=continue
LimitCORE=0
KeyringMode=private
"""


def socket_unit(path: str) -> str:
    """The socket's unit, for a path of this host."""
    return _SOCKET.format(path=_specifiers(path))


def slice_unit() -> str:
    """The slice's unit: what may be set for all sandboxes together is set on it."""
    return _SLICE


def service_unit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The service's unit: what is started, and with which variables beside those of the user's systemd."""
    lines = [f"Environment={_quoted(f'{name}={environment[name]}')}\n" for name in sorted(environment)]
    words = [_quoted(word).replace("$", "$$") for word in command]
    return _SERVICE.format(command=" ".join(words), environment="".join(lines))


def handed_on(env: Mapping[str, str]) -> dict[str, str]:
    """Those variables of the caller's that the daemon is to have as well."""
    return {
        name: value
        for name, value in env.items()
        if (name in HANDED_ON or name.startswith("SANDBOXD_")) and name != "SANDBOXD_SOCKET"
    }


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """One word of a unit file, as systemd.syntax(7) reads it."""
    for character, written in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\t", "\\t")):
        word = word.replace(character, written)
    return f'"{_specifiers(word)}"'
