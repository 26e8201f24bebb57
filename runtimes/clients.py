"""Engine clients that outlived the process which started them.

A daemon that is killed in the middle of a create leaves the engine's client running: it comes to its end by
itself, and only then is it known whether there is a container.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal

import anyio

logger = logging.getLogger(__name__)

CMDLINE_BYTES_MAX = 1024 * 1024


async def wait_for_clients(argument: str, *, deadline_s: float) -> int:
    """Wait until no process of ours is left that was started with ``argument``.

    Args:
        argument: One whole argument that only such a client carries: ``argv.owner_label_argument``.
        deadline_s: Waits no longer than this.

    Returns:
        How many there were.
    """
    pidfds = _pidfds(argument)
    try:
        with anyio.move_on_after(deadline_s) as scope:
            for pidfd in pidfds:
                await anyio.wait_readable(pidfd)
        if scope.cancelled_caught:
            logger.warning("engine clients of a former daemon still run after %g s", deadline_s)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    return len(pidfds)


def end_followers(argument: str) -> int:
    """Kill those of ours that follow an engine's events, and were started with ``argument``; return how many."""
    pidfds = _pidfds("events", argument)
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    return len(pidfds)


def _pidfds(*arguments: str) -> list[int]:
    """Straight from /proc: hundreds of sandboxes are thousands of processes, and a start waits for this."""
    wanted = {os.fsencode(argument) for argument in arguments}
    pidfds = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read(CMDLINE_BYTES_MAX).split(b"\0")
            if wanted.issubset(words) and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                pidfds.append(os.pidfd_open(int(name)))
        except OSError:
            continue
    return pidfds
