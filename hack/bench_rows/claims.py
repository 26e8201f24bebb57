"""Sandboxes: made cold, claimed from slots, and what slots cost."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import time
from pathlib import Path
from typing import Any

from bench_rows.ground import KIBIBYTE, NUMBERS, SCRATCH_OWNER, SLOTS, Bench
from runtimes import argv
from runtimes.cli_engine import CliEngine
from runtimes.model import ContainerSpec, Limits, Mount, Tmpfs, User
from runtimes.seccomp import profile_path
from sandboxd.client import Connection, RpcError
from sandboxd.client.connection import result_of
from sandboxd.config import DEFAULT_IMAGE

CLIENTS = 16
BURST, BURST_SLOTS = 100, 10
CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


def engine_run(bench: Bench, engine: CliEngine) -> float:
    """Seconds of the engine's own ``run -d`` with the flags of a sandbox, the project among them."""
    client = engine.client_of(engine.info)
    spec = ContainerSpec(
        sandbox_id=f"bench{os.getpid()}x{next(NUMBERS)}",
        owner=SCRATCH_OWNER,
        image=DEFAULT_IMAGE,
        command=("/bin/sleep", "60"),
        user=User(uid=1000, gid=1000),
        limits=Limits(memory_bytes_max=2**30, cpu_millis=1000, pids_max=512, shm_bytes_max=2**26, nofile_max=4096),
        mounts=(Mount(source=bench.project, target="/workspace"),),
        tmpfs=tuple(
            Tmpfs(target=target, size_bytes_max=2**26, executable=True)
            for target in ("/tmp", "/home/sandbox", "/run")
        ),
        seccomp_profile=profile_path(),
        nproc_max=engine.info.nproc_hard_max,
    )
    started = time.perf_counter()
    finished = subprocess.run(argv.run_argv(client, spec), capture_output=True, check=True)
    elapsed = time.perf_counter() - started
    container_id = finished.stdout.decode().split()[-1]
    subprocess.run(argv.remove_argv(client, [container_id]), capture_output=True, check=True)
    return elapsed


def bench_create(bench: Bench, engine: CliEngine) -> None:
    """A cold create over the socket, against the engine's own ``run -d`` with the same flags."""

    def theirs() -> float:
        return engine_run(bench, engine)

    with bench.connection() as connection:

        def ours() -> float:
            started = time.perf_counter()
            workspace = {"path": bench.project}
            created = connection.call("sandbox/create", {"engine": engine.name.value, "workspace": workspace})
            elapsed = time.perf_counter() - started
            connection.call("sandbox/kill", {"sandbox": created["id"], "wait": True})
            return elapsed

        bench.compare("cold create", engine.name.value, ours, theirs, than="run -d", target="diff <= 30 ms")


class Pool:
    """The slots of one engine, and claims of them: each with a project, variables and limits of its own."""

    def __init__(self, bench: Bench, engine: CliEngine) -> None:
        self.bench = bench
        self.template = f"warm-{engine.name.value}"
        self.request = {
            "template": self.template,
            "workspace": {"path": bench.project},
            "limits": {"memory": "256m", "cpus": 0.5, "pids": 100},
            "env": {"NAME": "value"},
            "launch": "warm",
        }
        self.claimed: list[object] = []

    def warm(self, connection: Connection, count: int) -> None:
        """Have that many, and nothing being made beside them."""
        connection.call("pool/warm", {"template": self.template, "count": count, "timeout": 300})
        while any(row["filling"] for row in connection.call("pool/list", {})["pools"]):
            time.sleep(0.05)

    def claim(self, connection: Connection) -> float:
        started = time.perf_counter()
        sandbox = connection.call("sandbox/create", self.request)
        elapsed = time.perf_counter() - started
        self.take(sandbox)
        return elapsed

    def claim_at_once(self, clients: int, **changes: object) -> list[float]:
        """How long each of so many clients waits whose requests come together.

        They are connections of one thread, which does nothing but wait: as many threads would fight for their
        interpreter, and for the CPUs with the daemon, and it is that which would be measured.
        """
        sent: dict[Connection, tuple[int, float]] = {}
        waited, replies = [], []
        with contextlib.ExitStack() as opened, selectors.DefaultSelector() as answered:
            for connection in [opened.enter_context(self.bench.connection()) for _ in range(clients)]:
                connection.call("daemon/info", {})
                answered.register(connection, selectors.EVENT_READ)
                sent[connection] = (0, 0.0)
            for connection in sent:
                started = time.perf_counter()
                sent[connection] = connection.send("sandbox/create", {**self.request, **changes}), started
            while answered.get_map():
                for connection in [key.fileobj for key, _ in answered.select()]:
                    for message in connection.read():
                        connection.keep(message)
                    request_id, started = sent[connection]
                    reply = connection.take_reply(request_id)
                    if reply is not None:
                        waited.append(time.perf_counter() - started)
                        replies.append(reply)
                        answered.unregister(connection)
        for reply in replies:
            self.take(result_of(reply))
        return waited

    def take(self, sandbox: dict[str, Any]) -> None:
        """Have a sandbox that was claimed; it must have been."""
        if sandbox["launch"] != "warm" or not sandbox["verified"]:
            raise SystemExit(f"bench: no warm claim: {sandbox['launch']} {sandbox['miss_reason']}")
        self.claimed.append(sandbox["id"])

    def remove_all(self, connection: Connection) -> None:
        for sandbox in self.claimed:
            connection.call("sandbox/kill", {"sandbox": sandbox})
        for sandbox in self.claimed:
            with contextlib.suppress(RpcError):
                connection.call("sandbox/kill", {"sandbox": sandbox, "wait": True})
        self.claimed.clear()


