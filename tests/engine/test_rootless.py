"""An ordinary user with rootless Podman: what cannot be enforced is refused, and what can be given is right.

The user has no systemd session, so no control group of its own: no limit of it can be enforced, on any host.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandboxd.client import RpcError
from tests.engine import kernel
from tests.engine.daemons import CHECKOUT, IMAGE, PATIENCE_S, Daemon, running, serving, wait_until

pytestmark = pytest.mark.engine

USER = "sandboxd-test"

CALLER = """
import json, sys
from sandboxd.client import Connection, RpcError
path, method, params = sys.argv[1:]
try:
    with Connection.connect(path) as connection:
        print(json.dumps({"result": connection.call(method, json.loads(params))}))
except RpcError as error:
    print(json.dumps({"error": [error.code, error.type, error.brief, error.detail, error.hint]}))
"""


class UsersDaemon(Daemon):
    """A daemon of another user, which only that user may speak to."""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        words = ["-c", CALLER, str(self.socket), method, json.dumps(params)]
        done = subprocess.run(
            [*self._launcher, self._python, *words],
            capture_output=True,
            env=self.env,
            cwd="/",
            timeout=PATIENCE_S,
            check=True,
        )
        reply = json.loads(done.stdout)
        if "error" in reply:
            raise RpcError(*reply["error"])
        result: dict[str, Any] = reply["result"]
        return result


@pytest.fixture(scope="module")
def user(daemon: Daemon) -> Iterator[pwd.struct_passwd]:
    """An ordinary user with subordinate ids, as ``useradd`` makes one; removed again if it was made here."""
    made = False
    try:
        pwd.getpwnam(USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", USER], check=True, capture_output=True)
        made = True
    if f"{USER}:" not in Path("/etc/subuid").read_text():
        ranges = ["--add-subuids", "400000-465535", "--add-subgids", "400000-465535"]
        subprocess.run(["usermod", *ranges, USER], check=True, capture_output=True)
    yield pwd.getpwnam(USER)
    if made:
        subprocess.run(["userdel", "--remove", USER], check=True, capture_output=True)


@pytest.fixture(scope="module")
def place(user: pwd.struct_passwd) -> Iterator[Path]:
    """A directory of that user: home, runtime directory, and the code, which may lie where only root can read."""
    place = Path(tempfile.mkdtemp(prefix="sandboxd-rootless-"))
    for name in ("home", "xdg"):
        (place / name).mkdir(mode=0o700)
    for package in ("sandboxd", "runtimes", "images"):
        shutil.copytree(CHECKOUT / package, place / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for directory, _, files in os.walk(place):
        for path in (directory, *(os.path.join(directory, name) for name in files)):
            os.chown(path, user.pw_uid, user.pw_gid)
    yield place
    shutil.rmtree(place)


def environment(user: pwd.struct_passwd, place: Path) -> dict[str, str | None]:
    """As after a login, but for the systemd session."""
    return {
        "HOME": str(place / "home"),
        "USER": user.pw_name,
        "LOGNAME": user.pw_name,
        "XDG_RUNTIME_DIR": str(place / "xdg"),
        "DBUS_SESSION_BUS_ADDRESS": None,
        "XDG_DATA_HOME": None,
        "XDG_STATE_HOME": None,
        "PYTHONPATH": f"{place / 'code'}:{sysconfig.get_path('purelib')}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def launcher(user: pwd.struct_passwd) -> list[str]:
    """Through a shell: setpriv itself still has root's capabilities when it looks for the program."""
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", "--"]
    return [*become, "sh", "-c", 'exec "$@"', "sh"]


