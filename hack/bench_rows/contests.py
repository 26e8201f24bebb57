"""Operations that other projects know too: against the engines, and against peers."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from bench_rows.ground import ENTRIES, GIBIBYTE, KIBIBYTE, LARGE_BYTES, MEBIBYTE, ROOT, SLOW_ROUNDS_MAX, Bench
from runtimes.cli_engine import CliEngine
from runtimes.model import EngineName
from sandboxd.client import Connection, Message
from sandboxd.config import DEFAULT_IMAGE

PEERS = ("llm-sandbox", "swe-rex")


class Operations:
    """What agents do all day, with our sandbox over one open connection, and with the engine's own commands.

    Both have a directory of ``ENTRIES`` files. Ours are in the project and theirs in the container's own layer, which
    is where a ``cp`` of the engine's puts them.
    """

    def __init__(self, bench: Bench, engine: CliEngine, box: str, container: str, connection: Connection) -> None:
        self._call = engine.client_of(engine.info).call
        self._bench = bench
        self._box = box
        self._container = container
        self._connection = connection
        self.host = os.path.join(bench.directory, "host")
        os.makedirs(os.path.join(self.host, "many"), exist_ok=True)
        for name, size in (("small", KIBIBYTE), ("large", LARGE_BYTES)):
            with open(os.path.join(self.host, name), "wb") as file:
                file.write(base64.b64encode(os.urandom(size * 3 // 4))[:size])
        for number in range(ENTRIES):
            Path(self.host, "many", str(number)).touch()
        self.seconds_of = bench.seconds
        for where in (bench.ctl("exec", box), [*self._call("exec"), container]):
            many = "/workspace/many" if where[0] == bench.ctl()[0] else "/tmp/many"
            bench.seconds([*where, "sh", "-c", f"mkdir -p {many} && cd {many} && seq 1 {ENTRIES} | xargs touch"])

    @property
    def ours(self) -> Mapping[str, Callable[[], float]]:
        """Seconds of each, over the socket."""
        return {
            "run-true": self._run("true"),
            "run-1m": self._run("head", "-c", str(MEBIBYTE), "/dev/zero", bytes_wanted=MEBIBYTE),
            "write-small": self._write("small"),
            "read-small": self._read("small", KIBIBYTE),
            "write-large": self._write("large"),
            "read-large": self._read("large", LARGE_BYTES),
            "list": self._list,
        }

    @property
    def engines(self) -> Mapping[str, tuple[str, Callable[[], float]]]:
        """With what, and seconds of each, a client process per call."""

        def run(*argv: str) -> tuple[str, Callable[[], float]]:
            words = [*self._call("exec"), self._container, *argv]
            return "exec", lambda: self.seconds_of(words, stdout=subprocess.PIPE)

        def copy(source: str, target: str) -> tuple[str, Callable[[], float]]:
            return "cp", lambda: self.seconds_of([*self._call("cp"), source, target])

        inside, fetched = f"{self._container}:/tmp", os.path.join(self.host, "fetched")
        return {
            "run-true": run("true"),
            "run-1m": run("head", "-c", str(MEBIBYTE), "/dev/zero"),
            "write-small": copy(os.path.join(self.host, "small"), f"{inside}/small"),
            "read-small": copy(f"{inside}/small", fetched),
            "write-large": copy(os.path.join(self.host, "large"), f"{inside}/large"),
            "read-large": copy(f"{inside}/large", fetched),
            "list": run("ls", "-la", "/tmp/many"),
        }

    def _timed(self, work: Callable[[], int], wanted: int) -> float:
        started = time.perf_counter()
        got = work()
        elapsed = time.perf_counter() - started
        if got != wanted:
            raise SystemExit(f"bench: {got} came, and not {wanted}")
        return elapsed

    def _run(self, *argv: str, bytes_wanted: int = 0) -> Callable[[], float]:
        params = {"sandbox": self._box, "argv": list(argv), "stdio": "spool", "follow": True}

        def work() -> int:
            got = 0

            def take(message: Message) -> None:
                nonlocal got
                if message.content["method"] == "commands/output":
                    got += len(base64.b64decode(message.content["params"]["data"]))

            self._connection.call("commands/run", params, on_notification=take)
            return got

        return lambda: self._timed(work, bytes_wanted)

    def _write(self, name: str) -> Callable[[], float]:
        """Small ones in the message, large ones by descriptor."""

        def work() -> int:
            params: dict[str, object] = {"sandbox": self._box, "path": name}
            with open(os.path.join(self.host, name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size <= MEBIBYTE:
                    params["data"] = base64.b64encode(file.read()).decode()
                    written = self._connection.call("files/write", params)
                else:
                    written = self._connection.call("files/write", params | {"descriptor": True}, (file.fileno(),))
            return size - int(written["size_bytes"])

        return lambda: self._timed(work, 0)

    def _read(self, name: str, size: int) -> Callable[[], float]:
        params = {"sandbox": self._box, "path": name}

        def small() -> int:
            return len(base64.b64decode(self._connection.call("files/read", params)["data"]))

        def large() -> int:
            got: list[int] = []

            def take(message: Message) -> None:
                if message.content["method"] == "files/opened":
                    got.extend(self._connection.take_descriptors(message, 1))

            self._connection.call("files/read", params | {"descriptor": True}, on_notification=take)
            with open(got[0], "rb") as file, open(os.path.join(self.host, "fetched"), "wb") as target:
                total = 0
                while copied := os.copy_file_range(file.fileno(), target.fileno(), GIBIBYTE):
                    total += copied
            return total

        return lambda: self._timed(small if size <= MEBIBYTE else large, size)

    def _list(self) -> float:
        params = {"sandbox": self._box, "path": "many", "entries_max": ENTRIES}
        return self._timed(lambda: len(self._connection.call("files/list", params)["entries"]), ENTRIES)


@contextlib.contextmanager
def operations(bench: Bench, engine: CliEngine) -> Iterator[tuple[Operations, str]]:
    """A sandbox of ours and a plain container of the engine's; and the container's id."""
    call = engine.client_of(engine.info).call
    limits = ["--ulimit=nofile=4096:4096"]
    if engine.info.nproc_hard_max is not None:
        limits.append(f"--ulimit=nproc={engine.info.nproc_hard_max}:{engine.info.nproc_hard_max}")
    words = call("run", "--detach", "--network=none", "--label=sandboxd-bench", *limits, DEFAULT_IMAGE)
    with bench.sandbox(engine.name.value, "--workspace", bench.project) as box, bench.connection() as connection:
        started = subprocess.run([*words, "/bin/sleep", "3600"], capture_output=True, check=True)
        container = started.stdout.decode().split()[-1]
        try:
            yield Operations(bench, engine, box, container, connection), container
        finally:
            subprocess.run(call("rm", "--force", container), capture_output=True, check=True)


class PeerFailed(Exception):
    """A peer cannot be measured, or not with this operation."""


@contextlib.contextmanager
def peer(bench: Bench, name: str, container: str, host: str) -> Iterator[Callable[[str], float]]:
    """What does an operation and says how long it took.

    Raises:
        PeerFailed: it is not installed, or does not work here.
    """
    words = [bench.peers_python, str(ROOT / "hack" / "bench_rows" / "peers.py"), name, container, host]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def do(operation: str) -> float:
            with contextlib.suppress(BrokenPipeError):
                asks.write(f"{operation}\n")
                asks.flush()
            took = answers.readline()
            if not took:
                raise PeerFailed(f"{operation} failed")
            return float(took)

        try:
            said = answers.readline().strip()
            if said != "ready":
                raise PeerFailed(said or "it does not start")
            yield do
        finally:
            with contextlib.suppress(BrokenPipeError):
                asks.close()


def contest(bench: Bench, engine: CliEngine, rows: Mapping[str, tuple[str, int]]) -> None:
    """Each of some operations against the engine's own way, and then against each peer.

    Args:
        bench: The daemon.
        engine: Whose.
        rows: By operation, the row's name and how often at most.
    """
    name = engine.name.value
    with operations(bench, engine) as (done, container):
        for operation, (row, most) in rows.items():
            how, theirs = done.engines[operation]
            ours = done.ours[operation]
            rounds = min(bench.rounds, most)
            bench.compare(row, name, ours, theirs, than=f"{name} {how}", target="ratio < 1", rounds=rounds)
        # They know Docker, and speak to one machine's only engine.
        for other in PEERS if engine.name is EngineName.DOCKER else ():
            try:
                with peer(bench, other, container, done.host) as do:
                    for operation, (row, most) in rows.items():
                        ours, theirs = done.ours[operation], partial(do, operation)
                        rounds = min(bench.rounds, most)
                        bench.compare(row, name, ours, theirs, than=other, target="ratio < 1", rounds=rounds)
            except PeerFailed as error:
                bench.rows.append({"row": f"against {other}", "engine": name, "skipped": str(error)})
                print(f"{f'against {other}':<22} {name:<7} {error}", file=sys.stderr)


def bench_run(bench: Bench, engine: CliEngine) -> None:
    """A command to its end, and one that writes 1 MiB, with its output kept and followed."""
    most = bench.rounds
    contest(bench, engine, {"run-true": ("run true", most), "run-1m": ("run, 1 MiB of output", most)})


def bench_files(bench: Bench, engine: CliEngine) -> None:
    """Files in and out, small and large, and a long list of them."""
    most = bench.rounds
    rows = {
        "write-small": ("write 1 KiB", most),
        "read-small": ("read 1 KiB", most),
        "write-large": ("write 100 MiB", SLOW_ROUNDS_MAX),
        "read-large": ("read 100 MiB", SLOW_ROUNDS_MAX),
        "list": ("list 10 000 entries", SLOW_ROUNDS_MAX),
    }
    contest(bench, engine, rows)
