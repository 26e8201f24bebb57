"""Archives as a stream: the standard library reads what is written, and what it writes is read."""

from __future__ import annotations

import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import tarstream
from sandboxd.tarstream import DIRECTORY, FILE, HARDLINK, OTHER, SYMLINK, Member, TarError

NAMES = st.lists(
    st.binary(min_size=1, max_size=120).filter(
        lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..")
    ),
    min_size=1,
    max_size=8,
).map(b"/".join)
TIMES = st.integers(min_value=-(2**33) * 10**9, max_value=2**33 * 10**9)


class Ended(Exception):
    """There is no more."""


class Stream:
    """Bytes as the reader asks for them; knows the most that was asked at once."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self.asked_max = 0

    def take(self, count: int) -> bytes:
        self.asked_max = max(self.asked_max, count)
        data = self._data.read(count)
        if len(data) < count:
            raise Ended
        return data


def members_of(archive: bytes) -> list[tuple[Member, bytes]]:
    """All entries with their data."""
    stream = Stream(archive)
    found = []
    while (member := tarstream.next_member(stream.take)) is not None:
        data = stream.take(member.size)
        stream.take(tarstream.padding_of(member.size))
        found.append((member, data))
    return found


def archive_of(*members: Member) -> bytes:
    """An archive in which all data are zeros."""
    pieces = []
    for member in members:
        pieces += [tarstream.header_of(member), bytes(member.size + tarstream.padding_of(member.size))]
    return b"".join(pieces) + tarstream.END


@given(NAMES, st.sampled_from([FILE, DIRECTORY, SYMLINK, HARDLINK]), TIMES, st.binary(min_size=1, max_size=300))
def test_what_is_written_is_read_back_here_and_by_the_standard_library(
    name: bytes, kind: str, mtime_ns: int, target: bytes
) -> None:
    """Any bytes in a name, of any length, and times to the nanosecond."""
    target = target.replace(b"\0", b"0") if kind in (SYMLINK, HARDLINK) else b""
    member = Member(name, kind, mode=0o751, mtime_ns=mtime_ns, size=700 if kind == FILE else 0, target=target)
    archive = archive_of(member)
    ((read, data),) = members_of(archive)
    assert (read.name.rstrip(b"/"), read.kind, read.mode) == (name, kind, 0o751)
    assert (read.mtime_ns, read.target, data) == (mtime_ns, target, bytes(member.size))
    with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8", errors="surrogateescape") as tar:
        (other,) = tar.getmembers()
    assert os.fsencode(other.name).rstrip(b"/") == name.rstrip(b"/")
    assert os.fsencode(other.linkname) == target
    assert (other.size, other.isdir(), other.issym(), other.islnk()) == (
        member.size, kind == DIRECTORY, kind == SYMLINK, kind == HARDLINK
    )  # fmt: skip


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_others_write_is_read(form: int) -> None:
    """Long names, and sizes that do not fit, each in the way of its format."""
    name = "d/" * 40 + "f" if form == tarfile.USTAR_FORMAT else "long" * 60
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = 5, 0o640, 1_700_000_000
        tar.addfile(info, io.BytesIO(b"hello"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "t" * (90 if form == tarfile.USTAR_FORMAT else 190)
        tar.addfile(link)
        device = tarfile.TarInfo("device")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
        large = tarfile.TarInfo("large")
        large.size = 5 if form == tarfile.USTAR_FORMAT else 10 * 1024**3
        header = large.tobuf(form)
    (first, data), (second, _), (third, _) = members_of(made.getvalue())
    assert (first.name.decode(), first.kind, first.mode, data) == (name, FILE, 0o640, b"hello")
    assert first.mtime_ns == 1_700_000_000 * 10**9
    assert (second.kind, second.target.decode()) == (SYMLINK, link.linkname)
    assert (third.kind, third.what) == (OTHER, "a character device")
    read = tarstream.next_member(Stream(header).take)
    assert read is not None
    assert read.size == large.size


@given(st.binary(max_size=4096))
def test_bytes_of_any_kind_are_no_more_than_refused(data: bytes) -> None:
    with pytest.raises((TarError, Ended)):
        members_of(data + b"\1")


@given(
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=8),
    st.sampled_from([b"0", b"1", b"5", b"x", b"g", b"L", b"K", b"S", b"\0", b"z"]),
    st.binary(max_size=600),
)
def test_damaged_headers_with_a_right_checksum_are_bounded(
    damage: list[tuple[int, int]], flag: bytes, data: bytes
) -> None:
    """Whatever a header says, nobody is asked for more than an extended header may have."""
    block = bytearray(tarstream.header_of(Member(b"name", FILE, mode=0o644, mtime_ns=0, size=len(data))))
    block[156:157] = flag
    for at, value in damage:
        block[at] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    stream = Stream(bytes(block) + data + bytes(tarstream.padding_of(len(data))) + tarstream.END)
    try:
        while (member := tarstream.next_member(stream.take)) is not None:
            assert 0 <= member.size <= tarstream.SIZE_BYTES_MAX
            assert 0 <= member.mode <= 0o7777
            for _ in range(min(member.size + tarstream.padding_of(member.size), 4096)):
                stream.take(1)
    except (TarError, Ended):
        pass
    assert stream.asked_max <= tarstream.EXTENSION_BYTES_MAX + tarstream.BLOCK_BYTES


def extended(data: bytes, flag: bytes = b"x", size: int | None = None) -> bytes:
    """An extended header that says what it is told to."""
    block = bytearray(
        tarstream.header_of(Member(b"x", FILE, mode=0, mtime_ns=0, size=len(data) if size is None else size))
    )
    block[156:157] = flag
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(tarstream.padding_of(len(data)))


PLAIN = tarstream.header_of(Member(b"plain", FILE, mode=0o644, mtime_ns=0))


@pytest.mark.parametrize(
    "archive",
    [
        extended(b"", size=tarstream.EXTENSION_BYTES_MAX + 1) + PLAIN,
        extended(b"8 path=\n") * (tarstream.EXTENSIONS_MAX + 1) + PLAIN,
        extended(b"99999999999999999999 path=a\n") + PLAIN,
        extended(b"5 path=a\n") + PLAIN,
        extended(b"path=a\n") + PLAIN,
        extended(b"0 path=a\n") + PLAIN,
        extended(b"9 size=-1\n") + PLAIN,
        extended(b"28 size=9999999999999999999\n") + PLAIN,
        extended(b"11 mtime=x\n") + PLAIN,
        extended(b"9 path=a\n") + tarstream.END,
        bytes(512) + PLAIN,
        PLAIN[:200] + b"!" + PLAIN[201:],
    ],
)
def test_headers_that_nobody_writes_are_refused(archive: bytes) -> None:
    """Huge ones, endless ones, records that lie about their length, numbers that are none, an end in the middle."""
    with pytest.raises(TarError):
        members_of(archive + tarstream.END)


def test_an_archive_without_its_end_is_not_whole() -> None:
    """A producer that died must not look like one that was done."""
    with pytest.raises(Ended):
        members_of(archive_of(Member(b"a", FILE, mode=0, mtime_ns=0))[: -len(tarstream.END)])


@given(st.binary(max_size=300))
def test_steps_never_lead_elsewhere(name: bytes) -> None:
    steps = tarstream.steps_of(name)
    assert steps is None or not any(step in (b"", b".", b"..") or b"/" in step or b"\0" in step for step in steps)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        (b"a/b", [b"a", b"b"]),
        (b"/etc//./passwd", [b"etc", b"passwd"]),
        (b"./", []),
        (b"a/../b", None),
        (b"..", None),
        (b"a\0b", None),
        (b"n" * 256, None),
        (b"a/" * 2048, None),
    ],
)
def test_steps_are_the_names_alone(name: bytes, steps: list[bytes] | None) -> None:
    assert tarstream.steps_of(name) == steps
