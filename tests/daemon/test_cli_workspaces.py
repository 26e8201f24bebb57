"""``sandboxctl workspace``, and how a project and other mounts are named on the command line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.sandboxctl import CTL, PATIENCE_S, Ctl, stub_daemon


@pytest.fixture(scope="module")
def ctl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    with stub_daemon(tmp_path_factory.mktemp("daemon")) as env:
        yield Ctl(env)


def created(ctl: Ctl, *words: str, **settings: Any) -> dict[str, Any]:
    done = ctl("create", "--json", *words, **settings)
    assert done.returncode == 0, done.stderr
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


@pytest.mark.parametrize(
    ("flag", "mode"), [(None, "rw"), ("--ro", "ro"), ("--overlay", "overlay"), ("--copy", "copy")]
)
def test_each_mode_has_a_flag(ctl: Ctl, tmp_path: Path, flag: str | None, mode: str) -> None:
    words = ["-w", str(tmp_path), *([] if flag is None else [flag])]
    assert created(ctl, *words)["workspace"]["mode"] == mode


@pytest.mark.parametrize("words", [("--overlay",), ("--copy",), ("--git-common", "rw")])
def test_a_flag_of_the_workspace_needs_one(ctl: Ctl, words: tuple[str, ...]) -> None:
    done = ctl("create", *words)
    assert done.returncode == 2
    assert "--workspace DIR" in done.stderr


def test_two_modes_contradict_each_other(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("create", "-w", str(tmp_path), "--ro", "--overlay").returncode == 2


def test_relative_paths_begin_where_the_caller_is_and_a_tilde_at_home(ctl: Ctl, tmp_path: Path) -> None:
    """The daemon is elsewhere: the caller's directory is the caller's to know."""
    reply = created(ctl, "-w", "~/p", "--mount", "x/../y:/data:ro", cwd=tmp_path, env={"HOME": "/home/ann"})
    assert reply["workspace"]["path"] == "/home/ann/p"
    assert [(mount["path"], mount["target"], mount["mode"]) for mount in reply["mounts"]] == [
        (str(tmp_path / "y"), "/data", "ro")
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/a:/b", ("/a", "/b", "rw")),
        ("/a:/b:rw", ("/a", "/b", "rw")),
        ("/a b:/c d:ro", ("/a b", "/c d", "ro")),
        ("type=bind,src=/a:b,dst=/c:d", ("/a:b", "/c:d", "rw")),
        ('type=bind,"source=/a,b",target=/c,readonly', ("/a,b", "/c", "ro")),
        ('"src=/a""b\nc",dst=/d,ro=true', ('/a"b\nc', "/d", "ro")),
    ],
)
def test_a_mount_can_be_written_for_any_path(ctl: Ctl, text: str, expected: tuple[str, str, str]) -> None:
    """The short form ends at colons; the long one is read as the engines read theirs."""
    (mount,) = created(ctl, "--mount", text)["mounts"]
    assert (mount["path"], mount["target"], mount["mode"]) == expected


@pytest.mark.parametrize("text", ["/a", "/a:/b:/c", ":/b", "/a:", "src=/a", "type=tmpfs,dst=/x", "src=/a,dst=/b,z"])
def test_a_mount_that_is_none_is_refused(ctl: Ctl, text: str) -> None:
    done = ctl("create", "--mount", text)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--mount" in done.stderr


def test_names_that_are_not_utf8_arrive_as_they_are(ctl: Ctl) -> None:
    """A file system takes any bytes."""
    reply = created(ctl, "-w", os.fsdecode(b"/n\xe9"))
    assert reply["workspace"]["path_bytes"] == "L27p"
    done = ctl("workspace", "apply", "box", "plain", os.fsdecode(b"n\xe9"))
    assert (done.returncode, done.stdout) == (0, "plain\nné\n")


def test_a_diff_is_a_patch_byte_for_byte_and_the_rest_is_on_stderr(ctl: Ctl) -> None:
    """``sandboxctl workspace diff box | git apply`` must see nothing else."""
    done = subprocess.run(
        [*CTL, "workspace", "diff", "box"], env=ctl.env, capture_output=True, timeout=PATIENCE_S, check=True
    )
    assert done.stdout.startswith(b"diff --git a/t b/t\n")
    assert b"+\x1b[2Jb\n" in done.stdout
    assert done.stdout.endswith(b"\xff\n")
    assert done.stderr == b"sandboxctl: d/ (added)\n"


def test_at_a_terminal_a_diff_moves_no_cursor(ctl: Ctl) -> None:
    """What a sandbox wrote could else rewrite the lines above it, or the terminal's title."""
    master, slave = pty.openpty()
    with subprocess.Popen([*CTL, "workspace", "diff", "box"], env=ctl.env, stdout=slave, stderr=slave) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                portion = os.read(master, 65536)
            except OSError:
                break
            if not portion:
                break
            shown += portion
        assert process.wait(PATIENCE_S) == 0
    os.close(master)
    assert b"\x1b" not in shown
    assert rb"+\x1b[2Jb" in shown


def test_stat_is_a_line_per_path_and_their_sum(ctl: Ctl) -> None:
    done = ctl("workspace", "diff", "--stat", "box")
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["WHAT", "LINES", "PATH"],
        ["modified", "+1", "-1", r"t\x1b[2J"],
        ["modified", "+1", "-0", "raw"],
        ["added", "-", "d/", "(added)"],
        ["3", "changed,", "+2", "-1"],
    ]


def test_json_is_one_reply_of_all_pages(ctl: Ctl) -> None:
    reply = json.loads(ctl("workspace", "diff", "--json", "box").stdout)
    assert [change["path"] for change in reply["changes"]] == ["t\x1b[2J", "raw", "d"]
    assert reply["next_offset"] is None


def test_what_stands_against_it_is_on_stderr_and_in_the_exit_code(ctl: Ctl) -> None:
    done = ctl("workspace", "apply", "--dry-run", "box", "a")
    assert (done.returncode, done.stdout) == (1, "a\n")
    assert done.stderr == "sandboxctl: clash: it was changed in the project\n"
    assert ctl("workspace", "apply", "--force", "box", "a").returncode == 0


def test_that_there_was_nothing_to_do_is_said(ctl: Ctl) -> None:
    """A path with a slip in it looked as if it had been carried back."""
    done = ctl("workspace", "apply", "box")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "sandboxctl: nothing was changed\n")
