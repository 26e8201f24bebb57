"""The writer of the audit log: what the loop pays, what waits, what is lost and told of, and what becomes a line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sandboxd import protocol
from sandboxd.audit import files as audit_files
from sandboxd.audit import reading
from sandboxd.audit.arguments import CHARS_MAX, ITEMS_MAX, fields_of, recorded
from sandboxd.audit.auditor import Auditor
from sandboxd.audit.chain import file_name
from sandboxd.audit.files import AuditFiles, Note
from sandboxd.audit.trail import BATCH_MAX, UNDERWAY_S, Trail
from sandboxd.failures import AuditUnavailable
from sandboxd.peers import Peer
from sandboxd.protocol import METHODS, CommandParams, SandboxCreateParams, SandboxParams
from tests.engine.daemons import PATIENCE_S, wait_until

PEER = Peer(77, 1000, 1000, "/usr/bin/somebody")


class Disk:
    """Takes everything, nothing, or as long as it likes."""

    def __init__(self) -> None:
        self.full = False
        self.free = threading.Event()
        self.free.set()
        self.asked = threading.Event()

    def append(self, descriptor: int, data: bytes) -> int:
        self.asked.set()
        assert self.free.wait(PATIENCE_S)
        if data and self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(descriptor, data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(audit_files, "_append", disk.append)
    monkeypatch.setattr("sandboxd.audit.trail.RETRY_S", 0.01)
    return disk


@contextlib.contextmanager
def trail_in(directory: Path, *, queued_max: int = 1000) -> Iterator[Trail]:
    trail = Trail(AuditFiles(str(directory / "audit"), bytes_max=1 << 20, files_max=3), queued_max=queued_max)
    trail.start()
    try:
        yield trail
    finally:
        trail.close()


@pytest.fixture
def trail(tmp_path: Path, disk: Disk) -> Iterator[Trail]:
    with trail_in(tmp_path) as trail:
        yield trail


def lines_in(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "audit" / file_name(1)).read_bytes().splitlines()]


def note(pid: int) -> Note:
    return Note(kind="request", fields={"method": "sandbox/kill", "pid": pid, "result": "ok"})


def assert_intact(trail: Trail) -> None:
    with trail.snapshot() as (files, head):
        assert reading.verify(files, head).intact


# --- the writer


def test_all_that_was_taken_is_written_in_order(trail: Trail, tmp_path: Path) -> None:
    for number in range(500):
        trail.take(note(number))
    assert trail.flush(timeout_s=PATIENCE_S)
    assert [line["pid"] for line in lines_in(tmp_path)[1:]] == list(range(500))
    assert (trail.written, trail.lost, trail.failing) == (500, 0, "")


def test_a_burst_is_written_at_the_pace_of_the_disk(
    trail: Trail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for more of what is plenty: at a batch per lingering the queue of a busy daemon would overflow."""
    monkeypatch.setattr("sandboxd.audit.trail.LINGER_S", 100 * PATIENCE_S)
    for number in range(10 * BATCH_MAX):
        trail.take(note(number))
    wait_until(lambda: trail.written == 10 * BATCH_MAX, "all is written")
    assert trail.flush(timeout_s=PATIENCE_S)


def test_what_is_queued_is_written_before_the_end(tmp_path: Path, disk: Disk) -> None:
    """A daemon that stops must not forget its last requests."""
    with trail_in(tmp_path) as trail:
        for number in range(200):
            trail.take(note(number))
    assert len(lines_in(tmp_path)) == 201
    assert json.loads((tmp_path / "audit" / "head").read_text())["seq"] == 201


def test_a_disk_that_does_not_answer_holds_up_nobody(trail: Trail, disk: Disk, tmp_path: Path) -> None:
    """To take a note touches no file: the loop goes on while the writer hangs in a write."""
    disk.free.clear()
    trail.take(note(0))
    assert disk.asked.wait(PATIENCE_S)
    for number in range(1, 100):
        trail.take(note(number))
    assert not trail.flush(timeout_s=0.01)
    disk.free.set()
    assert trail.flush(timeout_s=PATIENCE_S)
    assert [line["pid"] for line in lines_in(tmp_path)[1:]] == list(range(100))


def test_a_full_disk_loses_nothing_that_fits_into_the_queue(trail: Trail, disk: Disk, tmp_path: Path) -> None:
    trail.take(note(0))
    assert trail.flush(timeout_s=PATIENCE_S)
    disk.full = True
    for number in range(1, 20):
        trail.take(note(number))
    wait_until(lambda: trail.failing, "the writer noticed")
    assert "No space" in trail.failing
    disk.full = False
    wait_until(lambda: not trail.failing and trail.flush(timeout_s=PATIENCE_S), "it is written again")
    assert [line["pid"] for line in lines_in(tmp_path)[1:]] == list(range(20))
    assert trail.lost == 0
    assert_intact(trail)


