"""What an engine's flags come to in the kernel: hardening, limits, mounts, read from outside the container."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from runtimes.errors import EngineRefused, Unsupported
from runtimes.model import CgroupVersion, ContainerState, EngineName, Limits, Mount, Network, Tmpfs, User
from tests.contract.engines import Bench, client_of

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

MIB = 1024 * 1024
EVERY_LIMIT = Limits(
    memory_bytes_max=64 * MIB,
    cpu_millis=250,
    pids_max=21,
    cpuset_cpus=(0,),
    shm_bytes_max=16 * MIB,
    nofile_max=777,
)
ODD_NAMES = (
    "comma,comma",
    "colon:colon",
    'quote"quote',
    "line\nfeed",
    "trailing space ",
    " leading",
    "equals=equals",
    "back\\slash",
    "per%cent $HOME",
    "carriage\rreturn",
    "ümlaut",
    "'apostrophe'",
)


async def pid_of(bench: Bench, **fields: Any) -> int:
    container_id = await bench.engine.create(bench.spec(**fields))
    pid = (await bench.engine.inspect(container_id)).pid
    assert pid is not None
    return pid


async def printed_by(bench: Bench, *command: str, env: Sequence[tuple[str, str]] = (), **fields: Any) -> str:
    """What a command prints in a new container, through the engine's own exec."""
    container_id = await bench.engine.create(bench.spec(**fields))
    reading, writing = os.pipe()
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        await bench.engine.exec(
            container_id,
            command,
            user="1000:1000",
            env=env,
            working_dir="/",
            descriptors=(nothing, writing, writing),
            timeout_s=30,
        )
        return os.read(reading, 65536).decode()
    finally:
        for descriptor in (reading, writing, nothing):
            os.close(descriptor)


def cgroup_file(pid: int, controller: str, name_v1: str, name_v2: str) -> str:
    """A file of the process's own group, on v1 and on v2, as the kernel has it."""
    groups = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}/{name_v1}").read_text().strip()
    (path,) = (path for _, controllers, path in groups if controllers == "")
    return Path(f"/sys/fs/cgroup{path}/{name_v2}").read_text().strip()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_limits_arrive_in_the_kernel(real_bench: Bench) -> None:
    """What the engine reports is only what it was told; this is what holds."""
    limits = real_bench.held(EVERY_LIMIT)
    pid = await pid_of(real_bench, limits=limits)
    swap = "0" if real_bench.engine.info.cgroup_version is CgroupVersion.V2 else str(64 * MIB)
    for asked, controller, name_v1, name_v2, expected in (
        (limits.memory_bytes_max, "memory", "memory.limit_in_bytes", "memory.max", {str(64 * MIB)}),
        (limits.memory_bytes_max, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max", {swap}),
        (limits.pids_max, "pids", "pids.max", "pids.max", {"21"}),
        (limits.cpu_millis, "cpu", "cpu.cfs_quota_us", "cpu.max", {"25000", "25000 100000"}),
        (limits.cpuset_cpus, "cpuset", "cpuset.cpus", "cpuset.cpus", {"0"}),
    ):
        if asked is not None:
            assert cgroup_file(pid, controller, name_v1, name_v2) in expected
    (nofile,) = (
        line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files")
    )
    assert nofile.split()[3:5] == ["777", "777"]
    shm = os.statvfs(f"/proc/{pid}/root/dev/shm")
    assert shm.f_blocks * shm.f_frsize == 16 * MIB


async def test_a_limit_that_cannot_hold_here_is_refused(real_bench: Bench) -> None:
    """A rootless Podman on v1 takes the flags, warns, and limits nothing."""
    held = real_bench.held(EVERY_LIMIT)
    for field in ("memory_bytes_max", "cpu_millis", "pids_max", "cpuset_cpus"):
        if getattr(held, field) is None:
            limits = msgspec.structs.replace(Limits(), **{field: getattr(EVERY_LIMIT, field)})
            with pytest.raises(Unsupported):
                await real_bench.engine.create(real_bench.spec(limits=limits))


async def test_an_update_reaches_a_running_container(real_bench: Bench) -> None:
    engine = real_bench.engine
    asked = real_bench.held(Limits(memory_bytes_max=64 * MIB, pids_max=20))
    container_id = await engine.create(real_bench.spec(limits=asked))
    pid = (await engine.inspect(container_id)).pid
    assert pid is not None
    for memory in (128 * MIB, 48 * MIB):
        left = await engine.update(container_id, Limits(memory_bytes_max=memory, pids_max=30))
        if left.memory_bytes_max is not None:
            continue
        assert cgroup_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(memory)
        assert cgroup_file(pid, "pids", "pids.max", "pids.max") == ("30" if left.pids_max is None else "20")


async def test_a_sandbox_is_hardened_whoever_asks_for_it(real_bench: Bench) -> None:
    pid = await pid_of(real_bench)
    status = status_of(pid)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    rootless = real_bench.engine.info.rootless
    assert (status["Uid"].split() == ["1000"] * 4) is not rootless
    assert (status["Gid"].split() == ["1000"] * 4) is not rootless
    assert "0" not in status["Uid"].split()
    root = next(
        line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/"
    )
    assert "ro" in root[5].split(",")


async def test_network_none_has_a_loopback_and_nothing_else(real_bench: Bench) -> None:
    pid = await pid_of(real_bench)
    interfaces = {line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]}
    assert interfaces <= {
        "lo",
        "tunl0",
        "sit0",
        "ip6tnl0",
        "gre0",
        "gretap0",
        "erspan0",
        "ip_vti0",
        "ip6_vti0",
        "ip6gre0",
    }
    assert "lo" in interfaces


