"""What is left when a bed goes down, and how it is known when it is up again."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from runtimes.model import LABEL_OWNER
from tests.stock.bed import POLICY, run
from tests.stock.installed import SOCKET, Ctl

PLACE = Path.home() / "lasting"
PROJECT, TOLD = PLACE / "project", PLACE / "told.json"

NAMES = ("working", "layered", "stopped")
DEGRADED = ("--degraded",) if POLICY == "degraded" else ()
OUTSIDE = "from outside\n"


def lasting() -> Ctl:
    """Its daemon keeps one warm slot."""
    pool = {"SANDBOXD_POOL_MIN": "1", "SANDBOXD_POOL_MAX": "1"}
    return Ctl(PLACE / "state", **pool, SANDBOXD_DEFAULTS_LIMITS_POLICY=POLICY)


def containers() -> list[str]:
    """Ids of the containers of its daemon; those of other daemons are theirs."""
    with contextlib.closing(sqlite3.connect(PLACE / "state/journal.sqlite3")) as journal:
        ((owner,),) = journal.execute("SELECT value FROM meta WHERE key = 'owner'").fetchall()
    return run("podman", "ps", "-aq", "--no-trunc", f"--filter=label={LABEL_OWNER}={owner}").split()


def directories() -> list[str]:
    """What sandboxes and slots have in the runtime directory, one each."""
    return [str(path) for path in SOCKET.parent.glob("boxes/*/*") if path.is_dir()]


def mounts_at_home() -> list[str]:
    """Mount points below the user's home, but for those of Podman's own storage."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        targets = [line.split(" ")[4] for line in file]
    home = f"{Path.home()}/"
    return [target for target in targets if target.startswith(home) and "/containers/storage/" not in target]


def processes() -> list[str]:
    """What runs for this user in a sandbox."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if entry.stat().st_uid == os.getuid() and words[0].endswith(b"/sandbox-init"):
                found.append(entry.name)
    return found
