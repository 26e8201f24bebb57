"""Before a bed goes down: sandboxes in every state are left to it. What becomes of them is in ``boot/test_after``.

Last of all, for nothing else must change what is left.
"""

from __future__ import annotations

import json

from tests.engine.daemons import wait_until
from tests.stock.bed import run
from tests.stock.boot.left import DEGRADED, OUTSIDE, PLACE, PROJECT, TOLD, containers, lasting


def test_sandboxes_are_left_working_layered_and_stopped() -> None:
    PROJECT.mkdir(parents=True, exist_ok=True)
    (PROJECT / "outside").write_text(OUTSIDE)
    (PROJECT / "written").unlink(missing_ok=True)
    ctl = lasting()
    ctl.json("daemon", "install")
    ctl.out("secret", "set", "token", stdin="canary")

    ctl.out("create", "--name", "working", "-w", str(PROJECT), "--secret", "token", *DEGRADED)
    script = "echo begun; echo from inside > written; exec sleep 100000"
    command = ctl.out("exec", "-d", "working", "sh", "-c", script).strip()
    wait_until(lambda: ctl.out("logs", "working", command) == "begun\n", "the command has begun")
    ctl.out("create", "--name", "layered", "-w", str(PROJECT), "--overlay", *DEGRADED)
    ctl.out("exec", "layered", "sh", "-c", "echo changed > outside")
    ctl.out("create", "--name", "stopped", *DEGRADED)
    ctl.out("stop", "stopped")
    wait_until(lambda: sum(row["warm"] for row in ctl.json("pool", "list")["pools"]) == 1, "a slot is warm")

    rows = {row["name"]: row for row in ctl.json("ls")["sandboxes"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "working": "running",
        "layered": "running",
        "stopped": "stopped",
    }
    told = {
        "command": command,
        "boxes": {name: ctl.json("inspect", name)["container_id"] for name in rows},
        "containers": containers(),
    }
    TOLD.write_text(json.dumps(told))
    # What a person would have waited for: nothing else sees to it that a power cut finds it.
    run("sync", "-f", str(PLACE))
