"""Whether the limits that were asked for are the limits that hold. Pure.

A limit is verified when two things are true of what was *read from the kernel*:

* the container's own limit is the one that was asked for (to the page, to the microsecond of quota), so that a write
  that did not take is found out even where it left something tighter;
* nothing along the way up is looser than it is told: the tightest limit that applies is at most the one asked for.

A tighter limit above the container, such as that of a user slice, does not make the proof false, for the limit asked
for holds; ``reason`` says what applies instead. What cannot be read is not verified. What the engine reports is shown
beside, and never proves anything: after a direct write it is stale by design.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from runtimes.cgroup.readings import UNLIMITED, EffectiveLimits
from runtimes.model import CPU_MILLIS_PER_CPU, CgroupVersion, EngineInfo, Limits
from runtimes.quantities import format_bytes, format_cpus, format_cpuset

Value = int | tuple[int, ...] | None

PAGE_BYTES: Final = 4096

UNREADABLE: Final = "it cannot be read: the controller or the mount is not there"


def boot_with(arguments: str) -> str:
    """The command that boots with these arguments of the kernel: Fedora has grubby, the others GRUB's own file."""
    edit = f"sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{arguments} /' /etc/default/grub"
    return (
        f"{{ sudo grubby --update-kernel=ALL --args='{arguments}' || "
        f"{{ {edit} && sudo grub-mkconfig -o /boot/grub/grub.cfg; }}; }} && sudo reboot"
    )


BOOT_V2_HINT: Final = boot_with("systemd.unified_cgroup_hierarchy=1")
COUNT_SWAP_HINT: Final = boot_with("swapaccount=1")
DELEGATE_HINT: Final = (
    "sudo mkdir -p /etc/systemd/system/user@.service.d && "
    "printf '[Service]\\nDelegate=cpu cpuset io memory pids\\n' | "
    "sudo tee /etc/systemd/system/user@.service.d/delegate.conf && "
    "sudo systemctl daemon-reload && sudo systemctl restart user@$(id -u).service"
)
LINGER_HINT: Final = "loginctl enable-linger"


class LimitProof(msgspec.Struct, frozen=True, kw_only=True):
    """One limit: asked for, told by the engine, held by the kernel."""

    name: str
    """``memory``, ``memory_swap``, ``cpus``, ``pids``, ``cpuset``, ``shm``, ``nofile``, or ``tmpfs:`` and target."""
    requested: Value
    """Bytes, thousandths of a CPU, a count, or CPU numbers, as the name says."""
    reported: Value
    """By the engine's inspect; None where it does not say."""
    effective: Value
    """The tightest that applies; None where it cannot be read, ``UNLIMITED`` where there is none."""
    verified: bool
    reason: str
    """One clause; empty where the limit is exactly as asked for and nothing else is to be said."""


class Unenforceable(msgspec.Struct, frozen=True, kw_only=True):
    """One requested limit that this engine cannot hold on this host."""

    limit: str
    reason: str
    hint: str
    """What to type to mend it, or what to ask for instead."""


