"""Commands, and what is done to sandboxes that run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

from bench_rows.ground import GIBIBYTE, Bench
from runtimes.cli_engine import CliEngine
from sandboxd.client import RpcError


def bench_exec_socket(bench: Bench, engine: CliEngine) -> None:
    """``true`` over one open connection."""
    null = os.open(os.devnull, os.O_RDWR)
    with bench.sandbox(engine.name.value) as box, bench.connection() as connection:
        params = {"sandbox": box, "argv": ["true"], "stdio": "descriptors"}
        costs = []
        for _ in range(bench.rounds * 20):
            started = time.perf_counter()
            end = connection.call("commands/run", params, (null, null, null))
            costs.append((time.perf_counter() - started) * 1000)
            if end["exit_code"] != 0:
                raise SystemExit(f"bench: true ended with {end}")
    os.close(null)
    bench.book("exec true, socket", engine.name.value, costs, target="p50 <= 2 ms, p90 <= 4 ms")


def bench_exec_process(bench: Bench, engine: CliEngine) -> None:
    """``sandboxctl exec box true`` as a whole process, against the engine's own exec."""
    client = engine.client_of(engine.info)
    with bench.sandbox(engine.name.value) as box:
        container_id = str(bench.call("inspect", box)["container_id"])
        ratio = {"docker": 0.4, "podman": 0.2}[engine.name.value]
        bench.compare(
            "exec true, process",
            engine.name.value,
            lambda: bench.seconds(bench.ctl("exec", box, "true")),
            lambda: bench.seconds([*client.call("exec"), container_id, "true"]),
            than=f"{engine.name.value} exec",
            target=f"ratio <= {ratio}",
        )


def bench_output(bench: Bench, engine: CliEngine) -> None:
    """``cat`` of 1 GiB through ``sandboxctl exec``, against the same ``cat`` on the host."""
    path = os.path.join(bench.project, "gibibyte")
    with open(path, "wb") as file:
        file.truncate(GIBIBYTE)
    with bench.sandbox(engine.name.value, "--workspace", bench.project) as box:

        def through(command: list[str]) -> float:
            """Read the command's output through a pipe, as a caller would, and count it."""
            started = time.perf_counter()
            with subprocess.Popen(
                command, env=bench.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
            ) as process:
                descriptor = process.stdout.fileno() if process.stdout else -1
                total = 0
                while chunk := os.read(descriptor, 1 << 20):
                    total += len(chunk)
            if process.returncode != 0 or total != GIBIBYTE:
                raise SystemExit(f"bench: {command} gave {total} bytes and exit {process.returncode}")
            return time.perf_counter() - started

        bench.compare(
            "cat 1 GiB",
            engine.name.value,
            lambda: through(bench.ctl("exec", box, "cat", "/workspace/gibibyte")),
            lambda: through(["/bin/busybox", "cat", path]) if _is_busybox(bench, box) else through(["cat", path]),
            than="cat on the host",
            target="ratio <= 1.11 (0.9 of the speed)",
        )
    os.unlink(path)


def _is_busybox(bench: Bench, box: str) -> bool:
    asked = subprocess.run(
        bench.ctl("exec", box, "/bin/busybox", "true"), env=bench.env, capture_output=True, check=False
    )
    return asked.returncode == 0


def bench_stats(bench: Bench, engine: CliEngine) -> None:
    """Usage of one sandbox, from the control groups, against the engine's own stats."""
    client = engine.client_of(engine.info)
    with bench.sandbox(engine.name.value) as box, bench.connection() as connection:
        container_id = str(bench.call("inspect", box)["container_id"])

        def ours() -> float:
            started = time.perf_counter()
            connection.call("sandbox/metrics", {"sandboxes": [box]})
            return time.perf_counter() - started

        bench.compare(
            "stats, one",
            engine.name.value,
            ours,
            lambda: bench.seconds(client.call("stats", "--no-stream", container_id)),
            than=f"{engine.name.value} stats",
            target="100 sandboxes <= 20 ms",
        )


def bench_update(bench: Bench, engine: CliEngine) -> None:
    """Change limits and prove them."""
    with bench.sandbox(engine.name.value) as box, bench.connection() as connection:
        costs = []
        for turn in range(bench.rounds):
            started = time.perf_counter()
            connection.call("sandbox/update", {"sandbox": box, "limits": {"pids": 100 + turn}})
            costs.append((time.perf_counter() - started) * 1000)
    bench.book("update, proven", engine.name.value, costs, target="as fast as the engine's update")


def bench_kill(bench: Bench, engine: CliEngine) -> None:
    """Until a kill is answered, and until nothing is left; against the engine's own ways to end a container."""
    client = engine.client_of(engine.info)
    name = engine.name.value
    answered, gone, removed = [], [], []
    with bench.connection() as connection:

        def created() -> dict[str, object]:
            return connection.call("sandbox/create", {"engine": name})

        for _ in range(bench.rounds):
            box = created()["id"]
            started = time.perf_counter()
            connection.call("sandbox/kill", {"sandbox": box})
            answered.append((time.perf_counter() - started) * 1000)
            with contextlib.suppress(RpcError):
                connection.call("sandbox/kill", {"sandbox": box, "wait": True})
            gone.append((time.perf_counter() - started) * 1000)
            foreign = created()
            removed.append(bench.seconds(client.call("rm", "--force", str(foreign["container_id"]))) * 1000)
            connection.call("sandbox/kill", {"sandbox": foreign["id"], "wait": True})
    than = f"{name} rm --force"
    bench.book("kill, answered", name, answered, than=than, theirs=removed, target="<= 20 ms")
    bench.book("kill, nothing left", name, gone, than=than, theirs=removed, target="<= 2 s")


def bench_pause(bench: Bench, engine: CliEngine) -> None:
    """Pause and resume, limits proven again, against the engine's own."""
    client = engine.client_of(engine.info)
    name = engine.name.value
    with bench.sandbox(name) as box, bench.connection() as connection:
        container_id = str(bench.call("inspect", box)["container_id"])

        def ours() -> float:
            started = time.perf_counter()
            for method in ("sandbox/pause", "sandbox/resume"):
                connection.call(method, {"sandbox": box})
            return time.perf_counter() - started

        def theirs() -> float:
            return sum(bench.seconds(client.call(verb, container_id)) for verb in ("pause", "unpause"))

        bench.compare("pause and resume", name, ours, theirs, than=f"{name} pause, unpause", target="as fast")
