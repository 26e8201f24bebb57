"""``sandboxctl cp`` as it is typed: a real server, a real file worker, and directories that stand for sandboxes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.sandboxctl import CTL, PATIENCE_S, ROOT, environment
from tests.unit.transfers import describe, eventually

NOT_FOUND = 5
USAGE = 2
UNSUPPORTED = 4
INTERRUPTED = 130


class Server:
    """The server, its two sandboxes, and ``cp``."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], env: dict[str, str]) -> None:
        self.box = directory / "box"
        self.other = directory / "other"
        self.process = process
        self.env = env

    def cp(self, *words: str | Path, cwd: Path, code: int = 0, stdin: bytes = b"") -> bytes:
        """What it wrote to stdout, or to stderr if it is to fail."""
        argv = [*CTL, "cp", *map(os.fspath, words)]
        done = subprocess.run(
            argv, env=self.env, cwd=cwd, input=stdin, capture_output=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == code, done.stderr.decode()
        assert code or done.stderr == b""
        return done.stderr if code else done.stdout

    def holds(self, path: Path) -> bool:
        """Whether it has a file of this name open."""
        with contextlib.suppress(FileNotFoundError):
            for number in Path(f"/proc/{self.process.pid}/fd").iterdir():
                if number.readlink() == path:
                    return True
        return False


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In the end it must have ended well: nothing is left open in it, nor a worker running."""
    directory = tmp_path_factory.mktemp("server")
    for name in ("box", "other"):
        (directory / name).mkdir()
    env = environment(directory)
    argv = [sys.executable, "-m", "tests.daemon.file_server", directory / "box", directory / "other"]
    with subprocess.Popen(argv, env=env, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield Server(directory, process, env)
        finally:
            process.terminate()
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """With nothing in its sandboxes."""
    yield running_server
    for sandbox in (running_server.box, running_server.other):
        shutil.rmtree(sandbox)
        sandbox.mkdir()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where the caller is."""
    return tmp_path


def make_tree(root: Path) -> None:
    (root / "empty").mkdir(parents=True)
    (root / "file").write_bytes(os.urandom(2_000_000))
    (root / "program").write_bytes(b"#!")
    (root / "program").chmod(0o755)
    (root / "link").symlink_to("file")
    (root / os.fsdecode(b"line\nfeed \xff")).mkdir()
    (root / os.fsdecode(b"line\nfeed \xff") / "below").write_bytes(b"below")
    (root / "shut").mkdir()
    (root / "shut/in").touch()
    (root / "shut").chmod(0o555)
    os.link(root / "program", root / "second")
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(10**18 + 7, 10**18 + 7), follow_symlinks=False)


def test_a_tree_goes_in_goes_on_and_comes_out_as_it_was(server: Server, here: Path) -> None:
    """With -a down to the nanosecond."""
    make_tree(here / "tree")
    server.cp("-a", "tree", "box:", cwd=here)
    assert describe(server.box / "tree") == describe(here / "tree")
    server.cp("-a", "box:tree", "other:there", cwd=here)
    assert describe(server.other / "there") == describe(here / "tree")
    server.cp("-a", "other:there/.", "back", cwd=here)
    assert describe(here / "back") == describe(here / "tree")
    os.link(server.box / "tree/program", server.box / "tree/third")
    server.cp("box:tree", "linked", cwd=here)
    assert (here / "linked/program").samefile(here / "linked/third"), "two names of one file stay that"


def test_without_archive_times_are_new_and_modes_obey_the_umask(server: Server, here: Path) -> None:
    (server.box / "tree").mkdir(mode=0o777)
    (server.box / "tree").chmod(0o777)
    (server.box / "tree/file").write_bytes(b"x")
    (server.box / "tree/file").chmod(0o6777)
    os.utime(server.box / "tree/file", ns=(1, 1))
    old = os.umask(0o027)
    try:
        server.cp("box:tree", "tree", cwd=here)
        server.cp("box:tree/file", "file", cwd=here)
        server.cp("-a", "box:tree/file", "exact", cwd=here)
    finally:
        os.umask(old)
    for name in ("tree", "tree/file", "file"):
        assert (here / name).stat().st_mode & 0o7777 == 0o750
        assert (here / name).stat().st_mtime_ns > 1
    status = (here / "exact").stat()
    assert (status.st_mode & 0o7777, status.st_mtime_ns) == (0o777, 1), "but nobody gets setuid bits"


