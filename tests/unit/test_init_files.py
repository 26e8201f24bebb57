"""Files in a sandbox, on a real worker under sanitizers."""

import asyncio
import contextlib
import errno
import os
import signal
import stat
from pathlib import Path

import pytest

from runtimes.init.exchange import ChannelClosed
from runtimes.init.file_worker import FileRefused
from runtimes.init.files import FilesChannel, OpenedFile, read_bytes
from runtimes.init.files_watch import Change, ChangeKind, Watcher
from runtimes.init.files_wire import FileType, InvalidPath
from tests.unit.init_files import refuse_unnamed_files, tree
from tests.unit.init_harness import open_descriptors

pytestmark = pytest.mark.anyio
DEADLINE_S = 20.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def content(files: FilesChannel, path: bytes, bytes_max: int = 1 << 20) -> bytes:
    opened = await files.open(path)
    try:
        return await read_bytes(opened.descriptor, bytes_max=bytes_max)
    finally:
        os.close(opened.descriptor)


async def put(files: FilesChannel, path: bytes, data: bytes, **options: bool | int) -> None:
    async with await files.temp(path, **options) as temp:  # type: ignore[arg-type]
        os.write(temp.descriptor, data)
        facts = await temp.commit()
        assert (facts.type, facts.size) == (FileType.FILE, len(data))


async def refusal(attempt: object) -> tuple[int, FileType]:
    with pytest.raises(FileRefused) as caught:
        await attempt  # type: ignore[misc]
    return caught.value.errno, caught.value.type


# ---- one file


async def test_what_is_written_can_be_read_and_its_facts_are_the_kernels() -> None:
    async with tree() as t:
        await put(t.files, b"a/b/file", b"hello\0\xff", make_parents=True, mode=0o640)
        assert await content(t.files, b"a/b/file") == b"hello\0\xff"
        facts, seen = (await t.files.stat(b"a/b/file")).facts, os.stat(t.root / "a/b/file")
        assert (facts.mode, facts.size, facts.uid, facts.gid, facts.nlink) == (0o640, 7, seen.st_uid, seen.st_gid, 1)
        assert (facts.mtime_ns, facts.ctime_ns) == (seen.st_mtime_ns, seen.st_ctime_ns)
        assert (facts.inode, facts.device, facts.allocated) == (seen.st_ino, seen.st_dev, seen.st_blocks * 512)
        assert stat.S_IMODE(os.stat(t.root / "a").st_mode) == 0o755


async def test_an_absolute_path_needs_no_base() -> None:
    async with tree() as t:
        (t.root / "file").write_bytes(b"x")
        elsewhere = await t.host.channel.open_files(b"/nowhere")
        with contextlib.closing(elsewhere):
            assert await content(elsewhere, os.fsencode(t.root / "file")) == b"x"
            assert (await refusal(elsewhere.stat(b"file")))[0] == errno.ENOENT


async def test_a_descriptor_is_blocking_not_inherited_and_open_as_asked_for() -> None:
    async with tree() as t:
        for options, mode in (
            ({"create": True, "write": True}, os.O_RDWR),
            ({"read": False, "write": True}, os.O_WRONLY),
            ({}, os.O_RDONLY),
        ):
            opened: OpenedFile = await t.files.open(b"file", **options)  # type: ignore[arg-type]
            flags = int(Path(f"/proc/self/fdinfo/{opened.descriptor}").read_text().split("flags:")[1].split()[0], 8)
            assert flags & os.O_ACCMODE == mode
            assert os.get_blocking(opened.descriptor)
            assert not os.get_inheritable(opened.descriptor)
            os.close(opened.descriptor)


