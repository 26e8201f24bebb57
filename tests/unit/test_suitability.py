"""Which engine can be used for what on which host, as a table of hosts."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from runtimes import parse
from runtimes.argv import run_argv, update_argv
from runtimes.cgroup.verify import BOOT_V2_HINT, DELEGATE_HINT, LINGER_HINT
from runtimes.errors import EngineUnavailable
from runtimes.model import Capabilities, CgroupVersion, ContainerSpec, EngineInfo, EngineName, Limits, User
from runtimes.podman import PodmanEngine
from runtimes.suitability import (
    PODMAN_NPROC_MAX,
    DockerFacts,
    HostFacts,
    PodmanFacts,
    SocketState,
    cgroup_version,
    choose,
    has_range,
    judge_docker,
    judge_podman,
    socket_path,
)

ALL = ("cpuset", "cpu", "io", "memory", "pids")

DESKTOP = HostFacts(
    uid=1000,
    cgroup_version=CgroupVersion.V2,
    systemd_booted=True,
    user_session=True,
    user_controllers=ALL,
    runtime_dir="/run/user/1000",
    subuids=True,
    programs=frozenset({"crun", "runc", "newuidmap", "fuse-overlayfs", "apt-get"}),
    nofile_hard_max=524288,
    nproc_hard_max=96365,
    selinux_enforcing=False,
)
"""A stock desktop: cgroup v2, systemd, an ordinary user with a session."""


def host(**changes: Any) -> HostFacts:
    return msgspec.structs.replace(DESKTOP, **changes)


def podman(*, rootless: bool = True, controllers: tuple[str, ...] = ALL, **changes: Any) -> PodmanFacts:
    uidmap = [{"size": 1}, {"size": 65536}] if rootless else None
    said: dict[str, Any] = {
        "host": {
            "security": {"rootless": rootless},
            "cgroupManager": "systemd",
            "cgroupControllers": list(controllers),
            "ociRuntime": {"name": "crun"},
            "idMappings": {"uidmap": uidmap},
            **changes.pop("host", {}),
        },
        "store": {"graphDriverName": changes.pop("driver", "overlay")},
        "version": {"Version": changes.pop("version", "5.4.2")},
    }
    return PodmanFacts(client_path="/usr/bin/podman", info=parse.podman_info(json.dumps(said).encode()), **changes)


def docker(
    *, socket: SocketState = SocketState.OPEN, endpoint: str = "unix:///var/run/docker.sock", **said: Any
) -> DockerFacts:
    answer = {
        "ServerVersion": "28.1.0",
        "Driver": "overlay2",
        "CgroupDriver": "systemd",
        "DefaultRuntime": "runc",
        "MemoryLimit": True,
        "SwapLimit": True,
        "CpuCfsQuota": True,
        "CPUSet": True,
        "PidsLimit": True,
        "SecurityOptions": ["name=seccomp,profile=default"],
        "ClientInfo": {"Version": "28.1.1"},
        **said,
    }
    info = parse.docker_info(json.dumps(answer).encode())
    return DockerFacts(client_path="/usr/bin/docker", endpoint=endpoint, socket=socket, info=info)


def silent_docker(socket: SocketState, endpoint: str = "unix:///var/run/docker.sock") -> DockerFacts:
    return docker(socket=socket, endpoint=endpoint, ServerVersion="")


def limits_of(info: EngineInfo) -> tuple[bool, bool, bool, bool]:
    assert info.capabilities is not None
    can = info.capabilities
    return can.memory_limit, can.cpu_limit, can.pids_limit, can.cpuset_limit


def test_rootless_podman_on_a_stock_desktop_needs_nothing() -> None:
    info = judge_podman(DESKTOP, podman())
    assert (info.usable, info.hint, info.warnings) == (True, "", ())
    assert limits_of(info) == (True, True, True, True)
    assert (info.oci_runtime, info.oci_runtime_reason, info.cgroup_manager) == ("crun", "", "systemd")
    assert info.capabilities is not None
    assert info.capabilities.keep_id
    assert info.capabilities.update_pids
    assert info.capabilities.own_slice
    assert info.nproc_hard_max == PODMAN_NPROC_MAX


@pytest.mark.parametrize(
    ("on", "facts", "limits", "hint"),
    [
        (host(user_controllers=("memory", "cpu")), podman(), (True, True, False, False), DELEGATE_HINT),
        (host(), podman(controllers=("memory", "pids")), (True, True, True, True), ""),
        (host(user_controllers=None), podman(), (True, True, True, True), ""),
        (host(user_session=False), podman(), (False, False, False, False), LINGER_HINT),
        (host(systemd_booted=False), podman(), (False, False, False, False), DELEGATE_HINT),
        (host(cgroup_version=CgroupVersion.V1), podman(), (False, False, False, False), BOOT_V2_HINT),
        (host(cgroup_version=CgroupVersion.HYBRID), podman(), (False, False, False, False), BOOT_V2_HINT),
        (host(uid=0, cgroup_version=CgroupVersion.HYBRID), podman(rootless=False), (True, True, True, True), ""),
        (host(uid=0, user_session=False), podman(rootless=False), (True, True, True, True), ""),
    ],
    ids=[
        "pids-not-delegated",
        "podman-sees-less",
        "cannot-be-read",
        "no-user-session",
        "no-systemd",
        "rootless-v1",
        "rootless-hybrid",
        "rootful-hybrid",
        "rootful-v2",
    ],
)
def test_podman_can_limit_what_is_delegated_and_says_how_to_get_the_rest(
    on: HostFacts, facts: PodmanFacts, limits: tuple[bool, ...], hint: str
) -> None:
    info = judge_podman(on, facts)
    assert info.usable
    assert limits_of(info) == limits
    assert info.hint == hint
    assert bool(info.warnings) == (not all(limits))


@pytest.mark.parametrize(
    ("on", "facts", "word", "hint"),
    [
        (host(), PodmanFacts(client_path=None), "not installed", "sudo apt-get install podman"),
        (
            host(programs=frozenset({"crun", "dnf"})),
            PodmanFacts(client_path="p", complaint="exec: newuidmap"),
            "newuidmap",
            "sudo dnf install shadow-utils",
        ),
        (
            host(subuids=False),
            PodmanFacts(client_path="p", complaint="x"),
            "subordinate",
            "sudo usermod --add-subuids",
        ),
        (host(runtime_dir=None), PodmanFacts(client_path="p", complaint="x"), "XDG_RUNTIME_DIR", LINGER_HINT),
        (host(), PodmanFacts(client_path="p", complaint="a broken database"), "a broken database", "podman info"),
        (host(uid=0, subuids=False), PodmanFacts(client_path="p", complaint="odd"), "odd", "podman info"),
        (host(), podman(host={"idMappings": {"uidmap": [{"size": 1}]}}), "subordinate", "sudo usermod --add-subuids"),
        (host(), podman(host={"serviceIsRemote": True}), "another machine", "unset CONTAINER_HOST"),
        (
            host(cgroup_version=CgroupVersion.HYBRID, programs=frozenset({"crun", "newuidmap", "pacman"})),
            podman(),
            "crun",
            "sudo pacman -S runc",
        ),
    ],
)
def test_a_podman_that_cannot_be_used_says_why_and_what_to_type(
    on: HostFacts, facts: PodmanFacts, word: str, hint: str
) -> None:
    info = judge_podman(on, facts)
    assert not info.usable
    assert info.capabilities is None
    assert word in info.reason
    assert info.hint.startswith(hint)


def test_crun_gives_way_to_runc_where_it_cannot_run() -> None:
    info = judge_podman(host(uid=0, cgroup_version=CgroupVersion.HYBRID), podman(rootless=False))
    assert info.oci_runtime == "runc"
    assert "crun" in info.oci_runtime_reason
    chosen = judge_podman(host(cgroup_version=CgroupVersion.HYBRID), podman(host={"ociRuntime": {"name": "/x/runc"}}))
    assert (chosen.oci_runtime, chosen.oci_runtime_reason) == ("runc", "")


@pytest.mark.parametrize(
    ("version", "update", "pids"),
    [
        ("4.2.9", False, False),
        ("4.3.1", True, False),
        ("4.4.0", True, True),
        ("5.4.2", True, True),
        ("odd", False, False),
    ],
)
def test_what_podmans_update_can_do_depends_on_its_version(version: str, update: bool, pids: bool) -> None:
    capabilities = judge_podman(DESKTOP, podman(version=version)).capabilities
    assert capabilities is not None
    assert (capabilities.update_limits, capabilities.update_pids) == (update, pids)


def test_podman_needs_a_program_to_give_a_network_late_and_says_which_package_has_it() -> None:
    without = judge_podman(DESKTOP, podman()).capabilities
    able = judge_podman(host(programs=DESKTOP.programs | {"slirp4netns"}), podman()).capabilities
    assert without is not None
    assert able is not None
    assert (without.network_switch, able.network_switch) == ("", "user_mode")
    assert (without.network_switch_fix, able.network_switch_fix) == ("sudo apt-get install slirp4netns", "")


def test_a_rootless_podman_can_limit_with_what_is_delegated_wherever_it_is_asked() -> None:
    """In a service `podman info` tells of its own group: "memory pids", where cpu, memory and pids are delegated."""
    stock = host(user_controllers=("cpu", "memory", "pids"))
    info = judge_podman(stock, podman(controllers=("memory", "pids")))
    assert info.controllers == ("memory", "cpu", "pids")
    assert judge_podman(host(user_controllers=None), podman(controllers=("memory",))).controllers == ("memory",)


def test_podman_is_told_not_to_limit_processes_where_it_cannot() -> None:
    """Its default is 2048, and crun: "controller `pids` is not available"."""
    spec = ContainerSpec(
        sandbox_id="s", owner="o", image="i", command=("/c",), user=User(uid=1, gid=1), seccomp_profile="/p"
    )
    for delegated, told in ((("memory",), True), (ALL, False)):
        client = PodmanEngine.client_of(judge_podman(host(user_controllers=delegated), podman()))
        assert ("--pids-limit=0" in run_argv(client, spec)) is told
    rootful = judge_podman(host(uid=0, cgroup_version=CgroupVersion.HYBRID), podman(rootless=False, controllers=()))
    assert "--pids-limit=0" not in run_argv(PodmanEngine.client_of(rootful), spec)


@pytest.mark.parametrize(
    ("info", "able"),
    [
        (judge_podman(DESKTOP, podman()), {"late_for_callers", "overlay_for_callers", "enters_userns", "keep_id"}),
        (judge_podman(host(uid=0), podman(rootless=False)), {"late_shm"}),
        (judge_docker(DESKTOP, docker()), {"late_shm"}),
        (judge_docker(DESKTOP, docker(SecurityOptions=["name=rootless"])), {"late_for_callers"}),
    ],
    ids=["podman-rootless", "podman", "docker", "docker-rootless"],
)
def test_what_can_be_done_without_root_is_told_once_and_for_all(info: EngineInfo, able: set[str]) -> None:
    """Nobody else asks whether an engine is rootless, or which it is."""
    names = ("late_for_callers", "late_shm", "overlay_for_callers", "enters_userns", "keep_id", "pids_uncounted")
    assert {name for name in names if getattr(info.capabilities, name)} == able


@pytest.mark.parametrize(("version", "said"), [("5.3.2", False), ("5.4.2", True)])
def test_podmans_update_is_told_again_that_there_is_no_health_check(version: str, said: bool) -> None:
    """5.4.2: "healthcheck-timeout must be at least 1 second", of a container made without one."""
    info = judge_podman(DESKTOP, podman(version=version))
    words = update_argv(PodmanEngine.client_of(info), "0" * 64, Limits(pids_max=1))
    assert ("--no-healthcheck" in words) is said


def test_a_slow_storage_driver_is_warned_of() -> None:
    info = judge_podman(DESKTOP, podman(driver="vfs"))
    assert info.usable
    assert "sudo apt-get install fuse-overlayfs" in info.warnings[0].fix


def test_rootful_docker_needs_nothing() -> None:
    info = judge_docker(DESKTOP, docker())
    assert (info.usable, info.hint, info.warnings) == (True, "", ())
    assert limits_of(info) == (True, True, True, True)
    assert (info.client_version, info.server_version) == ("28.1.1", "28.1.0")
    assert (info.socket_path, info.rootless, info.storage_driver) == ("/var/run/docker.sock", False, "overlay2")
    assert info.capabilities is not None
    assert not info.capabilities.keep_id


def test_rootless_docker_is_recognised_and_limited_by_what_it_says() -> None:
    own = "unix:///run/user/1000/docker.sock"
    said: dict[str, Any] = {"SecurityOptions": ["name=seccomp", "name=rootless"], "CPUSet": False, "PidsLimit": False}
    info = judge_docker(DESKTOP, docker(endpoint=own, **said))
    assert info.rootless
    assert limits_of(info) == (True, True, False, False)
    assert info.hint == DELEGATE_HINT
    assert "pids" in info.warnings[0].what


@pytest.mark.parametrize(
    ("facts", "word", "hint"),
    [
        (DockerFacts(client_path=None), "not installed", "sudo apt-get install docker.io"),
        (silent_docker(SocketState.MISSING), "not running", "sudo systemctl start docker"),
        (silent_docker(SocketState.DEAD), "not running", "sudo systemctl start docker"),
        (silent_docker(SocketState.FORBIDDEN), "may not use", 'sudo usermod -aG docker "$USER"'),
        (
            silent_docker(SocketState.MISSING, "unix:///run/user/1000/docker.sock"),
            "not running",
            "systemctl --user start docker",
        ),
        (silent_docker(SocketState.MISSING, "unix:///odd.sock"), "/odd.sock", "unset DOCKER_HOST"),
        (silent_docker(SocketState.OPEN), "does not answer", "docker info"),
        (docker(host={"arch": "amd64"}), "Podman", "sandboxctl create --engine podman"),
    ],
)
def test_a_docker_that_cannot_be_used_says_why_and_what_to_type(facts: DockerFacts, word: str, hint: str) -> None:
    info = judge_docker(DESKTOP, facts)
    assert not info.usable
    assert word in info.reason
    assert info.hint.startswith(hint)


@pytest.mark.parametrize("endpoint", ["tcp://build:2376", "ssh://me@build"])
def test_a_docker_on_another_machine_is_refused_as_such(endpoint: str) -> None:
    """It answers, and a create would fail in ways that nobody understands: its folders are not ours."""
    info = judge_docker(DESKTOP, docker(socket=SocketState.REMOTE, endpoint=endpoint))
    assert not info.usable
    assert "another machine" in info.reason
    assert endpoint in info.reason
    assert info.hint == "unset DOCKER_HOST && docker context use default"
    with pytest.raises(EngineUnavailable, match="another machine"):
        choose([info], EngineName.DOCKER)


def test_a_docker_in_a_virtual_machine_is_refused_as_such() -> None:
    """Its folders are shared, and init's socket is not: the container would start and never be heard of."""
    info = judge_docker(DESKTOP, docker(OperatingSystem="Docker Desktop"))
    assert not info.usable
    assert "virtual machine" in info.reason
    assert info.hint == "unset DOCKER_HOST && docker context use default"


