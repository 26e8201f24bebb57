"""Stopped, started, removed, lost: what a sandbox keeps and what it leaves, on each engine."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.engine import kernel
from tests.engine.conftest import Box
from tests.engine.daemons import IMAGE, PATIENCE_S, Daemon, ended, wait_until

pytestmark = pytest.mark.engine


def gone(daemon: Daemon, engine: str, sandbox_id: str) -> bool:
    """Neither the daemon, nor the host, nor the engine knows of it."""
    return (
        sandbox_id not in {row["id"] for row in daemon.sandboxes()}
        and sandbox_id not in daemon.boxes_left()
        and daemon.client(engine, "ps", "-aq", f"--filter=label=io.sandboxd.sandbox={sandbox_id}") == ""
    )


def test_a_stopped_sandbox_starts_again_with_its_project_and_its_limits(
    daemon: Daemon, engine: str, project: Path
) -> None:
    """The engine would start it with the limits of its creation: a later update must not be lost."""
    limits = {"memory": "64m", "cpus": "0.5", "pids": 64, "tmp": "8m"}
    with daemon.box(engine, workspace={"path": str(project)}, limits=limits, env={"KEPT": "1"}) as box:
        daemon.sh(box, "echo kept > file; echo lost > /tmp/file")
        daemon.call("sandbox/update", sandbox=box["id"], limits={"memory": "80m", "cpus": "0.25", "pids": 48})
        stopped = daemon.call("sandbox/stop", sandbox=box["id"])
        assert (stopped["state"], stopped["pid"]) == ("stopped", None)
        assert daemon.call("sandbox/stop", sandbox=box["id"])["state"] == "stopped", "a second stop does nothing"
        assert daemon.refusal("commands/run", sandbox=box["id"], argv=["true"]).type == "conflict"
        assert daemon.refusal("sandbox/update", sandbox=box["id"], limits={"pids": 60}).type == "conflict"
        assert daemon.mounts() == []

        started = daemon.call("sandbox/start", sandbox=box["id"])
        assert (started["state"], started["verified"]) == ("running", True)
        assert daemon.call("sandbox/start", sandbox=box["id"])["pid"] == started["pid"], "a second start does nothing"
        held = kernel.held(started["pid"])
        assert (held.memory, held.cpu_millis, held.pids) == (80 * 1024 * 1024, 250, 48)
        assert held.tmp == 8 * 1024 * 1024
        assert daemon.sh(box, "cat file; ls /tmp; echo $KEPT; id -u").split() == ["kept", "1", "1000"]
        assert daemon.mounts() == []


def test_a_removed_sandbox_leaves_no_trace(daemon: Daemon, engine: str, project: Path) -> None:
    box = daemon.create(engine, workspace={"path": str(project)})
    daemon.call("commands/start", sandbox=box["id"], argv=["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"])
    groups = {kernel.group_of(box["pid"], name)[0] for name in ("memory", "cpu", "pids", "cpuset")}
    assert all(os.path.isdir(group) for group in groups)
    daemon.remove(box)
    assert gone(daemon, engine, box["id"])
    wait_until(lambda: not any(os.path.exists(group) for group in groups), "its control groups were gone")
    assert daemon.mounts() == []
    assert not os.path.exists(f"/proc/{box['pid']}")
    assert project.is_dir(), "the project is nobody's to remove"
    assert daemon.refusal("sandbox/get", sandbox=box["id"]).type == "not_found"


def test_a_kill_is_answered_before_the_engine_has_removed_anything(daemon: Daemon, engine: str) -> None:
    """No trap, no fork storm and no stopped process holds it up; its name is free at once."""
    box = daemon.create(engine, name="quick", limits={"pids": 100, "cpus": "0.2"})
    for script in ("trap '' TERM HUP INT; sleep 1000", "kill -STOP $$", "while true; do sleep 0 & done"):
        daemon.call("commands/start", sandbox=box["id"], argv=["sh", "-c", script])
    killed = daemon.call("sandbox/kill", sandbox=box["id"])
    assert (killed["id"], killed["gone"]) == (box["id"], False)
    print(f"{engine}: killed in {killed['timings_ms']['total']} ms")
    assert daemon.refusal("sandbox/get", sandbox=box["id"]).type == "not_found"
    with daemon.box(engine, name="quick"):
        pass
    wait_until(lambda: not os.path.exists(f"/proc/{box['pid']}"), "its init was gone")
    wait_until(lambda: gone(daemon, engine, box["id"]), "it was gone")


def test_a_kill_that_waits_returns_when_nothing_is_left(daemon: Daemon, engine: str) -> None:
    """Also when somebody else began it."""
    box = daemon.create(engine)
    daemon.call("sandbox/kill", sandbox=box["id"])
    assert daemon.refusal("sandbox/kill", sandbox=box["id"]).type == "not_found"
    done = daemon.ctl("rm", "-f", "--wait", box["id"])
    assert done.returncode == 0, done.stderr
    assert gone(daemon, engine, box["id"])
    box = daemon.create(engine)
    assert daemon.ctl("rm", "--wait", box["id"]).returncode == 0
    assert gone(daemon, engine, box["id"])


def test_a_container_that_was_removed_behind_our_back_is_lost_and_can_be_removed(daemon: Daemon, engine: str) -> None:
    """Somebody tidied up with the engine's own client."""
    with daemon.box(engine) as box:
        daemon.client(engine, "rm", "--force", box["container_id"])
        wait_until(lambda: daemon.state_of(box) == "lost", "it was noticed")
        assert "no longer has" in daemon.call("sandbox/get", sandbox=box["id"])["state_reason"]
        assert daemon.refusal("sandbox/start", sandbox=box["id"]).type == "sandbox_gone"
        daemon.remove(box)
        assert gone(daemon, engine, box["id"])


