"""Files of a sandbox that means harm: nothing reaches the host, nothing hangs it, and nothing takes its memory.

What the file worker does with each trick by itself is in ``tests/unit/test_init_files_hostile.py``; here it is asked
over the socket, on each engine, with a program inside that fights back.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket as sockets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandboxd.client import RpcError
from tests.engine.conftest import Box
from tests.engine.daemons import PATIENCE_S, Daemon, wait_until

pytestmark = pytest.mark.engine

MIB = 1024 * 1024
RACES = 60
ENTRIES, ENTRIES_SOAK = 30_000, 1_000_000
ENTRIES_LISTED_MAX = 10_000
REMOVAL_PATIENCE_S = 300.0
RSS_GROWTH_BYTES_MAX = 24 * MIB
DEEP = 450
"""Levels of ten characters: more than a path may have."""

REFUSED = {"conflict", "not_found", "unsupported", "invalid_argument"}
"""Every other type is a failure of ours, or says that more than this file is lost."""

Say = Callable[[str], None]


@pytest.fixture
def shared(daemon: Daemon, engine: str, project: Path) -> Iterator[Box]:
    with daemon.box(engine, workspace={"path": str(project)}) as box:
        yield box


class Files:
    """The files of one sandbox over one connection, with a bound on each call."""

    def __init__(self, daemon: Daemon, box: Box) -> None:
        self._connection = daemon.connect()
        self._box = box

    def close(self) -> None:
        self._connection.close()

    def call(
        self, method: str, path: str | bytes, *, patience_s: float = PATIENCE_S, **params: Any
    ) -> dict[str, Any]:
        named = {"path": path} if isinstance(path, str) else {"path": "", "path_bytes": text(path)}
        fields = {"sandbox": self._box["id"], **named, **params}
        return self._connection.call(f"files/{method}", fields, timeout_s=patience_s)

    def read(self, path: str | bytes, **params: Any) -> bytes:
        return base64.b64decode(self.call("read", path, **params)["data"])

    def write(self, path: str | bytes, data: bytes, **params: Any) -> dict[str, Any]:
        return self.call("write", path, data=text(data), **params)

    def refusal(self, method: str, path: str | bytes, **params: Any) -> str:
        """The type of the error."""
        try:
            reply = self.call(method, path, **params)
        except RpcError as error:
            return error.type
        raise AssertionError(f"{method} of {path!r} was not refused: {str(reply)[:200]}")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def files(daemon: Daemon, shared: Box) -> Iterator[Files]:
    with contextlib.closing(Files(daemon, shared)) as files:
        yield files


@contextlib.contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of it: a socket's address has a hundred characters, and no more."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def meanwhile(daemon: Daemon, box: Box, script: str) -> Iterator[None]:
    """Something goes on inside, again and again."""
    started = daemon.call("commands/start", sandbox=box["id"], argv=["sh", "-c", f"while :; do {script}; done"])
    try:
        yield
    finally:
        daemon.call("commands/kill", sandbox=box["id"], command_id=started["command_id"])


# --- ways out -------------------------------------------------------------------------------------------


def test_a_directory_that_turns_into_a_link_leads_nowhere(
    daemon: Daemon, shared: Box, files: Files, tmp_path: Path
) -> None:
    """While the host reads, writes, lists, renames and removes below it. The link leads out to the host."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("the host's")
    daemon.sh(shared, f"mkdir dir && echo inside > dir/file && ln -s {secret} link && ln -s /..{secret} up")
    swap = "mv dir aside; mv link dir; mv dir link; mv up dir; mv dir up; mv aside dir"
    attempts: list[tuple[str, dict[str, Any]]] = [
        ("read", {}),
        ("write", {"data": text(b"inside")}),
        ("stat", {"follow": True}),
        ("list", {}),
        ("rename", {"new_path": "dir/other"}),
        ("rename", {"new_path": "other"}),
        ("make_dir", {}),
        ("remove", {"recursive": True}),
    ]
    outcomes: dict[str, int] = {}
    ends_s = time.monotonic() + PATIENCE_S
    rounds = 0
    with meanwhile(daemon, shared, swap):
        while rounds < RACES or (not {"done", "not_found"} <= outcomes.keys() and time.monotonic() < ends_s):
            rounds += 1
            for method, params in attempts:
                try:
                    reply = files.call(method, "dir" if method == "list" else "dir/file", **params)
                except RpcError as error:
                    outcomes[error.type] = outcomes.get(error.type, 0) + 1
                else:
                    outcomes["done"] = outcomes.get("done", 0) + 1
                    assert base64.b64decode(reply.get("data", "")) in {b"", b"inside", b"inside\n"}
    assert outcomes.keys() <= {"done", *REFUSED}, outcomes
    assert {"done", "not_found"} <= outcomes.keys(), "the race was won and lost"
    assert [entry.name for entry in secret.iterdir()] == ["file"]
    assert (secret / "file").read_text() == "the host's"


