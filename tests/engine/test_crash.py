"""A daemon that is killed, at any moment, and the one that comes after it, on each engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtimes.model import LABEL_OWNER
from sandboxd.client import NotRunning, RpcError
from tests.engine.daemons import ENGINES, IMAGE, PATIENCE_S, Daemon, read_line, running, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture
def mortal(daemon: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of one test's own. The shared one has seen to the image."""
    with running(Daemon(tmp_path / "mortal")) as mortal:
        yield mortal


def intent_is_written(mortal: Daemon, engine: str) -> bool:
    try:
        return any(record["state"] == "creating" for record in mortal.journal())
    except sqlite3.OperationalError:
        return False


def client_runs(mortal: Daemon, engine: str) -> bool:
    label = f"{LABEL_OWNER}={mortal.owner}"
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "run" in words and any(label in word for word in words):
                return True
    return False


def container_is_listed(mortal: Daemon, engine: str) -> bool:
    return bool(mortal.containers(engine))


def init_listens(mortal: Daemon, engine: str) -> bool:
    return any(mortal.boxes.glob("*/io/init.sock"))


def init_is_connected(mortal: Daemon, engine: str) -> bool:
    return any(mortal.boxes.glob("*/init.sock"))


Moment = Callable[[Daemon, str], bool]

MOMENTS: list[tuple[Moment, Moment]] = [
    (intent_is_written, intent_is_written),
    (client_runs, client_runs),
    (client_runs, container_is_listed),
    (client_runs, init_listens),
    (init_is_connected, init_is_connected),
]
"""When the daemon stops doing anything, and what the world is like when it is killed: the engine goes on."""


def unlabelled(mortal: Daemon, engine: str) -> set[str]:
    """Containers of the test's image without any owner."""
    words = ("ps", "-aq", "--no-trunc", f"--filter=ancestor={IMAGE}")
    return set(mortal.client(engine, *words).split()) - set(
        mortal.client(engine, *words, f"--filter=label={LABEL_OWNER}").split()
    )


def assert_agreement(mortal: Daemon) -> None:
    """What is written down, what the engines have and what the host has is the same."""
    listed = {row["id"]: row for row in mortal.sandboxes()}
    labelled = {engine: set(mortal.containers(engine)) for engine in ENGINES}
    owned = {
        engine: {record["container_id"] for record in mortal.journal() if record["engine"] == engine}
        for engine in ENGINES
    }
    assert labelled == owned
    assert mortal.boxes_left() == sorted(listed)
    assert {row["state"] for row in listed.values()} <= {"running"}
    assert mortal.mounts() == []


@pytest.mark.parametrize(("stops", "dies"), MOMENTS, ids=lambda moment: moment.__name__)
def test_a_daemon_killed_in_the_middle_of_a_create_leaves_nothing_that_nobody_owns(
    mortal: Daemon, engine: str, project: Path, stops: Moment, dies: Moment
) -> None:
    before = unlabelled(mortal, engine)
    with mortal.connect() as connection:
        connection.send("sandbox/create", {"engine": engine, "workspace": {"path": str(project)}})
        wait_until(lambda: stops(mortal, engine), stops.__name__)
        os.kill(mortal.pid, signal.SIGSTOP)
        wait_until(lambda: dies(mortal, engine), dies.__name__)
        mortal.kill()
    mortal.start()
    assert_agreement(mortal)
    assert unlabelled(mortal, engine) == before


def test_a_daemon_killed_as_soon_as_it_has_answered_still_has_its_sandbox(mortal: Daemon, engine: str) -> None:
    """What was promised is kept."""
    box = mortal.create(engine)
    mortal.kill()
    mortal.start()
    assert_agreement(mortal)
    found = mortal.call("sandbox/get", sandbox=box["id"])
    assert (found["state"], found["pid"], found["verified"]) == ("running", box["pid"], True)


def test_a_daemon_killed_in_the_middle_of_a_removal_finishes_it(mortal: Daemon, engine: str) -> None:
    box = mortal.create(engine)
    with mortal.connect() as connection:
        connection.send("sandbox/kill", {"sandbox": box["id"]})
        wait_until(
            lambda: any(record["state"] == "removing" for record in mortal.journal()), "the removal was written down"
        )
        mortal.kill()
    mortal.start()
    assert mortal.sandboxes() == []
    mortal.assert_nothing_left()


def test_commands_in_the_background_outlive_the_daemon_and_others_do_not(mortal: Daemon, engine: str) -> None:
    """Nobody waits any more for what ran in the foreground; what was started to stay, stays."""
    box = mortal.create(engine)
    background = [
        mortal.call("commands/start", sandbox=box["id"], argv=["sh", "-c", f"{wait} exit {number}"])["command_id"]
        for number, wait in ((3, "until [ -e /tmp/go ]; do sleep 0.05; done;"), (4, "sleep 1000;"))
    ]
    fleeting = mortal.connect()
    lost = fleeting.call("sandbox/create", {"engine": engine, "ephemeral": True}, timeout_s=PATIENCE_S)
    fleeting.send("commands/run", {"sandbox": box["id"], "argv": ["sh", "-c", "echo up > /tmp/up; sleep 2000"]})
    wait_until(lambda: mortal.run(box, "test", "-e", "/tmp/up").end["exit_code"] == 0, "it ran in the foreground")
    mortal.kill()
    fleeting.close()
    mortal.start()

    assert [row["id"] for row in mortal.sandboxes()] == [box["id"]]
    assert lost["container_id"] not in mortal.containers(engine)
    wait_until(lambda: "sleep 2000" not in mortal.sh(box, "ps -o args"), "the one in the foreground was ended")
    rows = mortal.call("commands/list", sandbox=box["id"])["commands"]
    running_ids = [row["command_id"] for row in rows if row["state"] == "running"]
    assert sorted(running_ids) == sorted(background), "each of them once"

    mortal.sh(box, "touch /tmp/go")
    end = mortal.call("commands/wait", sandbox=box["id"], command_id=background[0])
    assert (end["exit_code"], end["status"]) == (3, "nonzero")
    end = mortal.call("commands/kill", sandbox=box["id"], command_id=background[1])
    assert end["status"] == "killed"
    assert mortal.call("sandbox/get", sandbox=box["id"])["commands_running"] == 0


