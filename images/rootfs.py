"""Builds a root file system as a tar archive, without any registry.

Everything here blocks: call it in a worker thread. Programs run with a deadline, in a session and (as root) a pid and
mount namespace of their own that ends with the thread which started it, so that neither a process nor a mount stays
behind. What a killed build leaves on disk is a directory with a lock that nobody holds: the next build removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pwd
import selectors
import shutil
import signal
import stat
import struct
import subprocess
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from images.recipes import (
    BUSYBOX_INSTALL,
    PATH_INSIDE,
    SANDBOX_GID,
    SANDBOX_UID,
    TOOLS,
    Attempt,
    Family,
    HostFacts,
    Source,
    family,
    parse_os_release,
    parse_packages,
    plan,
    recipe,
    suite,
)

Progress = Callable[[str, int | None, int | None], None]
"""Called with (message, done, total), at least once a second. What it raises ends the build and comes out of it."""

DISTRIBUTION_DEADLINE_S = 600.0
"""A slow mirror takes minutes; measured: 25 s with mmdebstrap, 45 s with debootstrap."""
ARCHIVE_DEADLINE_S = 120.0
SHORT_DEADLINE_S = 10.0
HEARTBEAT_S = 1.0
LINES_KEPT = 200
LINE_BYTES_MAX = 4096
FREE_BYTES_MIN = 1_500_000_000
"""The unpacked packages, the downloaded ones, and room for both to grow."""
TAR_MTIME_S = 1_704_067_200
"""2024-01-01: the same for every member, so that the same busybox gives the same archive."""
WORK_PREFIX = "sandboxd-rootfs-"
PARTIAL_PREFIX = ".sandboxd-rootfs-"
SCRATCH = "tmp"
SEARCH_PATH_MORE = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin")
BUSYBOX_NAMES = ("busybox", "busybox.static", "busybox-static")


class RootfsError(Exception):
    """A root file system could not be built.

    Args:
        brief: One clause, "cannot ...".
        detail: What the tool or the host said.
        hint: A command to type.
    """

    def __init__(self, brief: str, *, detail: str = "", hint: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.brief}: {self.detail}" if self.detail else self.brief


@dataclass(frozen=True, kw_only=True, slots=True)
class RootfsFacts:
    """A root file system that was built."""

    source: str
    size_bytes: int
    """Of the archive."""
    changes: tuple[str, ...]
    """Containerfile instructions to import it with."""


def context_dir(image: str) -> str:
    """Directory of an image's Containerfile.

    Raises:
        RootfsError: there is no such image.
    """
    directory = Path(__file__).resolve().parent / image
    if not (directory / "Containerfile").is_file():
        raise RootfsError(f"cannot find a Containerfile for the image {image!r}", detail=str(directory))
    return str(directory)


def host_facts() -> HostFacts:
    """What this host offers to build from."""
    os_release = parse_os_release(_read_text("/etc/os-release") or _read_text("/usr/lib/os-release"))
    return HostFacts(
        family=family(os_release),
        name=os_release.get("PRETTY_NAME", "this system"),
        suite=suite(os_release),
        uid=os.geteuid(),
        tools=frozenset(tool for tool in TOOLS if _which(tool) is not None),
        subordinate_ids=_has_subordinate_ids(),
        busybox=find_busybox(),
        apt_sources=tuple(_apt_sources()),
    )


def build_rootfs(source: str, out_tar: str, progress: Progress) -> RootfsFacts:
    """Build one root file system.

    Args:
        source: ``distribution`` or ``busybox``.
        out_tar: Path of the archive to write. It appears whole or not at all.
        progress: See ``Progress``.

    Raises:
        RootfsError: the host lacks something, or a tool failed or took too long.
    """
    try:
        attempt = plan(source, host_facts())[0]
    except ValueError:
        attempt = Attempt(source=Source.REGISTRY, possible=False, reason="")
    if attempt.source is Source.REGISTRY:
        raise RootfsError(
            f"cannot build a root file system from {source!r}", detail="it must be distribution or busybox"
        )
    if not attempt.possible:
        raise RootfsError(
            f"cannot build a root file system from {source!r}", detail=attempt.reason, hint=attempt.hint
        )
    if attempt.source is Source.BUSYBOX:
        return busybox_rootfs(out_tar, progress)
    return distribution_rootfs(out_tar, progress)


# --- busybox --------------------------------------------------------------------------------------------


def find_busybox() -> str | None:
    """Path of a static busybox on this host, None if there is none."""
    candidates = [path for name in BUSYBOX_NAMES if (path := _which(name)) is not None]
    return next((path for path in candidates if is_static(path)), None)


def is_static(path: str) -> bool:
    """Whether this is an ELF program that needs no interpreter (it has no PT_INTERP segment)."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:4] != b"\x7fELF":
                return False
            bits64 = head[4] == 2
            order = "<" if head[5] == 1 else ">"
            offset = struct.unpack_from(f"{order}{'Q' if bits64 else 'I'}", head, 32 if bits64 else 28)[0]
            entry_bytes, count = struct.unpack_from(f"{order}HH", head, 54 if bits64 else 42)
            file.seek(offset)
            table = file.read(entry_bytes * count)
    except OSError:
        return False
    if entry_bytes < 4 or len(table) < entry_bytes * count:
        return False
    pt_interp = 3
    kinds = (struct.unpack_from(f"{order}I", table, at)[0] for at in range(0, len(table), entry_bytes))
    return pt_interp not in kinds


