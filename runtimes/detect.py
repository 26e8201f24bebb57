"""Which engines this host has, and what they can do here.

Looks at the host and asks each engine once; ``runtimes.suitability`` judges what was seen.
"""

from __future__ import annotations

import errno
import os
import pwd
import resource
import shutil
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping

import anyio

from runtimes import parse
from runtimes.errors import RuntimeFailure, UnreadableAnswer
from runtimes.model import EngineInfo
from runtimes.process import client_environment, run
from runtimes.suitability import (
    NETWORK_PROGRAM,
    PACKAGE_MANAGERS,
    DockerFacts,
    HostFacts,
    PodmanFacts,
    SocketState,
    cgroup_version,
    choose,
    has_range,
    judge_docker,
    judge_podman,
    socket_path,
)

__all__ = ["choose", "detect_all"]

INFO_S_MAX = 20.0
CONTEXT_S_MAX = 5.0
"""Together, what one engine may take. Engines answer in 0.05 s when they are well; on an emulated machine with two
slow CPUs `podman info` was seen to take 10 s, while Docker's socket was starting its daemon."""

DOCKER_SOCKET = "/var/run/docker.sock"

_PROGRAMS = ("crun", "runc", "newuidmap", "fuse-overlayfs", NETWORK_PROGRAM, *PACKAGE_MANAGERS)
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where OCI runtimes and package managers may be, and the PATH of a user or of a service does not look."""

_FILE_BYTES_MAX = 1024 * 1024


async def detect_all(env: Mapping[str, str]) -> list[EngineInfo]:
    """Look for every engine that can be driven: Podman, then Docker, usable or not.

    Args:
        env: Where to look, and what the clients are given: PATH, DOCKER_HOST, XDG_RUNTIME_DIR and the like.

    Never fails: an engine that does not answer in time is unusable, and says so. Both are asked at once.
    """
    host = await anyio.to_thread.run_sync(host_facts, env)
    clients_env = client_environment(env)
    found: dict[int, EngineInfo] = {}

    async def look(place: int, ask: Callable[[], Awaitable[EngineInfo]]) -> None:
        found[place] = await ask()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look, 0, lambda: _look_for_podman(host, clients_env))
        tasks.start_soon(look, 1, lambda: _look_for_docker(host, clients_env))
    return [found[place] for place in sorted(found)]


def host_facts(env: Mapping[str, str]) -> HostFacts:
    """What can be seen of the host without asking an engine. Reads small files only."""
    uid = os.getuid()
    user = _user_name(uid)
    runtime_dir = env.get("XDG_RUNTIME_DIR") or None
    if runtime_dir is not None and not _is_own_directory(runtime_dir, uid):
        runtime_dir = None
    path = os.pathsep.join((env.get("PATH", os.defpath), _SYSTEM_PATH))
    return HostFacts(
        uid=uid,
        cgroup_version=cgroup_version(_text("/proc/self/mountinfo") or ""),
        systemd_booted=os.path.isdir("/run/systemd/system"),
        user_session=runtime_dir is not None and os.path.exists(os.path.join(runtime_dir, "systemd", "private")),
        user_controllers=_user_controllers(uid),
        runtime_dir=runtime_dir,
        subuids=all(has_range(_text(table) or "", user=user, uid=uid) for table in ("/etc/subuid", "/etc/subgid")),
        programs=frozenset(name for name in _PROGRAMS if shutil.which(name, path=path)),
        nofile_hard_max=_hard_limit(resource.RLIMIT_NOFILE),
        nproc_hard_max=_hard_limit(resource.RLIMIT_NPROC),
        selinux_enforcing=(_text("/sys/fs/selinux/enforce") or "").strip() == "1",
    )


async def _look_for_podman(host: HostFacts, env: Mapping[str, str]) -> EngineInfo:
    client_path = shutil.which("podman", path=env.get("PATH"))
    if client_path is None:
        return judge_podman(host, PodmanFacts(client_path=None))
    try:
        words = [client_path, "info", "--format=json"]
        finished = await run(words, what="`podman info`", deadline_s=INFO_S_MAX, env=env)
        if finished.returncode != 0:
            return judge_podman(
                host, PodmanFacts(client_path=client_path, complaint=parse.complaint(finished.stderr))
            )
        info = parse.podman_info(finished.stdout)
    except RuntimeFailure as failure:
        return judge_podman(host, PodmanFacts(client_path=client_path, complaint=str(failure)))
    return judge_podman(host, PodmanFacts(client_path=client_path, info=info))


async def _look_for_docker(host: HostFacts, env: Mapping[str, str]) -> EngineInfo:
    client_path = shutil.which("docker", path=env.get("PATH"))
    if client_path is None:
        return judge_docker(host, DockerFacts(client_path=None))
    endpoint, state = await _docker_endpoint(client_path, env)
    info, complaint = None, ""
    try:
        # Asked whatever the socket said, and read whatever the status: the client always says what it is itself.
        words = [client_path, f"--host={endpoint}", "info", "--format={{json .}}"]
        finished = await run(words, what="`docker info`", deadline_s=INFO_S_MAX, env=env)
        complaint = parse.complaint(finished.stderr)
        info = parse.docker_info(finished.stdout)
    except RuntimeFailure as failure:
        complaint = complaint or str(failure)
    facts = DockerFacts(client_path=client_path, endpoint=endpoint, socket=state, info=info, complaint=complaint)
    return judge_docker(host, facts)


async def _docker_endpoint(client_path: str, env: Mapping[str, str]) -> tuple[str, SocketState]:
    """The endpoint that the user has set, else the system's socket, else the user's own (rootless Docker)."""
    endpoint = env.get("DOCKER_HOST")
    if not endpoint:
        asks = _may_have_context(env)
        endpoint = await _context_endpoint(client_path, env) if asks else f"unix://{DOCKER_SOCKET}"
    state = connect(endpoint)
    runtime_dir = env.get("XDG_RUNTIME_DIR")
    if state is not SocketState.OPEN and endpoint == f"unix://{DOCKER_SOCKET}" and runtime_dir:
        own = f"unix://{os.path.join(runtime_dir, 'docker.sock')}"
        if connect(own) is SocketState.OPEN:
            return own, SocketState.OPEN
    return endpoint, state


def _may_have_context(env: Mapping[str, str]) -> bool:
    """Whether somebody has chosen a context: where nobody has, there is no need to ask a client for its endpoint.

    Source: docker-context(1). What cannot be read here the client may understand.
    """
    if env.get("DOCKER_CONTEXT"):
        return True
    directory = env.get("DOCKER_CONFIG") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".docker")
    settings = os.path.join(directory, "config.json")
    if not os.path.lexists(settings):
        return False
    try:
        return parse.chooses_context((_text(settings) or "").encode())
    except UnreadableAnswer:
        return True


async def _context_endpoint(client_path: str, env: Mapping[str, str]) -> str:
    words = [client_path, "context", "inspect", "--format={{.Endpoints.docker.Host}}"]
    try:
        finished = await run(words, what="`docker context`", deadline_s=CONTEXT_S_MAX, env=env)
    except RuntimeFailure:
        return f"unix://{DOCKER_SOCKET}"
    return finished.stdout.decode(errors="replace").strip() or f"unix://{DOCKER_SOCKET}"


def connect(endpoint: str) -> SocketState:
    """Try the door: whether somebody listens at this endpoint and lets us in."""
    path = socket_path(endpoint)
    if path is None:
        return SocketState.REMOTE
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.setblocking(False)
        try:
            code = door.connect_ex(path)
        except (OSError, ValueError):
            # Longer than a socket's path can be, or with a NUL in it.
            return SocketState.MISSING
    match code:
        case 0 | errno.EAGAIN | errno.EINPROGRESS:
            return SocketState.OPEN
        case errno.EACCES | errno.EPERM:
            return SocketState.FORBIDDEN
        case errno.ECONNREFUSED:
            return SocketState.DEAD
        case _:
            return SocketState.MISSING


def _user_controllers(uid: int) -> tuple[str, ...] | None:
    unit = f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service/cgroup.controllers"
    text = _text(unit)
    return None if text is None else tuple(text.split())


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_own_directory(path: str, uid: int) -> bool:
    try:
        return os.path.isdir(path) and os.stat(path).st_uid == uid
    except OSError:
        return False


def _hard_limit(which: int) -> int | None:
    hard = resource.getrlimit(which)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def _text(path: str) -> str | None:
    """What a regular file holds; None: it cannot be read, or is no such file. Some are the user's: never waits."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=_open_at_once) as file:
            return file.read(_FILE_BYTES_MAX) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
