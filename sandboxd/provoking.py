"""Proving limits the hard way: run into each of them inside, and read the counters before and after."""

from __future__ import annotations

import os
import time

import psutil

from runtimes.cgroup.provoke import Outcome, Provocation, Verdict, judge, plan
from runtimes.cgroup.readings import EffectiveLimits
from runtimes.init.wire import SpawnRequest
from sandboxd import protocol
from sandboxd.running import require_running
from sandboxd.sandbox import INSIDE_BIN, Sandbox


async def provoke(sandbox: Sandbox) -> list[protocol.Provocation]:
    """Run into memory, pids and CPU quota, one after the other.

    Raises:
        Conflict: the sandbox does not run.
        CgroupUnreadable: its counters cannot be read, so nothing could be judged.
    """
    require_running(sandbox)
    effective = sandbox.effective_limits()
    cpus = effective.cpuset_cpus
    steps = plan(
        effective,
        cpu_count=len(cpus) if cpus is not None else len(os.sched_getaffinity(0)),
        memory_available_bytes=psutil.virtual_memory().available,
    )
    verdicts = [await _provoke_one(sandbox, step, effective) for step in steps]
    return [
        protocol.Provocation(limit=verdict.limit.value, held=verdict.held, evidence=verdict.evidence)
        for verdict in verdicts
    ]


async def _provoke_one(sandbox: Sandbox, step: Provocation, effective: EffectiveLimits) -> Verdict:
    before = sandbox.usage()
    if step.skip_reason:
        return judge(step, effective, before, before, None)
    started_s = time.monotonic()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        command, _ = await sandbox.commands.start(
            SpawnRequest(
                command_id=sandbox.commands.new_id(),
                argv=[f"{INSIDE_BIN}/sandbox-provoke".encode(), *(argument.encode() for argument in step.argv)],
                env=[],
                cwd=b"/",
            ),
            (null, null, null),
            background=False,
            timeout_s=step.timeout_s,
            grace_s=0,
        )
    finally:
        os.close(null)
    end = await sandbox.commands.wait_or_kill(command)
    wall_us = int((time.monotonic() - started_s) * 1_000_000)
    outcome = Outcome(exit_code=end.exit_code, signal=end.signal, wall_us=wall_us)
    return judge(step, effective, before, sandbox.usage(), outcome)
