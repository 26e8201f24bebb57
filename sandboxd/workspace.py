"""The project as seen inside at /workspace: which directories may be one, and whose files they are inside.

A directory is opened once; what was opened is judged by its real path, and mounted by that descriptor where we
may mount (as root), or by that path where only the engine may, with a check afterwards that the right directory
arrived. So a symlink that is swapped in between is either never followed or found out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import posixpath
import stat
from collections.abc import Iterator, Sequence

import msgspec

from runtimes import glance, mounts, propagation
from runtimes.errors import Unsupported
from runtimes.model import EngineInfo, OverlayDirs, User
from runtimes.mountinfo import is_below
from sandboxd.failures import InvalidArgument

logger = logging.getLogger(__name__)

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
    ".aws .azure .config/containers .config/gcloud .config/gh .config/google-chrome .config/sandboxd .docker "
    ".git-credentials .gnupg .kube .local/share/containers .local/share/keyrings .mozilla .netrc .npmrc "
    ".password-store .pgpass .pypirc .ssh"
).split()

_INSIDE_RESERVED = "/.sandboxd /dev /proc /sys".split()
"""Nothing of the caller's is mounted there, or below."""

_INSIDE_OURS = "/ /bin /etc /home /home/sandbox /lib /run /sbin /tmp /usr /var /workspace".split()
"""Nor exactly there: the image, or we, have something there that would be missed."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Which paths may be seen inside."""

    home: str
    """The caller's, by its real path."""
    allow: Sequence[str] = ()
    """May be, although they would be refused."""
    deny: Sequence[str] = ()
    """May never be."""
    private: Sequence[str] = ()
    """Of the daemon and of the engines, by their real paths: never either."""


class OpenedPath(msgspec.Struct, frozen=True, kw_only=True):
    """A directory, or a file, that may be seen inside, open."""

    path: str
    """Its real path at the time of opening, as ``os.fsdecode`` has it."""
    descriptor: int
    """``O_PATH``; whoever got this struct closes it."""
    device: int
    inode: int
    owner: User
    is_directory: bool
    says_worktree: bool = False
    """It has the file of a git worktree, which is not to be believed yet."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who runs inside, and how the project comes to be that user's."""

    user: User
    keep_id: bool
    mounted: str
    """``same-uid``, ``keep-id``, ``idmapped`` or ``as-is``."""
    warning: str = ""


def open_workspace(path: str, rules: Rules) -> OpenedPath:
    """Open a project directory and judge it.

    Raises:
        InvalidArgument: it is not an absolute path of a directory, or it is one that may not be a workspace.
    """
    return _open(path, rules, what="a workspace", flags=os.O_DIRECTORY)


def open_mount(path: str, rules: Rules) -> OpenedPath:
    """Open a directory or a regular file that is to be seen inside, and judge it.

    Raises:
        InvalidArgument: it is neither, or one that may not be seen.
    """
    opened = _open(path, rules, what="a mount", flags=0)
    if not opened.is_directory and not stat.S_ISREG(os.fstat(opened.descriptor).st_mode):
        os.close(opened.descriptor)
        raise InvalidArgument(
            f"cannot use {shown(path)!r} as a mount",
            detail="it is neither a directory nor a file",
            hint="a sandbox gets no sockets and no devices of the host",
        )
    return opened


def _open(path: str, rules: Rules, *, what: str, flags: int) -> OpenedPath:
    brief = f"cannot use {shown(path)!r} as {what}"
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(brief, hint="give the absolute path of a directory")
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    except OSError as error:
        raise InvalidArgument(brief, detail=error.strerror or "", hint="give one that exists") from None
    try:
        status = os.fstat(descriptor)
        return OpenedPath(
            path=_judged(descriptor, _resolved(rules), brief),
            descriptor=descriptor,
            device=status.st_dev,
            inode=status.st_ino,
            owner=User(uid=status.st_uid, gid=status.st_gid),
            is_directory=stat.S_ISDIR(status.st_mode),
        )
    except BaseException:
        os.close(descriptor)
        raise


