"""Archives from a sandbox, unpacked on the host: whatever is in them, nothing outside is touched."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd import tarstream
from sandboxd.client.trees import Unpacker
from sandboxd.streams import EndedEarly, Incoming, Patience, Skips, Tally
from sandboxd.tarstream import DIRECTORY, FILE, HARDLINK, SYMLINK, Member, TarError

STEPS = st.sampled_from([b"a", b"b", b"link", b"..", b".", b"", b"outside", b"\xff", b"-", b"a" * 300])
PATHS = st.lists(STEPS, min_size=1, max_size=4).map(b"/".join)
TARGETS = PATHS | st.sampled_from([b"../outside", b"/", b"../../outside/kept", b"a", b"link", b"/proc/self/root"])
KINDS = st.sampled_from([FILE, FILE, DIRECTORY, SYMLINK, SYMLINK, HARDLINK])
MODES = st.sampled_from([0o644, 0o777, 0o000, 0o6755, 0o1777])
KEPT = b"nobody may change this"


@st.composite
def entries(draw: st.DrawFn) -> tuple[Member, bytes]:
    kind = draw(KINDS)
    data = draw(st.binary(max_size=600)) if kind == FILE else b""
    target = draw(TARGETS) if kind in (SYMLINK, HARDLINK) else b""
    name = draw(PATHS)
    member = Member(name=name or b"x", kind=kind, mode=draw(MODES), mtime_ns=0, size=len(data), target=target)
    return member, data


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Some that are whole, and some that were damaged."""
    pieces = []
    for member, data in draw(st.lists(entries(), max_size=8)):
        pieces += [tarstream.header_of(member), data, bytes(tarstream.padding_of(len(data)))]
    archive = bytearray(b"".join([*pieces, tarstream.END]))
    for place, value in draw(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3)):
        archive[place % len(archive)] = value
    return bytes(archive[: draw(st.sampled_from([len(archive), len(archive), len(archive) // 2]))])


def unpack(archive: bytes, root: Path, *, exact: bool) -> None:
    source = os.memfd_create("archive")
    os.write(source, archive)
    os.lseek(source, 0, os.SEEK_SET)
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    tally = Tally()
    try:
        with (
            contextlib.closing(Patience(None)) as patience,
            contextlib.closing(Incoming(source, patience, tally)) as incoming,
        ):
            Unpacker(directory, exact=exact, tally=tally, skips=Skips()).run(incoming)
    finally:
        os.close(directory)


def everything_in(directory: Path) -> dict[str, tuple[int, int, int, bytes]]:
    found = {}
    for path in [directory, *directory.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_nlink, status.st_mtime_ns, content)
    return found


@settings(max_examples=150, deadline=None)
@given(archive=archives(), exact=st.booleans())
def test_no_archive_reaches_outside_of_where_it_is_unpacked(archive: bytes, exact: bool) -> None:
    """A sandbox makes up what it likes: links that lead out, names that climb, bytes that are no archive."""
    with tempfile.TemporaryDirectory() as scratch:
        outside = Path(scratch, "outside")
        outside.mkdir()
        (outside / "kept").write_bytes(KEPT)
        root = Path(scratch, "root")
        root.mkdir()
        before = everything_in(outside)
        descriptors = len(os.listdir("/proc/self/fd"))
        with contextlib.suppress(TarError, EndedEarly, OSError):
            unpack(archive, root, exact=exact)
        assert everything_in(outside) == before
        assert sorted(os.listdir(scratch)) == ["outside", "root"]
        assert len(os.listdir("/proc/self/fd")) == descriptors
        for path in root.rglob("*"):
            assert not path.lstat().st_mode & 0o6000 or path.is_symlink(), "no setuid bits"
