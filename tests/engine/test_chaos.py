"""A few rounds of hack/chaos on both engines, and that what it looks for would be found."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtimes.model import LABEL_OWNER
from tests.engine.daemons import CHECKOUT, ENGINES, IMAGE, Daemon

sys.path.insert(0, str(CHECKOUT / "hack"))

from chaos_storm.invariants import Observer
from chaos_storm.ledger import FORBIDDEN

pytestmark = pytest.mark.engine

SEED = 23
ROUNDS, CLIENTS, OPERATIONS, FAULTS = 2, 3, 6, 3
RUN_S_MAX = 240


def test_nothing_that_may_not_happen_happens(tmp_path: Path) -> None:
    """The same for ten minutes and more is hack/chaos by hand."""
    log = tmp_path / "log"
    numbers = {
        "--seed": SEED,
        "--rounds": ROUNDS,
        "--clients": CLIENTS,
        "--operations": OPERATIONS,
        "--faults": FAULTS,
        "--log": log,
    }
    words = [str(word) for pair in numbers.items() for word in pair]
    done = subprocess.run(
        [sys.executable, CHECKOUT / "hack/chaos", "--json", *words],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    assert done.stdout, done.stderr
    figures = json.loads(done.stdout)
    assert figures["forbidden"] == dict.fromkeys(FORBIDDEN, 0), (figures["examples"], log.read_text()[-20000:])
    assert done.returncode == 0
    assert sum(figures["operations"].values()) == ROUNDS * CLIENTS * OPERATIONS
    assert sum(figures["faults"].values()) == ROUNDS * FAULTS
    assert figures["sandboxes_most"] > 0


def test_what_is_left_behind_is_found(daemon: Daemon, engine: str) -> None:
    """An invariant that cannot be seen broken proves nothing."""
    observer = Observer(SimpleNamespace(daemon=daemon, engines=ENGINES, mounts=daemon.mounts))  # type: ignore[arg-type]
    before = {wrong.what for wrong in observer.wrong()}

    def found() -> set[str]:
        return {wrong.kind for wrong in observer.wrong() if wrong.what not in before}

    label = f"--label={LABEL_OWNER}={daemon.owner}"
    stray, mount = daemon.boxes / "sb-stray", daemon.directory / "mounted"
    with contextlib.ExitStack() as undo:
        # Not named as ours are, so that the daemon does not clean it up meanwhile.
        container = daemon.client(engine, "create", "--network=none", label, IMAGE, "true").split()[-1]
        undo.callback(daemon.client, engine, "rm", "--force", container)
        assert found() == {"orphan"}
        stray.mkdir()
        undo.callback(stray.rmdir)
        mount.mkdir()
        undo.callback(mount.rmdir)
        subprocess.run(["mount", "-t", "tmpfs", "chaos", mount], check=True)
        undo.callback(subprocess.run, ["umount", mount], check=True)
        assert found() == {"orphan", "directory_left", "mount_left"}
    with daemon.box(engine) as box:
        observer.note()
        record = next(record for record in daemon.journal() if record["id"] == box["id"])
        daemon.kill()
        try:
            daemon.client(engine, "rm", "--force", record["container_id"])
            assert "ghost" in found()
        finally:
            daemon.start()
