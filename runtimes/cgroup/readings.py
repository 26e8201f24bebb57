"""What the kernel's files say about one container, as numbers. Pure: bytes in, structs out.

Two rules hold throughout. A file that is not there is None, "unknown", and never zero. A file that is there and does
not hold what the kernel documents raises ``CgroupUnreadable``: a limit or a counter is not to be guessed at.

"No limit" is ``UNLIMITED``, a number above every limit, so that the tightest of several is simply their minimum.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from runtimes.errors import CgroupUnreadable
from runtimes.model import CPU_MILLIS_PER_CPU, CgroupVersion
from runtimes.mountinfo import unescape
from runtimes.quantities import parse_cpu_list

UNLIMITED: Final = 2**63 - 1
"""No limit. cgroup v1 says the same with this number rounded down to a page."""

_UNLIMITED_V1_MIN: Final = UNLIMITED - 2**20
"""v1's "no limit" is 2^63-1 rounded down to a page, and pages are 64 KiB at most."""

FILE_BYTES_MAX: Final = 16 * 1024
"""Longest cgroup file that is taken; ``memory.stat`` has about 2 KiB."""

TABLE_BYTES_MAX: Final = 1024 * 1024
"""Longest ``/proc/PID/mountinfo`` that is taken: some thousands of mounts."""

CPU_PERIOD_US: Final = 100_000
"""The period that the kernel starts with and that every engine and we write quotas for."""

CONTROLLERS: Final = ("memory", "cpu", "cpuacct", "cpuset", "pids")
"""The v1 controllers that limits and counters are read from."""

SHM_TARGET: Final = "/dev/shm"  # noqa: S108 - a mount point inside the container

_NUMBER_CHARS_MAX: Final = 20
_LINES_KEPT_MAX: Final = 2048
"""Of mountinfo, taken apart: a container has about ten that are looked at."""
_TABLES_KEPT_MAX: Final = 2
"""Of mountinfo, whole: our own, which is looked into for every container, beside that of the container."""
_TMPFS_UNITS: Final = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_PRESSURE: Final = re.compile(
    rb"some avg10=([0-9]{1,3}\.[0-9]{2}) [^\n]{0,64}total=([0-9]{1,20})\n"
    rb"(?:full avg10=([0-9]{1,3}\.[0-9]{2}) [^\n]{0,64}total=([0-9]{1,20})\n)?"
)
_NOFILE: Final = re.compile(
    rb"^Max open files +([0-9]{1,20}|unlimited) +([0-9]{1,20}|unlimited) +files *$", re.MULTILINE
)


class OwnLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits nearest to the container's processes, whatever applies above them.

    A group without a limit of its own (the ``container`` group that crun puts below the scope) takes over that of the
    first group above that has one.
    """

    memory_bytes_max: int | None = None
    memory_swap_bytes_max: int | None = None
    """Memory and swap together."""
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    pids_max: int | None = None
    cpuset_cpus: tuple[int, ...] | None = None


class EffectiveLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel holds the container to: the tightest from its own group up to the root of the mount.

    None is unknown, ``UNLIMITED`` is no limit.
    """

    memory_bytes_max: int | None = None
    memory_swap_bytes_max: int | None = None
    """Memory and swap together; None where the kernel does not account for swap."""
    cpu_millis: int | None = None
    """Rounded up to a whole thousandth, so that no limit looks tighter than it is."""
    pids_max: int | None = None
    cpuset_cpus: tuple[int, ...] | None = None
    shm_bytes_max: int | None = None
    nofile_soft_max: int | None = None
    nofile_max: int | None = None
    tmpfs_bytes_max: dict[str, int] = {}
    """Size of each tmpfs by its mount point inside; ``UNLIMITED`` where it was mounted without one."""
    own: OwnLimits = OwnLimits()

    def with_tmpfs(self, sizes: Mapping[str, int]) -> EffectiveLimits:
        """The same with these sizes of its tmpfs, by their places, /dev/shm among them."""
        return msgspec.structs.replace(self, shm_bytes_max=sizes.get(SHM_TARGET), tmpfs_bytes_max=dict(sizes))


