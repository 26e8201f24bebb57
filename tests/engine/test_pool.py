"""Warm slots on each engine: a claimed sandbox is what was asked for, is one caller's alone, and leaves nothing.

Each test has what it claims compared with a sandbox that was made for it, or with the kernel's own word.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import Connection, RpcError
from tests.engine import kernel
from tests.engine.daemons import IMAGE, PATIENCE_S, Daemon, running, wait_until

pytestmark = pytest.mark.engine

MIB = 1024 * 1024
MNT_DETACH = 2
RACERS = 16
"""Each but the first few waits for a slot of its own."""

CONFIG = """
[defaults]
memory = "64m"
cpus = "0.5"
pids = 64
shm = "8m"
tmp = "16m"

[pool]
max = 6

[templates.{engine}]
description = "What this module claims."
engine = "{engine}"
env = {{ FROM_TEMPLATE = "seen" }}
pool_min = 1
"""

TOLD = ("state", "user", "network", "workspace", "limits", "metadata", "env", "name", "warnings", "template")

PORTRAIT = """
id; hostname; cat /etc/hostname; pwd; env | sort; ulimit -a; umask
awk '$2 != "/" { line[$2] = $2 " " $3 " " $4 } END { for (target in line) print line[target] }' /proc/mounts | sort
grep -E '^(Cap|NoNewPrivs|Seccomp|Groups)' /proc/self/status; ls -A /tmp ~ /run /dev/shm /workspace /.sandboxd
stat -c '%n %A %u:%g' /tmp ~ /run /dev/shm /workspace /workspace/* /.sandboxd/*; ls /sys/class/net; ps -o args
"""


def configured(daemon: Daemon, text: str) -> Daemon:
    """The daemon with a configuration file."""
    directory = Path(daemon.env["XDG_CONFIG_HOME"], "sandboxd")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(text)
    return daemon


def host_mounts(directory: Path) -> list[str]:
    """Mounts in the host's own namespace of, or in, something below this directory."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [line for line in file if f"{directory}/" in line]


def portrait_of(daemon: Daemon, box: dict[str, Any]) -> str:
    """All that can be seen in it, but for what is another one in every container."""
    seen = daemon.sh(box, PORTRAIT).replace(box["id"], "ID")
    return re.sub(r"/proc/self/fd/[0-9]+", "/proc/self/fd/N", seen)


def pool_of(daemon: Daemon, template: str, **fields: Any) -> dict[str, Any]:
    """The one row of a template's own slots, or of a variant with these fields."""
    rows = daemon.call("pool/list")["pools"]
    (row,) = (row for row in rows if row["template"] == template and fields.items() <= row.items())
    return dict(row)


def slots(daemon: Daemon, state: str = "warm") -> list[dict[str, Any]]:
    return [row for row in daemon.journal() if row["state"] == state and row["slot"]]


def warmed(daemon: Daemon, template: str, count: int = 1) -> None:
    assert daemon.call("pool/warm", template=template, count=count)["warm"] >= count


def claim(daemon: Daemon, template: str, **params: Any) -> dict[str, Any]:
    """A sandbox that is from the pool, however long its slot takes."""
    box = daemon.call("sandbox/create", template=template, launch="wait", **params)
    assert (box["launch"], box["miss_reason"]) == ("warm", "")
    return box


@contextlib.contextmanager
def claimed(daemon: Daemon, template: str, **params: Any) -> Iterator[dict[str, Any]]:
    box = claim(daemon, template, **params)
    try:
        yield box
    finally:
        with contextlib.suppress(RpcError):
            daemon.remove(box)


@contextlib.contextmanager
def of_its_own(directory: Path, engine: str, **env: str | None) -> Iterator[Daemon]:
    """A daemon with a pool. In the end no mount may be left on the host, nor anything else."""
    made = configured(Daemon(directory, env={"SANDBOXD_POOL_MAX": None, **env}), CONFIG.format(engine=engine))
    with running(made, (engine,)):
        try:
            yield made
        finally:
            if not made.running:
                made.start()
            made.remove_everything()
            made.call("pool/drain", template=engine)
            wait_until(lambda: made.journal() == [], "nothing was written down any more")
            assert made.containers(engine) == []
    assert host_mounts(directory.parent) == []


@pytest.fixture(scope="module")
def pooled(daemon: Daemon, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose template is named as its engine and has a pool."""
    assert daemon.running, "it has made the image"
    with of_its_own(tmp_path_factory.mktemp("pooled"), engine) as pooled:
        yield pooled


@pytest.mark.parametrize(
    ("mode", "uid"), [("rw", 0), ("rw", 1000), ("rw", 4321), ("ro", 0), ("overlay", 0), ("copy", 1000)]
)
def test_a_claimed_sandbox_is_inside_as_one_that_was_made_for_it(
    pooled: Daemon, engine: str, project: Path, mode: str, uid: int
) -> None:
    """The flags of its mounts and the name that its engine wrote to a file when the slot was made, among all else."""
    (project / "file").write_text("before")
    for path in (project, project / "file"):
        os.chown(path, uid, uid)
    asked: dict[str, Any] = {
        "workspace": {"path": str(project), "mode": mode},
        "limits": {"memory": "96m", "cpus": "0.25", "pids": 48, "shm": "4m", "tmp": "24m", "cpuset": "0"},
        "env": {"ASKED": "for"},
        "metadata": {"key": "value"},
        "name": f"named-{mode}-{uid}",
    }
    with pooled.box(engine, template=engine, launch="cold", **asked) as cold:
        portrait = portrait_of(pooled, cold)
        told = {key: cold[key] for key in TOLD}
        limits = kernel.held(cold["pid"])
    with claimed(pooled, engine, **asked) as warm:
        assert portrait_of(pooled, warm) == portrait
        assert {key: warm[key] for key in TOLD} == told
        assert warm["verified"]
        assert kernel.held(warm["pid"]) == limits
        assert (limits.memory, limits.cpu_millis, limits.pids) == (96 * MIB, 250, 48)
        assert (limits.shm, limits.tmp, limits.home) == (4 * MIB, 24 * MIB, 24 * MIB)
        (project / "late").write_text("written after the slot was made")
        ran = pooled.run(warm, "sh", "-c", "cat file; echo made > made && rm file")
        assert ran.stdout == b"before"
        assert (ran.end["exit_code"] == 0) is (mode != "ro")
        seen = pooled.run(warm, "cat", "late").stdout
        assert seen == (b"" if mode == "copy" else b"written after the slot was made")
    assert sorted(os.listdir(project)) == (["late", "made"] if mode == "rw" else ["file", "late"])
    if mode == "rw":
        assert (project / "made").stat().st_uid == uid


def test_what_is_fixed_at_creation_is_a_miss_with_its_reason(pooled: Daemon, engine: str, tmp_path: Path) -> None:
    warmed(pooled, engine)
    mount = {"path": str(tmp_path), "target": "/mnt"}
    unfit: dict[str, dict[str, Any]] = {
        "image": {"image": "localhost/sandboxd/no-such:image"},
        "nofile": {"limits": {"nofile": 77}},
        "mounts": {"mounts": [mount]},
    }
    for word, params in unfit.items():
        refusal = pooled.refusal("sandbox/create", template=engine, launch="warm", **params)
        assert refusal.type == "pool_exhausted"
        assert refusal.detail.endswith(f": {word}"), refusal
    before = pool_of(pooled, engine, user="1000:1000")["misses"]
    with pooled.box(engine, template=engine, limits={"nofile": 77}, mounts=[mount]) as box:
        assert (box["launch"], box["miss_reason"]) == ("cold", "nofile, mounts")
        assert kernel.held(box["pid"]).nofile == ("77", "77")
    after = pool_of(pooled, engine, user="1000:1000")["misses"]
    assert after.get("nofile, mounts", 0) == before.get("nofile, mounts", 0) + 1


def test_a_caller_says_what_an_empty_pool_means(pooled: Daemon, engine: str) -> None:
    warmed(pooled, engine)
    with pooled.box(engine, template=engine, launch="cold") as box:
        assert (box["launch"], box["miss_reason"]) == ("cold", "")
    with pooled.box(engine, template=engine, launch="warm") as box:
        assert box["launch"] == "warm"
    pooled.call("pool/drain", template=engine)
    refusal = pooled.refusal("sandbox/create", template=engine, launch="warm")
    assert (refusal.type, refusal.detail) == ("pool_exhausted", "no slot is warm")
    assert pooled.refusal("sandbox/create", template=engine, launch="wait", wait="0.1s").type == "pool_exhausted"
    with pooled.box(engine, template=engine) as box:
        assert (box["launch"], box["miss_reason"]) == ("cold", "empty")
    pooled.call("pool/resize", template=engine, max=6)


def test_the_command_line_shows_and_changes_pools(pooled: Daemon, engine: str) -> None:
    assert pooled.ctl_json("pool", "warm", "--template", engine, "2")["warm"] >= 2
    rows = pooled.ctl_json("pool", "list")["pools"]
    (row,) = (row for row in rows if (row["template"], row["user"]) == (engine, "1000:1000"))
    assert (row["template"], row["engine"], row["min"], row["max"]) == (engine, engine, 1, 6)
    assert row["ready_ms"] > 0
    shown = pooled.ctl("pool", "list").stdout.decode()
    assert engine in shown
    assert pooled.ctl_json("pool", "drain", "--template", engine)["drained"] >= 2
    assert pool_of(pooled, engine, user="1000:1000")["drained"]
    assert pooled.ctl("pool", "resize", "--template", engine, "--min", "9").returncode == 2
    rows = pooled.ctl_json("pool", "resize", "--template", engine, "--min", "2", "--max", "7")["pools"]
    assert {(row["min"], row["max"]) for row in rows if row["user"] == "1000:1000"} == {(2, 7)}
    wait_until(lambda: pool_of(pooled, engine, user="1000:1000")["warm"] >= 2, "it was filled to its minimum")
    pooled.ctl_json("pool", "resize", "--template", engine, "--min", "1", "--max", "6")
    assert {row["name"] for row in pooled.ctl_json("template", "list")["templates"]} == {"default", engine}
    template = pooled.ctl_json("template", "get", engine)
    assert template["env"] == {"FROM_TEMPLATE": "seen"}
    assert (template["memory"], template["pool_min"], template["pool_max"]) == ("64m", 1, 6)
    assert b"What this module claims." in pooled.ctl("template", "get", engine).stdout
    assert pooled.ctl("template", "get", "nothing").returncode != 0


def test_racing_callers_each_get_a_sandbox_of_their_own(pooled: Daemon, engine: str, tmp_path: Path) -> None:
    pooled.call("pool/resize", template=engine, max=5)
    warmed(pooled, engine, 5)

    def race(number: int) -> tuple[dict[str, Any], bytes]:
        project = tmp_path / str(number)
        project.mkdir()
        (project / "mine").write_text(str(number))
        params = {"workspace": {"path": str(project)}, "launch": ("wait", "auto")[number % 2], "wait": "60s"}
        with pooled.connect() as connection:
            fields = {"template": engine, "engine": engine, "limits": {"memory": "16m"}, **params}
            box = connection.call("sandbox/create", fields, timeout_s=2 * PATIENCE_S)
        return box, pooled.run(box, "sh", "-c", "cat /workspace/*; echo > /tmp/trace; ls /tmp").stdout

    with ThreadPoolExecutor(RACERS) as racers:
        ran = list(racers.map(race, range(RACERS)))
    assert len({box["id"] for box, _ in ran}) == len({box["container_id"] for box, _ in ran}) == RACERS
    assert [said for _, said in ran] == [f"{number}trace\n".encode() for number in range(RACERS)]
    assert all(box["verified"] for box, _ in ran)
    assert {box["launch"] for box, _ in ran[::2]} == {"warm"}
    assert sum(box["launch"] == "warm" for box, _ in ran) >= RACERS // 2
    for box, _ in ran:
        pooled.call("sandbox/kill", sandbox=box["id"])
    wait_until(lambda: pooled.sandboxes() == [], "all were removed")
    pooled.call("pool/resize", template=engine, max=6)


def test_who_comes_first_is_served_first_and_who_leaves_is_passed_over(pooled: Daemon, engine: str) -> None:
    pooled.call("pool/drain", template=engine)
    wait_until(lambda: pool_of(pooled, engine, user="1000:1000")["filling"] == 0, "none was under way")
    with contextlib.ExitStack() as held:
        lines: list[tuple[Connection, int]] = []
        for number in range(4):
            connection = held.enter_context(pooled.connect())
            fields = {"template": engine, "launch": "wait", "name": f"number-{number}"}
            lines.append((connection, connection.send("sandbox/create", fields)))
            wait_until(
                lambda: pool_of(pooled, engine, user="1000:1000")["waiting"] == len(lines),
                "it stood in line",
            )
        lines[1][0].close()
        wait_until(lambda: pool_of(pooled, engine, user="1000:1000")["waiting"] == 3, "it had gone")
        pooled.call("pool/resize", template=engine, max=1)
        boxes = [line[0].wait(line[1], timeout_s=PATIENCE_S) for line in (lines[0], lines[2], lines[3])]
    made = [row["id"] for row in pooled.sandboxes()]
    assert [row for row in made if row in {box["id"] for box in boxes}] == [box["id"] for box in boxes]
    for box in boxes:
        pooled.remove(box)
    pooled.call("pool/resize", template=engine, max=6)


def test_a_name_is_given_once_and_no_slot_is_lost_over_it(pooled: Daemon, engine: str) -> None:
    warmed(pooled, engine, 4)

    def race(_: int) -> str:
        try:
            return str(pooled.create(engine, template=engine, launch="wait", name="wanted")["id"])
        except RpcError as error:
            return error.type

    with ThreadPoolExecutor(4) as racers:
        said = list(racers.map(race, range(4)))
    assert sorted(said)[:3] == ["conflict"] * 3
    assert [row["id"] for row in pooled.sandboxes()] == sorted(said)[3:]
    assert [row for row in pooled.journal() if row["state"] == "reserved"] == []
    pooled.remove({"id": sorted(said)[3]})


def test_no_mount_stays_whatever_becomes_of_the_project(pooled: Daemon, engine: str, tmp_path: Path) -> None:
    """Neither in the host's namespace nor, once the sandbox is gone, in anybody's."""
    project = tmp_path / "mounted"
    project.mkdir()
    source = f"sandboxd-pool-{engine}-{os.getpid()}".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(source, os.fsencode(project), b"tmpfs", 0, None) == 0, ctypes.get_errno()
    try:
        (project / "file").write_text("seen")
        box = claim(pooled, engine, workspace={"path": str(project)})
    finally:
        assert libc.umount2(os.fsencode(project), MNT_DETACH) == 0
    assert host_mounts(tmp_path) == []
    assert pooled.sh(box, "cat file") == "seen"
    project.rmdir()
    assert is_mounted_anywhere(source)
    pooled.remove(box)
    wait_until(lambda: not is_mounted_anywhere(source), "nobody had it mounted")
    assert host_mounts(tmp_path) == []


def is_mounted_anywhere(source: bytes) -> bool:
    """In any process's namespace."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if source in Path(f"/proc/{name}/mountinfo").read_bytes():
                return True
    return False


def has_ended(pid: int) -> bool:
    """What is dead and not yet waited for counts as well."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("how", ["engine", "init"])
def test_a_slot_that_dies_is_replaced_and_given_to_nobody(pooled: Daemon, engine: str, how: str) -> None:
    warmed(pooled, engine)
    pooled.call("pool/resize", template=engine, min=2)
    wait_until(lambda: pool_of(pooled, engine, user="1000:1000")["warm"] >= 2, "two were warm")
    before = pool_of(pooled, engine, user="1000:1000")["lost"]
    dead = [row for row in slots(pooled) if row["user"]["uid"] == 1000]
    for row in dead:
        if how == "engine":
            pooled.client(engine, "rm", "--force", row["container_id"])
        else:
            pid = int(pooled.client(engine, "inspect", "--format={{.State.Pid}}", row["container_id"]))
            os.kill(pid, signal.SIGKILL)
            wait_until(partial(has_ended, pid), "it was dead")
    with claimed(pooled, engine) as box:
        assert box["id"] not in {row["id"] for row in dead}
        assert pooled.sh(box, "echo alive") == "alive\n"
    assert pool_of(pooled, engine, user="1000:1000")["lost"] == before + len(dead)
    gone = {row["id"] for row in dead}
    wait_until(lambda: gone.isdisjoint(row["id"] for row in pooled.journal()), "they were forgotten")
    assert {row["container_id"] for row in dead}.isdisjoint(pooled.containers(engine))
    pooled.call("pool/resize", template=engine, min=1)


def test_a_claimed_sandbox_is_what_it_was_after_a_stop(pooled: Daemon, engine: str, project: Path) -> None:
    limits = {"memory": "80m", "cpus": "0.2", "pids": 40, "shm": "2m", "tmp": "12m"}
    with claimed(pooled, engine, workspace={"path": str(project)}, limits=limits, name="kept") as box:
        before = kernel.held(box["pid"])
        mounts = pooled.sh(box, "grep -E ' (/workspace|/tmp|/dev/shm) ' /proc/mounts | sort")
        pooled.sh(box, "echo 1 > file")
        pooled.call("sandbox/stop", sandbox=box["id"], grace=0)
        started = pooled.call("sandbox/start", sandbox=box["id"])
        assert started["verified"]
        assert kernel.held(started["pid"]) == before
        assert before.memory == 80 * MIB
        assert pooled.sh(started, "grep -E ' (/workspace|/tmp|/dev/shm) ' /proc/mounts | sort") == mounts
        assert pooled.sh(started, "hostname; cat file; echo 2 >> file").split() == ["kept", "1"]
    assert (project / "file").read_text() == "1\n2\n"


def test_the_engine_is_told_of_a_claims_limits_by_and_by(daemon: Daemon, tmp_path: Path) -> None:
    """Podman 4.3 writes no update down, whoever asks for it: nothing could be seen there."""
    assert daemon.running
    with of_its_own(tmp_path / "own", "docker") as own:
        box = claim(own, "docker", limits={"memory": "80m", "cpus": "0.2", "pids": 40})
        held = kernel.held(box["pid"])

        def is_told() -> bool:
            host = json.loads(own.client("docker", "inspect", box["container_id"]))[0]["HostConfig"]
            return bool((host["Memory"], host["PidsLimit"]) == (80 * MIB, 40))

        assert not is_told()
        wait_until(is_told, "it said what was asked for")
        assert kernel.held(box["pid"]) == held


def test_the_limits_of_a_claimed_sandbox_hold(pooled: Daemon, engine: str) -> None:
    with claimed(pooled, engine, limits={"memory": "48m", "pids": 40, "tmp": "12m"}) as box:
        proof = pooled.call("sandbox/verify", sandbox=box["id"], provoke=True)
        assert proof["verified"], proof
        assert all(row["verified"] for row in proof["limits"]), proof


def test_a_claimed_sandbox_can_be_used_in_every_way(pooled: Daemon, engine: str, project: Path) -> None:
    with claimed(pooled, engine, workspace={"path": str(project)}) as box:
        ref = {"sandbox": box["id"]}
        pooled.call("files/write", **ref, path="/workspace/file", data="Zm9v")
        assert (project / "file").read_text() == "foo"
        assert pooled.call("files/read", **ref, path="file")["data"] == "Zm9v"
        shell = pooled.call("shells/open", **ref)
        assert shell["state"] == "idle"
        done = pooled.ctl("exec", box["id"], "--", "sh", "-c", "echo $FROM_TEMPLATE; cat file")
        assert done.stdout == b"seen\nfoo", done
        fields = {
            "argv": ["sh", "-c", "tty && read x && test $x = a"],
            "stdio": "spool",
            "pty": {"cols": 80, "rows": 24},
        }
        started = pooled.call("commands/start", **ref, **fields)
        pooled.call("commands/send_stdin", **ref, command_id=started["command_id"], data="YQo=")
        assert pooled.call("commands/wait", **ref, command_id=started["command_id"])["exit_code"] == 0


def test_a_path_that_changes_under_racing_claims_is_never_another_directory(
    pooled: Daemon, engine: str, tmp_path: Path
) -> None:
    """What is inside is what was judged and is told, whatever bears its name by then."""
    for name in ("path", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    over = threading.Event()

    def swap() -> None:
        names = [tmp_path / name for name in ("path", "link", "aside")]
        while not over.is_set():
            os.rename(names[0], names[2])
            os.rename(names[1], names[0])
            os.rename(names[0], names[1])
            os.rename(names[2], names[0])

    swapping = threading.Thread(target=swap)
    swapping.start()
    inside: list[tuple[str, str]] = []
    refused: set[str] = set()
    try:
        for _ in range(12):
            try:
                box = pooled.create(engine, template=engine, workspace={"path": str(tmp_path / "path")})
            except RpcError as error:
                refused.add(error.type)
                continue
            # Set aside or not, it is the same directory.
            told = {"aside": "path"}.get(name := os.path.basename(box["workspace"]["path"]), name)
            inside.append((told, pooled.sh(box, "cat /workspace/who")))
            pooled.call("sandbox/kill", sandbox=box["id"])
    finally:
        over.set()
        swapping.join()
    assert inside
    assert refused <= {"invalid_argument", "not_found", "unsupported"}
    assert all(told == found for told, found in inside), inside


# --- daemons of their own -------------------------------------------------------------------------------


def test_a_daemon_that_is_killed_among_claims_leaves_nothing_half_claimed(
    daemon: Daemon, engine: str, tmp_path: Path, project: Path
) -> None:
    assert daemon.running
    with of_its_own(tmp_path / "mortal", engine) as mortal:
        warmed(mortal, engine, 4)

        def claims() -> None:
            with contextlib.suppress(RpcError, OSError):
                while True:
                    mortal.create(engine, template=engine, launch="wait", workspace={"path": str(project)})

        clients = [threading.Thread(target=claims) for _ in range(3)]
        for client in clients:
            client.start()
        wait_until(lambda: [row["state"] for row in mortal.sandboxes()].count("running") >= 3, "some were claimed")
        mortal.kill()
        for client in clients:
            client.join()
        before = {row["id"]: row for row in mortal.journal()}
        mortal.start()
        after = {row["id"]: row for row in mortal.journal() if row["state"] != "creating"}
        assert {row["state"] for row in after.values()} <= {"running", "warm", "removing"}
        for row in before.values():
            if row["state"] == "running":
                assert after[row["id"]]["state"] == "running"
            if row["state"] == "reserved":
                assert row["id"] not in after or after[row["id"]]["state"] == "removing"
        running_ids = {row["id"] for row in before.values() if row["state"] == "running"}
        assert {row["id"] for row in mortal.sandboxes()} == running_ids
        changed = mortal.call("sandbox/get", sandbox=min(running_ids))
        write_pids_max(changed["pid"], 50)
        adopted = {row["id"] for row in after.values() if row["state"] == "warm"} & before.keys()
        for _ in adopted:
            box = claim(mortal, engine, workspace={"path": str(project)})
            assert box["id"] in adopted
        wait_until(
            lambda: (
                {row["container_id"] for row in mortal.journal() if row["container_id"]}
                == set(mortal.containers(engine))
            ),
            "each container was written down",
        )
        wait_until(lambda: kernel.held(changed["pid"]).pids == 64, "what somebody changed was put right")


def write_pids_max(pid: int, pids_max: int) -> None:
    """As an administrator could, past everybody."""
    directory, _ = kernel.group_of(pid, "pids")
    Path(directory, "pids.max").write_text(str(pids_max))


def test_slots_of_an_image_that_was_replaced_are_let_go(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    assert daemon.running
    reference = f"localhost/sandboxd/pool-{os.getpid()}:latest"
    env = {"SANDBOXD_DEFAULTS_IMAGE": reference, "SANDBOXD_POOL_IMAGE_LOOK": "300ms"}
    daemon.client(engine, "tag", IMAGE, reference)
    try:
        with of_its_own(tmp_path / "own", engine, **env) as own:
            warmed(own, engine)
            wait_until(lambda: all(row["image_id"] for row in slots(own)), "it is known what each was made of")
            old = {row["id"]: row["image_id"] for row in slots(own)}
            archive = tmp_path / "image.tar"
            container = own.client(engine, "create", IMAGE, "true").strip()
            own.client(engine, "export", "--output", str(archive), container)
            own.client(engine, "rm", container)
            own.client(engine, "import", "--change", "LABEL other=yes", str(archive), reference)

            def are_replaced() -> bool:
                images = {row["image_id"] for row in slots(own)}
                return bool(images) and None not in images and images.isdisjoint(old.values())

            wait_until(are_replaced, "they were replaced")
            with claimed(own, engine) as box:
                assert box["id"] not in old
    finally:
        daemon.client(engine, "rmi", "--force", reference)


def test_slots_that_nobody_needed_lately_are_let_go(daemon: Daemon, tmp_path: Path) -> None:
    assert daemon.running
    with of_its_own(tmp_path / "own", "podman", SANDBOXD_POOL_IDLE="1s") as own:
        warmed(own, "podman", 3)
        wait_until(lambda: len(slots(own)) == 1, "it shrank to its minimum")
        assert pool_of(own, "podman")["target"] == 1


def test_no_slot_is_made_of_memory_that_the_host_is_to_keep(daemon: Daemon, tmp_path: Path) -> None:
    assert daemon.running
    with of_its_own(tmp_path / "own", "podman", SANDBOXD_POOL_MEMORY_RESERVE="900g") as own:
        with own.box("podman", template="podman") as box:
            assert (box["launch"], box["miss_reason"]) == ("cold", "empty")
        row = pool_of(own, "podman")
        assert (row["warm"], row["filling"], row["made"]) == (0, 0, 0)
