"""Control groups found, read and written, over copies of what real hosts show.

Four hosts: ``v1`` (nested below another container, swap not counted), ``hybrid`` (v1 controllers and a v2 tree),
``v2_rootless`` (Podman, crun, systemd, an older kernel, no cpuset) and ``v2_docker`` (a tighter slice above).
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest

from runtimes.cgroup import fs
from runtimes.cgroup.fs import CgroupHandle, LimitBelowUsage, read_fixed_limits
from runtimes.cgroup.readings import EffectiveLimits, OwnLimits, Pressure, Usage
from runtimes.errors import CgroupUnreadable
from runtimes.model import CgroupVersion, Limits

TREES = Path(__file__).parent / "cgroup_trees"
CONTAINER_ID = "c0ffee01234567890123456789012345678901234567890123456789abcdef01"
PID = 4242
MIB = 1024**2
TMPFS = {"/tmp": 8 * MIB, "/dev": 64 * MIB, "/dev/shm": 16 * MIB}
SOME = Pressure(some_avg10_percent=1.5, some_total_us=14382)
FULL = Pressure(some_avg10_percent=1.5, some_total_us=14382, full_avg10_percent=0.0, full_total_us=2847)


class Host:
    """A copy of one tree, with mounts that name the place that it was copied to."""

    def __init__(self, name: str, directory: Path) -> None:
        shutil.copytree(TREES / name, directory)
        self.directory = directory
        self.proc = str(directory / "proc")
        device = directory.stat().st_dev
        mountinfo = directory / "proc/self/mountinfo"
        text = mountinfo.read_text().replace("@TREE@", str(directory))
        mountinfo.write_text(text.replace("@DEVICE@", f"{os.major(device)}:{os.minor(device)}"))

    def open(self) -> CgroupHandle:
        return CgroupHandle.open(PID, CONTAINER_ID, proc=self.proc)

    def find(self, name: str, *, below: str = CONTAINER_ID) -> Path:
        """The file of that name in the topmost group whose path has ``below`` in it."""
        return min((path for path in self.directory.rglob(name) if below in str(path)), key=lambda p: len(p.parts))


@pytest.fixture
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return Host(request.param, tmp_path / "host")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every write to a control group, in order: the group's distance from the leaf and file, and the text."""
    writes: list[tuple[str, str]] = []

    def write(group: fs._Group, level: int, name: str, text: str) -> None:
        fd = os.open("../" * level + name, os.O_WRONLY | os.O_TRUNC, dir_fd=group.fd)
        with open(fd, "w") as file:
            file.write(text + "\n")
        writes.append(("../" * level + name, text))

    monkeypatch.setattr(fs._Group, "write", write)
    return writes


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("host", names, indirect=True)


every_host = on("v1", "hybrid", "v2_rootless", "v2_docker")


@every_host
def test_the_version_is_what_the_mounts_say(host: Host, request: pytest.FixtureRequest) -> None:
    expected = {"v1": CgroupVersion.V1, "hybrid": CgroupVersion.HYBRID}
    with host.open() as handle:
        assert handle.version is expected.get(request.node.callspec.params["host"], CgroupVersion.V2)


@on("v1")
def test_limits_on_v1_without_swap_accounting(host: Host) -> None:
    with host.open() as handle:
        assert handle.read_limits() == EffectiveLimits(
            memory_bytes_max=64 * MIB,
            memory_swap_bytes_max=None,
            cpu_millis=500,
            pids_max=50,
            cpuset_cpus=(0, 1),
            shm_bytes_max=16 * MIB,
            nofile_soft_max=512,
            nofile_max=512,
            tmpfs_bytes_max=TMPFS,
            own=OwnLimits(
                memory_bytes_max=64 * MIB, cpu_quota_us=50000, cpu_period_us=100000, pids_max=50, cpuset_cpus=(0, 1)
            ),
        )


@on("hybrid")
def test_limits_on_a_hybrid_host_are_those_of_v1(host: Host) -> None:
    with host.open() as handle:
        limits = handle.read_limits()
    assert (limits.memory_bytes_max, limits.memory_swap_bytes_max) == (64 * MIB, 64 * MIB)
    assert (limits.cpu_millis, limits.own.cpu_period_us) == (500, 50000)
    assert (limits.pids_max, limits.cpuset_cpus) == (50, (0,))


