"""The verdict on a command's end."""

from __future__ import annotations

import pytest

from sandboxd.commands import Verdict, judge


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict(wait_status=0, oom_kills=0, timed_out=False, killed=False), (0, None, "ok")),
        (Verdict(wait_status=7 << 8, oom_kills=0, timed_out=False, killed=False), (7, None, "nonzero")),
        (Verdict(wait_status=137 << 8, oom_kills=0, timed_out=False, killed=False), (137, None, "nonzero")),
        (Verdict(wait_status=9, oom_kills=0, timed_out=False, killed=False), (None, 9, "signaled")),
        (Verdict(wait_status=9 | 0x80, oom_kills=0, timed_out=False, killed=False), (None, 9, "signaled")),
        (Verdict(wait_status=9, oom_kills=1, timed_out=False, killed=False), (None, 9, "oom")),
        (Verdict(wait_status=137 << 8, oom_kills=1, timed_out=False, killed=False), (137, None, "oom")),
        (Verdict(wait_status=0, oom_kills=1, timed_out=False, killed=False), (0, None, "ok")),
        (Verdict(wait_status=9, oom_kills=None, timed_out=False, killed=False), (None, 9, "signaled")),
        (Verdict(wait_status=9, oom_kills=0, timed_out=False, killed=True), (None, 9, "killed")),
        (Verdict(wait_status=15, oom_kills=0, timed_out=True, killed=False), (None, 15, "timeout")),
        (Verdict(wait_status=9, oom_kills=1, timed_out=True, killed=False), (None, 9, "timeout")),
        (Verdict(wait_status=None, oom_kills=None, timed_out=False, killed=False), (None, None, "lost")),
        (Verdict(wait_status=None, oom_kills=None, timed_out=False, killed=True), (None, None, "killed")),
        (Verdict(wait_status=None, oom_kills=2, timed_out=False, killed=False), (None, None, "oom")),
    ],
)
def test_the_verdict_comes_from_the_counters_and_never_from_137(
    verdict: Verdict, expected: tuple[int | None, int | None, str]
) -> None:
    """An OOM kill, our kill, a user's kill, a timeout and an exit 137 are five different things."""
    assert judge(verdict) == expected
