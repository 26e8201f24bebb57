"""Moving bytes between descriptors, at the host's speed, by a thread that can be stopped.

One end is a stream: a pipe, a socket, or a regular file that is read or written from where it stands. The other end
is a regular file. Nothing here waits without end: every wait is for the stream and for the order to stop, and no
longer than a stream may be silent. Light enough for the command line.

A pipe is opened anew, so that whether it blocks is ours alone to say. A socket cannot be, and is asked per call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

CHUNK_BYTES = 1024 * 1024
"""Of a pipe, where the kernel lets us have one so large."""

KERNEL_CHUNK_BYTES = 32 * 1024 * 1024
"""Copied by the kernel in one call, between two looks whether to stop."""

GATHERED_BYTES = 256 * 1024
"""Small things are gathered to so much before they are sent."""

LISTED_MAX = 100
"""Of what a transfer left out; the rest is counted."""

TRAILER_BYTES_MAX = 1024 * 1024
"""Read after what was wanted, so that whoever writes a pipe is not told that nobody reads it."""

_NOT_POSSIBLE = (errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY)
"""The kernel has no shortcut between these two: a file that is appended to, some file systems."""


class Stopped(Exception):
    """Somebody said to stop."""


class Stalled(Exception):
    """The stream was silent for too long."""


class EndedEarly(Exception):
    """The stream ended before what was promised."""


class NotAStream(Exception):
    """Nothing can be moved from or to such a descriptor."""


class Tally:
    """What was moved so far. Written by one thread, read by any."""

    __slots__ = ("bytes", "entries")

    def __init__(self) -> None:
        self.bytes = 0
        self.entries = 0


class Skips:
    """What was left out, and why; the first ones by name."""

    __slots__ = ("count", "listed")

    def __init__(self) -> None:
        self.count = 0
        self.listed: list[tuple[bytes, str]] = []

    def add(self, path: bytes, reason: str) -> None:
        """One more."""
        self.count += 1
        if len(self.listed) < LISTED_MAX:
            self.listed.append((path, reason))


class Patience:
    """How long to wait for a stream, and what ends the waiting.

    Args:
        idle_s: How long a stream may be silent; None: for ever.
    """

    def __init__(self, idle_s: float | None) -> None:
        self._idle_s = idle_s
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = False
        self._polls: dict[tuple[int, int], select.poll] = {}

    def stop(self) -> None:
        """End what waits now or later. From any thread; idempotent."""
        self._stopped = True
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def check(self) -> None:
        """Between two long steps.

        Raises:
            Stopped: Stop was called.
        """
        if self._stopped:
            raise Stopped

    def wait(self, descriptor: int, events: int) -> None:
        """Until the descriptor is ready.

        Raises:
            Stopped: Stop was called.
            Stalled: It was not ready in time.
        """
        if not self.wait_for(descriptor, events, self._idle_s):
            raise Stalled(f"nothing moved for {self._idle_s:g} s")

    def wait_for(self, descriptor: int, events: int, timeout_s: float | None) -> bool:
        """Whether the descriptor is ready within the time.

        Raises:
            Stopped: Stop was called.
        """
        self.check()
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        poll = self._polls.get((descriptor, events))
        if poll is None:
            poll = self._polls[descriptor, events] = select.poll()
            poll.register(descriptor, events)
            poll.register(self._wake, select.POLLIN)
        ready = poll.poll(None if ends is None else max(0.0, ends - time.monotonic()) * 1000)
        self.check()
        return bool(ready)

    def close(self) -> None:
        """When the thread has ended."""
        os.close(self._wake)


class _End:
    """What a stream at either end has: its descriptor, which it owns, and how it is used."""

    def __init__(self, descriptor: int, patience: Patience, tally: Tally, *, to_write: bool) -> None:
        self._descriptor = descriptor
        self._patience = patience
        self._tally = tally
        self._socket: socket.socket | None = None
        self.is_file = False
        try:
            self._prepare(to_write=to_write)
        except BaseException:
            self.close()
            raise

    def _prepare(self, *, to_write: bool) -> None:
        kind = stat.S_IFMT(os.fstat(self._descriptor).st_mode)
        flags: int = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        self.is_file = kind == stat.S_IFREG
        if flags & os.O_PATH or flags & os.O_ACCMODE == (os.O_RDONLY if to_write else os.O_WRONLY):
            raise NotAStream(f"it is not open for {'writing' if to_write else 'reading'}")
        if kind == stat.S_IFIFO:
            self._reopen(os.O_WRONLY if to_write else os.O_RDONLY)
        elif kind == stat.S_IFSOCK:
            self._take_socket()
        elif kind != stat.S_IFREG and not _is_null(self._descriptor):
            raise NotAStream("it is neither a pipe nor a socket nor a regular file")

    def _reopen(self, how: int) -> None:
        try:
            own = os.open(f"/proc/self/fd/{self._descriptor}", how | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None
            raise NotAStream(f"its pipe cannot be opened: {error.strerror}") from None
        os.dup2(own, self._descriptor, inheritable=False)
        os.close(own)
        # It may be refused to somebody who has many of them; it is only faster.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)

    def _take_socket(self) -> None:
        import socket

        self._socket = socket.socket(fileno=self._descriptor)
        if self._socket.type != socket.SOCK_STREAM:
            raise NotAStream("its socket is not a stream")

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self._descriptor < 0:
            return
        if self._socket is not None:
            self._socket.detach()
        os.close(self._descriptor)
        self._descriptor = -1


class Incoming(_End):
    """A stream to read. Owns the descriptor from here.

    Everything that reads raises:
        EndedEarly: There was not so much.
        Stopped, Stalled: It had to wait, and could not any longer.
        OSError: Of either end.
    """

    def __init__(self, descriptor: int, patience: Patience, tally: Tally) -> None:
        super().__init__(descriptor, patience, tally, to_write=False)
        self._held = memoryview(b"")
        self._shortcut = True

    def take(self, count: int) -> bytes:
        """Exactly so many bytes; for small numbers, as all of them are held."""
        held = self._held
        if len(held) < count:
            self._fill(count)
            held = self._held
        self._held = held[count:]
        return bytes(held[:count])

    def discard(self, count: int) -> None:
        """Read and forget so many bytes."""
        while count:
            if not self._held:
                self._fill(1)
            taken = min(count, len(self._held))
            self._held = self._held[taken:]
            count -= taken

    def copy_to(self, target: int, count: int) -> None:
        """Write the next ``count`` bytes to a regular file, where it stands."""
        if self.copy_up_to(target, count) < count:
            raise EndedEarly

    def copy_up_to(self, target: int, count: int) -> int:
        """Write the next bytes, until their end or ``count`` of them, and return how many there were."""
        left = count
        while left:
            if self._held:
                piece = self._held[: min(left, len(self._held))]
                self._held = self._held[len(piece) :]
                write_all(target, piece)
                moved = len(piece)
                self._patience.check()
            else:
                moved = self._move(target, left)
            if not moved:
                break
            left -= moved
            self._tally.bytes += moved
        return count - left

    def whole_file(self) -> int | None:
        """The descriptor, if it is a regular file of which nothing was read."""
        return self._descriptor if self.is_file and os.lseek(self._descriptor, 0, os.SEEK_CUR) == 0 else None

    def read_trailer(self) -> None:
        """Read what follows, to a limit: the padding that archives end with."""
        with contextlib.suppress(EndedEarly):
            self.discard(TRAILER_BYTES_MAX)

    def _fill(self, count: int) -> None:
        pieces = [bytes(self._held)]
        have = len(pieces[0])
        while have < count:
            piece = self._read(max(GATHERED_BYTES, count - have))
            if not piece:
                raise EndedEarly
            pieces.append(piece)
            have += len(piece)
        self._held = memoryview(b"".join(pieces))

    def _read(self, count: int) -> bytes:
        while True:
            try:
                if self._socket is not None:
                    import socket

                    return self._socket.recv(count, socket.MSG_DONTWAIT)
                return os.read(self._descriptor, count)
            except BlockingIOError:
                self._patience.wait(self._descriptor, select.POLLIN)

    def _move(self, target: int, left: int) -> int:
        if self._shortcut and self._socket is None:
            while True:
                self._patience.check()
                try:
                    if self.is_file:
                        moved = os.copy_file_range(self._descriptor, target, min(left, KERNEL_CHUNK_BYTES))
                    else:
                        moved = os.splice(
                            self._descriptor, target, min(left, CHUNK_BYTES), flags=os.SPLICE_F_NONBLOCK
                        )
                except BlockingIOError:
                    self._patience.wait(self._descriptor, select.POLLIN)
                    continue
                except OSError as error:
                    if error.errno not in _NOT_POSSIBLE:
                        raise
                    self._shortcut = False
                    break
                if moved or not self.is_file:
                    return moved
                break  # some file systems say 0 for what they will not do
        piece = self._read(min(left, CHUNK_BYTES))
        write_all(target, piece)
        return len(piece)


class Outgoing(_End):
    """A stream to write. Owns the descriptor from here; what was gathered goes with ``flush``.

    Everything raises:
        BrokenPipeError: Nobody reads it any more.
        Stopped, Stalled: It had to wait, and could not any longer.
        OSError: Of either end.
    """

    def __init__(self, descriptor: int, patience: Patience, tally: Tally) -> None:
        super().__init__(descriptor, patience, tally, to_write=True)
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._shortcut = self._socket is None

    def write(self, data: bytes) -> None:
        """Soon or at once."""
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes >= GATHERED_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        data = memoryview(b"".join(self._gathered))
        self._gathered.clear()
        self._gathered_bytes = 0
        self._write_now(data)

    def copy_from(self, source: int, count: int) -> int:
        """Write the next ``count`` bytes of a regular file, or as many as it has, and return how many."""
        if count < GATHERED_BYTES // 4:
            return self._gather(source, count)
        self.flush()
        left = count
        while left:
            moved = self._move(source, left)
            if not moved:
                break
            left -= moved
            self._tally.bytes += moved
        return count - left

    def empty_file(self) -> int | None:
        """The descriptor, if it is an empty regular file."""
        return self._descriptor if self.is_file and os.fstat(self._descriptor).st_size == 0 else None

    def fill(self, count: int) -> None:
        """Write so many zeros."""
        zeros = bytes(min(count, GATHERED_BYTES))
        while count:
            piece = zeros[: min(count, len(zeros))]
            self.write(piece)
            count -= len(piece)

    def _gather(self, source: int, count: int) -> int:
        left = count
        while left and (piece := os.read(source, left)):
            self.write(piece)
            left -= len(piece)
        self._tally.bytes += count - left
        return count - left

    def _write_now(self, data: memoryview) -> None:
        while data:
            self._patience.check()
            try:
                if self._socket is not None:
                    import socket

                    sent = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                else:
                    sent = os.write(self._descriptor, data[:CHUNK_BYTES])
            except BlockingIOError:
                self._patience.wait(self._descriptor, select.POLLOUT)
                continue
            data = data[sent:]

    def _move(self, source: int, left: int) -> int:
        while self._shortcut:
            self._patience.check()
            try:
                if self.is_file:
                    moved = os.copy_file_range(source, self._descriptor, min(left, KERNEL_CHUNK_BYTES))
                else:
                    moved = os.sendfile(self._descriptor, source, None, min(left, CHUNK_BYTES))
            except BlockingIOError:
                self._patience.wait(self._descriptor, select.POLLOUT)
                continue
            except OSError as error:
                if error.errno not in _NOT_POSSIBLE:
                    raise
                self._shortcut = False
                break
            if moved or not self.is_file:
                return moved
            break
        piece = os.read(source, min(left, CHUNK_BYTES))
        self._write_now(memoryview(piece))
        return len(piece)


def _is_null(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)


def write_all(target: int, data: bytes | memoryview) -> None:
    """Write all of it to a regular file, where it stands."""
    left = memoryview(data)
    while left:
        left = left[os.write(target, left) :]


def copy_file(source: int, target: int, *, bytes_max: int, patience: Patience, tally: Tally) -> bool:
    """Copy one regular file into an empty one, holes as holes; False when there is more than ``bytes_max`` of data.

    It ends where the file ended when this began. Sharing of blocks is left to the kernel.
    """
    size = os.fstat(source).st_size
    at = 0
    taken = 0
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
            end = min(os.lseek(source, begin, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing but a hole is left, or it was cut short
            if error.errno not in _NOT_POSSIBLE:
                raise
            begin, end = at, size
        taken += max(end - begin, 0)
        if taken > bytes_max:
            return False
        _copy_range(source, target, begin, end, patience, tally)
        at = max(end, begin + 1)
    os.ftruncate(target, size)
    return True


def _copy_range(source: int, target: int, at: int, end: int, patience: Patience, tally: Tally) -> None:
    copy: Callable[[int], int]

    def in_kernel(count: int) -> int:
        return os.copy_file_range(source, target, min(count, KERNEL_CHUNK_BYTES), at, at)

    def by_hand(count: int) -> int:
        piece = os.pread(source, min(count, CHUNK_BYTES), at)
        os.lseek(target, at, os.SEEK_SET)
        write_all(target, piece)
        return len(piece)

    copy = in_kernel
    while at < end:
        patience.check()
        try:
            moved = copy(end - at)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE or copy is by_hand:
                raise
            moved = 0
        if not moved:
            if copy is by_hand:
                return  # it was cut short meanwhile
            copy = by_hand
            continue
        at += moved
        tally.bytes += moved