def test_every_warning_says_what_to_type() -> None:
    """Also where the engine as a whole needs nothing, and so has no hint of its own."""
    found = [
        judge_docker(DESKTOP, docker(SwapLimit=False)),
        judge_docker(DESKTOP, docker(PidsLimit=False)),
        judge_podman(host(uid=0), podman(rootless=False, controllers=("memory",))),
        judge_podman(DESKTOP, podman(driver="vfs")),
        judge_podman(host(runtime_dir=None), podman()),
    ]
    assert [len(info.warnings) for info in found] == [1] * len(found)
    assert all(warning.fix for info in found for warning in info.warnings)


def test_uncounted_swap_is_warned_of() -> None:
    assert "swap" in judge_docker(DESKTOP, docker(SwapLimit=False)).warnings[0].what


def found(name: EngineName, *, usable: bool = True, limits: bool = True) -> EngineInfo:
    capabilities = Capabilities(
        memory_limit=limits,
        cpu_limit=limits,
        pids_limit=limits,
        cpuset_limit=False,
        keep_id=False,
        rootless=False,
        network_none=True,
        pause=True,
        update_pids=True,
        update_limits=True,
    )
    return EngineInfo(
        name=name,
        usable=usable,
        reason=f"{name} reason",
        hint=f"{name} hint",
        capabilities=capabilities if usable else None,
    )


