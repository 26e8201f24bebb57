"""The kernel's files as numbers: an absent file is unknown, a malformed one is an error, and neither is ever zero."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.cgroup import readings
from runtimes.cgroup.readings import UNLIMITED, Pressure
from runtimes.errors import CgroupUnreadable
from runtimes.model import CgroupVersion


def mount(root: str, point: str, kind: str, options: str, device: str = "0:9", ids: str = "30 20") -> str:
    return f"{ids} {device} {root} {point} rw,nosuid shared:4 - {kind} {kind} {options}\n"


V2_MOUNT = mount("/", "/sys/fs/cgroup", "cgroup2", "rw")


@pytest.mark.parametrize(
    ("raw", "expected"), [(b"67108864\n", 67108864), (b"max\n", UNLIMITED), (b"0\n", 0), (None, None)]
)
def test_a_number_file(raw: bytes | None, expected: int | None) -> None:
    assert readings.parse_count(raw, "memory.max") == expected


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b"-1\n", b"1e3\n", b"1_000\n", b"0x10", b"12 13", "٣".encode(), b"9" * 40]
)
def test_what_is_no_number_is_an_error_and_not_zero(raw: bytes) -> None:
    with pytest.raises(CgroupUnreadable):
        readings.parse_count(raw, "memory.max")


def test_v1_says_unlimited_with_a_number_that_depends_on_the_page_size() -> None:
    for page in (4096, 16384, 65536):
        raw = str((2**63 - 1) // page * page).encode()
        assert readings.parse_limit_v1(raw, "memory.limit_in_bytes") == UNLIMITED
    assert readings.parse_limit_v1(b"67108864\n", "memory.limit_in_bytes") == 67108864


def test_quotas_of_both_versions() -> None:
    assert readings.parse_cpu_max(b"50000 100000\n") == (50000, 100000)
    assert readings.parse_cpu_max(b"max 100000\n") == (UNLIMITED, 100000)
    assert readings.parse_quota_v1(b"-1\n", b"100000\n") == (UNLIMITED, 100000)
    assert readings.parse_quota_v1(b"25000\n", b"50000\n") == (25000, 50000)
    assert readings.parse_quota_v1(None, b"50000\n") is None
    for raw in (b"", b"max", b"50000 0\n", b"-5 100000", b"50000 100000 1"):
        with pytest.raises(CgroupUnreadable):
            readings.parse_cpu_max(raw)


def test_a_quota_is_rounded_up_so_that_it_never_looks_tighter_than_it_is() -> None:
    assert readings.cpu_millis_of((50000, 100000)) == 500
    assert readings.cpu_millis_of((33333, 100000)) == 334
    assert readings.cpu_millis_of((UNLIMITED, 100000)) == UNLIMITED


def test_a_field_is_found_by_its_whole_name() -> None:
    """``oom`` is not ``oom_kill``, and ``inactive_file`` is not ``total_inactive_file``."""
    raw = b"low 0\noom 5\noom_kill 2\ntotal_inactive_file 7\ninactive_file 8\n"
    assert readings.parse_field(raw, b"oom", "x") == 5
    assert readings.parse_field(raw, b"oom_kill", "x") == 2
    assert readings.parse_field(raw, b"inactive_file", "x") == 8
    assert readings.parse_field(raw, b"low", "x") == 0
    assert readings.parse_field(raw, b"ow", "x") is None
    assert readings.parse_field(None, b"oom", "x") is None
    assert readings.parse_field(b"max 4", b"max", "x") == 4


def test_pressure_with_and_without_the_line_for_all() -> None:
    some = b"some avg10=1.50 avg60=0.20 avg300=0.00 total=14382\n"
    full = b"full avg10=0.05 avg60=0.00 avg300=0.00 total=2847\n"
    assert readings.parse_pressure(some, "cpu.pressure") == Pressure(some_avg10_percent=1.5, some_total_us=14382)
    both = readings.parse_pressure(some + full, "io.pressure")
    assert both is not None
    assert (both.full_avg10_percent, both.full_total_us) == (0.05, 2847)
    assert readings.parse_pressure(b"", "io.pressure") is None, "accounting is switched off"
    with pytest.raises(CgroupUnreadable):
        readings.parse_pressure(full, "io.pressure")


def test_of_two_mounts_at_one_place_the_one_on_top_counts() -> None:
    """Whatever their order: since Linux 6.8 they are told by number, and what was made aside has a lower one."""
    text = (
        mount("/", "/tmp", "tmpfs", "rw,size=1g,mode=1777", ids="31 40")
        + mount("/", "/tmp", "tmpfs", "rw,size=8192k", ids="40 20")
        + mount("/", "/run", "tmpfs", "rw,size=64k", ids="41 20")
        + mount("/", "/run", "ext4", "rw", ids="42 41")
        + mount("/null", "/proc/keys", "tmpfs", "rw,size=65536k", ids="43 20")
        + mount("/", "/a\\040b", "tmpfs", "rw", ids="44 44")
    )
    assert readings.parse_tmpfs_sizes(text.encode()) == {"/tmp": 1024**3, "/a b": UNLIMITED}


def test_open_files_are_told_by_soft_and_hard_limit() -> None:
    raw = b"Limit   Soft Limit  Hard Limit  Units\nMax open files     512        unlimited     files     \n"
    assert readings.parse_nofile(raw) == (512, UNLIMITED)
    with pytest.raises(CgroupUnreadable):
        readings.parse_nofile(b"Max processes 1 2 processes\n")


def test_a_v2_group_below_the_root_of_its_mount() -> None:
    paths = readings.cgroup_paths(b"0::/user.slice/a.scope\n", V2_MOUNT.encode())
    assert paths.version is CgroupVersion.V2
    assert paths.unified is not None
    assert paths.unified.directory == "/sys/fs/cgroup/user.slice/a.scope"
    assert paths.unified.names == ("user.slice", "a.scope")


def test_a_v2_tree_alone_in_a_container_of_a_hybrid_host() -> None:
    """The kernel tells of the v1 hierarchies as well, but none of them is mounted here."""
    raw = b"9:name=systemd:/\n8:pids:/\n4:memory:/\n1:cpu:/\n0::/user.slice/run-p183-i1626548.service\n"
    paths = readings.cgroup_paths(raw, V2_MOUNT.encode())
    assert paths.version is CgroupVersion.V2
    assert paths.controllers == {}
    assert paths.unified is not None
    assert paths.unified.names == ("user.slice", "run-p183-i1626548.service")


def test_a_mount_that_shows_only_a_part_of_the_hierarchy() -> None:
    """Inside a container the mount's root is the container's own group, and /proc tells paths from the top."""
    text = mount("/docker/outer", "/sys/fs/cgroup/memory", "cgroup", "rw,memory")
    paths = readings.cgroup_paths(b"4:memory:/docker/outer/inner\n", text.encode())
    assert paths.version is CgroupVersion.V1
    assert paths.controllers["memory"].directory == "/sys/fs/cgroup/memory/inner"


def test_groups_above_the_namespace_are_matched_by_their_dots() -> None:
    """Root and path both begin with ``/..`` where the mount is older than the reader's cgroup namespace."""
    text = mount("/../..", "/sys/fs/cgroup", "cgroup2", "rw")
    paths = readings.cgroup_paths(b"0::/../../other/x\n", text.encode())
    assert paths.unified is not None
    assert paths.unified.directory == "/sys/fs/cgroup/other/x"


