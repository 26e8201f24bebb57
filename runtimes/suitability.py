"""Whether an engine can be used on this host, what for, and what to type where it cannot. Pure.

``runtimes.detect`` looks at the host and fills in the facts; here they are judged.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import assert_never

import msgspec

from runtimes.cgroup.verify import BOOT_V2_HINT, COUNT_SWAP_HINT, DELEGATE_HINT, LINGER_HINT, boot_with
from runtimes.errors import EngineUnavailable
from runtimes.model import Capabilities, CgroupVersion, EngineInfo, EngineName, NetworkSwitch, Shortcoming
from runtimes.parse import DockerInfo, PodmanInfo, version

NETWORK_PROGRAM = "slirp4netns"
"""What gives a Podman container a network while it runs: see ``runtimes.usernet``."""

PODMAN_NPROC_MAX = 32768
"""RLIMIT_NPROC of conmon, whatever the host's own hard limit: a container's cannot be above its monitor's."""

PODMAN_UPDATE_SINCE = (4, 3)
PODMAN_UPDATE_PIDS_SINCE = (4, 4)
PODMAN_UPDATE_HEALTHCHECK_SINCE = (5, 4)
"""``podman update``, its ``--pids-limit`` and its ``--no-healthcheck``, by Podman's own manuals of these versions.

Without the last, 5.4.2 says "healthcheck-timeout must be at least 1 second" of a container made with that flag."""

HOST_DOCKER_HINT = "unset DOCKER_HOST && docker context use default"

_DOCKER_SOCKETS = frozenset({"", "/var/run/docker.sock", "/run/docker.sock"})

_LIMIT_CONTROLLERS = ("memory", "cpu", "pids", "cpuset")

_PACKAGES: dict[str, dict[str, str]] = {
    # program: {package manager: package}
    "podman": {"apt-get": "podman", "dnf": "podman", "zypper": "podman", "pacman": "podman"},
    "docker": {"apt-get": "docker.io", "dnf": "moby-engine", "zypper": "docker", "pacman": "docker"},
    "runc": {"apt-get": "runc", "dnf": "runc", "zypper": "runc", "pacman": "runc"},
    "newuidmap": {"apt-get": "uidmap", "dnf": "shadow-utils", "zypper": "shadow", "pacman": "shadow"},
    "fuse-overlayfs": {
        "apt-get": "fuse-overlayfs",
        "dnf": "fuse-overlayfs",
        "zypper": "fuse-overlayfs",
        "pacman": "fuse-overlayfs",
    },
    NETWORK_PROGRAM: dict.fromkeys(("apt-get", "dnf", "zypper", "pacman"), NETWORK_PROGRAM),
}
_INSTALL = {
    "apt-get": "sudo apt-get install",
    "dnf": "sudo dnf install",
    "zypper": "sudo zypper install",
    "pacman": "sudo pacman -S",
}

PACKAGE_MANAGERS = tuple(_INSTALL)


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of the host, without asking an engine."""

    uid: int
    cgroup_version: CgroupVersion | None
    systemd_booted: bool
    user_session: bool
    """The user has a systemd instance of its own, which can be asked for scopes."""
    user_controllers: tuple[str, ...] | None
    """v2: controllers delegated to the user's systemd instance, None where that cannot be read."""
    runtime_dir: str | None
    """XDG_RUNTIME_DIR, None when it is not set or not a folder of this user."""
    subuids: bool
    """/etc/subuid and /etc/subgid both have a range for this user."""
    programs: frozenset[str]
    """Of those that matter here, the ones that are installed; package managers among them."""
    nofile_hard_max: int | None
    nproc_hard_max: int | None
    selinux_enforcing: bool


class SocketState(enum.Enum):
    """What connecting to a Unix socket gave."""

    OPEN = "open"
    MISSING = "missing"
    FORBIDDEN = "forbidden"
    DEAD = "dead"
    """The file is there and nobody listens."""
    REMOTE = "remote"
    """Not a Unix socket: an engine on another machine."""


class DockerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of Docker."""

    client_path: str | None
    endpoint: str = ""
    """As Docker writes it: ``unix:///path``, ``tcp://...``, ``ssh://...``."""
    socket: SocketState = SocketState.MISSING
    info: DockerInfo | None = None
    complaint: str = ""
    """Why there is no info."""


class PodmanFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of Podman."""

    client_path: str | None
    info: PodmanInfo | None = None
    complaint: str = ""


def judge_docker(host: HostFacts, facts: DockerFacts) -> EngineInfo:
    """Docker on this host."""
    found = _found(EngineName.DOCKER, host, facts.client_path)
    info = facts.info
    if facts.client_path is None:
        return _unusable(found, "docker is not installed", _install(host, "docker"))
    if info is not None and info.host is not None:
        return _unusable(
            found, "the docker command here is Podman's own stand-in", "sandboxctl create --engine podman"
        )
    found = msgspec.structs.replace(
        found,
        client_version=info.client_info.version or None if info is not None else None,
        socket_path=socket_path(facts.endpoint),
    )
    obstacle = _docker_obstacle(facts)
    if obstacle is not None:
        return _unusable(found, *obstacle)
    if info is None or not info.server_version:
        return _unusable(found, _because("the Docker daemon does not answer", facts.complaint), "docker info")
    if info.operating_system == "Docker Desktop":
        return _unusable(
            found, "Docker Desktop runs containers in a virtual machine, out of this host's reach", HOST_DOCKER_HINT
        )
    return _judge_docker_server(found, info)


def judge_podman(host: HostFacts, facts: PodmanFacts) -> EngineInfo:
    """Podman on this host."""
    found = _found(EngineName.PODMAN, host, facts.client_path)
    if facts.client_path is None:
        return _unusable(found, "podman is not installed", _install(host, "podman"))
    if facts.info is None:
        return _unusable(found, *_podman_silence(host, facts.complaint))
    info = facts.info
    rootless = info.host.security.rootless
    runtime, runtime_reason = _podman_runtime(host, info)
    found = msgspec.structs.replace(
        found,
        client_version=info.version.version,
        server_version=info.version.version,
        rootless=rootless,
        cgroup_manager=_podman_cgroup_manager(host, info),
        storage_driver=info.store.graph_driver_name or None,
        oci_runtime=runtime,
        oci_runtime_reason=runtime_reason,
        nproc_hard_max=min(filter(None, (host.nproc_hard_max, PODMAN_NPROC_MAX))),
    )
    if info.host.service_is_remote:
        return _unusable(found, "podman is set to talk to another machine", "unset CONTAINER_HOST")
    if runtime is None:
        return _unusable(
            found,
            "crun cannot run on this host's v1 control groups, and runc is not installed",
            _install(host, "runc"),
        )
    if rootless and sum(mapping.size for mapping in info.host.id_mappings.uidmap or ()) <= 1:
        return _unusable(found, *_no_subuids())
    return _judge_podman_limits(found, host, info)


def choose(infos: Sequence[EngineInfo], preferred: EngineName | None) -> EngineInfo:
    """The engine for a new sandbox: the one that was asked for, else the best one that works.

    Best is one that can limit memory, CPU time and processes; of equals, Podman, which needs no daemon.

    Raises:
        EngineUnavailable: it cannot be used, or none can; with the reason of each.
    """
    candidates = [info for info in infos if preferred in {None, info.name}]
    usable = [info for info in candidates if info.usable]
    if usable:
        order = list(EngineName)
        return min(usable, key=lambda info: (not _limits_all(info.capabilities), order.index(info.name)))
    wanted = "any container engine" if preferred is None else preferred.value
    raise EngineUnavailable(
        f"cannot use {wanted}",
        detail="; ".join(info.reason for info in candidates) or "none was looked for",
        hint=" ; or: ".join(info.hint for info in candidates if info.hint),
    )


def cgroup_version(mountinfo: str) -> CgroupVersion | None:
    """Which control groups the host mounts, from ``/proc/self/mountinfo``. None where it mounts none."""
    mounts = [line.partition(" - ") for line in mountinfo.splitlines()]
    kinds = {tail.split(" ", 1)[0] for _, _, tail in mounts}
    if "cgroup2" not in kinds:
        return CgroupVersion.V1 if "cgroup" in kinds else None
    return CgroupVersion.HYBRID if "cgroup" in kinds else CgroupVersion.V2


def has_range(table: str, *, user: str, uid: int) -> bool:
    """Whether ``/etc/subuid`` or ``/etc/subgid`` has a range for this user."""
    fields = [line.split(":") for line in table.splitlines()]
    return any(len(row) == 3 and row[0] in {user, str(uid)} and row[2].strip() not in {"", "0"} for row in fields)


def socket_path(endpoint: str) -> str | None:
    """The path of a ``unix://`` endpoint, None for any other."""
    return endpoint.removeprefix("unix://") if endpoint.startswith("unix:///") else None


def _found(name: EngineName, host: HostFacts, client_path: str | None) -> EngineInfo:
    return EngineInfo(
        name=name,
        usable=False,
        reason="",
        client_path=client_path,
        cgroup_version=host.cgroup_version,
        nofile_hard_max=host.nofile_hard_max,
        nproc_hard_max=host.nproc_hard_max,
        selinux_enforcing=host.selinux_enforcing,
    )


