"""``daemon install`` and ``uninstall``, with a systemctl that writes down what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandboxd.cli import units
from tests.daemon.sandboxctl import PATIENCE_S, Ctl, environment, stub_daemon

SYSTEMCTL = """#!/bin/sh
echo "$*" >> "$0.said"
cat "$0.shows" 2>/dev/null
[ "$2" = "$(cat "$0.fails" 2>/dev/null)" ] && { echo "no: $2" >&2; exit 1; }
exit 0
"""


class Host:
    """A user with a systemd of their own, as far as can be seen."""

    def __init__(self, directory: Path) -> None:
        self.systemctl = directory / "bin" / "systemctl"
        self.systemctl.parent.mkdir()
        self.systemctl.write_text(SYSTEMCTL)
        self.systemctl.chmod(0o755)
        self.private = directory / "runtime" / "systemd" / "private"
        self.private.parent.mkdir(parents=True)
        self.private.touch()
        self.units = directory / "config" / "systemd" / "user"
        self.env = {
            **environment(directory),
            "PATH": f"{self.systemctl.parent}:{os.environ['PATH']}",
            "XDG_RUNTIME_DIR": str(directory / "runtime"),
            "XDG_CONFIG_HOME": str(directory / "config"),
        }
        self.ctl = Ctl(self.env)

    @property
    def said(self) -> list[str]:
        path = Path(f"{self.systemctl}.said")
        return path.read_text().splitlines() if path.exists() else []

    def program(self, name: str, script: str) -> None:
        """A program of the host."""
        path = self.systemctl.parent / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def fail_at(self, word: str) -> None:
        Path(f"{self.systemctl}.fails").write_text(word)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_units_are_written_and_systemd_listens(host: Host) -> None:
    done = host.ctl("daemon", "install", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "installed": [str(host.units / name) for name in units.UNITS],
        "socket": host.env["SANDBOXD_SOCKET"],
    }
    assert sorted(os.listdir(host.units)) == ["sandboxd.service", "sandboxd.slice", "sandboxd.socket"]
    assert f"ListenStream={host.env['SANDBOXD_SOCKET']}\n" in (host.units / "sandboxd.socket").read_text()
    assert f'"SANDBOXD_STATE_DIR={host.env["SANDBOXD_STATE_DIR"]}"' in (host.units / "sandboxd.service").read_text()
    assert host.said == [
        "--user daemon-reload",
        "--user stop sandboxd.socket sandboxd.service",
        "--user enable --now sandboxd.socket",
    ]


def test_a_daemon_that_runs_makes_way(host: Host, tmp_path: Path) -> None:
    """Two cannot listen on one socket."""
    with stub_daemon(tmp_path):
        assert host.ctl("daemon", "status").returncode == 0
        assert host.ctl("daemon", "install").returncode == 0
        assert host.ctl("daemon", "status").returncode == 1


def test_a_daemon_of_the_units_is_seen_while_it_runs(host: Host, tmp_path: Path) -> None:
    """By its lock: to connect would start it."""
    assert host.ctl("daemon", "install").returncode == 0
    assert host.ctl("daemon", "status").returncode == 1
    with stub_daemon(tmp_path):
        assert host.ctl("daemon", "status").returncode == 0


def test_uninstall_leaves_nothing(host: Host) -> None:
    assert host.ctl("daemon", "install").returncode == 0
    done = host.ctl("daemon", "uninstall", "--json")
    assert len(json.loads(done.stdout)["uninstalled"]) == 3
    assert os.listdir(host.units) == []
    assert host.said[-2:] == ["--user disable --now sandboxd.socket sandboxd.service", "--user daemon-reload"]
    again = host.ctl("daemon", "uninstall")
    assert (again.returncode, again.stderr) == (0, "sandboxctl: there are no units of ours\n")


WITH_BOOTED = """
import sys
from sandboxd.cli import install
from sandboxd.cli.main import main
install.BOOTED = sys.argv.pop(1)
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("booted", "detail", "hint"),
    [
        (True, "there is none in XDG_RUNTIME_DIR", 'hint: sudo loginctl enable-linger "$USER"\n'),
        (False, "systemd does not run here: nothing to install", "hint: sandboxctl daemon start\n"),
    ],
)
def test_without_a_systemd_nothing_is_written(
    host: Host, tmp_path: Path, booted: bool, detail: str, hint: str
) -> None:
    """A root shell, where lingering helps; a container or another init, where there is nothing that could linger."""
    host.private.unlink()
    done = subprocess.run(
        [sys.executable, "-c", WITH_BOOTED, str(tmp_path if booted else tmp_path / "absent"), "service", "install"],
        env=host.env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 4
    assert detail in done.stderr
    assert done.stderr.endswith(hint)
    assert not host.units.exists()
    assert host.said == []


def test_what_systemd_says_is_said(host: Host) -> None:
    host.fail_at("enable")
    done = host.ctl("daemon", "install")
    assert done.returncode == 4
    assert "cannot enable --now sandboxd.socket: no: enable" in done.stderr
    assert "hint: systemctl --user status" in done.stderr


SHOWN = """MainPID=4711
NRestarts=2
Result=success
StatusText=1 sandbox, 1 running; podman
WatchdogUSec=1min
ActiveState=active
SubState=running
"""


def test_service_install_and_uninstall_are_the_daemons_own(host: Host) -> None:
    """Whoever thinks of it as a service finds it there, and whoever thinks of the daemon here."""
    assert host.ctl("service", "install").returncode == 0
    assert sorted(os.listdir(host.units)) == sorted(units.UNITS)
    assert host.ctl("service", "uninstall").returncode == 0
    assert os.listdir(host.units) == []


def test_the_units_are_shown_with_what_systemd_knows_of_them(host: Host, tmp_path: Path) -> None:
    assert host.ctl("daemon", "install").returncode == 0
    Path(f"{host.systemctl}.shows").write_text(SHOWN)
    done = host.ctl("service", "status", "--json")
    found = json.loads(done.stdout)
    assert (found["installed"], found["listening"], found["state"]) == (True, "active", "active (running)")
    assert (found["status"], found["restarts"], found["watchdog"]) == ("1 sandbox, 1 running; podman", 2, "1min")
    text = host.ctl("service", "status").stdout
    assert "1 sandbox, 1 running; podman" in text
    assert "restarts    2\n" in text
    with stub_daemon(tmp_path):
        done = host.ctl("service", "status", "--json")
        assert (done.returncode, json.loads(done.stdout)["pid"] is not None) == (0, True)


def test_the_same_is_said_where_there_are_no_units(host: Host, tmp_path: Path) -> None:
    """Everything works without systemd, and nobody is asked about it."""
    done = host.ctl("service", "status")
    assert (done.returncode, "not running" in done.stdout, "service install" in done.stdout) == (1, True, True)
    with stub_daemon(tmp_path):
        assert host.ctl("service", "status").returncode == 0
    assert host.said == []


def test_the_log_is_the_journals_or_a_file(host: Host) -> None:
    missing = host.ctl("daemon", "logs")
    assert (missing.returncode, "cannot find a log of the daemon" in missing.stderr) == (1, True)
    state = Path(host.env["SANDBOXD_STATE_DIR"])
    state.mkdir(parents=True, exist_ok=True)
    (state / "daemon.log").write_text("".join(f"line {number}\n" for number in range(300)))
    assert host.ctl("daemon", "logs", "-n", "2").stdout == "line 298\nline 299\n"
    assert json.loads(host.ctl("service", "logs", "--json").stdout)["text"].count("\n") == 100
    assert host.ctl("daemon", "logs", "-n", "many").returncode == 2
    assert host.ctl("daemon", "install").returncode == 0
    host.program("journalctl", 'echo "$*"')
    assert host.ctl("daemon", "logs").stdout == "--user --unit=sandboxd.service --no-pager --lines=100\n"
    assert host.ctl("service", "logs", "-f", "-n", "5").stdout.endswith("--lines=5 --follow\n")
