"""The daemon as its users have it: units of their systemd, and sandboxctl."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sandboxd.cli import units
from tests.engine.daemons import CHECKOUT, IMAGE
from tests.stock.bed import CALL_S_MAX, run

UNITS = Path.home() / ".config/systemd/user"
SOCKET = Path(f"/run/user/{os.getuid()}/sandboxd/sandboxd.sock")


class Ctl:
    """``sandboxctl`` of a user who has set next to nothing.

    Args:
        directory: Where its daemon keeps its state.
        settings: Environment variables on top, which the units are installed with.
    """

    def __init__(self, directory: Path, **settings: str) -> None:
        gone = {"SANDBOXD_SOCKET", "INVOCATION_ID", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"}
        self.env = {name: value for name, value in os.environ.items() if name not in gone}
        self.env |= {
            "PYTHONPATH": str(CHECKOUT),
            "SANDBOXD_STATE_DIR": str(directory),
            "SANDBOXD_DEFAULTS_IMAGE": IMAGE,
            "XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}",
            **settings,
        }

    def __call__(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._argv(words),
            input=stdin,
            capture_output=True,
            text=True,
            env=self.env,
            timeout=CALL_S_MAX,
            check=False,
        )

    def begin(self, *words: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        """The same, for who does something else meanwhile."""
        return subprocess.Popen(
            self._argv(words),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
        )

    def json(self, *words: str) -> Any:
        return json.loads(self.out(*words, "--json"))

    def out(self, *words: str, stdin: str = "") -> str:
        """What it prints, where it must succeed."""
        done = self(*words, stdin=stdin)
        assert done.returncode == 0, (words, done.stdout, done.stderr, journal())
        return done.stdout

    @staticmethod
    def _argv(words: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "sandboxd.cli.main", *words]


@contextlib.contextmanager
def service(directory: Path) -> Iterator[Ctl]:
    """The daemon as a service, for the length of a ``with``; nothing of it is left."""
    ctl = Ctl(directory)
    assert ctl.json("daemon", "install") == {
        "installed": [str(UNITS / name) for name in units.UNITS],
        "socket": str(SOCKET),
    }
    try:
        yield ctl
    finally:
        ctl("rm", "--all", "--wait", "--yes")
        done = ctl("daemon", "uninstall")
    assert done.returncode == 0, done.stderr
    assert not list(UNITS.glob("sandboxd.*"))
    assert not SOCKET.exists()
    assert show("sandboxd.service", "LoadState") == "not-found"
    assert ctl("daemon", "status").returncode == 1


def show(unit: str, field: str) -> str:
    return run("systemctl", "--user", "show", "--value", f"--property={field}", unit).strip()


def journal() -> str:
    return subprocess.run(
        ["journalctl", "--user", "--unit=sandboxd", "--lines=20", "--identifier=sandboxd", "--no-pager"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
