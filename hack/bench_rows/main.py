"""The command line of hack/bench, and the course of a run."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import select
import signal
import sys
import tempfile
from collections.abc import Callable

from bench_rows import audit, claims, commands, contests, network, restart
from bench_rows.ground import DRAIN_S_MAX, ROOT, Bench
from runtimes import detect
from runtimes.cli_engine import CliEngine
from runtimes.docker import DockerEngine
from runtimes.model import EngineInfo, EngineName
from runtimes.podman import PodmanEngine

ROWS: dict[str, Callable[[Bench, CliEngine], None]] = {
    "create": claims.bench_create,
    "claim": claims.bench_claim,
    "claim-process": claims.bench_claim_process,
    "burst": claims.bench_burst,
    "slot": claims.bench_slot,
    "exec-socket": commands.bench_exec_socket,
    "exec-process": commands.bench_exec_process,
    "run": contests.bench_run,
    "files": contests.bench_files,
    "output": commands.bench_output,
    "stats": commands.bench_stats,
    "update": commands.bench_update,
    "kill": commands.bench_kill,
    "pause": commands.bench_pause,
    "forward": network.bench_forward,
    "proxy": network.bench_proxy,
    "chroma": network.bench_chroma,
    "restart": restart.bench_restart,
    "audit": audit.bench_audit,
}


def usable_engines(chosen: str | None) -> list[CliEngine]:
    import anyio

    infos: list[EngineInfo] = list(anyio.run(detect.detect_all, dict(os.environ)))
    classes: dict[EngineName, type[CliEngine]] = {EngineName.DOCKER: DockerEngine, EngineName.PODMAN: PodmanEngine}
    return [
        classes[info.name](info, env=dict(os.environ))
        for info in infos
        if info.usable and chosen in (None, info.name)
    ]


def end(pid: int) -> None:
    """End the daemon, and wait: what it still writes down would be in the way of removing its directory."""
    daemon = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(daemon, signal.SIGTERM)
        select.select([daemon], [], [], DRAIN_S_MAX)
    finally:
        os.close(daemon)


def main(document: str, arguments: list[str]) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="hack/bench", description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], metavar="ROW", help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--engine", choices=["podman", "docker"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", metavar="PYTHON", default=sys.executable, help="has llm-sandbox and SWE-ReX")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    # Whoever ends it, by a deadline or so, wants no daemon and no slots left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    compileall.compile_dir(ROOT / "sandboxd", quiet=1)
    with tempfile.TemporaryDirectory(prefix="sandboxd-bench-") as directory:
        bench = Bench(directory, options.rounds, options.peers)
        pid = int(str(bench.call("daemon", "start")["pid"]))
        try:
            for engine in usable_engines(options.engine):
                bench.call("image", "build", "--engine", engine.name.value)
                for name in options.rows or ROWS:
                    ROWS[name](bench, engine)
        finally:
            bench.drain()
            end(pid)
    if options.json:
        json.dump({"rows": bench.rows}, sys.stdout, indent=2)
        print()
    return 0
