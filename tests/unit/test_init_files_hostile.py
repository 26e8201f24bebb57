"""Trees made to hang, crash, exhaust or mislead whoever works in them: the worker answers, and serves on."""

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import resource
import signal
import socket
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from runtimes.init import files_wire as wire
from runtimes.init import wire as init_wire
from runtimes.init.exchange import ChannelClosed, InitTimeout
from runtimes.init.file_worker import FileRefused, WorkerLost
from runtimes.init.files import read_bytes
from runtimes.init.files_wire import FileType, Flag
from tests.unit.init_files import Tree, make_deep, tree
from tests.unit.init_harness import DEADLINE_S, Host, descriptor_count, running_init, until

pytestmark = pytest.mark.anyio
FIRST_FREE = 3  # descriptor in a worker, whose socket has a higher number


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def refusal(attempt: object) -> tuple[int, FileType]:
    with pytest.raises(FileRefused) as caught:
        await asyncio.wait_for(attempt, DEADLINE_S)  # type: ignore[arg-type]
    return caught.value.errno, caught.value.type


async def assert_serves(t: Tree) -> None:
    async with await t.files.temp(b"served") as temp:
        await temp.commit()
    await t.files.remove(b"served")


@contextlib.contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Does it again and again in a thread; that something is not there at the moment is no matter."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                work()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# ---- what is no file


async def test_what_is_no_regular_file_is_refused_at_once_and_named() -> None:
    """A FIFO without a writer and a lease would block, /dev/zero never ends, a terminal could be typed into."""
    async with tree() as t:
        os.mkfifo(t.root / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fsencode(t.root / "socket"))
        for path, number, kind in (
            (b"fifo", errno.ENXIO, FileType.FIFO),
            (b"/dev/zero", errno.ENXIO, FileType.CHARACTER_DEVICE),
            (b"/dev/ptmx", errno.ENXIO, FileType.CHARACTER_DEVICE),
            (b".", errno.EISDIR, FileType.DIRECTORY),
            (b"/proc/self/status", errno.EOPNOTSUPP, FileType.FILE),
            (b"/proc/self/oom_score_adj", errno.EOPNOTSUPP, FileType.FILE),
            (b"/sys/kernel/mm/transparent_hugepage/enabled", errno.EOPNOTSUPP, FileType.FILE),
        ):
            assert await refusal(t.files.open(path)) == (number, kind), path
        assert (await refusal(t.files.open(b"socket")))[0] == errno.ENXIO
        assert (await refusal(t.files.open(b"fifo", read=False, write=True)))[0] == errno.ENXIO
        assert (await refusal(t.files.open(b"fifo", write=True, truncate=True))) == (errno.ENXIO, FileType.FIFO)
        assert await refusal(t.files.temp(b"fifo")) == (errno.ENXIO, FileType.FIFO)
        assert (await refusal(t.files.list_dir(b"fifo"))) == (errno.ENOTDIR, FileType.FIFO)
        await assert_serves(t)


async def test_a_lease_does_not_hold_an_open_up() -> None:
    async with tree() as t:
        with (t.root / "leased").open("wb") as file:
            signal.signal(signal.SIGIO, signal.SIG_IGN)
            try:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                assert (await refusal(t.files.open(b"leased")))[0] == errno.EAGAIN
            finally:
                signal.signal(signal.SIGIO, signal.SIG_DFL)


async def test_a_sparse_file_of_a_tebibyte_is_read_as_far_as_asked() -> None:
    async with tree() as t:
        with (t.root / "sparse").open("wb") as file:
            file.truncate(1 << 40)
        opened = await t.files.open(b"sparse")
        try:
            assert (opened.facts.size, opened.facts.allocated) == (1 << 40, 0)
            assert await read_bytes(opened.descriptor, bytes_max=300_000) == bytes(300_000)
            assert await read_bytes(opened.descriptor, offset=(1 << 40) - 5, bytes_max=300_000) == bytes(5)
        finally:
            os.close(opened.descriptor)


async def test_a_file_that_shrinks_while_it_is_read_just_ends() -> None:
    async with tree() as t:
        (t.root / "file").write_bytes(b"x" * 1_000_000)
        opened = await t.files.open(b"file")
        try:
            os.truncate(t.root / "file", 10)
            assert await read_bytes(opened.descriptor, bytes_max=opened.facts.size) == b"x" * 10
        finally:
            os.close(opened.descriptor)


