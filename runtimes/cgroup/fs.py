"""The control groups of a running container: found, read and written.

The only room that touches cgroupfs and ``/proc/PID``. What the files mean is in ``readings``.

Which group is whose
--------------------
The kernel says where a process is (``/proc/PID/cgroup``), and a container's group carries the container's id
in its name: ``docker/ID``, ``docker-ID.scope``, ``libpod_parent/libpod-ID``, ``libpod-ID.scope/container``.
``CgroupHandle`` opens nothing else. The *top* group is the highest one that carries the id, the *leaf* is the
one that the process is in; with crun under systemd these are two (the scope, with the limits, and ``container``
below it), else they are one.
Usage is read from the top, limits are read from the leaf up to the root of the mount, and are written to the top and
to every group below it that has a limit of its own.

Descriptors, not paths
----------------------
A container that is restarted gets groups of the same names. A descriptor of the old directory goes on meaning the old
group: reading and writing through it fails with ENODEV, and can never hit the new one. So every file is opened
relative to a kept directory, ancestors by ``..``, and the pid's own files relative to a kept ``/proc/PID``. The files
of ``read_usage`` are opened once, when first read, and read again at offset 0, which makes a reading cheap. That
is about 20 descriptors for each container: a process that keeps many raises its soft limit of open files. Between
``keep_open`` and ``let_go`` the limit files are kept as well: as many once more, where a reading must be quick.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterator
from typing import Final, Self

from runtimes import mounttable
from runtimes.cgroup import readings
from runtimes.cgroup.readings import (
    CPU_PERIOD_US,
    FILE_BYTES_MAX,
    LEAF,
    TABLE_BYTES_MAX,
    CgroupPath,
    CgroupPaths,
    EffectiveLimits,
    Refusals,
    Usage,
)
from runtimes.errors import CgroupUnreadable
from runtimes.model import CPU_MILLIS_PER_CPU, CgroupVersion, Limits
from runtimes.quantities import format_bytes, format_cpuset

CONTAINER_ID_CHARS: Final = 64
PROC: Final = "/proc"
GONE: Final = "the container is gone"

_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE: Final = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_WRITE: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_UNIFIED: Final = "unified"

_ABSENT: Final = frozenset({errno.ENOENT, errno.EOPNOTSUPP})
_GONE: Final = frozenset({errno.ENODEV, errno.ESRCH})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class LimitBelowUsage(CgroupUnreadable):
    """The container already uses more than the limit that was to be written; nothing was changed by that write."""


def locate(pid: int, *, proc: str = PROC) -> CgroupPaths:
    """Where a process is in every hierarchy that limits are read from, as directories of this host.

    Two small reads and one stat for each hierarchy.

    Raises:
        CgroupUnreadable: there is no such process, or its groups cannot be seen from here.
    """
    paths = _located(_read_path(f"{proc}/{pid}/cgroup"), proc)
    for path in _all_paths(paths):
        _check_not_hidden(path)
    return paths


def swap_is_counted(pid: int, *, proc: str = PROC) -> bool | None:
    """Whether the kernel counts swap by control group; None where the groups of this process do not tell.

    Raises:
        CgroupUnreadable: there is no such process, or its groups cannot be seen from here.
    """
    paths = locate(pid, proc=proc)
    if paths.version is CgroupVersion.V2:
        path, memory, swap = paths.unified, "memory.max", "memory.swap.max"
    else:
        path, memory, swap = paths.controllers.get("memory"), "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
    if path is None:
        return None
    # The root of a v2 tree has neither file, and the groups below the last one with the controller have neither.
    for depth in range(len(path.names), -1, -1):
        directory = "/".join((path.mount_point.rstrip("/"), *path.names[:depth]))
        if os.path.exists(f"{directory}/{memory}"):
            return os.path.exists(f"{directory}/{swap}")
    return None


def read_fixed_limits(pid: int, *, proc: str = PROC) -> EffectiveLimits:
    """The limits of a container that has no control group of its own: open files, /dev/shm and every tmpfs.

    Raises:
        CgroupUnreadable: the process is gone.
    """
    effective = readings.effective_limits(
        CgroupVersion.V2,
        dict.fromkeys(readings.LIMIT_FILES_V2, ()),
        cpuset_own=None,
        cpuset_effective=None,
        limits=_read_path(f"{proc}/{pid}/limits"),
    )
    return _with_mounts(effective, _read_path(f"{proc}/{pid}/mountinfo", bytes_max=TABLE_BYTES_MAX))


def freeze(pid: int, container_id: str, *, proc: str = PROC) -> bool:
    """Freeze a container past its engine, so that one which takes it for frozen already can thaw it.

    Args:
        pid: Its PID 1.
        container_id: Must be in the name of the group.
        proc: Where the process table is.

    Returns:
        Whether the kernel took it; False where it has no group of its own, or that is another user's.
    """
    try:
        paths = readings.cgroup_paths(_read_path(f"{proc}/{pid}/cgroup"), _own_mounts(proc), wanted=("freezer",))
        path = paths.controllers.get("freezer", paths.unified)
        if path is None or not any(container_id in part for part in path.names):
            return False
        group = _Group.open(path, top=0)
        try:
            if path is paths.unified:
                group.write(0, "cgroup.freeze", "1")
            else:
                group.write(0, "freezer.state", "FROZEN")
        finally:
            os.close(group.fd)
    except (OSError, CgroupUnreadable):
        return False
    return True


class CgroupHandle:
    """The groups of one running container, kept open.

    Not safe for use from two threads at once. Close it, or use it as a context manager.
    """

    def __init__(self, pid: int, container_id: str, paths: CgroupPaths, proc_fd: int, membership: bytes) -> None:
        """Take over ``proc_fd``; ``open`` is the way to make one."""
        self._membership = membership
        self.pid = pid
        self.container_id = container_id
        self.paths = paths
        self._proc_fd = proc_fd
        self._groups: dict[str, _Group] = {}
        self._counters: dict[str, int | None] = {}
        self._kept_proc: dict[str, int] | None = None

    @classmethod
    def open(cls, pid: int, container_id: str, *, proc: str = PROC) -> Self:
        """Find and open the groups of the container whose PID 1 is ``pid`` on this host.

        Raises:
            CgroupUnreadable: the process is gone, is in the root group, or is in a group that does not carry the
                container's id in its name; or one hierarchy's group cannot be opened.
        """
        if len(container_id) != CONTAINER_ID_CHARS:
            raise CgroupUnreadable("cannot open control groups", detail=f"{container_id[:80]!r} is not a full id")
        try:
            proc_fd = os.open(f"{proc}/{pid}", _DIRECTORY)
        except OSError as error:
            raise _failure(f"cannot read /proc/{pid}", error) from error
        try:
            membership = _read_at(proc_fd, "cgroup")
            paths = _located(membership, proc)
        except BaseException:
            os.close(proc_fd)
            raise
        handle = cls(pid, container_id, paths, proc_fd, membership)
        try:
            handle._open_groups()
            # The process may have been moved while its groups were being opened.
            handle._check_not_moved()
        except BaseException:
            handle.close()
            raise
        return handle

    @property
    def version(self) -> CgroupVersion:
        """How this host mounts its control groups."""
        return self.paths.version

    def close(self) -> None:
        """Close every descriptor. Idempotent."""
        self.let_go()
        descriptors = [self._proc_fd, *(group.fd for group in self._groups.values())]
        descriptors += [fd for fd in self._counters.values() if fd is not None]
        self._proc_fd, self._groups, self._counters = -1, {}, {}
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep_open(self) -> None:
        """Keep every limit file open from its next reading on: reading and writing after that costs a third."""
        if self._kept_proc is None:
            self._kept_proc = {}
        for group in self._groups.values():
            group.keep_open()

    def let_go(self) -> None:
        """Close what ``keep_open`` keeps. Idempotent."""
        kept, self._kept_proc = self._kept_proc, None
        for fd in (kept or {}).values():
            os.close(fd)
        for group in self._groups.values():
            group.let_go()

    def read_limits(self, *, tmpfs: bool = True) -> EffectiveLimits:
        """The limits that the kernel holds the container to, from its leaf group up to the root of the mount.

        Args:
            tmpfs: Read the sizes of /dev/shm and every tmpfs too, which are in the container's mount table: half of
                the cost; empty without.

        Raises:
            CgroupUnreadable: the container is gone, or a file does not hold what the kernel documents.
        """
        self._check_exists()
        self._check_not_moved()
        v2 = self.version is CgroupVersion.V2
        names = readings.LIMIT_FILES_V2 if v2 else readings.LIMIT_FILES_V1
        cpuset = self._group("cpuset")
        effective_name = readings.CPUSET_EFFECTIVE_V2 if v2 else readings.CPUSET_EFFECTIVE_V1
        effective = readings.effective_limits(
            self.version,
            {name: self._levels(controller, name) for name, controller in names.items()},
            cpuset_own=cpuset.read(cpuset.top, readings.CPUSET_OWN) if cpuset is not None else None,
            cpuset_effective=cpuset.read(0, effective_name) if cpuset is not None else None,
            limits=self._read_proc("limits"),
        )
        if not tmpfs:
            return effective
        # Never through a kept descriptor: that would keep the container's mounts for as long.
        return _with_mounts(effective, _read_at(self._proc_fd, "mountinfo", bytes_max=TABLE_BYTES_MAX))

    def read_usage(self, *, pressure: bool = True) -> Usage:
        """Counters and gauges of the whole container, through kept descriptors.

        Args:
            pressure: Read the three pressure files too: a third of the cost.

        Raises:
            CgroupUnreadable: the container is gone, or a file does not hold what the kernel documents.
        """
        names = readings.COUNTER_FILES_V2 if self.version is CgroupVersion.V2 else tuple(readings.COUNTER_FILES_V1)
        return readings.usage(self.version, self._counts((*names, *(readings.PRESSURE_FILES if pressure else ()))))

    def read_refusals(self) -> Refusals:
        """What the kernel has refused: that part of ``read_usage``, at a fifth of its files and descriptors.

        Raises:
            CgroupUnreadable: as of ``read_usage``.
        """
        v2 = self.version is CgroupVersion.V2
        return readings.refusals(
            self.version, self._counts(readings.REFUSAL_FILES_V2 if v2 else readings.REFUSAL_FILES_V1)
        )

    def _counts(self, names: Collection[str]) -> dict[str, bytes | None]:
        """The counters of these names, through descriptors that are kept from their first reading on."""
        if not self._counters.keys() >= set(names):
            # Of a group that is gone a file would be taken for one that this kernel does not have.
            self._check_exists()
            for name in names:
                if name not in self._counters:
                    self._counters[name] = self._open_counter(name)
        opened = {name: self._counters[name] for name in names}
        return {name: None if fd is None else _read_again(fd, name) for name, fd in opened.items()}

    def write_limits(self, limits: Limits) -> None:
        """Write the memory, cpu, pids and cpuset limits that are not None; the others are left as they are.

        Memory is written so that swap comes on top of it by not a byte. Limits that only a new container can have
        (``shm_bytes_max``, ``nofile_max``) are not looked at. Stops at the first refusal: what was written before
        it stays, so read the limits back whatever happens. Cheap: about 20 microseconds for each limit.

        Raises:
            LimitBelowUsage: memory in use does not fit into the new limit.
            CgroupUnreadable: a controller is not there, the kernel said no, or the container is gone.
        """
        v2 = self.version is CgroupVersion.V2
        if limits.memory_bytes_max is not None:
            (self._write_memory_v2 if v2 else self._write_memory_v1)(limits.memory_bytes_max)
        if limits.cpu_millis is not None:
            (self._write_cpu_v2 if v2 else self._write_cpu_v1)(limits.cpu_millis)
        if limits.pids_max is not None:
            self._write_levels("pids", "pids.max", str(limits.pids_max))
        if limits.cpuset_cpus is not None:
            self._write_levels("cpuset", "cpuset.cpus", format_cpuset(limits.cpuset_cpus))

    def kill(self) -> bool:
        """Kill everything in the container, forks in flight included, by one write.

        Returns:
            Whether the kernel took it; False on v1, which has no such file, and where the group is another user's.
        """
        group = self._groups.get(_UNIFIED)
        if self.version is not CgroupVersion.V2 or group is None:
            return False
        try:
            group.write(group.top, "cgroup.kill", "1")
        except OSError:
            return False
        return True

    def _open_groups(self) -> None:
        by_name = dict(self.paths.controllers)
        if self.paths.unified is not None:
            by_name[_UNIFIED] = self.paths.unified
        for name, path in by_name.items():
            top = next((i for i, part in enumerate(path.names) if self.container_id in part), None)
            if top is None:
                if name == _UNIFIED and self.version is CgroupVersion.HYBRID:
                    # Older runtimes leave the process in the root of the v2 tree, where there is nothing of its own.
                    continue
                raise CgroupUnreadable(
                    f"cannot use the {name} control group of process {self.pid}",
                    detail=f"{'/' + '/'.join(path.names)!r} does not carry the container's id {self.container_id}",
                )
            self._groups[name] = _Group.open(path, top=len(path.names) - 1 - top)

    def _check_not_moved(self) -> None:
        """That PID 1 is still in the groups that were opened: of a group that it left, the limits say nothing."""
        if self._read_proc("cgroup") != self._membership:
            raise CgroupUnreadable(f"cannot tell the control group of process {self.pid}", detail="it was moved")

    def _read_proc(self, name: str) -> bytes | None:
        """A file of the process that the kernel tells in one piece."""
        if self._kept_proc is None:
            return _read_at(self._proc_fd, name)
        if name not in self._kept_proc:
            self._kept_proc[name] = _open_at(self._proc_fd, name)
        return _read_again(self._kept_proc[name], name)

    def _check_exists(self) -> None:
        """That the container's groups are still there: of a group that is gone, every file is merely absent."""
        if not all(group.exists() for group in self._groups.values()):
            raise CgroupUnreadable(f"cannot read the control groups of process {self.pid}", detail=GONE)

    def _group(self, controller: str) -> _Group | None:
        return self._groups.get(_UNIFIED if self.version is CgroupVersion.V2 else controller)

    def _levels(self, controller: str, name: str) -> list[bytes | None]:
        """One file at every level, leaf first."""
        group = self._group(controller)
        if group is None:
            return []
        return [group.read(level, name) for level in range(group.depth + 1)]

    def _open_counter(self, name: str) -> int | None:
        if name in readings.PRESSURE_FILES or self.version is CgroupVersion.V2:
            controller = _UNIFIED
        else:
            controller = readings.COUNTER_FILES_V1[name]
        group = self._groups.get(controller)
        if group is None:
            return None
        return group.open_file(0 if name.endswith(LEAF) else group.top, name.removesuffix(LEAF))

    def _write_levels(self, controller: str, name: str, text: str) -> None:
        """Write the top group, and every group below it that has a limit of its own."""
        group = self._required(controller, name)
        self._write(group, group.top, name, text)
        for level in range(group.top - 1, -1, -1):
            present = group.read(level, name)
            if present is not None and present.strip() not in {b"", b"max"} and not present.startswith(b"max "):
                self._write(group, level, name, text)

    def _write_memory_v2(self, memory_bytes_max: int) -> None:
        group = self._required("memory", "memory.max")
        # The kernel takes any figure here and makes room by killing: so look first. File cache can be dropped; what
        # lies on a tmpfs cannot, and is not on the two lists of files.
        stat = group.read(group.top, "memory.stat")
        lists = [readings.parse_field(stat, key, "memory.stat") for key in (b"active_file", b"inactive_file")]
        in_use = readings.working_set(
            readings.parse_count(group.read(group.top, "memory.current"), "memory.current"),
            sum(size for size in lists if size is not None),
        )
        if in_use is not None and in_use > memory_bytes_max:
            raise _below_usage(memory_bytes_max)
        if group.read(group.top, "memory.swap.max") is not None:
            self._write_levels("memory", "memory.swap.max", "0")
        self._write_levels("memory", "memory.max", str(memory_bytes_max))

    def _write_memory_v1(self, memory_bytes_max: int) -> None:
        names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        group = self._required("memory", names[0])
        total = readings.parse_limit_v1(group.read(group.top, names[1]), names[1])
        if total is None:
            del names[1]
        elif memory_bytes_max > total:
            # The sum may never be below the part: raise it first, lower it last.
            names.reverse()
        for name in names:
            self._write_levels("memory", name, str(memory_bytes_max))

    def _write_cpu_v2(self, cpu_millis: int) -> None:
        self._write_levels("cpu", "cpu.max", f"{_quota_us(cpu_millis)} {CPU_PERIOD_US}")

    def _write_cpu_v1(self, cpu_millis: int) -> None:
        group = self._required("cpu", "cpu.cfs_quota_us")
        period = readings.parse_count(group.read(group.top, "cpu.cfs_period_us"), "cpu.cfs_period_us")
        if period != CPU_PERIOD_US:
            # With the old quota in place the new period could mean more than the group above has.
            self._write(group, group.top, "cpu.cfs_quota_us", "-1")
            self._write(group, group.top, "cpu.cfs_period_us", str(CPU_PERIOD_US))
        self._write(group, group.top, "cpu.cfs_quota_us", str(_quota_us(cpu_millis)))

    def _required(self, controller: str, name: str) -> _Group:
        group = self._group(controller)
        if group is None or not group.has(group.top, name):
            self._check_exists()
            raise CgroupUnreadable(
                f"cannot write {name}", detail=f"the {controller} controller is not enabled for this container"
            )
        return group

    def _write(self, group: _Group, level: int, name: str, text: str) -> None:
        try:
            group.write(level, name, text)
        except OSError as error:
            if error.errno == errno.EBUSY and name.startswith("memory."):
                raise _below_usage(int(text)) from error
            raise _failure(f"cannot write {text} to {name}", error) from error


