"""What the kernel says of a process's limits and of its control group, read without any code of the product."""

from __future__ import annotations

import os
from typing import NamedTuple


class Held(NamedTuple):
    """The limits that a sandbox's first process is held to."""

    memory: int
    memory_and_swap: int | None
    """None: the kernel does not count swap by group."""
    cpu_millis: int
    pids: int
    cpuset: str
    nofile: tuple[str, str]
    shm: int
    tmp: int
    home: int


def held(pid: int) -> Held:
    memory, swap = _memory(pid)
    return Held(
        memory=memory,
        memory_and_swap=swap,
        cpu_millis=_cpu_millis(pid),
        pids=int(read(pid, "pids", "pids.max", "pids.max")),
        cpuset=read(pid, "cpuset", "cpuset.cpus", "cpuset.cpus"),
        nofile=_nofile(pid),
        shm=_size(pid, "/dev/shm"),
        tmp=_size(pid, "/tmp"),
        home=_size(pid, "/home/sandbox"),
    )


def read(pid: int, controller: str, v1: str, v2: str) -> str:
    """A file of the control group that a process is in."""
    directory, version = group_of(pid, controller)
    with open(os.path.join(directory, v1 if version == 1 else v2), encoding="ascii") as file:
        return file.read().strip()


def processes(pid: int) -> list[int]:
    """All processes in the control group of this one, in ascending order; none when it is gone."""
    try:
        return sorted(int(line) for line in read(pid, "pids", "cgroup.procs", "cgroup.procs").split())
    except FileNotFoundError:
        return []


def counters(pid: int, controller: str, v1: str, v2: str) -> dict[str, int]:
    """A file of ``name number`` lines."""
    pairs = (line.split() for line in read(pid, controller, v1, v2).splitlines())
    return {name: int(number) for name, number in pairs}


def group_of(pid: int, controller: str) -> tuple[str, int]:
    """The directory of a process's group for a controller, and whether it is v1 or v2."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split(":", 2) for line in file]
    for _, controllers, path in rows:
        if controller in controllers.split(","):
            return _below(_mount("cgroup", controller), path), 1
    (path,) = (path for number, _, path in rows if number == "0")
    return _below(_mount("cgroup2", ""), path), 2


def _mount(kind: str, option: str) -> tuple[str, str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fields, (found, _, options) = before.split(), after.split()
            if found == kind and (not option or option in options.split(",")):
                return fields[3], fields[4]
    raise AssertionError(f"no {kind} {option} is mounted")


def _below(mount: tuple[str, str], path: str) -> str:
    root, target = mount
    return target + "/" + os.path.relpath(path, root)


def _memory(pid: int) -> tuple[int, int | None]:
    version = group_of(pid, "memory")[1]
    memory = int(read(pid, "memory", "memory.limit_in_bytes", "memory.max"))
    try:
        swap = read(pid, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max")
    except FileNotFoundError:
        return memory, None
    return memory, int(swap) if version == 1 else memory + int(swap)


def _cpu_millis(pid: int) -> int:
    if group_of(pid, "cpu")[1] == 1:
        quota = read(pid, "cpu", "cpu.cfs_quota_us", "")
        period = read(pid, "cpu", "cpu.cfs_period_us", "")
    else:
        quota, period = read(pid, "cpu", "", "cpu.max").split()
    return int(quota) * 1000 // int(period)


def _nofile(pid: int) -> tuple[str, str]:
    with open(f"/proc/{pid}/limits", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("Max open files"))
    soft, hard = line.split()[3:5]
    return soft, hard


def _size(pid: int, path: str) -> int:
    status = os.statvfs(f"/proc/{pid}/root{path}")
    return status.f_blocks * status.f_frsize
