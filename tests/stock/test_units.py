"""The daemon as a systemd user service that starts when somebody connects."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.process import SERVICE_VARIABLES
from sandboxd.cli import units
from sandboxd.client import Connection
from tests.engine.daemons import wait_until
from tests.stock.bed import CALL_S_MAX, POLICY, quick_bed, run
from tests.stock.installed import SOCKET, UNITS, Ctl, journal, service, show

pytestmark = quick_bed

WATCHDOG_S = 4
"""Short, for it is waited for, and long enough for a busy host to have its daemon answer in time."""


HELD = {
    "Delegate": "yes",
    "KeyringMode": "private",
    "KillMode": "process",
    "LimitCORE": "0",
    "NoNewPrivileges": "no",
    "OOMPolicy": "continue",
}


class Hardened:
    """What a service may do that has one more of systemd's options."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def run(self, option: str, *words: str) -> subprocess.CompletedProcess[str]:
        argv = ["systemd-run", "--user", "--quiet", "--wait", "--pipe", "--collect", f"--property={option}", *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=CALL_S_MAX, check=False)

    def podman_starts(self, option: str) -> bool:
        """Whether Podman can set everything up: nothing of it is there yet."""
        place = self._directory / option
        place.mkdir(mode=0o700)
        own = [f"{name}={place}" for name in ("HOME", "XDG_RUNTIME_DIR")]
        done = self.run(option, "env", *own, "podman", "unshare", "true")
        pause = place / "libpod" / "tmp" / "pause.pid"
        if pause.exists():
            os.kill(int(pause.read_text()), signal.SIGKILL)
        return done.returncode == 0


@pytest.fixture
def hardened() -> Iterator[Hardened]:
    """Not in /tmp, of which a service may have one of its own."""
    directory = Path.home() / "hardened"
    directory.mkdir()
    yield Hardened(directory)
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def starts_are_not_counted(ctl: Ctl) -> None:
    """More tests than a service may be started in ten seconds: then systemd would start it no more."""
    del ctl
    run("systemctl", "--user", "reset-failed")


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory, daemon: object) -> Iterator[Ctl]:
    """Installed; the daemon of the other tests is only needed for its image."""
    del daemon
    with service(tmp_path_factory.mktemp("units")) as ctl:
        yield ctl


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


def test_the_service_is_held_to_what_a_users_systemd_can_hold_it_to(ctl: Ctl, figures: list[str]) -> None:
    """What is set is in force, and nothing that would keep a rootless engine from its user namespaces."""
    pid = ctl.json("daemon", "start")["pid"]
    (core,) = (row for row in Path(f"/proc/{pid}/limits").read_text().splitlines() if row.startswith("Max core"))
    assert core.split()[-3:-1] == ["0", "0"]
    assert "\nNoNewPrivs:\t0\n" in Path(f"/proc/{pid}/status").read_text()
    found = {name: show("sandboxd.service", name) for name in HELD}
    assert found == HELD
    said = run("systemd-analyze", "--user", "--no-pager", "security", "sandboxd.service")
    level = said.rpartition("sandboxd.service: ")[2].split()[0]
    figures.append(f"systemd-analyze security: {level} of 10 for the service, where 10 is nothing that it looks for")


def test_options_are_left_out_because_podman_starts_nothing_with_them_or_they_do_nothing(
    hardened: Hardened,
) -> None:
    """As docs/INSTALL.md says. The one that Podman does not mind shows that it is not something else that fails."""
    assert hardened.podman_starts("UMask=0077")
    assert not hardened.podman_starts("NoNewPrivileges=yes")
    assert not hardened.podman_starts("RestrictNamespaces=yes")
    own = os.readlink("/proc/self/ns/mnt")
    ignored = hardened.run("PrivateTmp=yes", "readlink", "/proc/self/ns/mnt").stdout.strip() == own
    assert hardened.podman_starts("PrivateTmp=yes") is ignored, "Debian 12 does nothing for it, Debian 13 too much"


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
    assert last["CODE_FILE"].endswith("sandboxd/composition.py")
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


def test_who_reads_waits_or_asks_over_a_restart_sees_a_pause_and_nothing_else(
    ctl: Ctl, tmp_path: Path, figures: list[str]
) -> None:
    """The socket is systemd's: nobody is turned away, no line is lost or told twice, and no end is missed."""
    box = ctl.json("create", *(["--degraded"] if POLICY == "degraded" else []))
    script = "n=0; while [ ! -e /tmp/enough ]; do n=$((n + 1)); echo $n; sleep 0.01; done; echo $n; exit 7"
    command = ctl.out("exec", "-d", box["id"], "sh", "-c", script).strip()
    before = show("sandboxd.service", "MainPID")
    read = tmp_path / "read"
    with (
        open(read, "w") as written,
        ctl.begin("logs", "-f", box["id"], command, stdout=written) as reader,
        ctl.begin("wait", box["id"], command) as waiter,
    ):
        wait_until(read.read_text, "it reads")
        with subprocess.Popen(["systemctl", "--user", "restart", "sandboxd.service"]) as restart:
            pauses_s = []
            while restart.poll() is None or not pauses_s:
                began = time.monotonic()
                ctl.out("ls")
                pauses_s.append(time.monotonic() - began)
        assert restart.returncode == 0
        assert show("sandboxd.service", "MainPID") not in {before, "0"}
        assert reader.poll() is None, "who reads goes on"
        assert waiter.poll() is None, "who waits goes on"
        ctl.out("exec", box["id"], "touch", "/tmp/enough")
        complaints = [one.communicate(timeout=CALL_S_MAX)[1] for one in (waiter, reader)]
        assert (waiter.returncode, reader.returncode, complaints) == (7, 0, ["", ""])
    *counted, last = read.read_text().split()
    assert counted == [str(number) for number in range(1, int(last) + 1)]
    figures.append(f"restart of the service: whoever asks meanwhile waits at most {max(pauses_s):.2f} s")
    ctl.out("rm", "--wait", box["id"])


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