def verify(
    requested: Limits,
    reported: Limits | None,
    effective: EffectiveLimits,
    *,
    tmpfs: Mapping[str, int] | None = None,
    swap_total_bytes: int | None = None,
    page_bytes: int = PAGE_BYTES,
) -> tuple[LimitProof, ...]:
    """A proof for each limit that was asked for, in a fixed order.

    Args:
        requested: What was asked for; what is None there gets no proof.
        reported: What the engine says, where it was asked.
        effective: As read from the kernel.
        tmpfs: The size that was asked for by mount point.
        swap_total_bytes: All swap of the host; None where that is not known.
        page_bytes: The host's page size, which memory limits are rounded down to.
    """
    told = reported if reported is not None else Limits()
    own = effective.own
    proofs: list[LimitProof] = []

    def add(
        name: str, limit: int, reported: int | None, own: int | None, tight: int | None, *, expected: int
    ) -> None:
        say = str if name in {"pids", "nofile"} else format_bytes
        equal = own == expected
        proofs.append(_proof(name, limit, reported, tight, expected=expected, equal=equal, say=say))

    limit = requested.memory_bytes_max
    if limit is not None:
        pages = limit // page_bytes * page_bytes
        add("memory", limit, told.memory_bytes_max, own.memory_bytes_max, effective.memory_bytes_max, expected=pages)
        proofs.append(_swap_proof(limit, pages, effective, swap_total_bytes))
    limit = requested.cpu_millis
    if limit is not None:
        equal = _quota_equals(limit, own.cpu_quota_us, own.cpu_period_us)
        proofs.append(
            _proof("cpus", limit, told.cpu_millis, effective.cpu_millis, expected=limit, equal=equal, say=format_cpus)
        )
    limit = requested.pids_max
    if limit is not None:
        add("pids", limit, told.pids_max, own.pids_max, effective.pids_max, expected=limit)
    if requested.cpuset_cpus is not None:
        proofs.append(_cpuset_proof(requested.cpuset_cpus, told.cpuset_cpus, effective))
    limit = requested.shm_bytes_max
    if limit is not None:
        size = effective.shm_bytes_max
        add("shm", limit, told.shm_bytes_max, size, size, expected=_pages_up(limit, page_bytes))
    limit = requested.nofile_max
    if limit is not None:
        add("nofile", limit, told.nofile_max, effective.nofile_soft_max, effective.nofile_max, expected=limit)
    for target, limit in sorted((tmpfs or {}).items()):
        size = effective.tmpfs_bytes_max.get(target)
        add(f"tmpfs:{target}", limit, None, size, size, expected=_pages_up(limit, page_bytes))
    return tuple(proofs)


def enforceable(limits: Limits, info: EngineInfo) -> tuple[Unenforceable, ...]:
    """Which of the limits this engine cannot hold on this host, and what mends it. Empty: all can be held.

    Args:
        limits: What is asked for.
        info: The engine as it was found.
    """
    can = info.capabilities
    wanted = [
        ("memory", "memory", limits.memory_bytes_max, can is not None and can.memory_limit),
        ("cpus", "cpu", limits.cpu_millis, can is not None and can.cpu_limit),
        ("pids", "pids", limits.pids_max, can is not None and can.pids_limit),
        ("cpuset", "cpuset", limits.cpuset_cpus, can is not None and can.cpuset_limit),
    ]
    found = [
        _missing(name, controller, info)
        for name, controller, value, possible in wanted
        if value is not None and not possible
    ]
    hard = info.nofile_hard_max
    if limits.nofile_max is not None and hard is not None and limits.nofile_max > hard:
        found.append(
            Unenforceable(
                limit="nofile",
                reason=f"the hard limit of open files is {hard} here",
                hint=f"ask for at most {hard} open files",
            )
        )
    return tuple(found)


def _proof(
    name: str,
    requested: int,
    reported: int | None,
    effective: int | None,
    *,
    expected: int,
    equal: bool,
    say: Callable[[int], str],
) -> LimitProof:
    """The rule of this module for one number; ``expected`` is the request as the kernel rounds it."""
    holds = effective is not None and effective <= expected
    reason = _reason(requested, reported, effective, expected=expected, equal=equal, say=say)
    return LimitProof(
        name=name,
        requested=requested,
        reported=reported,
        effective=effective,
        verified=holds and equal,
        reason=reason,
    )


def _reason(
    requested: int,
    reported: int | None,
    effective: int | None,
    *,
    expected: int,
    equal: bool,
    say: Callable[[int], str],
) -> str:
    if effective is None:
        return UNREADABLE
    if effective == UNLIMITED:
        return "there is no such limit in force"
    if effective > expected:
        return f"the limit in force is {say(effective)}, looser than asked for"
    if not equal:
        return f"the container's own limit is not the one asked for; {say(effective)} is in force"
    if effective < expected:
        return f"holds; a tighter limit of {say(effective)} applies above the container"
    if reported is not None and reported != requested:
        return f"holds; the engine still reports {say(reported)}"
    return ""


