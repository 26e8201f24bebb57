"""From what a caller wrote to the limits of a sandbox, and from proofs to what the caller is told.

Pure. What a request says is taken literally or refused; what it does not say comes from the configuration, and
is cut to what the host and the engine have.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec

from runtimes import quantities
from runtimes.cgroup.readings import UNLIMITED
from runtimes.cgroup.verify import LimitProof, enforceable
from runtimes.model import CPU_MILLIS_PER_CPU, EngineInfo, Limits
from runtimes.quantities import QuantityError
from sandboxd.config import (
    NOFILE_MIN,
    OUTPUT_BYTES_MAX,
    OUTPUT_BYTES_MIN,
    SIZE_BYTES_MAX,
    SMALL_TMPFS_BYTES_MIN,
    Defaults,
)
from sandboxd.failures import InvalidArgument
from sandboxd.protocol import LimitReport, LimitsParams

_RESOLVED_KEPT_MAX = 256
"""Most sandboxes ask for what others have asked for, and each asks twice: to be let in, and to be made."""

CREATE_ONLY = ("shm", "tmp", "nofile")
"""Fixed when the container is created."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What this host has."""

    cpus_online: tuple[int, ...]
    memory_bytes: int
    swap_bytes: int
    pid_max: int
    nr_open: int
    """The most open files that a process may be allowed: ``fs.nr_open``."""


class ResolvedLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that a sandbox is created with."""

    limits: Limits
    tmp_bytes_max: int
    """Of /tmp, and once more of the home directory."""


def resolve(params: LimitsParams, defaults: Defaults, host: Host, *, nofile_hard_max: int | None) -> ResolvedLimits:
    """Return the limits for a new sandbox.

    Raises:
        InvalidArgument: a value is nonsense, or more than the host has; the message says what is allowed.
    """
    try:
        return _resolve(params, defaults, host, nofile_hard_max)
    except QuantityError as error:
        raise InvalidArgument(str(error)) from None


@functools.lru_cache(maxsize=_RESOLVED_KEPT_MAX)
def _resolve(params: LimitsParams, defaults: Defaults, host: Host, nofile_hard_max: int | None) -> ResolvedLimits:
    nofile_max = host.nr_open if nofile_hard_max is None else min(nofile_hard_max, host.nr_open)
    given = _given(params, host, nofile_max)
    memory = given.memory_bytes_max
    if memory is None:
        wanted = quantities.parse_memory(defaults.memory, bytes_max=SIZE_BYTES_MAX, option="defaults.memory")
        memory = min(wanted, host.memory_bytes // 2)
    cpu_millis = given.cpu_millis
    if cpu_millis is None:
        # The quota of a sandbox that is bound to some CPUs cannot be more than those give.
        available = len(given.cpuset_cpus) if given.cpuset_cpus is not None else len(host.cpus_online)
        wanted = quantities.parse_cpus(defaults.cpus, cpu_count=quantities.CPU_NUMBER_MAX, option="defaults.cpus")
        cpu_millis = min(wanted, available * CPU_MILLIS_PER_CPU)
    shm = given.shm_bytes_max
    if shm is None:
        shm = min(_default_tmpfs_size(defaults.shm, "defaults.shm"), memory)
    tmp = _tmp(params, host)
    if tmp is None:
        tmp = min(_default_tmpfs_size(defaults.tmp, "defaults.tmp"), memory)
    limits = Limits(
        memory_bytes_max=memory,
        cpu_millis=cpu_millis,
        pids_max=given.pids_max if given.pids_max is not None else min(defaults.pids, host.pid_max),
        cpuset_cpus=given.cpuset_cpus,
        shm_bytes_max=shm,
        nofile_max=given.nofile_max if given.nofile_max is not None else min(defaults.nofile, nofile_max),
    )
    return ResolvedLimits(limits=limits, tmp_bytes_max=tmp)


def resolve_update(params: LimitsParams, host: Host) -> Limits:
    """Return the limits to change; None is what stays as it is.

    Raises:
        InvalidArgument: a value is nonsense, cannot be changed while the sandbox runs, or nothing is changed.
    """
    for name in CREATE_ONLY:
        if getattr(params, name) is not None:
            raise InvalidArgument(
                f"cannot change --{name} of a sandbox that exists",
                hint="give it to sandboxctl create",
            )
    try:
        limits = _given(params, host, host.nr_open)
    except QuantityError as error:
        raise InvalidArgument(str(error)) from None
    if limits == Limits():
        raise InvalidArgument("cannot update nothing", hint="give --memory, --cpus, --pids or --cpuset")
    return limits


def output_bytes_max(defaults: Defaults) -> int:
    """How much of each stream of a command's output is kept.

    Raises:
        InvalidArgument: the setting is no size.
    """
    try:
        return quantities.parse_memory(
            defaults.output, bytes_max=OUTPUT_BYTES_MAX, bytes_min=OUTPUT_BYTES_MIN, option="defaults.output"
        )
    except QuantityError as error:
        raise InvalidArgument(str(error)) from None


def merged(current: Limits, changed: Limits) -> Limits:
    """``current`` with every limit of ``changed`` that is not None."""
    changes = {name: value for name, value in msgspec.structs.asdict(changed).items() if value is not None}
    return msgspec.structs.replace(current, **changes)


def _given(params: LimitsParams, host: Host, nofile_max: int) -> Limits:
    return Limits(
        memory_bytes_max=None
        if params.memory is None
        else quantities.parse_memory(_text(params.memory), bytes_max=host.memory_bytes),
        cpu_millis=None
        if params.cpus is None
        else quantities.parse_cpus(_text(params.cpus), cpu_count=len(host.cpus_online)),
        pids_max=None if params.pids is None else quantities.parse_pids(_text(params.pids), pid_max=host.pid_max),
        cpuset_cpus=None
        if params.cpuset is None
        else quantities.parse_cpuset(params.cpuset, cpus_online=host.cpus_online),
        shm_bytes_max=None if params.shm is None else _tmpfs_size(params.shm, host, "--shm"),
        nofile_max=None
        if params.nofile is None
        else quantities.parse_count(
            _text(params.nofile), count_min=NOFILE_MIN, count_max=nofile_max, option="--nofile"
        ),
    )


def _tmp(params: LimitsParams, host: Host) -> int | None:
    return None if params.tmp is None else _tmpfs_size(params.tmp, host, "--tmp")


def _tmpfs_size(value: float | str, host: Host, option: str) -> int:
    return quantities.parse_memory(
        _text(value), bytes_max=host.memory_bytes, bytes_min=SMALL_TMPFS_BYTES_MIN, option=option
    )


def _default_tmpfs_size(text: str, option: str) -> int:
    return quantities.parse_memory(text, bytes_max=SIZE_BYTES_MAX, bytes_min=SMALL_TMPFS_BYTES_MIN, option=option)


def _text(value: float | str) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) if abs(value) < 2**63 else repr(value)
    return str(value)


def reports(proofs: Sequence[LimitProof]) -> list[LimitReport]:
    """The wire's form of proofs."""
    return [
        LimitReport(
            name=proof.name,
            unit=_unit(proof.name),
            requested=_value(proof.requested),
            reported=_value(proof.reported),
            effective=_value(proof.effective),
            verified=proof.verified,
            reason=proof.reason,
        )
        for proof in proofs
    ]


_UNITS = {"cpus": "millicpu", "pids": "count", "nofile": "count", "cpuset": "list"}


def _unit(name: str) -> str:
    return _UNITS.get(name, "bytes")


def _value(value: int | tuple[int, ...] | None) -> int | str | None:
    if isinstance(value, tuple):
        return quantities.format_cpuset(value)
    return "unlimited" if value == UNLIMITED else value


_FIELDS = {
    "memory": "memory_bytes_max",
    "cpus": "cpu_millis",
    "pids": "pids_max",
    "cpuset": "cpuset_cpus",
}


def passable(limits: Limits, info: EngineInfo) -> Limits:
    """The limits that the engine is told: all, unless the caller goes on without those that cannot be enforced."""
    missing = {entry.limit for entry in enforceable(limits, info)}
    return msgspec.structs.replace(limits, **{field: None for name, field in _FIELDS.items() if name in missing})


def difference(before: Limits, after: Limits) -> Limits:
    """The limits of ``after`` that are not those of ``before``."""
    old = msgspec.structs.asdict(before)
    return Limits(**{name: value for name, value in msgspec.structs.asdict(after).items() if value != old[name]})
