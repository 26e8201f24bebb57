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
from typing import IO, NamedTuple

from bench_rows.ground import GIBIBYTE, KIBIBYTE, ROOT, SCRATCH_OWNER, SLOW_ROUNDS_MAX, Bench, quantile
from runtimes.cli_engine import CliEngine
from sandboxd.config import DEFAULT_IMAGE

REQUESTS, CLIENTS_AT_ONCE = 200, 4
PUBLISHED = 8080


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
    """1 GiB out of a sandbox through a forward, against the same server and the same client without it, by turns.

    The port inside is a TCP port: a direct connection to it is the measure of both forwards. What a Unix socket of
    the server would carry is told besides, and what a port carries that the engine itself publishes.
    """
    name, published_by = engine.name.value, f"{engine.name.value} -p"
    plain, through = os.path.join(bench.directory, f"{name}.direct"), os.path.join(bench.directory, f"{name}.through")
    with (
        bench.sandbox(name) as box,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        published(bench, engine) as port_of_engine,
    ):
        unix.bind(plain)
        unix.listen()
        pid = int(str(bench.call("inspect", box)["pid"]))
        descriptors = (tcp.fileno(), unix.fileno())
        with companion(bench, "serve", "0", *map(str, descriptors), inside=pid, passed=descriptors) as far:
            port = int(str(bench.call("forward", box, far.said)["host_port"]))
            bench.call("forward", box, f"{through}:{far.said}")
            places: dict[str, tuple[str, int] | str] = {
                "TCP": ("127.0.0.1", port),
                "Unix": through,
                "direct TCP": tcp.getsockname(),
                "direct Unix": plain,
            }
            if port_of_engine is not None:
                places[published_by] = ("127.0.0.1", port_of_engine)
            taken: dict[str, list[float]] = {place: [] for place in places}
            for _ in range(min(bench.rounds, SLOW_ROUNDS_MAX)):
                for place, where in places.items():
                    taken[place].append(download(where) * 1000)
    goal, told = "ratio <= 1.25 (0.8 of the speed)", "none, told"
    for ours, than, target in (
        ("TCP", "direct TCP", goal),
        ("Unix", "direct TCP", goal),
        ("Unix", "direct Unix", told),
        ("TCP", published_by, told),
    ):
        if than in taken:
            row, cpus = f"forward 1 GiB, {ours}", f"{os.cpu_count()} CPUs"
            bench.book(row, name, taken[ours], than=f"{than}, {cpus}", theirs=taken[than], target=target)


def download(place: tuple[str, int] | str) -> float:
    """Seconds until 1 GiB has come from a server there."""
    started, total, buffer = time.perf_counter(), 0, bytearray(256 * KIBIBYTE)
    with socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET) as connected:
        connected.connect(place)
        connected.sendall(f"{GIBIBYTE}\n".encode())
        while count := connected.recv_into(buffer):
            total += count
    if total != GIBIBYTE:
        raise SystemExit(f"bench: {place} gave {total} bytes")
    return time.perf_counter() - started


@contextlib.contextmanager
def published(bench: Bench, engine: CliEngine) -> Iterator[int | None]:
    """The port on the host's loopback at which the engine itself publishes a server; None: its network is broken."""
    client = engine.client_of(engine.info)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    limits = (
        f"--ulimit={kind}={most}" for kind, most in (("nofile", 4096), ("nproc", engine.info.nproc_hard_max)) if most
    )
    name = f"{SCRATCH_OWNER}-{os.getpid()}-{engine.name.value}"
    flags = ("--detach", "--rm", f"--name={name}", f"--publish=127.0.0.1:{port}:{PUBLISHED}", *limits)
    run = subprocess.run(
        client.call("run", *flags, DEFAULT_IMAGE, "sleep", "300"), check=False, capture_output=True, text=True
    )
    if run.returncode != 0:
        print(f"bench: {engine.name.value} publishes no port here: {run.stderr.strip()}", file=sys.stderr)
        yield None
        return
    try:
        look = client.call("inspect", "--format={{.State.Pid}}", name)
        pid = int(subprocess.run(look, check=True, capture_output=True, text=True).stdout)
        with companion(bench, "serve", str(PUBLISHED), inside=pid):
            yield port
    finally:
        subprocess.run(client.call("rm", "-f", name), check=True, capture_output=True)


def bench_proxy(bench: Bench, engine: CliEngine) -> None:
    """A request through the proxy, against one of the same client to the same server."""
    name = engine.name.value
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        url = f"http://127.0.0.1:{port}/"
        with (
            bench.sandbox(name, "--allow", f"127.0.0.1:{port}") as box,
            companion(bench, "serve", "0", str(tcp.fileno()), passed=(tcp.fileno(),)),
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
            beside = int(row["pid"]) if row["network"] == "own" else None
            with companion(bench, "get", str(row["address"]).rpartition(":")[2], inside=beside) as direct:
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
