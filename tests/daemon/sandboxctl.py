"""Runs the command line as a process of its own, against the stub daemon."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE_S = 20
ROOT = Path(__file__).parents[2]
STUB = Path(__file__).with_name("stub_server.py")

CTL = (sys.executable, "-P", str(ROOT / "sandboxd" / "cli" / "sandboxctl"))
"""As it is installed. ``-P``: its directory is no place to import from."""


def environment(directory: Path, **more: str) -> dict[str, str]:
    """What a process sees: a socket and a state of its own, and little else."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SANDBOXD_SOCKET": str(directory / "run" / "sandboxd.sock"),
        "SANDBOXD_STATE_DIR": str(directory / "state"),
        **more,
    }


@contextlib.contextmanager
def stub_daemon(directory: Path) -> Iterator[dict[str, str]]:
    """A running stub; yields the environment in which it is found."""
    # Should it die, then no real daemon can take its place: that reads its settings first.
    env = environment(directory, SANDBOXD_DEFAULTS_MEMORY="nothing but the stub")
    with subprocess.Popen([sys.executable, str(STUB)], env=env, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        try:
            yield env
        finally:
            daemon.terminate()


class Ctl:
    """Calls sandboxctl and returns what it did."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env

    def __call__(self, *arguments: str, **settings: Any) -> "subprocess.CompletedProcess[str]":
        settings = {"stdin": subprocess.DEVNULL, "capture_output": True, **settings}
        if "input" in settings:
            del settings["stdin"]
        env = {**self.env, **settings.pop("env", {})}
        return subprocess.run([*CTL, *arguments], env=env, text=True, timeout=PATIENCE_S, check=False, **settings)

    def start(self, *arguments: str, **settings: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen([*CTL, *arguments], env=self.env, text=True, **settings)
