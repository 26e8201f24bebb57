"""Running into limits: what is planned, and what the counters must have done for a limit to have held."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runtimes.cgroup.provoke import Outcome, Provocation, ProvokedLimit, judge, plan
from runtimes.cgroup.readings import UNLIMITED, EffectiveLimits, Usage

MIB = 1024**2
GIB = 1024**3
LIMITS = EffectiveLimits(memory_bytes_max=64 * MIB, cpu_millis=500, pids_max=50)
ENDED = Outcome(exit_code=0, signal=None, wall_us=1_000_000)
NOT_HELD = Outcome(exit_code=3, signal=None, wall_us=1_000_000)
KILLED = Outcome(exit_code=None, signal=int(signal.SIGKILL), wall_us=100_000)
BROKEN = Outcome(exit_code=4, signal=None, wall_us=100_000)


def step(limit: ProvokedLimit, *, skip_reason: str = "") -> Provocation:
    return Provocation(limit=limit, argv=("x",), timeout_s=1, skip_reason=skip_reason)


def test_every_limit_in_force_is_run_into_and_memory_last() -> None:
    steps = plan(LIMITS, cpu_count=2, memory_available_bytes=GIB)
    argvs = [("pids", "58"), ("cpu", "1", "2"), ("memory", str(128 * MIB))]
    assert [one.argv for one in steps] == argvs
    assert not any(one.skip_reason for one in steps)


def test_limits_that_are_unknown_or_absent_are_not_run_into() -> None:
    """Without a limit the load would fall on the host."""
    assert plan(EffectiveLimits(), cpu_count=2, memory_available_bytes=GIB) == ()
    absent = EffectiveLimits(memory_bytes_max=UNLIMITED, cpu_millis=UNLIMITED, pids_max=UNLIMITED)
    assert plan(absent, cpu_count=2, memory_available_bytes=GIB) == ()


def test_the_host_is_not_put_at_risk_for_a_large_limit() -> None:
    large = EffectiveLimits(memory_bytes_max=16 * GIB)
    (one,) = plan(large, cpu_count=2, memory_available_bytes=64 * GIB)
    assert one.argv == ("memory", str(16 * GIB + 256 * MIB))
    (one,) = plan(large, cpu_count=2, memory_available_bytes=16 * GIB)
    assert "to spare" in one.skip_reason


def test_a_limit_of_all_cpus_cannot_be_run_into() -> None:
    (one,) = plan(EffectiveLimits(cpu_millis=2000), cpu_count=2, memory_available_bytes=GIB)
    assert one.skip_reason == "the limit is no less than the 2 CPUs there are"
    verdict = judge(one, LIMITS, Usage(), Usage(), None)
    assert verdict.held is None
    assert "could not be provoked" in verdict.evidence


@pytest.mark.parametrize(
    ("limit", "before", "after", "outcome", "held"),
    [
        ("memory", Usage(oom_kills=0), Usage(oom_kills=1), KILLED, True),
        ("memory", Usage(oom_kills=1), Usage(oom_kills=1), KILLED, False),
        ("memory", Usage(oom_kills=0), Usage(oom_kills=1), NOT_HELD, False),
        ("memory", Usage(oom_kills=0), Usage(oom_kills=0), NOT_HELD, False),
        ("memory", Usage(oom_kills=0), Usage(oom_kills=0), BROKEN, None),
        ("memory", Usage(), Usage(oom_kills=1), KILLED, None),
        ("memory", Usage(oom_kills=0, ooms_own=0), Usage(oom_kills=1, ooms_own=1), KILLED, True),
        ("memory", Usage(oom_kills=0, ooms_own=2), Usage(oom_kills=1, ooms_own=2), KILLED, None),
        ("pids", Usage(pids_refused=0), Usage(pids_refused=1), ENDED, True),
        ("pids", Usage(pids_refused=2), Usage(pids_refused=2), ENDED, False),
        ("pids", Usage(pids_refused=0), Usage(pids_refused=0), NOT_HELD, False),
        ("pids", Usage(), Usage(), ENDED, None),
        ("pids", Usage(), Usage(), NOT_HELD, False),
        ("pids", Usage(pids_refused=0), Usage(pids_refused=0), BROKEN, None),
        ("cpus", Usage(cpu_us=0, throttled_periods=0), Usage(cpu_us=500_000, throttled_periods=9), ENDED, True),
        ("cpus", Usage(cpu_us=0, throttled_periods=0), Usage(cpu_us=600_000, throttled_periods=9), ENDED, True),
        ("cpus", Usage(cpu_us=0, throttled_periods=0), Usage(cpu_us=601_000, throttled_periods=9), ENDED, False),
        ("cpus", Usage(cpu_us=0, throttled_periods=0), Usage(cpu_us=1_990_000, throttled_periods=0), ENDED, False),
        ("cpus", Usage(cpu_us=0, throttled_periods=3), Usage(cpu_us=400_000, throttled_periods=3), ENDED, None),
        ("cpus", Usage(cpu_us=0), Usage(cpu_us=400_000, throttled_periods=3), ENDED, None),
        ("cpus", Usage(cpu_us=0, throttled_periods=0), Usage(cpu_us=9, throttled_periods=3), BROKEN, None),
    ],
)  # fmt: skip
def test_the_counters_decide(limit: str, before: Usage, after: Usage, outcome: Outcome, held: bool | None) -> None:
    verdict = judge(step(ProvokedLimit(limit)), LIMITS, before, after, outcome)
    assert verdict.held is held
    assert verdict.evidence


def test_the_evidence_can_be_read_aloud() -> None:
    before, after = Usage(cpu_us=0, throttled_periods=0), Usage(cpu_us=502_000, throttled_periods=10)
    verdict = judge(step(ProvokedLimit.CPUS), LIMITS, before, after, ENDED)
    expected = "0.502 of a CPU used over 1.00 s against a limit of 0.5, nr_throttled 0 -> 10"
    assert verdict.evidence == expected


# --- the program itself ---------------------------------------------------------------------------------

SOURCE = Path(__file__).parents[2] / "runtimes/init/provoke.c"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    assert compiler is not None, "a C compiler is needed: sandbox-init cannot be built without one either"
    path = str(tmp_path_factory.mktemp("provoke") / "sandbox-provoke")
    flags = ["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow"]
    subprocess.run([compiler, *flags, "-o", path, str(SOURCE)], check=True)
    return path


@pytest.mark.parametrize(
    "argv",
    [
        [], ["memory"], ["memory", "0"], ["memory", "-1"], ["memory", "1m"], ["memory", "9" * 30], ["pids", "0"],
        ["pids", "99999999"], ["cpu", "1"], ["cpu", "61", "1"], ["cpu", "1", "0"],
        ["memory", "1", "1"], ["banana", "1"],
    ],
)  # fmt: skip
def test_the_program_refuses_nonsense(program: str, argv: list[str]) -> None:
    run = subprocess.run([program, *argv], capture_output=True, text=True, timeout=10, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("usage: ")


def test_the_program_says_that_nothing_held_where_nothing_holds(program: str) -> None:
    memory = subprocess.run([program, "memory", str(4 * MIB)], capture_output=True, timeout=10, check=False)
    assert (memory.returncode, memory.stdout) == (3, b"4194304\n")
    pids = subprocess.run([program, "pids", "3"], capture_output=True, timeout=10, check=False)
    assert (pids.returncode, pids.stdout) == (3, b"3\n")


def test_the_program_leaves_no_child_behind_when_it_is_killed(program: str) -> None:
    """The children hold the write end of a pipe: it is at its end when the last of them is gone."""
    reading, writing = os.pipe()
    with subprocess.Popen([program, "cpu", "60", "3"], pass_fds=[writing]) as running:
        os.close(writing)
        deadline = time.monotonic() + 10
        while len(Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()) < 3:
            assert time.monotonic() < deadline
        running.kill()
        running.wait(timeout=10)
    assert os.read(reading, 1) == b""
    os.close(reading)