def _unusable(found: EngineInfo, reason: str, hint: str) -> EngineInfo:
    return msgspec.structs.replace(found, usable=False, reason=reason, hint=hint)


def _docker_obstacle(facts: DockerFacts) -> tuple[str, str] | None:
    """What stands between us and the daemon's socket: reason and hint."""
    path = facts.endpoint.removeprefix("unix://")
    match facts.socket:
        case SocketState.FORBIDDEN:
            return f"you may not use Docker's socket {path}", 'sudo usermod -aG docker "$USER" && newgrp docker'
        case SocketState.MISSING | SocketState.DEAD:
            if path.startswith("/run/user/"):
                return "your rootless Docker daemon is not running", "systemctl --user start docker"
            if path not in _DOCKER_SOCKETS:
                return f"no Docker daemon listens at {path}", HOST_DOCKER_HINT
            return "the Docker daemon is not running", "sudo systemctl start docker"
        case SocketState.REMOTE:
            reason = f"Docker runs on another machine ({facts.endpoint}), where nothing of this one can be mounted"
            return reason, HOST_DOCKER_HINT
        case SocketState.OPEN:
            return None
        case _:
            assert_never(facts.socket)


def _judge_docker_server(found: EngineInfo, info: DockerInfo) -> EngineInfo:
    rootless = "name=rootless" in (info.security_options or ())
    able = {
        "memory": info.memory_limit,
        "cpu": info.cpu_cfs_quota,
        "pids": info.pids_limit,
        "cpuset": info.cpu_set,
    }
    controllers = tuple(name for name in _LIMIT_CONTROLLERS if able[name])
    hint = _limit_hint(found.cgroup_version, controllers, rootless=rootless, user_session=True)
    warnings = _limit_warnings(controllers, "Docker", hint)
    if info.memory_limit and not info.swap_limit:
        warnings.append(
            Shortcoming(
                what="the kernel does not count swap by container: a memory limit does not bound it",
                fix=COUNT_SWAP_HINT,
            )
        )
    return msgspec.structs.replace(
        found,
        usable=True,
        reason=f"Docker {info.server_version} answers",
        hint=hint,
        server_version=info.server_version,
        rootless=rootless,
        cgroup_manager=info.cgroup_driver or None,
        controllers=controllers,
        oci_runtime=info.default_runtime or None,
        storage_driver=info.driver or None,
        capabilities=_capabilities(
            controllers,
            rootless=rootless,
            pause=not rootless or bool(controllers),
            update_limits=True,
            update_pids=True,
            network_switch="engine",
        ),
        warnings=tuple(warnings),
    )


def _podman_silence(host: HostFacts, complaint: str) -> tuple[str, str]:
    """Why ``podman info`` failed: the prerequisites of a rootless Podman first, then its own words."""
    if host.uid != 0 and "newuidmap" not in host.programs:
        return "newuidmap, which a rootless Podman needs, is not installed", _install(host, "newuidmap")
    if host.uid != 0 and not host.subuids:
        return _no_subuids()
    if host.uid != 0 and host.runtime_dir is None:
        return "XDG_RUNTIME_DIR is not a folder of yours, which a rootless Podman needs", LINGER_HINT
    return _because("podman does not answer", complaint), "podman info"


def _no_subuids() -> tuple[str, str]:
    return (
        "your user has no range of subordinate uids, which a rootless Podman needs",
        'sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "$USER" && podman system migrate',
    )


def _podman_runtime(host: HostFacts, info: PodmanInfo) -> tuple[str | None, str]:
    """Which OCI runtime, and why where it is not Podman's own choice."""
    default = info.host.oci_runtime.name.rsplit("/", 1)[-1] or "crun"
    if default != "crun" or host.cgroup_version is CgroupVersion.V2:
        return default, ""
    if "runc" in host.programs:
        return "runc", "crun cannot run on v1 or hybrid control groups"
    return None, ""


def _podman_cgroup_manager(host: HostFacts, info: PodmanInfo) -> str:
    """Podman's own choice, but never a systemd that is not there."""
    reachable = host.systemd_booted and (not info.host.security.rootless or host.user_session)
    return info.host.cgroup_manager if reachable else "cgroupfs"


def _podman_controllers(found: EngineInfo, host: HostFacts, info: PodmanInfo) -> tuple[str, ...]:
    """The controllers that limits can be set with."""
    offered = info.host.cgroup_controllers or ()
    if found.rootless:
        # On v1 Podman says "Resource limits are not supported and ignored", and without systemd on v2 it has no
        # group of its own to set them in.
        if found.cgroup_version is not CgroupVersion.V2 or found.cgroup_manager != "systemd":
            return ()
        # Podman tells those of the group that it is asked in. In a service's that is what others there happen to use,
        # often without cpu; containers get scopes beside it, with whatever is delegated.
        if host.user_controllers is not None:
            offered = host.user_controllers
    return tuple(name for name in _LIMIT_CONTROLLERS if name in offered)


