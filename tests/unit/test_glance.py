"""What is in the kernel's memory is opened without waiting, and of everything else nothing is said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes import glance


@pytest.fixture
def base_fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def seen_at(base_fd: int, path: str) -> glance.Seen | None:
    # Whoever mounts or renames anything on this host meanwhile makes the kernel say that it cannot tell.
    descriptor = next((fd for _ in range(1000) if (fd := glance.open_below(base_fd, path)) is not None), None)
    assert descriptor is not None
    try:
        return glance.look(descriptor)
    finally:
        os.close(descriptor)


def test_what_was_used_a_moment_ago_is_opened_and_known(tmp_path: Path, base_fd: int) -> None:
    """Owner, type and identity are what a project is judged by: they must be those that a long look tells."""
    (tmp_path / "project").mkdir()
    (tmp_path / "link").symlink_to("project")
    (tmp_path / "file").write_text("x")
    os.chown(tmp_path / "file", os.getuid(), os.getgid())
    for name in ("project", "link", "file"):
        status = os.stat(tmp_path / name)
        seen = seen_at(base_fd, name)
        assert seen == (status.st_uid, status.st_gid, status.st_mode, status.st_ino, status.st_dev)
        assert seen.is_directory is (name != "file")


def test_what_was_never_looked_up_is_waited_for_by_others(tmp_path: Path, base_fd: int) -> None:
    """The name would have to be read from the disk, or asked of a server, and either may take for ever."""
    assert glance.open_below(base_fd, "never-looked-up") is None
    (tmp_path / "project").mkdir()
    assert glance.open_below(base_fd, "project/never-looked-up") is None


def test_no_other_mount_is_crossed_into(base_fd: int) -> None:
    """At the root of a server's file system the server is asked, whatever is in memory."""
    root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        os.stat("/proc/version")
        assert glance.open_below(root_fd, "proc") is None
        assert glance.open_below(root_fd, "proc/version") is None
        assert glance.open_below(base_fd, "/proc/version") is None
    finally:
        os.close(root_fd)


def test_a_file_is_no_directory(tmp_path: Path, base_fd: int) -> None:
    (tmp_path / "file").write_text("x")
    assert glance.open_below(base_fd, "file", flags=os.O_DIRECTORY) is None


def test_a_kernel_that_cannot_be_asked_so_says_nothing(
    tmp_path: Path, base_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(glance, "_SYS_OPENAT2", 0xFFFF)
    assert glance.open_base(str(tmp_path)) is None
    assert glance.open_below(base_fd, "project") is None
