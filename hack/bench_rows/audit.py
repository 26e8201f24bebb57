"""The audit log: what a request costs with it and without, what its writer manages, and what a proof takes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bench_rows.ground import Bench
from runtimes.cli_engine import CliEngine
from sandboxd.audit.files import AuditFiles, Note
from sandboxd.audit.reading import verify
from sandboxd.audit.trail import Trail
from sandboxd.client import Connection
from sandboxd.config import DEFAULT_IMAGE
from tests.engine.daemons import Daemon

REQUESTS = 200
"""In a row, of which one figure is taken: one alone is a tenth of a millisecond, and its noise as much."""

LINES = 100_000
QUEUED_MAX = 2048
FILE_BYTES_MAX, FILES_MAX = 16 * 1024 * 1024, 8
FLUSH_S_MAX = 60.0
ROUNDS = 3


def bench_audit(bench: Bench, engine: CliEngine) -> None:
    """Requests that are written down, against the same ones at a daemon without the log; then the log by itself."""
    name = engine.name.value
    with (
        _touching(bench, name, enabled=True) as ours,
        _touching(bench, name, enabled=False) as theirs,
    ):
        bench.compare(
            f"{REQUESTS} requests, audited",
            name,
            ours=ours.seconds,
            theirs=theirs.seconds,
            than="without the log",
            target="<= 20 ms more",
        )
    writing_ms, proving_ms = [], []
    for number in range(ROUNDS):
        directory = os.path.join(bench.directory, f"audit-{name}-{number}")
        taken = _write(directory)
        writing_ms.append(taken * 1000)
        proving_ms.append(_prove(directory) * 1000)
    bench.book(f"audit, {LINES} lines", name, writing_ms, target="<= 5000 ms to write")
    bench.book(f"audit verify of {LINES}", name, proving_ms, target="<= 3000 ms")


class _Touching:
    """A daemon with a sandbox, and a connection to it."""

    def __init__(self, connection: Connection, sandbox: str) -> None:
        self._connection = connection
        self._sandbox = sandbox

    def seconds(self) -> float:
        """What so many of the cheapest requests take that change something."""
        params = {"sandbox": self._sandbox}
        started_s = time.perf_counter()
        for _ in range(REQUESTS):
            self._connection.call("sandbox/touch", params)
        return time.perf_counter() - started_s


@contextlib.contextmanager
def _touching(bench: Bench, engine: str, *, enabled: bool) -> Iterator[_Touching]:
    """See ``_Touching``; with the log or without."""
    directory = Path(bench.directory, f"touched-{engine}-{enabled}")
    env = {"SANDBOXD_AUDIT_ENABLED": str(enabled).lower(), "SANDBOXD_DEFAULTS_IMAGE": DEFAULT_IMAGE}
    daemon = Daemon(directory, env=env)
    daemon.start()
    try:
        box = daemon.create(engine)
        with daemon.connect() as connection:
            yield _Touching(connection, box["id"])
        daemon.remove(box)
    finally:
        daemon.stop()


def _write(directory: str) -> float:
    """Have the writer take so many notes, as they come from requests, and wait until the last is in a file."""
    files = AuditFiles(directory, bytes_max=FILE_BYTES_MAX, files_max=FILES_MAX)
    trail = Trail(files)
    trail.start()
    try:
        started_s = time.perf_counter()
        for number in range(LINES):
            fields = {"uid": 0, "pid": number, "method": "sandbox/touch", "result": "ok", "duration_ms": 0.1}
            trail.take(Note(kind="request", fields={**fields, "arguments": {"sandbox": "sb-aaaaaaaaaa"}}))
            if number % QUEUED_MAX == 0:
                trail.flush(timeout_s=FLUSH_S_MAX)
        trail.flush(timeout_s=FLUSH_S_MAX)
        taken_s = time.perf_counter() - started_s
    finally:
        trail.close()
    if trail.lost or trail.written < LINES:
        raise SystemExit(f"bench: the audit log has {trail.written} of {LINES} lines, and lost {trail.lost}")
    return taken_s


def _prove(directory: str) -> float:
    files = AuditFiles(directory, bytes_max=FILE_BYTES_MAX, files_max=FILES_MAX)
    trail = Trail(files)
    with trail.snapshot() as (found, head):
        started_s = time.perf_counter()
        proof = verify(found, head)
        taken_s = time.perf_counter() - started_s
    files.close()
    if not proof.intact or proof.records < LINES:
        raise SystemExit(f"bench: the audit log is not as it was written: {proof.problems}")
    return taken_s
