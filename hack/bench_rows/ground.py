"""What all rows stand on: a daemon of its own, and the book of what was measured."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from runtimes.model import EngineName
from sandboxd.client import Connection

ROOT = Path(__file__).resolve().parents[2]
KIBIBYTE, MEBIBYTE, GIBIBYTE = 1024, 1024**2, 1024**3
LARGE_BYTES = 100 * MEBIBYTE
ENTRIES = 10_000
SLOW_ROUNDS_MAX = 5
SCRATCH_OWNER = "bench"
NUMBERS = itertools.count()
SLOTS = 32
DRAIN_S_MAX = 60.0


class Bench:
    """A daemon of its own, and the rows."""

    def __init__(self, directory: str, rounds: int, peers_python: str = sys.executable) -> None:
        self.rounds = rounds
        self.peers_python = peers_python
        self.directory = directory
        self.bin = os.path.dirname(sys.executable)
        self.env = {
            **os.environ,
            "SANDBOXD_SOCKET": os.path.join(directory, "run", "sandboxd.sock"),
            "SANDBOXD_STATE_DIR": os.path.join(directory, "state"),
            "SANDBOXD_CONFIG": os.path.join(directory, "config.toml"),
        }
        # Slots only where a row is about them: elsewhere a sandbox is to be made, and nothing beside it.
        tables = [f'[templates.warm-{name}]\nengine = "{name}"\npool_max = {SLOTS}' for name in EngineName]
        Path(self.env["SANDBOXD_CONFIG"]).write_text("\n".join(["[pool]", "max = 0", *tables]), encoding="utf-8")
        self.project = os.path.join(directory, "project")
        os.mkdir(self.project)
        self.rows: list[dict[str, object]] = []

    def ctl(self, *arguments: str) -> list[str]:
        return [os.path.join(self.bin, "sandboxctl"), *arguments]

    def call(self, *arguments: str) -> dict[str, object]:
        finished = subprocess.run(self.ctl(*arguments, "--json"), env=self.env, capture_output=True, check=False)
        if finished.returncode != 0:
            raise SystemExit(f"bench: sandboxctl {' '.join(arguments)}: {finished.stderr.decode()}")
        result: dict[str, object] = json.loads(finished.stdout)
        return result

    @contextlib.contextmanager
    def sandbox(self, engine: str, *flags: str) -> Iterator[str]:
        box = str(self.call("create", "--engine", engine, *flags)["id"])
        try:
            yield box
        finally:
            self.call("rm", "--wait", box)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        with Connection.connect(self.env["SANDBOXD_SOCKET"]) as connection:
            yield connection

    def drain(self) -> None:
        """Let every slot go: they would outlive the daemon, for the next one."""
        with self.connection() as connection:
            for template in {str(row["template"]) for row in connection.call("pool/list", {})["pools"]}:
                connection.call("pool/drain", {"template": template})
        deadline_s = time.monotonic() + DRAIN_S_MAX
        while self._containers() and time.monotonic() < deadline_s:
            time.sleep(0.1)

    def _containers(self) -> bool:
        """Whether the daemon still has anything: it removes in the background."""
        return any(any(os.scandir(box)) for box in Path(self.directory, "run", "boxes").glob("*"))

    def seconds(self, command: list[str], stdout: int = subprocess.DEVNULL, *, quiet: bool = False) -> float:
        stderr = subprocess.DEVNULL if quiet else None
        started = time.perf_counter()
        subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, check=True)
        return time.perf_counter() - started

    def compare(
        self,
        row: str,
        engine: str,
        ours: Callable[[], float],
        theirs: Callable[[], float],
        *,
        than: str,
        target: str,
        rounds: int | None = None,
    ) -> None:
        """Alternate, and book medians and their ratio."""
        measured: tuple[list[float], list[float]] = ([], [])
        for _ in range(self.rounds if rounds is None else rounds):
            measured[0].append(ours() * 1000)
            measured[1].append(theirs() * 1000)
        self.book(row, engine, measured[0], than=than, theirs=measured[1], target=target)

    def book(
        self,
        row: str,
        engine: str,
        ours: list[float],
        *,
        than: str = "",
        theirs: list[float] | None = None,
        target: str,
    ) -> None:
        entry: dict[str, object] = {
            "row": row,
            "engine": engine,
            "p50_ms": round(statistics.median(ours), 2),
            "p90_ms": round(quantile(ours, 0.9), 2),
            "p99_ms": round(quantile(ours, 0.99), 2),
            "n": len(ours),
            "target": target,
        }
        if theirs is not None:
            other = statistics.median(theirs)
            entry |= {
                "than": than,
                "than_p50_ms": round(other, 2),
                "ratio": round(statistics.median(ours) / other, 3),
                "difference_ms": round(statistics.median(ours) - other, 2),
            }
        self.rows.append(entry)
        print(render(entry), file=sys.stderr)

    def note(self, entry: dict[str, object]) -> None:
        """Book figures that are no times."""
        self.rows.append(entry)
        said = "".join(f"  {name} {value}" for name, value in entry.items() if name not in {"row", "engine"})
        print(f"{entry['row']:<22} {entry['engine']:<7}{said}", file=sys.stderr)


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def render(entry: dict[str, object]) -> str:
    shares = "".join(f"  {share} {entry[f'{share}_ms']:>9} ms" for share in ("p50", "p90", "p99"))
    line = f"{entry['row']:<22} {entry['engine']:<7}{shares}"
    if "than" in entry:
        line += f"  | {entry['than']:<24} {entry['than_p50_ms']:>9} ms  ratio {entry['ratio']:>6}"
        line += f"  diff {entry['difference_ms']:>8} ms"
    return f"{line}  | target {entry['target']}"
