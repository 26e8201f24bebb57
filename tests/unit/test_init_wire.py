"""The wire format: what is sent can be read back, and what is not of it is refused."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.init import wire

COMMAND_ID = st.integers(0, wire.COMMAND_ID_MAX)
REQUEST_ID = st.integers(1, 0xFFFFFFFF)
U64 = st.integers(0, 2**64 - 1)
TEXT = st.binary(max_size=64).map(lambda text: text.replace(b"\0", b"."))
RLIMITS = st.lists(st.builds(wire.Rlimit, st.integers(0, 15), U64, U64), max_size=wire.RLIMITS_MAX)
PTY = st.none() | st.builds(wire.PtySize, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
REQUEST = st.builds(
    wire.SpawnRequest,
    command_id=COMMAND_ID,
    argv=st.lists(TEXT, min_size=1, max_size=8),
    env=st.lists(TEXT, max_size=8),
    cwd=TEXT,
    rlimits=RLIMITS,
    pty=PTY,
)


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
        text = self.message[self.at : self.at + length]
        self.at += length + 1
        assert self.message[self.at - 1] == 0
        return text


@given(REQUEST_ID, REQUEST)
def test_a_spawn_holds_what_was_asked_for_as_the_table_says(request_id: int, request: wire.SpawnRequest) -> None:
    """init.c reads by the same table; two readers of one encoder would hide a shared mistake."""
    reading = Reading(wire.encode_spawn(request_id, request))
    assert reading.take("HHI") == (0x4253, 2, request_id)
    command_id, flags, rows, cols, rlimits, argc, envc, zero = reading.take("QIHHHHHH")
    assert (command_id, zero) == (request.command_id, 0)
    assert (wire.PtySize(rows, cols) if flags else None) == request.pty
    read = [reading.take("IIQQ") for _ in range(rlimits)]
    assert [wire.Rlimit(resource, soft, hard) for resource, _, soft, hard in read] == list(request.rlimits)
    assert reading.string() == request.cwd
    assert [reading.string() for _ in range(argc)] == list(request.argv)
    assert [reading.string() for _ in range(envc)] == list(request.env)
    assert reading.at == len(reading.message)


@given(REQUEST_ID, st.integers(1, 0xFFFF), st.booleans())
def test_a_listen_and_a_dial_hold_what_was_asked_for_as_the_table_says(
    request_id: int, port: int, ipv6: bool
) -> None:
    for kind, encode in ((0x11, wire.encode_listen), (0x12, wire.encode_dial)):
        reading = Reading(encode(request_id, port, ipv6=ipv6))
        assert reading.take("HHI") == (0x4253, kind, request_id)
        assert reading.take("IHH") == (int(ipv6), port, 0)
        assert reading.at == len(reading.message)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_no_port_is_refused_before_it_is_sent(port: int) -> None:
    """Port 0 would have the kernel choose one, and nobody would know which."""
    for encode in (wire.encode_listen, wire.encode_dial):
        with pytest.raises(wire.InvalidPort):
            encode(1, port)


def spawn_of(**changes: object) -> wire.SpawnRequest:
    fields: dict[str, object] = {"command_id": 1, "argv": [b"true"], "env": [], "cwd": b"/"}
    return wire.SpawnRequest(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "request_",
    [
        spawn_of(argv=[]),
        spawn_of(argv=[b"tr\0ue"]),
        spawn_of(env=[b"A=\0"]),
        spawn_of(cwd=b"/\0"),
        spawn_of(command_id=2**63),
        spawn_of(command_id=-1),
        spawn_of(pty=wire.PtySize(65536, 1)),
        spawn_of(rlimits=[wire.Rlimit(1, 0, 0)] * 17),
        spawn_of(rlimits=[wire.Rlimit(1, 2**64, 0)]),
    ],
)
def test_a_spawn_that_cannot_be_said_is_refused_before_it_is_sent(request_: wire.SpawnRequest) -> None:
    """A NUL would silently cut a string short on the other side."""
    with pytest.raises(wire.InvalidSpawn):
        wire.encode_spawn(1, request_)


@pytest.mark.parametrize("request_", [spawn_of(env=[b"x" * 1000] * 197), spawn_of(argv=[b""] * 4097)])
def test_a_spawn_that_does_not_fit_has_an_error_of_its_own(request_: wire.SpawnRequest) -> None:
    """A caller can put a long argument list into a file, once he knows that this is what is wrong."""
    with pytest.raises(wire.SpawnTooLarge):
        wire.encode_spawn(1, request_)


def test_the_largest_spawn_is_just_within_the_bound() -> None:
    overhead = len(wire.encode_spawn(1, spawn_of(argv=[b""])))
    fits = spawn_of(argv=[b"x" * (wire.REQUEST_BYTES_MAX - overhead)])
    assert len(wire.encode_spawn(1, fits)) == wire.REQUEST_BYTES_MAX


USAGE = st.builds(wire.Usage, U64, U64, U64, U64)
ENDED = st.integers(0, 255).map(lambda code: code << 8) | st.integers(1, 64) | st.integers(129, 192)


@given(COMMAND_ID, ENDED | st.none(), USAGE)
def test_an_exited_event_reads_back(command_id: int, status: int | None, usage: wire.Usage) -> None:
    """The status None stands for "nobody knows": never for a guess."""
    message = struct.pack(
        "<HHIQIIQQQQ",
        wire.MAGIC,
        0x4001,
        0,
        command_id,
        status or 0,
        2 if status is None else 0,
        usage.utime_us,
        usage.stime_us,
        usage.maxrss_kib,
        usage.wall_us,
    )
    assert wire.decode_message(message) == (0, wire.Exited(command_id, status, usage))


@given(COMMAND_ID, st.booleans())
def test_a_gone_event_reads_back(command_id: int, lost: bool) -> None:
    message = struct.pack("<HHIQI", wire.MAGIC, 0x4002, 0, command_id, lost)
    assert wire.decode_message(message) == (0, wire.Gone(command_id, lost))


@given(REQUEST_ID, st.integers(1, 4095), st.sampled_from(wire.Stage))
def test_a_refusal_reads_back(request_id: int, errno: int, stage: wire.Stage) -> None:
    message = struct.pack("<HHIII", wire.MAGIC, 0xFFFF, request_id, errno, stage)
    assert wire.decode_message(message) == (request_id, wire.Refused(errno, stage))


ENTRY = st.tuples(COMMAND_ID, st.integers(0, 4 * 1024 * 1024), st.integers(1, 4), st.integers(0, 7), ENDED, USAGE)


@given(REQUEST_ID, st.lists(ENTRY, max_size=256), st.none() | st.integers(0, 1024))
def test_a_page_of_the_table_reads_back(
    request_id: int, rows: list[tuple[int, int, int, int, int, wire.Usage]], following: int | None
) -> None:
    """Ends are learned from here after a restart: a status belongs only to a command that ended."""
    packed = b"".join(
        struct.pack("<QIIIIQQQQ", *row, usage.utime_us, usage.stime_us, usage.maxrss_kib, usage.wall_us)
        for *row, usage in rows
    )
    head = struct.pack(
        "<HHIII", wire.MAGIC, 0x8005, request_id, 0xFFFFFFFF if following is None else following, len(rows)
    )
    answered, page = wire.decode_message(head + packed)
    assert answered == request_id
    assert page == wire.ListPage(
        tuple(
            wire.CommandEntry(
                command_id,
                pid,
                wire.CommandState(state),
                status if state >= 3 and not flags & 2 else None,
                bool(flags & 1),
                usage,
                bool(flags & 4),
            )
            for command_id, pid, state, flags, status, usage in rows
        ),
        following,
    )


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_a_wire_error(garbage: bytes) -> None:
    """Init is untrusted; an IndexError here would climb out of the daemon's loop."""
    with pytest.raises(wire.WireError):
        wire.decode_message(garbage)


