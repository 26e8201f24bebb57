"""Bytes to JSON-RPC messages and back, bounded; and which descriptors belong to which message.

Pure, and light enough for the command line: no imports at all.

Two framings. The default is the base protocol of the Language Server Protocol, because editors' stock clients
speak it: ``Content-Length: N``, an empty line, N bytes of JSON. A connection whose very first byte is ``{``
(or ``[``) sends and gets one JSON value per line instead, for socat and scripts.

A frame that is whole but holds nonsense is the next floor's business, and the connection goes on. Bytes in
which no frame can be found any more are fatal: one error, then nothing.
"""

from __future__ import annotations

HEADER_BYTES_MAX = 4096
"""One ``Content-Length`` takes 24; the rest is generosity towards clients that send more."""

CONTENT_LENGTH_DIGITS_MAX = 15
"""Far above any frame that is let in; keeps the number cheap to read."""

_SPACE = b" \t\r"


class Frame:
    """One message, still as bytes."""

    __slots__ = ("body", "start")

    def __init__(self, body: bytes, start: int) -> None:
        self.body = body
        self.start = start
        """Where its first byte stands in the stream: descriptors ride with that byte."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and (self.body, self.start) == (other.body, other.start)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Frame({self.body!r}, start={self.start})"


class FramingError:
    """No frame can be found in this stream any more; always the last thing that a decoder says."""

    __slots__ = ("detail",)

    def __init__(self, detail: str) -> None:
        self.detail = detail

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FramingError) and self.detail == other.detail

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"FramingError({self.detail!r})"


class Decoder:
    """Feed it what was read, in any portions; it returns the frames that are complete.

    Args:
        frame_bytes_max: Largest message that is let in.

    The result does not depend on how the stream was cut. Nothing that is fed makes it raise, and it never holds
    more than one frame and one portion.
    """

    __slots__ = (
        "_buffer",
        "_dead",
        "_frame_bytes_max",
        "_header_bytes",
        "_in_body",
        "_length",
        "_scanned",
        "lines",
        "position",
    )

    def __init__(self, frame_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()
        self._scanned = 0
        self._header_bytes = 0
        self._length = -1
        self._in_body = False
        self._dead = False
        self.lines: bool | None = None
        """Whether the peer speaks one JSON value per line; None before its first byte."""
        self.position = 0
        """Where in the stream the next frame starts: everything before it was delivered."""

    def feed(self, data: bytes) -> list[Frame | FramingError]:
        """Take a portion of the stream and return what it completes."""
        if self._dead or not data:
            return []
        if self.lines is None:
            self.lines = data[:1] in (b"{", b"[")
        self._buffer += data
        found: list[Frame | FramingError] = []
        step = self._next_line if self.lines else self._next_message
        while (item := step()) is not None:
            found.append(item)
            if isinstance(item, FramingError):
                self._dead = True
                self._buffer.clear()
                break
        return found

    def finish(self) -> list[Frame | FramingError]:
        """The stream has ended: a last line needs no newline. A message that was cut off is dropped."""
        if self._dead or not self.lines or not self._buffer.strip():
            return []
        return self.feed(b"\n")

    def _next_line(self) -> Frame | FramingError | None:
        while True:
            end = self._buffer.find(b"\n", self._scanned)
            line_bytes = end if end >= 0 else len(self._buffer)
            if line_bytes > self._frame_bytes_max:
                return FramingError(f"a line is longer than {self._frame_bytes_max} bytes")
            if end < 0:
                self._scanned = len(self._buffer)
                return None
            start, line = self.position, bytes(self._buffer[:end]).strip(_SPACE)
            self._consume(end + 1)
            if line:
                return Frame(line, start)

    def _next_message(self) -> Frame | FramingError | None:
        while not self._in_body:
            line = self._next_header_line()
            if line is None or isinstance(line, FramingError):
                return line
            problem = self._read_header_line(line)
            if problem:
                return FramingError(problem)
        end = self._header_bytes + self._length
        if len(self._buffer) < end:
            return None
        frame = Frame(bytes(self._buffer[self._header_bytes : end]), self.position)
        self._consume(end)
        self._header_bytes = 0
        self._length = -1
        self._in_body = False
        return frame

    def _next_header_line(self) -> bytes | FramingError | None:
        end = self._buffer.find(b"\r\n", max(self._scanned - 1, self._header_bytes))
        if end + 2 > HEADER_BYTES_MAX or (end < 0 and len(self._buffer) >= HEADER_BYTES_MAX):
            return FramingError(f"a header is longer than {HEADER_BYTES_MAX} bytes")
        if end < 0:
            self._scanned = len(self._buffer)
            return None
        line = bytes(self._buffer[self._header_bytes : end])
        self._header_bytes = self._scanned = end + 2
        return line

    def _read_header_line(self, line: bytes) -> str:
        """Note what a header line says; return what is wrong with it, or nothing."""
        if not line:
            self._in_body = True
            return "" if self._length >= 0 else "a header lacks Content-Length"
        name, colon, value = line.partition(b":")
        if not colon or not name.replace(b"-", b"").isalnum():
            return "these bytes are neither a header nor a line of JSON"
        if name.lower() != b"content-length":
            return ""
        value = value.strip(b" \t")
        if self._length >= 0:
            return "a header has two Content-Length fields"
        if not value.isdigit() or len(value) > CONTENT_LENGTH_DIGITS_MAX:
            return "Content-Length is not a number of bytes"
        self._length = int(value)
        if self._length > self._frame_bytes_max:
            return f"a message has {self._length} bytes, where {self._frame_bytes_max} are allowed"
        return ""

    def _consume(self, count: int) -> None:
        del self._buffer[:count]
        self.position += count
        self._scanned = 0


def encode(body: bytes, *, lines: bool) -> bytes:
    """Frame one message. JSON from our encoders holds no raw newline, so a line is safe."""
    if lines:
        return body + b"\n"
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


class DescriptorQueue:
    """Which received descriptors belong to which frame.

    Descriptors travel beside the bytes: the kernel hands over those of one ``sendmsg`` with the portion in which
    that message's first byte is read, and never joins two such sets in one portion. So a set that came with the
    portion ``[start, end)`` can only belong to a frame that starts in there; once the stream is past ``end``, it is
    nobody's and must be closed.

    It only keeps the numbers: who takes them out closes them.
    """

    __slots__ = ("_sets",)

    def __init__(self) -> None:
        self._sets: list[tuple[int, int, list[int]]] = []

    def __len__(self) -> int:
        return sum(len(descriptors) for _, _, descriptors in self._sets)

    def add(self, start: int, end: int, descriptors: list[int]) -> None:
        """Keep the descriptors that came with the portion ``[start, end)`` of the stream."""
        self._sets.append((start, end, descriptors))

    def take(self, frame_start: int, count: int) -> tuple[int, ...]:
        """Take up to ``count`` descriptors that came with the first byte of the frame at ``frame_start``."""
        for start, end, descriptors in self._sets:
            if start <= frame_start < end:
                taken = tuple(descriptors[:count])
                del descriptors[:count]
                return taken
        return ()

    def take_unclaimed(self, position: int) -> list[int]:
        """Take all descriptors that no frame from ``position`` on can claim."""
        if not self._sets:
            return []
        unclaimed = [number for _, end, numbers in self._sets if end <= position for number in numbers]
        self._sets = [entry for entry in self._sets if entry[1] > position]
        return unclaimed

    def take_all(self) -> list[int]:
        """Take everything."""
        everything = [number for _, _, numbers in self._sets for number in numbers]
        self._sets.clear()
        return everything