def _judge_podman_limits(found: EngineInfo, host: HostFacts, info: PodmanInfo) -> EngineInfo:
    controllers = _podman_controllers(found, host, info)
    rootless = info.host.security.rootless
    numbers = version(info.version.version)
    hint = _limit_hint(found.cgroup_version, controllers, rootless=rootless, user_session=host.user_session)
    warnings = _limit_warnings(controllers, "Podman", hint)
    if found.storage_driver == "vfs":
        warnings.append(
            Shortcoming(
                what="storage driver vfs copies the whole image for every container",
                fix=f"{_install(host, 'fuse-overlayfs')} && podman system reset",
            )
        )
    if rootless and host.runtime_dir is None:
        warnings.append(Shortcoming(what="XDG_RUNTIME_DIR is not a folder of yours", fix=LINGER_HINT))
    return msgspec.structs.replace(
        found,
        usable=True,
        reason=f"Podman {info.version.version} answers",
        hint=hint,
        controllers=controllers,
        capabilities=_capabilities(
            controllers,
            rootless=rootless,
            pause=not rootless or bool(controllers),
            update_limits=numbers >= PODMAN_UPDATE_SINCE and bool(controllers),
            update_pids=numbers >= PODMAN_UPDATE_PIDS_SINCE and "pids" in controllers,
            keep_id=rootless,
            pids_uncounted=found.cgroup_version is CgroupVersion.V2 and "pids" not in controllers,
            overlay_for_callers=rootless,
            enters_userns=rootless,
            network_switch="user_mode" if NETWORK_PROGRAM in host.programs else "",
            network_switch_fix="" if NETWORK_PROGRAM in host.programs else _install(host, NETWORK_PROGRAM),
            own_slice=found.cgroup_manager == "systemd" and found.cgroup_version is CgroupVersion.V2,
            update_says_no_healthcheck=numbers >= PODMAN_UPDATE_HEALTHCHECK_SINCE,
        ),
        warnings=tuple(warnings),
    )


def _capabilities(
    controllers: Sequence[str],
    *,
    rootless: bool,
    pause: bool,
    update_limits: bool,
    update_pids: bool,
    network_switch: NetworkSwitch = "",
    network_switch_fix: str = "",
    **others: bool,
) -> Capabilities:
    """Of one engine.

    Args:
        controllers: Those that limits can be set with.
        rootless: It is the caller's own.
        pause: It can freeze.
        update_limits: It can change limits of what runs.
        update_pids: The limit of processes among them.
        network_switch: How it gives a network late.
        network_switch_fix: What to type where it cannot.
        others: What not every engine can.
    """
    return Capabilities(
        memory_limit="memory" in controllers,
        cpu_limit="cpu" in controllers,
        pids_limit="pids" in controllers,
        cpuset_limit="cpuset" in controllers,
        rootless=rootless,
        network_none=True,
        pause=pause,
        update_pids=update_pids,
        update_limits=update_limits,
        network_switch=network_switch,
        network_switch_fix=network_switch_fix,
        late_for_callers=rootless,
        late_shm=not rootless,
        **{"keep_id": False, **others},
    )


def _limits_all(capabilities: Capabilities | None) -> bool:
    return (
        capabilities is not None and capabilities.memory_limit and capabilities.cpu_limit and capabilities.pids_limit
    )


def _limit_warnings(controllers: Sequence[str], engine: str, hint: str) -> list[Shortcoming]:
    missing = [name for name in _LIMIT_CONTROLLERS if name not in controllers]
    if not missing:
        return []
    what = f"{engine} cannot limit {', '.join(missing)} on this host"
    return [Shortcoming(what=what, fix=hint or boot_with(" ".join(f"cgroup_enable={name}" for name in missing)))]


def _limit_hint(
    version_: CgroupVersion | None, controllers: Sequence[str], *, rootless: bool, user_session: bool
) -> str:
    """What gives a rootless engine the controllers that it lacks; empty where it lacks none."""
    if not rootless or all(name in controllers for name in _LIMIT_CONTROLLERS):
        return ""
    if version_ is not CgroupVersion.V2:
        return BOOT_V2_HINT
    return DELEGATE_HINT if user_session else LINGER_HINT


def _install(host: HostFacts, program: str) -> str:
    for manager in PACKAGE_MANAGERS:
        if manager in host.programs:
            return f"{_INSTALL[manager]} {_PACKAGES[program][manager]}"
    return f"install {program}"


def _because(reason: str, complaint: str) -> str:
    return f"{reason}: {complaint}" if complaint else reason
