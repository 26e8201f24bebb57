"""Where the socket and the state are. Light: the command line and the client import it.

Everything takes the environment as an argument; nothing here creates anything.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET_NAME = "sandboxd.sock"
DIRECTORY_NAME = "sandboxd"
DAEMON_LOG_NAME = "daemon.log"


def socket_path(env: Mapping[str, str]) -> str:
    """The daemon's socket: ``SANDBOXD_SOCKET``, else ``sandboxd.sock`` in the runtime directory."""
    return env.get("SANDBOXD_SOCKET") or os.path.join(runtime_dir(env), SOCKET_NAME)


def lock_path(socket: str) -> str:
    """The file beside a socket that the daemon behind it keeps locked, for as long as it lives."""
    return os.path.splitext(socket)[0] + ".lock"


def runtime_dir(env: Mapping[str, str]) -> str:
    """The directory for what lives as long as the login, or the boot.

    A session's runtime directory counts only if it is ours: sudo and su leave the variable of the user before, and
    files of ours in there would be in that user's hands.
    """
    uid = os.geteuid()
    for session in (env.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if session and is_private(session, uid):
            return os.path.join(session, DIRECTORY_NAME)
    return f"/run/{DIRECTORY_NAME}" if uid == 0 else f"/tmp/{DIRECTORY_NAME}-{uid}"  # noqa: S108 - checked before use


def state_dir(env: Mapping[str, str]) -> str:
    """The directory for what outlives a boot: ``SANDBOXD_STATE_DIR``, else as the XDG base directories say."""
    explicit = env.get("SANDBOXD_STATE_DIR")
    if explicit:
        return explicit
    base = env.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(env.get("HOME") or os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, DIRECTORY_NAME)


def is_private(path: str, uid: int) -> bool:
    """Whether this is a directory, no symlink, that belongs to ``uid`` and that nobody else may write to."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == uid and not status.st_mode & 0o022
