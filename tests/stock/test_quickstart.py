"""The README's first command, by an ordinary user in a project of theirs."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from tests.stock.bed import CHECKOUT, controllers_needed

pytestmark = controllers_needed

QUICKSTART_S_MAX = 300


def test_from_a_checkout_to_a_sandbox_with_proven_limits(figures: list[str]) -> None:
    project = Path.home() / "quick"
    project.mkdir()
    (project / "a").touch()
    argv = [CHECKOUT / "hack" / "quickstart", "--yes", "--engine", "podman", "--image-source", "busybox"]
    argv.append("--no-chroma")
    began = time.monotonic()
    try:
        done = subprocess.run(
            argv, cwd=project, capture_output=True, text=True, timeout=QUICKSTART_S_MAX, check=False
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        figures.append(f"quickstart: {time.monotonic() - began:.0f} s")
        assert "nothing to install" in done.stderr
        assert "uid=1000(sandbox)" in done.stdout
        assert "project: 1 entries in /workspace" in done.stdout
        rows = [line.split() for line in done.stdout.splitlines()]
        verified = {row[0]: row[-1] for row in rows if row and row[0] in {"memory", "memory_swap", "cpus", "pids"}}
        assert verified == {"memory": "yes", "memory_swap": "yes", "cpus": "yes", "pids": "yes"}
    finally:
        ctl = CHECKOUT / ".venv" / "bin" / "sandboxctl"
        if ctl.exists():
            subprocess.run([ctl, "daemon", "stop"], capture_output=True, timeout=60, check=False)
        shutil.rmtree(project)