@on("v2_rootless")
def test_limits_of_the_scope_count_where_the_process_is_in_a_group_below(host: Host) -> None:
    """The scope is crun's: it puts the processes into ``container``, which has no limit of its own."""
    with host.open() as handle:
        limits = handle.read_limits()
    assert limits.memory_bytes_max == limits.own.memory_bytes_max == 64 * MIB
    assert limits.memory_swap_bytes_max == 128 * MIB, "64 MiB of swap come on top"
    assert (limits.cpu_millis, limits.pids_max) == (500, 50)
    assert limits.cpuset_cpus is None, "not delegated is unknown"


@on("v2_docker")
def test_a_tighter_group_above_is_what_is_effective(host: Host) -> None:
    with host.open() as handle:
        limits = handle.read_limits()
    assert (limits.memory_bytes_max, limits.own.memory_bytes_max) == (48 * MIB, 64 * MIB)
    assert limits.memory_swap_bytes_max == 48 * MIB
    assert (limits.pids_max, limits.own.pids_max) == (40, 50)
    assert (limits.cpuset_cpus, limits.own.cpuset_cpus) == ((0, 1), (0, 1, 2))
    assert limits.cpu_millis == 1500


@on("v2_docker")
def test_sizes_of_tmpfs_are_left_out_on_request(host: Host) -> None:
    """Somebody who is inside anyway can tell them for less."""
    with host.open() as handle:
        limits, whole = handle.read_limits(tmpfs=False), handle.read_limits()
    assert (limits.shm_bytes_max, limits.tmpfs_bytes_max) == (None, {})
    assert limits.with_tmpfs(TMPFS) == whole


@on("v1")
def test_usage_on_v1(host: Host) -> None:
    """No pids.peak on this kernel, and no pressure without a v2 tree: unknown, not zero."""
    with host.open() as handle:
        assert handle.read_usage() == Usage(
            cpu_us=28934,
            memory_bytes=2342912,
            memory_bytes_peak=4087808,
            memory_working_set_bytes=2342912 - 1982464,
            memory_refused=0,
            pids=3,
            pids_refused=4,
            throttled_periods=7,
            throttled_us=1234,
            oom_kills=2,
        )


@on("hybrid")
def test_usage_on_a_hybrid_host_takes_pressure_from_the_v2_tree(host: Host) -> None:
    with host.open() as handle:
        usage = handle.read_usage()
        assert (usage.cpu_us, usage.pids_peak, usage.memory_refused) == (22571, 7, 9)
        assert usage.cpu_pressure == usage.memory_pressure == usage.io_pressure == FULL
        assert handle.read_usage(pressure=False).cpu_pressure is None


@on("v2_rootless")
def test_usage_is_that_of_the_whole_scope(host: Host) -> None:
    """The older kernel counts a refused fork where it was tried, below the scope, and has no memory.peak."""
    with host.open() as handle:
        assert handle.read_usage() == Usage(
            cpu_us=28934,
            memory_bytes=3000000,
            memory_working_set_bytes=1100000,
            memory_refused=12,
            pids=3,
            pids_refused=3,
            throttled_periods=7,
            throttled_us=1234,
            oom_kills=1,
            ooms_own=1,
            cpu_pressure=SOME,
            memory_pressure=FULL,
            io_pressure=FULL,
        )


@on("v2_docker")
def test_pressure_accounting_that_is_switched_off_is_unknown(host: Host) -> None:
    with host.open() as handle:
        usage = handle.read_usage()
    assert (usage.memory_bytes_peak, usage.pids_peak, usage.pids_refused) == (5000000, 9, 5)
    assert usage.cpu_pressure is None


@every_host
def test_a_reading_sees_what_changed_since_the_last(host: Host) -> None:
    with host.open() as handle:
        handle.read_usage()
        host.find("pids.current").write_text("7\n")
        assert handle.read_usage().pids == 7


@every_host
def test_files_that_are_kept_open_are_read_anew_each_time(host: Host) -> None:
    """A claim reads its limits back through them: what was written since must be seen, and nothing else but that."""
    with host.open() as handle:
        before = handle.read_limits()
        handle.keep_open()
        assert handle.read_limits() == before
        host.find("pids.max").write_text("7\n")
        assert handle.read_limits().pids_max == 7
        shutil.rmtree(host.directory / "fs")
        with pytest.raises(CgroupUnreadable, match="the container is gone"):
            handle.read_limits()