def busybox_rootfs(out_tar: str, progress: Progress = lambda _message, _done, _total: None) -> RootfsFacts:
    """A root file system around one static busybox. Needs no root, and gives the same bytes for the same busybox.

    Raises:
        RootfsError: there is no static busybox, or it cannot be asked for its applets.
    """
    busybox = find_busybox()
    if busybox is None:
        hint = BUSYBOX_INSTALL[family(parse_os_release(_read_text("/etc/os-release")))]
        raise RootfsError("cannot find a static busybox", detail="looked on PATH and in the system's bin", hint=hint)
    progress(f"busybox: packing {busybox}", None, None)
    try:
        asked = subprocess.run(
            [busybox, "--list"], capture_output=True, text=True, check=True, timeout=SHORT_DEADLINE_S
        )
        program = Path(busybox).read_bytes()
    except (OSError, subprocess.SubprocessError) as error:
        raise RootfsError(f"cannot use {busybox}", detail=str(error)) from error
    applets = sorted({name for name in asked.stdout.split() if _is_plain_name(name)} - {"busybox"})
    with _written_whole(out_tar) as file:
        try:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for member, content in _busybox_members(program, applets):
                    tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
        except OSError as error:
            raise RootfsError(f"cannot write {out_tar!r}", detail=str(error)) from error
    size_bytes = os.stat(out_tar).st_size
    progress(f"busybox: {len(applets)} applets", 1, 1)
    return RootfsFacts(source=Source.BUSYBOX, size_bytes=size_bytes, changes=_changes("/bin/sh"))


def _busybox_members(program: bytes, applets: Sequence[str]) -> list[tuple[tarfile.TarInfo, bytes]]:
    # runc gives a tmpfs the mode of the directory below it, and root for an owner: what is to be written to by the
    # sandbox's user, whatever its uid, is open to every uid here.
    directories = {
        "bin": 0o755,
        "dev": 0o755,
        "etc": 0o755,
        "home": 0o755,
        "home/sandbox": 0o1777,
        "proc": 0o555,
        "root": 0o700,
        "run": 0o1777,
        "sys": 0o555,
        "tmp": 0o1777,
        "usr": 0o755,
        "usr/local": 0o755,
        "usr/local/bin": 0o755,
        "var": 0o755,
        "var/tmp": 0o1777,
        "workspace": 0o755,
    }
    owned_by_sandbox = {"home/sandbox", "workspace"}
    links = {"sbin": "bin", "usr/bin": "../bin", "usr/sbin": "../bin", "var/run": "../run"}
    files = {
        "etc/group": f"root:x:0:\nsandbox:x:{SANDBOX_GID}:\nnogroup:x:65534:\n",
        "etc/hostname": "",
        "etc/hosts": "",
        "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "etc/os-release": 'ID=sandboxd-busybox\nNAME="sandboxd busybox"\nPRETTY_NAME="sandboxd busybox"\n',
        "etc/passwd": (
            "root:x:0:0:root:/root:/bin/sh\n"
            f"sandbox:x:{SANDBOX_UID}:{SANDBOX_GID}:sandbox:/home/sandbox:/bin/sh\n"
            "nobody:x:65534:65534:nobody:/:/bin/false\n"
        ),
        "etc/resolv.conf": "",
    }
    members = [(_member(name, tarfile.DIRTYPE, mode), b"") for name, mode in directories.items()]
    members += [(_member(name, tarfile.SYMTYPE, 0o777, link=target), b"") for name, target in links.items()]
    members += [(_member(f"bin/{name}", tarfile.SYMTYPE, 0o777, link="busybox"), b"") for name in applets]
    contents = {name: (text.encode(), 0o644) for name, text in files.items()} | {"bin/busybox": (program, 0o755)}
    for name, (content, mode) in contents.items():
        members.append((_member(name, tarfile.REGTYPE, mode, size=len(content)), content))
    for member, _ in members:
        if member.name in owned_by_sandbox:
            member.uid, member.gid = SANDBOX_UID, SANDBOX_GID
    return sorted(members, key=lambda pair: pair[0].name)