P, D = EngineName.PODMAN, EngineName.DOCKER


@pytest.mark.parametrize(
    ("infos", "preferred", "chosen"),
    [
        ([found(P), found(D)], None, P),
        ([found(D), found(P)], None, P),
        ([found(P, limits=False), found(D)], None, D),
        ([found(P, limits=False), found(D, limits=False)], None, P),
        ([found(P, usable=False), found(D)], None, D),
        ([found(P, usable=False), found(D, limits=False)], None, D),
        ([found(P), found(D)], D, D),
        ([found(P, limits=False), found(D)], P, P),
    ],
)
def test_the_best_engine_that_works_is_chosen(
    infos: list[EngineInfo], preferred: EngineName | None, chosen: EngineName
) -> None:
    assert choose(infos, preferred).name is chosen


def test_when_none_works_each_says_why() -> None:
    with pytest.raises(EngineUnavailable) as failure:
        choose([found(P, usable=False), found(D, usable=False)], None)
    assert "podman reason" in failure.value.detail
    assert "docker reason" in failure.value.detail
    assert "podman hint" in failure.value.hint
    with pytest.raises(EngineUnavailable) as failure:
        choose([found(P), found(D, usable=False)], D)
    assert (failure.value.detail, failure.value.hint) == ("docker reason", "docker hint")


