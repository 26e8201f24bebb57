"""The process: how it begins, what it refuses to begin with, and how it ends. No engine is there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import CHECKOUT, PATIENCE_S, Daemon, read_line, running, wait_until


def without_engines(directory: Path, **env: str | None) -> Daemon:
    empty = directory / "bin"
    empty.mkdir(exist_ok=True)
    return Daemon(directory / "daemon", env={"PATH": str(empty), **env})


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running(without_engines(tmp_path), engines=()) as daemon:
        yield daemon


def failure_of(daemon: Daemon) -> tuple[dict[str, Any], int]:
    """Start a daemon that cannot; return what it says, and its exit status."""
    process, ready = daemon.spawn()
    said = read_line(ready)
    assert said.startswith("error: "), said
    return json.loads(said.removeprefix("error: ")), process.wait(PATIENCE_S)


def test_it_serves_without_any_engine(daemon: Daemon) -> None:
    """Whoever installs one meanwhile need not restart it."""
    info = daemon.call("daemon/info")
    assert info["pid"] == daemon.pid
    assert [engine["usable"] for engine in info["engines"]] == [False, False]
    assert daemon.refusal("sandbox/create").type == "engine_unavailable"
    assert daemon.sandboxes() == []


def test_only_its_user_can_get_at_what_it_has(daemon: Daemon) -> None:
    assert daemon.socket.stat().st_mode & 0o777 == 0o600
    for private in (daemon.socket.parent, daemon.boxes, daemon.state):
        assert private.stat().st_mode & 0o077 == 0, private
    assert (daemon.state / "journal.sqlite3").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", [".ssh", ".aws", ".gnupg", ".config/gcloud"])
def test_keys_and_tokens_in_its_users_home_are_no_project(tmp_path: Path, name: str) -> None:
    """Whoever runs inside must not read what opens other doors, nor by another name."""
    keys = tmp_path / "home" / name / "below"
    keys.mkdir(parents=True)
    link = tmp_path / "innocent"
    link.symlink_to(keys.parent)
    with running(without_engines(tmp_path, HOME=str(tmp_path / "home")), engines=()) as daemon:
        for path in (keys, keys.parent, link):
            refusal = daemon.refusal("sandbox/create", workspace={"path": str(path)})
            assert refusal.type == "invalid_argument", path
            assert "credentials" in refusal.detail
        for path in (tmp_path / "home", tmp_path):
            refusal = daemon.refusal("sandbox/create", workspace={"path": str(path)})
            assert "more than a project" in refusal.detail


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_signal_ends_it_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    daemon = without_engines(tmp_path)
    daemon.start()
    os.kill(daemon.pid, number)
    assert daemon.wait() == 0
    assert not daemon.socket.exists()


def test_a_request_ends_it_too(daemon: Daemon) -> None:
    daemon.call("daemon/shutdown")
    assert daemon.wait() == 0


def test_it_keeps_its_identity(daemon: Daemon) -> None:
    """Its containers are found by it."""
    owner = daemon.owner
    daemon.stop()
    daemon.start()
    assert daemon.owner == owner


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[defaults]\nmemroy = '1g'\n", "memroy"),
        ("[daemon]\nsandboxes_max = 0\n", "sandboxes_max"),
        ("not toml at all", "config.toml"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """A misspelt limit must not become no limit."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    failure, status = failure_of(without_engines(tmp_path, SANDBOXD_CONFIG=str(file)))
    assert (failure["type"], status) == ("invalid_argument", 2)
    assert said in failure["brief"] + failure["detail"]


def test_how_much_it_logs_is_a_setting_that_can_be_changed_while_it_runs(tmp_path: Path) -> None:
    """Nobody wants to restart it to learn why something goes wrong."""
    file = tmp_path / "config.toml"
    file.write_text("[daemon]\nlog_level = 'warning'\n")
    with running(without_engines(tmp_path, SANDBOXD_CONFIG=str(file)), engines=()) as daemon:
        assert "listening" not in daemon.log.read_text()
        file.write_text("[daemon]\nlog_level = 'info'\n")
        assert daemon.call("daemon/reload")["changed"] == ["daemon.log_level"]
        assert " INFO " in daemon.log.read_text()


def test_a_journal_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    """An older program would misread it, and remove what it does not know."""
    daemon = without_engines(tmp_path)
    daemon.start()
    daemon.stop()
    with closing(sqlite3.connect(daemon.state / "journal.sqlite3")) as database:
        database.execute("PRAGMA user_version = 99")
    failure, status = failure_of(daemon)
    assert status == 1
    assert "newer" in failure["detail"]


def test_a_journal_that_is_none_is_said(tmp_path: Path) -> None:
    daemon = without_engines(tmp_path)
    daemon.state.mkdir()
    (daemon.state / "journal.sqlite3").write_bytes(b"this is no database, and long enough to be taken for one" * 100)
    failure, status = failure_of(daemon)
    assert status == 1
    assert "journal" in failure["brief"]


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    """They could put a socket of their own in its place."""
    daemon = without_engines(tmp_path)
    daemon.socket.parent.chmod(0o777)
    failure, status = failure_of(daemon)
    assert (failure["type"], status) == ("unauthorized", 1)
    assert "SANDBOXD_SOCKET" in failure["hint"]


def test_what_it_is_asked_while_it_starts_is_answered(tmp_path: Path) -> None:
    """The socket is there before all else: nobody who comes early is turned away."""
    daemon = without_engines(tmp_path)
    process, ready = daemon.spawn()
    wait_until(daemon.socket.exists, "it listened")
    assert daemon.call("daemon/info")["pid"] == process.pid
    assert read_line(ready) == "ready"
    process.terminate()
    assert process.wait(PATIENCE_S) == 0


def test_a_client_that_hangs_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    daemon = without_engines(tmp_path)
    daemon.start()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(daemon.socket))
        silent.sendall(b"Content-Length: 1000\r\n\r\n{")
        assert daemon.stop() == 0


def test_a_program_that_was_never_built_is_said_with_what_builds_it(tmp_path: Path) -> None:
    """A source tree without a compiler: the one who starts the daemon is told, not left with a traceback."""
    copy = tmp_path / "copy"
    for name in ("sandboxd", "runtimes", "images"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("sandbox-init", "__pycache__"))
    daemon = without_engines(tmp_path, PYTHONPATH=str(copy), PYTHONSAFEPATH="1")
    failure, status = failure_of(daemon)
    assert (failure["type"], status) == ("prerequisite_missing", 4)
    assert "build" in failure["hint"]