async def test_create_exclusive_truncate_and_append_are_as_in_open() -> None:
    async with tree() as t:
        os.close((await t.files.open(b"x/new", write=True, create=True, make_parents=True, mode=0o606)).descriptor)
        assert stat.S_IMODE(os.stat(t.root / "x/new").st_mode) == 0o606
        refused = await refusal(t.files.open(b"x/new", write=True, create=True, exclusive=True))
        assert refused[0] == errno.EEXIST
        (t.root / "x/new").write_bytes(b"old")
        appending = await t.files.open(b"x/new", write=True, append=True)
        os.write(appending.descriptor, b"+")
        os.close(appending.descriptor)
        assert (t.root / "x/new").read_bytes() == b"old+"
        truncated = await t.files.open(b"x/new", write=True, truncate=True)
        assert truncated.facts.size == 0
        os.close(truncated.descriptor)
        assert (await refusal(t.files.open(b"x/new", truncate=True)))[0] == errno.EBADMSG


async def test_links_are_followed_only_where_that_was_asked_for() -> None:
    async with tree() as t:
        (t.root / "file").write_bytes(b"x")
        await t.files.symlink(b"file", b"deep/link", make_parents=True)
        os.rename(t.root / "deep/link", t.root / "link")
        found = await t.files.stat(b"link")
        assert (found.facts.type, found.target) == (FileType.SYMLINK, b"file")
        assert (await t.files.stat(b"link", follow=True)).facts.type is FileType.FILE
        assert (await refusal(t.files.open(b"link", follow=False)))[0] == errno.ELOOP
        await t.files.chmod(b"link", 0o600)
        assert stat.S_IMODE(os.stat(t.root / "file").st_mode) == 0o600
        assert (await refusal(t.files.chmod(b"link", 0o600, follow=False)))[0] in (errno.EOPNOTSUPP, errno.ELOOP)
        await t.set_times(b"link", 5, follow=False)
        assert os.lstat(t.root / "link").st_mtime_ns == 5


@pytest.mark.parametrize("time_ns", [0, 1, -1, 1_700_000_000_123_456_789, -(10**18) - 7])
async def test_times_are_set_to_the_nanosecond(time_ns: int) -> None:
    async with tree() as t:
        os.close((await t.files.open(b"file", write=True, create=True)).descriptor)
        await t.set_times(b"file", time_ns)
        assert (await t.files.stat(b"file")).facts.mtime_ns == os.stat(t.root / "file").st_mtime_ns == time_ns


async def test_directories_are_made_with_their_parents_and_told_apart_from_those_that_were_there() -> None:
    async with tree() as t:
        assert await t.files.make_dir(b"a/b/../c//d/", mode=0o700)
        assert stat.S_IMODE(os.stat(t.root / "a/c/d").st_mode) == 0o700
        assert not await t.files.make_dir(b"a/c/d")
        assert (await refusal(t.files.make_dir(b"a/c/d", make_parents=False)))[0] == errno.EEXIST
        assert (await refusal(t.files.make_dir(b"no/parent", make_parents=False)))[0] == errno.ENOENT
        (t.root / "file").touch()
        assert (await refusal(t.files.make_dir(b"file/below")))[0] == errno.ENOTDIR
        os.symlink("dangling", t.root / "link")
        assert (await refusal(t.files.make_dir(b"link/below")))[0] == errno.ENOENT


async def test_a_rename_replaces_refuses_or_exchanges() -> None:
    async with tree() as t:
        (t.root / "a").write_bytes(b"a")
        (t.root / "b").write_bytes(b"b")
        assert (await refusal(t.files.rename(b"a", b"b", no_replace=True)))[0] == errno.EEXIST
        await t.files.rename(b"a", b"b", exchange=True)
        assert (t.root / "a").read_bytes() == b"b"
        await t.files.rename(b"a", os.fsencode(t.root / "b"))
        assert os.listdir(t.root) == ["b"]


@pytest.mark.parametrize("path", [b"a\0b", b"x" * 4096])
async def test_a_path_that_is_none_is_not_sent(path: bytes) -> None:
    async with tree() as t:
        with pytest.raises(InvalidPath):
            await t.files.stat(path)


async def test_errors_are_the_kernels_own() -> None:
    async with tree() as t:
        assert (await refusal(t.files.stat(b"x" * 256)))[0] == errno.ENAMETOOLONG
        assert (await refusal(t.files.stat(b"")))[0] == errno.ENOENT
        assert (await refusal(t.files.temp(b"x" * 256)))[0] == errno.ENAMETOOLONG
        assert (await refusal(t.files.temp(b"none/file")))[0] == errno.ENOENT
        os.symlink("loop", t.root / "loop")
        assert (await refusal(t.files.open(b"loop")))[0] == errno.ELOOP
        assert (await refusal(t.files.temp(b"loop", follow=True)))[0] == errno.ELOOP
        assert (await refusal(t.files.list_dir(b"loop")))[0] == errno.ELOOP


