"""What goes into a file and what comes out of one, in bounded pieces: no copy of it is ever put into a message.

Large content is handed over as a descriptor: to write, that of an anonymous file that is filled here; to read, that
of the file itself.
"""

from __future__ import annotations

import binascii
import contextlib
import io
import os
import stat
from typing import TYPE_CHECKING, Any

from sandboxd.client.errors import InvalidArgumentException

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO, Self

INLINE_BYTES_MAX = 64 * 1024
"""What is not larger is sent in the request: it costs less than a file."""

PIECE_BYTES = 1024 * 1024

READ_AT_ONCE_BYTES_MAX = 1 << 30
"""A sandbox can make a file of any size in no time, and must not fill the memory of whoever reads it."""


@contextlib.contextmanager
def source(
    data: str | bytes | bytearray | memoryview | IO[str] | IO[bytes],
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Params of ``files/write`` that say what is written, and the descriptors that they speak of.

    A stream is read from where it stands to its end.

    Raises:
        InvalidArgumentException: It is neither text, nor bytes, nor something to read from.
    """
    with contextlib.ExitStack() as opened:
        if isinstance(data, str):
            data = _encoded(data)
        if isinstance(data, bytes | bytearray | memoryview):
            view = memoryview(data).cast("B")
            if len(view) <= INLINE_BYTES_MAX:
                yield {"data": binascii.b2a_base64(view, newline=False).decode()}, []
                return
            number = os.memfd_create("content", os.MFD_CLOEXEC)
            opened.callback(os.close, number)
            _write_all(number, view)
            os.lseek(number, 0, os.SEEK_SET)
        elif hasattr(data, "read"):
            own = _descriptor_of(data)
            number = _copied(data) if own is None else own
            opened.callback(os.close, number)
        else:
            raise InvalidArgumentException(
                f"cannot write a {type(data).__name__}", "it is neither text nor bytes", "give str, bytes or a file"
            )
        yield {"descriptor": True}, [number]


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentException("cannot write text that is not UTF-8", str(error), "give bytes") from None


def _write_all(number: int, view: memoryview) -> None:
    while view:
        view = view[os.write(number, view) :]


def _descriptor_of(stream: IO[str] | IO[bytes]) -> int | None:
    """A regular file that is read as it is, opened once more where the stream stands; None: it has to be copied.

    What unpacks or decodes on its way may have a descriptor, too, and means something else than what is in it.
    """
    raw = stream.raw if type(stream) is io.BufferedReader else stream
    if type(raw) is not io.FileIO or not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        return None
    try:
        number = os.open(f"/proc/self/fd/{raw.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    os.lseek(number, stream.tell(), os.SEEK_SET)
    stream.seek(0, os.SEEK_END)
    return number


def _copied(stream: IO[str] | IO[bytes]) -> int:
    """An anonymous file with what is in the stream. On disk, for nobody knows how much it is."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        while piece := stream.read(PIECE_BYTES):
            file.write(_encoded(piece) if isinstance(piece, str) else piece)
        file.seek(0)
        return os.dup(file.fileno())


def read_all(number: int, path: str) -> bytearray:
    """All that is in a file; the descriptor is closed.

    Raises:
        InvalidArgumentException: It is too large for that.
    """
    with open(number, "rb", buffering=0) as file:
        size = os.fstat(number).st_size
        _refuse_beyond(size, path)
        content = bytearray(size)
        at = 0
        with memoryview(content) as view:
            while at < size and (length := file.readinto(view[at:])):
                at += length
        del content[at:]
        # It may have grown meanwhile.
        while at >= size and (piece := file.read(PIECE_BYTES)):
            content += piece
            _refuse_beyond(len(content), path)
        return content


def _refuse_beyond(size: int, path: str) -> None:
    if size > READ_AT_ONCE_BYTES_MAX:
        raise InvalidArgumentException(
            f"cannot read {path!r} at once",
            f"it has {size} bytes, {READ_AT_ONCE_BYTES_MAX} is the most",
            "format='stream'",
        )


class FileStream:
    """What is in a file, a piece at a time: iterate over it. It is closed at its end, or by ``close``."""

    def __init__(self, number: int) -> None:
        self._file = open(number, "rb", buffering=0)  # noqa: SIM115 - closed by whoever takes it

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        piece = b"" if self._file.closed else self._file.read(PIECE_BYTES)
        if not piece:
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """Give up the rest. Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