# ---- names and numbers


async def test_names_are_bytes_newlines_and_invalid_utf8_included() -> None:
    names = {b"new\nline", b"\xff\xfe", b"\xed\xa0\x80", b" ", b"-rf", b"a\\b", b"\x1b[2J", b"x" * 255}
    async with tree() as t:
        for name in names:
            async with await t.files.temp(name) as temp:
                await temp.commit()
        assert await t.names() == names == set(os.listdir(os.fsencode(t.root)))
        for name in names:
            await t.files.rename(name, name[:250] + b"\n")
            await t.files.remove(name[:250] + b"\n")
        assert await t.names() == set()


async def test_times_that_no_clock_shows_are_no_overflow() -> None:
    async with tree() as t:
        (t.root / "file").touch()
        for seconds in (2**40, -(2**40), 2**62, -(2**62)):
            with contextlib.suppress(OSError, OverflowError):
                os.utime(t.root / "file", (seconds, seconds))
            assert abs((await t.files.stat(b"file")).facts.mtime_ns) < 2**64
        await t.set_times(b"file", 2**63 - 1)
        await t.set_times(b"file", -(2**63))


async def test_many_entries_are_listed_as_far_as_asked_and_removed() -> None:
    async with tree() as t:
        (t.root / "many").mkdir()
        (t.root / "many/0").touch()
        folder = os.open(t.root / "many", os.O_RDONLY)
        for n in range(1, 60_000):
            if n % 30_000 == 0:
                (t.root / f"many/{n}").touch()
            else:
                os.link(f"{n - n % 30_000}", str(n), src_dir_fd=folder, dst_dir_fd=folder)
        os.close(folder)
        listing = await t.files.list_dir(b"many", entries_max=1000)
        assert (len(listing.entries), listing.truncated) == (1000, True)
        listing = await t.files.list_dir(b"many")
        assert len({entry.path for entry in listing.entries}) == len(listing.entries) == 60_000
        await t.files.remove(b"many", recursive=True)
        assert os.listdir(t.root) == []


async def test_a_tree_of_ten_thousand_levels_is_listed_in_part_watched_in_part_and_removed() -> None:
    """No path reaches its end, and a descriptor per level would be too many."""
    async with tree() as t:
        (t.root / "deep").mkdir()
        await asyncio.to_thread(make_deep, t.root / "deep", 10_000)
        listing = await t.files.list_dir(b"deep", depth=64)
        assert (len(listing.entries), listing.truncated) == (64, True)
        watcher = await t.files.watch(b"deep")
        assert watcher.truncated
        watcher.close()
        await t.files.remove(b"deep", recursive=True)
        assert os.listdir(t.root) == []


