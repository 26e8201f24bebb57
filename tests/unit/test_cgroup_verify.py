"""Proofs of limits: what was read from the kernel decides, and the reason is said in words."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.cgroup.readings import UNLIMITED, EffectiveLimits, OwnLimits
from runtimes.cgroup.verify import DELEGATE_HINT, LimitProof, boot_with, enforceable, verify
from runtimes.model import Capabilities, CgroupVersion, EngineInfo, EngineName, Limits

MIB = 1024**2


def effective(**changes: object) -> EffectiveLimits:
    """What is in force for the limits of ``ALL``; names with ``own_`` change the container's own limits."""
    own = {
        "memory_bytes_max": 64 * MIB,
        "memory_swap_bytes_max": 64 * MIB,
        "cpu_quota_us": 50000,
        "cpu_period_us": 100000,
        "pids_max": 50,
        "cpuset_cpus": (0, 1),
    }
    values: dict[str, object] = {
        "memory_bytes_max": 64 * MIB,
        "memory_swap_bytes_max": 64 * MIB,
        "cpu_millis": 500,
        "pids_max": 50,
        "cpuset_cpus": (0, 1),
        "shm_bytes_max": 16 * MIB,
        "nofile_soft_max": 512,
        "nofile_max": 512,
        "tmpfs_bytes_max": {"/tmp": 8 * MIB},
    }
    for name, value in changes.items():
        target, key = (own, name.removeprefix("own_")) if name.startswith("own_") else (values, name)
        target[key] = value
    return EffectiveLimits(own=OwnLimits(**own), **values)  # type: ignore[arg-type]


ALL = Limits(
    memory_bytes_max=64 * MIB,
    cpu_millis=500,
    pids_max=50,
    cpuset_cpus=(0, 1),
    shm_bytes_max=16 * MIB,
    nofile_max=512,
)


def proof(name: str, requested: Limits, held: EffectiveLimits, **how: object) -> LimitProof:
    proofs = verify(requested, None, held, **how)  # type: ignore[arg-type]
    return next(one for one in proofs if one.name == name)


def test_limits_that_are_as_asked_for_are_verified_without_a_word() -> None:
    proofs = verify(ALL, ALL, effective(), tmpfs={"/tmp": 8 * MIB})
    names = ["memory", "memory_swap", "cpus", "pids", "cpuset", "shm", "nofile", "tmpfs:/tmp"]
    assert [one.name for one in proofs] == names
    assert all(one.verified and not one.reason for one in proofs)


def test_what_was_not_asked_for_gets_no_proof() -> None:
    assert verify(Limits(), None, effective()) == ()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("memory", {"memory_bytes_max": None, "own_memory_bytes_max": None}),
        ("cpus", {"cpu_millis": None, "own_cpu_quota_us": None, "own_cpu_period_us": None}),
        ("pids", {"pids_max": None, "own_pids_max": None}),
        ("cpuset", {"cpuset_cpus": None}),
        ("shm", {"shm_bytes_max": None}),
        ("nofile", {"nofile_max": None, "nofile_soft_max": None}),
    ],
)
def test_what_cannot_be_read_is_not_verified(name: str, changes: dict[str, object]) -> None:
    one = proof(name, ALL, effective(**changes))
    assert not one.verified
    assert one.effective is None
    assert "cannot be read" in one.reason


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("memory", {"memory_bytes_max": UNLIMITED, "own_memory_bytes_max": UNLIMITED}, "no such limit in force"),
        ("memory", {"memory_bytes_max": 65 * MIB, "own_memory_bytes_max": 65 * MIB}, "65 MiB, looser"),
        ("cpus", {"cpu_millis": 501, "own_cpu_quota_us": 50100}, "0.501, looser"),
        ("pids", {"pids_max": 51, "own_pids_max": 51}, "51, looser"),
        ("pids", {"pids_max": UNLIMITED, "own_pids_max": UNLIMITED}, "no such limit in force"),
        ("cpuset", {"cpuset_cpus": (0, 1, 2), "own_cpuset_cpus": (0, 1, 2)}, "runs on CPUs 0-2"),
        ("shm", {"shm_bytes_max": 64 * MIB}, "looser"),
        ("nofile", {"nofile_max": 1024, "nofile_soft_max": 512}, "looser"),
        ("nofile", {"nofile_soft_max": 256}, "not the one asked for"),
    ],
)
def test_what_is_looser_is_not_verified(name: str, changes: dict[str, object], reason: str) -> None:
    one = proof(name, ALL, effective(**changes))
    assert not one.verified
    assert reason in one.reason