def _member(name: str, kind: bytes, mode: int, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.linkname, member.mtime = kind, mode, size, link, TAR_MTIME_S
    return member


# --- distribution ---------------------------------------------------------------------------------------


def distribution_rootfs(
    out_tar: str, progress: Progress, *, facts: HostFacts | None = None, deadline_s: float = DISTRIBUTION_DEADLINE_S
) -> RootfsFacts:
    """A root file system from the distribution's own packages, of the host's own release.

    Raises:
        RootfsError: the host lacks a tool, or the tool failed or took too long.
    """
    facts = host_facts() if facts is None else facts
    found = recipe(facts)
    if isinstance(found, str):
        hint = plan(Source.DISTRIBUTION, facts)[0].hint
        raise RootfsError("cannot build from the distribution's packages", detail=found, hint=hint)
    folder = Path(context_dir("default"))
    packages = parse_packages((folder / f"packages.{facts.family}").read_text())
    finish = (folder / "finish.sh").read_text()
    deadline = time.monotonic() + deadline_s
    as_root = facts.uid == 0
    report = _Stages(found.tool, progress)
    with _work_dir(out_tar, traversable=not as_root) as (work, lock):
        root = os.path.join(work, "root")
        os.mkdir(root, 0o755)
        scratch = os.path.join(work, SCRATCH)
        os.mkdir(scratch)
        os.chmod(scratch, 0o700 if as_root else 0o1777)  # uids of the user's own range make theirs in it
        env = {"TMPDIR": scratch, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        contained = _contained_argv(as_root=as_root)
        with _written_whole(out_tar) as file:
            command = (*contained, *found.argv(root, packages, finish))
            if found.archive_on_stdout:
                _run(command, report, deadline, env, lock=lock, stdout=file)
            else:
                _run(command, report, deadline, env, lock=lock)
                _run((*contained, "sh", "-c", finish, "finish", root), report, deadline, env, lock=lock)
                deadline = max(deadline, time.monotonic() + ARCHIVE_DEADLINE_S)
                _run((*contained, *_tar_argv(root)), report, deadline, env, lock=lock, stdout=file)
    size_bytes = os.stat(out_tar).st_size
    progress(f"distribution: {size_bytes // 1_000_000} MB", 1, 1)
    return RootfsFacts(source=Source.DISTRIBUTION, size_bytes=size_bytes, changes=_changes("/bin/bash"))


class _Stages:
    """Turns a tool's lines into progress. Debian's tools mark theirs; of the others every line counts."""

    def __init__(self, tool: str, progress: Progress) -> None:
        self._title = f"distribution ({tool})"
        self._mark = "I: " if tool in ("mmdebstrap", "debootstrap") else ""
        self._progress = progress
        self._done = 0
        self._last = "starting"

    def line(self, text: str) -> None:
        message = text.removeprefix(self._mark).strip()
        if message and text.startswith(self._mark) and "--customize-hook" not in message:
            self._last = message
            self._done += 1
            self.heartbeat()

    def heartbeat(self) -> None:
        self._progress(f"{self._title}: {self._last}", self._done, None)


def _contained_argv(*, as_root: bool) -> tuple[str, ...]:
    """What a tool is started through: namespaces, so that its mounts and its processes end together.

    They end with the thread that waits here, too. Not so for an ordinary user: mmdebstrap's helper, which maps the
    subordinate ids, forks; there a tool whose builder was killed runs to its own end, and holds the lock until then.
    """
    helper = () if as_root else ("mmdebstrap", "--unshare-helper")
    namespaces = ("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--")
    return ("setpriv", "--pdeathsig", "KILL", "--", *helper, *namespaces)


def _tar_argv(root: str) -> tuple[str, ...]:
    left_out = ("./dev/*", "./proc/*", "./sys/*", "./run/*", "./tmp/*")
    return (
        "tar",
        "--create",
        "--file=-",
        "--numeric-owner",
        "--sort=name",
        "--one-file-system",
        *(f"--exclude={pattern}" for pattern in left_out),
        f"--directory={root}",
        ".",
    )


def _run(
    argv: Sequence[str],
    report: _Stages,
    deadline: float,
    env: dict[str, str],
    *,
    lock: int,
    stdout: IO[bytes] | None = None,
) -> None:
    """Run one tool to its end, feeding its lines to ``report``.

    The tool inherits the working directory's lock: should we be killed and it live on, nobody takes its files away.
    """
    tool = next(word for word in argv if word in (*TOOLS[:5], "sh", "tar"))
    search_path = os.pathsep.join([os.environ.get("PATH", ""), *SEARCH_PATH_MORE])
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if stdout is None else subprocess.PIPE,
            env={**os.environ, **env, "PATH": search_path},
            cwd="/",
            start_new_session=True,
            pass_fds=(lock,),
        )
    except OSError as error:
        raise RootfsError(f"cannot start {tool}", detail=str(error)) from error
    kept: deque[str] = deque(maxlen=LINES_KEPT)
    lines = process.stdout if stdout is None else process.stderr
    assert lines is not None
    try:
        in_time = _follow(lines.fileno(), kept, report, deadline)
        exit_code = process.wait(max(0.1, deadline - time.monotonic())) if in_time else None
    except subprocess.TimeoutExpired:
        exit_code = None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines.close()
    if exit_code is None:
        raise RootfsError(f"cannot wait longer for {tool}", detail=_last_words(kept), hint="check the mirror's speed")
    if exit_code != 0:
        raise RootfsError(f"cannot finish: {tool} exited with {exit_code}", detail=_last_words(kept))


def _follow(descriptor: int, kept: deque[str], report: _Stages, deadline: float) -> bool:
    """Read lines until the end or the deadline.

    Returns:
        Whether the end came first.
    """
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            if not selector.select(min(left_s, HEARTBEAT_S)):
                report.heartbeat()
                continue
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return True
            *complete, pending = (pending + chunk).split(b"\n")
            pending = pending[-LINE_BYTES_MAX:]
            for raw in complete:
                text = raw[-LINE_BYTES_MAX:].decode(errors="replace")
                kept.append(text)
                report.line(text)
    return False


def _last_words(lines: Sequence[str]) -> str:
    errors = [line for line in lines if line.startswith(("E:", "W:", "Error", "error", "==> ERROR"))]
    return "; ".join((errors or list(lines))[-5:])


# --- working directory ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_dir(out_tar: str, *, traversable: bool) -> Iterator[tuple[str, int]]:
    """A directory and its lock; both are gone afterwards. Removes what killed builds left first.

    Args:
        out_tar: The directory is made beside it where that is allowed to hold a root file system.
        traversable: Subordinate uids must be able to reach it: not inside a private home, then.
    """
    beside = [] if traversable else [os.path.dirname(os.path.abspath(out_tar))]
    candidates = [*beside, "/var/tmp", tempfile.gettempdir()]  # noqa: S108 - a name of its own is made in it
    for candidate in dict.fromkeys(candidates):
        remove_stale(candidate)
    parent = next(filter(_can_hold_root, candidates), None)
    if parent is None:
        tried = ", ".join(dict.fromkeys(candidates))
        raise RootfsError(
            "cannot find a place to build in",
            detail=f"{tried}: each lacks 1.5 GB of room, or is mounted nodev or noexec",
            hint="set TMPDIR to a directory with room",
        )
    path, descriptor = _make_locked_dir(parent, 0o711 if traversable else 0o700)
    try:
        yield path, descriptor
    finally:
        _remove_tree(path)
        os.close(descriptor)


def _make_locked_dir(parent: str, mode: int) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=WORK_PREFIX, dir=parent)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another build may have taken it for a leftover before the lock was ours.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.chmod(path, mode)
                return path, descriptor
        os.close(descriptor)