def interpreter(launcher: Sequence[str], env: Mapping[str, str]) -> str:
    """A Python that this user can run the daemon with: this one, or the system's of the same version.

    Root's own may lie below /root, where nobody else can look.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}")
    for candidate in candidates:
        words = [*launcher, candidate, "-c", "import sandboxd.daemon"]
        if subprocess.run(words, env=dict(env), cwd="/", capture_output=True, check=False).returncode == 0:
            return candidate
    pytest.fail(
        f"an ordinary user can run none of {', '.join(candidates)} with the packages in "
        f"{sysconfig.get_path('purelib')}: install {version} and the virtual environment outside of /root"
    )


@pytest.fixture(scope="module")
def rootless(user: pwd.struct_passwd, place: Path) -> Iterator[UsersDaemon]:
    as_user = launcher(user)
    changes = environment(user, place)
    env = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    rootless = UsersDaemon(place / "daemon", env=changes, launcher=as_user, python=interpreter(as_user, env))
    for directory in (rootless.directory, rootless.socket.parent):
        os.chown(directory, user.pw_uid, user.pw_gid)
    with running(rootless, engines=("podman",)):
        rootless.call("image/build", engine="podman", source="busybox", reference=IMAGE)
        yield rootless
    # Ends the process that holds the user's namespace, which would keep the user from being removed.
    rootless.client("podman", "system", "migrate")


@pytest.fixture
def project(user: pwd.struct_passwd, place: Path) -> Iterator[Path]:
    project = Path(tempfile.mkdtemp(dir=place / "home"))
    os.chown(project, user.pw_uid, user.pw_gid)
    yield project
    shutil.rmtree(project)


def test_a_limit_that_cannot_be_enforced_is_refused_with_what_mends_it(rootless: UsersDaemon) -> None:
    """Podman itself would say "ignored" on stderr, and go on without."""
    done = rootless.ctl("create", "--engine", "podman", "--memory", "64m")
    assert done.returncode == 4
    assert b"cannot enforce memory" in done.stderr
    assert b"hint: " in done.stderr
    assert b"--degraded" in done.stderr
    refusal = rootless.refusal("sandbox/create", engine="podman")
    assert refusal.type == "limit_not_enforceable"
    assert rootless.sandboxes() == []
    rootless.assert_nothing_left(("podman",))


def test_doctor_says_so_beforehand(rootless: UsersDaemon) -> None:
    doctor = rootless.call("daemon/doctor")
    assert doctor["healthy"] is False
    (limits,) = (check for check in doctor["checks"] if check["name"] == "podman limits")
    assert limits["status"] == "failure"
    assert "cannot limit memory, cpus, pids" in limits["detail"]
    assert limits["fix"]
    (podman,) = (check for check in doctor["checks"] if check["name"] == "podman" and check["status"] == "ok")
    assert "rootless" in podman["detail"]


def test_degraded_it_works_and_says_what_does_not_hold(
    rootless: UsersDaemon, user: pwd.struct_passwd, project: Path
) -> None:
    (project / "outside").write_text("from outside")
    os.chown(project / "outside", user.pw_uid, user.pw_gid)
    done = rootless.ctl("create", "--engine", "podman", "--degraded", "--json", "-w", str(project))
    assert done.returncode == 0, done.stderr
    box = json.loads(done.stdout)
    assert box["verified"] is False
    unproven = {row["name"]: row["reason"] for row in box["limits"] if not row["verified"]}
    assert {"memory", "cpus", "pids"} <= set(unproven)
    assert all(unproven.values())
    assert box["workspace"]["mounted"] == "keep-id"
    assert box["user"] == f"{user.pw_uid}:{user.pw_gid}"

    script = "id -u; cat outside; stat -c ' %u' outside; echo > inside; stat -c %u inside; exit 7"
    done = rootless.ctl("exec", box["id"], "sh", "-c", script)
    uid = str(user.pw_uid)
    assert done.stdout.split() == [uid.encode(), b"from", b"outside", uid.encode(), uid.encode()]
    assert done.returncode == 7
    assert (project / "inside").stat().st_uid == user.pw_uid

    assert rootless.ctl("stop", box["id"]).returncode == 0
    assert rootless.ctl("start", box["id"]).returncode == 0, "what was agreed to goes on to hold"
    assert rootless.ctl("exec", box["id"], "cat", "outside").stdout == b"from outside"
    assert rootless.ctl("rm", "--wait", box["id"]).returncode == 0
    rootless.assert_nothing_left(("podman",))


def test_it_is_isolated_as_any_other(rootless: UsersDaemon) -> None:
    script = """
        grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; ls /sys/class/net
        touch /probe; touch /etc/probe; touch /.sandboxd/run/probe
        echo > /tmp/probe && echo > ~/probe && echo written
    """
    done = rootless.ctl("run", "--rm", "--engine", "podman", "--degraded", "--", "sh", "-c", script)
    zero = b"0000000000000000"
    expected = [b"CapEff:", zero, b"CapBnd:", zero, b"NoNewPrivs:", b"1", b"Seccomp:", b"2", b"lo", b"written"]
    assert done.stdout.split() == expected
    assert done.stderr.count(b"Read-only file system") == 2
    assert done.stderr.count(b"No such file") == 1


def test_a_way_out_and_a_secret_are_given_as_to_any_other(rootless: UsersDaemon) -> None:
    """Neither needs a network helper, nor a right that this user has not."""
    with serving() as port:
        assert rootless.ctl("secret", "set", "token", stdin=b"canary").returncode == 0
        flags = ("--degraded", "--json", "--allow", f"127.0.0.1:{port}", "--secret", "token")
        done = rootless.ctl("create", "--engine", "podman", *flags)
        assert done.returncode == 0, done.stderr
        box = json.loads(done.stdout)["id"]
        fetch = f"no_proxy= busybox wget -q -O - http://127.0.0.1:{port}/"
        assert rootless.ctl("exec", box, "sh", "-c", fetch).stdout == b"hello"
        assert b"403" in rootless.ctl("exec", box, "sh", "-c", "busybox wget -O - http://evil.example/").stderr
        known = rootless.call("network/get", sandbox=box)
        assert known["denied"] == 1
        assert "busybox" in known["denials"][0]["command"]
        assert rootless.ctl("exec", box, "cat", "/run/secrets/token").stdout == b"canary"
        assert rootless.ctl("rm", "--wait", box).returncode == 0
        assert rootless.ctl("secret", "rm", "token").returncode == 0


def test_the_full_network_is_opened_and_closed_while_it_runs(rootless: UsersDaemon) -> None:
    """By slirp4netns, as Podman does it, whether it was made so or not; a page on an address of the host answers."""
    address = next(entry.address for entry in psutil.net_if_addrs()["docker0"] if entry.family == socket.AF_INET)
    with serving(address) as port:
        fetch = f"timeout 5 busybox wget -q -O - http://{address}:{port}/"
        for asked in ((), ("--network", "full")):
            done = rootless.ctl("create", "--engine", "podman", "--degraded", "--json", *asked)
            assert done.returncode == 0, done.stderr
            box = json.loads(done.stdout)["id"]
            for mode, answer in (("full", b"hello"), ("none", b""), ("full", b"hello")):
                known = rootless.call("network/set", sandbox=box, mode=mode)
                assert (known["mode"], known["verified"], known["problems"]) == (mode, True, [])
                assert rootless.ctl("exec", box, "sh", "-c", fetch).stdout == answer
            assert b"nameserver" in rootless.ctl("exec", box, "cat", "/etc/resolv.conf").stdout
            assert rootless.ctl("rm", "--wait", box).returncode == 0


@pytest.mark.parametrize(
    ("flag", "name"), [("--overlay", "plain"), ("--overlay", "odd: a,b\\c"), ("--copy", "plain")]
)
def test_an_overlay_of_podmans_own_is_compared_carried_back_and_reset(
    rootless: UsersDaemon, user: pwd.struct_passwd, project: Path, flag: str, name: str
) -> None:
    """Nobody but Podman may mount there; and its layer is read by an ordinary user, who may not read all of it."""
    work = project / name
    work.mkdir()
    (work / "dir").mkdir()
    for path in ("text", "gone", "dir/old"):
        (work / path).write_text("old\n")
    for path in (work, *work.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    done = rootless.ctl("create", "--engine", "podman", "--degraded", "--json", "-w", str(work), flag)
    assert done.returncode == 0, done.stderr
    box = json.loads(done.stdout)
    backends = {"--overlay": {"podman-overlay", "fuse-overlayfs"}, "--copy": {"copy", "reflink"}}
    assert box["workspace"]["backend"] in backends[flag]
    script = "echo new >> text; rm gone; rm -r dir; mkdir dir; echo x > dir/new; mkdir shut; chmod 0 shut; id -u"
    done = rootless.ctl("exec", box["id"], "sh", "-c", script)
    assert done.stdout.split() == [str(user.pw_uid).encode()], done.stderr
    assert sorted(os.listdir(work)) == ["dir", "gone", "text"]

    reply = rootless.call("workspace/diff", sandbox=box["id"])
    found = {(change["path"], change["kind"]) for change in reply["changes"]}
    wanted = {("text", "modified"), ("gone", "removed"), ("dir/old", "removed"), ("dir/new", "added")}
    assert found == {*wanted, ("shut", "added")}
    done = rootless.ctl("workspace", "apply", box["id"], "text", "dir")
    assert done.returncode == 0, done.stderr
    assert (work / "text").read_text() == "old\nnew\n"
    assert os.listdir(work / "dir") == ["new"]
    assert (work / "dir" / "new").stat().st_uid == user.pw_uid
    assert (work / "gone").exists()

    assert rootless.ctl("stop", box["id"]).returncode == 0
    done = rootless.ctl("workspace", "reset", box["id"])
    assert done.returncode == 0, done.stderr
    assert rootless.ctl("start", box["id"]).returncode == 0
    done = rootless.ctl("exec", box["id"], "sh", "-c", "cat gone text; ls")
    assert done.stdout.split() == [b"old", b"old", b"new", b"dir", b"gone", b"text"], done.stderr
    assert rootless.ctl("rm", "--wait", box["id"]).returncode == 0
    rootless.assert_nothing_left(("podman",))
    rootless.await_no_layers()


def test_the_home_of_another_user_is_no_project(rootless: UsersDaemon, user: pwd.struct_passwd, place: Path) -> None:
    for path in ("/root", str(place / "home"), "/etc"):
        refusal = rootless.refusal("sandbox/create", engine="podman", workspace={"path": path})
        assert refusal.type == "invalid_argument", path


# --- warm slots -----------------------------------------------------------------------------------------

POOLED = {
    "SANDBOXD_POOL_MAX": "2",
    "SANDBOXD_DEFAULTS_MEMORY": "64m",
    "SANDBOXD_DEFAULTS_TMP": "16m",
    "SANDBOXD_DEFAULTS_PIDS": "64",
}


def place_of(user: pwd.struct_passwd, directory: Path) -> Path:
    """Made, with a file that says which it is."""
    directory.mkdir()
    (directory / "who").write_text(directory.name)
    for path in (directory, directory / "who"):
        os.chown(path, user.pw_uid, user.pw_gid)
    return directory


@contextlib.contextmanager
def pooled(
    user: pwd.struct_passwd, place: Path, engine: str, as_user: Sequence[str], **env: str
) -> Iterator[UsersDaemon]:
    """A daemon of that user with a pool. In the end nothing may be left of it, nor mounted."""
    changes = {**environment(user, place), **POOLED, "SANDBOXD_DEFAULTS_ENGINE": engine, **env}
    merged = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    directory = Path(tempfile.mkdtemp(dir=place, prefix="pooled-"))
    own = UsersDaemon(directory, env=changes, launcher=as_user, python=interpreter(as_user, merged))
    for path in (own.directory, own.socket.parent):
        os.chown(path, user.pw_uid, user.pw_gid)
    with running(own, (engine,)):
        try:
            yield own
        finally:
            own.remove_everything()
            own.call("pool/drain")
            wait_until(lambda: own.journal() == [], "nothing was written down any more")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        assert [line for line in file if f"{place}/home/tmp" in line or f"{directory}/" in line] == []


@pytest.fixture(scope="module")
def slots_of_podman(rootless: UsersDaemon, user: pwd.struct_passwd, place: Path) -> Iterator[UsersDaemon]:
    assert rootless.running, "it has made the image"
    with pooled(user, place, "podman", launcher(user), SANDBOXD_DEFAULTS_LIMITS_POLICY="degraded") as own:
        own.remove(own.call("sandbox/create"))
        yield own


def test_a_slot_gets_its_project_late(slots_of_podman: UsersDaemon, user: pwd.struct_passwd, project: Path) -> None:
    """In a namespace of the user's own, where only a path can be mounted."""
    own = slots_of_podman
    for mode in ("rw", "ro"):
        work = place_of(user, project / mode)
        asked = {"workspace": {"path": str(work), "mode": mode}, "limits": {"tmp": "12m"}, "env": {"A": "b"}}
        box = own.call("sandbox/create", launch="wait", name=f"late-{mode}", **asked)
        assert (box["launch"], box["workspace"]["mounted"]) == ("warm", "keep-id")
        script = "cat who; echo; id -u; hostname; echo $A $HOSTNAME; df -k /tmp | tail -n 1; echo > made; ls"
        done = own.ctl("exec", box["id"], "sh", "-c", script)
        words = done.stdout.decode().split()
        assert words[:5] == [mode, str(user.pw_uid), f"late-{mode}", "b", f"late-{mode}"], done
        assert str(12 * 1024) in words
        assert os.listdir(work) == words[words.index("/tmp") + 1 :] or mode == "rw"
        assert (work / "made").exists() is (mode == "rw")
        if mode == "rw":
            assert (work / "made").stat().st_uid == user.pw_uid
            assert own.ctl("stop", "--grace", "0", box["id"]).returncode == 0
            assert own.ctl("start", box["id"]).returncode == 0
            done = own.ctl("exec", box["id"], "sh", "-c", "cat who; hostname")
            assert done.stdout == b"rwlate-rw\n", done
        own.remove(box)


