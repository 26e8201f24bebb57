"""Our own mount table: asked for often, read when it has changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes import mounttable

CHANGING = """
import ctypes, sys
from runtimes import mounttable

libc, place = ctypes.CDLL(None, use_errno=True), sys.argv[1].encode()
READ_ONLY, REMOUNT = 1, 32
with mounttable.kept():
    before = mounttable.text()
    assert libc.mount(b"tmpfs", place, b"tmpfs", 0, None) == 0
    mounted = mounttable.text()
    assert place in mounted and place not in before
    assert mounttable.text() is mounted
    assert libc.mount(None, place, None, READ_ONLY | REMOUNT, None) == 0
    assert mounttable.text() != mounted
    assert libc.umount2(place, 0) == 0
    assert place not in mounttable.text()
"""


def test_a_kept_table_is_read_once_and_gone_with_its_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with mounttable.kept():
        first = mounttable.text()
        assert mounttable.text() is first
    again = mounttable.text()
    assert again == first
    assert again is not first
    assert os.listdir("/proc/self/fd") == before


def test_a_table_that_cannot_be_kept_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start must not fail because there is no descriptor to spare at that moment."""

    def refused() -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(mounttable, "MountTable", refused)
        with mounttable.kept():
            assert mounttable.text() is not mounttable.text()


def test_a_kept_table_says_what_was_mounted_and_unmounted_meanwhile(tmp_path: Path) -> None:
    """What is judged by it is whether something is mounted where it should be."""
    unshare = shutil.which("unshare")
    assert unshare is not None
    own = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    words = [unshare, *own, sys.executable, "-c", CHANGING, str(tmp_path)]
    subprocess.run(words, check=True, timeout=60, cwd=Path(__file__).parents[2])
