"""Two users of one host, as the kernel tells them apart: neither gets at the other's daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, read_line, running

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to try it")

NOBODY = 65534

ASKING = """
import os, socket, sys
peer = socket.socket(socket.AF_UNIX)
try:
    peer.connect(sys.argv[1])
    said = b""
    while data := peer.recv(65536):
        said += data
    print(said.decode())
except PermissionError as error:
    print(error.strerror)
"""

LISTENING = """
import os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
listening.listen()
print("listening", flush=True)
sys.stdin.read()
listening.settimeout(0)
accepted = listening.accept()[0]
accepted.settimeout(5)
print(accepted.recv(65536))
"""


def as_nobody(script: str, *words: str) -> list[str]:
    """An interpreter of the distribution's, for ours may be where nobody else may look."""
    become = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); "
    return ["/usr/bin/python3", "-c", become + f"exec({script!r})", *words]


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that everybody may walk through."""
    with tempfile.TemporaryDirectory(prefix="sandboxd-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@pytest.fixture
def daemon(reachable: Path) -> Iterator[Daemon]:
    empty = reachable / "bin"
    empty.mkdir()
    with running(Daemon(reachable / "own", env={"PATH": str(empty)}), engines=()) as daemon:
        yield daemon


def asked_by_nobody(daemon: Daemon) -> str:
    words = as_nobody(ASKING, str(daemon.socket))
    return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout


def test_another_user_does_not_even_reach_the_socket(daemon: Daemon) -> None:
    assert asked_by_nobody(daemon).strip() == "Permission denied"


def test_another_user_is_turned_away_although_every_permission_was_given(daemon: Daemon) -> None:
    """Somebody ran chmod -R. What counts is who asks."""
    for path in (daemon.directory, daemon.socket.parent):
        path.chmod(0o755)
    daemon.socket.chmod(0o666)
    answer = asked_by_nobody(daemon)
    assert '"type":"unauthorized"' in answer
    assert '"result"' not in answer
    assert daemon.call("daemon/info")["pid"] == daemon.pid, "its own user is served as before"
    [tried] = [row for row in daemon.call("audit/query", uid=NOBODY)["entries"] if row["kind"] == "refused"]
    assert tried["result"] == "unauthorized"
    assert os.path.basename(tried["exe"] or "").startswith("python"), "it was seen by what"


def test_the_command_line_tells_nothing_to_a_daemon_of_another_user(daemon: Daemon, reachable: Path) -> None:
    """Its environment, its files and its terminal would be in that user's hands."""
    place = reachable / "others"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)
    words = as_nobody(LISTENING, str(place / "s.sock"))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "listening\n"
        done = subprocess.run(
            [sys.executable, "-m", "sandboxd.cli.main", "ls"],
            env={**daemon.env, "SANDBOXD_SOCKET": str(place / "s.sock")},
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 1
        assert f"it is uid {NOBODY}'s" in done.stderr.decode()
        said, _ = other.communicate("", PATIENCE_S)
    assert said.strip() == "b''", "it was connected to, and was told nothing"


def test_a_runtime_directory_that_is_a_symlink_is_refused(reachable: Path) -> None:
    """Whoever made it can turn it elsewhere, between any two looks."""
    daemon = Daemon(reachable / "own")
    (daemon.directory / "run").rename(daemon.directory / "real")
    (daemon.directory / "run").symlink_to(daemon.directory / "real")
    process, ready = daemon.spawn()
    said = json.loads(read_line(ready).removeprefix("error: "))
    assert process.wait(PATIENCE_S) == 1
    assert said["type"] == "unauthorized"
    assert "symlink" in said["detail"]
    assert os.listdir(daemon.directory / "real") == []
