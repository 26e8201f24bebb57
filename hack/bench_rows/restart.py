"""A restart among a hundred sandboxes."""

from __future__ import annotations

import sys
from pathlib import Path

from bench_rows.ground import MEBIBYTE, Bench
from bench_rows.hundred import measure
from runtimes.cli_engine import CliEngine
from sandboxd.config import DEFAULT_IMAGE

HUNDRED = 100


def bench_restart(bench: Bench, engine: CliEngine) -> None:
    """A restart among a hundred sandboxes: until it is ready, and what so many cost when nothing happens."""
    name = engine.name.value
    seen = measure(Path(bench.directory, f"restart-{name}"), name, HUNDRED, DEFAULT_IMAGE)
    bench.book(f"restart, {HUNDRED} there", name, seen.ready_ms, target="<= 1000 ms to ready")
    bench.book("  of it its own CPU", name, seen.ready_cpu_ms, target="whoever else is busy")
    bench.book(f"stats of {HUNDRED}", name, seen.stats_ms, target="<= 20 ms")
    entry: dict[str, object] = {
        "row": f"idle with {HUNDRED}",
        "engine": name,
        "rss_bytes": seen.rss_bytes,
        "cpu_percent": round(seen.idle_cpu_share * 100, 2),
        "target": "<= 80 MiB, < 1 % of a CPU",
    }
    bench.rows.append(entry)
    print(
        f"{entry['row']:<22} {name:<7}  {seen.rss_bytes / MEBIBYTE:.1f} MiB, {entry['cpu_percent']} % of a CPU"
        f"  | target {entry['target']}",
        file=sys.stderr,
    )