def test_what_does_not_fit_is_counted_and_the_log_says_so_where_it_would_have_been(
    tmp_path: Path, disk: Disk
) -> None:
    """A log with a hole that nobody mentions would be a lie."""
    with trail_in(tmp_path, queued_max=10) as trail:
        trail.take(note(0))
        assert trail.flush(timeout_s=PATIENCE_S)
        disk.full = True
        for number in range(1, 31):
            trail.take(note(number))
        assert trail.lost == 20
        disk.full = False
        wait_until(lambda: not trail.failing and trail.flush(timeout_s=PATIENCE_S), "it is written again")
        trail.take(note(31))
        assert trail.flush(timeout_s=PATIENCE_S)
        assert_intact(trail)
        with trail.snapshot() as (files, head):
            assert reading.verify(files, head).gaps == 20
    rows = lines_in(tmp_path)[1:]
    assert [row.get("pid", row["kind"]) for row in rows] == [*range(11), "gap", 31]
    gap = rows[11]["data"]
    assert gap["lost"] == 20
    assert gap["since_ms"] <= gap["until_ms"]


def test_a_directory_that_cannot_be_used_is_tried_again(tmp_path: Path, disk: Disk) -> None:
    """Whoever mends it need not restart the daemon."""
    (tmp_path / "audit").write_text("in the way")
    with trail_in(tmp_path) as trail:
        trail.take(note(1))
        wait_until(lambda: trail.failing, "the writer noticed")
        (tmp_path / "audit").unlink()
        wait_until(lambda: not trail.failing and trail.flush(timeout_s=PATIENCE_S), "it is written")
    assert [line["pid"] for line in lines_in(tmp_path)[1:]] == [1]


def test_a_request_that_lasts_is_written_down_before_its_end(trail: Trail, tmp_path: Path) -> None:
    """Else a command that runs when the daemon is killed would never be in the log."""
    trail.take(note(0))
    assert trail.flush(timeout_s=PATIENCE_S)
    short = trail.lasting(Note(kind="underway", fields={"pid": 1}))
    short.ended = True
    trail.lasting(Note(kind="underway", fields={"pid": 2}))

    def kinds() -> list[tuple[str, int]]:
        trail.flush(timeout_s=PATIENCE_S)
        return [(line["kind"], line["pid"]) for line in lines_in(tmp_path)[2:]]

    assert wait_until(kinds, f"it was written after {UNDERWAY_S} s") == [("underway", 2)]


def test_a_disk_that_hangs_behind_a_request_that_lasts_costs_no_memory_without_end(
    tmp_path: Path, disk: Disk
) -> None:
    """Each request that has ended behind it would be remembered until the disk answers."""
    with trail_in(tmp_path, queued_max=50) as trail:
        disk.free.clear()
        trail.lasting(Note(kind="underway", fields={"pid": 1}))
        trail.take(note(0))
        assert disk.asked.wait(PATIENCE_S)
        for number in range(500):
            trail.lasting(note(number)).ended = True
        assert len(trail._lasting) <= 50
        disk.free.set()
        assert trail.flush(timeout_s=PATIENCE_S)


# --- which arguments


CANARY = "the-canary-sings"


def hides(text: str) -> bool:
    return CANARY in text


def test_no_value_that_could_be_secret_is_ever_recorded() -> None:
    """Variables, content, what is typed: of every method that takes any."""
    requests: dict[str, dict[str, Any]] = {
        "sandbox/create": {"env": {"TOKEN": CANARY}, "metadata": {"note": CANARY}},
        "commands/run": {"sandbox": "a", "argv": ["curl", f"X: {CANARY}"], "env": {"TOKEN": CANARY}},
        "commands/send_stdin": {"sandbox": "a", "command_id": "0" * 12, "data": CANARY},
        "shells/open": {"sandbox": "a", "env": {"TOKEN": CANARY}},
        "shells/run": {"sandbox": "a", "shell_id": "0" * 12, "text": CANARY},
        "files/write": {"sandbox": "a", "path": "p", "data": CANARY},
        "secret/set": {"name": "token", "value": CANARY},
    }
    methods = {method.name: method for method in METHODS}
    for name, fields in requests.items():
        params = msgspec.convert(
            {key: value.encode() if key in {"data", "value"} else value for key, value in fields.items()},
            methods[name].params,
        )
        said = json.dumps(recorded(name, params, hides))
        assert CANARY not in said, said
    params = SandboxCreateParams(env={"TOKEN": CANARY})
    assert recorded("sandbox/create", params, hides) == {"env": ["TOKEN"]}


