"""A Podman of one's own: a store, and all else that Podman keeps, in one directory. The host's is somebody's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.engine.daemons import PATIENCE_S

STORE = """
[storage]
driver = "overlay"
graphroot = "{directory}/graph"
runroot = "{directory}/run"
"""

ENGINE = """
[engine]
tmp_dir = "{directory}/tmp"
static_dir = "{directory}/static"
volume_path = "{directory}/volumes"
lock_type = "file"
"""
"""Its locks are files: those in shared memory are one set for all of a user's stores."""


class OwnPodman:
    """Podman over a store of its own.

    Args:
        directory: Made; all that it has is in there.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        (directory / "storage.conf").write_text(STORE.format(directory=directory), encoding="utf-8")
        (directory / "containers.conf").write_text(ENGINE.format(directory=directory), encoding="utf-8")
        self.env = {
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
        }

    def call(self, *words: str) -> str:
        """What its client prints."""
        done = subprocess.run(
            ["podman", *words],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
        return done.stdout

    def clear(self) -> None:
        """Remove all that it holds, and take off what is mounted for it."""
        self.call("rm", "--all", "--force", "--volumes")
        self.call("rmi", "--all", "--force")
        with open("/proc/self/mounts", encoding="utf-8") as file:
            mounted = [path for line in file if (path := line.split(" ")[1]).startswith(f"{self._directory}/")]
        for path in reversed(mounted):
            subprocess.run(["umount", path], check=True)