# ---- atomic replacement


@pytest.mark.parametrize("prepare", [None, refuse_unnamed_files], ids=["unnamed", "hidden"])
class TestAtomicReplacement:
    async def test_a_reader_sees_all_of_the_old_or_all_of_the_new(self, prepare: None) -> None:
        async with tree(prepare=prepare) as t:
            await put(t.files, b"file", b"old")
            async with await t.files.temp(b"file") as temp:
                os.write(temp.descriptor, b"new")
                assert (t.root / "file").read_bytes() == b"old"
                await temp.commit()
            assert (t.root / "file").read_bytes() == b"new"
            assert os.listdir(t.root) == ["file"]

    async def test_what_is_not_committed_vanishes(self, prepare: None) -> None:
        async with tree(prepare=prepare) as t:
            async with await t.files.temp(b"a"):
                pass
            lost = await t.files.temp(b"b")
            await t.files.stat(b".")
            t.files.close()
            await asyncio.wait_for(_empty(t.root), DEADLINE_S)
            lost.discard()

    async def test_an_init_that_stops_leaves_none(self, prepare: None) -> None:
        async with tree(prepare=prepare) as t:
            lost = await t.files.temp(b"b")
            t.host.process.terminate()
            await asyncio.wait_for(_empty(t.root), DEADLINE_S)
            await asyncio.to_thread(t.host.process.wait)
            lost.discard()

    async def test_no_replace_is_decided_at_the_commit(self, prepare: None) -> None:
        async with tree(prepare=prepare) as t:
            async with await t.files.temp(b"file") as temp:
                (t.root / "file").write_bytes(b"first")
                assert (await refusal(temp.commit(no_replace=True)))[0] == errno.EEXIST
            async with await t.files.temp(b"other") as temp:
                await temp.commit(no_replace=True)
            assert sorted(os.listdir(t.root)) == ["file", "other"]

    async def test_a_directory_in_the_place_or_gone_below_is_an_error_and_leaves_nothing(self, prepare: None) -> None:
        async with tree(prepare=prepare) as t:
            async with await t.files.temp(b"x/file", make_parents=True) as temp:
                (t.root / "x/file").mkdir()
                assert (await refusal(temp.commit()))[0] == errno.EISDIR
            assert os.listdir(t.root / "x") == ["file"]
            assert await refusal(t.files.temp(b"x/file")) == (errno.EISDIR, FileType.DIRECTORY)

    async def test_a_mode_can_be_kept_and_a_link_followed(self, prepare: None) -> None:
        """A script stays executable; what a link leads to is replaced where it lies, so it stays a link."""
        async with tree(prepare=prepare) as t:
            (t.root / "bin").mkdir()
            (t.root / "bin/tool").write_bytes(b"old")
            os.chmod(t.root / "bin/tool", 0o4755)
            os.symlink("bin", t.root / "folder")
            os.symlink("folder/tool", t.root / "one")
            os.symlink(t.root / "one", t.root / "two")
            await put(t.files, b"two", b"new", keep_mode=True, follow=True)
            assert (t.root / "bin/tool").read_bytes() == b"new"
            assert stat.S_IMODE(os.stat(t.root / "bin/tool").st_mode) == 0o755
            assert os.path.islink(t.root / "two")
            await put(t.files, b"two", b"alone")
            assert not os.path.islink(t.root / "two")


async def _empty(folder: Path) -> None:
    while os.listdir(folder):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def test_temporary_files_have_a_bounded_number_of_places() -> None:
    async with tree() as t:
        temps = [await t.files.temp(b"file%d" % n) for n in range(64)]
        assert (await refusal(t.files.temp(b"surplus")))[0] == errno.EUSERS
        for temp in temps:
            temp.discard()
        await put(t.files, b"file", b"x")