def test_a_container_that_was_stopped_behind_our_back_is_stopped_and_can_be_started(
    daemon: Daemon, engine: str
) -> None:
    with daemon.box(engine) as box:
        with daemon.connect() as connection:
            request = connection.send("commands/run", {"sandbox": box["id"], "argv": ["sleep", "1000"]})
            daemon.client(engine, "kill", box["container_id"])
            end = connection.wait(request, timeout_s=PATIENCE_S)
        assert end["status"] == "lost", "whoever waits for a command is told"
        wait_until(lambda: daemon.state_of(box) == "stopped", "it was noticed")
        assert "137" in daemon.call("sandbox/get", sandbox=box["id"])["state_reason"]
        assert daemon.call("sandbox/start", sandbox=box["id"])["verified"] is True
        assert daemon.sh(box, "echo up") == "up\n"


def test_an_image_that_was_removed_is_missed_by_new_sandboxes_alone(daemon: Daemon, engine: str) -> None:
    """What runs goes on, is started again and removed; a new one is told what to type."""
    image = f"localhost/sandboxd/removed:{engine}"
    daemon.client(engine, "tag", IMAGE, image)
    with daemon.box(engine, image=image) as box:
        daemon.client(engine, "rmi", image)
        assert daemon.sh(box, "echo on") == "on\n"
        refusal = daemon.refusal("sandbox/create", engine=engine, image=image)
        assert refusal.type == "prerequisite_missing"
        assert refusal.hint.endswith(f"{engine} pull {image}")
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        daemon.call("sandbox/start", sandbox=box["id"])
        assert daemon.sh(box, "echo again") == "again\n"
    assert box["container_id"] not in daemon.containers(engine)


def test_an_ephemeral_sandbox_goes_with_its_connection(daemon: Daemon, engine: str) -> None:
    with daemon.connect() as connection:
        params = {"engine": engine, "ephemeral": True}
        box = connection.call("sandbox/create", params, timeout_s=PATIENCE_S)
        assert daemon.state_of(box) == "running"
    wait_until(lambda: gone(daemon, engine, box["id"]), "it was gone")


