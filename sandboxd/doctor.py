"""What is wrong with this host, and the one command that mends each thing.

Pure: the daemon gathers ``Facts``, ``judge`` turns them into findings.
"""

from __future__ import annotations

import shlex

import msgspec

from runtimes.cgroup.verify import COUNT_SWAP_HINT, enforceable
from runtimes.model import EngineInfo, Limits
from runtimes.quantities import format_bytes
from sandboxd.audit.auditor import AuditState
from sandboxd.protocol import Check

FREE_BYTES_MIN = 512 * 1024 * 1024
"""Below this, an image build or a handful of sandboxes fills the disk."""

LINGER_FIX = 'sudo loginctl enable-linger "$USER"'

NOFILE_MIN = 1024
"""The daemon holds about twenty descriptors per sandbox."""

ONE_OF_EACH = Limits(memory_bytes_max=1, cpu_millis=1, pids_max=1, cpuset_cpus=(0,))
"""Every limit that a control group holds: which of them an engine can enforce does not depend on the figures."""
USERNS_FIX = (
    "sysctl user.max_user_namespaces kernel.unprivileged_userns_clone kernel.apparmor_restrict_unprivileged_userns"
)
"""One of them says no."""


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
    mounts_late: bool
    """This kernel can mount into containers that run."""
    journal_trouble: str = ""
    """Why nothing new can be begun; empty: it can."""
    journal_damaged: bool = False
    """That will not pass by itself."""
    swap_bytes: int
    swap_counted: bool | None
    """By control group; None where that cannot be told."""
    lingers: bool | None
    """The user's systemd, and what runs below it, goes on after the last logout; None: nothing of ours runs there."""
    audit: AuditState
    metrics_problem: str
    """Why metrics are not served where they should be; empty: they are."""
    exposed_services: tuple[str, ...] = ()
    """Those that run on the host's loopback, for want of a network of their own."""


