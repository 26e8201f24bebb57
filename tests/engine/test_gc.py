"""``sandboxctl gc`` on each engine: what carries our label and belongs to nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.model import LABEL_OWNER, LABEL_SANDBOX
from tests.engine.daemons import IMAGE, Daemon, running

pytestmark = pytest.mark.engine


def test_what_nobody_owns_is_shown_and_then_removed(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    """And nothing else: not another owner's, nor what somebody made of a sandbox and gave a name of his own."""
    quiet = Daemon(tmp_path / "quiet", env={"DYING_ARMED": str(tmp_path / "never")}, module="tests.engine.dying")
    with running(quiet), quiet.box(engine) as box:

        def made(name: str, owner: str) -> str:
            labels = (f"--label={LABEL_OWNER}={owner}", f"--label={LABEL_SANDBOX}=sb-stray")
            return quiet.client(engine, "create", f"--name={name}", *labels, IMAGE, "/none").strip()

        stray = made("sandboxd-sb-stray", quiet.owner)
        others = [made("sandboxd-sb-others", daemon.owner + "0"), made(f"mine-{quiet.owner[:8]}", quiet.owner)]
        try:
            assert quiet.ctl("gc", "--dry-run").stdout.split()[5:9] == [
                b"remove",
                b"container",
                stray.encode(),
                engine.encode(),
            ]
            (found,) = quiet.ctl_json("gc", "--dry-run")["found"]
            assert found["reason"] == "it carries our label and no sandbox owns it"
            assert quiet.ctl_json("gc")["found"] == [found]
            assert quiet.ctl("gc").stdout == b""
            assert sorted(quiet.containers(engine)) == sorted([box["container_id"], others[1]])
            assert quiet.state_of(box) == "running"
        finally:
            quiet.client(engine, "rm", "--force", *others)
