"""What becomes of sandboxes when their user logs out: with lingering they go on, without it they end and say so.

The user is another one than that of the other tests, whose systemd runs these.
"""

from __future__ import annotations

import contextlib
import json
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.daemons import IMAGE, wait_until
from tests.stock.bed import CALL_S_MAX, CHECKOUT, COMMAND_ENDED, POLICY, ended_with_the_host, quick_bed, sudo

pytestmark = quick_bed

NAME = "bea"
CODE = "/opt/stock/sandboxd"
PYTHON = "/opt/stock/venv/bin/python"
LOGIN = f"login-of-{NAME}"
DEGRADED = ("--degraded",) if POLICY == "degraded" else ()

COUNT = "n=0; while :; do n=$((n + 1)); echo $n > count.new; mv count.new count; sleep 0.1; done"


class User:
    """Somebody who logs in and out."""

    def __init__(self) -> None:
        self.entry = pwd.getpwnam(NAME)
        self.runtime = Path(f"/run/user/{self.entry.pw_uid}")

    def log_in(self) -> None:
        """A session as of a login at a terminal, that lasts until the logout."""
        sudo(f"systemd-run --quiet --unit={LOGIN} --uid={NAME} --property=PAMName=login -- sleep infinity")
        wait_until(lambda: sudo(f"test -S {self.runtime}/systemd/private && echo up || :"), "the user's systemd runs")
        wait_until(self.sessions, "there is a session")

    def log_out(self) -> None:
        sudo(f"systemctl stop {LOGIN}")
        wait_until(lambda: not self.sessions(), "the session is over")

    def sessions(self) -> list[str]:
        rows = sudo("loginctl list-sessions --no-legend").splitlines()
        # The user's own systemd is a session too, of a class of its own, where logind counts those.
        mine = [row.split() for row in rows if NAME in row.split()]
        return [words[0] for words in mine if "manager" not in " ".join(words)]

    def ctl(self, *words: str) -> str:
        """What ``sandboxctl`` prints for this user, where it must succeed."""
        env = [f"XDG_RUNTIME_DIR={self.runtime}", f"PYTHONPATH={CODE}", f"SANDBOXD_DEFAULTS_IMAGE={IMAGE}"]
        argv = ["sudo", "-n", "-u", NAME, "-H", "env", *env, PYTHON, "-m", "sandboxd.cli.main", *words]
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            timeout=CALL_S_MAX,
            check=False,
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.ctl(*words, "--json"))

    def read(self, name: str) -> str:
        """A file of the project."""
        return sudo('cat "$1" 2>/dev/null || :', f"{self.project}/{name}")

    @property
    def project(self) -> str:
        return f"{self.entry.pw_dir}/project"

    def processes(self) -> list[str]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.uids().effective == self.entry.pw_uid:
                    found.append(" ".join(process.cmdline()) or process.name())
        return found


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    """With units installed, an image, and a project; gone afterwards, with all that is theirs."""
    sudo(f"useradd --create-home --shell /bin/bash {NAME}; mkdir -p {CODE}")
    sudo(f'cp -r "$1/sandboxd" "$1/runtimes" "$1/images" {CODE}; chmod -R a+rX {CODE}', str(CHECKOUT))
    user = User()
    sudo(f"install -d -o {NAME} {user.project}")
    user.log_in()
    try:
        user.json("daemon", "install")
        user.ctl("image", "build", "--engine", "podman", "--source", "busybox")
        yield user
    finally:
        sudo(f"systemctl stop {LOGIN} 2>/dev/null || :; loginctl disable-linger {NAME}")
        sudo(f"loginctl terminate-user {NAME} 2>/dev/null || :")
        wait_until(lambda: user.processes() == [], "nothing of the user runs")
        sudo(f"userdel --remove {NAME} 2>/dev/null; rm -rf {CODE}")


def created(user: User, name: str) -> tuple[dict[str, Any], str]:
    """A sandbox in which something counts, and the id of that command."""
    box = user.json("create", "--name", name, "-w", user.project, *DEGRADED)
    command = user.ctl("exec", "-d", name, "sh", "-c", f"echo begun; {COUNT}").strip()
    wait_until(lambda: user.read("count"), "it counts")
    return box, command


def test_without_lingering_all_ends_with_the_last_session_and_is_there_at_the_next(user: User) -> None:
    box, command = created(user, "ended")
    user.log_out()
    wait_until(lambda: user.processes() == [], "nothing of the user runs")
    counted = user.read("count")

    user.log_in()
    found = user.json("inspect", "ended")
    assert found["container_id"] == box["container_id"]
    assert ended_with_the_host(found), found
    (row,) = user.json("ps", "ended")["commands"]
    assert row["command_id"] == command
    assert row["end"]["status"] in COMMAND_ENDED
    assert user.ctl("logs", "ended", command) == "begun\n"
    user.ctl("start", "ended")
    assert user.ctl("exec", "ended", "cat", "count") == counted, "the project is as it was left"
    user.ctl("rm", "--wait", "ended")
    assert user.json("ls")["sandboxes"] == []


def test_with_lingering_nothing_notices_a_logout(user: User) -> None:
    sudo(f"loginctl enable-linger {NAME}")
    box, command = created(user, "lasting")
    daemon = user.json("daemon", "status")["pid"]
    user.log_out()
    counted = int(user.read("count"))
    wait_until(lambda: int(user.read("count")) > counted + 3, "the command goes on")
    assert user.sessions() == []

    assert user.json("daemon", "status")["pid"] == daemon, "nor has the daemon gone"
    found = user.json("inspect", "lasting")
    assert (found["state"], found["pid"]) == ("running", box["pid"])
    (row,) = user.json("ps", "lasting")["commands"]
    assert (row["command_id"], row["state"]) == (command, "running")
    user.ctl("rm", "--wait", "lasting")
