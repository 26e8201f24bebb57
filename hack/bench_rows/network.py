"""Networks: the far end is a process of ours that has entered the network of a sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import IO, NamedTuple

from bench_rows.ground import GIBIBYTE, KIBIBYTE, ROOT, SLOW_ROUNDS_MAX, Bench, quantile
from runtimes.cli_engine import CliEngine

REQUESTS, CLIENTS_AT_ONCE = 200, 4


@contextlib.contextmanager
def companion(bench: Bench, *words: str, inside: int | None = None, passed: tuple[int, ...] = ()) -> Iterator[Far]:
    """``far_end.py``, in the network of this process or of the host."""
    enter = [] if inside is None else ["nsenter", f"--net=/proc/{inside}/ns/net"]
    command = [*enter, sys.executable, str(ROOT / "hack" / "bench_rows" / "far_end.py"), *words]
    with subprocess.Popen(
        command, env=bench.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=passed
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        if not said:
            raise SystemExit(f"bench: {' '.join(command)} ended (entering a network needs root)")
        yield Far(said, process.stdin, process.stdout)
        process.stdin.close()


class Far(NamedTuple):
    """What a companion said first, and its ends."""

    said: str
    stdin: IO[str]
    stdout: IO[str]

    def measure(self, count: int, threads: int = 1) -> tuple[float, list[float]]:
        """Milliseconds of all operations together, and of each."""
        self.stdin.write(f"{count} {threads}\n")
        self.stdin.flush()
        whole, each = json.loads(self.stdout.readline())
        return whole * 1000, [seconds * 1000 for seconds in each]


def bench_forward(bench: Bench, engine: CliEngine) -> None:
    """1 GiB out of a sandbox through a forward, against the same server and the same client without it.

    The relay shares the cores with its two ends: where these alone keep all cores busy, it can only halve the speed.
    """
    name = engine.name.value

    def download(connected: socket.socket) -> float:
        started, total, buffer = time.perf_counter(), 0, bytearray(256 * KIBIBYTE)
        with connected:
            connected.sendall(f"{GIBIBYTE}\n".encode())
            while count := connected.recv_into(buffer):
                total += count
        if total != GIBIBYTE:
            raise SystemExit(f"bench: a forward gave {total} bytes")
        return time.perf_counter() - started

    def by_path(path: str) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(path)
        return connected

    plain, through = os.path.join(bench.directory, f"{name}.direct"), os.path.join(bench.directory, f"{name}.through")
    with (
        bench.sandbox(name) as box,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        unix.bind(plain)
        unix.listen()
        pid = int(str(bench.call("inspect", box)["pid"]))
        descriptors = (tcp.fileno(), unix.fileno())
        with companion(bench, "serve", *map(str, descriptors), inside=pid, passed=descriptors) as far:
            port = int(str(bench.call("forward", box, far.said)["host_port"]))
            bench.call("forward", box, f"{through}:{far.said}")
            for row, ours, theirs in (
                ("forward 1 GiB, TCP", ("127.0.0.1", port), tcp.getsockname()),
                ("forward 1 GiB, Unix", through, plain),
            ):
                opened = by_path if isinstance(ours, str) else socket.create_connection
                bench.compare(
                    row,
                    name,
                    partial(lambda to, place: download(to(place)), opened, ours),
                    partial(lambda to, place: download(to(place)), opened, theirs),
                    than=f"direct, {os.cpu_count()} CPUs",
                    target="ratio <= 1.25 (0.8 of the speed)",
                    rounds=min(bench.rounds, SLOW_ROUNDS_MAX),
                )


def bench_proxy(bench: Bench, engine: CliEngine) -> None:
    """A request through the proxy, against one of the same client to the same server."""
    name = engine.name.value
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        url = f"http://127.0.0.1:{port}/"
        with (
            bench.sandbox(name, "--allow", f"127.0.0.1:{port}") as box,
            companion(bench, "serve", str(tcp.fileno()), passed=(tcp.fileno(),)),
            companion(bench, "ask", str(port), url) as direct,
            companion(
                bench, "ask", str(port), url, "3128", inside=int(str(bench.call("inspect", box)["pid"]))
            ) as through,
        ):
            requests(bench, "proxy request", name, through, direct)


def bench_chroma(bench: Bench, engine: CliEngine) -> None:
    """A ``get`` of the stock ChromaDB client through a sandbox's loopback, against one straight to the server."""
    name = engine.name.value
    with bench.sandbox(name, "--service", "chroma") as box:
        pid = int(str(bench.call("inspect", box)["pid"]))
        with companion(bench, "get", "8000", inside=pid) as through:
            (row,) = (row for row in bench.call("service", "list")["services"] if row["name"] == "chroma")
            with companion(bench, "get", str(row["address"]).rpartition(":")[2]) as direct:
                requests(bench, "chroma get", name, through, direct)


def requests(bench: Bench, row: str, name: str, through: Far, direct: Far) -> None:
    """One after another, and by several clients at once: then the time is that of all, divided by their number."""
    for far in (through, direct):
        far.measure(REQUESTS)
    rows: dict[int, tuple[list[float], list[float]]] = {1: ([], []), CLIENTS_AT_ONCE: ([], [])}
    for _ in range(min(bench.rounds, SLOW_ROUNDS_MAX)):
        for threads, measured in rows.items():
            for far, taken in zip((through, direct), measured, strict=True):
                whole, each = far.measure(REQUESTS, threads)
                taken.extend(each if threads == 1 else [whole / REQUESTS])
    for threads, (ours, theirs) in rows.items():
        what = row if threads == 1 else f"{row}, {threads} clients"
        bench.book(what, name, ours, than="direct", theirs=theirs, target="none, told")
        done = [1000 / statistics.mean(taken) for taken in (ours, theirs)]
        bench.rows[-1] |= {"per_s": round(done[0]), "than_per_s": round(done[1])}
        shares = ", ".join(f"p99 {quantile(taken, 0.99):.2f} ms" for taken in (ours, theirs))
        print(f"  {done[0]:.0f} requests/s, direct {done[1]:.0f}; {shares}", file=sys.stderr)