class _Group:
    """One hierarchy's leaf group, kept open, and the levels above it: 0 is the leaf, ``depth`` the mount's root."""

    def __init__(self, fd: int, *, depth: int, top: int) -> None:
        self.fd = fd
        self.depth = depth
        self.top = top
        self._kept: dict[tuple[int, str], int | None] | None = None
        """By level and name; None where there is no such file: what a group has it has always."""
        self._writable: set[int] = set()
        """Those of them that can be written through."""

    @classmethod
    def open(cls, path: CgroupPath, *, top: int) -> Self:
        try:
            fd = os.open(path.directory, _DIRECTORY)
        except OSError as error:
            raise _failure(f"cannot open the control group {path.directory}", error) from error
        try:
            _check_device(os.fstat(fd), path)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, depth=len(path.names), top=top)

    def exists(self) -> bool:
        """Whether the group is still there: every group has this file, and a removed one has none."""
        return os.access("cgroup.procs", os.F_OK, dir_fd=self.fd)

    def open_file(self, level: int, name: str) -> int | None:
        """A descriptor for reading, or None where there is no such file."""
        try:
            return os.open("../" * level + name, _READ, dir_fd=self.fd)
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise _failure(f"cannot open {name}", error) from error

    def keep_open(self) -> None:
        if self._kept is None:
            self._kept = {}

    def let_go(self) -> None:
        kept, self._kept = self._kept, None
        self._writable.clear()
        for fd in (kept or {}).values():
            if fd is not None:
                os.close(fd)

    def read(self, level: int, name: str) -> bytes | None:
        """The whole file, or None where there is none."""
        if self._kept is not None:
            if (level, name) not in self._kept:
                self._kept[level, name] = self._open_to_keep(level, name)
            kept = self._kept[level, name]
            return None if kept is None else _read_again(kept, name)
        fd = self.open_file(level, name)
        if fd is None:
            return None
        try:
            return _read_again(fd, name)
        finally:
            os.close(fd)

    def has(self, level: int, name: str) -> bool:
        """Whether there is such a file."""
        if self._kept is not None and (level, name) in self._kept:
            return self._kept[level, name] is not None
        return self.read(level, name) is not None

    def _open_to_keep(self, level: int, name: str) -> int | None:
        """For writing too, where it is the container's own and ours to change."""
        if level <= self.top:
            with contextlib.suppress(OSError):
                fd = os.open("../" * level + name, _READ_WRITE, dir_fd=self.fd)
                self._writable.add(fd)
                return fd
        return self.open_file(level, name)

    def write(self, level: int, name: str, text: str) -> None:
        """One write. OSError is the caller's to translate."""
        kept = None if self._kept is None else self._kept.get((level, name))
        if kept in self._writable:
            os.pwrite(kept, text.encode("ascii"), 0)
            return
        fd = os.open("../" * level + name, _WRITE, dir_fd=self.fd)
        try:
            os.write(fd, text.encode("ascii"))
        finally:
            os.close(fd)


