"""``Files`` and ``AsyncFiles`` against a real file worker on this host."""

import asyncio
import gzip
import io
import os
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from sandboxd.client import (
    AsyncFiles,
    EntryInfo,
    Files,
    FilesystemEvent,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    NotEnoughSpaceException,
    NotFoundException,
    RpcError,
    SandboxException,
    TimeoutException,
    WatchHandle,
    WriteInfo,
)
from sandboxd.client import content as content_room
from sandboxd.client.errors import exception_from
from sandboxd.client.file_model import entry_info
from tests.daemon.files_daemon import SANDBOX, FilesDaemon, files_daemon
from tests.daemon.rpc_peer import PATIENCE_S
from tests.twins import Twin
from tests.unit.init_harness import open_descriptors, until
from tests.unit.transfers import describe

MANY_BYTES = 5 * 1024 * 1024 + 1
"""More than a message can hold."""

LARGE_BYTES = 100 * 1024 * 1024


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FilesDaemon]:
    with files_daemon(tmp_path) as daemon:
        monkeypatch.setenv("SANDBOXD_SOCKET", daemon.socket)
        yield daemon


@pytest.fixture(params=["blocking", "async"])
def files(request: pytest.FixtureRequest, daemon: FilesDaemon) -> Iterator[Any]:
    """``Files``, or what does the same over ``AsyncFiles``."""
    with asyncio.Runner() as runner:
        yield Files(SANDBOX) if request.param == "blocking" else Twin(AsyncFiles(SANDBOX), runner)


# --- trees


def make_tree(root: Path) -> None:
    (root / "empty").mkdir(parents=True)
    (root / "file").write_bytes(os.urandom(MANY_BYTES))
    (root / "program").write_bytes(b"#!")
    (root / "program").chmod(0o755)
    (root / "link").symlink_to("file")
    (root / os.fsdecode(b"line\nfeed \xff")).mkdir()
    (root / os.fsdecode(b"line\nfeed \xff") / "below").write_bytes(b"below")
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(10**18 + 7, 10**18 + 7), follow_symlinks=False)


def test_a_tree_goes_in_and_comes_out_as_it_was(files: Any, daemon: FilesDaemon, tmp_path: Path) -> None:
    """Down to the nanosecond, if that is asked for; and into directories that are not there yet."""
    make_tree(tmp_path / "tree")
    info = files.upload(tmp_path / "tree", "not/yet", exact=True)
    assert (info.entries, info.skipped_count) == (7, 0)
    assert describe(daemon.root / "not/yet") == describe(tmp_path / "tree")
    info = files.download("not/yet", tmp_path / "nor/this", exact=True)
    assert (info.entries, info.bytes, info.skipped) == (7, MANY_BYTES + 2 + 5, [])
    assert describe(tmp_path / "nor/this") == describe(tmp_path / "tree")


def test_a_file_goes_in_and_comes_out_in_place_of_another(files: Any, daemon: FilesDaemon, tmp_path: Path) -> None:
    """With its mode, and without its time unless that is asked for."""
    (tmp_path / "file").write_bytes(os.urandom(MANY_BYTES))
    (tmp_path / "file").chmod(0o750)
    os.utime(tmp_path / "file", ns=(10**18, 10**18))
    assert files.upload(tmp_path / "file", "new/file").bytes == MANY_BYTES
    there = daemon.root / "new/file"
    assert (there.read_bytes() == (tmp_path / "file").read_bytes(), stat.S_IMODE(there.stat().st_mode)) == (
        True,
        0o750,
    )
    assert there.stat().st_mtime_ns != 10**18
    (tmp_path / "back").write_text("old")
    files.upload(tmp_path / "file", "new/file", exact=True)
    assert files.download("new/file", tmp_path / "back", exact=True).bytes == MANY_BYTES
    assert (tmp_path / "back").read_bytes() == there.read_bytes()
    assert (tmp_path / "back").stat().st_mtime_ns == 10**18