async def test_a_temporary_file_that_nobody_waits_for_any_more_gives_its_place_back() -> None:
    async with tree() as t:
        for n in range(100):
            asking = asyncio.ensure_future(t.files.temp(b"file%d" % n))
            await asyncio.sleep(0)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await asking).discard()
            await t.files.stat(b".")
        await put(t.files, b"file", b"x")
        assert os.listdir(t.root) == ["file"]


# ---- listing


async def test_a_listing_goes_as_deep_as_asked_and_says_what_links_lead_to() -> None:
    async with tree() as t:
        (t.root / "a/b/c").mkdir(parents=True)
        (t.root / "a/file").write_bytes(b"x")
        os.symlink("/nowhere", t.root / "a/link")
        assert await t.names(depth=0) == set()
        assert await t.names(depth=1) == {b"a"}
        assert await t.names(depth=2) == {b"a", b"a/b", b"a/file", b"a/link"}
        assert await t.names(b"a", depth=2) == {b"b", b"b/c", b"file", b"link"}
        listing = await t.files.list_dir(b"a")
        assert {entry.path: entry.target for entry in listing.entries}[b"link"] == b"/nowhere"
        assert listing.root.inode == os.stat(t.root / "a").st_ino
        assert not listing.truncated
        assert await refusal(t.files.list_dir(b"a/file")) == (errno.ENOTDIR, FileType.FILE)


async def test_pages_hold_every_entry_once_and_listings_do_not_mix() -> None:
    async with tree() as t:
        expected = set()
        for folder in range(20):
            (t.root / f"d{folder}").mkdir()
            expected.add(b"d%d" % folder)
            for n in range(150):
                (t.root / f"d{folder}/{'n' * (n % 200)}-{n}").touch()
                expected.add(b"d%d/%s-%d" % (folder, b"n" * (n % 200), n))
        for listing in await asyncio.gather(*(t.files.list_dir(b".", depth=2) for _ in range(6))):
            assert len(listing.entries) == len(expected)
            assert {entry.path for entry in listing.entries} == expected
            seen: set[bytes] = {b""}
            for entry in listing.entries:
                assert entry.path.rpartition(b"/")[0] in seen
                seen.add(entry.path)


async def test_a_listing_is_bounded_and_says_so_and_leaves_no_place_taken() -> None:
    async with tree() as t:
        for n in range(2000):
            (t.root / f"{n:0100}").touch()
        for _ in range(20):
            listing = await t.files.list_dir(b".", entries_max=1000)
            assert (len(listing.entries), listing.truncated) == (1000, True)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(8):
                await (await stack.enter_async_context(t.files.walk(b"."))).next_page()
            assert (await refusal(t.files.list_dir(b".")))[0] == errno.EUSERS
        assert len((await t.files.list_dir(b".")).entries) == 2000


# ---- removing


async def test_a_removal_takes_files_links_and_empty_directories_and_trees_only_if_asked() -> None:
    async with tree() as t:
        outside = t.root / "outside"
        (outside / "kept").mkdir(parents=True)
        (t.root / "tree/below").mkdir(parents=True)
        (t.root / "tree/below/file").touch()
        os.symlink(outside, t.root / "tree/link")
        os.symlink(outside, t.root / "link")
        assert (await refusal(t.files.remove(b"tree")))[0] == errno.ENOTEMPTY
        await t.files.remove(b"tree", recursive=True)
        await t.files.remove(b"link", recursive=True)
        assert await t.names() == {b"outside", b"outside/kept"}
        await t.files.remove(b"outside/kept/")
        assert (await refusal(t.files.remove(b"outside/kept", recursive=True)))[0] == errno.ENOENT


@pytest.mark.parametrize("path", [b"/", b".", b"..", b"a/..", b"a/.", b"", b"//"])
async def test_what_ends_in_no_name_is_not_removed(path: bytes) -> None:
    async with tree() as t:
        (t.root / "a").mkdir()
        assert (await refusal(t.files.remove(path, recursive=True)))[0] == errno.EINVAL
        assert os.listdir(t.root) == ["a"]