async def test_a_path_too_long_to_be_named_is_left_out_and_said_so() -> None:
    async with tree() as t:
        at = os.open(t.root, os.O_RDONLY)
        for _ in range(20):
            os.mkdir("x" * 255, dir_fd=at)
            below = os.open("x" * 255, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        os.close(at)
        listing = await t.files.list_dir(b".", depth=64)
        assert listing.truncated
        assert max(len(entry.path) for entry in listing.entries) <= wire.PATH_BYTES_MAX
        await t.files.remove(b"x" * 255, recursive=True)


# ---- races


async def test_a_directory_swapped_for_a_link_is_not_left_by_a_removal() -> None:
    """What lies behind the link must live, however often and whenever the swap is made."""
    async with tree() as t:
        (t.root / "outside/kept").mkdir(parents=True)
        (t.root / "outside/kept/file").touch()
        link = t.root / "link"
        os.symlink(t.root / "outside", link)

        def swap() -> None:
            os.rename(t.root / "tree/d/victim", t.root / "aside")
            os.rename(link, t.root / "tree/d/victim")
            os.rename(t.root / "tree/d/victim", link)
            os.rename(t.root / "aside", t.root / "tree/d/victim")

        for _ in range(60):
            (t.root / "tree/d/victim/kept").mkdir(parents=True, exist_ok=True)
            (t.root / "tree/d/victim/kept/file").touch()
            with meanwhile(swap):
                for _ in range(200):
                    with contextlib.suppress(FileRefused):
                        await t.files.remove(b"tree", recursive=True)
                        break
            for name in ("aside", "tree"):
                with contextlib.suppress(FileRefused):
                    await t.files.remove(name.encode(), recursive=True)
            if not link.is_symlink():
                os.symlink(t.root / "outside", link)
            assert (t.root / "outside/kept/file").exists()


async def test_a_tree_that_changes_while_it_is_listed_or_watched_does_no_harm() -> None:
    async with tree() as t:
        (t.root / "away").mkdir()

        def churn() -> None:
            for n in range(5):
                (t.root / f"d{n}/x/y").mkdir(parents=True, exist_ok=True)
                (t.root / f"d{n}/x/f").touch()
                os.rename(t.root / f"d{n}/x", t.root / "away/x")
                os.symlink("/", t.root / f"d{n}/x")
                os.unlink(t.root / f"d{n}/x")
                os.rename(t.root / "away/x", t.root / f"d{(n + 1) % 5}/z")
                os.rename(t.root / f"d{(n + 1) % 5}/z", t.root / f"d{n}/x")

        watcher = await t.files.watch(b".")
        with contextlib.closing(watcher), meanwhile(churn):
            for _ in range(300):
                for entry in (await t.files.list_dir(b".", depth=8)).entries:
                    assert entry.path.split(b"/")[0] == b"away" or entry.path[:1] == b"d"
                await asyncio.wait_for(watcher.changes(), DEADLINE_S)
        await assert_serves(t)


async def test_a_directory_that_is_filled_without_end_ends_the_removal_in_time() -> None:
    async with tree() as t:
        n = iter(range(10**9))

        def fill() -> None:
            (t.root / f"filled/{next(n)}").mkdir(parents=True)

        with meanwhile(fill):
            for _ in range(5):
                with contextlib.suppress(FileRefused, InitTimeout):
                    await t.files.remove(b"filled", recursive=True, deadline_s=0.2)
                await asyncio.wait_for(t.files.stat(b"."), 5)
        with contextlib.suppress(FileRefused):
            await t.files.remove(b"filled", recursive=True)
        assert os.listdir(t.root) == []


# ---- what runs out


async def test_a_full_table_of_descriptors_is_an_error_and_passes() -> None:
    async with tree() as t:
        (t.root / "a/b").mkdir(parents=True)
        (t.root / "file").touch()
        limits = resource.prlimit(t.worker, resource.RLIMIT_NOFILE)
        resource.prlimit(t.worker, resource.RLIMIT_NOFILE, (FIRST_FREE + 1, limits[1]))
        for attempt in (t.files.open(b"file"), t.files.temp(b"x"), t.files.list_dir(b"."), t.files.watch(b".")):
            assert (await refusal(attempt))[0] == errno.EMFILE
        assert (await refusal(t.files.remove(b"a", recursive=True)))[0] == errno.EMFILE
        resource.prlimit(t.worker, resource.RLIMIT_NOFILE, limits)
        assert await t.names() == {b"a", b"a/b", b"file"}
        await assert_serves(t)


async def test_a_directory_that_cannot_be_opened_is_listed_with_the_reason() -> None:
    async with tree() as t:
        (t.root / "a/b").mkdir(parents=True)
        limits = resource.prlimit(t.worker, resource.RLIMIT_NOFILE)
        # Descriptors for the base, the path, and the directory to read.
        resource.prlimit(t.worker, resource.RLIMIT_NOFILE, (FIRST_FREE + 3, limits[1]))
        listing = await t.files.list_dir(b".", depth=3)
        assert [(entry.path, entry.errno) for entry in listing.entries] == [(b"a", errno.EMFILE)]
        resource.prlimit(t.worker, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("path", "number"),
    [(b"/proc/file", (errno.ENOENT, errno.EACCES)), (b"/sys/file", (errno.EACCES, errno.EPERM, errno.EROFS))],
)
async def test_where_nothing_can_be_made_that_is_said(path: bytes, number: Sequence[int]) -> None:
    async with tree() as t:
        for attempt in (
            t.files.temp(path),
            t.files.open(path, write=True, create=True),
            t.files.make_dir(path),
            t.files.symlink(b"x", path),
        ):
            assert (await refusal(attempt))[0] in (*number, errno.EOPNOTSUPP)


# ---- the life of a worker


async def test_the_worker_ends_with_its_socket_and_init_knows_it_no_more() -> None:
    async with running_init() as host:
        before = descriptor_count(host.process.pid)
        for _ in range(30):
            files = await host.channel.open_files(b"/")
            await files.stat(b"/")
            files.close()
            with pytest.raises(ChannelClosed):
                await files.stat(b"/")
        await until(lambda: not host.file_workers(), "all end")
        await until(lambda: descriptor_count(host.process.pid) == before, "init closed all")
        assert await host.channel.list_commands() == []


async def test_workers_are_bounded_and_places_come_back() -> None:
    async with running_init() as host:
        opened = [await host.channel.open_files() for _ in range(8)]
        for files in opened:
            await files.stat(b"/")
        with pytest.raises(init_wire.InitError, match="No space"):
            await host.channel.open_files()
        opened.pop().close()
        await until(lambda: len(host.file_workers()) == 7, "one ends")
        opened.append(await host.channel.open_files())
        for files in opened:
            files.close()


async def test_a_worker_that_a_command_kills_is_replaced() -> None:
    async with tree() as t:
        (t.root / "file").touch()
        temp = await t.files.temp(b"temp")
        for _ in range(5):
            os.kill(t.worker, signal.SIGKILL)
            await until(lambda: not t.host.file_workers(), "init reaped it")
            await t.files.stat(b"file")
        with pytest.raises(WorkerLost):
            await temp.commit()
        assert os.listdir(t.root) == ["file"]


async def test_a_worker_that_is_stopped_is_continued_and_in_the_end_killed() -> None:
    async with tree() as t:
        first = t.worker
        os.kill(first, signal.SIGSTOP)
        await asyncio.wait_for(t.files.stat(b"."), 5)
        for _ in range(2000):
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGSTOP)
            if first not in t.host.file_workers():
                break
            await asyncio.sleep(0.002)
        await asyncio.wait_for(t.files.stat(b"."), 5)
        assert t.worker != first