def test_a_timeout_holds_although_the_daemon_was_killed_meanwhile(mortal: Daemon, engine: str) -> None:
    box = mortal.create(engine)
    started = mortal.call("commands/start", sandbox=box["id"], argv=["sleep", "1000"], timeout="2s")
    mortal.kill()
    mortal.start()
    end = mortal.call("commands/wait", sandbox=box["id"], command_id=started["command_id"])
    assert end["status"] == "timeout"


def test_what_ended_while_there_was_no_daemon_is_not_running(mortal: Daemon, engine: str) -> None:
    box = mortal.create(engine)
    mortal.kill()
    mortal.client(engine, "kill", box["container_id"])
    wait_until(lambda: not os.path.exists(f"/proc/{box['pid']}"), "it had ended")
    mortal.start()
    assert mortal.state_of(box) == "stopped"
    mortal.kill()
    mortal.client(engine, "rm", "--force", box["container_id"])
    mortal.start()
    assert mortal.state_of(box) == "lost"


def test_sandboxes_and_their_commands_outlive_an_orderly_stop_too(mortal: Daemon, engine: str) -> None:
    box = mortal.create(engine)
    started = mortal.call("commands/start", sandbox=box["id"], argv=["sleep", "1000"])
    assert mortal.stop() == 0
    assert not mortal.socket.exists()
    mortal.start()
    (row,) = mortal.call("commands/list", sandbox=box["id"])["commands"]
    assert (row["command_id"], row["state"]) == (started["command_id"], "running")


def test_a_stop_lets_a_create_in_flight_finish(mortal: Daemon, engine: str) -> None:
    """A service manager's stop must not leave half a sandbox, nor a client without an answer."""
    with mortal.connect() as connection:
        request = connection.send("sandbox/create", {"engine": engine})
        wait_until(lambda: client_runs(mortal, engine), "the engine was asked")
        assert mortal.stop() == 0
        box = connection.wait(request, timeout_s=PATIENCE_S)
    assert box["state"] == "running"
    with pytest.raises(NotRunning):
        mortal.connect()
    mortal.start()
    assert mortal.state_of(box) == "running"


def test_a_socket_that_a_killed_daemon_left_is_taken_over(mortal: Daemon) -> None:
    mortal.kill()
    assert mortal.socket.is_socket()
    with pytest.raises(NotRunning):
        mortal.connect()
    mortal.start()
    assert mortal.call("daemon/info")["pid"] == mortal.pid


def test_sandboxes_whose_runtime_directory_was_cleared_say_so_and_can_be_started_again(mortal: Daemon) -> None:
    """A logout, or a cleaner of temporary files, took the sockets of their inits; their containers may go on."""
    with mortal.box("podman") as box, mortal.box("podman") as other:
        command = mortal.call("commands/start", sandbox=box["id"], argv=["sleep", "1000"], stdio="spool")[
            "command_id"
        ]
        mortal.kill()
        shutil.rmtree(mortal.socket.parent / "boxes")
        mortal.start()
        found = mortal.call("sandbox/get", sandbox=box["id"])
        assert (found["state"], found["commands_running"]) == ("broken", 1)
        assert "somebody has cleared the runtime directory" in found["state_reason"]
        mortal.remove(other)
        assert mortal.call("sandbox/stop", sandbox=box["id"], grace=0)["state"] == "stopped"
        assert mortal.call("sandbox/start", sandbox=box["id"])["verified"]
        assert mortal.sh(box, "echo here") == "here\n"
        (row,) = mortal.call("commands/list", sandbox=box["id"])["commands"]
        assert (row["command_id"], row["state"]) == (command, "ended")


def test_a_second_daemon_on_the_same_socket_leaves_the_first_alone(mortal: Daemon) -> None:
    second, ready = mortal.spawn()
    assert read_line(ready) == "running"
    assert second.wait(PATIENCE_S) == 0
    assert mortal.call("daemon/info")["pid"] == mortal.pid


def test_two_daemons_never_share_a_state_directory(mortal: Daemon, tmp_path: Path) -> None:
    """Each would take the other's sandboxes for nobody's."""
    other = Daemon(tmp_path / "other", env={"SANDBOXD_STATE_DIR": str(mortal.state)})
    process, ready = other.spawn()
    assert read_line(ready).startswith('error: {"type": "conflict"')
    assert process.wait(PATIENCE_S) == 1
    assert mortal.call("daemon/info")["pid"] == mortal.pid


def test_a_request_that_comes_too_late_is_told_so(mortal: Daemon) -> None:
    """And not left without an answer."""
    with mortal.connect() as connection:
        connection.call("daemon/shutdown", {}, timeout_s=PATIENCE_S)
        with pytest.raises(RpcError) as caught:
            connection.call("sandbox/create", {}, timeout_s=PATIENCE_S)
    assert caught.value.type in {"conflict", "disconnected"}
    assert mortal.wait() == 0