async def test_a_wide_tree_is_removed_in_many_turns_that_let_others_in() -> None:
    async with tree() as t:
        for folder in range(60):
            (t.root / f"wide/{folder}/x").mkdir(parents=True)
            for n in range(200):
                (t.root / f"wide/{folder}/x/{n}").touch()
        removing = asyncio.ensure_future(t.files.remove(b"wide", recursive=True))
        while not removing.done():
            await asyncio.wait_for(t.files.stat(b"."), DEADLINE_S)
        await removing
        assert os.listdir(t.root) == []


# ---- watching


async def seen_until(watcher: Watcher, *wanted: Change) -> list[Change]:
    """All changes until those wanted have come, in any order."""
    changes: list[Change] = []
    async with asyncio.timeout(DEADLINE_S):
        while not set(wanted) <= set(changes):
            changes += await watcher.changes()
    return changes


def made(path: bytes, *, directory: bool = False) -> Change:
    return Change(ChangeKind.CREATED, path, directory)


async def test_changes_are_told_as_they_happen() -> None:
    async with tree() as t:
        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher):
            (t.root / "file").write_bytes(b"x")
            await seen_until(watcher, made(b"file"), Change(ChangeKind.CLOSED_AFTER_WRITE, b"file", False))
            os.chmod(t.root / "file", 0o600)
            await seen_until(watcher, Change(ChangeKind.ATTRIBUTES, b"file", False))
            os.rename(t.root / "file", t.root / "new")
            await seen_until(watcher, Change(ChangeKind.RENAMED, b"new", False, b"file"))
            os.unlink(t.root / "new")
            await seen_until(watcher, Change(ChangeKind.REMOVED, b"new", False))


async def test_new_directories_are_watched_and_what_they_hold_is_not_missed() -> None:
    async with tree() as t:
        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher):
            (t.root / "a/b/c").mkdir(parents=True)
            (t.root / "a/b/c/file").touch()
            await seen_until(watcher, made(b"a/b/c/file"))
            (t.root / "a/b/c/later").touch()
            await seen_until(watcher, made(b"a/b/c/later"))
            os.rename(t.root / "a", t.root / "z")
            (t.root / "z/b/c/after").touch()
            changes = await seen_until(watcher, made(b"z/b/c/after"))
            assert Change(ChangeKind.RENAMED, b"z", True, b"a") in changes


async def test_a_directory_that_is_moved_away_is_no_longer_ours_to_tell() -> None:
    async with tree() as t:
        (t.root / "watched/a/b").mkdir(parents=True)
        watcher = await t.files.watch(b"watched")
        with contextlib.closing(watcher):
            os.rename(t.root / "watched/a", t.root / "a")
            await seen_until(watcher, Change(ChangeKind.REMOVED, b"a", True))
            (t.root / "a/b/private").touch()
            (t.root / "watched/own").touch()
            changes = await seen_until(watcher, made(b"own"))
            assert not [change for change in changes if b"private" in change.path]
            os.rename(t.root / "a", t.root / "watched/back")
            await seen_until(watcher, made(b"back", directory=True), made(b"back/b/private"))
            (t.root / "watched/back/b/file").touch()
            await seen_until(watcher, made(b"back/b/file"))


async def test_one_file_or_one_directory_can_be_watched_alone() -> None:
    async with tree() as t:
        (t.root / "sub").mkdir()
        (t.root / "file").touch()
        alone = await t.files.watch(b"file")
        flat = await t.files.watch(b".", recursive=False)
        with contextlib.closing(alone), contextlib.closing(flat):
            (t.root / "sub/unseen").touch()
            (t.root / "file").write_bytes(b"x")
            await seen_until(alone, Change(ChangeKind.MODIFIED, b"", False))
            changes = await seen_until(flat, Change(ChangeKind.CLOSED_AFTER_WRITE, b"file", False))
            assert not [change for change in changes if b"unseen" in change.path]
            os.unlink(t.root / "file")
            await seen_until(alone, Change(ChangeKind.REMOVED, b"", False))
        assert (await refusal(t.files.watch(b"none")))[0] == errno.ENOENT


