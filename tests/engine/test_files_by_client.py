"""Files of a real sandbox by the Python client and the command line: large, full, watched, hostile."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sandboxd.client import (
    FilesystemEvent,
    FilesystemEventType,
    NotEnoughSpaceException,
    NotFoundException,
    Sandbox,
    SandboxException,
    WatchHandle,
)
from tests.engine.conftest import Box
from tests.engine.daemons import Daemon, wait_until

pytestmark = pytest.mark.engine

LARGE_BYTES = 100 * 1024 * 1024
STORM = "i=0; while [ $i -lt 250000 ]; do : >a; : >b; : >c; : >d; i=$((i+1)); done"
"""A million events and more, none like the one before it."""

STORM_BYTES_MAX = 64 * 1024 * 1024
"""What a daemon may grow by that forgets nothing else in the meantime; a million events are some 300 MiB."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("files") / "project"
    project.mkdir()
    return project


@pytest.fixture(scope="module")
def shared(daemon: Daemon, engine: str, project: Path) -> Iterator[Box]:
    with daemon.box(engine, workspace={"path": str(project)}, limits={"tmp": "8m"}) as box:
        yield box


@pytest.fixture
def sandbox(daemon: Daemon, shared: Box, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    monkeypatch.setenv("SANDBOXD_SOCKET", str(daemon.socket))
    return Sandbox.connect(shared["id"])


def until(handle: WatchHandle, condition: Callable[[list[FilesystemEvent]], bool]) -> list[FilesystemEvent]:
    """What happened, once it is enough."""
    happened: list[FilesystemEvent] = []

    def enough() -> bool:
        happened.extend(handle.get_new_events())
        return condition(happened)

    wait_until(enough, "the watch told it")
    return happened


def told(kind: FilesystemEventType, name: str) -> Callable[[list[FilesystemEvent]], bool]:
    return lambda happened: FilesystemEvent(name, kind) in happened


# --- content


def test_a_hundred_mebibytes_go_in_and_come_out(sandbox: Sandbox, project: Path) -> None:
    """Every byte, owned by whoever owns the project."""
    data = os.urandom(1 << 20) * (LARGE_BYTES >> 20)
    sandbox.files.write("large/file", data)
    outside = (project / "large/file").stat()
    assert (outside.st_size, outside.st_uid) == (LARGE_BYTES, project.stat().st_uid)
    assert sandbox.files.read("large/file", "bytes") == data
    assert sum(len(piece) for piece in sandbox.files.read("large/file", "stream")) == LARGE_BYTES
    assert sandbox.commands.run("wc -c < large/file").stdout.strip() == str(LARGE_BYTES)
    sandbox.files.remove("large")
    assert not (project / "large").exists()


def test_what_does_not_fit_is_refused_and_leaves_the_old_content(sandbox: Sandbox) -> None:
    """/tmp is small; nothing of the attempt stays, so that there is room again."""
    sandbox.files.write("/tmp/file", "old")
    with pytest.raises(NotEnoughSpaceException):
        sandbox.files.write("/tmp/file", b"x" * (16 << 20))
    assert sandbox.files.read("/tmp/file") == "old"
    sandbox.files.write("/tmp/file", b"x" * (7 << 20))
    assert [entry.name for entry in sandbox.files.list("/tmp")] == ["file"]


def test_a_descriptor_that_comes_out_can_only_be_read(sandbox: Sandbox, daemon: Daemon) -> None:
    """It is the one file, and nothing to go on from."""
    sandbox.files.write("file", "content")
    with sandbox.files.read("file", "stream") as stream:
        number = stream._file.fileno()
        assert stat.S_ISREG(os.fstat(number).st_mode)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(number, b"x")
        assert list(stream) == [b"content"]


def test_what_would_wait_or_never_end_is_refused(sandbox: Sandbox) -> None:
    """By descriptor as otherwise."""
    sandbox.commands.run("mkfifo -m 666 fifo; ln -s /proc/self/environ environ; ln -s /dev/zero zero")
    for path in ("fifo", "environ", "zero", "/dev/zero"):
        with pytest.raises(SandboxException):
            sandbox.files.read(path, "bytes")
    sandbox.commands.run("rm fifo environ zero")


# --- watching


def test_what_a_command_does_is_told(sandbox: Sandbox) -> None:
    """In new directories, too, and under names that are no text."""
    sandbox.files.make_dir("watched")
    with sandbox.files.watch_dir("watched", recursive=True) as handle:
        sandbox.commands.run("mkdir -p watched/a/b")
        until(handle, told(FilesystemEventType.CREATE, "a/b"))
        sandbox.commands.run("cd watched; echo x > a/b/file; mv a/b/file a/moved; rm a/moved")
        until(handle, told(FilesystemEventType.REMOVE, "a/moved"))
        sandbox.commands.run(""": > "watched/$(printf 'odd\\377\\nname')" """)
        until(handle, told(FilesystemEventType.CREATE, os.fsdecode(b"odd\xff\nname")))
    sandbox.commands.run("rm -rf watched")


def test_a_watch_ends_when_its_sandbox_does(daemon: Daemon, engine: str, project: Path, sandbox: Sandbox) -> None:
    """Whether it is stopped or removed, although the project is still there."""
    with daemon.box(engine, workspace={"path": str(project)}) as box:
        files = Sandbox.connect(box["id"]).files
        handle = files.watch_dir(".")
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        with pytest.raises(NotFoundException, match="went away"):
            until(handle, lambda _: False)
        daemon.call("sandbox/start", sandbox=box["id"])
        handle = files.watch_dir(".")
        daemon.call("sandbox/kill", sandbox=box["id"])
        with pytest.raises(NotFoundException, match="went away"):
            until(handle, lambda _: False)


def test_a_million_events_that_nobody_reads_cost_the_daemon_nothing(sandbox: Sandbox, daemon: Daemon) -> None:
    """It stays as small as it was, answers others, and tells that something was lost."""
    sandbox.files.make_dir("storm")
    process = psutil.Process(daemon.pid)
    before = process.memory_info().rss
    handles = [sandbox.files.watch_dir(".", recursive=True) for _ in range(4)]
    try:
        sandbox.commands.run(STORM, cwd="storm", timeout=0)
        assert process.memory_info().rss - before < STORM_BYTES_MAX
        assert sandbox.files.exists("storm/a")
        for handle in handles:
            until(handle, lambda happened: any(event.type is FilesystemEventType.OVERFLOW for event in happened))
        sandbox.files.write("after", "x")
        for handle in handles:
            until(handle, told(FilesystemEventType.CREATE, "after"))
    finally:
        for handle in handles:
            handle.stop()
    sandbox.commands.run("rm -rf storm after")


def test_directories_that_come_and_go_do_no_harm(sandbox: Sandbox) -> None:
    """Deep ones, too; what comes afterwards is told."""
    sandbox.files.make_dir("churn")
    churn = (
        "i=0; while [ $i -lt 60 ]; do mkdir -p a/b/c/d/e; : >a/b/c/file; mv a z; rm -rf z; i=$((i+1)); done;"
        " d=deep; i=0; while [ $i -lt 90 ]; do d=$d/d; i=$((i+1)); done; mkdir -p $d; rm -rf deep; : >end"
    )
    with sandbox.files.watch_dir("churn", recursive=True) as handle:
        sandbox.commands.run(churn, cwd="churn")
        until(handle, told(FilesystemEventType.CREATE, "end"))
    sandbox.files.remove("churn")


# --- the command line


def test_the_command_line_reads_writes_and_lists(daemon: Daemon, shared: Box, project: Path) -> None:
    """As its own processes, over the same socket."""
    name = shared["id"]
    data = os.urandom(2 << 20)
    assert daemon.ctl("files", "write", name, "cli/file", stdin=data).returncode == 0
    assert (project / "cli/file").read_bytes() == data
    assert daemon.ctl("files", "cat", name, "/workspace/cli/file").stdout == data
    [entry] = daemon.ctl_json("files", "ls", name, "cli")["entries"]
    assert (entry["path"], entry["size_bytes"]) == ("file", len(data))
    assert daemon.ctl("files", "rm", "-r", name, "cli").returncode == 0
    assert not (project / "cli").exists()