def _with_mounts(effective: EffectiveLimits, mountinfo: bytes) -> EffectiveLimits:
    return effective.with_tmpfs(readings.parse_tmpfs_sizes(mountinfo) or {})


def _quota_us(cpu_millis: int) -> int:
    return cpu_millis * CPU_PERIOD_US // CPU_MILLIS_PER_CPU


def _below_usage(memory_bytes_max: int) -> LimitBelowUsage:
    return LimitBelowUsage(
        f"cannot lower the memory limit to {format_bytes(memory_bytes_max)}",
        detail="the sandbox uses more than that",
        hint="end what runs in it, or give a larger limit",
    )


def _located(membership: bytes, proc: str) -> CgroupPaths:
    return readings.cgroup_paths(membership, _own_mounts(proc))


def _own_mounts(proc: str) -> bytes:
    if proc != PROC:
        return _read_path(f"{proc}/self/mountinfo", bytes_max=TABLE_BYTES_MAX)
    try:
        return mounttable.text()
    except OSError as error:
        raise _failure(f"cannot read {mounttable.PATH}", error) from error


def _all_paths(paths: CgroupPaths) -> Iterator[CgroupPath]:
    yield from paths.controllers.values()
    if paths.unified is not None:
        yield paths.unified


def _check_not_hidden(path: CgroupPath) -> None:
    try:
        _check_device(os.stat(path.directory), path)
    except OSError as error:
        raise _failure(f"cannot read the control group {path.directory}", error) from error


