"""The file worker's wire format: what is sent is as the table says, and what is not of it is refused."""

import contextlib
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.init import files_wire as wire
from runtimes.init.files_wire import Entry, Facts, FileRefusal, FileType, Flag
from runtimes.init.wire import WireError

REQUEST_ID = st.integers(1, 0xFFFFFFFF)
PATH = st.binary(max_size=64).map(lambda text: text.replace(b"\0", b"."))
FLAGS = st.integers(0, 2**13 - 1).map(Flag)
MODE = st.integers(0, wire.MODE_MAX)
U32 = st.integers(0, 2**32 - 1)
TIME = st.integers(-(2**63), 2**63 - 1)


class Reading:
    """The format as its table says, read independently of the encoder."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self.at = 0

    def take(self, shape: str) -> tuple[int, ...]:
        fields = struct.unpack_from("<" + shape, self.message, self.at)
        self.at += struct.calcsize("<" + shape)
        return fields

    def string(self) -> bytes:
        (length,) = self.take("I")
        self.at += length + 1
        assert self.message[self.at - 1] == 0
        return self.message[self.at - 1 - length : self.at - 1]

    def ends(self) -> bool:
        return self.at == len(self.message)


@given(REQUEST_ID, FLAGS, PATH, MODE, PATH, PATH, U32, TIME)
def test_requests_are_as_the_table_says(
    request_id: int, flags: Flag, base: bytes, mode: int, path: bytes, other: bytes, token: int, time_ns: int
) -> None:
    def reading(kind: int, message: bytes, *, start: bool = True) -> Reading:
        result = Reading(message)
        assert result.take("HHI") == (0x4653, kind, request_id)
        if start:
            assert (result.take("I"), result.string()) == ((flags,), base)
        return result

    with_mode: list[tuple[int, Callable[[int, Flag, bytes, int, bytes], bytes]]] = [
        (1, wire.encode_open),
        (6, wire.encode_make_dir),
        (10, wire.encode_chmod),
        (12, wire.encode_temp),
    ]
    for kind, encode in with_mode:
        read = reading(kind, encode(request_id, flags, base, mode, path))
        assert (read.take("I"), read.string(), read.ends()) == ((mode,), path, True)
    for kind, encode_path in ((2, wire.encode_stat), (8, wire.encode_remove)):
        read = reading(kind, encode_path(request_id, flags, base, path))
        assert (read.string(), read.ends()) == (path, True)
    for kind, encode_paths in ((7, wire.encode_rename), (9, wire.encode_symlink)):
        read = reading(kind, encode_paths(request_id, flags, base, path, other))
        assert (read.string(), read.string(), read.ends()) == (path, other, True)
    for kind, encode_token in ((4, wire.encode_list_next), (5, wire.encode_close)):
        read = reading(kind, encode_token(request_id, token), start=False)
        assert (read.take("I"), read.ends()) == ((token,), True)
    read = reading(3, wire.encode_list(request_id, flags, base, 64, token, path))
    assert (read.take("II"), read.string(), read.ends()) == ((64, token), path, True)
    read = reading(11, wire.encode_set_times(request_id, flags, base, time_ns, path))
    seconds, nanoseconds = read.take("qI")
    assert (seconds * 10**9 + nanoseconds, read.string(), read.ends()) == (time_ns, path, True)
    read = reading(13, wire.encode_commit(request_id, flags, token), start=False)
    assert (read.take("II"), read.ends()) == ((flags, token), True)
    assert reading(14, wire.encode_watch(request_id), start=False).ends()
    read = reading(15, wire.encode_unwatch(request_id, token, 5), start=False)
    assert (read.take("II"), read.ends()) == ((token, 5), True)


@pytest.mark.parametrize(
    "encode",
    [
        lambda: wire.encode_stat(1, Flag.NONE, b"/", b"a\0b"),
        lambda: wire.encode_stat(1, Flag.NONE, b"/\0", b"a"),
        lambda: wire.encode_stat(1, Flag.NONE, b"/", b"x" * 4096),
        lambda: wire.encode_chmod(1, Flag.NONE, b"/", 0o10000, b"a"),
        lambda: wire.encode_open(1, Flag.NONE, b"/", -1, b"a"),
        lambda: wire.encode_list(1, Flag.NONE, b"/", 65, 0, b"a"),
        lambda: wire.encode_set_times(1, Flag.NONE, b"/", 2**63, b"a"),
        lambda: wire.encode_unwatch(1, 1, -1),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_sent(encode: Callable[[], bytes]) -> None:
    with pytest.raises(wire.InvalidPath):
        encode()


FACTS_SHAPE = "IIIIQQqqIIQQ"
FACTS_FIELDS = (0o100644, 1, 1000, 1000, 5, 4096, -2, 3, 4, 5, 77, 8)
FACTS = Facts(FileType.FILE, 0o644, 1, 1000, 1000, 5, 4096, -2 * 10**9 + 4, 3 * 10**9 + 5, 77, 8)


def facts_with(**fields: int) -> bytes:
    names = "mode nlink uid gid size allocated mtime ctime mtime_ns ctime_ns inode device".split()
    return struct.pack(
        "<" + FACTS_SHAPE, *({**dict(zip(names, FACTS_FIELDS, strict=True)), **fields}[n] for n in names)
    )


def reply(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<HHI", 0x4653, kind, 9) + body


def string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text + b"\0"


def entry(path: bytes, target: bytes = b"", watch: int = 0, errno: int = 0) -> bytes:
    return facts_with() + struct.pack("<II", watch, errno) + string(path) + string(target)


def page(*entries: bytes, token: int = 0, flags: int = 0, count: int | None = None) -> bytes:
    number = len(entries) if count is None else count
    return reply(0x8003, struct.pack("<III", token, flags, number) + b"".join(entries))


GOOD = [
    (reply(0x8001, facts_with()), wire.OpenReply(FACTS)),
    (reply(0x8002, facts_with() + string(b"to")), wire.StatReply(FACTS, b"to")),
    (page(), wire.PageReply(None, False, [])),
    (
        page(entry(b""), entry(b"a/b\n", b"../x", 3, 13), token=5, flags=1),
        wire.PageReply(5, True, [Entry(b"", FACTS, b"", 0, 0), Entry(b"a/b\n", FACTS, b"../x", 3, 13)]),
    ),
    (reply(0x8006, struct.pack("<I", 1)), wire.MadeReply(True)),
    (reply(0x8008, struct.pack("<I", 0)), wire.RemovedReply(False)),
    (reply(0x800C, struct.pack("<I", 7)), wire.TempReply(7)),
    (reply(0x800D, facts_with()), wire.CommitReply(FACTS)),
    (reply(0x800E, struct.pack("<I", 7)), wire.WatchReply(7)),
    *((reply(0x8000 | kind), wire.Done(wire.RequestType(kind))) for kind in (5, 7, 9, 10, 11, 15)),
    (reply(0xFFFF, struct.pack("<II", 6, 0o010000)), FileRefusal(6, FileType.FIFO)),
]


@pytest.mark.parametrize(("message", "expected"), GOOD)
def test_answers_are_read_as_the_table_says(message: bytes, expected: wire.FilesReply) -> None:
    assert wire.decode_files_message(message) == (9, expected)


@pytest.mark.parametrize("message", [message for message, _ in GOOD])
def test_an_answer_that_is_cut_short_or_too_long_is_none(message: bytes) -> None:
    for end in range(len(message)):
        with pytest.raises(WireError):
            wire.decode_files_message(message[:end])
    with pytest.raises(WireError):
        wire.decode_files_message(message + b"\0")


@pytest.mark.parametrize(
    "message",
    [
        *(page(entry(path)) for path in (b"/etc", b"..", b"a/../b", b"a//b", b"a/", b"./a", b"a/.", b"a\0b")),
        page(entry(b"a", b"to\0")),
        page(entry(b"x" * 4096)),
        page(entry(b"a", errno=4096)),
        page(entry(b"a", watch=2**31)),
        page(flags=2),
        page(count=2**32 - 1),
        page(entry(b"a"), count=2),
        reply(0x8001, facts_with(mode=0o200000)),
        reply(0x8001, facts_with(mode=0o030000)),
        reply(0x8001, facts_with(size=2**63)),
        reply(0x8001, facts_with(mtime_ns=10**9)),
        reply(0x8006, struct.pack("<I", 2)),
        reply(0x800C, struct.pack("<I", 0)),
        reply(0xFFFF, struct.pack("<II", 0, 0)),
        reply(0xFFFF, struct.pack("<II", 4096, 0)),
        reply(0x8010),
        reply(0x0001, facts_with()),
        struct.pack("<HHI", 0x4253, 0x8005, 9),
        bytes(wire.REPLY_BYTES_MAX + 1),
    ],
)
def test_an_answer_that_a_worker_does_not_give_is_refused(message: bytes) -> None:
    """Above all a path that leads elsewhere: whoever unpacks a tree on the host relies on it."""
    with pytest.raises(WireError):
        wire.decode_files_message(message)


@pytest.mark.parametrize(("seconds", "expected"), [(2**62, 2**63 - 1), (-(2**62), -(2**63)), (1, 10**9 + 4)])
def test_a_time_that_64_bits_do_not_hold_is_the_nearest_that_they_do(seconds: int, expected: int) -> None:
    _, answer = wire.decode_files_message(reply(0x8001, facts_with(mtime=seconds)))
    assert isinstance(answer, wire.OpenReply)
    assert answer.facts.mtime_ns == expected


@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=4))
def test_a_mutated_answer_is_read_or_refused_and_nothing_else(
    good: tuple[bytes, object], changes: list[tuple[int, int]]
) -> None:
    message = bytearray(good[0])
    for at, value in changes:
        message[at % len(message)] = value
    with contextlib.suppress(WireError):
        wire.decode_files_message(bytes(message))


@given(st.binary(max_size=300))
def test_garbage_is_read_or_refused_and_nothing_else(body: bytes) -> None:
    for kind in (0x8001, 0x8002, 0x8003, 0x800C, 0xFFFF):
        with contextlib.suppress(WireError):
            wire.decode_files_message(reply(kind, body))