def remove_stale(parent: str) -> int:
    """Remove the working directories and unfinished archives in ``parent`` that no build holds.

    Returns:
        How many were removed.
    """
    removed = 0
    try:
        names = [name for name in os.listdir(parent) if name.startswith((WORK_PREFIX, PARTIAL_PREFIX))]
    except OSError:
        return 0
    for path in (os.path.join(parent, name) for name in names):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            facts = os.fstat(descriptor)
            if facts.st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(facts.st_mode):
                    _remove_tree(path)
                else:
                    os.unlink(path)
                removed += not os.path.lexists(path)
        except (BlockingIOError, FileNotFoundError):
            continue
        finally:
            os.close(descriptor)
    return removed


def _remove_tree(path: str) -> None:
    """Remove a directory, and what subordinate uids own in it. Never crosses into another mount."""
    if _has_mount_below(path):
        return
    shutil.rmtree(path, ignore_errors=True)
    if os.path.isdir(path) and os.geteuid() != 0 and _which("mmdebstrap") is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                ["mmdebstrap", "--unshare-helper", "rm", "-rf", "--one-file-system", os.path.join(path, SCRATCH)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=ARCHIVE_DEADLINE_S,
            )
        shutil.rmtree(path, ignore_errors=True)


def _has_mount_below(path: str) -> bool:
    inside = f"{os.path.realpath(path)}/"
    return any(len(words := line.split()) > 4 and words[4].startswith(inside) for line in _mountinfo())