def _judged(descriptor: int, rules: Rules, brief: str) -> str:
    """The real path of what was opened, if it may be seen inside; rules are real paths, too.

    Raises:
        InvalidArgument: it may not.
    """
    real = os.readlink(f"/proc/self/fd/{descriptor}")
    reason = refusal(real, rules)
    if reason:
        raise InvalidArgument(
            brief,
            detail=reason,
            hint="see paths.allow and paths.deny of the configuration (sandboxctl config)",
        )
    return real


def glance_at_workspace(path: str, rules: Rules) -> OpenedPath | None:
    """What ``open_workspace`` returns, of a directory that was used lately; None: only that can tell.

    Waits for no file system, see ``glance``.

    Raises:
        InvalidArgument: it may not be a workspace.
    """
    if not path.startswith("/") or "\0" in path or rules.allow or rules.deny:
        # The rules' own paths would have to be looked at as well.
        return None
    descriptor = _glance(path, rules.home if is_below(path, rules.home) else "/")
    if descriptor is None:
        return None
    try:
        seen = glance.look(descriptor)
        if seen is None:
            os.close(descriptor)
            return None
        return OpenedPath(
            path=_judged(descriptor, rules, f"cannot use {shown(path)!r} as a workspace"),
            descriptor=descriptor,
            device=seen.device,
            inode=seen.inode,
            owner=User(uid=seen.uid, gid=seen.gid),
            is_directory=True,
        )
    except BaseException:
        os.close(descriptor)
        raise


