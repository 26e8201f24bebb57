"""A daemon that is restarted hands its listening socket over: whoever connects meanwhile waits."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import Connection, NotRunning, RpcError
from tests.daemon.test_daemon import without_engines
from tests.engine.daemons import PATIENCE_S, Daemon, wait_until


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One that ``sandboxctl`` has started, and whose successors it starts."""
    daemon = without_engines(tmp_path)
    assert daemon.ctl("daemon", "start").returncode == 0
    yield daemon
    assert daemon.ctl("daemon", "stop").returncode == 0
    with pytest.raises(NotRunning):
        daemon.connect()
    assert not daemon.socket.exists(), "the last one takes the socket away, whoever made it"


class Visitor:
    """Somebody who comes again and again, with a connection of their own each time."""

    def __init__(self, daemon: Daemon) -> None:
        self.answers: list[int] = []
        self.failures: list[RpcError] = []
        self._daemon = daemon
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._come)

    def _come(self) -> None:
        while not self._left.is_set():
            try:
                self.answers.append(self._daemon.call("daemon/info")["pid"])
            except RpcError as error:
                self.failures.append(error)

    @contextmanager
    def coming(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._left.set()
            self._thread.join()


def restarted(daemon: Daemon) -> dict[str, Any]:
    done = daemon.ctl("daemon", "restart", "--json")
    assert done.returncode == 0, done.stderr
    info: dict[str, Any] = json.loads(done.stdout)
    return info


def test_nobody_is_refused_while_it_restarts(daemon: Daemon) -> None:
    """A connection that comes when no daemon is there waits in the socket's queue.

    One that the old daemon had let in already is told to come again, and nothing of what it asked was begun.
    """
    inode = daemon.socket.stat().st_ino
    pids = [daemon.call("daemon/info")["pid"]]
    visitor = Visitor(daemon)
    with visitor.coming():
        for _ in range(3):
            pids.append(restarted(daemon)["pid"])
            wait_until(lambda: visitor.answers[-1:] == pids[-1:], "the next one answers")
    assert {error.type for error in visitor.failures} <= {"stopping", "disconnected"}
    assert len(visitor.failures) <= 3, "one at most for each restart: who was being answered at that moment"
    assert daemon.socket.stat().st_ino == inode, "it is the same socket"
    assert len(set(pids)) == 4


def test_the_next_one_goes_by_what_its_starter_says(daemon: Daemon) -> None:
    """It is a new process with the environment of whoever restarts it, not a copy of the old one."""
    daemon.env["SANDBOXD_DEFAULTS_MEMORY"] = "3g"
    restarted(daemon)
    entries = {entry["key"]: entry["value"] for entry in daemon.call("daemon/config")["entries"]}
    assert entries["defaults.memory"] == "3g"


def test_who_follows_something_is_told_to_come_again(daemon: Daemon) -> None:
    """An answer, and not a connection that breaks."""
    with daemon.connect() as connection:
        request = connection.send("events/subscribe", {})
        connection.call("daemon/info", {}, timeout_s=PATIENCE_S)
        restarted(daemon)
        with pytest.raises(RpcError) as told:
            connection.wait(request, timeout_s=PATIENCE_S)
        assert told.value.type == "stopping"


def test_a_socket_that_was_given_away_and_lost_is_made_anew(daemon: Daemon) -> None:
    """Whoever asked for it was killed before it could start the next daemon."""
    with daemon.connect() as connection:
        received: list[int] = []
        connection.call(
            "daemon/handover",
            {},
            on_notification=lambda message: received.extend(connection.take_descriptors(message, 1)),
            timeout_s=PATIENCE_S,
        )
    for number in received:
        os.close(number)
    wait_until(lambda: not _listens(daemon), "nobody listens")
    assert daemon.socket.exists()
    assert daemon.ctl("ls").returncode == 0
    assert _listens(daemon)


def _listens(daemon: Daemon) -> bool:
    try:
        Connection.connect(str(daemon.socket)).close()
    except NotRunning:
        return False
    return True