def test_a_path_that_changes_while_slots_are_claimed_is_never_another_directory(
    slots_of_podman: UsersDaemon, user: pwd.struct_passwd, project: Path
) -> None:
    own = slots_of_podman
    names = [place_of(user, project / "path"), project / "link", project / "aside"]
    names[1].symlink_to(place_of(user, project / "other"))
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            os.rename(names[0], names[2])
            os.rename(names[1], names[0])
            os.rename(names[0], names[1])
            os.rename(names[2], names[0])

    swapping = threading.Thread(target=swap)
    swapping.start()
    inside: list[tuple[str, bytes]] = []
    try:
        for _ in range(12):
            try:
                box = own.call("sandbox/create", workspace={"path": str(names[0])})
            except RpcError:
                continue
            told = "other" if box["workspace"]["path"].endswith("/other") else "path"
            inside.append((told, own.ctl("exec", box["id"], "cat", "/workspace/who").stdout))
            own.call("sandbox/kill", sandbox=box["id"])
    finally:
        over.set()
        swapping.join()
    assert all(told.encode() == found for told, found in inside), inside
    assert inside, "and some arrived"


def test_slots_of_docker_are_made_with_the_project_that_was_used_lately(
    user: pwd.struct_passwd, place: Path, project: Path
) -> None:
    """A member of its group may mount nothing into a container, nor write to its control group."""
    first, other = place_of(user, project / "first"), place_of(user, project / "other")
    group = os.stat("/var/run/docker.sock").st_gid
    become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", f"--groups={user.pw_gid},{group}", "--"]
    with pooled(user, place, "docker", [*become, "sh", "-c", 'exec "$@"', "sh"]) as own:
        cold = own.call("sandbox/create", workspace={"path": str(first)})
        assert (cold["launch"], cold["miss_reason"]) == ("cold", "empty")
        limits = {"memory": "80m", "cpus": "0.25", "pids": 40}
        warm = own.call("sandbox/create", workspace={"path": str(first)}, launch="wait", limits=limits)
        assert (warm["launch"], warm["verified"]) == ("warm", True)
        held = kernel.held(warm["pid"])
        assert (held.memory, held.cpu_millis, held.pids) == (80 << 20, 250, 40)
        done = own.ctl("exec", warm["id"], "sh", "-c", "cat who; echo > made")
        assert (done.returncode, done.stdout) == (0, b"first")
        assert (first / "made").stat().st_uid == user.pw_uid
        refusal = own.refusal("sandbox/create", workspace={"path": str(other)}, launch="warm")
        assert refusal.type == "pool_exhausted"
        again = own.call("sandbox/create", workspace={"path": str(other)}, launch="cold")
        assert own.ctl("exec", again["id"], "cat", "who").stdout == b"other"
        rows = own.call("pool/list")["pools"]
        assert {str(first), str(other)} <= {row["workspace"] for row in rows}