def test_a_sandbox_whose_maker_went_away_too_early_is_removed(daemon: Daemon, engine: str) -> None:
    """Nobody will ever know its id."""
    before = {row["id"] for row in daemon.sandboxes()}
    with daemon.connect() as connection:
        connection.send("sandbox/create", {"engine": engine})
        (box,) = wait_until(lambda: [row for row in daemon.sandboxes() if row["id"] not in before], "it was begun")
    wait_until(lambda: gone(daemon, engine, box["id"]), "it was gone")


def test_a_one_shot_is_removed_though_its_client_was_killed(daemon: Daemon, engine: str) -> None:
    before = {row["id"] for row in daemon.sandboxes()}
    argv = daemon.ctl_argv("run", "--rm", "--engine", engine, "--", "sh", "-c", "echo ready; sleep 1000")
    with ended(subprocess.Popen(argv, stdout=subprocess.PIPE, env=daemon.env)) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        (box,) = (row for row in daemon.sandboxes() if row["id"] not in before)
        client.send_signal(signal.SIGKILL)
    wait_until(lambda: gone(daemon, engine, box["id"]), "it was gone")


def test_a_name_belongs_to_one_sandbox_at_a_time(daemon: Daemon, engine: str) -> None:
    with daemon.box(engine, name="mine") as box:
        refusal = daemon.refusal("sandbox/create", engine=engine, name="mine")
        assert refusal.type == "conflict"
        assert "sandboxctl exec mine" in refusal.hint
        assert daemon.call("sandbox/get", sandbox="mine")["id"] == box["id"]
        assert daemon.sh(box, "hostname") == "mine\n"
    with daemon.box(engine, name="mine"):
        pass
    assert daemon.refusal("sandbox/create", engine=engine, name=box["id"]).type == "invalid_argument"


def test_an_image_that_is_not_there_is_said_and_nothing_is_left(daemon: Daemon, engine: str) -> None:
    refusal = daemon.refusal("sandbox/create", engine=engine, image="localhost/no/such:image")
    assert refusal.type == "prerequisite_missing"
    assert refusal.hint.endswith(f"{engine} pull localhost/no/such:image")
    assert len(daemon.containers(engine)) == len([row for row in daemon.sandboxes() if row["engine"] == engine])


def test_a_stopping_sandbox_gives_its_commands_time_only_if_told(daemon: Daemon, engine: str) -> None:
    with daemon.box(engine) as box:
        daemon.call(
            "commands/start", sandbox=box["id"], argv=["sh", "-c", "trap '' TERM; while true; do sleep 1; done"]
        )
        assert daemon.call("sandbox/stop", sandbox=box["id"], grace=0)["state"] == "stopped"
        assert daemon.call("sandbox/start", sandbox=box["id"])["commands_running"] == 0


def test_both_engines_are_driven_at_once(daemon: Daemon) -> None:
    """One daemon, one connection, and an answer to each as it is ready."""
    engines = ("podman", "docker")
    with daemon.connect() as connection:
        requests = {name: connection.send("sandbox/create", {"engine": name}) for name in engines}
        boxes: dict[str, Box] = {
            name: connection.wait(request, timeout_s=PATIENCE_S) for name, request in requests.items()
        }
        try:
            for name, box in boxes.items():
                assert box["engine"] == name
                assert box["container_id"] in daemon.containers(name)
                assert daemon.sh(box, "echo here") == "here\n"
        finally:
            for box in boxes.values():
                connection.call("sandbox/kill", {"sandbox": box["id"], "wait": True}, timeout_s=PATIENCE_S)


def test_a_sandbox_that_is_removed_by_three_at_once_is_removed_for_all(daemon: Daemon, engine: str) -> None:
    box = daemon.create(engine)
    with daemon.connect() as connection:
        requests = [connection.send("sandbox/kill", {"sandbox": box["id"], "wait": True}) for _ in range(3)]
        replies = [connection.wait(request, timeout_s=PATIENCE_S) for request in requests]
    assert {reply["id"] for reply in replies} == {box["id"]}
    assert gone(daemon, engine, box["id"])