def test_what_is_no_file_is_left_out_of_a_tree_and_refused_by_itself(
    files: Any, daemon: FilesDaemon, tmp_path: Path
) -> None:
    """At both ends; nobody waits for it."""
    (tmp_path / "tree").mkdir()
    for root in (tmp_path / "tree", daemon.root):
        os.mkfifo(root / "fifo")
        (root / "file").touch()
    for info in (files.upload(tmp_path / "tree", "in"), files.download(".", tmp_path / "out")):
        assert [(entry.path, entry.reason) for entry in info.skipped] == [("./fifo", "it is a FIFO")]
    assert os.listdir(daemon.root / "in") == ["file"]
    assert set(os.listdir(tmp_path / "out")) == {"file", "in"}
    with pytest.raises(InvalidArgumentException, match="neither a file nor a directory"):
        files.upload("/dev/null", "in")
    with pytest.raises(InvalidArgumentException, match="neither a file nor a directory"):
        files.download("fifo", tmp_path / "never")


def test_a_copy_that_cannot_be_says_whose_fault_it_is(files: Any, daemon: FilesDaemon, tmp_path: Path) -> None:
    """The host's own errors are ``OSError``, as everywhere; the sandbox's are ours. Nothing half-done is left."""
    with pytest.raises(FileNotFoundError):
        files.upload(tmp_path / "nothing", "in")
    with pytest.raises(NotFoundException):
        files.download("nothing", tmp_path / "out")
    (daemon.root / "file").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    with pytest.raises(IsADirectoryError):
        files.download("file", tmp_path / "out")
    with pytest.raises(SandboxException):
        files.upload(tmp_path / "out", "file")
    (daemon.root / "tree").mkdir()
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError):
        files.download("tree", tmp_path / "taken")
    assert sorted(os.listdir(daemon.root)) == ["file", "tree"]
    assert os.listdir(tmp_path / "out") == []


def test_a_cancelled_copy_ends_and_leaves_no_descriptor(daemon: FilesDaemon, tmp_path: Path) -> None:
    """At both ends, whatever was under way."""
    (tmp_path / "tree").mkdir()
    with open(tmp_path / "tree/large", "wb") as file:
        file.truncate(4 << 30)

    async def main() -> None:
        before = open_descriptors()
        with anyio.move_on_after(0.05) as scope:
            await AsyncFiles(SANDBOX).upload(tmp_path / "tree", "in")
        assert scope.cancelled_caught
        await until(lambda: open_descriptors().items() <= before.items(), "all is closed")
        assert not (daemon.root / "in/large").exists()

    anyio.run(main)


# --- content


@pytest.mark.parametrize("data", ["grün\n", b"\x00\xff", bytearray(b"abc"), memoryview(b"view"), "", b""])
def test_text_and_bytes_are_written_and_read_back(files: Any, daemon: FilesDaemon, data: Any) -> None:
    """With directories made; text is UTF-8, and what is not comes with replacement characters."""
    expected = data.encode() if isinstance(data, str) else bytes(data)
    info = files.write("new/dir/file", data)
    assert info == WriteInfo("file", FileType.FILE, f"{daemon.root}/new/dir/file")
    assert (daemon.root / "new/dir/file").read_bytes() == expected
    assert files.read("new/dir/file", format="bytes") == expected
    assert files.read(info.path) == expected.decode(errors="replace")


def test_what_is_larger_than_a_message_goes_by_descriptor(files: Any, daemon: FilesDaemon) -> None:
    """Both ways, and in pieces if one likes."""
    data = os.urandom(MANY_BYTES)
    files.write("file", data)
    assert (daemon.root / "file").read_bytes() == data
    assert files.read("file", "bytes") == data
    files.write("text", "é" * MANY_BYTES)
    assert files.read("text") == "é" * MANY_BYTES


def test_a_hundred_mebibytes_are_written_and_streamed_with_little_memory(daemon: FilesDaemon, tmp_path: Path) -> None:
    """From a file, and to whoever takes it piece by piece."""
    with open(tmp_path / "large", "wb") as file:
        file.writelines(bytes([number]) * (1 << 20) for number in range(LARGE_BYTES >> 20))
    files = Files(SANDBOX)
    tracemalloc.start()
    try:
        with open(tmp_path / "large", "rb") as file:
            files.write("large", file)
        total = 0
        with files.read("large", "stream") as stream:
            for piece in stream:
                assert piece[0] == total >> 20 & 0xFF
                total += len(piece)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert total == LARGE_BYTES
    assert (daemon.root / "large").stat().st_size == LARGE_BYTES


def _zipped(tmp_path: Path) -> Any:
    with gzip.open(tmp_path / "zipped", "wb") as file:
        file.write(b"not from the start")
    return gzip.open(tmp_path / "zipped", "rb")


def _plain(tmp_path: Path) -> Any:
    (tmp_path / "plain").write_bytes(b"not from the start")
    return open(tmp_path / "plain", "rb")


