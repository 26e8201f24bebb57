"""The daemon as a systemd user service that starts when somebody connects."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.process import SERVICE_VARIABLES
from sandboxd.cli import units
from sandboxd.client import Connection
from tests.engine.daemons import wait_until
from tests.stock.bed import POLICY, quick_bed, run
from tests.stock.installed import SOCKET, UNITS, Ctl, journal, show

pytestmark = quick_bed

WATCHDOG_S = 4
"""Short, for it is waited for, and long enough for a busy host to have its daemon answer in time."""


@pytest.fixture(autouse=True)
def starts_are_not_counted(ctl: Ctl) -> None:
    """More tests than a service may be started in ten seconds: then systemd would start it no more."""
    del ctl
    run("systemctl", "--user", "reset-failed")


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory, daemon: object) -> Iterator[Ctl]:
    """Installed; the daemon of the other tests is only needed for its image."""
    ctl = Ctl(tmp_path_factory.mktemp("units"))
    assert ctl.json("daemon", "install") == {
        "installed": [str(UNITS / name) for name in units.UNITS],
        "socket": str(SOCKET),
    }
    try:
        yield ctl
    finally:
        ctl("rm", "--all")
        done = ctl("daemon", "uninstall")
    assert done.returncode == 0, done.stderr
    assert not list(UNITS.glob("sandboxd.*"))
    assert not SOCKET.exists()
    assert show("sandboxd.service", "LoadState") == "not-found"
    assert ctl("daemon", "status").returncode == 1


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    """Nor with characters that mean something to it."""
    odd = '100% "sure" of $HOME, \\ and a\nline'
    (tmp_path / units.SOCKET_UNIT).write_text(units.socket_unit(str(tmp_path / "s%s.sock")))
    (tmp_path / units.SERVICE_UNIT).write_text(units.service_unit(["/bin/true", odd], {"SANDBOXD_X": odd}))
    (tmp_path / units.SLICE_UNIT).write_text(units.slice_unit())
    paths = [str(tmp_path / name) for name in units.UNITS]
    done = subprocess.run(
        ["systemd-analyze", "--user", "--man=no", "verify", *paths], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def environment(pid: int) -> set[str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return {entry.partition("=")[0] for entry in text.split("\0") if entry}


def group(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().rpartition("::")[2].strip()


def test_looking_does_not_start_it(ctl: Ctl) -> None:
    assert ctl("daemon", "stop").returncode == 0
    assert show("sandboxd.socket", "ActiveState") == "active"
    assert ctl("daemon", "status").returncode == 1
    assert ctl("version").stdout.endswith("sandboxd is not running\n")
    assert show("sandboxd.service", "ActiveState") == "inactive"


def test_the_first_request_starts_it_and_it_says_when_it_serves(ctl: Ctl) -> None:
    assert ctl("daemon", "stop").returncode == 0
    assert ctl("ls").returncode == 0, journal()
    assert show("sandboxd.service", "ActiveState") == "active"
    assert show("sandboxd.service", "Type") == "notify"
    assert int(show("sandboxd.service", "MainPID")) == ctl.json("daemon", "status")["pid"]
    assert show("sandboxd.service", "WatchdogUSec") == "1min"
    assert show("sandboxd.service", "Delegate") == "yes"


def test_systemd_knows_how_it_is_and_that_it_is_alive(ctl: Ctl) -> None:
    """What a person looks at first."""
    ctl.json("daemon", "start")
    wait_until(lambda: "0 running; podman" in show("sandboxd.service", "StatusText"), "the status is told")
    wait_until(lambda: show("sandboxd.service", "WatchdogTimestampMonotonic") not in {"", "0"}, "it was fed")
    found = ctl.json("service", "status")
    assert found["pid"] == int(show("sandboxd.service", "MainPID"))
    assert (found["listening"], found["state"], found["watchdog"]) == ("active", "active (running)", "1min")
    assert "podman" in found["status"]
    assert found["lingers"] is True
    assert "listening on" in ctl("service", "logs", "--lines", "200").stdout, journal()
    assert ctl("daemon", "logs").stdout


def test_its_messages_are_in_the_journal_with_their_fields(ctl: Ctl) -> None:
    """Over the journal's own protocol, not as lines of a stream: they can be selected by what they are about."""
    ctl.json("daemon", "start")
    argv = [
        "journalctl",
        "--user",
        "--unit=sandboxd",
        "--identifier=sandboxd",
        "--output=json",
        "--quiet",
        "--no-pager",
    ]

    def told() -> list[dict[str, str]]:
        rows = [json.loads(line) for line in run(*argv, "PRIORITY=6").splitlines()]
        return [row for row in rows if str(row["MESSAGE"]).startswith("listening on")]

    last = wait_until(told, "it was told")[-1]
    assert last["_TRANSPORT"] == "journal"
    assert last["CODE_FILE"].endswith("sandboxd/daemon.py")
    assert last["LOGGER"]


