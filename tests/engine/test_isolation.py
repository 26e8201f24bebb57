"""What a sandbox is kept from, seen from inside, on each engine."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.admission import THREAD_VARIABLES
from tests.engine.conftest import Box
from tests.engine.daemons import Daemon

pytestmark = pytest.mark.engine

PROJECT_UID = 4321

WRITABLE = {"/tmp", "/run", "/home/sandbox", "/dev/shm", "/dev/mqueue", "/workspace"}
"""mqueue holds no files: its queues live in the sandbox's own IPC namespace, bounded by RLIMIT_MSGQUEUE."""

ORDERS = ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/irq/default_smp_affinity")

NAMESPACES = ("pid", "net", "mnt", "ipc", "uts")


@pytest.fixture(scope="module")
def cell(
    daemon: Daemon, engine: str, probes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """A sandbox on a project that holds the probes, one of them setuid root."""
    project = tmp_path_factory.mktemp("cell")
    shutil.copytree(probes, project, dirs_exist_ok=True)
    os.chown(project, PROJECT_UID, PROJECT_UID)
    shutil.copy(probes / "trespass", project / "setuid")
    os.chown(project / "setuid", 0, 0)
    os.chmod(project / "setuid", 0o6755)
    with daemon.box(engine, workspace={"path": str(project)}) as cell:
        yield cell


def _as(user: str | None) -> dict[str, str]:
    return {} if user is None else {"user": user}


def status_of(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def test_root_gets_a_sandbox_in_which_nobody_is_root(daemon: Daemon, box: Box) -> None:
    assert daemon.sh(box, "id -u; id -g; id -G").split() == ["1000", "1000", "1000"]
    assert box["user"] == "1000:1000"


def test_a_project_is_worked_on_as_its_owner(daemon: Daemon, cell: Box) -> None:
    assert daemon.sh(cell, "id -u").strip() == str(PROJECT_UID)


@pytest.mark.parametrize("who", ["a command", "init"])
def test_no_capability_is_left_and_none_can_be_gained(daemon: Daemon, cell: Box, who: str) -> None:
    """Both: a command is what attacks, and init is what it would take over."""
    said = daemon.sh(cell, "cat /proc/self/status") if who == "a command" else _host_status(cell["pid"])
    status = status_of(said)
    assert {name: int(status[name], 16) for name in status if name.startswith("Cap")} == {
        "CapInh": 0,
        "CapPrm": 0,
        "CapEff": 0,
        "CapBnd": 0,
        "CapAmb": 0,
    }
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2", "2 is: a filter is on"


def _host_status(pid: int) -> str:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return file.read()


def test_the_stricter_profile_is_the_one_in_force(daemon: Daemon, cell: Box) -> None:
    """The engines' own profiles let io_uring, vsock, user namespaces and TIOCSTI pass, which ours does not."""
    said = daemon.sh(cell, "/workspace/seccomp_probe")
    needed, refused = (_answers(part) for part in said.removeprefix("# needed\n").split("# refused\n"))
    assert len(needed) > 10
    assert len(refused) > 50
    assert [name for name, answer in needed.items() if answer in {"EPERM", "ENOSYS"}] == []
    assert refused.pop("clone3") == "ENOSYS", "a C library falls back to clone, whose flags can be looked at"
    assert {name: answer for name, answer in refused.items() if answer != "EPERM"} == {}


def _answers(text: str) -> dict[str, str]:
    return dict(line.split() for line in text.splitlines())


def test_a_setuid_program_gains_nothing(daemon: Daemon, cell: Box) -> None:
    assert daemon.sh(cell, "ls -ln /workspace/setuid").split()[0] == "-rwsr-sr-x"
    assert daemon.sh(cell, "/workspace/setuid become").strip() == str(PROJECT_UID)


@pytest.mark.parametrize("user", [None, "0"], ids=["its user", "root inside"])
def test_the_root_file_system_is_read_only(daemon: Daemon, cell: Box, user: str | None) -> None:
    """Also for the uid 0 that the engine's own exec gives: it has no capability to mount with."""
    script = "for d in / /bin /etc /home /usr /var; do touch $d/probe; done; mount -o remount,rw /"
    ran = daemon.run(cell, "sh", "-c", script, **_as(user))
    assert ran.stderr.count(b"Read-only file system") == 6, ran.stderr
    assert ran.end["exit_code"] != 0


def test_only_sized_places_and_the_project_can_be_written_to(daemon: Daemon, cell: Box) -> None:
    """Anything else would be a place on the host that no limit bounds."""
    script = r"""
        { awk '{print $2}' /proc/mounts; find / \( -path /proc -o -path /sys \) -prune -o -type d -print; } |
        sort -u | while read -r place; do
            if [ -d "$place" ]; then touch "$place/probe" && rm "$place/probe" && echo "$place"
            elif [ -w "$place" ] && ! [ -c "$place" ]; then echo "$place"; fi
        done 2>/dev/null; true
    """
    assert set(daemon.sh(cell, script).split()) == WRITABLE


def test_the_writable_places_are_bounded(daemon: Daemon, cell: Box) -> None:
    options = {
        target: dict(pair.partition("=")[::2] for pair in words.split(","))
        for _, target, kind, words, *_ in (line.split() for line in daemon.sh(cell, "cat /proc/mounts").splitlines())
        if kind == "tmpfs" and target in WRITABLE
    }
    assert set(options) == WRITABLE - {"/workspace", "/dev/mqueue"}
    for target, words in options.items():
        assert {"size", "nosuid", "nodev"} <= set(words), target


def test_there_is_no_network_but_its_own_loopback(daemon: Daemon, cell: Box) -> None:
    assert daemon.sh(cell, "ls /sys/class/net").split() == ["lo"]
    assert daemon.sh(cell, "tail -n +2 /proc/net/route; ip route; ip -6 route").strip() == ""
    ran = daemon.run(cell, "nc", "-w", "5", "192.0.2.1", "80")
    assert b"unreachable" in ran.stderr


def test_no_engine_can_be_reached(daemon: Daemon, cell: Box) -> None:
    """A socket of an engine would be root on the host."""
    script = "find / -path /proc -prune -o -type s -print; ls /var/run/docker.sock /run/docker.sock /run/podman 2>&1"
    ran = daemon.run(cell, "sh", "-c", script)
    assert ran.stdout.count(b"No such file") == 3
    assert len(ran.stdout.splitlines()) == 3, ran.stdout


def test_abstract_sockets_of_the_host_are_out_of_reach(daemon: Daemon, cell: Box, probes: Path) -> None:
    """They have no file that could be left out of the sandbox: only a network namespace keeps them away."""
    name = f"sandboxd-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{name}")
        listening.listen()
        with os.popen(f"{probes}/trespass connect @{name}") as outside:
            assert outside.read() == "ok\n"
        assert daemon.sh(cell, f"/workspace/trespass connect @{name}") == "ECONNREFUSED\n"
        assert name not in daemon.sh(cell, "cat /proc/net/unix")


@pytest.mark.parametrize("path", ["/proc/kcore", "/proc/keys", "/proc/timer_list"])
def test_what_tells_of_the_host_is_masked(daemon: Daemon, cell: Box, path: str) -> None:
    ran = daemon.run(cell, "head", "-c", "16", path)
    assert ran.stdout == b""


@pytest.mark.parametrize("path", ["/sys/firmware", "/proc/acpi", "/proc/scsi"])
def test_directories_that_tell_of_the_host_are_empty(daemon: Daemon, cell: Box, path: str) -> None:
    assert daemon.run(cell, "ls", "-A", path).stdout == b""


@pytest.mark.parametrize("path", ORDERS)
@pytest.mark.parametrize("user", [None, "0"], ids=["its user", "root inside"])
def test_the_kernel_takes_no_orders(daemon: Daemon, cell: Box, path: str, user: str | None) -> None:
    ran = daemon.run(cell, "sh", "-c", f"echo h > {path}", **_as(user))
    assert ran.end["exit_code"] != 0
    missing = not os.path.exists(path)
    said = (b"nonexistent",) if missing else (b"Read-only file system", b"Permission denied")
    assert any(words in ran.stderr for words in said), ran.stderr


def test_no_device_of_the_host_is_there(daemon: Daemon, cell: Box) -> None:
    assert daemon.run(cell, "find", "/", "-path", "/proc", "-prune", "-o", "-type", "b", "-print").stdout == b""
    assert {"mem", "kmsg", "fuse", "kvm"}.isdisjoint(daemon.sh(cell, "ls /dev").split())


@pytest.mark.parametrize("kind", NAMESPACES)
def test_it_has_namespaces_of_its_own(cell: Box, kind: str) -> None:
    assert os.readlink(f"/proc/{cell['pid']}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_no_process_of_the_host_can_be_seen(daemon: Daemon, cell: Box) -> None:
    seen = daemon.sh(cell, "for p in /proc/[0-9]*; do cat $p/comm; done").split()
    assert seen[0] == "sandbox-init"
    assert set(seen) <= {"sandbox-init", "sandbox-keeper", "sh", "cat"}


def test_init_cannot_be_ended_from_inside(daemon: Daemon, cell: Box) -> None:
    """It is everybody's way in: a command that ended it would end all others."""
    daemon.sh(cell, "for n in $(seq 1 64); do kill -$n 1; done 2>/dev/null; true")
    daemon.run(cell, "sh", "-c", "for n in $(seq 1 64); do kill -$n 1; done", user="0")
    after = daemon.call("sandbox/get", sandbox=cell["id"])
    assert (after["state"], after["pid"]) == ("running", cell["pid"])


def test_init_cannot_be_looked_into_from_inside(daemon: Daemon, cell: Box) -> None:
    assert daemon.sh(cell, "/workspace/trespass trace 1") == "EPERM\n"
    script = "ls /proc/1/fd; ls /proc/1/root/; head -c 1 /proc/1/mem; cat /proc/1/environ; readlink /proc/1/exe; true"
    ran = daemon.run(cell, "sh", "-c", script)
    assert ran.stdout == b""


@pytest.mark.parametrize("user", [None, "0"], ids=["its user", "root inside"])
def test_the_directory_that_init_was_born_in_is_dead(daemon: Daemon, cell: Box, user: str | None) -> None:
    """It is a directory of the host: were it alive, files in it would fill the host's disk, past every limit."""
    script = """
        ls -A /.sandboxd/run; touch /.sandboxd/run/file; mkdir /.sandboxd/run/directory
        ln -s / /.sandboxd/run/link; mkfifo /.sandboxd/run/fifo
    """
    ran = daemon.run(cell, "sh", "-c", script, **_as(user))
    assert ran.stdout == b""
    assert ran.stderr.count(b"No such file or directory") == 4, ran.stderr


def test_inits_own_socket_is_out_of_reach(daemon: Daemon, cell: Box) -> None:
    """Who speaks to it can start commands that nobody knows of."""
    assert daemon.sh(cell, "/workspace/trespass connect /.sandboxd/run/init.sock") == "ENOENT\n"
    assert (daemon.boxes / cell["id"] / "init.sock").is_socket()
    assert sorted(os.listdir(daemon.boxes / cell["id"])) == ["init.sock", "resolv.conf"]


@pytest.mark.parametrize("user", [None, "0"], ids=["its user", "root inside"])
def test_the_programs_of_the_host_cannot_be_changed(daemon: Daemon, cell: Box, user: str | None) -> None:
    """They are the same files for every sandbox."""
    script = "touch /.sandboxd/bin/file; rm -f /.sandboxd/bin/sandbox-init; echo >> /.sandboxd/bin/sandbox-init"
    ran = daemon.run(cell, "sh", "-c", script, **_as(user))
    assert ran.end["exit_code"] != 0
    assert len(ran.stderr.splitlines()) == 3
    (programs,) = (daemon.state / "bin").iterdir()
    assert sorted(os.listdir(programs)) == ["sandbox-init", "sandbox-provoke", "sandbox-shell"]


def test_nothing_of_the_daemons_environment_is_inside(daemon: Daemon, cell: Box) -> None:
    """What is in the environment of a service is often a secret."""
    inside = daemon.sh(cell, "env")
    names = {line.partition("=")[0] for line in inside.splitlines()}
    own = {"HOME", "HOSTNAME", "LANG", "PATH", "PWD", "SHLVL", "TERM", "TMPDIR", "container"}
    assert names <= own | set(THREAD_VARIABLES)
    assert str(daemon.directory) not in inside