def test_a_write_that_did_not_take_is_found_out_even_where_it_left_less() -> None:
    """A limit raised from 32 to 64 MiB that stayed at 32 holds, and is still not what was asked for."""
    one = proof("memory", ALL, effective(memory_bytes_max=32 * MIB, own_memory_bytes_max=32 * MIB))
    assert not one.verified
    assert "not the one asked for" in one.reason


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("memory", {"memory_bytes_max": 48 * MIB}),
        ("cpus", {"cpu_millis": 250}),
        ("pids", {"pids_max": 40}),
    ],
)
def test_a_tighter_limit_above_the_container_is_said_and_does_not_spoil_the_proof(
    name: str, changes: dict[str, object]
) -> None:
    one = proof(name, ALL, effective(**changes))
    assert one.verified
    assert "a tighter limit of" in one.reason


def test_cpus_that_a_group_above_takes_away_are_said() -> None:
    one = proof("cpuset", ALL, effective(cpuset_cpus=(0,)))
    assert one.verified
    assert "only CPUs 0 of them" in one.reason


def test_the_engines_word_proves_nothing_and_is_shown_where_it_differs() -> None:
    told = Limits(memory_bytes_max=32 * MIB)
    stale = verify(ALL, told, effective())[0]
    assert stale.verified
    assert (stale.reported, stale.reason) == (32 * MIB, "holds; the engine still reports 32 MiB")
    believed = verify(ALL, ALL, effective(memory_bytes_max=UNLIMITED, own_memory_bytes_max=UNLIMITED))[0]
    assert not believed.verified


def test_memory_is_compared_as_the_kernel_rounds_it() -> None:
    odd = Limits(memory_bytes_max=64 * MIB + 4095)
    assert proof("memory", odd, effective()).verified
    assert not proof("memory", odd, effective(), page_bytes=1).verified
    assert proof("shm", Limits(shm_bytes_max=16 * MIB - 1), effective()).verified, "a tmpfs is rounded up"


def test_a_quota_for_another_period_is_the_same_limit() -> None:
    assert proof("cpus", ALL, effective(own_cpu_quota_us=25000, own_cpu_period_us=50000)).verified
    assert not proof("cpus", ALL, effective(own_cpu_quota_us=25000)).verified


@pytest.mark.parametrize(
    ("total", "swap_bytes", "verified", "reason"),
    [
        (64 * MIB, None, True, ""),
        (128 * MIB, None, False, "together are 128 MiB"),
        (128 * MIB, 0, True, "as long as the host has no swap"),
        (128 * MIB, 1, False, "together are 128 MiB"),
        (UNLIMITED, 2**30, False, "swap is not limited"),
        (None, 2**30, False, "swap accounting is off"),
        (None, None, False, "swap accounting is off"),
        (None, 0, True, "as long as the host has no swap"),
    ],
)
def test_swap_comes_on_top_of_memory_or_is_proven_not_to(
    total: int | None, swap_bytes: int | None, verified: bool, reason: str
) -> None:
    held = effective(memory_swap_bytes_max=total, own_memory_swap_bytes_max=total)
    one = proof("memory_swap", ALL, held, swap_total_bytes=swap_bytes)
    assert one.verified is verified
    assert reason in one.reason


def test_without_swap_on_the_host_the_memory_itself_must_still_hold() -> None:
    held = effective(memory_bytes_max=UNLIMITED, memory_swap_bytes_max=UNLIMITED)
    assert not proof("memory_swap", ALL, held, swap_total_bytes=0).verified


def test_a_tmpfs_without_a_size_or_without_a_mount_is_not_verified() -> None:
    for sizes in ({"/tmp": UNLIMITED}, {}):
        assert not proof("tmpfs:/tmp", Limits(), effective(tmpfs_bytes_max=sizes), tmpfs={"/tmp": 8 * MIB}).verified


NUMBER = st.one_of(st.none(), st.integers(min_value=0, max_value=2**40), st.just(UNLIMITED))


