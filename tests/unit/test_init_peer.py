"""Ending a process by its descriptor: what a sandbox is killed with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from runtimes.init.peer import kill_process, open_process


def test_a_process_is_killed_by_its_descriptor() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        pidfd = open_process(process.pid)
        assert pidfd is not None
        assert kill_process(pidfd) is True
        assert process.wait() == -9
        assert kill_process(pidfd) is True, "that it is dead already is no failure"
    os.close(pidfd)


def test_a_process_that_is_gone_has_no_descriptor() -> None:
    """Nor has a number that no process can have."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert open_process(process.pid) is None
    assert open_process(int(Path("/proc/sys/kernel/pid_max").read_text()) + 1) is None
    assert open_process(0) is None