class Pressure(msgspec.Struct, frozen=True, kw_only=True):
    """One pressure-stall file: the share of time that some, or all, of the processes waited for a resource."""

    some_avg10_percent: float
    some_total_us: int
    full_avg10_percent: float | None = None
    full_total_us: int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the container has used and run into. Counters count from the container's start. None is unknown."""

    cpu_us: int | None = None
    memory_bytes: int | None = None
    memory_bytes_peak: int | None = None
    memory_working_set_bytes: int | None = None
    """Memory in use without the file cache that the kernel would give up first."""
    memory_refused: int | None = None
    """How often memory was held at its limit: reclaimed, refused or killed for."""
    pids: int | None = None
    pids_peak: int | None = None
    pids_refused: int | None = None
    """How often a fork was refused for the pids limit."""
    throttled_periods: int | None = None
    throttled_us: int | None = None
    oom_kills: int | None = None
    ooms_own: int | None = None
    """How often memory ran out at the container's own limit, and not at one above it. v1 does not tell."""
    cpu_pressure: Pressure | None = None
    memory_pressure: Pressure | None = None
    io_pressure: Pressure | None = None


class CgroupPath(msgspec.Struct, frozen=True, kw_only=True):
    """One group of one hierarchy, as a directory of this host."""

    mount_point: str
    names: tuple[str, ...]
    """The group's path below the mount point, one name per level; empty for the mount's own root."""
    device: tuple[int, int] = (0, 0)
    """Device number of the mount, to tell a mount that another one hides."""

    @property
    def directory(self) -> str:
        """Absolute path of the group."""
        return "/".join((self.mount_point.rstrip("/"), *self.names)) or "/"


class CgroupPaths(msgspec.Struct, frozen=True, kw_only=True):
    """Where one process is in every hierarchy that matters here."""

    version: CgroupVersion
    controllers: dict[str, CgroupPath]
    """By v1 controller; empty on v2."""
    unified: CgroupPath | None = None
    """Its v2 group: the one with the limits on v2, one with pressure files on a hybrid host."""


def parse_count(raw: bytes | None, name: str) -> int | None:
    """A file that holds one number, or ``max``."""
    if raw is None:
        return None
    digits = raw.rstrip()
    if digits == b"max":
        return UNLIMITED
    return _number(digits, name)


def parse_limit_v1(raw: bytes | None, name: str) -> int | None:
    """A v1 memory limit: its "no limit" is a page below 2^63."""
    count = parse_count(raw, name)
    return UNLIMITED if count is not None and count >= _UNLIMITED_V1_MIN else count


def parse_quota_v1(quota: bytes | None, period: bytes | None) -> tuple[int, int] | None:
    """Quota and period in microseconds of ``cpu.cfs_quota_us`` (-1: no limit) and ``cpu.cfs_period_us``."""
    if quota is None or period is None:
        return None
    period_us = _number(period.rstrip(), "cpu.cfs_period_us")
    if period_us == 0:
        raise _unreadable("cpu.cfs_period_us", period)
    if quota.rstrip() == b"-1":
        return UNLIMITED, period_us
    return _number(quota.rstrip(), "cpu.cfs_quota_us"), period_us


def parse_cpu_max(raw: bytes | None) -> tuple[int, int] | None:
    """Quota and period in microseconds of v2's ``cpu.max``."""
    if raw is None:
        return None
    quota, _, period = raw.rstrip().partition(b" ")
    period_us = _number(period, "cpu.max")
    if period_us == 0:
        raise _unreadable("cpu.max", raw)
    return (UNLIMITED if quota == b"max" else _number(quota, "cpu.max")), period_us


def parse_cpuset(raw: bytes | None, name: str) -> tuple[int, ...] | None:
    """Ascending CPU numbers, or None where the group has no set of its own (v2: an empty file)."""
    if raw is None or raw.strip() == b"":
        return None
    cpus = parse_cpu_list(raw.rstrip().decode("ascii", "replace"))
    if cpus is None:
        raise _unreadable(name, raw)
    return cpus