def _text(tmp_path: Path) -> Any:
    (tmp_path / "text").write_text("not from the start")
    return open(tmp_path / "text")


def _pipe(_: Path) -> Any:
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as file:
        file.write(b"not from the start")
    return open(read_end, "rb")


STREAMS = [_zipped, _plain, _text, _pipe, lambda _: io.BytesIO(b"not from the start")]


@pytest.mark.parametrize("opened", STREAMS, ids=["gzip", "file", "text", "pipe", "memory"])
def test_a_stream_is_written_from_where_it_stands(files: Any, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    """What it means, not what its descriptor says; and it stands at its end afterwards."""
    with opened(tmp_path) as stream:
        stream.read(4)
        files.write("file", stream)
        assert not stream.read()
    assert files.read("file") == "from the start"


@pytest.mark.parametrize("data", [1, None, ["a"], "\ud800"])
def test_what_is_no_content_is_refused(files: Any, daemon: FilesDaemon, data: Any) -> None:
    """Before anything is touched."""
    with pytest.raises(InvalidArgumentException, match="cannot write"):
        files.write("file", data)
    assert list(daemon.root.iterdir()) == []


def test_several_files_are_written_by_one_call(files: Any, daemon: FilesDaemon) -> None:
    """Each of any kind of content."""
    infos = files.write_files([{"path": "a", "data": "1"}, {"path": "b/c", "data": b"2"}])
    assert [info.path for info in infos] == [f"{daemon.root}/a", f"{daemon.root}/b/c"]
    assert ((daemon.root / "a").read_text(), (daemon.root / "b/c").read_text()) == ("1", "2")


def test_a_file_that_is_too_large_for_memory_is_only_streamed(files: Any, daemon: FilesDaemon) -> None:
    """A sandbox can make one of a tebibyte, that takes no room, and must not fill the host."""
    (daemon.root / "sparse").touch()
    os.truncate(daemon.root / "sparse", 1 << 40)
    for form in ("text", "bytes"):
        with pytest.raises(InvalidArgumentException, match="at once") as raised:
            files.read("sparse", form)
        assert raised.value.hint == "format='stream'"
    with files.read("sparse", "stream") as stream:
        assert next(iter(stream)) == bytes(content_room.PIECE_BYTES)


def test_a_stream_ends_where_the_file_does(files: Any, daemon: FilesDaemon) -> None:
    """In pieces of a bounded size; there is nothing behind the end."""
    data = os.urandom(3 * content_room.PIECE_BYTES + 5)
    (daemon.root / "file").write_bytes(data)
    stream = files.read("file", "stream")
    pieces = list(stream)
    assert b"".join(pieces) == data
    assert max(len(piece) for piece in pieces) <= content_room.PIECE_BYTES
    assert list(stream) == []


def test_a_file_that_shrinks_or_grows_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """Its size is a hint, and no more."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    number = os.open(path, os.O_RDONLY)
    os.truncate(path, 10)
    assert content_room.read_all(number, "file") == b"x" * 10
    growing = os.open("/proc/self/cmdline", os.O_RDONLY)
    assert content_room.read_all(growing, "file") == Path("/proc/self/cmdline").read_bytes()


# --- names


def test_a_listing_has_everything_about_each(files: Any, daemon: FilesDaemon) -> None:
    """In the order of the paths, which are absolute."""
    (daemon.root / "dir/below").mkdir(parents=True)
    (daemon.root / "dir/file").write_text("four")
    os.chmod(daemon.root / "dir/file", 0o640)
    os.utime(daemon.root / "dir/file", (0, 1.5))
    (daemon.root / "dir/link").symlink_to("file")
    os.mkfifo(daemon.root / "dir/below/fifo")
    listed = files.list("dir", depth=2)
    assert [(entry.path, entry.type) for entry in listed] == [
        (f"{daemon.root}/dir/below", FileType.DIR),
        (f"{daemon.root}/dir/below/fifo", FileType.FIFO),
        (f"{daemon.root}/dir/file", FileType.FILE),
        (f"{daemon.root}/dir/link", FileType.SYMLINK),
    ]
    assert [entry.name for entry in files.list("dir")] == ["below", "file", "link"]
    owner, group = str(os.getuid()), str(os.getgid())
    expected = EntryInfo(
        name="file",
        type=FileType.FILE,
        path=f"{daemon.root}/dir/file",
        size=4,
        mode=0o640,
        permissions="-rw-r-----",
        owner=owner,
        group=group,
        modified_time=datetime.fromtimestamp(1.5, UTC),
    )
    assert listed[2] == expected
    assert files.get_info("dir/file") == expected
    assert (listed[3].symlink_target, listed[3].permissions) == ("file", "lrwxrwxrwx")


def test_ten_thousand_entries_are_one_listing(files: Any, daemon: FilesDaemon) -> None:
    """Whatever a message can hold."""
    for number in range(10_000):
        os.close(os.open(daemon.root / f"{number:05d}", os.O_CREAT | os.O_WRONLY, 0o600))
    assert [entry.name for entry in files.list(".")] == [f"{number:05d}" for number in range(10_000)]


def test_names_that_are_not_utf8_survive_a_round_trip(files: Any, daemon: FilesDaemon) -> None:
    """As ``os.fsdecode`` has them, in each method."""
    odd = os.fsdecode(b"odd\xff\n")
    files.write(odd, "x")
    assert os.listdir(daemon.root) == [odd]
    [entry] = files.list(".")
    assert (entry.name, files.read(entry.path), files.exists(odd)) == (odd, "x", True)
    assert files.rename(odd, f"{odd}2").name == f"{odd}2"
    files.remove(f"{odd}2")
    assert files.list(".") == []


def test_a_whole_life_of_names(files: Any, daemon: FilesDaemon) -> None:
    """Made, renamed and removed; what is not there is removed without a word."""
    assert files.make_dir("a/b") is True
    assert files.make_dir("a/b") is False
    files.write("a/b/file", "x")
    assert files.rename("a", "z").path == f"{daemon.root}/z"
    assert (files.exists("a/b/file"), files.exists("z/b/file")) == (False, True)
    files.remove("z")
    files.remove("z")
    assert list(daemon.root.iterdir()) == []


def test_errors_have_the_classes_that_agent_code_catches(files: Any, daemon: FilesDaemon) -> None:
    """By what is wrong with the path."""
    (daemon.root / "file").touch()
    os.mkfifo(daemon.root / "fifo")
    for method, path in ((files.read, "none"), (files.list, "none"), (files.get_info, "none/below")):
        with pytest.raises(NotFoundException if path == "none" else SandboxException):
            method(path)
    for method, path in ((files.read, "."), (files.list, "file"), (files.read, "a\0b")):
        with pytest.raises(InvalidArgumentException):
            method(path)
    with pytest.raises(SandboxException) as raised:
        files.read("fifo")
    assert (type(raised.value), raised.value.type) == (SandboxException, "conflict")
    with pytest.raises(InvalidArgumentException, match="as user 'root'"):
        files.read("file", user="root")
    with pytest.raises(InvalidArgumentException):
        files.list(".", depth=0)
    assert type(exception_from(RpcError(0, "not_enough_space", "full"))) is NotEnoughSpaceException


def test_a_time_that_python_does_not_know_is_the_nearest_that_it_does() -> None:
    """A file may bear any."""
    row = {"path": "a", "path_bytes": None, "type": "char", "size_bytes": 0, "mode": 0, "uid": 0, "gid": 0}
    last, first = (entry_info({**row, "mtime_ns": ns, "target": None}) for ns in (2**63 - 1, -(2**63)))
    assert (last.modified_time.year, first.modified_time.year) == (2262, 1677)
    assert last.permissions[0] == stat.filemode(stat.S_IFCHR)[0]


# --- watching


def events_until(handle: WatchHandle, wanted: FilesystemEvent) -> list[FilesystemEvent]:
    happened: list[FilesystemEvent] = []
    while wanted not in happened:
        happened += handle.get_new_events()
    return happened


def event(kind: str, name: str) -> FilesystemEvent:
    return FilesystemEvent(name, FilesystemEventType(kind))


def test_events_are_fetched_when_somebody_likes(daemon: FilesDaemon) -> None:
    """By the names that agent code knows; what was renamed is told under both."""
    files = Files(SANDBOX)
    (daemon.root / "dir/below").mkdir(parents=True)
    with files.watch_dir("dir", recursive=True) as handle:
        assert handle.get_new_events() == []
        files.write("dir/below/file", "x")
        os.rename(daemon.root / "dir/below/file", daemon.root / "dir/new")
        happened = events_until(handle, event("create", "new"))
        assert happened[-2:] == [event("rename", "below/file"), event("create", "new")]
        (daemon.root / "dir/new").write_text("more")
        os.chmod(daemon.root / "dir/new", 0o600)
        os.unlink(daemon.root / "dir/new")
        happened = events_until(handle, event("remove", "new"))
        assert [event("write", "new"), event("chmod", "new")] == [
            each for each in dict.fromkeys(happened) if each.type.value in {"write", "chmod"}
        ]
    with pytest.raises(SandboxException, match="stopped"):
        handle.get_new_events()
    handle.stop()


def test_a_watch_that_is_over_says_why_after_all_that_happened(daemon: FilesDaemon) -> None:
    """Whether the directory is gone, or the sandbox."""
    files = Files(SANDBOX)
    (daemon.root / "dir").mkdir()
    handle = files.watch_dir("dir")
    (daemon.root / "dir/file").touch()
    os.unlink(daemon.root / "dir/file")
    os.rmdir(daemon.root / "dir")
    assert events_until(handle, event("remove", ""))[0] == event("create", "file")
    with pytest.raises(NotFoundException, match="removed"):
        events_until(handle, event("remove", "never"))
    handle = files.watch_dir(".")
    daemon.close_files()
    with pytest.raises(NotFoundException, match="went away"):
        events_until(handle, event("remove", "never"))


def test_what_is_not_there_cannot_be_watched(daemon: FilesDaemon) -> None:
    """It is told at once, by both."""
    with pytest.raises(NotFoundException):
        Files(SANDBOX).watch_dir("none")

    async def main() -> None:
        with pytest.raises(NotFoundException):
            await AsyncFiles(SANDBOX).watch_dir("none", print)

    anyio.run(main)


def test_events_come_to_a_callback_until_the_watch_is_stopped(daemon: FilesDaemon) -> None:
    """Which may be async; nothing is told after the stop."""

    async def main() -> None:
        files = AsyncFiles(SANDBOX)
        happened: list[FilesystemEvent] = []
        seen = anyio.Event()

        async def take(each: FilesystemEvent) -> None:
            await anyio.lowlevel.checkpoint()
            happened.append(each)
            if each == event("create", "second"):
                seen.set()

        async with await files.watch_dir(".", take, recursive=True):
            await files.write("first", "x")
            await files.make_dir("second")
            with anyio.fail_after(PATIENCE_S):
                await seen.wait()
        assert event("create", "first") in happened
        told = len(happened)
        seen = anyio.Event()
        async with await files.watch_dir(".", lambda _: seen.set()):
            await files.write("third", "x")
            with anyio.fail_after(PATIENCE_S):
                await seen.wait()
        assert len(happened) == told

    anyio.run(main)


def test_a_callback_may_stop_its_own_watch(daemon: FilesDaemon) -> None:
    """It would wait for itself."""

    async def main() -> None:
        files = AsyncFiles(SANDBOX)
        stopped = anyio.Event()
        handles: list[Any] = []

        async def take(_: FilesystemEvent) -> None:
            await handles[0].stop()
            stopped.set()

        handles.append(await files.watch_dir(".", take))
        await files.write("first", "x")
        with anyio.fail_after(PATIENCE_S):
            await stopped.wait()
        await handles[0].stop()

    anyio.run(main)


@pytest.mark.parametrize("end", ["timeout", "gone"])
def test_a_watch_that_ends_by_itself_says_why(daemon: FilesDaemon, end: str) -> None:
    """To a callback, that may be async."""
    (daemon.root / "dir").mkdir()

    async def main() -> None:
        files = AsyncFiles(SANDBOX)
        reasons: list[Exception] = []
        over = anyio.Event()

        async def leave(reason: Exception) -> None:
            reasons.append(reason)
            over.set()

        await files.watch_dir("dir", lambda _: None, leave, timeout=0.01 if end == "timeout" else 0)
        if end == "gone":
            os.rmdir(daemon.root / "dir")
        with anyio.fail_after(PATIENCE_S):
            await over.wait()
        assert [type(reason) for reason in reasons] == [TimeoutException if end == "timeout" else NotFoundException]

    anyio.run(main)


def test_importing_the_files_costs_no_event_loop() -> None:
    """Who blocks does not pay for who awaits."""
    script = "import sys; from sandboxd.client import Files, WatchHandle, EntryInfo; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"asyncio", "anyio", "msgspec", "tempfile", "runtimes"} & set(loaded)
