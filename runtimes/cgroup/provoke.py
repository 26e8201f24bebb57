"""Running into limits on purpose: what to run inside, and what the counters must have done. Pure.

The load comes from ``sandbox-provoke`` (``runtimes/init/provoke.c``), run as a command of the sandbox. The verdict
comes from two readings of the container's own control group around it, for a program inside can be mistaken or lie;
its exit status is only a second witness.
"""

from __future__ import annotations

import enum
import signal
from typing import Final

import msgspec

from runtimes.cgroup.readings import CPU_PERIOD_US, UNLIMITED, EffectiveLimits, Usage
from runtimes.model import CPU_MILLIS_PER_CPU
from runtimes.quantities import format_bytes, format_cpus

EXIT_MET: Final = 0
"""``sandbox-provoke``: the limit was met, or the time is over."""

EXIT_NOT_HELD: Final = 3
"""``sandbox-provoke``: everything that was asked for was got."""

MEMORY_OVER_BYTES_MAX: Final = 256 * 1024**2
"""How far past the limit to go at most: enough to be sure, and no danger to a host where the limit does not hold."""

PIDS_OVER: Final = 8

CPU_SECONDS: Final = 1

CPU_TOLERANCE_PERCENT: Final = 10
"""Above the quota over the whole interval: the kernel hands out quota in slices and settles them late."""

CPU_PERIODS_STRADDLED: Final = 1
"""And one period's quota on top: an interval that is no whole number of periods can begin with a fresh one."""


class ProvokedLimit(enum.StrEnum):
    """The limits that can be run into."""

    MEMORY = "memory"
    PIDS = "pids"
    CPUS = "cpus"


class Provocation(msgspec.Struct, frozen=True, kw_only=True):
    """One run of ``sandbox-provoke``."""

    limit: ProvokedLimit
    argv: tuple[str, ...]
    """The arguments after the program's path."""
    timeout_s: float
    skip_reason: str = ""
    """Not empty: this limit cannot be run into here; do not run it, and report this."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How the run ended and how long it was watched."""

    exit_code: int | None
    """None where a signal ended it."""
    signal: int | None
    wall_us: int
    """Between the two readings, by a monotonic clock."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one limit held."""

    limit: ProvokedLimit
    held: bool | None
    """None: not known, for it could not be run into; ``evidence`` says why."""
    evidence: str
    """The counters before and after, in one line."""