def parse_field(raw: bytes | None, key: bytes, name: str) -> int | None:
    """The number beside ``key`` in a file of ``key number`` lines; None where the kernel has no such line."""
    if raw is None:
        return None
    start = 0 if raw.startswith(key + b" ") else raw.find(b"\n" + key + b" ") + 1
    if start == 0 and not raw.startswith(key + b" "):
        return None
    start += len(key) + 1
    end = raw.find(b"\n", start)
    return _number(raw[start:end] if end >= 0 else raw[start:], name)


def parse_pressure(raw: bytes | None, name: str) -> Pressure | None:
    """One pressure-stall file. Empty where the kernel has pressure accounting switched off: None."""
    if raw is None or raw == b"":
        return None
    match = _PRESSURE.fullmatch(raw)
    if match is None:
        raise _unreadable(name, raw)
    some, some_total, full, full_total = match.groups()
    return Pressure(
        some_avg10_percent=float(some),
        some_total_us=_number(some_total, name),
        full_avg10_percent=float(full) if full is not None else None,
        full_total_us=_number(full_total, name) if full_total is not None else None,
    )


def parse_nofile(raw: bytes | None) -> tuple[int, int] | None:
    """Soft and hard limit of open files in ``/proc/PID/limits``."""
    if raw is None:
        return None
    match = _NOFILE.search(raw)
    if match is None:
        raise _unreadable("limits", raw)
    soft, hard = (UNLIMITED if text == b"unlimited" else _number(text, "limits") for text in match.groups())
    return soft, hard


def parse_tmpfs_sizes(raw: bytes | None) -> dict[str, int] | None:
    """Size of every tmpfs in ``/proc/PID/mountinfo`` by its mount point; of two on one, that of the one on top.

    A mount of anything else hides a tmpfs that was there before.
    """
    if raw is None:
        return None
    sizes: dict[str, int] = {}
    mounts = _mounts(_at_tmpfs(raw))
    points = {mount.number: mount.point for mount in mounts}
    # The order of the lines says nothing; at one place each mount lies on the one that was there before.
    covered = {m.parent for m in mounts if points.get(m.parent) == m.point and m.parent != m.number}
    for mount in mounts:
        if mount.number in covered:
            continue
        if mount.filesystem == "tmpfs" and mount.root == "/":
            sizes[mount.point] = _tmpfs_size(mount.options)
        else:
            sizes.pop(mount.point, None)
    return sizes


def _at_tmpfs(raw: bytes) -> bytes:
    """The lines of a mountinfo that say something of a place where a tmpfs is; there are many others."""
    lines = [(line, line.split(b" ", 5)) for line in raw.splitlines()]
    places = {fields[4] for _, fields in lines if len(fields) > 5 and b" - tmpfs " in fields[5]}
    return b"\n".join(line for line, fields in lines if len(fields) <= 5 or fields[4] in places)


def tightest(levels: Iterable[int | None]) -> int | None:
    """The smallest of what is known; None where nothing is."""
    return min((level for level in levels if level is not None), default=None)


def nearest(levels: Iterable[int | None]) -> int | None:
    """The first real limit going up; ``UNLIMITED`` where there are only such, None where nothing is known."""
    known = [level for level in levels if level is not None]
    return next((level for level in known if level != UNLIMITED), UNLIMITED if known else None)


def nearest_quota(levels: Iterable[tuple[int, int] | None]) -> tuple[int, int] | None:
    """The first quota and period going up that is a limit; an unlimited one where there are only such."""
    known = [level for level in levels if level is not None]
    return next((level for level in known if level[0] != UNLIMITED), known[0] if known else None)


