"""What a service manager passes is taken once, and reaches nothing that the daemon starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.process import SERVICE_VARIABLES, client_environment
from sandboxd.activation import Activation, take_over

# What the user's systemd 257 of Debian 13 sets for a service, seen in one.
SEEN = {
    "INVOCATION_ID": "3863d610cab247728d55ebf265418a42",
    "JOURNAL_STREAM": "8:1626548",
    "LISTEN_FDNAMES": "sandboxd.socket",
    "LISTEN_FDS": "1",
    "LISTEN_PID": "198",
    "MANAGERPID": "165",
    "MEMORY_PRESSURE_WATCH": "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/memory.pressure",
    "MEMORY_PRESSURE_WRITE": "c29tZSAyMDAwMDAgMjAwMDAwMAA=",
    "NOTIFY_SOCKET": "/run/user/1000/systemd/notify",
    "SYSTEMD_EXEC_PID": "198",
}
KEPT = {"HOME": "/home/ann", "PATH": "/usr/bin", "XDG_RUNTIME_DIR": "/run/user/1000"}


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A manager's end of the conversation."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.setblocking(False)
        yield path, manager


def test_nothing_of_the_service_is_left_in_the_environment() -> None:
    """With LISTEN_FDS Podman 5.4 does not start; with INVOCATION_ID its monitor dies with the daemon."""
    environ = {**SEEN, **KEPT}
    take_over(environ)
    assert environ == KEPT
    assert SEEN.keys() <= SERVICE_VARIABLES
    assert client_environment({**SEEN, **KEPT}) == KEPT


def test_descriptors_for_another_process_are_not_ours() -> None:
    """The variables are inherited by whoever a service starts."""
    assert take_over({**SEEN, "LISTEN_PID": str(os.getpid() + 1)}).listening is None
    assert take_over({"LISTEN_PID": str(os.getpid())}).listening is None


def test_the_manager_is_told_that_we_serve(notified: tuple[str, socket.socket]) -> None:
    path, manager = notified
    take_over({"NOTIFY_SOCKET": path, "SYSTEMD_EXEC_PID": str(os.getpid())}).tell("READY=1")
    assert manager.recv(100) == b"READY=1"
    take_over({"NOTIFY_SOCKET": path}).tell("STOPPING=1")
    assert manager.recv(100) == b"STOPPING=1"


def test_an_abstract_address_begins_with_an_at_sign() -> None:
    name = f"sandboxd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        take_over({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_a_service_that_a_client_runs_in_is_not_told(notified: tuple[str, socket.socket]) -> None:
    """It would be called ready, or stopping, for what its child did."""
    path, manager = notified
    take_over({"NOTIFY_SOCKET": path, "SYSTEMD_EXEC_PID": str(os.getpid() + 1)}).tell("READY=1")
    with pytest.raises(BlockingIOError):
        manager.recv(100)


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative", "/nowhere/at/all"])
def test_a_manager_that_cannot_be_told_is_no_failure(address: str) -> None:
    take_over({"NOTIFY_SOCKET": address}).tell("READY=1")
    Activation(None, "").tell("READY=1")


TAKER = """
import os, socket, sys
from sandboxd.failures import Failure
from sandboxd.activation import take_over
os.environ["LISTEN_PID"] = str(os.getpid())
os.dup2(int(sys.argv[1]), 3)
try:
    taken = take_over(os.environ)
except Failure as failure:
    print(failure.type, failure.detail, failure.hint, sep="|")
else:
    print(taken.listening.getsockname() if taken.listening else None, os.get_inheritable(3))
"""


def taken(passed: int, count: str = "1") -> str:
    """What a process makes of a descriptor that it gets as its number 3."""
    argv = [sys.executable, "-c", TAKER, str(passed)]
    env = {"LISTEN_FDS": count, "PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(argv, env=env, pass_fds=(passed,), capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.strip()


def test_a_listening_socket_is_taken_and_kept_from_children(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        assert taken(listening.fileno()) == f"{path} False"
        assert taken(listening.fileno(), "0").startswith("None")
        assert taken(listening.fileno(), "nonsense").startswith("None")


@pytest.mark.parametrize("kind", ["datagram", "internet", "connected", "file"])
def test_anything_else_is_refused(kind: str, tmp_path: Path) -> None:
    """A unit that somebody has changed."""
    if kind == "file":
        with open(tmp_path / "f", "wb") as file:
            assert taken(file.fileno()).startswith("invalid_argument|")
        return
    family = socket.AF_INET if kind == "internet" else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM) as passed:
        assert taken(passed.fileno()).startswith("invalid_argument|it passed")
        assert taken(passed.fileno()).endswith("|sandboxctl daemon install")


LEFT = """
import os, socket, sys
from sandboxd.activation import take_over
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    (_, writing), (reading, _) = os.pipe(), os.pipe()
    # First out of the way: the numbers that are given may be among those that are taken.
    for place, number in enumerate((listening.fileno(), writing, reading)):
        os.dup2(number, 100 + place)
for place in range(3):
    os.dup2(100 + place, 3 + place)
names = "sandboxd-handover:stdin.sb-a.00000000002a:stdin.sb-a.00000000002b"
taken = take_over({"LISTEN_FDS": "3", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": names})
kept = taken.kept
assert list(kept.names) == names.split(":")[1:]
print(taken.handed_over, taken.listening.fileno(), *(kept.take("sb-a", number) for number in (42, 42, 43)))
"""


def test_what_a_daemon_before_has_left_comes_by_its_names(tmp_path: Path) -> None:
    """A socket, and the stdins of two commands, of which one is no writing end and so is not taken for one."""
    argv = [sys.executable, "-c", LEFT, str(tmp_path / "s")]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "True 3 4 None None\n"


def test_what_is_stored_goes_with_its_name(notified: tuple[str, socket.socket]) -> None:
    """To a service manager that passes it on, and must let go of its own copy then: else no stdin ends."""
    path, manager = notified
    read_end, write_end = os.pipe()
    try:
        take_over({"NOTIFY_SOCKET": path}).store("stdin.sb-a.00000000002a", write_end)
        said, (copy,), _, _ = socket.recv_fds(manager, 100, 4)
        assert said == b"FDSTORE=1\nFDNAME=stdin.sb-a.00000000002a"
        os.write(copy, b"through it")
        os.close(copy)
        assert os.read(read_end, 100) == b"through it"
        take_over({"NOTIFY_SOCKET": path}).unstore("stdin.sb-a.00000000002a")
        assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=stdin.sb-a.00000000002a"
    finally:
        os.close(read_end)
        os.close(write_end)