def test_a_sandbox_whose_container_is_gone_says_so_when_it_is_started(daemon: Daemon, engine: str) -> None:
    """And what to do: starting it again will never work."""
    with daemon.box(engine) as box:
        daemon.call("sandbox/stop", sandbox=box["id"])
        daemon.client(engine, "rm", "-f", box["container_id"])
        refusal = daemon.refusal("sandbox/start", sandbox=box["id"])
        assert refusal.type == "sandbox_gone"
        assert refusal.hint == f"sandboxctl rm {box['id']}"
        assert daemon.state_of(box) == "lost"


def test_what_does_not_run_is_not_called_verified(daemon: Daemon, engine: str) -> None:
    """Nothing was read: the reason is that it is stopped, and not some controller."""
    with daemon.box(engine) as box:
        daemon.call("sandbox/stop", sandbox=box["id"])
        stopped = daemon.call("sandbox/get", sandbox=box["id"])
        assert stopped["verified"] is False
        assert {limit["reason"] for limit in stopped["limits"]} == {"it is stopped"}
        assert daemon.refusal("sandbox/verify", sandbox=box["id"]).type == "conflict"


def test_whoever_waits_for_a_command_is_told_that_its_sandbox_was_removed(daemon: Daemon, engine: str) -> None:
    """We ended it, and say so at once: it is not lost, and nobody is left hanging."""
    box = daemon.create(engine)
    with daemon.connect() as connection:
        request = connection.send("commands/run", {"sandbox": box["id"], "argv": ["sleep", "1000"]})
        wait_until(
            lambda: [row["pid"] for row in daemon.call("commands/list", sandbox=box["id"])["commands"] if row["pid"]],
            "it runs",
        )
        daemon.remove(box)
        end = connection.wait(request, timeout_s=PATIENCE_S)
    assert (end["status"], end["exit_code"]) == ("killed", None)


def test_a_paused_sandbox_is_out_of_reach_until_it_runs_again_and_its_timeouts_still_hold(daemon: Daemon) -> None:
    """Somebody paused it behind our back: what could not be ended in time is ended as soon as it can be."""
    with daemon.box("docker") as box:
        ref = {"sandbox": box["id"]}
        ref |= {
            "command_id": daemon.call("commands/start", **ref, argv=["sleep", "1000"], timeout="1s")["command_id"]
        }
        daemon.client("docker", "pause", box["container_id"])
        wait_until(lambda: "cannot end command" in daemon.log.read_text(), "the daemon has tried to end it")
        daemon.client("docker", "unpause", box["container_id"])
        end = daemon.call("commands/wait", **ref)
        assert end["status"] == "timeout"
        assert daemon.state_of(box) == "running"


def test_limits_that_could_not_be_changed_leave_the_policy_as_it_was(daemon: Daemon, engine: str) -> None:
    """A failed update with ``degraded`` must not make the sandbox a degraded one for good."""
    with daemon.box(engine, limits={"memory": "64m"}) as box:
        fill = "head -c 30000000 /dev/zero > /tmp/fill"
        daemon.sh(box, fill)
        params = {"sandbox": box["id"], "limits": {"memory": "16m"}, "limits_policy": "degraded"}
        assert daemon.refusal("sandbox/update", **params).type == "conflict"
        after = daemon.call("sandbox/get", sandbox=box["id"])
        assert (after["limits_policy"], after["verified"]) == ("strict", True)


@pytest.mark.parametrize("env", [{"A": "nul\0inside"}, {"": "x"}, {"A=B": "x"}, {"A": "x" * 200_000}])
def test_variables_that_no_process_could_have_are_refused_at_once(daemon: Daemon, env: dict[str, str]) -> None:
    """Otherwise every command of that sandbox would fail later. What the variable holds is not repeated."""
    refusal = daemon.refusal("sandbox/create", env=env)
    assert refusal.type == "invalid_argument"
    assert "inside" not in str(refusal)


def test_another_users_command_that_takes_too_long_is_a_timeout(daemon: Daemon, engine: str) -> None:
    """The same verdict as on the fast road."""
    with daemon.box(engine) as box:
        end = daemon.run(box, "sleep", "30", user="0", timeout="1s").end
    assert (end["status"], end["exit_code"]) == ("timeout", None)