@every_host
def test_files_are_kept_open_until_they_are_let_go(host: Host) -> None:
    with host.open() as handle:
        handle.read_limits()
        before = os.listdir("/proc/self/fd")
        handle.keep_open()
        handle.read_limits()
        kept = os.listdir("/proc/self/fd")
        assert len(kept) > len(before)
        handle.read_limits()
        assert os.listdir("/proc/self/fd") == kept
        handle.let_go()
        handle.let_go()
        assert os.listdir("/proc/self/fd") == before


@every_host
def test_a_claim_of_a_slot_whose_files_are_kept_opens_none(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the sizes of tmpfs, which the mounter tells, all is written and read through what is open."""
    with host.open() as handle:
        handle.keep_open()
        assert handle.read_limits().tmpfs_bytes_max == TMPFS
        opened: list[str] = []
        monkeypatch.setattr(fs.os, "open", lambda path, *_, **__: opened.append(path))
        handle.write_limits(Limits(pids_max=60))
        limits = handle.read_limits(tmpfs=False)
        monkeypatch.undo()
        assert opened == []
        assert limits.own.pids_max == 60
        assert limits.nofile_max is not None
    assert host.find("pids.max").read_text() == "60\n"


@every_host
def test_a_process_that_moves_while_its_files_are_kept_is_found_out(host: Host) -> None:
    with host.open() as handle:
        handle.keep_open()
        handle.read_limits()
        membership = host.directory / f"proc/{PID}/cgroup"
        membership.write_text(membership.read_text().replace(CONTAINER_ID, "d" * 64))
        with pytest.raises(CgroupUnreadable, match="it was moved"):
            handle.read_limits()


@on("hybrid")
def test_v1_raises_the_sum_before_the_memory(host: Host, written: list[tuple[str, str]]) -> None:
    with host.open() as handle:
        handle.write_limits(Limits(memory_bytes_max=128 * MIB))
        assert [name for name, _ in written] == ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]
        assert handle.read_limits().memory_swap_bytes_max == 128 * MIB


@on("hybrid")
def test_v1_lowers_the_sum_after_the_memory(host: Host, written: list[tuple[str, str]]) -> None:
    with host.open() as handle:
        handle.write_limits(Limits(memory_bytes_max=32 * MIB))
        assert [name for name, _ in written] == ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        assert handle.read_limits().memory_bytes_max == 32 * MIB


@on("v1")
def test_v1_without_swap_accounting_writes_the_memory_alone(host: Host, written: list[tuple[str, str]]) -> None:
    with host.open() as handle:
        handle.write_limits(Limits(memory_bytes_max=32 * MIB))
    assert written == [("memory.limit_in_bytes", str(32 * MIB))]


@on("hybrid")
def test_v1_takes_the_quota_away_while_the_period_changes(host: Host, written: list[tuple[str, str]]) -> None:
    with host.open() as handle:
        handle.write_limits(Limits(cpu_millis=250))
        assert written == [
            ("cpu.cfs_quota_us", "-1"), ("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "25000"),
        ]  # fmt: skip
        assert handle.read_limits().cpu_millis == 250


@on("v2_rootless")
def test_v2_writes_to_the_scope_and_gives_no_swap(host: Host, written: list[tuple[str, str]]) -> None:
    """The group below has no limits of its own and is left without."""
    with host.open() as handle:
        handle.write_limits(Limits(memory_bytes_max=32 * MIB, cpu_millis=1500, pids_max=20))
        limits = handle.read_limits()
    assert written == [
        ("../memory.swap.max", "0"),
        ("../memory.max", str(32 * MIB)),
        ("../cpu.max", "150000 100000"),
        ("../pids.max", "20"),
    ]
    assert limits.memory_swap_bytes_max == limits.memory_bytes_max == 32 * MIB


@on("v2_rootless")
def test_a_group_below_with_a_limit_of_its_own_is_written_too(host: Host, written: list[tuple[str, str]]) -> None:
    host.find("pids.max", below=f"{CONTAINER_ID}.scope/container").write_text("50\n")
    with host.open() as handle:
        handle.write_limits(Limits(pids_max=60))
        assert written == [("../pids.max", "60"), ("pids.max", "60")]
        assert handle.read_limits().pids_max == 60


@on("v2_docker")
def test_a_cpuset_is_written_in_the_kernels_form(host: Host, written: list[tuple[str, str]]) -> None:
    with host.open() as handle:
        handle.write_limits(Limits(cpuset_cpus=(0, 1, 2, 4)))
    assert written == [("cpuset.cpus", "0-2,4")]


@on("v2_docker")
def test_v2_memory_in_use_is_not_killed_for_a_lower_limit(host: Host, written: list[tuple[str, str]]) -> None:
    """v2 takes any figure and makes room by killing; v1 says EBUSY. Both are to end in the same refusal."""
    host.find("memory.current").write_text(str(40 * MIB))
    with host.open() as handle, pytest.raises(LimitBelowUsage, match=r"cannot lower the memory limit to 32 MiB"):
        handle.write_limits(Limits(memory_bytes_max=32 * MIB))
    assert written == []


@on("v2_docker")
def test_v2_file_cache_is_no_reason_to_refuse_and_a_full_tmpfs_is(host: Host, written: list[tuple[str, str]]) -> None:
    """The kernel drops the one for a lower limit and would kill for the other."""
    host.find("memory.current").write_text(str(40 * MIB))
    stat = host.find("memory.stat")
    stat.write_text(f"file {30 * MIB}\nshmem 0\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\n")
    with host.open() as handle:
        handle.write_limits(Limits(memory_bytes_max=32 * MIB))
        assert ("memory.max", str(32 * MIB)) in written
        stat.write_text(f"file {30 * MIB}\nshmem {30 * MIB}\ninactive_file 0\nactive_file 0\n")
        with pytest.raises(LimitBelowUsage):
            handle.write_limits(Limits(memory_bytes_max=32 * MIB))


@on("v2_docker")
def test_nothing_is_written_for_limits_that_were_not_asked_for(host: Host, written: list[tuple[str, str]]) -> None:
    with host.open() as handle:
        handle.write_limits(Limits(shm_bytes_max=MIB, nofile_max=64))
    assert written == []


@on("v2_rootless")
def test_a_controller_that_is_not_there_is_an_error(host: Host) -> None:
    with host.open() as handle, pytest.raises(CgroupUnreadable, match="the cpuset controller is not enabled"):
        handle.write_limits(Limits(cpuset_cpus=(0,)))


@every_host
def test_a_process_of_another_container_is_refused(host: Host) -> None:
    """The pid was somebody else's by the time that it was looked at."""
    with pytest.raises(CgroupUnreadable, match="does not carry the container's id"):
        CgroupHandle.open(PID, "d" * 64, proc=host.proc)


@on("v2_docker")
@pytest.mark.parametrize("path", ["/", "/system.slice", "/../outside"])
def test_the_root_and_other_peoples_groups_are_refused(host: Host, path: str) -> None:
    (host.directory / f"proc/{PID}/cgroup").write_text(f"0::{path}\n")
    with pytest.raises(CgroupUnreadable):
        host.open()


@on("hybrid")
def test_a_hybrid_host_whose_runtime_ignores_the_v2_tree_is_read_without_it(host: Host) -> None:
    cgroup = host.directory / f"proc/{PID}/cgroup"
    lines = cgroup.read_text().splitlines()[:-1]
    cgroup.write_text("\n".join([*lines, "0::/"]) + "\n")
    with host.open() as handle:
        assert handle.read_usage().cpu_pressure is None
        assert handle.read_limits().pids_max == 50


@on("v2_docker")
def test_a_short_id_is_refused(host: Host) -> None:
    with pytest.raises(CgroupUnreadable, match="is not a full id"):
        CgroupHandle.open(PID, CONTAINER_ID[:12], proc=host.proc)


@on("v2_docker")
def test_a_mount_that_hides_the_control_groups_is_not_read(host: Host) -> None:
    mountinfo = host.directory / "proc/self/mountinfo"
    number, parent, _, rest = mountinfo.read_text().split(" ", 3)
    mountinfo.write_text(f"{number} {parent} 0:99999 {rest}")
    with pytest.raises(CgroupUnreadable, match="another mount hides it"):
        host.open()
    with pytest.raises(CgroupUnreadable, match="another mount hides it"):
        fs.locate(PID, proc=host.proc)


@every_host
def test_a_container_that_is_gone_is_an_error_and_not_a_row_of_unknowns(host: Host) -> None:
    with host.open() as handle:
        shutil.rmtree(host.directory / "fs")
        for read in (handle.read_limits, handle.read_usage, lambda: handle.write_limits(Limits(pids_max=20))):
            with pytest.raises(CgroupUnreadable, match="the container is gone"):
                read()


@every_host
def test_what_was_refused_is_that_part_of_the_usage_with_fewer_descriptors(host: Host) -> None:
    """It is read around every command, and for every command that a restart finds."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with host.open() as handle:
        before = descriptors()
        refusals = handle.read_refusals()
        assert descriptors() - before <= 3
        usage = handle.read_usage()
        assert (refusals.oom_kills, refusals.pids_refused) == (usage.oom_kills, usage.pids_refused)
        assert refusals.oom_kills is not None
        assert refusals.pids_refused is not None


@every_host
def test_every_descriptor_is_closed_and_none_is_inherited(host: Host) -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    before = descriptors()
    handle = host.open()
    handle.read_usage()
    handle.keep_open()
    handle.read_limits()
    for name in descriptors() - before:
        if os.path.exists(f"/proc/self/fd/{name}"):
            assert not os.get_inheritable(int(name))
    handle.close()
    handle.close()
    with pytest.raises(CgroupUnreadable):
        CgroupHandle.open(PID, "d" * 64, proc=host.proc)
    with pytest.raises(CgroupUnreadable):
        CgroupHandle.open(PID + 1, CONTAINER_ID, proc=host.proc)
    assert descriptors() == before


@on("v2_docker")
def test_a_file_that_has_grown_out_of_bounds_is_refused(host: Host) -> None:
    host.find("memory.stat").write_text("x" * 20000)
    with host.open() as handle, pytest.raises(CgroupUnreadable, match="16384 bytes or longer"):
        handle.read_usage()


def test_the_process_that_runs_this_can_be_located() -> None:
    """Against the real kernel: whatever this host mounts, our own group is on it."""
    paths = fs.locate(os.getpid())
    directories = [path.directory for path in paths.controllers.values()]
    directories += [paths.unified.directory] if paths.unified is not None else []
    assert directories
    assert all(os.path.isdir(directory) for directory in directories)


def test_whether_swap_is_counted_is_told_of_this_very_process() -> None:
    """Against the real kernel: it must come to an answer, or to none, and not to an error."""
    assert fs.swap_is_counted(os.getpid()) in {True, False, None}


@every_host
def test_whether_swap_is_counted_is_seen_by_the_files_that_there_are(host: Host) -> None:
    """Where it is not, a limit on memory lets a program swap without bound."""
    counted = any(host.directory.rglob("memory.*sw*"))
    assert fs.swap_is_counted(PID, proc=host.proc) is counted
    for name in ("memory.swap.max", "memory.memsw.limit_in_bytes"):
        for path in list(host.directory.rglob(name)):
            path.unlink()
    assert fs.swap_is_counted(PID, proc=host.proc) is False
    for name in ("memory.max", "memory.limit_in_bytes"):
        for path in list(host.directory.rglob(name)):
            path.unlink()
    assert fs.swap_is_counted(PID, proc=host.proc) is None


def test_limits_that_are_no_control_group_are_read_without_one() -> None:
    """Rootless on cgroup v1 a container has no group of its own; its open files are limited all the same."""
    limits = read_fixed_limits(os.getpid())
    assert limits.nofile_soft_max == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert limits.memory_bytes_max is None
    assert limits.pids_max is None


@on("v2_rootless")
def test_v2_kills_the_whole_scope_by_one_write(host: Host, written: list[tuple[str, str]]) -> None:
    """The topmost group that is the container's: nothing above it, and nothing in it is left out."""
    with host.open() as group:
        assert group.kill() is True
    assert [text for _, text in written] == ["1"]
    assert host.find("cgroup.kill").read_text() == "1\n"


@every_host
def test_a_group_that_cannot_be_killed_says_so(host: Host) -> None:
    """On v1 there is no such file; on an older v2 kernel neither: its init is killed instead."""
    for file in host.directory.rglob("cgroup.kill"):
        file.unlink()
    with host.open() as group:
        assert group.kill() is False


def test_a_container_is_frozen_only_in_a_group_of_its_own(tmp_path: Path) -> None:
    """By the group that its first process is in, and never the one that it shares with others."""
    host = Host("v2_docker", tmp_path / "host")
    membership = Path(host.proc, str(PID), "cgroup").read_text().strip().rpartition(":")[2]
    frozen = next(path for path in host.directory.rglob("*") if str(path).endswith(membership)) / "cgroup.freeze"
    frozen.write_text("0")
    assert not fs.freeze(PID, "f" * 64, proc=host.proc)
    assert frozen.read_text() == "0"
    assert fs.freeze(PID, CONTAINER_ID, proc=host.proc)
    assert frozen.read_text() == "1"
    assert not fs.freeze(PID + 1, CONTAINER_ID, proc=host.proc), "there is no such process"