NOT_FILES = [
    *(f"/proc/self/fd/{number}" for number in range(12)),
    *("/proc/self/environ", "/proc/1/environ", "/proc/1/mem", "/proc/self/mem"),
    *("/proc/kmsg", "/proc/sysrq-trigger", "/proc/thread-self/fd/0", "/dev/fd/0", "/dev/stdin"),
]


@pytest.mark.parametrize("linked", [False, True], ids=["straight", "through a link"])
def test_descriptors_and_memory_in_proc_are_no_files(
    daemon: Daemon, shared: Box, files: Files, project: Path, linked: bool
) -> None:
    """What the file worker has open, and how it is made, is nobody's business."""
    for number, name in enumerate(NOT_FILES):
        path = f"link-{number}" if linked else name
        if linked:
            (project / path).symlink_to(name)
        assert files.refusal("read", path) in REFUSED, name
        assert files.refusal("write", path, data=text(b"x"), make_parents=False) in REFUSED, name
    assert files.call("stat", ".")["type"] == "dir", "the worker serves on"


@pytest.mark.parametrize("root", ["/proc/self/root", "/proc/1/root", "/proc/self/cwd/../..", "/../../.."])
def test_every_root_is_the_sandboxs_own(daemon: Daemon, shared: Box, files: Files, root: str) -> None:
    """The worker was not started on the host and then shut in: it has never been anywhere else."""
    path = f"{root}/etc/passwd"
    own = daemon.sh(shared, "cat /etc/passwd").encode()
    assert own != Path("/etc/passwd").read_bytes()
    with contextlib.suppress(RpcError):
        assert files.read(path) == own
    assert files.refusal("write", f"{root}/etc/evil", data=text(b"x")) in REFUSED


# --- what does not end, and what waits ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "socket", "dir", "/dev/zero", "/dev/full", "/dev/random", "/dev/tty"])
def test_what_is_no_file_is_neither_read_nor_written(
    daemon: Daemon, shared: Box, files: Files, kind: str, project: Path
) -> None:
    """It would wait for ever, never end, or be a directory."""
    match kind:
        case "fifo":
            os.mkfifo(project / kind)
        case "dir":
            (project / kind).mkdir()
        case "socket":
            with sockets.socket(sockets.AF_UNIX) as listener, directory(project) as here:
                listener.bind(f"/proc/self/fd/{here}/{kind}")
    assert files.refusal("read", kind) in REFUSED
    assert files.refusal("write", kind, data=text(b"x")) in REFUSED
    assert files.call("stat", kind)["type"] in {kind, "char"}
    if kind != "dir":
        assert files.refusal("list", kind) in REFUSED


def test_a_sparse_tebibyte_is_read_where_it_is_asked_for(daemon: Daemon, shared: Box, files: Files) -> None:
    daemon.sh(shared, f"truncate -s {2**40} /tmp/sparse && echo end >> /tmp/sparse")
    before = psutil.Process(daemon.pid).memory_info().rss
    reply = files.call("read", "/tmp/sparse", offset=2**39)
    assert reply["size_bytes"] == 2**40 + len(b"end\n")
    assert base64.b64decode(reply["data"]) == bytes(MIB)
    assert files.read("/tmp/sparse", offset=2**40 - 2) == b"\0\0end\n"
    assert files.read("/tmp/sparse", offset=2**62) == b""
    assert psutil.Process(daemon.pid).memory_info().rss - before < RSS_GROWTH_BYTES_MAX


def test_a_file_that_grows_for_ever_is_read_as_far_as_one_answer_goes(
    daemon: Daemon, shared: Box, files: Files
) -> None:
    with meanwhile(daemon, shared, "head -c 10000000 /dev/zero > /tmp/grows"):
        wait_until(lambda: daemon.run(shared, "test", "-s", "/tmp/grows").end["exit_code"] == 0, "it grows")
        for _ in range(RACES):
            assert len(files.read("/tmp/grows")) <= MIB


# --- too much -------------------------------------------------------------------------------------------