async def test_a_worker_is_no_stray_and_no_wave_reaches_it() -> None:
    """When a keeper is lost, everything that hangs below init is killed, but not this."""
    async with tree() as t:
        command_id, _ = await t.host.shell("setsid sleep 1000 & sleep 1000")
        await until(lambda: len(t.host.marked()) == 3, "all run")
        first = t.worker
        entry = next(iter(await t.host.channel.list_commands()))
        keeper = int(Path(f"/proc/{entry.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(keeper, signal.SIGKILL)
        await t.host.ends.gone(command_id)
        assert t.host.marked() == []
        assert t.worker == first
        await assert_serves(t)


async def test_a_worker_cannot_be_traced_and_holds_nothing_of_inits() -> None:
    async with tree() as t:
        assert os.stat(f"/proc/{t.worker}/mem").st_uid == 0
        status = dict(
            line.split(":\t") for line in Path(f"/proc/{t.worker}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["Seccomp"] == "2"
        assert status["NoNewPrivs"] == "1"
        assert descriptor_count(t.worker) == 4  # 0, 1, 2 and its socket


@contextlib.contextmanager
def hung(folder: Path) -> Iterator[None]:
    """A mounted file system that never answers: FUSE, and nobody who reads the requests."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = ["fusermount3", "--", str(folder)]
        environment = {"_FUSE_COMMFD": str(theirs.fileno()), "PATH": os.environ["PATH"]}
        os.set_inheritable(theirs.fileno(), True)
        pid = os.posix_spawnp(arguments[0], arguments, environment)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "cannot mount: install fuse3"
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        (device,) = array("i", ancillary[0][2])
    try:
        yield
    finally:
        os.close(device)
        pid = os.posix_spawnp("fusermount3", ["fusermount3", "-u", "-z", str(folder)], os.environ)
        os.waitpid(pid, 0)


async def test_a_path_that_hangs_is_given_up_with_its_worker_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The daemon's loop goes on, init serves, and the next call has a worker of its own."""
    async with tree() as t:
        (t.root / "mount").mkdir()
        with hung(t.root / "mount"):
            first = t.worker
            monkeypatch.setattr("runtimes.init.file_worker.OPERATION_DEADLINE_S", 0.3)
            with pytest.raises(init_wire.InitError, match="did not answer"):
                await t.files.stat(b"mount/file")
            monkeypatch.undo()
            async with await t.files.temp(b"file") as temp:
                await temp.commit()
            command_id, _ = await t.host.spawn("true")
            await t.host.ends.gone(command_id)
            await until(lambda: first not in t.host.file_workers(), "init killed the one that hung")


# ---- fuzz


class Peer:
    """A worker's other end, without manners."""

    def __init__(self, host: Host) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as init:
            init.connect(host.socket_path)
            init.sendall(init_wire.encode_hello(1))
            init.recv(65536)
            init.sendall(init_wire.encode_files(2))
            _, ancillary, _, _ = init.recvmsg(65536, 64)
        (descriptor,) = array("i", ancillary[0][2])
        self.socket = socket.socket(fileno=descriptor)
        self.socket.settimeout(DEADLINE_S)

    def ask(self, message: bytes, descriptors: Sequence[int] = ()) -> tuple[int, wire.FilesReply]:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([message], rights)
        data, ancillary, _, _ = self.socket.recvmsg(65536, 64)
        for _, _, received in ancillary:
            for descriptor in array("i", received):
                os.close(descriptor)
        if not data:
            raise EOFError
        return wire.decode_files_message(data)


def seeds(base: bytes, chance: random.Random) -> list[bytes]:
    flags = Flag(chance.randrange(1 << 13))
    some = Flag.READ | Flag.WRITE | Flag.CREATE | Flag.FOLLOW
    path, other = (chance.choice((b"a", b"b/c", b"b", b"d/e/f", b"link", b"a/", b"x" * 300, b"")) for _ in range(2))
    token = chance.randrange(12)
    return [
        wire.encode_open(7, chance.choice((flags, some)), base, 0o644, path),
        wire.encode_stat(7, Flag.FOLLOW, base, path),
        wire.encode_list(7, Flag.NONE, base, chance.randrange(65), 0, b"."),
        wire.encode_list(7, Flag.NONE, base, chance.randrange(65), token, path),
        wire.encode_list_next(7, token),
        wire.encode_close(7, token),
        wire.encode_make_dir(7, Flag.PARENTS, base, 0o755, path),
        wire.encode_rename(7, flags & (Flag.NO_REPLACE | Flag.EXCHANGE), base, path, other),
        wire.encode_remove(7, Flag.RECURSIVE, base, path),
        wire.encode_symlink(7, Flag.PARENTS, base, other, path),
        wire.encode_chmod(7, Flag.FOLLOW, base, 0o755, path),
        wire.encode_set_times(7, Flag.NONE, base, chance.randrange(-(2**63), 2**63), path),
        wire.encode_temp(7, Flag.PARENTS, base, 0o644, path),
        wire.encode_temp(7, Flag.FOLLOW | Flag.KEEP_MODE, base, 0o644, path),
        wire.encode_commit(7, Flag.NONE, token),
        wire.encode_watch(7),
        wire.encode_unwatch(7, token, chance.randrange(5)),
    ]


def mutated(message: bytes, protected: bytes, chance: random.Random) -> bytes:
    """With a few bytes changed, but none of the base: a fuzzer of removals has to stay where it is."""
    changed = bytearray(message)
    at_base = message.find(protected)
    for _ in range(chance.choice((0, 0, 1, 2))):
        at = chance.randrange(len(changed))
        if at_base >= 0 and at_base - 4 <= at <= at_base + len(protected):
            continue
        if chance.random() < 0.5:
            changed[at] ^= 1 << chance.randrange(8)
        else:
            del changed[max(at, at_base + len(protected) + 1) :]
    if b"/" in changed.replace(protected, b"").replace(b"b/c", b"").replace(b"d/e/f", b"").replace(b"a/", b"") or (
        b".." in changed
    ):
        return message
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
async def test_three_thousand_mutated_requests_do_no_harm(seed: int) -> None:
    """Sanitizers watch the worker, and the decoder what it says."""
    chance = random.Random(seed)
    async with tree() as t:
        base = os.fsencode(t.root)
        peer, answers = Peer(t.host), 0
        for _ in range(3000):
            message = mutated(chance.choice(seeds(base, chance)), base, chance)
            try:
                peer.ask(message, [0] * chance.choice((0, 0, 0, 1, 3)))
                answers += 1
            except (EOFError, ConnectionError):
                peer.socket.close()
                peer = Peer(t.host)
        peer.socket.close()
        assert answers > 1000
        await assert_serves(t)


@pytest.mark.parametrize("message", [b"x", bytes(8), b"FS\x01\x00" + bytes(20_000)])
async def test_a_message_without_a_header_or_end_ends_the_worker(message: bytes) -> None:
    async with running_init() as host:
        peer = Peer(host)
        with peer.socket, pytest.raises((EOFError, ConnectionError)):
            peer.ask(message)
        await until(lambda: not host.file_workers(), "it ends")
