"""Frozen and let go again, on each engine: what is kept, what is refused, and that it can be removed all the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import kernel
from tests.engine.daemons import Daemon, running, wait_until

pytestmark = pytest.mark.engine

COUNTING = "n=0; while true; do n=$((n+1)); echo $n > /tmp/n; done"


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory, daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that may be killed. The image is the other one's."""
    with running(Daemon(tmp_path_factory.mktemp("mortal"))) as mortal:
        yield mortal


def status_of(daemon: Daemon, engine: str, container_id: str) -> str:
    """By the engine's own word."""
    return daemon.client(engine, "inspect", "--format={{.State.Status}}", container_id).strip()


def test_a_paused_sandbox_takes_no_cpu_time_and_goes_on_where_it_was(daemon: Daemon, engine: str) -> None:
    with daemon.box(engine) as box:
        ref = {"sandbox": box["id"]}
        command = daemon.call("commands/start", **ref, argv=["sh", "-c", COUNTING])["command_id"]
        wait_until(lambda: daemon.sh(box, "cat /tmp/n 2>/dev/null || true").strip(), "it counts")
        paused = daemon.call("sandbox/pause", **ref)
        print(f"{engine}: paused in {paused['timings_ms']['total']} ms")
        assert (paused["state"], paused["verified"], paused["pid"]) == ("paused", True, box["pid"])
        assert status_of(daemon, engine, box["container_id"]) == "paused"
        assert daemon.call("sandbox/pause", **ref)["state"] == "paused", "a second time does nothing"
        readings = [daemon.call("sandbox/metrics", sandboxes=[box["id"]])["sandboxes"][0] for _ in range(2)]
        assert readings[0]["cpu_us"] == readings[1]["cpu_us"] is not None
        for method, params in (
            ("commands/run", {"argv": ["true"]}),
            ("commands/kill", {"command_id": command}),
            ("files/stat", {"path": "/tmp"}),
            ("sandbox/update", {"limits": {"pids": 60}}),
        ):
            refusal = daemon.refusal(method, **ref, **params)
            assert (refusal.type, refusal.hint) == ("conflict", f"sandboxctl resume {box['id']}"), method
        resumed = daemon.call("sandbox/resume", **ref)
        print(f"{engine}: resumed in {resumed['timings_ms']['total']} ms")
        assert (resumed["state"], resumed["verified"], resumed["pid"]) == ("running", True, box["pid"])
        assert status_of(daemon, engine, box["container_id"]) == "running"
        assert daemon.call("sandbox/resume", **ref)["state"] == "running", "a second time does nothing"
        (row,) = daemon.call("commands/list", **ref)["commands"]
        assert (row["command_id"], row["state"]) == (command, "running")
        daemon.call("sandbox/pause", **ref)
        assert daemon.call("sandbox/stop", **ref)["state"] == "stopped"


def test_a_paused_sandbox_is_killed_at_once_and_removed(daemon: Daemon, engine: str) -> None:
    """What is frozen cannot even die by itself."""
    box = daemon.create(engine)
    daemon.call("sandbox/pause", sandbox=box["id"])
    assert daemon.call("sandbox/kill", sandbox=box["id"])["gone"] is False
    wait_until(lambda: not Path(f"/proc/{box['pid']}").exists(), "its init was gone")
    wait_until(lambda: box["container_id"] not in daemon.containers(engine), "its container was gone")


def test_a_paused_sandbox_outlives_the_daemon_and_so_do_its_commands(mortal: Daemon, engine: str) -> None:
    with mortal.box(engine) as box:
        ref = {"sandbox": box["id"]}
        ended = mortal.call("commands/start", **ref, argv=["sh", "-c", "echo said"], stdio="spool")["command_id"]
        mortal.call("commands/wait", **ref, command_id=ended)
        argv = ["sh", "-c", "echo begun; while [ ! -e /tmp/go ]; do sleep 0.01; done; echo done"]
        command = mortal.call("commands/start", **ref, argv=argv, stdio="spool", timeout="10m")["command_id"]
        wait_until(lambda: mortal.ctl("logs", box["id"], command).stdout == b"begun\n", "it had begun")
        assert mortal.ctl("pause", box["id"]).returncode == 0
        mortal.kill()
        mortal.start()
        found = mortal.call("sandbox/get", **ref)
        assert (found["state"], found["state_reason"], found["commands_running"]) == ("paused", "", 1)
        rows = {row["command_id"]: row["state"] for row in mortal.call("commands/list", **ref)["commands"]}
        assert rows == {ended: "ended", command: "running"}, "what is frozen has not ended"
        assert [mortal.ctl("logs", box["id"], each).stdout for each in rows] == [b"said\n", b"begun\n"]
        assert mortal.ctl("exec", box["id"], "true").stderr.count(b"sandboxctl resume") == 1
        assert mortal.ctl("resume", box["id"]).returncode == 0
        assert mortal.sh(box, "echo up") == "up\n"
        rows = {row["command_id"]: row["state"] for row in mortal.call("commands/list", **ref)["commands"]}
        assert rows == {ended: "ended", command: "running"}
        assert len(kernel.processes(box["pid"])) > 1
        mortal.sh(box, "touch /tmp/go")
        assert mortal.call("commands/wait", **ref, command_id=command)["status"] == "ok"
        assert mortal.ctl("logs", box["id"], command).stdout == b"begun\ndone\n"


def test_what_podman_takes_for_paused_and_runs_goes_on_all_the_same(daemon: Daemon) -> None:
    """A client of Podman's that is killed in the middle of an unpause leaves it so, and Podman never finds out."""
    with daemon.box("podman") as box:
        daemon.call("sandbox/pause", sandbox=box["id"])
        runtime = daemon.client("podman", "inspect", "--format={{.OCIRuntime}}", box["container_id"]).strip()
        subprocess.run([runtime, "resume", box["container_id"]], check=True)
        assert status_of(daemon, "podman", box["container_id"]) == "paused"
        resumed = daemon.call("sandbox/resume", sandbox=box["id"])
        assert (resumed["state"], resumed["pid"]) == ("running", box["pid"])
        assert status_of(daemon, "podman", box["container_id"]) == "running"
        assert daemon.sh(box, "echo up") == "up\n"