@pytest.mark.parametrize(
    ("path", "root"), [("/../sibling", "/"), ("/a", "/.."), ("/docker/other", "/docker/outer"), ("/ab", "/a")]
)
def test_a_group_that_no_mount_shows_is_an_error_and_never_some_other_group(path: str, root: str) -> None:
    text = mount(root, "/sys/fs/cgroup", "cgroup2", "rw")
    with pytest.raises(CgroupUnreadable):
        readings.cgroup_paths(f"0::{path}\n".encode(), text.encode())


def test_controllers_that_share_one_hierarchy_and_an_empty_v2_tree() -> None:
    text = mount("/", "/c/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct") + mount("/", "/c/unified", "cgroup2", "rw")
    paths = readings.cgroup_paths(b"3:cpu,cpuacct:/x\n1:name=systemd:/\n0::/y\n", text.encode())
    assert paths.version is CgroupVersion.HYBRID
    assert paths.controllers["cpuacct"].directory == "/c/cpu,cpuacct/x"
    assert paths.unified is not None
    assert paths.unified.directory == "/c/unified/y"


def test_the_nearest_limit_is_not_always_the_tightest() -> None:
    levels = [UNLIMITED, 100, 40, None]
    assert readings.nearest(levels) == 100
    assert readings.tightest(levels) == 40
    assert readings.nearest([UNLIMITED, None]) == UNLIMITED
    assert readings.nearest([None]) is None
    assert readings.tightest([]) is None


LINES = st.lists(st.sampled_from(["0::/a", "4:memory:/a", "1:x", "", ":::", "0::../a", "4:memory:/../a", "٣::/a"]))
BYTES = st.one_of(
    st.binary(max_size=300),
    st.text(alphabet="0123456789max .-+eE_\n=:/\\some full avg10 tmpfs size=kmg rw", max_size=200).map(str.encode),
)
PARSERS: list[Callable[[bytes], object]] = [
    lambda raw: readings.parse_count(raw, "x"),
    lambda raw: readings.parse_limit_v1(raw, "x"),
    lambda raw: readings.parse_quota_v1(raw, raw),
    readings.parse_cpu_max,
    lambda raw: readings.parse_cpuset(raw, "x"),
    lambda raw: readings.parse_field(raw, b"max", "x"),
    lambda raw: readings.parse_pressure(raw, "x"),
    readings.parse_nofile,
    readings.parse_tmpfs_sizes,
    lambda raw: readings.cgroup_paths(raw, V2_MOUNT.encode()),
    lambda raw: readings.cgroup_paths(b"0::/a\n", raw),
]


@given(BYTES)
def test_no_bytes_raise_anything_but_cgroup_unreadable(raw: bytes) -> None:
    for parse in PARSERS:
        with contextlib.suppress(CgroupUnreadable):
            parse(raw)


@given(LINES, st.text(max_size=20), st.text(max_size=20))
def test_no_lines_raise_anything_but_cgroup_unreadable(lines: list[str], root: str, options: str) -> None:
    cgroup = "\n".join(lines).encode("utf-8", "surrogatepass")
    mountinfo = mount(root, "/c", "cgroup", f"rw,memory,{options}").encode("utf-8", "surrogatepass")
    for parse in (
        lambda: readings.cgroup_paths(cgroup, mountinfo),
        lambda: readings.parse_tmpfs_sizes(mountinfo),
    ):
        with contextlib.suppress(CgroupUnreadable):
            parse()


def test_a_table_without_end_is_refused() -> None:
    with pytest.raises(CgroupUnreadable, match="longer than"):
        readings.parse_tmpfs_sizes(b"x" * (readings.TABLE_BYTES_MAX + 1))
