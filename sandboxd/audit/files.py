"""The files of the audit log: written at their end and nowhere else, and read.

``audit-000001.jsonl`` and so on, mode 0600, in a directory of mode 0700. They are opened relative to the directory,
never through a symlink, and only for appending. A file that is large enough is followed by the next, whose first line
goes on with the chain; only so many are kept. ``head`` says which line was the last one, and is written after that
line has reached the disk: so a log that ends before it has been cut, and not by a crash.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence

import msgspec

from sandboxd.audit.chain import (
    GENESIS_PREV,
    LINE_BYTES_MAX,
    Head,
    Line,
    decode,
    digest,
    encode,
    file_name,
    file_number,
)
from sandboxd.timings import now_ms

HEAD_NAME = "head"
HEAD_BYTES_MAX = 4096

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What is to become a line: all of it but its number and what it follows."""

    kind: str
    at_ms: int = msgspec.field(default_factory=now_ms)
    fields: dict[str, object] = {}


def _append(descriptor: int, data: bytes) -> int:
    """As much as the disk takes; how much that is."""
    return os.write(descriptor, data)


class OpenFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it is at one moment. Its descriptor is the owner's to close."""

    number: int
    descriptor: int
    size: int

    @property
    def name(self) -> str:
        """Of the file."""
        return file_name(self.number)

    def lines(self) -> list[bytes]:
        """All of them, an incomplete one at the end included.

        Raises:
            OSError: it cannot be read.
        """
        content = bytearray()
        while len(content) < self.size and (
            portion := os.pread(self.descriptor, self.size - len(content), len(content))
        ):
            content += portion
        lines = bytes(content).split(b"\n")
        return lines if lines[-1] else lines[:-1]


