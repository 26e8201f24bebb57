"""A name server that first says a public address, and then a private one: with the resolver that a daemon has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PUBLIC = "93.184.215.14"


def test_a_name_is_asked_for_once_and_what_was_judged_is_what_is_connected_to(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:5 attempts:1\n")
    own = ["--net", "--mount"] if os.geteuid() == 0 else ["--map-root-user", "--net", "--mount"]
    enter = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
    words = [sys.executable, "-m", "tests.daemon.rebinding", PUBLIC, "127.0.0.1", "169.254.169.254", "10.0.0.1"]
    done = subprocess.run(
        ["unshare", *own, "sh", "-c", enter, "sh", str(tmp_path / "resolv.conf"), *words],
        capture_output=True,
        cwd=CHECKOUT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    first, *others = said["came_to"]
    assert first == [False, f"connecting to {PUBLIC}"]
    assert [denied for denied, _ in others] == [True, True, True]
    assert all("no name may lead to" in reason for _, reason in others)
    # One question for each connection: there is no second answer to be taken in by.
    assert said["asked"] == [PUBLIC, "127.0.0.1", "169.254.169.254", "10.0.0.1"]