async def test_the_command_is_the_specs_and_not_the_images(real_bench: Bench) -> None:
    """The image brings an entrypoint and a command of its own."""
    pid = await pid_of(real_bench, command=("/bin/sleep", "611", "612"))
    assert Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1] == [b"/bin/sleep", b"611", b"612"]


async def test_a_command_that_is_not_there_is_refused_and_can_be_cleared_away(real_bench: Bench) -> None:
    spec = real_bench.spec(command=("/bin/no-such-program",))
    with pytest.raises(EngineRefused, match="no-such-program"):
        await real_bench.engine.create(spec)
    await real_bench.engine.remove_sandbox(spec.sandbox_id, owner=real_bench.owner)
    assert await real_bench.engine.list_containers(owner=real_bench.owner) == []


async def test_any_path_can_be_mounted_except_one_with_cr_lf(real_bench: Bench, tmp_path: Path) -> None:
    """Projects lie in folders with any name; a misread one would show another folder inside."""
    sources = []
    for number, name in enumerate(ODD_NAMES):
        source = tmp_path / name
        source.mkdir()
        (source / f"inside-{number}").touch()
        sources.append(Mount(source=str(source), target=f"/mnt/{name}", read_only=number % 2 == 0))
    pid = await pid_of(real_bench, mounts=tuple(sources))
    for number, name in enumerate(ODD_NAMES):
        inside = Path(f"/proc/{pid}/root/mnt") / name
        assert os.listdir(inside) == [f"inside-{number}"]
        read_only = bool(os.statvfs(inside).f_flag & os.ST_RDONLY)
        assert read_only == (number % 2 == 0), name
    with pytest.raises(Unsupported):
        await real_bench.engine.create(real_bench.spec("crlf", mounts=(Mount(source="/a\r\nb", target="/mnt/a"),)))