def bench_claim(bench: Bench, engine: CliEngine) -> None:
    """A warm claim with project, variables and limits, beside the engine's ``run -d`` with the same flags."""
    pool, name = Pool(bench, engine), engine.name.value
    with bench.connection() as connection:
        claims, runs = [], []
        for _ in range(bench.rounds):
            pool.warm(connection, 4)
            claims += [pool.claim(connection) * 1000 for _ in range(4)]
            pool.remove_all(connection)
            runs.append(engine_run(bench, engine) * 1000)
        target = "p50 <= 3 ms, p99 <= 15 ms, ratio <= 0.0125"
        bench.book("claim", name, claims, than=f"{name} run -d", theirs=runs, target=target)

        crowd: list[float] = []
        for _ in range(max(1, bench.rounds // 2)):
            pool.warm(connection, CLIENTS)
            crowd += [elapsed * 1000 for elapsed in pool.claim_at_once(CLIENTS)]
            pool.remove_all(connection)
        bench.book(
            f"claim, {CLIENTS} clients", name, crowd, than=f"{name} run -d", theirs=runs, target="p99 <= 25 ms"
        )


def bench_claim_process(bench: Bench, engine: CliEngine) -> None:
    """``sandboxctl run`` as a whole process, a command in it included, against the engine's ``run --rm``."""
    pool, name = Pool(bench, engine), engine.name.value
    client = engine.client_of(engine.info)
    words = ("run", "--template", pool.template, "--launch", "warm", "--memory", "256m", "-w", bench.project, "true")
    theirs = client.call(
        "run", "--rm", "--network=none", "--read-only", "--ulimit=nofile=4096:4096",
        *([f"--ulimit=nproc={engine.info.nproc_hard_max}"] if engine.info.nproc_hard_max else []),
        "--memory=256m", f"--volume={bench.project}:/workspace", DEFAULT_IMAGE, "true",
    )  # fmt: skip
    with bench.connection() as connection:

        def ours() -> float:
            pool.warm(connection, 1)
            before = {row["id"] for row in connection.call("sandbox/list", {})["sandboxes"]}
            elapsed = bench.seconds(bench.ctl(*words), quiet=True)
            pool.claimed += [
                row["id"] for row in connection.call("sandbox/list", {})["sandboxes"] if row["id"] not in before
            ]
            pool.remove_all(connection)
            return elapsed

        def others() -> float:
            return bench.seconds(theirs)

        bench.compare("run, process", name, ours, others, than=f"{name} run --rm", target="less", rounds=bench.rounds)


def bench_burst(bench: Bench, engine: CliEngine) -> None:
    """A hundred claims at once over a pool of ten, each waiting for its turn: how quickly slots come after."""
    pool, name = Pool(bench, engine), engine.name.value
    with bench.connection() as connection:
        connection.call("pool/resize", {"template": pool.template, "max": BURST_SLOTS})
        pool.warm(connection, BURST_SLOTS)
        served = sorted(elapsed * 1000 for elapsed in pool.claim_at_once(BURST, launch="wait", wait="10m"))
        pool.remove_all(connection)
        connection.call("pool/resize", {"template": pool.template, "max": SLOTS})
    bench.book(f"burst, first {BURST_SLOTS}", name, served[:BURST_SLOTS], target="served from what is warm")
    bench.book(f"burst, all {BURST}", name, served, target="first come, first served")
    made = BURST - BURST_SLOTS
    bench.note({"row": "refill", "engine": name, "slots_per_s": round(made / served[-1] * 1000, 2), "n": made})


def bench_slot(bench: Bench, engine: CliEngine) -> None:
    """What an idle slot costs: the memory of its init, and of what its engine keeps beside it."""
    pool = Pool(bench, engine)
    bench.drain()
    with bench.connection() as connection:
        pool.warm(connection, BURST_SLOTS)
        sizes = [size for process in slot_processes(bench) if (size := resident_bytes(process))]
        connection.call("pool/drain", {"template": pool.template})
    entry: dict[str, object] = {
        "row": "idle slot",
        "engine": engine.name.value,
        "pss_bytes": sum(sizes) // BURST_SLOTS,
        "processes": len(sizes) / BURST_SLOTS,
        "n": BURST_SLOTS,
        "target": "podman 0.4 MB and docker 2.6 MB, and init",
    }
    bench.note(entry)


def slot_processes(bench: Bench) -> list[Path]:
    """The directories in /proc of what is there for this daemon's slots, whatever else was started meanwhile.

    Their inits are the processes that see its programs mounted; an engine's are named after a container of these.
    """
    programs = os.path.join(bench.env["SANDBOXD_STATE_DIR"], "bin")
    processes = list(Path("/proc").glob("[0-9]*"))
    inits = [process for process in processes if f" {programs}/" in text_of(process / "mountinfo")]
    containers = {found for init in inits for found in CONTAINER_ID.findall(text_of(init / "cgroup"))}
    named = [each for each in processes if containers.intersection(CONTAINER_ID.findall(text_of(each / "cmdline")))]
    return list({*inits, *named})


def resident_bytes(process: Path) -> int:
    """The proportional set size of a process; 0 where it has ended."""
    rows = (line.split() for line in text_of(process / "smaps_rollup").splitlines())
    return next((int(row[1]) * KIBIBYTE for row in rows if row[0] == "Pss:"), 0)


def text_of(path: Path) -> str:
    """A file of a process; empty where it has ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