def test_where_a_copy_lands(server: Server, here: Path) -> None:
    """As docker cp has it: into a directory that is there, else under the name; SRC/. is what is in it."""
    (here / "d").mkdir()
    (here / "d/f").write_bytes(b"f")
    (here / "a:b").write_bytes(b"colon")
    server.cp("d/f", "box:new", cwd=here)
    server.cp("d/f", "box:", cwd=here)
    server.cp("./a:b", "box:./", cwd=here)
    server.cp("d", "box:named", cwd=here)
    server.cp("d", "box:named", cwd=here)
    server.cp("d/.", "box:named/d/more", cwd=here)
    inside = {
        b"new",
        b"f",
        b"a:b",
        b"named",
        b"named/f",
        b"named/d",
        b"named/d/f",
        b"named/d/more",
        b"named/d/more/f",
    }
    assert set(describe(server.box)) == inside
    (here / "out").mkdir()
    server.cp("box:named/d", "out", cwd=here)
    server.cp("box:named/d/.", "out", cwd=here)
    server.cp("box:new", "out/", cwd=here)
    server.cp("box:new", "out/renamed", cwd=here)
    outside = {b"d", b"d/f", b"d/more", b"d/more/f", b"f", b"more", b"more/f", b"new", b"renamed"}
    assert set(describe(here / "out")) == outside


def test_what_cannot_be_copied_says_why(server: Server, here: Path) -> None:
    (here / "d").mkdir()
    (here / "f").touch()
    (server.box / "file").touch()
    assert b"is a directory" in server.cp("d", "box:file", cwd=here, code=1)
    assert b"hint: sandboxctl exec box mkdir -p no" in server.cp("f", "box:no/such", cwd=here, code=1)
    assert b"hint: mkdir -p no" in server.cp("box:file", "no/such", cwd=here, code=1)
    assert b"no such directory" in server.cp("f", "box:no/", cwd=here, code=1)
    assert b"No such file" in server.cp("missing", "box:", cwd=here, code=1)
    assert b"no such file" in server.cp("box:missing", ".", cwd=here, code=1)
    assert b"cannot find a sandbox" in server.cp("f", "elsewhere:", cwd=here, code=NOT_FOUND)
    assert b"neither SRC nor DST" in server.cp("f", "g", cwd=here, code=USAGE)
    assert b"--json does not go" in server.cp("--json", "box:file", "-", cwd=here, code=USAGE)
    assert b"more than 0 bytes" in server.cp("--bytes-max", "0", "-", "box:", cwd=here, stdin=tar_of(f=b"x"), code=1)
    assert b"no room" not in server.cp("/dev/full", "box:full", cwd=here, code=1)
    assert os.listdir(server.box) == ["file"]


def test_links_are_links_unless_they_are_to_be_followed(server: Server, here: Path) -> None:
    (server.box / "file").write_bytes(b"content")
    (server.box / "link").symlink_to("file")
    server.cp("box:link", "as-link", cwd=here)
    server.cp("-L", "box:link", "as-file", cwd=here)
    assert os.readlink(here / "as-link") == "file"
    assert (here / "as-file").read_bytes() == b"content"
    server.cp("as-link", "box:back", cwd=here)
    assert os.readlink(server.box / "back") == "file"
    (here / "target").write_bytes(b"old")
    (here / "chosen").symlink_to("target")
    server.cp("box:file", "chosen", cwd=here)
    assert (here / "target").read_bytes() == b"content", "a link that the caller names is followed"
    os.mkfifo(here / "fifo")
    server.cp("box:file", "fifo", cwd=here, code=1)
    assert (here / "fifo").is_fifo(), "what is no file is not replaced by one"