def cpu_millis_of(quota: tuple[int, int]) -> int:
    """Thousandths of a CPU in a quota and its period, rounded up."""
    quota_us, period_us = quota
    if quota_us == UNLIMITED:
        return UNLIMITED
    return -(-quota_us * CPU_MILLIS_PER_CPU // period_us)


def added(memory: int | None, swap: int | None) -> int | None:
    """Memory and swap together, where both are known."""
    if memory is None or swap is None:
        return None
    return UNLIMITED if UNLIMITED in {memory, swap} else memory + swap


def cgroup_paths(cgroup: bytes, mountinfo: bytes, *, wanted: Sequence[str] = CONTROLLERS) -> CgroupPaths:
    """Where a process is.

    Args:
        cgroup: Its ``/proc/PID/cgroup``, as the reader sees it.
        mountinfo: The **reader's** ``/proc/self/mountinfo``: both are told relative to the reader's cgroup namespace.
        wanted: Which v1 controllers matter.

    Raises:
        CgroupUnreadable: malformed, or no mount of the reader's shows that group (it lies outside of the reader's
            cgroup namespace, or of what is mounted here).
    """
    groups = _memberships(cgroup)
    mounts = _mounts(mountinfo)
    unified = groups.pop("", None)
    controllers: dict[str, CgroupPath] = {}
    for controller in wanted:
        # The kernel names what is not mounted here too: in a container that sees only v2, the v1 of a hybrid host.
        shown = [m for m in mounts if m.filesystem == "cgroup" and controller in m.options.split(",")]
        if controller in groups and shown:
            controllers[controller] = _directory(groups[controller], shown, controller)
    v2_mounts = [mount for mount in mounts if mount.filesystem == "cgroup2"]
    v2_path = _directory(unified, v2_mounts, "cgroup2") if unified is not None and v2_mounts else None
    if not controllers:
        if v2_path is None:
            raise CgroupUnreadable("cannot find the process's control group", detail="no cgroup is mounted here")
        return CgroupPaths(version=CgroupVersion.V2, controllers={}, unified=v2_path)
    version = CgroupVersion.V1 if v2_path is None else CgroupVersion.HYBRID
    return CgroupPaths(version=version, controllers=controllers, unified=v2_path)


# Files by name and the controller whose group they are in (v2: one group holds all). A limit file is read at every
# level, leaf first; a counter at the container's top group, and where it is marked at the leaf.

LIMIT_FILES_V2: Final = {
    "memory.max": "memory",
    "memory.swap.max": "memory",
    "cpu.max": "cpu",
    "pids.max": "pids",
}
LIMIT_FILES_V1: Final = {
    "memory.limit_in_bytes": "memory",
    "memory.memsw.limit_in_bytes": "memory",
    "cpu.cfs_quota_us": "cpu",
    "cpu.cfs_period_us": "cpu",
    "pids.max": "pids",
}
CPUSET_OWN: Final = "cpuset.cpus"
CPUSET_EFFECTIVE_V2: Final = "cpuset.cpus.effective"
CPUSET_EFFECTIVE_V1: Final = "cpuset.effective_cpus"

LEAF: Final = "@leaf"
"""Marks a counter that is read from the leaf too: before Linux 6.11 ``pids.events`` counts at the group that the fork
was tried in, since then at the group that has the limit."""

PRESSURE_FILES: Final = ("cpu.pressure", "memory.pressure", "io.pressure")
COUNTER_FILES_V2: Final = (
    "cpu.stat",
    "memory.current",
    "memory.peak",
    "memory.stat",
    "memory.events",
    "memory.events.local",
    "memory.events.local" + LEAF,
    "pids.current",
    "pids.peak",
    "pids.events",
    "pids.events" + LEAF,
)
COUNTER_FILES_V1: Final = {
    "cpuacct.usage": "cpuacct",
    "cpu.stat": "cpu",
    "memory.usage_in_bytes": "memory",
    "memory.max_usage_in_bytes": "memory",
    "memory.stat": "memory",
    "memory.oom_control": "memory",
    "memory.failcnt": "memory",
    "pids.current": "pids",
    "pids.peak": "pids",
    "pids.events": "pids",
}


REFUSAL_FILES_V2: Final = ("memory.events", "pids.events", "pids.events" + LEAF)
REFUSAL_FILES_V1: Final = ("memory.oom_control", "pids.events")
"""The counters that say what the kernel has refused: few, for they are read around every command."""


class Refusals(msgspec.Struct, frozen=True):
    """What the kernel has refused a container so far; None: it does not count that."""

    oom_kills: int | None
    pids_refused: int | None


def effective_limits(
    version: CgroupVersion,
    levels: Mapping[str, Sequence[bytes | None]],
    *,
    cpuset_own: bytes | None,
    cpuset_effective: bytes | None,
    limits: bytes | None,
) -> EffectiveLimits:
    """The limits of one container, but for the sizes of its tmpfs: see ``with_tmpfs``.

    Args:
        version: Which files ``levels`` has: ``LIMIT_FILES_V2`` or ``LIMIT_FILES_V1``.
        levels: Each limit file as read at every level, leaf first; empty where the controller is not there.
        cpuset_own: ``cpuset.cpus`` of the container's own group.
        cpuset_effective: The CPUs that are left to it by all groups above.
        limits: ``/proc/PID/limits`` of a process inside.

    Raises:
        CgroupUnreadable: a file does not hold what the kernel documents.
    """
    memory, own_total, total, quotas = (_levels_v2 if version is CgroupVersion.V2 else _levels_v1)(levels)
    pids = [parse_count(raw, "pids.max") for raw in levels["pids.max"]]
    own_quota = nearest_quota(quotas)
    soft, hard = parse_nofile(limits) or (None, None)
    return EffectiveLimits(
        memory_bytes_max=tightest(memory),
        memory_swap_bytes_max=total,
        cpu_millis=tightest(cpu_millis_of(quota) for quota in quotas if quota is not None),
        pids_max=tightest(pids),
        cpuset_cpus=parse_cpuset(cpuset_effective, CPUSET_OWN),
        nofile_soft_max=soft,
        nofile_max=hard,
        own=OwnLimits(
            memory_bytes_max=nearest(memory),
            memory_swap_bytes_max=own_total,
            cpu_quota_us=own_quota[0] if own_quota is not None else None,
            cpu_period_us=own_quota[1] if own_quota is not None else None,
            pids_max=nearest(pids),
            cpuset_cpus=parse_cpuset(cpuset_own, CPUSET_OWN),
        ),
    )


def usage(version: CgroupVersion, texts: Mapping[str, bytes | None]) -> Usage:
    """Counters and gauges of one container.

    Args:
        version: Which files ``texts`` has: ``COUNTER_FILES_V2`` or ``COUNTER_FILES_V1``.
        texts: Each file as read; the pressure files are needed by no version.

    Raises:
        CgroupUnreadable: a file does not hold what the kernel documents.
    """
    return (_usage_v2 if version is CgroupVersion.V2 else _usage_v1)(texts)


def refusals(version: CgroupVersion, texts: Mapping[str, bytes | None]) -> Refusals:
    """The part of ``usage`` that verdicts need, of ``REFUSAL_FILES_V2`` or ``REFUSAL_FILES_V1``.

    Raises:
        CgroupUnreadable: a file does not hold what the kernel documents.
    """
    if version is CgroupVersion.V2:
        return Refusals(
            oom_kills=parse_field(texts["memory.events"], b"oom_kill", "memory.events"),
            pids_refused=_at_both(texts, "pids.events", b"max"),
        )
    return Refusals(
        oom_kills=parse_field(texts["memory.oom_control"], b"oom_kill", "memory.oom_control"),
        pids_refused=parse_field(texts["pids.events"], b"max", "pids.events"),
    )


def working_set(memory_bytes: int | None, cache_bytes: int | None) -> int | None:
    """Memory in use without what the kernel can take back by dropping file cache."""
    if memory_bytes is None or cache_bytes is None:
        return None
    return max(memory_bytes - cache_bytes, 0)


_Quotas = list[tuple[int, int] | None]


def _levels_v2(
    levels: Mapping[str, Sequence[bytes | None]],
) -> tuple[list[int | None], int | None, int | None, _Quotas]:
    """Memory by level, memory and swap nearest and tightest, quotas by level. v2 counts swap apart."""
    memory = [parse_count(raw, "memory.max") for raw in levels["memory.max"]]
    swap = [parse_count(raw, "memory.swap.max") for raw in levels["memory.swap.max"]]
    own_total, total = added(nearest(memory), nearest(swap)), added(tightest(memory), tightest(swap))
    return memory, own_total, total, [parse_cpu_max(raw) for raw in levels["cpu.max"]]


def _levels_v1(
    levels: Mapping[str, Sequence[bytes | None]],
) -> tuple[list[int | None], int | None, int | None, _Quotas]:
    """The same of v1, which counts memory and swap together."""
    memory = [parse_limit_v1(raw, "memory.limit_in_bytes") for raw in levels["memory.limit_in_bytes"]]
    name = "memory.memsw.limit_in_bytes"
    total = [parse_limit_v1(raw, name) for raw in levels[name]]
    pairs = zip(levels["cpu.cfs_quota_us"], levels["cpu.cfs_period_us"], strict=True)
    return memory, nearest(total), tightest(total), [parse_quota_v1(*pair) for pair in pairs]


def _usage_v2(texts: Mapping[str, bytes | None]) -> Usage:
    cpu, events = texts["cpu.stat"], texts["memory.events"]
    memory_bytes = parse_count(texts["memory.current"], "memory.current")
    inactive = parse_field(texts["memory.stat"], b"inactive_file", "memory.stat")
    refused = _at_both(texts, "pids.events", b"max")
    return Usage(
        cpu_us=parse_field(cpu, b"usage_usec", "cpu.stat"),
        throttled_periods=parse_field(cpu, b"nr_throttled", "cpu.stat"),
        throttled_us=parse_field(cpu, b"throttled_usec", "cpu.stat"),
        memory_bytes=memory_bytes,
        memory_bytes_peak=parse_count(texts["memory.peak"], "memory.peak"),
        memory_working_set_bytes=working_set(memory_bytes, inactive),
        memory_refused=parse_field(events, b"max", "memory.events"),
        oom_kills=parse_field(events, b"oom_kill", "memory.events"),
        ooms_own=_at_both(texts, "memory.events.local", b"oom"),
        pids=parse_count(texts["pids.current"], "pids.current"),
        pids_peak=parse_count(texts["pids.peak"], "pids.peak"),
        pids_refused=refused,
        cpu_pressure=parse_pressure(texts.get("cpu.pressure"), "cpu.pressure"),
        memory_pressure=parse_pressure(texts.get("memory.pressure"), "memory.pressure"),
        io_pressure=parse_pressure(texts.get("io.pressure"), "io.pressure"),
    )


def _at_both(texts: Mapping[str, bytes | None], name: str, key: bytes) -> int | None:
    """A counter that may be counted at the container's top group or at its leaf: the larger of both."""
    counts = [parse_field(texts[each], key, each) for each in (name, name + LEAF)]
    return max((count for count in counts if count is not None), default=None)


def _usage_v1(texts: Mapping[str, bytes | None]) -> Usage:
    cpu_ns = parse_count(texts["cpuacct.usage"], "cpuacct.usage")
    throttled_ns = parse_field(texts["cpu.stat"], b"throttled_time", "cpu.stat")
    memory_bytes = parse_count(texts["memory.usage_in_bytes"], "memory.usage_in_bytes")
    inactive = parse_field(texts["memory.stat"], b"total_inactive_file", "memory.stat")
    return Usage(
        cpu_us=cpu_ns // 1000 if cpu_ns is not None else None,
        throttled_periods=parse_field(texts["cpu.stat"], b"nr_throttled", "cpu.stat"),
        throttled_us=throttled_ns // 1000 if throttled_ns is not None else None,
        memory_bytes=memory_bytes,
        memory_bytes_peak=parse_count(texts["memory.max_usage_in_bytes"], "memory.max_usage_in_bytes"),
        memory_working_set_bytes=working_set(memory_bytes, inactive),
        memory_refused=parse_count(texts["memory.failcnt"], "memory.failcnt"),
        oom_kills=parse_field(texts["memory.oom_control"], b"oom_kill", "memory.oom_control"),
        pids=parse_count(texts["pids.current"], "pids.current"),
        pids_peak=parse_count(texts["pids.peak"], "pids.peak"),
        pids_refused=parse_field(texts["pids.events"], b"max", "pids.events"),
        cpu_pressure=parse_pressure(texts.get("cpu.pressure"), "cpu.pressure"),
        memory_pressure=parse_pressure(texts.get("memory.pressure"), "memory.pressure"),
        io_pressure=parse_pressure(texts.get("io.pressure"), "io.pressure"),
    )


class _Mount(msgspec.Struct, frozen=True):
    number: int
    parent: int
    device: tuple[int, int]
    root: str
    point: str
    filesystem: str
    options: str


def _memberships(raw: bytes) -> dict[str, str]:
    """Path by controller name, v2's under the empty name, of ``/proc/PID/cgroup``."""
    groups: dict[str, str] = {}
    for line in _lines(raw, "cgroup"):
        number, _, rest = line.partition(":")
        names, colon, path = rest.partition(":")
        if not number.isdigit() or not colon or not path.startswith("/"):
            raise _unreadable("cgroup", raw)
        for name in names.split(","):
            groups[name] = path
    return groups


@functools.lru_cache(maxsize=_TABLES_KEPT_MAX)
def _mounts(raw: bytes) -> tuple[_Mount, ...]:
    """The lines of a mountinfo."""
    return tuple(_mount(line) for line in _lines(raw, "mountinfo"))


@functools.lru_cache(maxsize=_LINES_KEPT_MAX)
def _mount(line: str) -> _Mount:
    """One line. They are the same from reading to reading, and a claim waits for the last."""
    before, dash, after = line.partition(" - ")
    fields, tail = before.split(" "), after.split(" ")
    if not dash or len(fields) < 6 or len(tail) < 3:
        raise _unreadable("mountinfo", line.encode("utf-8", "surrogateescape"))
    major, _, minor = fields[2].partition(":")
    if not (major and minor and fields[0] and fields[1] and _is_number(fields[0] + fields[1] + major + minor)):
        raise _unreadable("mountinfo", line.encode("utf-8", "surrogateescape"))
    device = (int(major), int(minor))
    root, point = unescape(fields[3]), unescape(fields[4])
    return _Mount(int(fields[0]), int(fields[1]), device, root, point, tail[0], tail[2])


def _directory(path: str, mounts: Sequence[_Mount], controller: str) -> CgroupPath:
    """The group as a directory below the mount that shows it; the last mounted where several do.

    Both the path and a mount's root may begin with ``/..``: then they lie above the reader's namespace root.
    """
    wanted = _names(path)
    for mount in reversed(mounts):
        root = _names(mount.root)
        below = wanted[len(root) :]
        if wanted[: len(root)] == root and ".." not in below:
            return CgroupPath(mount_point=mount.point, names=below, device=mount.device)
    raise CgroupUnreadable(
        f"cannot find the process's {controller} control group",
        detail=f"{path[:200]!r} is not below any {controller} mount of this namespace",
    )


def _names(path: str) -> tuple[str, ...]:
    return tuple(name for name in path.split("/") if name not in {"", "."})


def _tmpfs_size(options: str) -> int:
    """The ``size=`` of a tmpfs's options; ``UNLIMITED`` without one."""
    for option in options.split(","):
        key, _, size = option.partition("=")
        if key == "size":
            digits = size.rstrip("kmg")
            unit = _TMPFS_UNITS.get(size[len(digits) :])
            if unit is None or not _is_number(digits):
                raise _unreadable("mountinfo", option.encode())
            return min(int(digits) * unit, UNLIMITED)
    return UNLIMITED


def _lines(raw: bytes, name: str) -> list[str]:
    if len(raw) > TABLE_BYTES_MAX:
        raise CgroupUnreadable(f"cannot read {name}", detail=f"longer than {TABLE_BYTES_MAX} bytes")
    return raw.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n") if raw else []


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _NUMBER_CHARS_MAX


def _number(digits: bytes, name: str) -> int:
    if not digits.isdigit() or len(digits) > _NUMBER_CHARS_MAX:
        raise _unreadable(name, digits)
    return int(digits)


def _unreadable(name: str, raw: bytes) -> CgroupUnreadable:
    return CgroupUnreadable(f"cannot read {name}", detail=f"not as the kernel documents it: {raw[:80]!r}")