async def test_a_tmpfs_is_sized_writable_and_empty(real_bench: Bench) -> None:
    """Podman alone would copy what the image has there, and count it against the size."""
    tmpfs = (
        Tmpfs(target="/tmp", size_bytes_max=MIB, executable=True),
        Tmpfs(target="/run", size_bytes_max=2 * MIB),
    )
    pid = await pid_of(real_bench, tmpfs=tmpfs)
    assert os.listdir(f"/proc/{pid}/root/tmp") == []
    for each in tmpfs:
        inside = f"/proc/{pid}/root{each.target}"
        status = os.statvfs(inside)
        assert status.f_blocks * status.f_frsize == each.size_bytes_max
        assert os.stat(inside).st_mode & 0o700 == 0o700
        assert os.stat(inside).st_uid == int(status_of(pid)["Uid"].split()[0])
        assert status.f_flag & os.ST_NOSUID
        assert status.f_flag & os.ST_NODEV
        assert bool(status.f_flag & os.ST_NOEXEC) != each.executable


async def test_the_users_proxy_does_not_come_along(
    real_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both engines would hand the proxy's address, with its password, to every container."""
    secret = "http://user:secret@proxy:1"
    (tmp_path / "config.json").write_text(json.dumps({"proxies": {"default": {"httpProxy": secret}}}))
    environment = {**os.environ, "DOCKER_CONFIG": str(tmp_path), "http_proxy": secret, "HTTPS_PROXY": secret}
    engine = type(real_bench.engine)(real_bench.engine.info, env=environment)  # type: ignore[call-arg]
    bench = Bench(engine, real_bench.owner, real_bench.image, real_bench.archive.parent)
    assert "secret" not in await printed_by(bench, "/bin/env")
    own = await printed_by(bench, "/bin/env", sandbox_id="s2", env=(("http_proxy", "mine"),))
    assert "http_proxy=mine" in own
    assert "secret" not in own


async def test_the_environment_arrives_byte_for_byte(real_bench: Bench) -> None:
    env = (("PLAIN", "a b"), ("ODD", 'x=",;$HOME\n\\é'), ("EMPTY", ""), ("STAR*", "1"))
    inside = (await printed_by(real_bench, "/bin/busybox", "cat", "/proc/self/environ", env=env)).split("\0")
    for name, value in env:
        assert f"{name}={value}" in inside


async def test_anonymous_volumes_are_never_made_or_go_with_their_container(real_bench: Bench) -> None:
    """An image may declare volumes; a day of sandboxes would otherwise leave thousands behind.

    Podman can be told to ignore them. Docker cannot: there they go with the container, which is refused higher up.
    """
    client = client_of(real_bench.engine)

    async def volumes() -> set[str]:
        done = await anyio.run_process(client.call("volume", "ls", "--quiet"))
        return set(done.stdout.decode().split())

    container_id = await real_bench.engine.create(real_bench.spec())
    inspect = await anyio.run_process(client.call("container", "inspect", container_id))
    (facts,) = json.loads(inspect.stdout)
    made = {mount["Name"] for mount in facts["Mounts"] if mount["Type"] == "volume"}
    assert bool(made) == (real_bench.engine.name is EngineName.DOCKER)
    assert made <= await volumes()
    await real_bench.engine.remove(container_id)
    assert not made & await volumes()


async def test_a_full_network_is_the_engines_default(real_bench: Bench) -> None:
    container_id = await real_bench.engine.create(real_bench.spec(network=Network.FULL))
    facts = await real_bench.engine.inspect(container_id)
    assert facts.state is ContainerState.RUNNING
    interfaces = Path(f"/proc/{facts.pid}/net/dev").read_text()
    assert "eth0:" in interfaces or "tap0:" in interfaces


async def test_the_callers_own_uid_is_mapped_or_refused(real_bench: Bench) -> None:
    capabilities = real_bench.engine.info.capabilities
    assert capabilities is not None
    if capabilities.keep_id:
        assert real_bench.engine.name is EngineName.PODMAN
        user = User(uid=os.getuid(), gid=os.getgid())
        pid = await pid_of(real_bench, keep_id=True, user=user)
        assert status_of(pid)["Uid"].split() == [str(os.getuid())] * 4
    else:
        with pytest.raises(Unsupported):
            await real_bench.engine.create(real_bench.spec(keep_id=True))
