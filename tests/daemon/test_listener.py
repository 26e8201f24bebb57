"""One daemon at a time, in a directory that is ours alone."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd.client import Connection, NotRunning
from sandboxd.failures import Failure, InvalidArgument, Unauthorized
from sandboxd.listener import AlreadyRunning, open_listener


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "sandboxd.sock")


def test_the_socket_and_its_directory_are_the_owners_alone(path: str) -> None:
    """Before the first connection, not soon after."""
    with open_listener(path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700


def test_nothing_is_left_of_a_daemon_that_stopped(path: str) -> None:
    """A client then sees at once that it is not there; only the lock file stays, as it must."""
    open_listener(path).close()
    assert os.listdir(os.path.dirname(path)) == ["sandboxd.lock"]


def test_a_second_daemon_is_refused_and_the_first_goes_on(path: str) -> None:
    """Two would fight over the same sandboxes."""
    with open_listener(path) as first:
        with pytest.raises(AlreadyRunning):
            open_listener(path)
        Connection.connect(first.path).close()


def test_a_socket_that_a_killed_daemon_left_behind_is_taken_over(path: str) -> None:
    """The lock went with the process; the file did not."""
    os.mkdir(os.path.dirname(path), 0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with pytest.raises(NotRunning):
        Connection.connect(path)
    with open_listener(path):
        Connection.connect(path).close()


RACER = """
import sys
from sandboxd.listener import AlreadyRunning, open_listener
sys.stdin.readline()
try:
    listener = open_listener(sys.argv[1])
except AlreadyRunning:
    print("lost", flush=True)
else:
    print("won", flush=True)
sys.stdin.readline()
"""


def test_of_daemons_that_race_one_wins(path: str) -> None:
    """Ten clients may each start one at the same moment."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
    outcomes = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    Connection.connect(path).close()
    for racer in racers:
        racer.communicate("end\n", timeout=10)
    assert sorted(outcomes) == ["lost"] * 5 + ["won"]


def test_a_daemon_removes_only_its_own_socket(path: str) -> None:
    """Its successor may have put another one there."""
    listener = open_listener(path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        listener.close()
        assert os.path.exists(path)


def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    """Home directories and test directories can be deep; the kernel's bound is 107 bytes."""
    path = str(tmp_path / ("d" * 100) / ("e" * 100) / "sandboxd.sock")
    with open_listener(path):
        Connection.connect(path).close()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_directory_that_others_can_write_to_is_refused(path: str, mode: int) -> None:
    """They could replace the socket by their own and read every request."""
    os.mkdir(os.path.dirname(path))
    os.chmod(os.path.dirname(path), mode)
    with pytest.raises(Unauthorized, match=f"{mode:04o}"):
        open_listener(path)


def test_a_symlink_for_a_directory_is_refused(path: str, tmp_path: Path) -> None:
    """Whoever made it can turn it elsewhere."""
    (tmp_path / "real").mkdir(mode=0o700)
    os.symlink(tmp_path / "real", os.path.dirname(path))
    with pytest.raises(Unauthorized, match="symlink"):
        open_listener(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away to try it")
def test_a_directory_of_another_user_is_refused(path: str) -> None:
    """In /tmp anybody can be there first."""
    os.mkdir(os.path.dirname(path), 0o700)
    os.chown(os.path.dirname(path), 65534, 65534)
    with pytest.raises(Unauthorized, match="65534"):
        open_listener(path)


def test_something_else_in_the_sockets_place_is_not_removed(path: str) -> None:
    """A mistyped SANDBOXD_SOCKET must not cost a file."""
    os.mkdir(os.path.dirname(path), 0o700)
    Path(path).write_text("precious")
    with pytest.raises(InvalidArgument):
        open_listener(path)
    assert Path(path).read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_a_failure_in_words() -> None:
    """No traceback where a sentence will do."""
    with pytest.raises(Failure, match="cannot use the directory '/proc/nowhere'"):
        open_listener("/proc/nowhere/sandboxd.sock")


def test_a_refusal_leaves_no_descriptor_open(path: str) -> None:
    """A daemon that is asked again and again must not run out."""
    with open_listener(path):
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(AlreadyRunning):
                open_listener(path)
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_socket_that_was_passed_is_used_and_left_where_it_is(path: str) -> None:
    """The service manager goes on listening on it: whoever connects next starts the next daemon."""
    os.mkdir(os.path.dirname(path), 0o700)
    with socket.socket(socket.AF_UNIX) as passed:
        os.fchmod(passed.fileno(), 0o600)
        passed.bind(path)
        passed.listen()
        with open_listener(path, socket.socket(fileno=os.dup(passed.fileno()))) as listener:
            Connection.connect(path).close()
            listener.socket.accept()[0].close()
            with pytest.raises(AlreadyRunning):
                open_listener(path)
        assert os.path.exists(path)
        Connection.connect(path).close()


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o620])
def test_a_socket_that_was_passed_and_lets_others_in_is_refused(path: str, mode: int) -> None:
    """A unit that somebody edited: the kernel would let in who is then to be turned away."""
    os.mkdir(os.path.dirname(path), 0o700)
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(path)
        os.chmod(path, mode)
        passed.listen()
        with pytest.raises(Unauthorized, match="it must be uid"):
            open_listener(path, socket.socket(fileno=os.dup(passed.fileno())))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket away to try it")
def test_a_socket_of_another_user_is_refused_whoever_made_it(path: str) -> None:
    os.mkdir(os.path.dirname(path), 0o700)
    with socket.socket(socket.AF_UNIX) as passed:
        os.fchmod(passed.fileno(), 0o600)
        passed.bind(path)
        passed.listen()
        os.chown(path, 65534, 65534)
        with pytest.raises(Unauthorized, match="65534"):
            open_listener(path)
        with pytest.raises(Unauthorized, match="65534"):
            open_listener(path, socket.socket(fileno=os.dup(passed.fileno())))