def plan(limits: EffectiveLimits, *, cpu_count: int, memory_available_bytes: int) -> tuple[Provocation, ...]:
    """What to run for each limit that is in force, in the order to run it, one after the other.

    Memory comes last: the kernel may take its time to reclaim, and that would disturb the others.

    Args:
        limits: As read from the kernel.
        cpu_count: How many CPUs the sandbox may run on.
        memory_available_bytes: What the host could give now, so that a limit that does not hold does no harm.
    """
    steps: list[Provocation] = []
    if limits.pids_max is not None and limits.pids_max != UNLIMITED:
        argv = ("pids", str(limits.pids_max + PIDS_OVER))
        steps.append(Provocation(limit=ProvokedLimit.PIDS, argv=argv, timeout_s=30))
    if limits.cpu_millis is not None and limits.cpu_millis != UNLIMITED:
        processes = -(-limits.cpu_millis // CPU_MILLIS_PER_CPU) + 1
        too_wide = limits.cpu_millis >= cpu_count * CPU_MILLIS_PER_CPU
        steps.append(
            Provocation(
                limit=ProvokedLimit.CPUS,
                argv=("cpu", str(CPU_SECONDS), str(processes)),
                timeout_s=CPU_SECONDS + 30,
                skip_reason=f"the limit is no less than the {cpu_count} CPUs there are" if too_wide else "",
            )
        )
    if limits.memory_bytes_max is not None and limits.memory_bytes_max != UNLIMITED:
        goal = limits.memory_bytes_max + min(limits.memory_bytes_max, MEMORY_OVER_BYTES_MAX)
        short = goal > memory_available_bytes
        steps.append(
            Provocation(
                limit=ProvokedLimit.MEMORY,
                argv=("memory", str(goal)),
                timeout_s=120,
                skip_reason=f"the host has no {format_bytes(goal)} of memory to spare" if short else "",
            )
        )
    return tuple(steps)


def judge(
    provocation: Provocation, limits: EffectiveLimits, before: Usage, after: Usage, outcome: Outcome | None
) -> Verdict:
    """The verdict on one provocation. ``outcome`` is None where it was not run."""
    if provocation.skip_reason or outcome is None:
        return _unknown(provocation.limit, provocation.skip_reason or "it was not run")
    match provocation.limit:
        case ProvokedLimit.MEMORY:
            return _judge_memory(before, after, outcome)
        case ProvokedLimit.PIDS:
            return _judge_pids(before, after, outcome)
        case ProvokedLimit.CPUS:
            return _judge_cpus(limits, before, after, outcome)


def _judge_memory(before: Usage, after: Usage, outcome: Outcome) -> Verdict:
    """Held where the kernel counted a kill for memory, at the sandbox's own limit, and the hog is what was killed."""
    if before.oom_kills is None or after.oom_kills is None:
        return _unknown(ProvokedLimit.MEMORY, "the kernel does not count kills for memory here")
    evidence = f"oom_kill {before.oom_kills} -> {after.oom_kills}, the hog {_ended(outcome)}"
    if outcome.exit_code not in {None, EXIT_NOT_HELD}:
        return _unknown(ProvokedLimit.MEMORY, f"{evidence}: it was stopped by something else")
    held = after.oom_kills > before.oom_kills and outcome.signal == signal.SIGKILL
    if held and before.ooms_own is not None and before.ooms_own == after.ooms_own:
        return _unknown(ProvokedLimit.MEMORY, f"{evidence}: memory ran out above the sandbox before its own limit")
    return Verdict(limit=ProvokedLimit.MEMORY, held=held, evidence=evidence)


def _judge_pids(before: Usage, after: Usage, outcome: Outcome) -> Verdict:
    """Held where a fork was refused, and the control group counts that it was for its own limit."""
    if outcome.exit_code not in {EXIT_MET, EXIT_NOT_HELD}:
        return _unknown(ProvokedLimit.PIDS, f"the run {_ended(outcome)}")
    refused = "fork was refused" if outcome.exit_code == EXIT_MET else "no fork was refused"
    if before.pids_refused is None or after.pids_refused is None:
        # Without the counter a refusal may have been RLIMIT_NPROC's.
        if outcome.exit_code == EXIT_MET:
            return _unknown(ProvokedLimit.PIDS, f"{refused}, and the kernel does not count for what")
        return Verdict(limit=ProvokedLimit.PIDS, held=False, evidence=refused)
    evidence = f"pids.events max {before.pids_refused} -> {after.pids_refused}, {refused}"
    held = after.pids_refused > before.pids_refused and outcome.exit_code == EXIT_MET
    return Verdict(limit=ProvokedLimit.PIDS, held=held, evidence=evidence)


def _judge_cpus(limits: EffectiveLimits, before: Usage, after: Usage, outcome: Outcome) -> Verdict:
    """Held where no more was used than the quota gives for the time, and the kernel counts that it throttled.

    Without any throttling the hog never wanted more than it may have: on a busy host it may get less than its limit.
    """
    counters = (before.cpu_us, after.cpu_us, before.throttled_periods, after.throttled_periods)
    used_before, used_after, throttled_before, throttled_after = counters
    if (
        used_before is None
        or used_after is None
        or throttled_before is None
        or throttled_after is None
        or limits.cpu_millis is None
        or outcome.wall_us <= 0
    ):
        return _unknown(ProvokedLimit.CPUS, "the kernel does not count CPU time or throttling here")
    if outcome.exit_code != EXIT_MET:
        return _unknown(ProvokedLimit.CPUS, f"the run {_ended(outcome)}")
    used_us = used_after - used_before
    watched_us = outcome.wall_us * (100 + CPU_TOLERANCE_PERCENT) // 100 + CPU_PERIODS_STRADDLED * CPU_PERIOD_US
    within = used_us * CPU_MILLIS_PER_CPU <= limits.cpu_millis * watched_us
    share = format_cpus(used_us * CPU_MILLIS_PER_CPU // outcome.wall_us)
    evidence = (
        f"{share} of a CPU used over {outcome.wall_us / 1_000_000:.2f} s against a limit of "
        f"{format_cpus(limits.cpu_millis)}, nr_throttled {throttled_before} -> {throttled_after}"
    )
    if within and throttled_after == throttled_before:
        return _unknown(ProvokedLimit.CPUS, f"the host was too busy to give it more: {evidence}")
    return Verdict(limit=ProvokedLimit.CPUS, held=within, evidence=evidence)


def _unknown(limit: ProvokedLimit, why: str) -> Verdict:
    return Verdict(limit=limit, held=None, evidence=f"could not be provoked: {why}")


def _ended(outcome: Outcome) -> str:
    if outcome.signal is not None:
        return f"was ended by signal {outcome.signal}"
    return f"ended with status {outcome.exit_code}"