def test_free_text_is_recorded_only_where_the_protocol_says_so() -> None:
    """What somebody adds to it is left out until it is marked."""
    left_out = {
        (method.name, field.name)
        for method in METHODS
        for field in msgspec.structs.fields(method.params)
        if field.name not in fields_of(method.name)
    }
    assert left_out >= {
        ("commands/send_stdin", "data"),
        ("shells/run", "text"),
        ("files/write", "data"),
        ("files/download", "name"),
        ("secret/set", "value"),
        ("secret/set", "command"),
    }


def test_arguments_are_bounded_whatever_was_sent() -> None:
    """A line must stay a line: megabytes of argv are legal."""
    params = CommandParams(sandbox="a", argv=["x" * 100_000] * 4000, env={f"N{n}": "" for n in range(10_000)})
    said = recorded("commands/run", params, hides)
    assert len(json.dumps(said)) < 2 * CHARS_MAX
    assert said["argv"][0].endswith("...")
    short = recorded("commands/run", CommandParams(sandbox="a", argv=["n"] * 100), hides)
    assert short["argv"] == ["n"] * ITEMS_MAX + ["..."]


def test_only_what_was_said_is_recorded_in_the_words_of_the_protocol() -> None:
    params = SandboxCreateParams(
        name="box",
        workspace=protocol.WorkspaceParams(path="/p", path_bytes=b"/p\xff"),
        limits=protocol.LimitsParams(memory="64m", cpus=0.5),
        network="allow",
        allow=["pypi"],
    )
    assert recorded("sandbox/create", params, hides) == {
        "name": "box",
        "workspace": {"path": "/p", "path_bytes": "/p\\xff"},
        "limits": {"memory": "64m", "cpus": 0.5},
        "network": "allow",
        "allow": ["pypi"],
    }


# --- what becomes a line


def auditor(trail: Trail, *, reads: bool = False, required: bool = False) -> Auditor:
    return Auditor(
        trail,
        reads=reads,
        required=required,
        id_of=lambda name: f"sb-{name}" if name != "none" else None,
        hides=hides,
    )


def test_a_request_that_changes_something_is_one_line_with_who_what_and_what_came_of_it(
    trail: Trail, tmp_path: Path
) -> None:
    ended = auditor(trail).observe("sandbox/pause", SandboxParams(sandbox="box"), PEER)
    assert ended is not None
    ended(None, "conflict")
    assert trail.flush(timeout_s=PATIENCE_S)
    [line] = lines_in(tmp_path)[1:]
    assert line["duration_ms"] >= 0
    told = ("kind", "uid", "pid", "exe", "method", "sandbox", "arguments", "result")
    assert {name: line[name] for name in told} == {
        "kind": "request",
        "uid": 1000,
        "pid": 77,
        "exe": "/usr/bin/somebody",
        "method": "sandbox/pause",
        "sandbox": "sb-box",
        "arguments": {"sandbox": "box"},
        "result": "conflict",
    }


def test_requests_that_only_look_are_no_lines_unless_that_is_wanted(trail: Trail) -> None:
    assert auditor(trail).observe("sandbox/get", SandboxParams(sandbox="a"), PEER) is None
    assert auditor(trail, reads=True).observe("sandbox/get", SandboxParams(sandbox="a"), PEER) is not None


def test_every_method_whose_name_says_that_it_changes_something_is_recorded() -> None:
    """Not recorded is only what is known to look: a new method is recorded until somebody says that it does."""
    looking = {method.name for method in METHODS if method.reads}
    words = {"get", "list", "stat", "exists", "read", "watch", "download", "wait", "connect", "logs", "metrics"}
    words |= {"subscribe", "diff", "info", "doctor", "config", "query", "verify"}
    assert {name.partition("/")[2] for name in looking} <= words
    for name in ("sandbox/create", "commands/run", "files/write", "secret/set", "daemon/shutdown", "sandbox/connect"):
        assert name not in looking


def test_without_the_log_work_goes_on_unless_the_log_is_required(trail: Trail, disk: Disk) -> None:
    disk.full = True
    trail.take(note(0))
    wait_until(lambda: trail.failing, "the writer noticed")
    params = SandboxParams(sandbox="box")
    assert auditor(trail).observe("sandbox/pause", params, PEER) is not None
    with pytest.raises(AuditUnavailable, match="No space"):
        auditor(trail, required=True).observe("sandbox/pause", params, PEER)
    assert auditor(trail, required=True).observe("sandbox/get", params, PEER) is None, "looking changes nothing"
    disk.full = False
    wait_until(lambda: not trail.failing, "it is written again")
    assert auditor(trail, required=True).observe("sandbox/pause", params, PEER) is not None
