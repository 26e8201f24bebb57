"""Frames are found in any stream, however it is cut; and descriptors are matched to the frames they came with."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.framing import HEADER_BYTES_MAX, Decoder, DescriptorQueue, Frame, FramingError, encode

FRAME_BYTES_MAX = 200


def decoded(*portions: bytes) -> list[Frame | FramingError]:
    decoder = Decoder(FRAME_BYTES_MAX)
    found = [item for portion in portions for item in decoder.feed(portion)]
    return [*found, *decoder.finish()]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(edges)]


bodies = st.binary(max_size=FRAME_BYTES_MAX)
messages = bodies.map(lambda body: encode(body, lines=False))
pieces = st.one_of(
    messages,
    st.binary(max_size=64),
    st.sampled_from(
        [
            b"Content-Length: 5\r\n",
            b"content-length:3\r\n\r\nabc",
            b"Content-Type: x\r\n",
            b"\r\n",
            b"\n",
            b'{"a":1}\n',
            b"{",
            b"[",
            b"Content-Length: 99999\r\n\r\n",
            b"x" * (HEADER_BYTES_MAX - 20),
            b"{" + b"y" * FRAME_BYTES_MAX,
        ]
    ),
)
streams = st.lists(pieces, max_size=8).map(b"".join)


@given(streams, st.lists(st.integers(min_value=0, max_value=10_000), max_size=12))
def test_the_result_does_not_depend_on_how_the_stream_was_cut(stream: bytes, places: list[int]) -> None:
    """The kernel cuts where it likes; nobody may be served differently for it."""
    assert decoded(*cut(stream, places)) == decoded(stream)


@given(streams)
def test_one_byte_at_a_time_gives_the_same_as_all_at_once(stream: bytes) -> None:
    """The slowest peer is the harshest cut."""
    assert decoded(*(bytes([byte]) for byte in stream)) == decoded(stream)


@given(st.lists(bodies, max_size=6))
def test_what_is_encoded_is_decoded(sent: list[bytes]) -> None:
    """Both ends use the same module; a message must survive it."""
    found = decoded(b"".join(encode(body, lines=False) for body in sent))
    assert [item.body for item in found if isinstance(item, Frame)] == sent
    assert len(found) == len(sent)


@given(streams)
def test_an_error_is_the_last_word(stream: bytes) -> None:
    """Where no frame can be found any more, guessing on would execute what nobody sent."""
    found = decoded(stream, b'{"a":1}\n', encode(b"{}", lines=False))
    assert all(isinstance(item, Frame) for item in found[:-1])


@given(st.lists(bodies, min_size=1, max_size=6))
def test_a_frame_knows_where_it_starts(sent: list[bytes]) -> None:
    """Descriptors are matched by this position."""
    framed = [encode(body, lines=False) for body in sent]
    starts = [sum(map(len, framed[:index])) for index in range(len(framed))]
    found = decoded(b"".join(framed))
    assert [item.start for item in found if isinstance(item, Frame)] == starts


@pytest.mark.parametrize(
    ("stream", "detail"),
    [
        (b"GET / HTTP/1.1\r\n", "neither a header nor a line of JSON"),
        (b"\x16\x03\x01\r\n", "neither a header nor a line of JSON"),
        (b"Content-Length: -1\r\n", "not a number of bytes"),
        (b"Content-Length: 1e3\r\n", "not a number of bytes"),
        (b"Content-Length: " + b"9" * 16 + b"\r\n", "not a number of bytes"),
        (b"Content-Length: 201\r\n", "201 bytes, where 200 are allowed"),
        (b"Content-Length: 1\r\nContent-Length: 1\r\n", "two Content-Length"),
        (b"Content-Type: x\r\n\r\n", "lacks Content-Length"),
        (b"X-Long: " + b"x" * HEADER_BYTES_MAX, "longer than 4096 bytes"),
        (b"{" + b"x" * FRAME_BYTES_MAX, "longer than 200 bytes"),
    ],
)
def test_a_stream_without_frames_is_given_up_as_soon_as_that_is_certain(stream: bytes, detail: str) -> None:
    """A peer that speaks something else learns it at once instead of waiting for a reply."""
    [error] = decoded(stream)
    assert isinstance(error, FramingError)
    assert detail in error.detail


def test_a_first_brace_selects_lines() -> None:
    """Scripts and socat have no patience for headers."""
    assert decoded(b'{"a":1}\r\n\n  \n{"b":2}\n') == [Frame(b'{"a":1}', 0), Frame(b'{"b":2}', 13)]


def test_a_last_line_needs_no_newline() -> None:
    """``printf`` writes none."""
    assert decoded(b'{"a":1}') == [Frame(b'{"a":1}', 0)]


def test_a_message_that_was_cut_off_is_dropped() -> None:
    """Half a request may mean something else than the whole."""
    assert decoded(b"Content-Length: 10\r\n\r\n{}") == []


def test_other_header_fields_are_ignored() -> None:
    """Some clients send Content-Type, and spell fields as they like."""
    assert decoded(b"Content-Type: application/vscode-jsonrpc; charset=utf-8\r\nCONTENT-LENGTH: 2\r\n\r\n{}") == [
        Frame(b"{}", 0)
    ]


def test_a_decoder_tells_where_the_undelivered_part_starts() -> None:
    """What came before that can no longer claim descriptors."""
    decoder = Decoder(FRAME_BYTES_MAX)
    decoder.feed(encode(b"{}", lines=False) + b"Content-Le")
    assert decoder.position == len(encode(b"{}", lines=False))


def test_descriptors_belong_to_a_frame_that_starts_in_their_portion() -> None:
    """A frame before or after must not get them, however the portions fell."""
    queue = DescriptorQueue()
    queue.add(0, 100, [5, 6, 7])
    queue.add(100, 150, [8])
    assert queue.take(99, 3) == (5, 6, 7)
    assert queue.take(150, 1) == ()
    assert queue.take(100, 3) == (8,)
    assert len(queue) == 0


def test_descriptors_that_nobody_can_claim_any_more_come_back() -> None:
    """Whoever holds the queue must be able to close them."""
    queue = DescriptorQueue()
    queue.add(0, 100, [5, 6])
    queue.add(100, 150, [8])
    assert queue.take_unclaimed(99) == []
    assert queue.take_unclaimed(100) == [5, 6]
    assert queue.take_all() == [8]
    assert len(queue) == 0
