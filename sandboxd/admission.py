"""How much of the host may be promised: budget and promises in, who is let in out.

Pure. A limit is what a sandbox may use at most, not what it uses: so more is promised than there is, as many times
over as the configuration says. Whoever waits is served first come, first served, and nobody overtakes: one that asks
for little does not starve one that asks for much.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from runtimes.model import CPU_MILLIS_PER_CPU, Limits
from runtimes.quantities import format_bytes
from sandboxd.config import Capacity
from sandboxd.limits import Host


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """An amount of everything that is counted."""

    memory_bytes: int = 0
    cpu_millis: int = 0
    pids: int = 0
    sandboxes: int = 0


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """The most that may be promised; None: as much as anybody likes."""

    memory_bytes: int | None
    cpu_millis: int | None
    pids: int | None
    sandboxes: int | None


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """Why somebody is not let in now."""

    detail: str
    hint: str
    for_ever: bool
    """It asks for more than there is in all: to wait would be in vain."""


_SETTINGS = {
    "memory_bytes": "capacity.memory_overcommit",
    "cpu_millis": "capacity.cpu_overcommit",
    "pids": "capacity.pids_overcommit",
    "sandboxes": "daemon.sandboxes_max",
}
_WORDS = {"memory_bytes": "memory", "cpu_millis": "CPU", "pids": "processes", "sandboxes": "sandboxes"}


def budget_of(host: Host, capacity: Capacity, *, sandboxes_max: int) -> Budget:
    """What this host has, as many times over as the configuration says."""
    return Budget(
        memory_bytes=_times(host.memory_bytes, capacity.memory_overcommit),
        cpu_millis=_times(len(host.cpus_online) * CPU_MILLIS_PER_CPU, capacity.cpu_overcommit),
        pids=_times(host.pid_max, capacity.pids_overcommit),
        sandboxes=sandboxes_max,
    )


def _times(amount: int, factor: float) -> int | None:
    return None if factor == 0 else int(amount * factor)


def share_of(limits: Limits) -> Share:
    """What a sandbox with these limits is promised."""
    return Share(
        memory_bytes=limits.memory_bytes_max or 0,
        cpu_millis=limits.cpu_millis or 0,
        pids=limits.pids_max or 0,
        sandboxes=1,
    )


def total(shares: Sequence[Share]) -> Share:
    """All of them together."""
    return Share(**{name: sum(getattr(share, name) for share in shares) for name in Share.__struct_fields__})


def growth(before: Limits, after: Limits) -> Share:
    """What a sandbox is promised more when its limits change; what it is promised less counts for nothing."""
    old, new = share_of(before), share_of(after)
    return Share(**{name: max(0, getattr(new, name) - getattr(old, name)) for name in Share.__struct_fields__})


def shortage(budget: Budget, promised: Share, asked: Share) -> Shortage | None:
    """Why ``asked`` cannot be promised on top of what is; None: it can."""
    for name in Share.__struct_fields__:
        most, wanted, given = getattr(budget, name), getattr(asked, name), getattr(promised, name)
        if most is None or wanted == 0 or given + wanted <= most:
            continue
        return Shortage(
            detail=f"{_amount(name, given)} of {_amount(name, most)} of {_WORDS[name]} are promised, "
            f"and it asks for {_amount(name, wanted)}",
            hint=f"remove or stop some (sandboxctl ls), wait (--wait-capacity 30s), or raise {_SETTINGS[name]}",
            for_ever=wanted > most,
        )
    return None


def _amount(name: str, value: int) -> str:
    match name:
        case "memory_bytes":
            return format_bytes(value)
        case "cpu_millis":
            return f"{value / CPU_MILLIS_PER_CPU:g} CPUs"
        case _:
            return str(value)


THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "GOMAXPROCS",
    "RAYON_NUM_THREADS",
    "TOKIO_WORKER_THREADS",
    "CARGO_BUILD_JOBS",
    "CMAKE_BUILD_PARALLEL_LEVEL",
    "PYTHON_CPU_COUNT",
    "DOTNET_PROCESSOR_COUNT",
)
"""What tools read before they count the host's CPUs. OMP_NUM_THREADS is also what ``nproc`` and the numerical
libraries read. Not MAKEFLAGS: a build that is run in parallel is another build."""


def cpu_count(limits: Limits, cpus_online: int) -> int:
    """How many threads at once are of use in a sandbox: its quota, rounded up, of the CPUs that it may run on."""
    available = cpus_online if limits.cpuset_cpus is None else len(limits.cpuset_cpus)
    if limits.cpu_millis is None:
        return max(1, available)
    return max(1, min(available, -(-limits.cpu_millis // CPU_MILLIS_PER_CPU)))


def cpu_environment(limits: Limits, cpus_online: int) -> dict[str, str]:
    """The variables that tell tools how many CPUs there are for them."""
    return dict.fromkeys(THREAD_VARIABLES, str(cpu_count(limits, cpus_online)))


def whole_cpus(limits: Limits) -> int | None:
    """How many CPUs a quota is worth, where that is a whole number and nobody said which they are."""
    if limits.cpuset_cpus is not None or limits.cpu_millis is None or limits.cpu_millis % CPU_MILLIS_PER_CPU:
        return None
    return limits.cpu_millis // CPU_MILLIS_PER_CPU


def pack(cpus_online: Sequence[int], taken: Sequence[Sequence[int]], count: int) -> tuple[int, ...] | None:
    """Host CPUs for a sandbox that may use ``count`` whole ones: those that the fewest others are bound to.

    Args:
        cpus_online: The CPUs that there are.
        taken: What other sandboxes are bound to.
        count: How many it may use.

    Returns:
        The CPUs, ascending; None where it may use all of them, or more than there are.
    """
    if not 0 < count < len(cpus_online):
        return None
    users = {cpu: sum(cpu in cpus for cpus in taken) for cpu in cpus_online}
    return tuple(sorted(sorted(cpus_online, key=lambda cpu: (users[cpu], cpu))[:count]))
