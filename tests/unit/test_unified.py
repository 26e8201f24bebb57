"""Unified diffs: what others' programs make of them is the file again."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandboxd import unified
from sandboxd.unified import REGULAR, SYMLINK, FileVersion, blocks, file_patch

LINE = st.sampled_from([b"", b"a", b"b", b"c", b"{", b"}", b"-x", b"+x", b"\\ No newline", b"\xff\r", b"@@ -1 +1 @@"])
TEXT = st.builds(
    lambda lines, end: b"\n".join(lines) + (b"\n" if end else b""), st.lists(LINE, max_size=14), st.booleans()
)
NAME = st.sampled_from(["plain", "two words", 'qu"ote', "tab\there", "new\nline", "é", "back\\slash", "-dash", "d/e"])
GIT_ENV = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}


def _git_apply(directory: str, patch: bytes) -> None:
    done = subprocess.run(
        ["git", "apply", "-p1", "--whitespace=nowarn", "-"],
        input=patch,
        cwd=directory,
        env=GIT_ENV,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, (done.stderr, patch)


def _file(data: bytes | None, mode: int = REGULAR | 0o644) -> FileVersion | None:
    return None if data is None else FileVersion(mode, data)


@settings(max_examples=60, deadline=None)
@given(NAME, st.none() | TEXT, st.none() | TEXT)
@example("plain", b"", None)
@example("plain", None, b"")
@example("plain", b"a", b"a\n")
def test_git_makes_the_new_file_of_the_old_one(name: str, old: bytes | None, new: bytes | None) -> None:
    """Whatever the lines are, also those that look like a patch themselves, and whatever the name is."""
    if old == new:
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, name)
        path.parent.mkdir(exist_ok=True)
        if old is not None:
            path.write_bytes(old)
        _git_apply(directory, file_patch(os.fsencode(name), _file(old), _file(new)).text)
        assert (path.read_bytes() if path.exists() else None) == new


@settings(max_examples=40, deadline=None)
@given(TEXT.filter(bool), TEXT.filter(bool))
def test_patch_makes_the_new_file_of_the_old_one(old: bytes, new: bytes) -> None:
    """Not everybody has git."""
    if old == new:
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "two words")
        path.write_bytes(old)
        text = file_patch(b"two words", _file(old), _file(new)).text
        done = subprocess.run(
            ["patch", "-p1", "--binary", "--fuzz=0"], input=text, cwd=directory, capture_output=True, check=False
        )
        assert done.returncode == 0, (done.stdout, done.stderr, text)
        assert path.read_bytes() == new


@settings(max_examples=200, deadline=None)
@given(st.lists(LINE, max_size=30), st.lists(LINE, max_size=30), st.sampled_from([0, 5, 50, unified.STEPS_MAX]))
def test_what_is_not_in_a_block_is_the_same_on_both_sides(old: list[bytes], new: list[bytes], steps_max: int) -> None:
    """However little work may be done."""
    rebuilt: list[bytes] = []
    old_at = new_at = 0
    for block in blocks(old, new, steps_max=steps_max):
        assert old[old_at : block.old_start] == new[new_at : block.new_start]
        assert block.old_end > block.old_start or block.new_end > block.new_start
        rebuilt += old[old_at : block.old_start] + new[block.new_start : block.new_end]
        old_at, new_at = block.old_end, block.new_end
    assert rebuilt + old[old_at:] == new


@settings(max_examples=100, deadline=None)
@given(st.lists(LINE, max_size=12), st.lists(LINE, max_size=12))
def test_texts_that_differ_in_one_line_have_one_small_block(before: list[bytes], after: list[bytes]) -> None:
    """A diff that tells everything anew would be true, and useless."""
    (block,) = blocks([*before, *after], [*before, b"only here", *after])
    assert (block.old_end - block.old_start, block.new_end - block.new_start) == (0, 1)


def test_hostile_texts_cost_no_more_than_allowed() -> None:
    """Two thousand lines that are all alike but for their order would keep a quadratic search busy for minutes."""
    old = [b"%d" % (number * 7919 % 13) for number in range(20_000)]
    new = [b"%d" % (number * 104_729 % 11) for number in range(20_000)]
    found = blocks(old, new)
    assert found
    assert found[-1].new_end <= len(new)


@pytest.mark.parametrize("data", [b"a\0b", b"\0"])
def test_what_has_a_nul_is_no_text(data: bytes) -> None:
    assert not unified.is_text(data)
    assert unified.is_text(data.replace(b"\0", b"\xff"))


def test_symlinks_modes_and_renames_are_told_as_git_tells_them(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "script").write_bytes(b"x\n")
    (tmp_path / "from").write_bytes(b"same\n")
    (tmp_path / "becomes-link").write_bytes(b"was a file\n")
    (tmp_path / "binary").write_bytes(b"\0")
    text = file_patch(b"link", FileVersion(SYMLINK, b"old"), FileVersion(SYMLINK, b"new")).text
    text += file_patch(b"script", FileVersion(REGULAR | 0o644, b"x\n"), FileVersion(REGULAR | 0o755, b"x\n")).text
    same = FileVersion(REGULAR | 0o644, b"same\n")
    text += file_patch(b"to", same, same, old_path=b"from").text
    text += file_patch(b"becomes-link", FileVersion(REGULAR | 0o644, b"was a file\n"), None).text
    text += file_patch(b"becomes-link", None, FileVersion(SYMLINK, b"there")).text
    _git_apply(str(tmp_path), text)
    assert os.readlink(tmp_path / "link") == "new"
    assert os.access(tmp_path / "script", os.X_OK)
    assert (tmp_path / "to").read_bytes() == b"same\n"
    assert not (tmp_path / "from").exists()
    assert os.readlink(tmp_path / "becomes-link") == "there"


def test_a_binary_is_summed_up() -> None:
    patch = file_patch(b"b", FileVersion(REGULAR | 0o644, None), FileVersion(REGULAR | 0o644, None))
    assert patch == (b"diff --git a/b b/b\nBinary files a/b and b/b differ\n", 0, 0)