def _swap_proof(requested: int, pages: int, effective: EffectiveLimits, swap_total_bytes: int | None) -> LimitProof:
    """That memory and swap together are no more than the memory that was asked for."""
    total = effective.memory_swap_bytes_max
    memory_holds = effective.memory_bytes_max is not None and effective.memory_bytes_max <= pages
    if total is not None and total <= pages:
        verified, reason = True, ""
    elif swap_total_bytes == 0 and memory_holds:
        verified, reason = True, "holds as long as the host has no swap, as now"
    elif total is None:
        verified, reason = False, "swap accounting is off, or the controller is not there"
    elif total == UNLIMITED:
        verified, reason = False, "swap is not limited"
    else:
        verified, reason = False, f"memory and swap together are {format_bytes(total)}, more than was asked for"
    return LimitProof(
        name="memory_swap", requested=requested, reported=None, effective=total, verified=verified, reason=reason
    )


def _cpuset_proof(
    requested: tuple[int, ...], reported: tuple[int, ...] | None, effective: EffectiveLimits
) -> LimitProof:
    """A set of CPUs is held where the container's own set is the one asked for and nothing outside it is left."""
    cpus = effective.cpuset_cpus
    equal = effective.own.cpuset_cpus == requested
    holds = cpus is not None and set(cpus) <= set(requested)
    if cpus is None:
        reason = UNREADABLE
    elif not holds or not equal:
        reason = f"the container runs on CPUs {format_cpuset(cpus)}, not on the ones asked for"
    elif cpus != requested:
        reason = f"holds; only CPUs {format_cpuset(cpus)} of them are left by the groups above or are online"
    elif reported is not None and reported != requested:
        reason = f"holds; the engine still reports {format_cpuset(reported)}"
    else:
        reason = ""
    return LimitProof(
        name="cpuset",
        requested=requested,
        reported=reported,
        effective=cpus,
        verified=holds and equal,
        reason=reason,
    )


def _quota_equals(cpu_millis: int, quota_us: int | None, period_us: int | None) -> bool:
    """Whether a quota is the one for ``cpu_millis``, to less than a microsecond for each period."""
    if quota_us is None or period_us is None:
        return False
    return abs(quota_us * CPU_MILLIS_PER_CPU - cpu_millis * period_us) < CPU_MILLIS_PER_CPU


def _pages_up(size_bytes: int, page_bytes: int) -> int:
    """A tmpfs has whole pages, rounded up."""
    return -(-size_bytes // page_bytes) * page_bytes


def _missing(name: str, controller: str, info: EngineInfo) -> Unenforceable:
    """Why this controller's limit cannot be set, and what mends it."""
    engine = info.name.value.capitalize()
    if info.capabilities is None:
        return Unenforceable(limit=name, reason=info.reason or f"{engine} cannot be used", hint=info.hint)
    if not info.rootless:
        reason = f"the kernel does not offer the {controller} controller to {engine}"
        return Unenforceable(limit=name, reason=reason, hint=boot_with(f"cgroup_enable={controller}"))
    if info.cgroup_version is not CgroupVersion.V2:
        reason = f"rootless {engine} cannot limit anything on cgroup v1"
        return Unenforceable(limit=name, reason=reason, hint=BOOT_V2_HINT)
    if controller not in info.controllers:
        reason = f"the {controller} controller is not delegated to your user"
        return Unenforceable(limit=name, reason=reason, hint=DELEGATE_HINT)
    if info.cgroup_manager == "cgroupfs":
        reason = f"rootless {engine} sets limits through your systemd user session, and has none"
        return Unenforceable(limit=name, reason=reason, hint=LINGER_HINT)
    reason = f"{engine} {info.client_version or ''} cannot set it here".replace("  ", " ")
    return Unenforceable(limit=name, reason=reason, hint="sandboxctl doctor")
