"""Pipes that stand in for the caller's terminals and files.

A sandbox without a terminal of its own never gets the caller's: a process that is left behind inside could read keys
from it, change its settings, and write to it when we are long gone. Nor does it get the caller's files: the
descriptor of one can be opened anew through ``/proc/self/fd``, for writing where it was for reading, and loses
``O_APPEND`` for the asking. So where stdin, stdout or stderr is neither a pipe, a socket nor /dev/null, the command
gets a pipe, and bytes are copied between the two for as long as we live.

A file is read into memory of ours, and not spliced into the pipe: that would put the very pages of the file within
the reach of whoever holds the other end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import sys
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CHUNK_BYTES = 1 << 20
INT_BYTES = 4
STDIN, STDOUT, STDERR = 0, 1, 2


class StandIns:
    """One pipe for each of our descriptors that the command must not have.

    Stdout and stderr that are the same file share one, so that their order stays.

    Args:
        numbers: Of the descriptors: some of 0, 1 and 2.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.theirs: dict[int, int] = {}
        """The ends that the command gets, by the numbers that they have there."""
        self.failure: OSError | None = None
        """Why something that the command wrote is not where it belongs."""
        self._ours: dict[int, int] = {}
        self._typed = b""
        self._files = {number for number in numbers if stat.S_ISREG(os.fstat(number).st_mode)}
        self._spliced = self._files - {STDIN}
        for number in numbers:
            if number == STDERR and STDOUT in self.theirs and os.path.sameopenfile(STDOUT, STDERR):
                self.theirs[STDERR] = self.theirs[STDOUT]
                continue
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            ours, self.theirs[number] = (write_end, read_end) if number == STDIN else (read_end, write_end)
            os.set_blocking(ours, False)
            self._ours[number] = ours
            if number in self._files:
                # It may be refused to somebody who has many of them; it is only faster.
                with contextlib.suppress(OSError):
                    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)

    def close_theirs(self) -> None:
        """Once the command has its ends: else no pipe would ever come to its end. Idempotent."""
        for end in set(self.theirs.values()):
            os.close(end)
        self.theirs.clear()

    def close(self) -> None:
        """Close everything."""
        self.close_theirs()
        for number in list(self._ours):
            self._close(number)

    def register(self, poll: select.poll) -> None:
        """Wait for what can be copied next."""
        for number, ours in self._ours.items():
            if number != STDIN:
                poll.register(ours, select.POLLIN)
                continue
            # Asked for nothing, it still tells that nobody reads any more, and keys are left to the next program.
            poll.register(ours, select.POLLOUT if self._typed else 0)
            if not self._typed:
                poll.register(STDIN, select.POLLIN)

    def serve(self, ready: Mapping[int, int]) -> None:
        """Copy what is there."""
        for number, ours in list(self._ours.items()):
            if number != STDIN:
                if ours in ready:
                    self._show(number, CHUNK_BYTES)
            elif ours in ready:
                self._feed(ours)
            elif STDIN in ready:
                self._read_typed()

    def drain(self) -> None:
        """Copy what was written before the command's end, and no more: something left behind may write for ever."""
        for number, ours in list(self._ours.items()):
            if number == STDIN:
                continue
            count = int.from_bytes(fcntl.ioctl(ours, termios.FIONREAD, bytes(INT_BYTES)), sys.byteorder)
            while count and (copied := self._show(number, min(count, CHUNK_BYTES))):
                count -= copied

    def _show(self, number: int, bytes_max: int) -> int:
        try:
            count = self._copy(number, bytes_max)
        except BlockingIOError:
            return 0
        except OSError as error:
            # The command learns of it as from any pipe that nobody reads. No one misses a terminal that is gone.
            if error.errno != errno.EIO or number in self._files:
                self.failure = error
            count = 0
        if not count:
            self._close(number)
        return count

    def _copy(self, number: int, bytes_max: int) -> int:
        ours = self._ours[number]
        if number in self._spliced:
            try:
                return os.splice(ours, number, bytes_max, flags=os.SPLICE_F_NONBLOCK)
            except OSError as error:
                # A file that is appended to does not take it, nor do some file systems.
                if error.errno != errno.EINVAL:
                    raise
                self._spliced.discard(number)
        data = os.read(ours, bytes_max)
        _write_all(number, data)
        return len(data)

    def _read_typed(self) -> None:
        try:
            self._typed = os.read(STDIN, CHUNK_BYTES)
        except OSError:
            self._typed = b""
        if not self._typed:
            self._close(STDIN)

    def _feed(self, ours: int) -> None:
        # With nothing to write, the pipe is ready only because nobody reads from it any more.
        if not self._typed:
            self._close(STDIN)
            return
        try:
            self._typed = self._typed[os.write(ours, self._typed) :]
        except BlockingIOError:
            return
        except OSError:
            self._close(STDIN)

    def _close(self, number: int) -> None:
        os.close(self._ours.pop(number))


def _write_all(number: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(number, left) :]
        except BlockingIOError:
            # Somebody who shares it with us has made it so.
            poll = select.poll()
            poll.register(number, select.POLLOUT)
            poll.poll()
