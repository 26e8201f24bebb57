"""``files/*`` on a real socket: by descriptor, in pages, and as they change."""

import base64
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtimes.init import files_watch
from sandboxd import files as rooms
from sandboxd.client import Connection, Message, RpcError
from sandboxd.protocol import FRAME_BYTES_MAX
from tests.daemon.files_daemon import SANDBOX, FilesDaemon, files_daemon
from tests.daemon.rpc_peer import PATIENCE_S


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FilesDaemon]:
    with files_daemon(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def connection(daemon: FilesDaemon) -> Iterator[Connection]:
    with Connection.connect(daemon.socket) as connection:
        yield connection


def call(connection: Connection, method: str, path: str, **params: Any) -> dict[str, Any]:
    fields = {"sandbox": SANDBOX, "path": path, **params}
    return connection.call(f"files/{method}", fields, timeout_s=PATIENCE_S)


def refusal(connection: Connection, method: str, path: str, **params: Any) -> RpcError:
    with pytest.raises(RpcError) as raised:
        call(connection, method, path, **params)
    return raised.value


class Watch:
    """One ``files/watch``, and what it has told."""

    def __init__(self, connection: Connection, path: str = ".", **params: Any) -> None:
        self._connection = connection
        self.request_id = connection.send("files/watch", {"sandbox": SANDBOX, "path": path, **params})
        self.changes: list[tuple[str, str]] = []
        self.rows: list[dict[str, Any]] = []
        self.truncated: bool | None = None
        self.until(lambda: self.truncated is not None)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for message in self._connection.read():
                self._take(message)

    def until_told(self, kind: str, path: str) -> None:
        self.until(lambda: (kind, path) in self.changes)

    def result(self) -> dict[str, Any]:
        """Of the request, which ends by itself."""
        return self._connection.wait(self.request_id, self._take, PATIENCE_S)

    def _take(self, message: Message) -> None:
        content = message.content
        if "method" not in content:
            self._connection.keep(message)
            raise AssertionError(f"the watch ended: {content}")
        params = content["params"]
        assert params["token"] == self.request_id
        self.truncated = params["truncated"]
        if content["method"] == "files/changed":
            self.rows += params["changes"]
            self.changes += [(row["kind"], row["path"]) for row in params["changes"]]


# --- numbers


@pytest.mark.parametrize("number", [-(2**63) - 1, -(2**63), -1, 0, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize("field", ["mtime_ns", "bytes_max", "entries_max", "size_bytes", "mode"])
def test_no_number_of_an_upload_is_more_than_the_daemon_can_take(
    connection: Connection, field: str, number: int
) -> None:
    """It is refused for what it is, or it is taken; it never is a fault of the daemon."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"text")
    os.close(write_end)
    params = {"sandbox": SANDBOX, "path": "made", "form": "file", field: number}
    answer = "taken"
    try:
        connection.call("files/upload", params, [read_end], timeout_s=PATIENCE_S)
    except RpcError as error:
        answer = error.type
    finally:
        os.close(read_end)
    assert answer in {"taken", "invalid_argument", "invalid_params", "capacity_exceeded"}


# --- content


def open_file(connection: Connection, path: str) -> tuple[int, dict[str, Any]]:
    """A descriptor, which is ours, and what was said of it."""
    opened: list[tuple[int, dict[str, Any]]] = []

    def take(message: Message) -> None:
        assert message.content["method"] == "files/opened"
        [descriptor] = connection.take_descriptors(message, 1)
        opened.append((descriptor, message.content["params"]))

    request_id = connection.send("files/read", {"sandbox": SANDBOX, "path": path, "descriptor": True})
    reply = connection.wait(request_id, take, PATIENCE_S)
    [(descriptor, params)] = opened
    assert params == {"token": request_id, "size_bytes": reply["size_bytes"]}
    assert reply["data"] == ""
    return descriptor, params


def test_a_file_is_read_by_its_descriptor(daemon: FilesDaemon, connection: Connection) -> None:
    """All of it, however large, and no more than read."""
    content = os.urandom(3 * 1024 * 1024)
    (daemon.root / "file").write_bytes(content)
    descriptor, params = open_file(connection, "file")
    with open(descriptor, "rb") as file:
        assert params["size_bytes"] == len(content)
        assert file.read() == content
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")


@pytest.mark.parametrize("path", ["fifo", "/dev/zero", "/proc/self/environ", ".", "none"])
def test_no_descriptor_comes_out_of_what_is_no_file(daemon: FilesDaemon, connection: Connection, path: str) -> None:
    """It would wait, or never end, or be a way to somewhere else."""
    os.mkfifo(daemon.root / "fifo")
    expected = {".": "invalid_argument", "none": "not_found", "/proc/self/environ": "unsupported"}
    assert refusal(connection, "read", path, descriptor=True).type == expected.get(path, "conflict")


def write_from(connection: Connection, source: int, **params: Any) -> dict[str, Any]:
    fields = {"sandbox": SANDBOX, "path": "new/file", "descriptor": True, **params}
    return connection.call("files/write", fields, [source], timeout_s=PATIENCE_S)


def test_a_file_is_written_from_a_descriptor_from_its_offset_on(daemon: FilesDaemon, connection: Connection) -> None:
    """More than one message could hold, in several pieces."""
    content = os.urandom(rooms.COPY_PIECE_BYTES + 12345)
    with open(os.memfd_create("content"), "w+b") as source:
        source.write(b"before" + content)
        source.seek(len(b"before"))
        info = write_from(connection, source.fileno(), mode=0o600)
    assert (info["path"], info["size_bytes"], info["mode"]) == (f"{daemon.root}/new/file", len(content), 0o600)
    assert (daemon.root / "new/file").read_bytes() == content


def test_only_what_ends_is_taken_as_a_source(daemon: FilesDaemon, connection: Connection) -> None:
    """A pipe could keep a thread of the daemon for good."""
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(RpcError, match="not of a regular file") as raised:
            write_from(connection, read_end)
        with pytest.raises(RpcError, match="data and a descriptor"):
            write_from(connection, read_end, data="eA==")
    finally:
        os.close(read_end)
        os.close(write_end)
    assert raised.value.type == "invalid_argument"
    assert list(daemon.root.iterdir()) == []


def test_a_write_that_fails_half_way_changes_nothing(
    daemon: FilesDaemon, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old content stays, and the reason is told by a type of its own."""
    (daemon.root / "new").mkdir()
    (daemon.root / "new/file").write_text("old")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rooms, "_copy_piece", full)
    with open(os.memfd_create("content"), "w+b") as source, pytest.raises(RpcError) as raised:
        write_from(connection, source.fileno())
    assert (raised.value.type, raised.value.detail) == ("not_enough_space", "ENOSPC: No space left on device")
    assert (daemon.root / "new/file").read_text() == "old"
    assert os.listdir(daemon.root / "new") == ["file"]


def test_nobody_sees_half_of_what_is_written(daemon: FilesDaemon, connection: Connection) -> None:
    """Who looks meanwhile sees all of the old or all of the new."""
    contents = [bytes([number]) * (1 << 20) for number in range(8)]
    (daemon.root / "new").mkdir()
    path = daemon.root / "new/file"
    path.write_bytes(contents[0])
    over = threading.Event()
    torn: list[int] = []

    def look() -> None:
        while not over.is_set():
            if path.read_bytes() not in contents:
                torn.append(1)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for content in contents:
            with open(os.memfd_create("content"), "w+b") as source:
                source.write(content)
                source.seek(0)
                write_from(connection, source.fileno())
    finally:
        over.set()
        looking.join()
    assert torn == []


# --- names


def test_a_listing_of_any_length_comes_in_pages(daemon: FilesDaemon, connection: Connection) -> None:
    """More than one message could hold, and every entry once."""
    names = {f"{number:05d}-{'x' * 240}" for number in range(FRAME_BYTES_MAX // 350)}
    for name in names:
        os.close(os.open(daemon.root / name, os.O_CREAT | os.O_WRONLY, 0o600))
    listed: list[str] = []

    def take(message: Message) -> None:
        assert message.content["method"] == "files/listed"
        entries = message.content["params"]["entries"]
        assert len(entries) <= rooms.PAGE_ENTRIES_MAX
        listed.extend(entry["path"] for entry in entries)

    params = {"sandbox": SANDBOX, "path": ".", "pages": True}
    reply = connection.call("files/list", params, (), take, PATIENCE_S)
    assert (reply["path"], reply["entries"], reply["truncated"]) == (str(daemon.root), [], False)
    assert len(listed) == len(names)
    assert set(listed) == names


def test_whether_something_is_there(daemon: FilesDaemon, connection: Connection) -> None:
    """A link that leads nowhere is there; what cannot be looked at is neither."""
    (daemon.root / "file").touch()
    (daemon.root / "dangling").symlink_to("nowhere")
    (daemon.root / "loop").symlink_to("loop")
    there = {path: call(connection, "exists", path)["exists"] for path in ("file", "dangling", "none", "file/below")}
    assert there == {"file": True, "dangling": True, "none": False, "file/below": False}
    assert call(connection, "exists", "dangling", follow=True)["exists"] is False
    assert refusal(connection, "exists", "loop/below").type == "conflict"


def test_what_is_missing_is_removed_if_that_is_no_matter(daemon: FilesDaemon, connection: Connection) -> None:
    """The sandbox itself has to be there."""
    assert call(connection, "remove", "none", missing_ok=True) == {}
    assert refusal(connection, "remove", "none").type == "not_found"
    with pytest.raises(RpcError, match="no such sandbox"):
        connection.call("files/remove", {"sandbox": "other", "path": "none", "missing_ok": True})


def test_a_name_that_is_not_utf8_can_be_given(daemon: FilesDaemon, connection: Connection) -> None:
    """As bytes, and the reply has it as bytes."""
    (daemon.root / "old").touch()
    new = base64.b64encode(b"new\xff").decode()
    call(connection, "rename", "old", new_path="", new_path_bytes=new)
    assert os.listdir(os.fsencode(daemon.root)) == [b"new\xff"]
    info = call(connection, "stat", "", path_bytes=new)
    assert (info["path"], base64.b64decode(info["path_bytes"])) == (
        f"{daemon.root}/new\\xff",
        os.fsencode(daemon.root) + b"/new\xff",
    )


# --- watching


def test_changes_are_told_until_the_watch_is_cancelled(daemon: FilesDaemon, connection: Connection) -> None:
    """With both names of what was renamed; and the connection serves others meanwhile and afterwards."""
    (daemon.root / "below").mkdir()
    watch = Watch(connection, recursive=True)
    assert watch.truncated is False
    (daemon.root / "below/file").write_text("x")
    watch.until_told("written", "below/file")
    assert watch.changes[0] == ("created", "below/file")
    os.rename(daemon.root / "below/file", daemon.root / "moved")
    watch.until_told("renamed", "moved")
    assert [row["old_path"] for row in watch.rows if row["kind"] == "renamed"] == ["below/file"]
    os.chmod(daemon.root / "moved", 0o600)
    watch.until_told("attributes", "moved")
    os.unlink(daemon.root / "moved")
    watch.until_told("removed", "moved")
    connection.cancel(watch.request_id)
    with pytest.raises(RpcError, match="cancelled"):
        watch.result()
    assert call(connection, "exists", "below")["exists"] is True


def test_without_recursion_what_is_below_is_not_told(daemon: FilesDaemon, connection: Connection) -> None:
    """Only a directory's own entries."""
    (daemon.root / "below").mkdir()
    watch = Watch(connection)
    (daemon.root / "below/file").touch()
    (daemon.root / "file").touch()
    watch.until_told("written", "file")
    assert {path for _, path in watch.changes} == {"file"}


def test_names_that_are_not_utf8_come_as_bytes(daemon: FilesDaemon, connection: Connection) -> None:
    """And as something to show."""
    watch = Watch(connection)
    os.close(os.open(os.fsencode(daemon.root) + b"/a\xff\n", os.O_CREAT | os.O_WRONLY))
    watch.until_told("created", "a\\xff\n")
    assert base64.b64decode(watch.rows[0]["path_bytes"]) == b"a\xff\n"


def test_a_watch_ends_with_what_it_watches(daemon: FilesDaemon, connection: Connection) -> None:
    """That is its last word, and no error."""
    (daemon.root / "watched").mkdir()
    watch = Watch(connection, "watched")
    os.rmdir(daemon.root / "watched")
    assert watch.result() == {"path": "watched"}
    assert watch.changes[-1] == ("removed", "")


def test_a_watch_ends_with_the_sandbox(daemon: FilesDaemon, connection: Connection) -> None:
    """Although nothing in the kernel says so: its files may still be there, on the host."""
    watch = Watch(connection)
    daemon.close_files()
    with pytest.raises(RpcError, match="went away") as raised:
        watch.result()
    assert raised.value.type == "sandbox_gone"


def test_what_is_not_there_or_has_no_name_for_its_notifications_is_not_watched(
    daemon: FilesDaemon, connection: Connection
) -> None:
    """Told before anything is opened."""
    assert refusal(connection, "watch", "none").type == "not_found"


def test_places_for_watches_are_few_and_given_back(daemon: FilesDaemon) -> None:
    """By those whose connection ends, too."""
    connections = [Connection.connect(daemon.socket) for _ in range(16)]
    for connection in connections:
        Watch(connection)
    with Connection.connect(daemon.socket) as another:
        assert refusal(another, "watch", ".").type == "capacity_exceeded"
        for connection in connections:
            connection.close()
        while True:
            try:
                Watch(another)
            except AssertionError:
                continue
            return


def test_a_watcher_that_reads_nothing_of_a_million_events_is_told_that_it_missed_some(daemon: FilesDaemon) -> None:
    """It is waited for, and what waits for it is bounded; nobody else waits, and the watch goes on."""
    with open("/proc/sys/fs/inotify/max_queued_events", encoding="ascii") as file:
        queued_max = int(file.read())
    names = [f"{letter}{'x' * 200}" for letter in "ab"]
    with (
        Connection.connect(daemon.socket) as slow,
        Connection.connect(daemon.socket) as other,
        open(daemon.root / names[0], "w", encoding="ascii") as first,
        open(daemon.root / names[1], "w", encoding="ascii") as second,
    ):
        watch = Watch(slow)
        # In turns, for the kernel makes one of two that are the same.
        for _ in range(500_000):
            os.fchmod(first.fileno(), 0o600)
            os.fchmod(second.fileno(), 0o600)
        assert call(other, "exists", names[0])["exists"] is True
        watch.until_told("overflow", "")
        assert len(watch.changes) < 10 * queued_max
        (daemon.root / "later").touch()
        watch.until_told("created", "later")


def test_a_directory_that_appears_with_more_than_may_wait_is_told_as_an_overflow(
    daemon: FilesDaemon, connection: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it holds is not put into the daemon's memory; and it is watched all the same."""
    monkeypatch.setattr(files_watch, "CHANGES_MAX", 100)
    watch = Watch(connection, recursive=True)
    (tmp_path / "full/below").mkdir(parents=True)
    for number in range(1000):
        (tmp_path / f"full/{number}").touch()
    os.rename(tmp_path / "full", daemon.root / "full")
    watch.until_told("overflow", "")
    assert len(watch.changes) < 200
    (daemon.root / "full/below/file").touch()
    watch.until_told("created", "full/below/file")