V1 = "31 24 0:27 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
OTHER = "29 24 0:25 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 1 8:1 / /cgroup2 rw - ext4 /dev/sda rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "version"),
    [
        (V2 + OTHER, CgroupVersion.V2),
        (V1 + OTHER, CgroupVersion.V1),
        (V1 + V2 + OTHER, CgroupVersion.HYBRID),
        (OTHER, None),
        ("", None),
        ("nonsense\n", None),
    ],
)
def test_the_cgroup_version_is_what_is_mounted(mountinfo: str, version: CgroupVersion | None) -> None:
    assert cgroup_version(mountinfo) is version


@pytest.mark.parametrize(
    ("table", "has"),
    [
        ("me:100000:65536\n", True),
        ("1000:100000:65536\n", True),
        ("you:100000:65536\n", False),
        ("me:100000:0\n", False),
        ("me:100000\n", False),
        ("", False),
    ],
)
def test_a_range_of_subordinate_ids_is_found_by_name_or_number(table: str, has: bool) -> None:
    assert has_range(table, user="me", uid=1000) is has


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [("unix:///var/run/docker.sock", "/var/run/docker.sock"), ("tcp://h:1", None), ("ssh://h", None), ("", None)],
)
def test_only_a_unix_socket_has_a_path(endpoint: str, path: str | None) -> None:
    assert socket_path(endpoint) == path


@pytest.mark.parametrize("version", [CgroupVersion.V1, CgroupVersion.HYBRID])
def test_a_slice_of_our_own_needs_systemd_and_control_groups_v2(version: CgroupVersion) -> None:
    """Elsewhere the engine chooses, and nothing is asked that it would fail at."""
    for host in (
        msgspec.structs.replace(DESKTOP, cgroup_version=version),
        msgspec.structs.replace(DESKTOP, user_session=False),
    ):
        info = judge_podman(host, podman())
        assert info.capabilities is None or not info.capabilities.own_slice
