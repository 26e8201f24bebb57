"""Which repository a git worktree belongs to, and when what a project says of itself is not believed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandboxd.gitworktree import Untrusted, common_directory, says_worktree

GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]


@pytest.fixture
def worktree(tmp_path: Path) -> Path:
    """A worktree of a repository beside it, made by git."""
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
    for words in (
        ["init", "-q", "repository"],
        ["-C", "repository", "commit", "-q", "--allow-empty", "-m", "first"],
        ["-C", "repository", "worktree", "add", "-q", "-b", "other", "../work tree"],
    ):
        subprocess.run([*GIT, *words], check=True, env=env, cwd=tmp_path)
    return tmp_path / "work tree"


def found(project: Path) -> str | None:
    descriptor = os.open(project, os.O_PATH | os.O_DIRECTORY)
    try:
        return common_directory(descriptor, str(project))
    finally:
        os.close(descriptor)


def test_a_worktree_leads_to_its_repository(worktree: Path) -> None:
    assert found(worktree) == str(worktree.parent / "repository" / ".git")


def test_only_what_says_that_it_is_a_worktree_is_looked_into(worktree: Path, tmp_path: Path) -> None:
    """Every claim asks; what comes after costs it more."""
    for directory, says in ((worktree, True), (worktree.parent / "repository", False), (tmp_path, False)):
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        assert says_worktree(descriptor) is says
        os.close(descriptor)


def test_a_relative_pointer_is_followed_from_the_project(worktree: Path) -> None:
    """As newer versions of git write it on demand."""
    name = os.path.basename((worktree / ".git").read_text().rstrip("\n"))
    (worktree / ".git").write_text(f"gitdir: ../repository/.git/worktrees/{name}\n")
    assert found(worktree) == str(worktree.parent / "repository" / ".git")


def test_a_repository_of_its_own_and_no_repository_lead_nowhere(worktree: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert found(worktree.parent / "repository") is None
    assert found(plain) is None


def test_a_pointer_that_the_repository_does_not_know_is_not_believed(worktree: Path, tmp_path: Path) -> None:
    """A sandbox that ran in the project before may have written it, to have a secret shown to the next one."""
    forged = tmp_path / "forged"
    forged.mkdir()
    (forged / ".git").write_bytes((worktree / ".git").read_bytes())
    with pytest.raises(Untrusted, match="another place"):
        found(forged)


def test_a_repository_that_the_project_brings_along_is_not_believed(tmp_path: Path) -> None:
    """All that would be needed lies in the project; where it leads does not."""
    (tmp_path / "secret").mkdir()
    project = tmp_path / "project"
    (project / "admin").mkdir(parents=True)
    (project / ".git").write_text(f"gitdir: {project}/admin\n")
    (project / "admin" / "commondir").write_text("../../secret\n")
    (project / "admin" / "gitdir").write_text(f"{project}/.git\n")
    with pytest.raises(Untrusted):
        found(project)


@pytest.mark.parametrize("kind", ["pipe", "symlink", "huge", "nul"])
def test_a_pointer_that_is_no_small_file_is_none(tmp_path: Path, kind: str) -> None:
    """Reading a pipe would wait for ever."""
    pointer = tmp_path / ".git"
    match kind:
        case "pipe":
            os.mkfifo(pointer)
        case "symlink":
            pointer.symlink_to("/etc/passwd")
        case "huge":
            pointer.write_text("gitdir: /\n" * 100_000)
        case "nul":
            pointer.write_text("gitdir: /a\0b\n")
    assert found(tmp_path) is None


@given(pointer=st.binary(max_size=300) | st.binary(max_size=300).map(lambda path: b"gitdir: " + path + b"\n"))
@example(pointer=b"gitdir: " + b"a/" * 4000)
@example(pointer=b"gitdir: /proc/self/fd/0\n")
def test_whatever_a_project_claims_to_be_is_no_more_than_refused(pointer: bytes) -> None:
    """The file is in a project, and may be a sandbox's work."""
    with tempfile.TemporaryDirectory() as project:
        Path(project, ".git").write_bytes(pointer)
        with contextlib.suppress(Untrusted):
            assert found(Path(project)) is None