def tar_of(**files: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def test_archives_on_stdin_and_stdout(server: Server, here: Path) -> None:
    server.cp("-", "box:in", cwd=here, stdin=tar_of(b=b"bytes"))
    assert (server.box / "in/b").read_bytes() == b"bytes"
    with tarfile.open(fileobj=io.BytesIO(server.cp("box:in", "-", cwd=here))) as tar:
        assert tar.getnames() == ["in", "in/b"]
    assert b"no tar archive" in server.cp("-", "box:in", cwd=here, stdin=b"x" * 10_000, code=USAGE)
    assert b"files write SANDBOX PATH" in server.cp("-", "box:in", cwd=here, stdin=b"hi\n", code=USAGE)
    with open(here / "archive", "wb") as archive:
        archive.write(b"before")
    with open(here / "archive", "ab") as archive:
        subprocess.run([*CTL, "cp", "box:in", "-"], env=server.env, stdout=archive, check=True)
    data = (here / "archive").read_bytes()
    assert data[:6] == b"before"
    with tarfile.open(fileobj=io.BytesIO(data[6:])) as tar:
        assert tar.getnames() == ["in", "in/b"]


def test_what_is_no_file_is_skipped_and_told_of(server: Server, here: Path) -> None:
    (server.box / "tree").mkdir()
    (server.box / "tree/file").write_bytes(b"x")
    os.mkfifo(server.box / "tree/fifo")
    said = server.cp("box:tree", "out", cwd=here, code=1)
    assert said == b"sandboxctl: skipped './fifo': it is a FIFO\n"
    assert os.listdir(here / "out") == ["file"]
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.fspath(here / "out/socket"))
    listening.close()
    said = server.cp("out", "box:again", cwd=here, code=1)
    assert said == b"sandboxctl: skipped './socket': it is a socket\n"
    for path, code in {"/dev/zero": 1, "/proc/self/environ": UNSUPPORTED, "tree/fifo": 1}.items():
        server.cp(f"box:{path}", "never", cwd=here, code=code)
        assert not (here / "never").exists()


def test_json_is_what_was_moved(server: Server, here: Path) -> None:
    (here / "d").mkdir()
    (here / "d/f").write_bytes(b"12345")
    said = server.cp("--json", "d", "box:d", cwd=here)
    assert b'"entries": 2' in said
    assert b'"bytes": 5' in said


def test_holes_stay_holes(server: Server, here: Path) -> None:
    (here / "sparse").touch()
    os.truncate(here / "sparse", 2**40)
    server.cp("sparse", "box:", cwd=here)
    server.cp("box:sparse", "back", cwd=here)
    status = (here / "back").stat()
    assert (status.st_size, status.st_blocks * 512 < 2**20) == (2**40, True)


def test_an_interrupted_copy_leaves_nothing_under_its_name(server: Server, here: Path) -> None:
    """And the daemon holds nothing of it."""
    os.mkfifo(here / "fifo")
    argv = [*CTL, "cp", "fifo", "box:half"]
    with subprocess.Popen(argv, env=server.env, cwd=here) as process, open(here / "fifo", "wb") as pipe:
        pipe.write(b"begun" * 1000)
        pipe.flush()
        eventually(lambda: server.holds(here / "fifo"), "the copy runs")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == INTERRUPTED
    eventually(lambda: not server.holds(here / "fifo"), "the daemon lets go")
    assert os.listdir(server.box) == []


def test_an_archive_of_a_hostile_sandbox_stays_where_it_is_unpacked(server: Server, here: Path) -> None:
    """A link in the way on the host, put there by nobody that the caller trusts, is not written through."""
    (server.box / "tree/sub").mkdir(parents=True)
    (server.box / "tree/sub/file").write_bytes(b"x")
    (server.box / "tree/other").write_bytes(b"x")
    (here / "victim").mkdir()
    (here / "out").mkdir()
    (here / "out/sub").symlink_to(here / "victim")
    (here / "out/other").symlink_to(here / "victim/other")
    said = server.cp("box:tree/.", "out", cwd=here, code=1)
    assert b"skipped './sub/'" in said
    assert os.listdir(here / "victim") == []
    assert (here / "out/other").read_bytes() == b"x"
    assert not (here / "out/other").is_symlink()