KINDS = st.sampled_from(list(wire.MessageType)) | st.integers(0, 0xFFFF)


@given(KINDS, st.integers(0, 0xFFFFFFFF), st.binary(max_size=120) | st.binary(min_size=44, max_size=44))
def test_a_good_header_with_garbage_behind_raises_nothing_but_a_wire_error(
    kind: int, request_id: int, body: bytes
) -> None:
    """Whatever does decode is within the bounds that the structs promise."""
    with contextlib.suppress(wire.WireError):
        wire.decode_message(struct.pack("<HHI", wire.MAGIC, kind, request_id) + body)


@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<HHIII", wire.MAGIC, 0x8005, 1, 0xFFFFFFFF, 257) + bytes(257 * 56),
        struct.pack("<HHIQI", wire.MAGIC, 0x4002, 7, 1, 0),
        struct.pack("<HHIQI", wire.MAGIC, 0x4002, 0, 2**63, 0),
        struct.pack("<HHIQI", wire.MAGIC, 0x4002, 0, 1, 2),
        struct.pack("<HHIQIIQQQQ", wire.MAGIC, 0x4001, 0, 1, 0x137F, 0, 0, 0, 0, 0),
        struct.pack("<HHIQIIQQQQ", wire.MAGIC, 0x4001, 0, 1, 0xFFFF, 0, 0, 0, 0, 0),
        struct.pack("<HHIQIIQQQQ", wire.MAGIC, 0x4001, 0, 1, 0x10000, 0, 0, 0, 0, 0),
        struct.pack("<HHIII", wire.MAGIC, 0xFFFF, 1, 0, 0),
        struct.pack("<HHIII", wire.MAGIC, 0xFFFF, 1, 4096, 0),
        struct.pack("<HHIII", wire.MAGIC, 0xFFFF, 1, 1, 11),
        struct.pack("<HHIB", wire.MAGIC, 0x8004, 1, 0),
        struct.pack("<HHIB", wire.MAGIC, 0x8011, 1, 0),
        struct.pack("<HHII", wire.MAGIC, 0x8012, 1, 7),
        struct.pack("<HHIII", wire.MAGIC, 0x8002, 1, 2**31, 0),
        struct.pack("<HHIHH16sIII", wire.MAGIC, 0x8001, 1, 1, 0, b"", 0, 1024, 2**31) + b"0.1\0",
        struct.pack("<HHIHH16sIII", wire.MAGIC, 0x8001, 1, 1, 0, b"", 0, 1024, 3) + b"\x1b[2\0",
        struct.pack("<HHIHH16sIII", wire.MAGIC, 0x8001, 1, 3, 0, b"", 0, 1024, 3) + b"0.1\0",
        struct.pack("<HHIHH16sIII", wire.MAGIC, 0x8001, 1, 0, 0, b"", 0, 1024, 3) + b"0.1\0",
        struct.pack("<HHIB", wire.MAGIC, 0x8007, 1, 0),
    ],
)
def test_what_init_never_sends_is_refused(message: bytes) -> None:
    """Too many, too large, contradictory, or fit to trick a terminal."""
    with pytest.raises(wire.WireError):
        wire.decode_message(message)
