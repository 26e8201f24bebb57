"""The seccomp profile: what it allows is evaluated rule by rule, as the kernel would."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.seccomp import profile_path

REFUSED = """
    acct add_key adjtimex bpf chroot clock_adjtime clock_settime create_module delete_module fanotify_init
    finit_module fsconfig fsmount fsopen fspick get_kernel_syms get_mempolicy init_module io_uring_enter
    io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl listmount lookup_dcookie mbind
    migrate_pages modify_ldt mount mount_setattr move_mount move_pages name_to_handle_at nfsservctl open_by_handle_at
    open_tree perf_event_open pidfd_getfd pivot_root process_madvise query_module quotactl quotactl_fd reboot
    request_key set_mempolicy setdomainname sethostname setns settimeofday socketcall statmount stime swapoff swapon
    sysfs syslog umount umount2 unshare uselib userfaultfd ustat vhangup vm86 vm86old vmsplice
""".split()

NEEDED = """
    accept4 arch_prctl bind brk close_range connect copy_file_range dup3 epoll_pwait2 eventfd2 execve execveat
    exit_group faccessat2 fchmodat2 fcntl fork futex futex_waitv getdents64 getrandom inotify_add_watch io_submit
    kill landlock_create_ruleset membarrier memfd_create mmap mmap2 mprotect mremap newfstatat openat openat2
    pidfd_open pidfd_send_signal pkey_mprotect ppoll_time64 prctl prlimit64 ptrace read renameat2 rseq rt_sigaction
    rt_sigreturn sched_setaffinity seccomp sendmsg set_robust_list set_tid_address setsid sigreturn splice statx
    timerfd_create utimensat_time64 vfork wait4 waitid write
