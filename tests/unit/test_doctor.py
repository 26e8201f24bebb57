"""What doctor makes of what was found: whatever is wrong has a command that can be typed as it stands."""

from __future__ import annotations

import subprocess
from typing import Any

import msgspec
import pytest

from runtimes.cgroup.verify import BOOT_V2_HINT, COUNT_SWAP_HINT, DELEGATE_HINT
from runtimes.model import Capabilities, CgroupVersion, EngineInfo, EngineName, Shortcoming
from sandboxd.audit.auditor import AuditState
from sandboxd.doctor import FREE_BYTES_MIN, USERNS_FIX, EngineFacts, Facts, judge
from sandboxd.protocol import Check

ABLE = Capabilities(
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
ENGINE = EngineInfo(
    name=EngineName.PODMAN,
    usable=True,
    reason="Podman 5.4.2 answers",
    client_version="5.4.2",
    rootless=True,
    cgroup_version=CgroupVersion.V2,
    cgroup_manager="systemd",
    controllers=("memory", "cpu", "pids", "cpuset"),
    capabilities=ABLE,
)
HEALTHY = Facts(
    engines=(EngineFacts(info=ENGINE, has_image=True),),
    image="image:1",
    init_error="",
    init_hint="",
    state_dir="/home/me/my state",
    state_free_bytes=FREE_BYTES_MIN,
    socket="/run/user/1000/my sockets/sandboxd.sock",
    socket_dir_private=True,
    daemon_nofile_soft=4096,
    idmap_works=None,
    mounts_late=True,
    swap_bytes=0,
    swap_counted=None,
    lingers=None,
    audit=AuditState(enabled=True, required=False, failing="", lost=0, written=7),
    metrics_problem="",
)


def test_what_goes_wrong_with_logs_and_metrics_is_told_and_only_then() -> None:
    """A log that loses lines, and figures that nobody can read, are noticed by nobody else."""
    checks = {check.name: check for check in judge(HEALTHY)}
    assert (checks["audit log"].status, "metrics" in checks) == ("ok", False)
    failing = msgspec.structs.replace(HEALTHY.audit, failing="No space left on device", lost=7)
    facts = msgspec.structs.replace(HEALTHY, audit=failing, metrics_problem="cannot listen on 127.0.0.1 port 1")
    checks = {check.name: check for check in judge(facts)}
    assert checks["audit log"].status == "warning"
    assert "7 lines were lost" in checks["audit log"].detail
    assert checks["audit log"].fix == "df -h '/home/me/my state/audit'; ls -ld '/home/me/my state/audit'"
    assert checks["metrics"].status == "warning"
    required = msgspec.structs.replace(failing, required=True)
    checks = {check.name: check for check in judge(msgspec.structs.replace(HEALTHY, audit=required))}
    assert checks["audit log"].status == "failure"


def engine(**changes: Any) -> tuple[EngineFacts, ...]:
    able = {name: changes.pop(name) for name in list(changes) if name.endswith("_limit")}
    capabilities = msgspec.structs.replace(ABLE, **able)
    info = msgspec.structs.replace(ENGINE, capabilities=capabilities, **changes)
    return (EngineFacts(info=info, has_image=True),)


def wrong(**changes: Any) -> list[Check]:
    return [check for check in judge(msgspec.structs.replace(HEALTHY, **changes)) if check.status != "ok"]


def test_a_healthy_host_has_nothing_to_mend() -> None:
    checks = judge(HEALTHY)
    assert {check.status for check in checks} == {"ok"}
    assert {check.fix for check in checks} == {""}


NO_PIDS: dict[str, Any] = {"pids_limit": False, "controllers": ("memory", "cpu", "cpuset")}
NO_CPUSET: dict[str, Any] = {"cpuset_limit": False, "controllers": ("memory", "cpu", "pids")}

WRONG = [
    ({"lingers": False}, "lingering", "warning", 'sudo loginctl enable-linger "$USER"'),
    ({"socket_dir_private": False}, "socket", "failure", "chmod 700 '/run/user/1000/my sockets'"),
    ({"state_free_bytes": 1}, "disk", "failure", "df -h '/home/me/my state'"),
    ({"state_free_bytes": None}, "disk", "warning", "df -h '/home/me/my state'"),
    (
        {"daemon_nofile_soft": 256},
        "open files",
        "warning",
        "sudo prlimit --pid $$ --nofile=1024:1024 && sandboxctl daemon stop",
    ),
    ({"journal_trouble": "disk full"}, "journal", "failure", "df -h '/home/me/my state'"),
    (
        {"journal_trouble": "it is empty", "journal_damaged": True},
        "journal",
        "failure",
        "sandboxctl doctor --repair",
    ),
    ({"exposed_services": ("chroma",)}, "services", "warning", USERNS_FIX),
    ({"mounts_late": False}, "late mounts", "warning", "use Linux 5.12 or newer"),
    ({"idmap_works": False}, "id-mapped mounts", "warning", "sandboxctl create --ro"),
    ({"swap_bytes": 2**30, "swap_counted": False}, "swap", "warning", COUNT_SWAP_HINT),
    ({"engines": engine(**NO_PIDS)}, "podman limits", "failure", DELEGATE_HINT),
    (
        {"engines": engine(**NO_CPUSET)},
        "podman limits",
        "warning",
        DELEGATE_HINT,
    ),
    ({"engines": engine(**NO_PIDS, cgroup_version=CgroupVersion.HYBRID)}, "podman limits", "failure", BOOT_V2_HINT),
    (
        {"engines": engine(warnings=(Shortcoming(what="it is slow", fix="make it fast"),))},
        "podman",
        "warning",
        "make it fast",
    ),
]


@pytest.mark.parametrize(("changes", "name", "status", "fix"), WRONG, ids=lambda value: str(value)[:30])
def test_what_is_wrong_has_its_own_command(changes: dict[str, Any], name: str, status: str, fix: str) -> None:
    (check,) = wrong(**changes)
    assert (check.name, check.status, check.fix) == (name, status, fix)
    assert subprocess.run(["/bin/sh", "-n", "-c", check.fix], check=False).returncode == 0


def test_delegation_takes_effect_at_once() -> None:
    """Without a restart of the user's manager the controllers arrive at the next boot, and doctor seems wrong."""
    (check,) = wrong(engines=engine(**NO_PIDS))
    assert "systemctl restart user@" in check.fix


@pytest.mark.parametrize(("swap_bytes", "counted"), [(0, False), (2**30, True), (2**30, None)])
def test_swap_that_is_counted_or_not_there_is_fine(swap_bytes: int, counted: bool | None) -> None:
    assert wrong(swap_bytes=swap_bytes, swap_counted=counted) == []


def test_an_engine_that_cannot_be_used_says_why() -> None:
    """With no other, that is what is wrong with the host."""
    (found,) = engine(usable=False, reason="podman is not installed", hint="sudo apt-get install podman")
    none, podman = wrong(engines=(found,))
    assert (none.status, none.fix) == ("failure", "sudo apt-get install podman")
    assert (podman.status, podman.detail) == ("warning", "podman is not installed")
