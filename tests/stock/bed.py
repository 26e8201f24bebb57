"""What the tests of a bed know of it, and how they are root in it for a moment."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sandboxd.reconcile import WENT_DOWN
from tests.engine.daemons import Daemon

BED = os.environ.get("STOCK_BED", "")
CHECKOUT = Path(__file__).resolve().parents[2]
DELEGATE = Path("/etc/systemd/system/user@.service.d")

controllers_needed = pytest.mark.skipif(
    BED == "namespaces", reason="control groups in namespaces of a v1 or hybrid host have no controllers"
)

quick_bed = pytest.mark.skipif(
    BED == "machine" and not os.environ.get("STOCK_ALL"),
    reason="the quick bed proves it; in the machine it would take minutes (hack/stock --all)",
)

POLICY = "strict" if BED == "machine" else "degraded"
"""Where nothing can be limited, nothing is asked for."""

CALL_S_MAX = 120.0
"""For a command of the machine, which is ten to thirty times slower than this host."""


COMMAND_ENDED = {"signaled", "lost"}
"""How a command ended that was there when all that its user ran was ended: as its daemon saw it, or did not."""


def sudo(script: str, *words: str) -> str:
    """What a shell script prints that root runs."""
    return run("sudo", "-n", "sh", "-ec", script, "sh", *words)


def run(*words: str, timeout_s: float = CALL_S_MAX, **settings: Any) -> str:
    """What a program prints that must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False, **settings)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout


def wait_until_manager_runs() -> None:
    """The user's systemd, after somebody restarted it."""
    deadline = time.monotonic() + CALL_S_MAX
    while not Path(f"/run/user/{os.getuid()}/systemd/private").exists():
        assert time.monotonic() < deadline, "the user's systemd did not come back"
        time.sleep(0.2)
    subprocess.run(["systemctl", "--user", "is-system-running", "--wait"], capture_output=True, check=False)


def group_of(pid: int) -> Path:
    """A process's control group v2."""
    (line,) = (line for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::"))
    return Path("/sys/fs/cgroup") / line[4:]


def ended_with_the_host(box: dict[str, Any]) -> bool:
    """Whether a sandbox says that it stopped because all that its user ran was ended.

    A daemon that is still there when its sandboxes are ended sees their inits go, and says that.
    """
    seen = box["state_reason"].startswith("its init ended with")
    return box["state"] == "stopped" and (seen or box["state_reason"] == WENT_DOWN)


def limits(reply: dict[str, Any], field: str) -> dict[str, Any]:
    return {row["name"]: row[field] for row in reply["limits"]}


def identity(daemon: Daemon) -> list[str]:
    """What this bed is, a line each."""
    release = platform.freedesktop_os_release()
    engines = {engine["name"]: engine for engine in daemon.call("daemon/info")["engines"]}
    podman = engines["podman"]
    assert podman["usable"], podman["reason"]
    kind = "rootless" if podman["rootless"] else "rootful"
    return [
        f"distribution: {release['PRETTY_NAME']}",
        f"kernel: {platform.release()}",
        f"cgroup: {podman['cgroup_version']}, controllers delegated: {delegated() or 'none'}",
        f"podman: {podman['server_version']}, {kind}, as uid {os.getuid()}",
    ]


def podman_is_usable(daemon: Daemon) -> bool:
    """Asks it, where it was not before."""
    (podman,) = (engine for engine in daemon.call("daemon/info")["engines"] if engine["name"] == "podman")
    if not podman["usable"]:
        daemon.call("daemon/doctor")
    return bool(podman["usable"])


def delegated() -> str:
    uid = os.getuid()
    path = Path(f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service/cgroup.controllers")
    return path.read_text().strip()