class AuditFiles:
    """The log on the disk. One at a time may write it: the daemon holds its state directory locked.

    Nothing here is safe to be called from two threads at once.

    Args:
        directory: Made if it is not there.
        bytes_max: A file of this size is followed by the next.
        files_max: So many are kept.
    """

    def __init__(self, directory: str, *, bytes_max: int, files_max: int) -> None:
        self.directory = directory
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._directory_fd: int | None = None
        self._fd: int | None = None
        self._number = 0
        self._size = 0
        self._rest = b""
        """Of a line of which the disk took only the beginning."""
        self._seq = 0
        self._prev = GENESIS_PREV
        self._synced_seq = 0
        self._whole: tuple[Head | None, int] = None, 0
        """The last line that is written to its end, and where that is."""

    @property
    def head(self) -> Head | None:
        """The last line that is written to its end; None: none is."""
        return self._whole[0]

    # --- opening

    def open(self) -> None:
        """Find the end of the log, and go on there. Idempotent; what was written down of a failed try is kept.

        Raises:
            OSError: it cannot be written, or is not ours alone.
        """
        if self._fd is not None:
            return
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        if self._directory_fd is None:
            self._directory_fd = self._open_directory()
        numbers = self.numbers()
        head = self._stored_head()
        if not numbers:
            self._create(1, "genesis", {})
            if head is not None:
                self._say_mismatch(f"no file was there, and {head.seq} lines had been written")
            return
        self._number = numbers[-1]
        self._fd = self._open_checked(file_name(self._number), _APPEND)
        self._size = os.fstat(self._fd).st_size
        self._find_end(numbers, head)

    def _open_directory(self) -> int:
        descriptor = os.open(self.directory, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_RDONLY)
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            os.close(descriptor)
            raise PermissionError(f"{self.directory} belongs to uid {status.st_uid}")
        if status.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
        return descriptor

    def _open_checked(self, name: str, flags: int) -> int:
        descriptor = os.open(name, flags, 0o600, dir_fd=self._directory_fd)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            os.close(descriptor)
            raise PermissionError(f"{name} is no file of ours")
        if status.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
        return descriptor

    def numbers(self) -> list[int]:
        """The files that are there, the oldest first.

        Raises:
            OSError: the directory cannot be read.
        """
        assert self._directory_fd is not None
        return sorted(number for name in os.listdir(self._directory_fd) if (number := file_number(name)) is not None)

    def _find_end(self, numbers: Sequence[int], head: Head | None) -> None:
        """Take the chain up where it ends; say what a crash, or somebody else, has left there."""
        raw, torn = self._last_line(numbers)
        line = None if raw is None else decode(raw)
        expected = 0 if head is None else head.seq
        self._seq = expected if line is None else line.seq
        self._prev = GENESIS_PREV if raw is None else digest(raw)
        self._synced_seq = 0
        found = self._seq, self._prev
        self._whole = Head(seq=self._seq, sha256=self._prev), self._size - len(torn)
        if torn:
            # Nothing is taken away: what there is becomes a line, and the next one says what it is.
            self._rest = b"" if torn.endswith(b"\n") else b"\n"
            torn = torn.removesuffix(b"\n")
            self._say("torn", {"bytes": len(torn), "sha256": digest(torn)})
        if line is None:
            self._say_mismatch(f"it does not end with a line, and {expected} had been written")
        elif line.seq < expected:
            self._say_mismatch(f"it ends with line {line.seq}, and {expected} had been written")
        elif head is not None and found[0] == head.seq and found[1] != head.sha256:
            self._say_mismatch(f"its last line, {line.seq}, is not the one that had been written")

    def _last_line(self, numbers: Sequence[int]) -> tuple[bytes | None, bytes]:
        """The last line that is one, and what is behind it in the last file."""
        torn = b""
        for number in reversed(numbers):
            descriptor = self._open_checked(file_name(number), _READ)
            with contextlib.closing(os.fdopen(descriptor, "rb")) as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 4 * LINE_BYTES_MAX))
                content = file.read()
            lines = content.splitlines(keepends=True)
            behind = b""
            while lines and (not lines[-1].endswith(b"\n") or decode(lines[-1]) is None):
                behind = lines.pop() + behind
            if number == numbers[-1]:
                torn = behind
            if lines:
                return lines[-1].removesuffix(b"\n"), torn
        return None, torn

    # --- writing

    @property
    def _writable(self) -> int:
        assert self._fd is not None
        return self._fd

    def write(self, notes: Sequence[Note]) -> int:
        """Append lines; return how many of them are written, or as good as: the rest of a line is made up for later.

        Raises:
            OSError: not one is, and none of what was left of an earlier one.
        """
        self.open()
        if os.fstat(self._writable).st_nlink == 0:
            self._replace()
        if self._size >= self._bytes_max:
            self._rotate()
        self._write_rest()
        lines, ends = self._chained(notes)
        written = _append(self._writable, lines)
        self._size += written
        begun, count = 0, 0
        for end, seq, prev in ends:
            if written <= begun:
                break
            count += 1
            self._seq, self._prev = seq, prev
            if written < end:
                self._rest = lines[written:end]
            else:
                self._whole = Head(seq=seq, sha256=prev), self._size - written + end
            begun = end
        return count

    def _chained(self, notes: Sequence[Note]) -> tuple[bytes, list[tuple[int, int, str]]]:
        """The lines, and for each where it ends, its number and its hash."""
        seq, prev = self._seq, self._prev
        lines = bytearray()
        ends = []
        for note in notes:
            seq += 1
            line = encode(Line(seq=seq, at_ms=note.at_ms, kind=note.kind, prev=prev, **note.fields))  # type: ignore[arg-type]
            prev = digest(line)
            lines += line + b"\n"
            ends.append((len(lines), seq, prev))
        return bytes(lines), ends

    def _write_rest(self) -> None:
        while self._rest:
            written = _append(self._writable, self._rest)
            self._size += written
            self._rest = self._rest[written:]
        self._whole = Head(seq=self._seq, sha256=self._prev), self._size

    def _say(self, kind: str, data: dict[str, str | int | None]) -> None:
        """Write one line, all of it.

        Raises:
            OSError: the disk does not take it.
        """
        lines, ends = self._chained([Note(kind=kind, fields={"data": data})])
        self._rest += lines
        _, self._seq, self._prev = ends[0]
        self._write_rest()

    def _say_mismatch(self, reason: str) -> None:
        self._say("mismatch", {"reason": reason})

    def _create(self, number: int, kind: str, data: dict[str, str | int | None]) -> None:
        """Go on in a new file, whose first line says so; the old one if that cannot be."""
        made = self._open_checked(file_name(number), _APPEND | os.O_CREAT | os.O_EXCL)
        before = self._fd, self._number, self._size, self._rest, self._seq, self._prev, self._whole
        self._fd, self._number, self._size, self._rest = made, number, 0, b""
        try:
            self._say(kind, data)
        except OSError:
            self._fd, self._number, self._size, self._rest, self._seq, self._prev, self._whole = before
            os.close(made)
            os.unlink(file_name(number), dir_fd=self._directory_fd)
            raise
        if before[0] is not None:
            os.close(before[0])

    def _rotate(self) -> None:
        self._write_rest()
        self.sync()
        number = self._number + 1
        oldest = max(1, number - self._files_max + 1)
        self._create(number, "continued", {"oldest_file": oldest})
        # Written down first: what is missing without being said to be, somebody else has taken.
        for old in self.numbers():
            if old < oldest:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file_name(old), dir_fd=self._directory_fd)

    def _replace(self) -> None:
        """Somebody has removed the file that is written: what comes must be found by who looks for it."""
        removed = file_name(self._number)
        self._rest = b""
        self._create(self._number + 1, "continued", {"oldest_file": self._number + 1})
        self._say_mismatch(f"{removed} was removed while it was written")

    def sync(self) -> None:
        """Have the disk keep what was written, and then the head say so. Idempotent.

        Raises:
            OSError: it does not.
        """
        if self._fd is None or self._seq == self._synced_seq or self._rest:
            return
        head = Head(seq=self._seq, sha256=self._prev)
        os.fdatasync(self._fd)
        descriptor = os.open(
            f"{HEAD_NAME}.new",
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
            dir_fd=self._directory_fd,
        )
        try:
            os.write(descriptor, msgspec.json.encode(head))
        finally:
            os.close(descriptor)
        os.rename(f"{HEAD_NAME}.new", HEAD_NAME, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
        self._synced_seq = head.seq

    def _stored_head(self) -> Head | None:
        try:
            descriptor = os.open(HEAD_NAME, _READ, dir_fd=self._directory_fd)
        except FileNotFoundError:
            return None
        with contextlib.closing(os.fdopen(descriptor, "rb")) as file:
            try:
                return msgspec.json.decode(file.read(HEAD_BYTES_MAX), type=Head)
            except (msgspec.MsgspecError, ValueError):
                return None

    def close(self) -> None:
        """Let go of the files. Idempotent."""
        for descriptor in (self._fd, self._directory_fd):
            if descriptor is not None:
                os.close(descriptor)
        self._fd = self._directory_fd = None

    # --- reading

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[list[OpenFile]]:
        """All files as they are now, the oldest first: what is written or removed meanwhile changes nothing.

        Raises:
            OSError: they cannot be opened.
        """
        with contextlib.ExitStack() as held:
            yield self._snapshot(held)

    def _snapshot(self, held: contextlib.ExitStack) -> list[OpenFile]:
        found = []
        for number in self.numbers():
            descriptor = self._open_checked(file_name(number), _READ)
            held.callback(os.close, descriptor)
            size = os.fstat(descriptor).st_size
            if number == self._number and self._rest:
                # The beginning of a line, whose rest comes when the disk takes it.
                size = min(size, self._whole[1])
            found.append(OpenFile(number=number, descriptor=descriptor, size=size))
        return found