""".split()

CLONE_NEW = {
    "time": 0x80,
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
ARGUMENT = st.integers(min_value=0, max_value=2**64 - 1)


with open(profile_path(), "rb") as file:
    PROFILE: dict[str, Any] = json.load(file)


@pytest.fixture
def profile() -> dict[str, Any]:
    return PROFILE


def passes(profile: dict[str, Any], call: str, *args: int) -> bool:
    """Whether the filter lets a call through. Arguments are 64 bits wide, and those not given are 0."""
    values = [*args, *([0] * (6 - len(args)))]
    allowed = False
    for rule in profile["syscalls"]:
        if call in rule["names"] and all(holds(condition, values) for condition in rule.get("args", [])):
            if rule["action"] != "SCMP_ACT_ALLOW":
                return False
            allowed = True
    return allowed


def holds(condition: dict[str, Any], values: list[int]) -> bool:
    value = values[condition["index"]]
    match condition["op"]:
        case "SCMP_CMP_EQ":
            return value == condition["value"]
        case "SCMP_CMP_MASKED_EQ":
            return value & condition["value"] == condition["valueTwo"]
        case other:
            raise AssertionError(f"{other} can be got around with the high bits of an argument")


def test_what_no_rule_names_is_refused(profile: dict[str, Any]) -> None:
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert set(profile) == {"defaultAction", "archMap", "syscalls"}, "docker 20.10 and podman 4.3 know these"


def test_the_lists_are_sorted_and_name_nothing_twice(profile: dict[str, Any]) -> None:
    everything, *rest = profile["syscalls"]
    for rule in profile["syscalls"]:
        assert rule["names"] == sorted(set(rule["names"]))
        assert len(rule["names"]) == 1 or rule is everything
    assert [rule["names"][0] for rule in rest] == sorted(rule["names"][0] for rule in rest)
    assert not set(everything["names"]) & {rule["names"][0] for rule in rest}
    rules = [json.dumps([rule["names"], rule.get("args")]) for rule in rest]
    assert len(set(rules)) == len(rules)


def test_no_rule_looks_twice_at_one_argument(profile: dict[str, Any]) -> None:
    """Two conditions on one argument mean "or" to runc and "and" to the specification."""
    for rule in profile["syscalls"]:
        indices = [condition["index"] for condition in rule.get("args", [])]
        assert len(set(indices)) == len(indices)


def test_only_known_actions_are_used(profile: dict[str, Any]) -> None:
    odd = [rule for rule in profile["syscalls"] if rule["action"] != "SCMP_ACT_ALLOW"]
    assert [(rule["names"], rule["action"], rule["errnoRet"]) for rule in odd] == [(["clone3"], "SCMP_ACT_ERRNO", 38)]


def test_only_architectures_whose_arguments_are_where_the_rules_look(profile: dict[str, Any]) -> None:
    pairs = {entry["architecture"]: entry["subArchitectures"] for entry in profile["archMap"]}
    assert pairs == {"SCMP_ARCH_AARCH64": ["SCMP_ARCH_ARM"], "SCMP_ARCH_X86_64": ["SCMP_ARCH_X86"]}


@pytest.mark.parametrize("call", REFUSED)
def test_a_refused_call_is_in_no_rule(profile: dict[str, Any], call: str) -> None:
    assert not any(call in rule["names"] for rule in profile["syscalls"])


@pytest.mark.parametrize("call", NEEDED)
def test_a_needed_call_passes_whatever_its_arguments(profile: dict[str, Any], call: str) -> None:
    assert passes(profile, call, *[2**64 - 1] * 6)


@pytest.mark.parametrize("name", sorted(set(CLONE_NEW) - {"time"}))
def test_clone_makes_no_namespace(profile: dict[str, Any], name: str) -> None:
    assert not passes(profile, "clone", CLONE_NEW[name] | 17)
    assert not passes(profile, "clone", CLONE_NEW[name] | 1 << 40)


def test_clone_makes_threads_and_processes(profile: dict[str, Any]) -> None:
    assert passes(profile, "clone", 0x3D0F00), "pthread_create"
    assert passes(profile, "clone", 0x01200011), "fork"
    assert passes(profile, "clone", 0x4111), "vfork"


@given(ARGUMENT)
def test_every_ioctl_passes_but_the_two_that_type(request_number: int) -> None:
    """The kernel looks at 32 bits: what differs only above them is the same request."""
    expected = request_number & 0xFFFFFFFF not in {TIOCSTI, TIOCLINUX}
    assert passes(PROFILE, "ioctl", 0, request_number) is expected


@pytest.mark.parametrize("high", [0, 1, 0x80000000, 0xFFFFFFFF])
def test_of_the_terminal_requests_just_two_are_refused(profile: dict[str, Any], high: int) -> None:
    refused = [low for low in range(0x5400, 0x5480) if not passes(profile, "ioctl", 0, high << 32 | low)]
    assert refused == [TIOCSTI, TIOCLINUX]


@pytest.mark.parametrize("family", range(50))
def test_sockets_are_of_four_families(profile: dict[str, Any], family: int) -> None:
    assert passes(profile, "socket", family, 1, 0) is (family in {1, 2, 10, 16})
    assert not passes(profile, "socket", 1 << 32 | family, 1, 0)


def test_netlink_is_for_routes_only(profile: dict[str, Any]) -> None:
    assert [protocol for protocol in range(32) if passes(profile, "socket", 16, 3, protocol)] == [0]
    assert passes(profile, "socket", 2, 1, 6), "a named protocol of another family is nothing special"
    assert [family for family in range(50) if passes(profile, "socketpair", family, 1, 0)] == [1]


def test_nodes_are_files_and_fifos(profile: dict[str, Any]) -> None:
    kinds = {
        0o010000: True,
        0o100000: True,
        0: True,
        0o020000: False,
        0o060000: False,
        0o140000: False,
        0o040000: False,
    }
    for kind, expected in kinds.items():
        assert passes(profile, "mknod", 1, kind | 0o644) is expected
        assert passes(profile, "mknodat", 1, 1, kind | 0o644) is expected


def test_personalities_are_the_harmless_ones(profile: dict[str, Any]) -> None:
    for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
        assert passes(profile, "personality", value)
    for value in (0x0040000, 0x0400000, 0x0100000, 1 << 32):
        assert not passes(profile, "personality", value)
