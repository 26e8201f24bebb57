"""The audit log of a daemon that is at work: which sandbox, with which arguments, and what a killed one was at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import RpcError
from tests.engine.daemons import Daemon, running, wait_until

CANARY = "the-canary-sings"


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory, daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that may be killed; the shared one is only needed for its image."""
    with running(Daemon(tmp_path_factory.mktemp("mortal"))) as mortal:
        yield mortal


def lines(daemon: Daemon, **wanted: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = daemon.call("audit/query", **wanted)["entries"]
    return found


def test_the_story_of_a_sandbox_is_in_the_log_by_its_id_and_no_value_of_a_variable(
    mortal: Daemon, engine: str
) -> None:
    box = mortal.create(engine, name="story", env={"TOKEN": CANARY}, limits={"memory": "48m"}, metadata={"k": CANARY})
    mortal.sh({"id": "story"}, "true", env={"OTHER": CANARY})
    mortal.call("files/write", sandbox="story", path="/tmp/f", data="dGhlLWNhbmFyeS1zaW5ncw==")
    mortal.remove(box)
    story = [row for row in lines(mortal, sandbox=box["id"]) if row["kind"] == "request"]
    assert [(row["method"], row["result"], row["sandbox"]) for row in story] == [
        (method, "ok", box["id"]) for method in ("sandbox/create", "commands/run", "files/write", "sandbox/kill")
    ]
    made, ran, wrote, _ = (row["arguments"] for row in story)
    assert made == {
        "name": "story",
        "engine": engine,
        "limits": {"memory": "48m"},
        "env": ["TOKEN"],
        "metadata": ["k"],
    }
    assert (ran["sandbox"], ran["argv"], ran["env"]) == ("story", ["sh", "-c", "true"], ["OTHER"])
    assert wrote == {"sandbox": "story", "path": "/tmp/f"}
    log = b"".join(path.read_bytes() for path in Path(mortal.state, "audit").iterdir())
    assert CANARY.encode() not in log


def test_what_a_killed_daemon_was_at_is_known_to_the_next(mortal: Daemon, engine: str) -> None:
    """A command that runs for hours is in the log long before its end."""
    with mortal.box(engine) as box:

        def run() -> None:
            with suppress(RpcError):
                mortal.call("commands/run", sandbox=box["id"], argv=["sleep", "600"])

        caller = threading.Thread(target=run)
        caller.start()
        underway = wait_until(
            lambda: [row for row in lines(mortal, sandbox=box["id"]) if row["kind"] == "underway"], "it was noted"
        )
        mortal.kill()
        caller.join()
        mortal.start()
        assert [row["arguments"]["argv"] for row in underway] == [["sleep", "600"]]
        assert [row for row in lines(mortal, sandbox=box["id"]) if row["kind"] == "underway"] == underway
        verified = mortal.call("audit/verify")
        assert (verified["intact"], verified["problems"]) == (True, [])