def _check_device(status: os.stat_result, path: CgroupPath) -> None:
    """That the directory is on the mount that was meant, and not on one that hides it."""
    if (os.major(status.st_dev), os.minor(status.st_dev)) != path.device:
        raise CgroupUnreadable(f"cannot use the control group {path.directory}", detail="another mount hides it")


def _read_path(path: str, *, bytes_max: int = FILE_BYTES_MAX) -> bytes:
    return _read_at(None, path, bytes_max=bytes_max)


def _read_at(dir_fd: int | None, name: str, *, bytes_max: int = FILE_BYTES_MAX) -> bytes:
    """A whole file of /proc, which may take several reads."""
    fd = _open_at(dir_fd, name)
    try:
        try:
            chunks: list[bytes] = []
            size = 0
            while chunk := os.read(fd, FILE_BYTES_MAX):
                chunks.append(chunk)
                size += len(chunk)
                if size > bytes_max:
                    raise CgroupUnreadable(f"cannot read {name}", detail=f"longer than {bytes_max} bytes")
        finally:
            os.close(fd)
    except OSError as error:
        raise _failure(f"cannot read {name}", error) from error
    return b"".join(chunks)


def _open_at(dir_fd: int | None, name: str) -> int:
    try:
        return os.open(name, _READ, dir_fd=dir_fd)
    except OSError as error:
        raise _failure(f"cannot read {name}", error) from error


def _read_again(fd: int, name: str) -> bytes | None:
    """The file from its start, which the kernel makes anew for each such read; None where it has nothing to say."""
    try:
        raw = os.pread(fd, FILE_BYTES_MAX, 0)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise _failure(f"cannot read {name}", error) from error
    if len(raw) == FILE_BYTES_MAX:
        raise CgroupUnreadable(f"cannot read {name}", detail=f"{FILE_BYTES_MAX} bytes or longer")
    return raw


def _failure(brief: str, error: OSError) -> CgroupUnreadable:
    detail = error.strerror or str(error)
    if error.errno in _GONE or error.errno == errno.ENOENT:
        return CgroupUnreadable(brief, detail=f"{GONE} ({detail})")
    if error.errno in _FORBIDDEN:
        return CgroupUnreadable(brief, detail=f"this control group is not ours to change ({detail})")
    return CgroupUnreadable(brief, detail=detail)
