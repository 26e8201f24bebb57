"""The daemon that is tormented, what it stands on, and the handles by which that is shaken.

Its state is on a small file system of its own, and so are its engines its own, a dockerd and a store of Podman's. It
reaches them through programs that can be told to refuse or to hang: nobody else on the host is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.engine.daemons import IMAGE, Daemon
from tests.engine.own_docker import OwnDocker
from tests.engine.own_podman import OwnPodman

STATE_BYTES = 96 * 1024 * 1024

POOL = """
[pool]
max = 3
fills_max = 1
memory_reserve = "256m"
"""

PROGRAM = """#!/bin/sh
mode=well
read -r mode < {mode}
while [ "$mode" = hangs ]; do
    sleep 0.05
    read -r mode < {mode}
done
if [ "$mode" = refuses ]; then
    echo "Cannot connect to the engine: it was stopped" >&2
    exit 125
fi
exec {program} "$@"
"""


class Ground:
    """One daemon, and its world."""

    def __init__(self, directory: Path, engines: Sequence[str]) -> None:
        self.directory = directory
        self.engines = tuple(engines)
        self.projects = directory / "projects"
        self.projects.mkdir()
        self._programs = directory / "programs"
        self._programs.mkdir()
        for engine in self.engines:
            self._wrap(engine)
        self.docker = OwnDocker(directory / "docker", live_restore=False)
        self.podman = OwnPodman(directory / "podman")
        self.engine_env = {
            **({"DOCKER_HOST": self.docker.host} if "docker" in engines else {}),
            **(self.podman.env if "podman" in engines else {}),
        }
        """What leads a client to them."""
        config = directory / "config.toml"
        tables = [f'[templates.{engine}]\nengine = "{engine}"\n' for engine in self.engines]
        config.write_text("\n".join([POOL, *tables]), encoding="utf-8")
        env = {
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            **self.engine_env,
            "SANDBOXD_CONFIG": str(config),
            "SANDBOXD_POOL_MAX": None,
            "SANDBOXD_DEFAULTS_TMP": "16m",
            "SANDBOXD_DEFAULTS_MEMORY": "96m",
            "SANDBOXD_DEFAULTS_OUTPUT": "256k",
        }
        self.daemon = Daemon(directory / "daemon", env=env)
        self.changing = threading.Lock()
        """Held while the daemon is ended and started again."""

    def _wrap(self, engine: str) -> None:
        found = shutil.which(engine)
        if found is None:
            raise SystemExit(f"chaos: {engine} is not installed: run hack/engines")
        self.set_mode("well", engine)
        program = self._programs / engine
        program.write_text(PROGRAM.format(mode=self._mode(engine), program=found), encoding="utf-8")
        program.chmod(0o755)

    def _mode(self, engine: str) -> Path:
        return self.directory / f"{engine}.mode"

    def set_mode(self, mode: str, *engines: str) -> None:
        """What these engines do from now on, all of them if none is named: ``well``, ``hangs``, ``refuses``."""
        for engine in engines or self.engines:
            # Replaced as a whole: whoever reads it meanwhile must not find it empty.
            path = self._mode(engine)
            path.with_suffix(".new").write_text(f"{mode}\n", encoding="ascii")
            path.with_suffix(".new").rename(path)

    @contextlib.contextmanager
    def standing(self) -> Iterator[Daemon]:
        """The daemon, started, and its engines; whatever it left is removed in the end."""
        with contextlib.ExitStack() as stack:
            if "podman" in self.engines:
                stack.callback(self.podman.clear)
            if "docker" in self.engines:
                stack.enter_context(self.docker.standing())
            state = self.daemon.state
            state.mkdir(mode=0o700, parents=True)
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={STATE_BYTES},mode=0700", "chaos", state], check=True
            )
            stack.callback(lambda: subprocess.run(["umount", "--lazy", state], check=True))
            self.daemon.start()
            stack.callback(self._end)
            self.daemon.call("image/build", source="busybox", reference=IMAGE)
            yield self.daemon

    def _end(self) -> None:
        self.set_mode("well")
        if self.daemon.running:
            self.daemon.stop()

    def fill_disk(self) -> None:
        """Leave no byte free where the state is."""
        block = b"\0" * 65536
        with open(self._filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(block):
                pass

    def free_disk(self) -> None:
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self.daemon.state / "filler"

    def mounts(self) -> list[str]:
        """Mount points below its directory that are not the ground itself."""
        return [path for path in self.daemon.mounts() if path != str(self.daemon.state)]
