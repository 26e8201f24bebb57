"""``sandboxctl cp``: what a user types, on real engines."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Box
from tests.engine.daemons import ENGINES, PATIENCE_S, Daemon, ended, wait_until
from tests.unit.transfers import describe

pytestmark = pytest.mark.engine

NOT_FOUND = 5
USAGE = 2
UNSUPPORTED = 4


@pytest.fixture
def shared(daemon: Daemon, engine: str, project: Path) -> Iterator[Box]:
    with daemon.box(engine, workspace={"path": str(project)}) as box:
        yield box


def copy(daemon: Daemon, *words: str | Path, cwd: str | Path = "/", code: int = 0, stdin: bytes = b"") -> bytes:
    """Run ``cp``; what it wrote to stdout, or to stderr if it is to fail."""
    done = daemon.ctl("cp", *map(str, words), cwd=cwd, stdin=stdin)
    assert done.returncode == code, done.stderr.decode()
    assert code or done.stderr == b""
    return done.stderr if code else done.stdout


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
    for path in [*root.rglob("*"), root]:
        os.utime(path, ns=(10**18 + 7, 10**18 + 7), follow_symlinks=False)


def test_a_tree_goes_in_comes_out_and_goes_on_as_it_was(
    daemon: Daemon, shared: Box, project: Path, tmp_path: Path
) -> None:
    """With -a down to the nanosecond; to another sandbox, on the other engine too, without a copy in between."""
    make_tree(tmp_path / "tree")
    box = shared["id"]
    copy(daemon, "-a", tmp_path / "tree", f"{box}:")
    assert describe(project / "tree") == describe(tmp_path / "tree")
    for path in [project / "tree", *(project / "tree").rglob("*")]:
        assert path.lstat().st_uid == project.stat().st_uid
    copy(daemon, "-a", f"{box}:tree", tmp_path / "back")
    assert describe(tmp_path / "back") == describe(tmp_path / "tree")
    for name in ENGINES:
        with daemon.box(name) as other:
            copy(daemon, "-a", f"{box}:tree", f"{other['id']}:/tmp/there")
            copy(daemon, "-a", f"{other['id']}:/tmp/there/.", tmp_path / f"from-{name}")
        assert describe(tmp_path / f"from-{name}") == describe(tmp_path / "tree")


def test_where_a_copy_lands(daemon: Daemon, shared: Box, project: Path, tmp_path: Path) -> None:
    """As docker cp has it: into a directory that is there, else under the name; SRC/. is what is in it."""
    box = shared["id"]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"f")
    (tmp_path / "a:b").write_bytes(b"colon")
    copy(daemon, "d/f", f"{box}:new", cwd=tmp_path)
    copy(daemon, "d/f", f"{box}:", cwd=tmp_path)
    copy(daemon, "./a:b", f"{box}:/workspace/", cwd=tmp_path)
    copy(daemon, "d", f"{box}:named", cwd=tmp_path)
    copy(daemon, "d", f"{box}:named", cwd=tmp_path)
    copy(daemon, "d/.", f"{box}:named/d/more", cwd=tmp_path)
    assert set(describe(project)) == {
        b"new", b"f", b"a:b", b"named", b"named/f", b"named/d", b"named/d/f", b"named/d/more", b"named/d/more/f"
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    copy(daemon, f"{box}:named/d", "out", cwd=tmp_path)
    copy(daemon, f"{box}:named/d/.", "out", cwd=tmp_path)
    copy(daemon, f"{box}:new", "out/", cwd=tmp_path)
    copy(daemon, f"{box}:new", "out/renamed", cwd=tmp_path)
    assert set(describe(tmp_path / "out")) == {
        b"d", b"d/f", b"d/more", b"d/more/f", b"f", b"more", b"more/f", b"new", b"renamed"
    }  # fmt: skip
    for words in (["d", f"{box}:new"], ["d/f", f"{box}:no/such"], ["d/f", f"{box}:no/"], ["no", f"{box}:"]):
        assert b"cannot copy" in copy(daemon, *words, cwd=tmp_path, code=1)
    assert b"hint: sandboxctl exec" in copy(daemon, "d/f", f"{box}:no/such", cwd=tmp_path, code=1)
    assert b"no such file" in copy(daemon, f"{box}:no", ".", cwd=tmp_path, code=1)
    copy(daemon, "d/f", "no-such-box:", cwd=tmp_path, code=NOT_FOUND)
    copy(daemon, "d/f", "e", cwd=tmp_path, code=USAGE)


def test_links_are_links_unless_they_are_to_be_followed(
    daemon: Daemon, shared: Box, project: Path, tmp_path: Path
) -> None:
    box = shared["id"]
    (project / "file").write_bytes(b"content")
    (project / "link").symlink_to("file")
    copy(daemon, f"{box}:link", tmp_path / "as-link")
    copy(daemon, "-L", f"{box}:link", tmp_path / "as-file")
    assert os.readlink(tmp_path / "as-link") == "file"
    assert (tmp_path / "as-file").read_bytes() == b"content"
    copy(daemon, tmp_path / "as-link", f"{box}:back")
    assert os.readlink(project / "back") == "file"
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "chosen").symlink_to("target")
    copy(daemon, f"{box}:file", tmp_path / "chosen")
    assert (tmp_path / "target").read_bytes() == b"content", "a link that the caller names is followed"


def test_archives_on_stdin_and_stdout(daemon: Daemon, shared: Box, project: Path) -> None:
    box = shared["id"]
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        info = tarfile.TarInfo("a/b")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"bytes"))
    copy(daemon, "-", f"{box}:in", stdin=made.getvalue())
    assert (project / "in/a/b").read_bytes() == b"bytes"
    data = copy(daemon, f"{box}:in", "-")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["in", "in/a", "in/a/b"]
    assert b"no tar archive" in copy(daemon, "-", f"{box}:in", stdin=b"x" * 10_000, code=USAGE)


def test_what_cannot_be_copied_is_told_of_and_the_rest_is_copied(
    daemon: Daemon, shared: Box, project: Path, tmp_path: Path
) -> None:
    box = shared["id"]
    (project / "tree").mkdir()
    (project / "tree/file").write_bytes(b"x")
    os.mkfifo(project / "tree/fifo")
    said = copy(daemon, f"{box}:tree", tmp_path / "out", code=1)
    assert said == b"sandboxctl: skipped './fifo': it is a FIFO\n"
    assert os.listdir(tmp_path / "out") == ["file"]
    os.mkfifo(tmp_path / "out/mine")
    done = daemon.ctl("cp", "--json", str(tmp_path / "out"), f"{box}:again")
    assert (done.returncode, b'"reason": "it is a FIFO"' in done.stdout) == (1, True)
    for path, code in {"/dev/zero": 1, "/proc/self/environ": 1, "/proc/version": UNSUPPORTED, "tree/fifo": 1}.items():
        copy(daemon, f"{box}:{path}", tmp_path / "never", code=code)
        assert not (tmp_path / "never").exists()
    copy(daemon, "/dev/zero", f"{box}:never", code=1)
    with open(project / "sparse", "wb") as file:
        file.truncate(2**40)
    copy(daemon, f"{box}:sparse", tmp_path / "sparse")
    assert (tmp_path / "sparse").stat().st_blocks * 512 < 2**20


def test_an_interrupted_copy_leaves_nothing_under_its_name(
    daemon: Daemon, shared: Box, project: Path, tmp_path: Path
) -> None:
    """Both ways, and the daemon holds nothing afterwards."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    words = daemon.ctl_argv("cp", str(fifo), f"{shared['id']}:half")
    with ended(subprocess.Popen(words, env=daemon.env)) as process, open_for_a_reader(fifo) as pipe:
        pipe.write(b"begun" * 1000)
        wait_until(lambda: holds(daemon, fifo), "the copy runs")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
    wait_until(lambda: not holds(daemon, fifo), "the daemon lets go")
    assert os.listdir(project) == []


def open_for_a_reader(fifo: Path) -> io.FileIO:
    """The end of a FIFO to write to, as soon as somebody reads."""

    def opened() -> int | None:
        with contextlib.suppress(OSError):
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        return None

    return io.FileIO(wait_until(opened, "somebody reads it"), "wb")


def holds(daemon: Daemon, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(number.readlink() == path for number in Path(f"/proc/{daemon.pid}/fd").iterdir())
    return False


def test_many_small_files(daemon: Daemon, shared: Box, project: Path, tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"many/{folder}").mkdir(parents=True)
        for number in range(100):
            (tmp_path / f"many/{folder}/{number}").write_bytes(b"%d" % number)
    result = daemon.ctl_json("cp", str(tmp_path / "many"), f"{shared['id']}:many")
    assert (result["entries"], result["skipped_count"]) == (2021, 0)
    copy(daemon, f"{shared['id']}:many", tmp_path / "back")
    assert describe(tmp_path / "back").keys() == describe(tmp_path / "many").keys()
    assert (tmp_path / "back/7/42").read_bytes() == b"42"
