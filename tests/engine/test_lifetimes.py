"""Time that is over on real engines, and what is told of it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sandboxd.client import Sandbox
from tests.engine.daemons import PATIENCE_S, Daemon, ended, running, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory, daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that may be killed. The image is the other one's."""
    with running(Daemon(tmp_path_factory.mktemp("mortal"))) as mortal:
        yield mortal


def events(daemon: Daemon, box: dict[str, Any], *words: str) -> list[dict[str, Any]]:
    """What ``sandboxctl events`` tells of one sandbox, by its id, for it may be gone."""
    done = daemon.ctl("events", "--json", *words, box["id"])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def is_gone(daemon: Daemon, engine: str, box: dict[str, Any]) -> bool:
    return box["container_id"] not in daemon.containers(engine) and daemon.boxes_left().count(box["id"]) == 0


def test_a_sandbox_ends_when_its_lifetime_is_over_and_all_of_it_is_told(daemon: Daemon, engine: str) -> None:
    box = daemon.ctl_json("create", "--engine", engine, "--lifetime", "1h")
    assert (box["lifetime_ms"], box["expires_at_ms"] - box["created_at_ms"]) == (
        3_600_000,
        pytest.approx(3_600_000, 60),
    )
    assert daemon.ctl_json("ls")["sandboxes"][-1]["expires_at_ms"] == box["expires_at_ms"]
    daemon.run(box, "sh", "-c", "exit 3")
    assert daemon.ctl("timeout", box["id"], "1s").returncode == 0
    wait_until(lambda: is_gone(daemon, engine, box), "it was gone")
    told = wait_until(
        lambda: (found := events(daemon, box)) and found[-1]["kind"] == "removed" and found, "its end was told"
    )
    kinds = [event["kind"] for event in told]
    begin = ["created", "command_started", "command_ended", "timeout_changed"]
    assert kinds == [*begin, "expiring", "expired", "removing", "removed"]
    by_kind = {event["kind"]: event["data"] for event in told}
    assert by_kind["command_started"]["argv"] == "sh -c exit 3"
    assert (by_kind["command_ended"]["status"], by_kind["command_ended"]["exit_code"]) == ("nonzero", 3)
    assert (by_kind["expired"]["cause"], by_kind["expired"]["action"]) == ("lifetime", "kill")
    assert [event["kind"] for event in events(daemon, box, "--since", str(told[-3]["seq"]))] == kinds[-2:]
    assert [event["kind"] for event in events(daemon, box, "--kind", "created")] == ["created"]


def test_an_oom_is_told_when_it_happens(daemon: Daemon, engine: str) -> None:
    with daemon.box(engine, limits={"memory": "32m"}) as box:
        daemon.run(box, "sh", "-c", "head -c 100000000 /dev/zero | tail")
        (oom,) = [event for event in events(daemon, box) if event["kind"] == "oom"]
        assert oom["data"]["oom_kills"] >= 1


def test_what_was_over_while_no_daemon_ran_is_removed_at_its_start(mortal: Daemon, engine: str) -> None:
    box = mortal.create(engine)
    kept = mortal.create(engine, lifetime="1h")
    box |= mortal.call("sandbox/set_timeout", sandbox=box["id"], lifetime="3s")
    mortal.kill()
    wait_until(lambda: time.time() * 1000 > box["expires_at_ms"], "its time was over")
    assert box["container_id"] in mortal.containers(engine), "nobody was there to end it"
    mortal.start()
    wait_until(lambda: is_gone(mortal, engine, box), "it was gone")
    assert mortal.call("sandbox/get", sandbox=kept["id"])["expires_at_ms"] == kept["expires_at_ms"]
    assert [(event["kind"], event["data"]["reason"]) for event in events(mortal, kept)] == [
        ("adopted", "its container runs")
    ]
    mortal.remove(kept)


def test_an_idle_sandbox_is_paused_and_work_in_it_keeps_it(daemon: Daemon, engine: str) -> None:
    """A loop in the background is work; a sleeping server is not, and a command that somebody waits for is."""
    with daemon.box(engine, idle_timeout="1s", on_timeout="pause") as box:
        ref = {"sandbox": box["id"]}
        loop = daemon.call("commands/start", **ref, argv=["sh", "-c", "while true; do true; done"])
        daemon.call("commands/start", **ref, argv=["sleep", "1000"])
        daemon.run(box, "sleep", "3")
        assert daemon.state_of(box) == "running", "somebody waited"
        begun = time.monotonic()
        while time.monotonic() < begun + 3:
            assert daemon.state_of(box) == "running", "the loop works, and looking at it does not keep it"
            time.sleep(0.2)
        daemon.call("commands/kill", **ref, command_id=loop["command_id"])
        wait_until(lambda: daemon.state_of(box) == "paused", "it was paused")
        assert "nothing happened in it for 1s" in daemon.call("sandbox/get", **ref)["state_reason"]
        assert daemon.client(engine, "inspect", "--format={{.State.Status}}", box["container_id"]).strip() == "paused"
        assert "sandboxctl resume" in daemon.refusal("commands/run", **ref, argv=["true"]).hint


def test_agent_code_sets_timeouts_pauses_and_comes_back(
    daemon: Daemon, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names that it knows."""
    monkeypatch.setenv("SANDBOXD_SOCKET", str(daemon.socket))
    with Sandbox.create(engine=engine, timeout=600, on_timeout="pause", idle_timeout=300) as box:
        info = box.get_info()
        assert info.end_at is not None
        assert (info.end_at - info.started_at).total_seconds() == pytest.approx(600, abs=60)
        assert (info.idle_timeout, info.on_timeout) == (300, "pause")
        box.set_timeout(1200)
        assert (box.get_info().end_at or info.end_at) > info.end_at
        box.touch()
        box.pause()
        assert (box.is_running(), box.get_info().end_at) == (False, None)
        again = Sandbox.connect(box.sandbox_id, timeout=3600)
        assert again.commands.run("echo back").stdout == "back\n"
        end_at = again.get_info().end_at
        assert end_at is not None
        assert end_at.timestamp() - time.time() == pytest.approx(3600, abs=60)
        Sandbox.resume(box.sandbox_id, timeout=5)
        assert again.get_info().end_at == end_at, "connecting never shortens it"


def test_whoever_follows_is_told_as_it_happens(daemon: Daemon, engine: str) -> None:
    """With a number to go on from: what was missed comes first."""
    argv = daemon.ctl_argv("events", "--follow", "--json", "--kind", "created", "--kind", "removed")
    with (
        subprocess.Popen(argv, stdout=subprocess.PIPE, env=daemon.env, text=True) as follower,
        ended(follower),  # type: ignore[arg-type]
    ):
        assert follower.stdout is not None
        box = daemon.create(engine)
        lines = (json.loads(line) for line in follower.stdout)
        created = next(line for line in lines if line["sandbox"] == box["id"])
        daemon.remove(box)
        removed = next(line for line in lines if line["sandbox"] == box["id"])
    assert (created["kind"], removed["kind"]) == ("created", "removed")
    with daemon.connect() as connection:
        request = connection.send(
            "events/subscribe", {"since": created["seq"], "sandbox": box["id"], "follow": False}
        )
        seen: list[dict[str, Any]] = []
        connection.wait(request, lambda message: seen.append(message.content), timeout_s=PATIENCE_S)
    assert seen[0]["method"] == "events/begun"
    assert [message["params"]["kind"] for message in seen[1:]] == ["removing", "removed"]