def _mountinfo() -> list[str]:
    return _read_text("/proc/self/mountinfo").splitlines()


def _can_hold_root(parent: str) -> bool:
    try:
        facts = os.statvfs(parent)
    except OSError:
        return False
    # glibc's ST_NODEV and ST_NOEXEC; Python exposes them only where the C library does.
    forbidden = getattr(os, "ST_NODEV", 4) | getattr(os, "ST_NOEXEC", 8)
    has_room = facts.f_bavail * facts.f_frsize >= FREE_BYTES_MIN
    return os.access(parent, os.W_OK | os.X_OK) and has_room and not facts.f_flag & forbidden


@contextlib.contextmanager
def _written_whole(path: str) -> Iterator[IO[bytes]]:
    """A locked file that gets its name only when the block ends well."""
    directory = os.path.dirname(os.path.abspath(path))
    remove_stale(directory)
    try:
        descriptor, partial = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=directory)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise RootfsError(f"cannot write {path!r}", detail=str(error)) from error
    try:
        with open(descriptor, "wb") as file:
            yield file
        try:
            os.replace(partial, path)
        except OSError as error:
            raise RootfsError(f"cannot write {path!r}", detail=str(error)) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


# --- the host -------------------------------------------------------------------------------------------


def _changes(shell: str) -> tuple[str, ...]:
    return (
        f"ENV PATH={PATH_INSIDE}",
        "ENV LANG=C.UTF-8",
        f"USER {SANDBOX_UID}:{SANDBOX_GID}",
        "WORKDIR /workspace",
        f'CMD ["{shell}"]',
    )


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SEARCH_PATH_MORE]))


def _is_plain_name(name: str) -> bool:
    return bool(name) and "/" not in name and name not in (".", "..") and name.isprintable()


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _apt_sources() -> Iterator[tuple[str, str]]:
    if os.path.exists("/etc/apt/sources.list"):
        yield "sources.list", _read_text("/etc/apt/sources.list")
    for path in sorted(Path("/etc/apt/sources.list.d").glob("*")):
        if path.suffix in (".list", ".sources") and stat.S_ISREG(path.stat().st_mode):
            yield path.name, _read_text(str(path))


def _has_subordinate_ids() -> bool:
    uid = os.geteuid()
    try:
        names = {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:
        names = {str(uid)}
    files = ("/etc/subuid", "/etc/subgid")
    return all(any(line.partition(":")[0] in names for line in _read_text(file).splitlines()) for file in files)


__all__ = [
    "Family",
    "Progress",
    "RootfsError",
    "RootfsFacts",
    "build_rootfs",
    "busybox_rootfs",
    "context_dir",
    "distribution_rootfs",
    "find_busybox",
    "host_facts",
    "is_static",
    "remove_stale",
]
