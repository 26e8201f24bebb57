"""A Docker of one's own, which may be stopped and killed: the host's is somebody's.

Its containers have no network, so that it touches neither the host's bridges nor its packet filter.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.engine.daemons import PATIENCE_S, wait_until

CONTAINERD = """
version = 2
root = "{directory}/containerd/root"
state = "{directory}/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{directory}/containerd.sock"
"""

PING = b"GET /_ping HTTP/1.0\r\n\r\n"


class OwnDocker:
    """A dockerd, and a containerd that outlives it, as both are services of their own on most hosts.

    Args:
        directory: All that it has is in there. Its path is short: the paths of Unix sockets are.
        live_restore: Whether its containers go on without it.
    """

    def __init__(self, directory: Path, *, live_restore: bool) -> None:
        self._directory = directory
        self._socket = directory / "docker.sock"
        self._settings = directory / "daemon.json"
        self._process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"
        self.host = f"unix://{self._socket}"
        """For ``DOCKER_HOST``."""
        directory.mkdir()
        (directory / "containerd.toml").write_text(CONTAINERD.format(directory=directory), encoding="utf-8")
        self.set_live_restore(live_restore)

    def set_live_restore(self, live_restore: bool) -> None:
        """From now on."""
        self._settings.write_text(json.dumps({"live-restore": live_restore}), encoding="utf-8")
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)
            said = str(live_restore).lower()
            wait_until(lambda: self.call("info", "--format={{.LiveRestoreEnabled}}").strip() == said, "it was told")

    def _spawn(self, *words: str) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )

    def start(self) -> None:
        """Start it and wait until it answers."""
        directory = self._directory
        # In a network of its own: with --bridge=none it deletes any docker0 that it finds, and there is the host's.
        self._process = self._spawn(
            *("unshare", "--net", "dockerd"),
            f"--config-file={self._settings}",
            f"--data-root={directory}/data",
            f"--exec-root={directory}/exec",
            f"--pidfile={directory}/pid",
            f"--containerd={directory}/containerd.sock",
            f"--host={self.host}",
            *("--bridge=none", "--iptables=false", "--ip6tables=false"),
        )
        wait_until(self._answers, f"a dockerd of the test's own answered: see {self.log}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text(encoding="utf-8", errors="replace")
        with socket.socket(socket.AF_UNIX) as asking, contextlib.suppress(OSError):
            asking.settimeout(PATIENCE_S)
            asking.connect(str(self._socket))
            asking.sendall(PING)
            return asking.recv(64).split(b" ", 2)[1:2] == [b"200"]
        return False

    def stop(self) -> None:
        """As a service manager does."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(PATIENCE_S)

    def call(self, *words: str) -> str:
        """What its client prints."""
        env = {**os.environ, "DOCKER_HOST": self.host}
        done = subprocess.run(
            ["docker", *words], env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        )
        return done.stdout

    @property
    def running(self) -> bool:
        return self._process is not None

    @contextlib.contextmanager
    def standing(self) -> Iterator[OwnDocker]:
        """Started; in the end nothing of it is left that runs or is mounted."""
        containerd = self._spawn("containerd", f"--config={self._directory}/containerd.toml")
        try:
            self.start()
            yield self
        finally:
            try:
                self._clear()
            finally:
                containerd.terminate()
                containerd.wait(PATIENCE_S)

    def _clear(self) -> None:
        if not self.running:
            self.start()
        if left := self.call("ps", "-aq").split():
            self.call("rm", "--force", "--volumes", *left)
        self.stop()
        with open("/proc/self/mounts", encoding="utf-8") as file:
            mounted = [path for line in file if (path := line.split(" ")[1]).startswith(f"{self._directory}/")]
        for path in reversed(mounted):
            subprocess.run(["umount", path], check=True)