def test_a_directory_with_more_than_anybody_lists_is_cut_short_and_said_to_be(
    daemon: Daemon, engine: str, request: pytest.FixtureRequest, say: Say
) -> None:
    """A million with ``--soak``. Time and memory are those of what is listed, not of what is there."""
    entries = ENTRIES_SOAK if request.config.getoption("--soak") else ENTRIES
    with (
        daemon.box(engine, limits={"memory": "4g", "tmp": "2g"}) as box,
        contextlib.closing(Files(daemon, box)) as files,
    ):
        made = daemon.call(
            "commands/start",
            sandbox=box["id"],
            argv=["sh", "-c", f"mkdir /tmp/many && cd /tmp/many && seq 1 {entries} | xargs touch"],
        )
        assert daemon.call("commands/wait", sandbox=box["id"], command_id=made["command_id"])["status"] == "ok"
        before = psutil.Process(daemon.pid).memory_info().rss
        began_s = time.monotonic()
        listed = files.call("list", "/tmp/many", entries_max=ENTRIES_LISTED_MAX)
        listed_s = time.monotonic() - began_s
        grown = psutil.Process(daemon.pid).memory_info().rss - before
        assert (len(listed["entries"]), listed["truncated"]) == (ENTRIES_LISTED_MAX, True)
        few = files.call("list", "/tmp/many", entries_max=10)
        assert (len(few["entries"]), few["truncated"]) == (10, True)
        assert grown < RSS_GROWTH_BYTES_MAX
        assert files.refusal("remove", "/tmp/many") == "conflict", "it is not empty"
        began_s = time.monotonic()
        files.call("remove", "/tmp/many", recursive=True, patience_s=REMOVAL_PATIENCE_S)
        say(
            f"{entries} entries: {ENTRIES_LISTED_MAX} listed in {listed_s * 1000:.0f} ms, daemon grown by "
            f"{grown / MIB:.1f} MiB; removed in {time.monotonic() - began_s:.1f} s"
        )
        assert files.refusal("stat", "/tmp/many") == "not_found"


def test_a_tree_that_is_deeper_than_a_path_is_long_is_listed_in_part_and_removed(
    daemon: Daemon, shared: Box, files: Files
) -> None:
    daemon.sh(
        shared, f"i=0; while [ $i -lt {DEEP} ]; do mkdir deep_level; cd deep_level; i=$((i+1)); done; echo x > f"
    )
    listed = files.call("list", ".", depth=64)
    assert max(entry["path"].count("/") for entry in listed["entries"]) == 63
    assert files.refusal("stat", "/".join(["deep_level"] * DEEP)) == "invalid_argument"
    files.call("remove", "deep_level", recursive=True)
    assert files.call("list", ".")["entries"] == []


def test_a_full_file_system_is_said_to_be_and_the_old_file_stays(daemon: Daemon, engine: str) -> None:
    with (
        daemon.box(engine, limits={"memory": "64m", "tmp": "1m"}) as box,
        contextlib.closing(Files(daemon, box)) as files,
    ):
        files.write("/tmp/file", b"old")
        assert files.refusal("write", "/tmp/file", data=text(bytes(MIB))) == "not_enough_space"
        assert files.read("/tmp/file") == b"old"
        assert [entry["path"] for entry in files.call("list", "/tmp")["entries"]] == ["file"], "nothing is left of it"
        daemon.sh(box, "head -c 1000000 /dev/zero > /tmp/most; head -c 1000000 /dev/zero > /tmp/rest || true")
        assert files.refusal("write", "/tmp/file", data=text(bytes(MIB))) == "not_enough_space"


# --- names ----------------------------------------------------------------------------------------------

NAMES = [
    b"line\nfeed",
    b"\xff\xfe invalid",
    b"tab\tand\x1b[31mcolour",
    "combining e\u0301".encode(),
    b"-rf",
    b" ",
    b"...",
    b"\\x41",
    b"\xed\xa0\x80 surrogate",
    b"n" * 255,
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:16]))
def test_any_name_that_the_kernel_takes_can_be_worked_with(
    daemon: Daemon, shared: Box, files: Files, name: bytes, project: Path
) -> None:
    """Written, listed, looked at, renamed, read and removed, byte for byte."""
    files.write(b"dir/" + name, b"x")
    (entry,) = files.call("list", "dir")["entries"]
    listed = entry["path"].encode() if entry["path_bytes"] is None else base64.b64decode(entry["path_bytes"])
    assert listed == name
    (project / "dir").chmod(0o755)
    assert [path.name.encode(errors="surrogateescape") for path in (project / "dir").iterdir()] == [name]
    assert files.call("stat", b"dir/" + name)["size_bytes"] == 1
    files.call("rename", b"dir/" + name, new_path="plain")
    files.call("rename", "plain", new_path="", new_path_bytes=text(name))
    assert files.read(name) == b"x"
    files.call("remove", name)
    assert files.refusal("stat", name) == "not_found"


# --- those who fight the worker -------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["STOP", "KILL"])
def test_a_worker_that_is_stopped_or_killed_is_replaced(
    daemon: Daemon, shared: Box, files: Files, signal: str
) -> None:
    """A command has the same uid, and the right to: then the answer says so, or comes from the next worker."""
    files.write("file", b"x")
    outcomes = set()
    spared = "1|$$|$PPID"
    hunt = f"for p in /proc/[0-9]*; do p=${{p#/proc/}}; case $p in {spared}) ;; *) kill -{signal} $p ;; esac; done"
    with meanwhile(daemon, shared, f"{hunt} 2>&-; sleep 0.02"):
        for number in range(RACES):
            try:
                assert files.read("file") == b"x"
                files.write(f"new-{number}", b"y")
            except RpcError as error:
                outcomes.add(error.type)
    assert outcomes <= {"conflict", "timeout"}, outcomes
    assert files.read("file") == b"x"
    files.write("file", b"z")
    assert files.read("file") == b"z"
