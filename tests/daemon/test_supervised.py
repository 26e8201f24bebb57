"""A daemon that a service manager started, as far as the daemon can tell: what it says from its start to its end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon.test_daemon import without_engines
from tests.engine.daemons import Daemon, running, wait_until


class ServiceManager:
    """A notify socket, and all that was said into it."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._socket.setblocking(False)
        self.said: list[str] = []

    def close(self) -> None:
        self._socket.close()

    def listen(self) -> list[str]:
        with suppress(BlockingIOError):
            while True:
                self.said.append(self._socket.recv(4096).decode())
        return self.said

    def wait_for(self, text: str) -> int:
        """Where in what was said this is."""
        wait_until(lambda: any(text in message for message in self.listen()), f"the daemon says {text!r}")
        return next(at for at, message in enumerate(self.said) if text in message)


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServiceManager, str]]:
    path = str(tmp_path / "notify")
    manager = ServiceManager(path if request.param == "path" else f"\0{path}")
    yield manager, path if request.param == "path" else f"@{path}"
    manager.close()


def supervised(directory: Path, address: str) -> Daemon:
    return without_engines(directory, NOTIFY_SOCKET=address, WATCHDOG_USEC="600000")


def test_it_tells_of_its_start_its_life_and_its_end(tmp_path: Path, manager: tuple[ServiceManager, str]) -> None:
    said, address = manager
    with running(supervised(tmp_path, address), engines=()):
        starting = said.wait_for("STATUS=starting")
        ready = said.wait_for("READY=1\nSTATUS=0 sandboxes, 0 running; no engine")
        assert starting < ready
        wait_until(lambda: said.listen().count("WATCHDOG=1") >= 3, "the watchdog is fed")
    stopping = said.wait_for("STOPPING=1\nSTATUS=stopping")
    assert said.wait_for("EXTEND_TIMEOUT_USEC=") < stopping, "while it starts as well"
    assert "WATCHDOG=1" not in said.said[stopping:]


def test_settings_are_read_again(tmp_path: Path, manager: tuple[ServiceManager, str]) -> None:
    """By signal or by request; what cannot change is said, and what cannot be meant changes nothing."""
    said, address = manager
    file = tmp_path / "config.toml"
    daemon = without_engines(tmp_path, NOTIFY_SOCKET=address, SANDBOXD_CONFIG=str(file))

    def in_force(key: str) -> str:
        entries = daemon.call("daemon/config")["entries"]
        return next(entry["value"] for entry in entries if entry["key"] == key)

    with running(daemon, engines=()):
        said.wait_for("READY=1")
        file.write_text('[defaults]\nmemory = "3g"\n[chroma]\nport = 9001\n')
        os.kill(daemon.pid, signal.SIGHUP)
        at = said.wait_for("RELOADING=1\nMONOTONIC_USEC=")
        wait_until(lambda: any("READY=1" in message for message in said.listen()[at:]), "it is ready again")
        assert (in_force("defaults.memory"), in_force("chroma.port")) == ("3g", "8000")
        assert daemon.call("template/get", template="default")["memory"] == "3g"
        file.write_text('[defaults]\nmemory = "4g"\n[chroma]\nport = 9001\n')
        assert daemon.call("daemon/reload") == {"changed": ["defaults.memory"], "waiting": ["chroma.port"]}
        assert daemon.call("daemon/reload") == {"changed": [], "waiting": ["chroma.port"]}
        file.write_text("[defaults]\nmemroy = 1\n")
        assert daemon.refusal("daemon/reload").type == "invalid_argument"
        os.kill(daemon.pid, signal.SIGHUP)
        wait_until(lambda: "those before stay in force" in daemon.log.read_text(), "it says so")
        assert in_force("defaults.memory") == "4g"
        file.unlink()
        done = daemon.ctl("daemon", "reload")
        assert (done.returncode, done.stdout) == (0, b"in force now: defaults.memory\n")