@given(
    requested=st.integers(min_value=1, max_value=2**40),
    tight=NUMBER,
    own=NUMBER,
    total=NUMBER,
    swap=st.one_of(st.none(), st.integers(min_value=0, max_value=2**40)),
)
def test_nothing_is_verified_that_is_unknown_or_looser_than_asked_for(
    requested: int, tight: int | None, own: int | None, total: int | None, swap: int | None
) -> None:
    held = EffectiveLimits(
        memory_bytes_max=tight,
        memory_swap_bytes_max=total,
        pids_max=tight,
        own=OwnLimits(memory_bytes_max=own, pids_max=own),
    )
    limits = Limits(memory_bytes_max=requested, pids_max=requested)
    for one in verify(limits, limits, held, swap_total_bytes=swap):
        if one.verified and one.name != "memory_swap":
            assert tight is not None
            assert tight <= requested
        if not one.verified:
            assert one.reason


CAN = Capabilities(
    memory_limit=True,
    cpu_limit=True,
    pids_limit=True,
    cpuset_limit=True,
    keep_id=True,
    rootless=True,
    network_none=True,
    pause=True,
    update_pids=True,
    update_limits=True,
)
CANNOT = Capabilities(
    memory_limit=False,
    cpu_limit=False,
    pids_limit=False,
    cpuset_limit=False,
    keep_id=True,
    rootless=True,
    network_none=True,
    pause=True,
    update_pids=False,
    update_limits=False,
)


def engine(**changes: object) -> EngineInfo:
    values: dict[str, object] = {
        "name": EngineName.PODMAN,
        "usable": True,
        "reason": "found",
        "client_version": "5.4.0",
        "rootless": True,
        "cgroup_version": CgroupVersion.V2,
        "cgroup_manager": "systemd",
        "controllers": ("cpu", "memory", "pids"),
        "capabilities": CANNOT,
    } | changes
    return EngineInfo(**values)  # type: ignore[arg-type]


def test_an_engine_that_can_hold_everything_has_nothing_to_say() -> None:
    assert enforceable(ALL, engine(capabilities=CAN)) == ()


def test_only_what_is_asked_for_is_told() -> None:
    assert enforceable(Limits(), engine()) == ()
    assert [one.limit for one in enforceable(Limits(pids_max=50), engine())] == ["pids"]


@pytest.mark.parametrize(
    ("info", "reason", "hint"),
    [
        (engine(controllers=("cpu", "memory")), "pids controller is not delegated", DELEGATE_HINT),
        (
            engine(cgroup_version=CgroupVersion.HYBRID, controllers=()),
            "rootless Podman cannot limit anything on cgroup v1",
            "systemd.unified_cgroup_hierarchy=1",
        ),
        (engine(cgroup_manager="cgroupfs"), "has none", "loginctl enable-linger"),
        (engine(), "Podman 5.4.0 cannot set it here", "sandboxctl doctor"),
        (
            engine(rootless=False, name=EngineName.DOCKER),
            "does not offer the pids controller to Docker",
            "cgroup_enable=pids",
        ),
        (engine(capabilities=None, reason="it does not answer", hint="start it"), "it does not answer", "start it"),
    ],
)
def test_each_cause_has_its_own_remedy(info: EngineInfo, reason: str, hint: str) -> None:
    (one,) = enforceable(Limits(pids_max=50), info)
    assert reason in one.reason
    assert hint in one.hint


def test_what_must_be_changed_at_boot_is_one_command() -> None:
    """For GRUB with and without grubby; it is pasted into a shell, so it must be one that a shell can read."""
    command = boot_with("swapaccount=1")
    assert subprocess.run(["/bin/sh", "-n", "-c", command], check=False).returncode == 0
    script = command.replace("sudo sed -i", "sed").replace("/etc/default/grub", "").replace("sudo reboot", "true")
    script = script.replace("sudo grubby", "false").replace("sudo grub-mkconfig", "true")
    grub = 'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX="quiet"\n'
    done = subprocess.run(["/bin/sh", "-c", script], input=grub, capture_output=True, text=True, check=True)
    assert done.stdout == 'GRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX="swapaccount=1 quiet"\n'


def test_more_open_files_than_the_hard_limit_cannot_be_had() -> None:
    info = engine(capabilities=CAN, nofile_hard_max=4096)
    assert [one.limit for one in enforceable(Limits(nofile_max=8192), info)] == ["nofile"]
    assert enforceable(Limits(nofile_max=4096), info) == ()
