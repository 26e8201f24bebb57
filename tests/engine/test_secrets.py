"""A secret reaches the sandbox, and no place where anybody else would see it, on each engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.engine.daemons import Daemon

pytestmark = pytest.mark.engine

CANARY = "canary-9c41e77a02"


# Halves, so that no place where the command itself is written down holds it.
SOURCES = {"file": [], "command": ["--shell", "--command", f"printf %s {CANARY[:9]}; printf %s {CANARY[9:]}"]}


@pytest.fixture(params=list(SOURCES))
def token(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[str]:
    done = daemon.ctl("secret", "set", "token", *SOURCES[request.param], stdin=CANARY.encode())
    assert done.returncode == 0, done.stderr
    yield "token"
    assert daemon.ctl("secret", "rm", "token").returncode == 0


def places_with_the_canary(daemon: Daemon) -> list[str]:
    """Files of the daemon's that hold it, besides the one where it is kept."""
    found = []
    for directory, _, names in os.walk(daemon.directory):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink() and CANARY.encode() in path.read_bytes():
                found.append(str(path))
    return [path for path in found if path != str(daemon.state / "secrets" / "token")]


def processes_with_the_canary() -> list[str]:
    """Processes of this host that show it in their arguments or variables."""
    found = []
    for process in psutil.process_iter():
        for name in ("cmdline", "environ"):
            try:
                shown = Path(f"/proc/{process.pid}/{name}").read_bytes()
            except OSError:
                continue
            if CANARY.encode() in shown:
                found.append(f"{process.pid} {name}")
    return found


def test_a_secret_is_inside_and_nowhere_else(daemon: Daemon, engine: str, token: str) -> None:
    with daemon.box(engine, secrets=[token]) as box:
        assert daemon.sh(box, "cat /run/secrets/token") == CANARY
        assert daemon.sh(box, "stat -c '%a %u' /run/secrets/token").split() == ["400", box["user"].split(":")[0]]
        assert daemon.sh(box, "stat -f -c %T /run/secrets/token").strip() == "tmpfs"
        assert CANARY not in daemon.sh(box, "env")
        background = daemon.call("commands/start", sandbox=box["id"], argv=["sleep", "100"])
        known = (
            *(daemon.ctl(*words, "--json").stdout for words in (("inspect", box["id"]), ("ls",), ("secret", "list"))),
            daemon.client(engine, "inspect", box["container_id"]).encode(),
        )
        assert box["secrets"] == ["token"]
        assert all(CANARY.encode() not in shown for shown in known)
        assert processes_with_the_canary() == []
        assert places_with_the_canary(daemon) == []
        daemon.call("commands/kill", sandbox=box["id"], command_id=background["command_id"])


def test_a_secret_in_a_variable_is_refused_wherever_variables_are_taken(
    daemon: Daemon, engine: str, token: str
) -> None:
    refusal = daemon.refusal("sandbox/create", engine=engine, env={"KEY": CANARY})
    assert (refusal.type, "--secret token" in refusal.hint) == ("invalid_argument", True)
    with daemon.box(engine) as box:
        for method in ("commands/run", "commands/start"):
            refusal = daemon.refusal(method, sandbox=box["id"], argv=["true"], env={"KEY": CANARY})
            assert refusal.type == "invalid_argument"
            assert CANARY not in str(refusal)
    assert places_with_the_canary(daemon) == []


def test_no_core_file_can_be_written_that_would_hold_it(daemon: Daemon, engine: str) -> None:
    """Wherever the host has them put: in the project, or into a program of its own."""
    with daemon.box(engine) as box:
        assert daemon.sh(box, "ulimit -Sc; ulimit -Hc").split() == ["0", "0"]
    assert "Max core file size        0                    0 " in Path(f"/proc/{daemon.pid}/limits").read_text()


def test_a_command_that_fails_is_said_before_anything_is_made(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text(CANARY)
    assert daemon.ctl("secret", "set", "gone", "--command", f"cat {value}").returncode == 0
    value.unlink()
    before = daemon.containers(engine)
    done = daemon.ctl("create", "--engine", engine, "--secret", "gone")
    assert (done.returncode, done.stdout) == (1, b"")
    assert f"cat {value}".encode() in done.stderr
    assert daemon.containers(engine) == before
    assert b"command cat" in daemon.ctl("secret", "list").stdout
    assert daemon.ctl("secret", "rm", "gone").returncode == 0


def test_a_secret_is_given_while_it_runs_and_is_there_again_after_a_stop(
    daemon: Daemon, engine: str, token: str
) -> None:
    with daemon.box(engine) as box:
        assert daemon.ctl("secret", "give", box["id"], token).returncode == 0
        assert daemon.sh(box, "cat /run/secrets/token") == CANARY
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        daemon.call("sandbox/start", sandbox=box["id"])
        assert daemon.sh(box, "cat /run/secrets/token") == CANARY


def test_a_secret_that_there_is_not_is_said_before_anything_is_made(daemon: Daemon, engine: str) -> None:
    before = daemon.containers(engine)
    assert daemon.refusal("sandbox/create", engine=engine, secrets=["missing"]).type == "not_found"
    assert daemon.containers(engine) == before