def test_a_reload_reads_settings_and_ends_nothing(ctl: Ctl) -> None:
    """And systemd knows when that is done: a reload of a service that tells returns when it is ready again."""
    pid = ctl.json("daemon", "start")["pid"]
    settings = Path.home() / ".config/sandboxd/config.toml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('[templates.fresh]\ndescription = "Not known before."\n')
    try:
        assert "fresh" not in ctl.out("template", "list")
        run("systemctl", "--user", "reload", "sandboxd.service")
        wait_until(lambda: "Not known before." in ctl.out("template", "list"), "the settings are read")
        wait_until(lambda: show("sandboxd.service", "ActiveState") == "active", "it is ready again")
        assert ctl.json("daemon", "status")["pid"] == pid == int(show("sandboxd.service", "MainPID"))
    finally:
        settings.unlink()


def test_a_sandbox_of_the_service_outlives_it(ctl: Ctl) -> None:
    """What watches its container is in a control group of its own, and knows nothing of the service."""
    box = ctl.json("create", *(["--degraded"] if POLICY == "degraded" else []))
    monitor = int(run("podman", "inspect", "--format={{.State.ConmonPid}}", box["container_id"]))
    assert "sandboxd.service" not in group(monitor)
    assert "sandboxd.service" not in group(box["pid"])
    assert "/sandboxd.slice/" in group(box["pid"]), "all sandboxes are in a slice of their own"
    assert not environment(monitor) & SERVICE_VARIABLES
    script = "for n in $(seq 1 1000); do echo $n; sleep 0.2; done"
    command = ctl("exec", "-d", box["id"], "sh", "-c", script).stdout.strip()
    first = int(show("sandboxd.service", "MainPID"))
    reading = ctl("exec", "-di", box["id"], "sh", "-c", "while read x; do echo got $x; done; echo end").stdout.strip()

    run("systemctl", "--user", "restart", "sandboxd.service")

    second = ctl.json("daemon", "status")["pid"]
    assert second != first
    assert Path(f"/proc/{box['pid']}").exists()
    written = len(ctl("logs", box["id"], command).stdout.split())
    wait_until(lambda: len(ctl("logs", box["id"], command).stdout.split()) > written, "the command goes on")
    # Its stdin went through systemd's descriptor store.
    ref = {"sandbox": box["id"], "command_id": reading}
    with Connection.connect(str(SOCKET)) as connection:
        connection.call("commands/send_stdin", {**ref, "data": base64.b64encode(b"line\n").decode()})
        connection.call("commands/close_stdin", ref)
    wait_until(lambda: ctl("logs", box["id"], reading).stdout == "got line\nend\n", "it read what was typed")
    assert ctl("exec", box["id"], "true").returncode == 0
    assert ctl("rm", box["id"]).returncode == 0, journal()
    wait_until(lambda: not Path(f"/proc/{monitor}").exists(), "nothing watches a container that is gone")


def test_a_killed_daemon_comes_back(ctl: Ctl) -> None:
    """Also without anybody who asks: its sandboxes want to be looked after."""
    pid = ctl.json("daemon", "start")["pid"]
    os.kill(pid, 9)
    wait_until(lambda: show("sandboxd.service", "MainPID") not in {str(pid), "0"}, "systemd starts it again")
    assert ctl("ls").returncode == 0, journal()


def test_a_stop_is_quick_with_a_sandbox_running(ctl: Ctl) -> None:
    """With a monitor in the service's own group it waits for a minute and a half, and kills it then."""
    box = ctl.json("create", *(["--degraded"] if POLICY == "degraded" else []))
    run("systemctl", "--user", "stop", "sandboxd.service")
    assert show("sandboxd.service", "Result") == "success"
    assert Path(f"/proc/{box['pid']}").exists()
    assert ctl("exec", box["id"], "true").returncode == 0
    assert ctl("rm", box["id"]).returncode == 0


def test_a_daemon_that_hangs_is_replaced_and_what_runs_goes_on(ctl: Ctl) -> None:
    """The watchdog: nobody has to notice."""
    drop_in = UNITS / "sandboxd.service.d" / "watchdog.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    try:
        run("systemctl", "--user", "daemon-reload")
        run("systemctl", "--user", "restart", "sandboxd.service")
        box = ctl.json("create", *(["--degraded"] if POLICY == "degraded" else []))
        script = "for n in $(seq 1 10000); do echo $n; sleep 0.2; done"
        command = ctl.out("exec", "-d", box["id"], "sh", "-c", script).strip()
        hung = int(show("sandboxd.service", "MainPID"))
        os.kill(hung, signal.SIGSTOP)

        wait_until(lambda: int(show("sandboxd.service", "MainPID")) not in {0, hung}, "there is another one")
        assert not Path(f"/proc/{hung}").exists()
        assert ctl.json("inspect", box["id"])["pid"] == box["pid"]
        written = len(ctl.out("logs", box["id"], command).split())
        wait_until(lambda: len(ctl.out("logs", box["id"], command).split()) > written, "the command goes on")
        ctl.out("rm", "--wait", box["id"])
    finally:
        shutil.rmtree(drop_in.parent)
        run("systemctl", "--user", "daemon-reload")
        run("systemctl", "--user", "restart", "sandboxd.service")
