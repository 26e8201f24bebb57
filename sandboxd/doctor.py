"""What is wrong with this host, and the one command that mends each thing.

Pure: the daemon gathers ``Facts``, ``judge`` turns them into findings.
"""

from __future__ import annotations

import msgspec

from runtimes.model import CgroupVersion, EngineInfo
from sandboxd.protocol import Check

FREE_BYTES_MIN = 512 * 1024 * 1024
"""Below this, an image build or a handful of sandboxes fills the disk."""

NOFILE_MIN = 1024
"""The daemon holds about twenty descriptors per sandbox."""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One engine, and whether it is ready for a sandbox."""

    info: EngineInfo
    has_image: bool | None
    """None when it could not be asked."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    engines: tuple[EngineFacts, ...]
    image: str
    init_error: str
    """Empty when sandbox-init is built and can be executed."""
    init_hint: str
    state_dir: str
    state_free_bytes: int | None
    socket: str
    socket_dir_private: bool
    daemon_nofile_soft: int
    idmap_works: bool | None
    """None where it is not needed: the daemon is not root."""
    swap_bytes: int


def judge(facts: Facts) -> list[Check]:
    """Return all findings, the good ones too."""
    checks = [_any_engine(facts)]
    for engine in facts.engines:
        checks += _engine(engine, facts.image)
    checks += [
        _check("sandbox-init", not facts.init_error, facts.init_error or "built, static", facts.init_hint),
        _socket(facts),
        _disk(facts),
        _descriptors(facts),
    ]
    if facts.idmap_works is not None:
        checks.append(
            _check(
                "id-mapped mounts",
                facts.idmap_works,
                "a project that belongs to root is its sandbox's own inside"
                if facts.idmap_works
                else "a project that belongs to root cannot be written inside: Linux 5.12 can map ids",
                "chown the project to an ordinary user",
                worst="warning",
            )
        )
    return checks


def _any_engine(facts: Facts) -> Check:
    usable = [engine.info for engine in facts.engines if engine.info.usable]
    hints = [engine.info.hint for engine in facts.engines if engine.info.hint]
    names = ", ".join(f"{info.name} {info.server_version or info.client_version or ''}".strip() for info in usable)
    return _check(
        "an engine that works", bool(usable), names or "neither Podman nor Docker can be used", next(iter(hints), "")
    )


def _engine(engine: EngineFacts, image: str) -> list[Check]:
    info = engine.info
    if not info.usable:
        return [Check(name=info.name.value, status="warning", detail=info.reason, fix=info.hint)]
    checks = [
        _check(info.name.value, True, _description(info), ""),
        _cgroups(info),
        *(Check(name=info.name.value, status="warning", detail=warning, fix=info.hint) for warning in info.warnings),
    ]
    if engine.has_image is not None:
        checks.append(
            _check(
                f"{info.name} image",
                engine.has_image,
                image if engine.has_image else f"{image} is not there",
                f"sandboxctl image build --engine {info.name}",
            )
        )
    return checks


def _description(info: EngineInfo) -> str:
    parts = [
        info.reason,
        f"version {info.server_version or info.client_version}",
        "rootless" if info.rootless else "rootful",
        f"{info.oci_runtime}{f' ({info.oci_runtime_reason})' if info.oci_runtime_reason else ''}",
        f"storage {info.storage_driver}",
        f"nofile up to {info.nofile_hard_max}",
    ]
    if info.socket_path:
        parts.append(f"socket {info.socket_path}")
    return ", ".join(part for part in parts if part)


def _cgroups(info: EngineInfo) -> Check:
    can = info.capabilities
    missing = [
        name
        for name, possible in (
            ("memory", can is not None and can.memory_limit),
            ("cpu", can is not None and can.cpu_limit),
            ("pids", can is not None and can.pids_limit),
            ("cpuset", can is not None and can.cpuset_limit),
        )
        if not possible
    ]
    version = "unknown" if info.cgroup_version is None else info.cgroup_version.value
    base = f"cgroup {version}, {info.cgroup_manager}, controllers: {' '.join(info.controllers) or 'none'}"
    if not missing:
        return _check(f"{info.name} limits", True, base, "")
    essential = [name for name in missing if name != "cpuset"]
    if info.cgroup_version is CgroupVersion.V2:
        fix = (
            "sudo mkdir -p /etc/systemd/system/user@.service.d && "
            "printf '[Service]\\nDelegate=cpu cpuset io memory pids\\n' | "
            "sudo tee /etc/systemd/system/user@.service.d/delegate.conf && sudo systemctl daemon-reload"
        )
    else:
        fix = "boot with systemd.unified_cgroup_hierarchy=1, or run the engine as root"
    return Check(
        name=f"{info.name} limits",
        status="failure" if essential else "warning",
        detail=f"{base}; cannot limit {', '.join(missing)}",
        fix=fix,
    )


def _socket(facts: Facts) -> Check:
    return _check("socket", facts.socket_dir_private, facts.socket, "chmod 700 the directory of the socket")


def _disk(facts: Facts) -> Check:
    if facts.state_free_bytes is None:
        return Check(name="disk", status="warning", detail=f"cannot look at {facts.state_dir}", fix="df -h ~")
    free = f"{facts.state_free_bytes // (1024 * 1024)} MiB free for {facts.state_dir}"
    return _check("disk", facts.state_free_bytes >= FREE_BYTES_MIN, free, "free some space: df -h shows where")


def _descriptors(facts: Facts) -> Check:
    return _check(
        "open files",
        facts.daemon_nofile_soft >= NOFILE_MIN,
        f"the daemon may open {facts.daemon_nofile_soft}",
        f"ulimit -n {NOFILE_MIN}, then sandboxctl daemon stop",
        worst="warning",
    )


def _check(name: str, good: bool, detail: str, fix: str, *, worst: str = "failure") -> Check:
    return Check(name=name, status="ok" if good else worst, detail=detail, fix="" if good else fix)  # type: ignore[arg-type]
