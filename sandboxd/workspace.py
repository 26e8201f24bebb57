"""The project as seen inside at /workspace: which directories may be one, and whose files they are inside.

A directory is opened once; what was opened is judged by its real path, and mounted by that descriptor where we
may mount (as root), or by that path where only the engine may, with a check afterwards that the right directory
arrived. So a symlink that is swapped in between is either never followed or found out.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence

import msgspec

from runtimes import mounts
from runtimes.errors import Unsupported
from runtimes.model import EngineInfo, User
from runtimes.mountinfo import is_below
from sandboxd.failures import InvalidArgument

TARGET = "/workspace"

SANDBOX_USER = User(uid=1000, gid=1000)
"""Who PID 1 is where the caller's own uid is not the answer: the first ordinary user of most images."""

_SYSTEM_TREES = (
    "/bin /boot /dev /etc /lib /lib32 /lib64 /libx32 /proc /run /sbin /sys /usr /var/cache /var/lib /var/log "
    "/var/run /var/spool"
).split()
"""Refused with everything below."""

_EXCEPTED_TREES = ("/run/media", "/usr/local/src", "/usr/src")
"""Below a system tree, and yet people keep projects there."""

_TOO_WIDE = "/ /home /media /mnt /opt /root /srv /tmp /var /var/home /var/tmp".split()
"""Refused themselves: they hold more than one project."""

_HOMES = ("/home", "/var/home")

_CREDENTIALS = (
    ".aws .azure .config/gcloud .config/gh .config/google-chrome .docker .gnupg .kube .local/share/keyrings .mozilla "
    ".local/share/containers .password-store .ssh"
).split()


class OpenedWorkspace(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that may be a workspace, open."""

    path: str
    """Its real path at the time of opening."""
    descriptor: int
    """``O_PATH``; whoever got this struct closes it."""
    device: int
    inode: int
    owner: User


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs inside, and how the project comes to be that user's."""

    user: User
    keep_id: bool
    mounted: str
    """``same-uid``, ``keep-id``, ``idmapped`` or ``as-is``."""
    warning: str = ""


def open_workspace(path: str, *, home: str, allow: Sequence[str], private: Sequence[str] = ()) -> OpenedWorkspace:
    """Open a project directory and judge it.

    Raises:
        InvalidArgument: it is not an absolute path of a directory, or it is one that may not be a workspace.
    """
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"cannot use {path!r} as a workspace", hint="give the absolute path of a directory")
    try:
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(
            f"cannot use {path!r} as a workspace", detail=error.strerror or "", hint="give a directory that exists"
        ) from None
    try:
        real = os.readlink(f"/proc/self/fd/{descriptor}")
        status = os.fstat(descriptor)
        reason = refusal(real, home=home, allow=[os.path.realpath(entry) for entry in allow], private=private)
        if reason:
            raise InvalidArgument(
                f"cannot use {path!r} as a workspace",
                detail=reason,
                hint="name it in paths.allow of the configuration if you mean it (sandboxctl config)",
            )
    except BaseException:
        os.close(descriptor)
        raise
    return OpenedWorkspace(
        path=real,
        descriptor=descriptor,
        device=status.st_dev,
        inode=status.st_ino,
        owner=User(uid=status.st_uid, gid=status.st_gid),
    )


def refusal(path: str, *, home: str, allow: Sequence[str], private: Sequence[str] = ()) -> str:
    """Say why a real path may not be a workspace; an empty string when it may. Pure.

    A path in ``allow``, or below one, may be, unless it holds or lies in one of ``private``.
    """
    reason = "" if any(is_below(path, entry) for entry in allow) else _unless_allowed(path, home)
    if reason:
        return reason
    held = (each for each in private if is_below(path, each) or is_below(each, path))
    return next((f"{directory} belongs to the daemon or to an engine" for directory in held), "")


def _unless_allowed(path: str, home: str) -> str:
    if path.endswith(" (deleted)"):
        return "the directory was removed"
    home = home.rstrip("/") or "/nonexistent"
    if path in _TOO_WIDE or is_below(home, path):
        return f"{path} holds more than a project"
    for name in _CREDENTIALS:
        if is_below(path, os.path.join(home, name)):
            return f"~/{name} holds credentials"
    if is_below(path, home):
        return ""
    if any(is_below(path, tree) for tree in _SYSTEM_TREES) and not any(
        is_below(path, tree) for tree in _EXCEPTED_TREES
    ):
        return f"{path} belongs to the system"
    if path.startswith("/root/") or any(path.startswith(f"{homes}/") for homes in _HOMES):
        return f"{path} is in another user's home"
    return ""


def identify(engine: EngineInfo, owner: User | None, *, caller: User, idmap_works: bool) -> Identity:
    """Decide who runs inside. Pure.

    Args:
        engine: The engine that will run the sandbox.
        owner: Who owns the workspace on the host; None: no workspace.
        caller: Who the daemon is.
        idmap_works: Id-mapped mounts can be made here.
    """
    if engine.rootless:
        if engine.capabilities is not None and engine.capabilities.keep_id:
            return Identity(user=caller, keep_id=True, mounted="keep-id")
        warning = "" if owner is None else "this engine cannot map your uid: files of the workspace look like root's"
        return Identity(user=SANDBOX_USER, keep_id=False, mounted="as-is", warning=warning)
    if caller.uid != 0:
        return Identity(user=caller, keep_id=False, mounted="same-uid")
    if owner is None:
        return Identity(user=SANDBOX_USER, keep_id=False, mounted="same-uid")
    if owner.uid != 0:
        return Identity(user=owner, keep_id=False, mounted="same-uid")
    if idmap_works:
        return Identity(user=SANDBOX_USER, keep_id=False, mounted="idmapped")
    return Identity(
        user=SANDBOX_USER,
        keep_id=False,
        mounted="as-is",
        warning="the workspace belongs to root and this kernel has no id-mapped mounts: it cannot be written inside",
    )


class Stage:
    """A place on the host where a project is mounted by descriptor, for the engine to pass on.

    The engine clones the mount into the container, so ours is taken off again as soon as the container runs:
    no mount stays behind.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def put(self, workspace: OpenedWorkspace, *, read_only: bool, userns_fd: int | None) -> None:
        """Mount ``workspace`` here.

        Raises:
            Unsupported: this file system cannot be id-mapped, or the kernel is too old.
            OSError: anything else.
        """
        self.clear()
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        target_fd = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            mounts.stage_bind(workspace.descriptor, target_fd, read_only=read_only, userns_fd=userns_fd)
        finally:
            os.close(target_fd)

    def clear(self) -> None:
        """Take every mount off and remove the directory. Idempotent; also clears what a crash left."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(self.directory).st_mode):
                return
            while mounts.unmount(self.directory):
                pass
            os.rmdir(self.directory)


def idmap_works(probe_dir: str, userns_fd: int) -> bool:
    """Try an id-mapped mount of ``probe_dir`` onto itself, and take it off again."""
    source_fd = os.open(probe_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stage = Stage(os.path.join(probe_dir, "idmap-probe"))
    try:
        status = os.fstat(source_fd)
        stage.put(
            OpenedWorkspace(
                path=probe_dir,
                descriptor=source_fd,
                device=status.st_dev,
                inode=status.st_ino,
                owner=User(uid=status.st_uid, gid=status.st_gid),
            ),
            read_only=True,
            userns_fd=userns_fd,
        )
    except (Unsupported, OSError):
        return False
    else:
        return True
    finally:
        stage.clear()
        os.close(source_fd)