async def test_an_overflow_is_told_and_the_watch_goes_on() -> None:
    """The kernel keeps some 16 000 changes for who does not read."""
    length = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    async with tree() as t:
        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher):
            for n in range(length // 2 + 100):
                os.mkdir(t.root / str(n % 10))
                os.rmdir(t.root / str(n % 10))
            (t.root / "missed").mkdir()
            await seen_until(watcher, Change(ChangeKind.OVERFLOW, b"", True))
            (t.root / "missed/file").touch()
            await seen_until(watcher, made(b"missed/file"))


async def test_a_call_for_changes_that_is_cancelled_loses_none() -> None:
    async with tree() as t:
        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher):
            for n in range(50):
                (t.root / f"{n}/below").mkdir(parents=True)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.0002 * (n % 5)):
                        changes = await watcher.changes()
                        watcher._changes[:0] = changes
            await seen_until(watcher, *(made(b"%d/below" % n, directory=True) for n in range(50)))


async def test_the_number_of_watched_directories_is_bounded_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.init.files_watch.WATCHED_DIRECTORIES_MAX", 20)
    async with tree() as t:
        for n in range(2000):
            (t.root / f"{n}").mkdir()
        watcher = await t.files.watch(b".")
        assert watcher.truncated
        watcher.close()


async def test_so_is_the_length_of_their_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may be 255 bytes long, and a path 4095."""
    monkeypatch.setattr("runtimes.init.files_watch.WATCHED_PATH_BYTES_MAX", 1000)
    async with tree() as t:
        (t.root / "/".join(["x" * 200] * 6)).mkdir(parents=True)
        watcher = await t.files.watch(b".")
        assert watcher.truncated
        watcher.close()


async def test_what_waits_to_be_told_is_bounded_and_the_rest_is_an_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by length; and what comes after a call is told again."""
    async with tree() as t:
        for limit, name in (("CHANGES_MAX", "number"), ("CHANGES_PATH_BYTES_MAX", "length")):
            for number in range(500):
                (t.root / f"{name}/{number}").mkdir(parents=True)
            (t.root / "watched").mkdir(exist_ok=True)
            monkeypatch.setattr(f"runtimes.init.files_watch.{limit}", 50)
            watcher = await t.files.watch(b"watched")
            with contextlib.closing(watcher):
                os.rename(t.root / name, t.root / "watched" / name)
                changes = await seen_until(watcher, Change(ChangeKind.OVERFLOW, b"", True))
                assert len(changes) <= 60
                (t.root / "watched" / name / "499/file").touch()
                await seen_until(watcher, made(f"{name}/499/file".encode()))
            monkeypatch.undo()


async def test_many_changes_at_once_let_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox that makes them without end must not keep the loop to itself."""
    monkeypatch.setattr("runtimes.init.files_watch.TURN_S", 0.0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with tree() as t:
        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher):
            for number in range(200):
                (t.root / f"{number}").touch()
            counting = asyncio.ensure_future(count())
            await watcher.changes()
            counting.cancel()
            assert turns > 200


async def test_whoever_waits_for_changes_learns_that_the_files_were_closed() -> None:
    """Although nothing happens to the files themselves."""
    async with tree() as t:
        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher):
            waiting = asyncio.ensure_future(watcher.changes())
            await asyncio.sleep(0)
            t.files.close()
            with pytest.raises(ChannelClosed):
                await waiting


async def test_a_watch_goes_on_with_another_worker() -> None:
    async with tree() as t:
        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher):
            os.kill(t.worker, signal.SIGKILL)
            (t.root / "a").mkdir()
            await seen_until(watcher, Change(ChangeKind.OVERFLOW, b"", True))
            (t.root / "a/file").touch()
            await seen_until(watcher, made(b"a/file"))


async def test_watches_have_a_bounded_number_of_places() -> None:
    async with tree() as t:
        before = open_descriptors().keys()
        watchers = [await t.files.watch(b".") for _ in range(16)]
        assert (await refusal(t.files.watch(b".")))[0] == errno.EUSERS
        for watcher in watchers:
            watcher.close()
        (await t.files.watch(b".")).close()
        assert open_descriptors().keys() == before