def judge(facts: Facts) -> list[Check]:
    """Return all findings, the good ones too."""
    checks = [_any_engine(facts)]
    for engine in facts.engines:
        checks += _engine(engine, facts.image)
    checks += [
        _check("sandbox-init", not facts.init_error, facts.init_error or "built, static", facts.init_hint),
        _socket(facts),
        _disk(facts),
        _journal(facts),
        _descriptors(facts),
        _swap(facts),
        _audit(facts),
    ]
    if facts.metrics_problem:
        checks.append(
            Check(
                name="metrics",
                status="warning",
                detail=facts.metrics_problem,
                fix="ss -ltnp",
            )
        )
    if facts.exposed_services:
        checks.append(
            Check(
                name="services",
                status="warning",
                detail=f"every user of this host can connect to {', '.join(facts.exposed_services)}: "
                "the kernel gives you no network for it",
                fix=USERNS_FIX,
            )
        )
    checks.append(
        _check(
            "late mounts",
            facts.mounts_late,
            "any warm slot can be given any project"
            if facts.mounts_late
            else "warm slots are made with a project in them: only the second sandbox of a project finds one",
            "use Linux 5.12 or newer",
            worst="warning",
        )
    )
    if facts.lingers is not None:
        checks.append(
            _check(
                "lingering",
                facts.lingers,
                "the daemon and its sandboxes go on after your last logout"
                if facts.lingers
                else "your last logout ends the daemon, and the sandboxes of rootless Podman",
                LINGER_FIX,
                worst="warning",
            )
        )
    if facts.idmap_works is not None:
        checks.append(
            _check(
                "id-mapped mounts",
                facts.idmap_works,
                "a project that belongs to root is its sandbox's own inside"
                if facts.idmap_works
                else "a project that belongs to root cannot be written inside: give it to an ordinary user, "
                "or use Linux 5.12 or newer and a file system whose ids it can map",
                "sandboxctl create --ro",
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
        *(
            Check(name=info.name.value, status="warning", detail=warning.what, fix=warning.fix)
            for warning in info.warnings
        ),
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
    version = "unknown" if info.cgroup_version is None else info.cgroup_version.value
    base = f"cgroup {version}, {info.cgroup_manager}, controllers: {' '.join(info.controllers) or 'none'}"
    missing = enforceable(ONE_OF_EACH, info)
    if not missing:
        return _check(f"{info.name} limits", True, base, "")
    essential = [entry for entry in missing if entry.limit != "cpuset"]
    reasons = "; ".join(dict.fromkeys(entry.reason for entry in missing))
    return Check(
        name=f"{info.name} limits",
        status="failure" if essential else "warning",
        detail=f"{base}; cannot limit {', '.join(entry.limit for entry in missing)}: {reasons}",
        fix=(essential or missing)[0].hint,
    )


def _socket(facts: Facts) -> Check:
    directory = facts.socket.rpartition("/")[0] or "/"
    detail = facts.socket if facts.socket_dir_private else f"others may use the directory of {facts.socket}"
    return _check("socket", facts.socket_dir_private, detail, f"chmod 700 {shlex.quote(directory)}")


def _disk(facts: Facts) -> Check:
    fix = f"df -h {shlex.quote(facts.state_dir)}"
    if facts.state_free_bytes is None:
        return Check(name="disk", status="warning", detail=f"cannot look at {facts.state_dir}", fix=fix)
    free = f"{format_bytes(facts.state_free_bytes)} free for {facts.state_dir}"
    return _check("disk", facts.state_free_bytes >= FREE_BYTES_MIN, free, fix)


def _journal(facts: Facts) -> Check:
    fix = "sandboxctl doctor --repair" if facts.journal_damaged else f"df -h {shlex.quote(facts.state_dir)}"
    if not facts.journal_trouble:
        return _check("journal", True, "whole, and written", "")
    return _check("journal", False, f"{facts.journal_trouble}: nothing new can be begun, what runs goes on", fix)


def _descriptors(facts: Facts) -> Check:
    return _check(
        "open files",
        facts.daemon_nofile_soft >= NOFILE_MIN,
        f"the daemon may open {facts.daemon_nofile_soft}",
        # The daemon has raised its own limit as far as it goes; the next one inherits the shell's.
        f"sudo prlimit --pid $$ --nofile={NOFILE_MIN}:{NOFILE_MIN} && sandboxctl daemon stop",
        worst="warning",
    )


def _swap(facts: Facts) -> Check:
    if not facts.swap_bytes:
        return _check("swap", True, "none", "")
    size = format_bytes(facts.swap_bytes)
    if facts.swap_counted is None:
        return _check("swap", True, f"{size}; whether it is counted by container, each sandbox's proof tells", "")
    return _check(
        "swap",
        facts.swap_counted,
        f"{size}, counted by container"
        if facts.swap_counted
        else f"{size}, not counted by container: no limit on memory can be proven",
        COUNT_SWAP_HINT,
        worst="warning",
    )


def _audit(facts: Facts) -> Check:
    audit = facts.audit
    if not audit.enabled:
        return _check("audit log", True, "switched off", "")
    lost = f"{audit.lost} lines were lost since the daemon began" if audit.lost else ""
    if audit.failing:
        refused = "requests are refused meanwhile" if audit.required else "work goes on"
        detail = "; ".join(part for part in (f"cannot be written: {audit.failing}", refused, lost) if part)
        directory = shlex.quote(f"{facts.state_dir}/audit")
        worst = "failure" if audit.required else "warning"
        return _check("audit log", False, detail, f"df -h {directory}; ls -ld {directory}", worst=worst)
    # What was lost is lost: nothing mends it, and the log says so itself.
    return _check("audit log", True, lost or "written", "")


def _check(name: str, good: bool, detail: str, fix: str, *, worst: str = "failure") -> Check:
    return Check(name=name, status="ok" if good else worst, detail=detail, fix="" if good else fix)  # type: ignore[arg-type]