def _glance(path: str, base: str) -> int | None:
    """The directory at a path at or below ``base``, which may be on a mount of its own: a home that we live in."""
    base_fd = glance.open_base(base)
    if base_fd is None:
        return None
    try:
        return glance.open_below(base_fd, path[len(base) :].lstrip("/") or ".", flags=os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    finally:
        os.close(base_fd)


def _resolved(rules: Rules) -> Rules:
    return msgspec.structs.replace(
        rules,
        allow=[os.path.realpath(entry) for entry in rules.allow],
        deny=[os.path.realpath(entry) for entry in rules.deny],
    )


def shown(path: str) -> str:
    """A path for people, where it is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def refusal(path: str, rules: Rules) -> str:
    """Say why a real path may not be seen inside; an empty string when it may. Pure.

    A path in ``allow``, or below one, may be, unless it holds or lies in one of ``deny`` or ``private``.
    """
    reason = "" if any(is_below(path, entry) for entry in rules.allow) else _unless_allowed(path, rules.home)
    if reason:
        return reason
    denied = (each for each in rules.deny if is_below(path, each) or is_below(each, path))
    held = (each for each in rules.private if is_below(path, each) or is_below(each, path))
    return next(
        itertools.chain(
            (f"{shown(directory)} is named in paths.deny" for directory in denied),
            (f"{shown(directory)} belongs to the daemon or to an engine" for directory in held),
        ),
        "",
    )


def target_refusal(target: str) -> str:
    """Say why nothing may be mounted at a path inside; an empty string when it may. Pure."""
    if not target.startswith("/") or target != posixpath.normpath(target) or target.startswith("//"):
        return "it must be an absolute path, without . and .. and doubled slashes"
    if any(is_below(target, tree) for tree in _INSIDE_RESERVED):
        return "it belongs to the sandbox itself"
    if target in _INSIDE_OURS:
        return "it would hide what the sandbox needs"
    if is_below(target, TARGET):
        return "a place for it would have to be made in the project"
    return ""


def _unless_allowed(path: str, home: str) -> str:
    if path.endswith(" (deleted)"):
        return "the directory was removed"
    home = home.rstrip("/") or "/nonexistent"
    if path in _TOO_WIDE or is_below(home, path):
        return f"{shown(path)} holds more than a project"
    if is_below(path, home):
        held = (name for name in _CREDENTIALS if is_below(path, f"{home}/{name}"))
        return next((f"~/{name} holds credentials" for name in held), "")
    if any(is_below(path, tree) for tree in _SYSTEM_TREES) and not any(
        is_below(path, tree) for tree in _EXCEPTED_TREES
    ):
        return f"{shown(path)} belongs to the system"
    if path.startswith("/root/") or any(path.startswith(f"{homes}/") for homes in _HOMES):
        return f"{shown(path)} is in another user's home"
    return ""


def identify(engine: EngineInfo, owner: User | None, *, caller: User, idmap_works: bool) -> Identity:
    """Decide who runs inside. Pure.

    Args:
        engine: The engine that will run the sandbox.
        owner: Who owns the workspace on the host; None: no workspace.
        caller: Who the daemon is.
        idmap_works: Id-mapped mounts can be made here.
    """
    able = engine.capabilities
    if able is not None and able.rootless:
        if able.keep_id:
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


class OverlayLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Where an overlay keeps what is written to it."""

    directory: str
    """Holds ``upper`` and ``work``; ours alone."""
    scratch: str
    """Begins the paths at which layers whose ids are mapped are attached while the overlay is made."""


class MountSource(msgspec.Struct, frozen=True, kw_only=True):
    """Something on the host that a sandbox sees, opened and judged, and not yet mounted anywhere.

    Two ways from here. Who may mount (root) calls ``detach`` and gets a mount by descriptor, with all attributes
    set, to be attached wherever it is wanted: on the stage of a container that is about to start
    (``Stage.put``), or inside a container that runs. Who may not hands ``path`` to the engine, and sees to it
    afterwards that ``device`` and ``inode`` arrived.

    Either way ``descriptor`` is the project, or the copy of it; with ``overlay`` it is what lies below. It stays its
    opener's, who closes it.
    """

    target: str
    """Absolute path inside."""
    path: str
    """Its real path at the time of opening."""
    descriptor: int
    """``O_PATH``."""
    device: int
    inode: int
    read_only: bool
    is_directory: bool = True
    is_mapped: bool = False
    """Its ids are to be mapped, where that can be done."""
    overlay: OverlayLayers | None = None
    """What is written goes there, and ``descriptor`` is only read."""
    engine_overlay: OverlayDirs | None = None
    """The same, made by the engine: it cannot be mounted by us."""

    def detach(self, *, userns_fd: int | None) -> int:
        """Return a mount of it that is nowhere yet: nosuid, nodev, private. The caller attaches and closes it.

        Of an overlay there is one at a time: two of the same layers would spoil them.

        Args:
            userns_fd: Whose id mapping it shows; None: ids as they are.

        Raises:
            Unsupported: this file system cannot be id-mapped or lie below an overlay, or the kernel is too old.
            OSError: anything else.
        """
        if self.overlay is None:
            return mounts.detached_bind(self.descriptor, read_only=self.read_only, userns_fd=userns_fd)
        with contextlib.ExitStack() as opened:
            layers_fd = open_directory(self.overlay.directory)
            opened.callback(os.close, layers_fd)
            if userns_fd is None:
                return mounts.detached_overlay(self.descriptor, layers_fd)
            # An overlay cannot be mapped, its layers can: both, so that on the disk ids are as in the project.
            lower_fd = opened.enter_context(_mapped(self.descriptor, userns_fd))
            layers_fd = opened.enter_context(_mapped(layers_fd, userns_fd))
            try:
                return mounts.detached_overlay(lower_fd, layers_fd)
            except Unsupported:
                # Kernels before 6.15 take only layers that are attached; they stay so no longer than this.
                opened.enter_context(_attached(lower_fd, f"{self.overlay.scratch}-lower"))
                opened.enter_context(_attached(layers_fd, f"{self.overlay.scratch}-layers"))
                return mounts.detached_overlay(lower_fd, layers_fd)

    def mount_at(self, path: str) -> None:
        """Mount it at a place of ours, for kernels on which it cannot be mounted nowhere. Ids are as they are.

        Raises:
            Unsupported: other file systems are mounted below it.
            OSError: anything else.
        """
        if self.overlay is None:
            propagation.bind_at(self.descriptor, path, source_path=self.path, read_only=self.read_only)
            return
        layers_fd = open_directory(self.overlay.directory)
        try:
            propagation.overlay_at(self.descriptor, layers_fd, path)
        finally:
            os.close(layers_fd)


def open_directory(path: str) -> int:
    """Open a directory of our own, never a symlink to one."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)


@contextlib.contextmanager
def _mapped(source_fd: int, userns_fd: int) -> Iterator[int]:
    """A descriptor of an id-mapped mount that is nowhere yet."""
    tree_fd = mounts.detached_bind(source_fd, read_only=False, userns_fd=userns_fd)
    try:
        yield tree_fd
    finally:
        os.close(tree_fd)


@contextlib.contextmanager
def _attached(tree_fd: int, directory: str) -> Iterator[None]:
    """A mount that was nowhere, attached for so long."""
    stage = Stage(directory)
    stage.attach(tree_fd)
    try:
        yield
    finally:
        stage.clear()


class Stage:
    """A place on the host where something is mounted by descriptor, for the engine to pass on.

    The engine clones the mount into the container, so ours is taken off again as soon as the container runs:
    no mount stays behind.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def put(self, source: MountSource, *, userns_fd: int | None) -> None:
        """Mount ``source`` here.

        Raises:
            Unsupported: this file system cannot be id-mapped, or the kernel is too old.
            OSError: anything else.
        """
        try:
            tree_fd = source.detach(userns_fd=userns_fd)
        except Unsupported:
            if userns_fd is not None or mounts.late_mounts_exist():
                raise
            self._make(is_directory=source.is_directory)
            source.mount_at(self.path)
            return
        try:
            self.attach(tree_fd, is_directory=source.is_directory)
        finally:
            os.close(tree_fd)

    def attach(self, tree_fd: int, *, is_directory: bool = True) -> None:
        """Attach a detached mount here."""
        self._make(is_directory=is_directory)
        target_fd = os.open(self.path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            mounts.attach(tree_fd, target_fd)
        finally:
            os.close(target_fd)

    def _make(self, *, is_directory: bool) -> None:
        self.clear()
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        if is_directory:
            os.mkdir(self.path, 0o700)
        else:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def link(self, path: str) -> None:
        """Have a symlink here, for an engine that cannot be told the path itself."""
        self.clear()
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        os.symlink(path, self.path)

    def clear(self) -> None:
        """Take every mount off and remove what they were on. Idempotent; also clears what a crash left."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISLNK(os.lstat(self.path).st_mode):
                os.unlink(self.path)
                return
            while mounts.unmount(self.path):
                pass
            if stat.S_ISDIR(os.lstat(self.path).st_mode):
                os.rmdir(self.path)
            else:
                os.unlink(self.path)


def idmap_works(probe_dir: str, userns_fd: int) -> bool:
    """Try an id-mapped mount on the file system of ``probe_dir``, and take it off again.

    Of a new directory, for a mount is mapped with all that is mounted below: there may be stages that a killed daemon
    left, which cannot be mapped again.
    """
    source_dir = os.path.join(probe_dir, "idmap-source")
    os.makedirs(source_dir, mode=0o700, exist_ok=True)
    descriptor = open_directory(source_dir)
    stage = Stage(os.path.join(probe_dir, "idmap-probe"))
    try:
        status = os.fstat(descriptor)
        source = MountSource(
            target=TARGET,
            path=source_dir,
            descriptor=descriptor,
            device=status.st_dev,
            inode=status.st_ino,
            read_only=True,
        )
        stage.put(source, userns_fd=userns_fd)
    except (Unsupported, OSError) as error:
        logger.warning("cannot map the ids of a mount here: %s", error)
        return False
    else:
        return True
    finally:
        stage.clear()
        os.close(descriptor)
        os.rmdir(source_dir)
