"""``sandboxctl files`` against a real file worker on this host."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.files_daemon import SANDBOX, FilesDaemon, files_daemon
from tests.daemon.sandboxctl import CTL, PATIENCE_S, Ctl, environment

ODD = b"odd\xff\n\x1b[2J"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FilesDaemon]:
    with files_daemon(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def ctl(daemon: FilesDaemon, tmp_path: Path) -> Ctl:
    return Ctl({**environment(tmp_path), "SANDBOXD_SOCKET": daemon.socket})


def raw(ctl: Ctl, *words: str | bytes, data: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    argv = [*CTL, "files", *words]
    return subprocess.run(argv, input=data, capture_output=True, env=ctl.env, timeout=PATIENCE_S, check=False)


def test_what_comes_from_stdin_is_written_and_comes_back_as_it_was(ctl: Ctl, daemon: FilesDaemon) -> None:
    """From a pipe and from a file, however large."""
    data = os.urandom(3 * 1024 * 1024)
    assert raw(ctl, "write", SANDBOX, "new/file", "--mode", "600", data=data).stdout == b""
    assert (daemon.root / "new/file").read_bytes() == data
    assert (daemon.root / "new/file").stat().st_mode & 0o777 == 0o600
    assert raw(ctl, "cat", SANDBOX, "new/file").stdout == data
    with open(daemon.root / "new/file", "rb") as file:
        info = json.loads(ctl("files", "write", SANDBOX, "copy", "--json", stdin=file).stdout)
    assert (info["path"], info["size_bytes"]) == (f"{daemon.root}/copy", len(data))
    assert (daemon.root / "copy").read_bytes() == data


def test_a_listing_is_a_table_that_no_name_can_break(ctl: Ctl, daemon: FilesDaemon) -> None:
    """Nor can it send anything to the terminal; as JSON it is what the daemon said."""
    (daemon.root / "dir/below").mkdir(parents=True)
    os.close(os.open(os.fsencode(daemon.root) + b"/dir/" + ODD, os.O_CREAT | os.O_WRONLY, 0o640))
    (daemon.root / "dir/link").symlink_to("below")
    listed = ctl("files", "ls", SANDBOX, "dir")
    owner = f"{os.getuid()}:{os.getgid()}"
    assert [line.split(maxsplit=3) for line in listed.stdout.splitlines()] == [
        ["MODE", "OWNER", "SIZE", "AGE   PATH"],
        ["drwxr-xr-x", owner, "-", "now   below"],
        ["lrwxrwxrwx", owner, "-", "now   link -> below"],
        ["-rw-r-----", owner, "0", "B    now   'odd\\\\xff\\n\\x1b[2J'"],
    ]
    reply = json.loads(ctl("files", "ls", SANDBOX, "--depth", "2", "--json").stdout)
    assert [entry["path"] for entry in reply["entries"]][:2] == ["dir", "dir/below"]
    assert (reply["path"], reply["truncated"]) == (str(daemon.root), False)


def test_names_are_made_changed_and_removed(ctl: Ctl, daemon: FilesDaemon) -> None:
    """By words that everybody knows; what is done as asked is done in silence."""
    for words in (
        ["mkdir", "-p", SANDBOX, "a/b"],
        ["mv", SANDBOX, "a", "z"],
        ["rm", "-r", SANDBOX, "z"],
        ["rm", "-f", SANDBOX, "z"],
    ):
        done = ctl("files", *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(daemon.root.iterdir()) == []
    assert json.loads(ctl("files", "mkdir", SANDBOX, "a", "--json").stdout) == {"created": True}
    assert json.loads(ctl("files", "stat", SANDBOX, "a", "--json").stdout)["type"] == "dir"
    assert "drwxr-xr-x" in ctl("files", "stat", SANDBOX, "a").stdout


def test_a_name_that_is_not_utf8_can_be_typed(ctl: Ctl, daemon: FilesDaemon) -> None:
    """It reaches the sandbox as it is."""
    assert raw(ctl, "write", SANDBOX, ODD, data=b"x").returncode == 0
    assert os.listdir(os.fsencode(daemon.root)) == [ODD]
    assert raw(ctl, "mv", SANDBOX, ODD, ODD + b"2").returncode == 0
    assert raw(ctl, "cat", SANDBOX, ODD + b"2").stdout == b"x"
    assert raw(ctl, "rm", SANDBOX, ODD + b"2").returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["cat", SANDBOX, "none"], 5, "cannot use 'none' in the sandbox: ENOENT: No such file or directory"),
        (["cat", SANDBOX, "."], 2, "EISDIR"),
        (["mkdir", SANDBOX, "full"], 1, "EEXIST"),
        (["mkdir", SANDBOX, "none/below"], 5, "ENOENT"),
        (["rm", SANDBOX, "full"], 1, "ENOTEMPTY"),
        (["mv", "-n", SANDBOX, "full/file", "full"], 1, "EEXIST"),
        (["ls", "other"], 5, "no such sandbox"),
        (["write", SANDBOX, "file", "--mode", "9"], 2, "'9' is no mode"),
        (["rename", SANDBOX, "a", "b"], 2, "invalid choice"),
    ],
)
def test_what_cannot_be_done_is_told_with_an_exit_code(
    ctl: Ctl, daemon: FilesDaemon, words: list[str], code: int, said: str
) -> None:
    """In one line that says why."""
    (daemon.root / "full").mkdir()
    (daemon.root / "full/file").touch()
    done = ctl("files", *words)
    assert said in done.stderr
    assert (done.returncode, done.stdout) == (code, "")


@contextlib.contextmanager
def watching(ctl: Ctl, folder: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """A watch that stands: it has told of a file that comes and goes, and no longer does."""
    with ctl.start("files", "watch", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        patience = threading.Timer(PATIENCE_S, watch.kill)
        patience.start()
        stands = threading.Event()

        def come_and_go() -> None:
            while not stands.wait(0.01):
                (folder / "sign").touch()
                (folder / "sign").unlink()

        signs = threading.Thread(target=come_and_go)
        signs.start()
        try:
            line_with(watch, "sign")
            stands.set()
            signs.join()
            yield watch
        finally:
            stands.set()
            signs.join()
            patience.cancel()
            watch.kill()


def line_with(watch: "subprocess.Popen[str]", word: str) -> str:
    """The next line that has it."""
    assert watch.stdout is not None
    for line in watch.stdout:
        if word in line:
            return line
    raise AssertionError(f"it ended before it told of {word}")


def test_changes_are_printed_as_they_happen_until_interrupted(ctl: Ctl, daemon: FilesDaemon) -> None:
    """One line each, at once, also where nobody watches."""
    with watching(ctl, daemon.root, "-r", SANDBOX) as watch:
        (daemon.root / "dir").mkdir()
        assert line_with(watch, "dir") == "created      dir\n"
        os.rename(daemon.root / "dir", daemon.root / "new\n")
        assert line_with(watch, "dir") == "renamed      dir -> 'new\\n'\n"
        watch.send_signal(signal.SIGINT)
        assert watch.wait(PATIENCE_S) == 130


def test_a_watch_as_json_ends_with_what_it_watches(ctl: Ctl, daemon: FilesDaemon) -> None:
    """A line is a change as the protocol has it."""
    (daemon.root / "dir").mkdir()
    with watching(ctl, daemon.root / "dir", SANDBOX, "dir", "--json") as watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        os.rmdir(daemon.root / "dir")
        last = json.loads(watch.stdout.readlines()[-1])
        assert (last["kind"], last["path"]) == ("removed", "")
        assert watch.wait(PATIENCE_S) == 0
        assert watch.stderr.read() == "sandboxctl: dir is gone\n"
