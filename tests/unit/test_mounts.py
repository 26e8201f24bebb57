"""What the kernel is found to be able to do with mounts."""

from __future__ import annotations

import pytest

from runtimes import mounts


def test_a_kernel_without_the_new_mount_calls_is_known_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mounts.late_mounts_exist()
    monkeypatch.setattr(mounts, "_SYS_MOUNT_SETATTR", 100_000)
    assert not mounts.late_mounts_exist()
