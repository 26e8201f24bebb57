"""The time of day, and what each step of a request cost."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


class Timings:
    """A stopwatch with named marks."""

    def __init__(self) -> None:
        self._started_s = self._marked_s = time.perf_counter()
        self._steps_ms: dict[str, float] = {}

    def mark(self, step: str) -> None:
        """Book the time since the last mark on ``step``."""
        now_s = time.perf_counter()
        self._steps_ms[step] = self._steps_ms.get(step, 0.0) + (now_s - self._marked_s) * 1000
        self._marked_s = now_s

    @property
    def elapsed_us(self) -> int:
        """Since it was started; microseconds."""
        return int((time.perf_counter() - self._started_s) * 1_000_000)

    def as_dict(self) -> dict[str, float]:
        """The steps in their order, and ``total``; milliseconds."""
        total_ms = (time.perf_counter() - self._started_s) * 1000
        return {step: round(cost, 3) for step, cost in (*self._steps_ms.items(), ("total", total_ms))}
