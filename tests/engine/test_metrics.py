"""What is counted while sandboxes live, on each engine."""

from __future__ import annotations

from tests.engine.daemons import Daemon
from tests.openmetrics_reader import Family, read


def figures(daemon: Daemon) -> dict[str, Family]:
    return read(daemon.call("daemon/metrics")["text"])


def test_what_sandboxes_and_their_commands_do_is_counted(daemon: Daemon, engine: str) -> None:
    """By differences: the daemon has done other things before."""
    before = figures(daemon)
    with daemon.box(engine, limits={"memory": "48m", "pids": 40}) as box:
        daemon.sh(box, "true")
        assert daemon.run(box, "sh", "-c", "exit 3").end["exit_code"] == 3
        during = figures(daemon)
    after = figures(daemon)

    def grown(name: str, suffix: str = "_total", **labels: str) -> float:
        return after[name].total(suffix, **labels) - before[name].total(suffix, **labels)

    assert grown("sandboxd_commands", verdict="ok") == 1
    assert grown("sandboxd_commands", verdict="nonzero") == 1
    assert grown("sandboxd_exec_seconds", "_count") == 2
    assert grown("sandboxd_create_seconds", "_count", engine=engine) == 1
    assert grown("sandboxd_engine_call_seconds", "_count", engine=engine, verb="run") == 1
    assert grown("sandboxd_requests", method="sandbox/create", result="ok") == 1
    assert grown("sandboxd_events", kind="removed") >= 1, "others may still have been going"

    def more(name: str, **labels: str) -> float:
        return during[name].total("", **labels) - before[name].total("", **labels)

    assert more("sandboxd_sandboxes", state="running", engine=engine) == 1
    assert more("sandboxd_promised_memory_bytes") == 48 * 2**20
    assert more("sandboxd_promised_pids") == 40
    assert more("sandboxd_limits_unverified") == 0
