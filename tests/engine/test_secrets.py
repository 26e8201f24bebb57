"""A secret reaches the sandbox, and no place where anybody else would see it, on each engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.daemon.proxies import AUTHORITY
from tests.engine.daemons import Daemon, running, serving_tls

pytestmark = pytest.mark.engine

CANARY = "canary-9c41e77a02"


SEEN_INSIDE = f"busybox grep -rl '{CANARY[:-1]}[{CANARY[-1]}]' /etc /home /run /tmp /var /workspace 2>/dev/null; env"
"""What of a sandbox's files and variables holds it; the pattern itself does not."""

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


def places_of_the_engine_with_the_canary(daemon: Daemon, engine: str, box: dict[str, Any]) -> list[str]:
    """Files in which the engine keeps this container, its log and its configuration, that hold it."""
    if engine == "docker":
        roots = [Path(daemon.client(engine, "info", "--format={{.DockerRootDir}}").strip(), "containers")]
    else:
        said = daemon.client(engine, "info", "--format={{.Store.GraphRoot}} {{.Store.RunRoot}}")
        roots = [Path(root, "overlay-containers") for root in said.split()]
    files = [
        path
        for root in roots
        for path in (root / box["container_id"]).rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    assert any(path.name in ("config.v2.json", "config.json") for path in files), roots
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


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


def said_of(daemon: Daemon, engine: str, box: dict[str, Any]) -> str:
    """All that the daemon and the engine say of a sandbox to those who ask."""
    of_one = ("sandbox/get", "network/get", "commands/list", "ports/list")
    replies = [
        *(daemon.call(method, sandbox=box["id"]) for method in of_one),
        *(daemon.call(method) for method in ("sandbox/list", "secret/list", "service/list")),
    ]
    events = daemon.ctl("events", "--json").stdout.decode()
    return json.dumps(replies) + events + daemon.client(engine, "inspect", box["container_id"])


def assert_nowhere(daemon: Daemon, engine: str, box: dict[str, Any]) -> None:
    assert box["id"] in (said := said_of(daemon, engine, box))
    assert CANARY not in said
    assert processes_with_the_canary() == []
    assert places_with_the_canary(daemon) == []
    assert places_of_the_engine_with_the_canary(daemon, engine, box) == []


def test_a_secret_is_inside_and_nowhere_else(daemon: Daemon, engine: str, token: str) -> None:
    with daemon.box(engine, secrets=[token]) as box:
        assert daemon.sh(box, "cat /run/secrets/token") == CANARY
        assert daemon.sh(box, "stat -c '%a %u' /run/secrets/token").split() == ["400", box["user"].split(":")[0]]
        assert daemon.sh(box, "stat -f -c %T /run/secrets/token").strip() == "tmpfs"
        assert CANARY not in daemon.sh(box, "env")
        background = daemon.call("commands/start", sandbox=box["id"], argv=["sleep", "100"])
        assert box["secrets"] == ["token"]
        assert daemon.sh(box, SEEN_INSIDE).splitlines()[0] == "/run/secrets/token"
        assert_nowhere(daemon, engine, box)
        daemon.call("commands/kill", sandbox=box["id"], command_id=background["command_id"])


@pytest.fixture(scope="module")
def trusting(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that trusts the authority of the tests' server; the shared one has made the image."""
    with running(Daemon(tmp_path_factory.mktemp("trusting"), env={"SSL_CERT_FILE": AUTHORITY})) as made:
        yield made


@pytest.mark.parametrize("source", list(SOURCES))
def test_what_is_added_to_requests_arrives_there_and_the_sandbox_never_sees_it(
    trusting: Daemon, engine: str, source: str
) -> None:
    assert trusting.ctl("secret", "set", "token", *SOURCES[source], stdin=CANARY.encode()).returncode == 0
    with serving_tls() as server:
        rule = f"127.0.0.1:{server.port} X-Token: Bearer {{token}}"
        done = trusting.ctl(
            "create", "--engine", engine, "--allow", f"127.0.0.1:{server.port}", "--inject", rule, "--json"
        )
        assert done.returncode == 0, done.stderr
        box = json.loads(done.stdout)
        # Not by no_proxy: the server is on the host's loopback, not on the sandbox's.
        fetch = f"no_proxy= busybox wget -q -O - --header 'X-Token: mine' http://127.0.0.1:{server.port}/"
        assert trusting.sh(box, fetch) == "hello"
        assert server.heard == [f"Bearer {CANARY}"]
        (row,) = trusting.call("secret/list")["secrets"]
        assert row["sandboxes"] == [box["id"]]
        known = trusting.call("network/get", sandbox=box["id"])
        assert (known["inject"], known["requests"], known["denied"]) == ([rule], 1, 0)
        assert CANARY not in trusting.sh(box, SEEN_INSIDE)
        assert_nowhere(trusting, engine, box)
        trusting.remove(box)
    assert trusting.ctl("secret", "rm", "token").returncode == 0


def test_what_is_to_be_added_must_be_there_before_anything_is_made(daemon: Daemon, engine: str) -> None:
    before = daemon.containers(engine)
    rule = "api.example.com Authorization: Bearer {missing}"
    assert daemon.refusal("sandbox/create", engine=engine, inject=[rule]).type == "not_found"
    assert daemon.containers(engine) == before


def test_a_secret_in_a_variable_an_argument_or_metadata_is_refused_and_written_down_nowhere(
    daemon: Daemon, engine: str, token: str
) -> None:
    for request in ({"env": {"KEY": CANARY}}, {"metadata": {"note": f"with {CANARY}"}}):
        refusal = daemon.refusal("sandbox/create", engine=engine, **request)
        assert (refusal.type, "--secret token" in refusal.hint) == ("invalid_argument", True)
    with daemon.box(engine) as box:
        for method in ("commands/run", "commands/start"):
            for request in ({"argv": ["true"], "env": {"KEY": CANARY}}, {"argv": ["curl", f"X-Token: {CANARY}"]}):
                refusal = daemon.refusal(method, sandbox=box["id"], **request)
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
    assert (done.returncode, done.stdout) == (4, b"")
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
        assert daemon.ctl("secret", "rm", token).returncode == 1
        assert daemon.ctl("secret", "take", box["id"], token).returncode == 0
        assert daemon.sh(box, "ls -A /run/secrets") == ""


def test_a_secret_that_there_is_not_is_said_before_anything_is_made(daemon: Daemon, engine: str) -> None:
    before = daemon.containers(engine)
    assert daemon.refusal("sandbox/create", engine=engine, secrets=["missing"]).type == "not_found"
    assert daemon.containers(engine) == before
