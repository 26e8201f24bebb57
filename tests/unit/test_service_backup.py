"""Copies of a service's data: what is put back may come from anywhere, and must stay in its place."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.failures import Failure, InvalidArgument
from sandboxd.services import backup


def archive_of(path: Path, *members: tuple[str, bytes, Callable[[tarfile.TarInfo], None] | None]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content, change in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if change is not None:
                change(member)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def link_to(target: str, kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname = kind, target

    return change


def device(member: tarfile.TarInfo) -> None:
    member.type = tarfile.CHRTYPE


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", b"x", None)],
        [("data/../../evil", b"x", None)],
        [("/etc/evil", b"x", None)],
        [("evil", b"x", None)],
        [("data/link", b"", link_to("/etc", tarfile.SYMTYPE)), ("data/link/evil", b"x", None)],
        [("data/link", b"", link_to("/etc/passwd", tarfile.LNKTYPE))],
        [("data/null", b"", device)],
        [("data/twice", b"x", None), ("data/twice", b"y", None)],
    ],
)
def test_what_no_copy_holds_is_refused_and_nothing_is_left(
    tmp_path: Path, members: list[tuple[str, bytes, Callable[[tarfile.TarInfo], None] | None]]
) -> None:
    fresh = tmp_path / "fresh"
    with pytest.raises(Failure):
        backup.read_backup(archive_of(tmp_path / "copy.tar", *members), str(fresh))
    assert sorted(os.listdir(tmp_path)) == ["copy.tar"]


def test_what_is_larger_than_the_room_there_is_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "ENTRIES_MAX", 1)
    path = archive_of(tmp_path / "copy.tar", ("data/a", b"x", None), ("data/b", b"x", None))
    with pytest.raises(InvalidArgument):
        backup.read_backup(path, str(tmp_path / "fresh"))


def test_a_copy_holds_files_and_directories_and_comes_back_as_it_was(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "deep" / "er").mkdir(parents=True)
    (data / "deep" / "er" / "file").write_bytes(b"content")
    (data / "empty").mkdir()
    (data / "link").symlink_to("/etc/passwd")
    backup.write_backup(str(data), str(tmp_path / "copy.tar"))
    backup.read_backup(str(tmp_path / "copy.tar"), str(tmp_path / "fresh"))
    fresh = tmp_path / "fresh"
    assert (fresh / "deep" / "er" / "file").read_bytes() == b"content"
    assert sorted(os.listdir(fresh)) == ["deep", "empty"]
    assert backup.swap_in(str(fresh), str(data)) == f"{data}.before-restore"
    assert (data / "deep" / "er" / "file").read_bytes() == b"content"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=3000), st.integers(0, 2000))
def test_a_damaged_copy_is_refused_or_read_and_never_half_there(tmp_path: Path, noise: bytes, at: int) -> None:
    path = archive_of(tmp_path / "copy.tar", ("data", b"", None), ("data/a", b"x" * 100, None))
    whole = bytearray(Path(path).read_bytes())
    whole[at : at + len(noise)] = noise
    Path(path).write_bytes(whole)
    fresh = tmp_path / "fresh"
    try:
        backup.read_backup(path, str(fresh))
    except Failure:
        assert not fresh.exists()
    else:
        os.rename(fresh, tmp_path / f"read-{len(os.listdir(tmp_path))}")
