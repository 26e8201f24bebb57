"""Pipes that stand in for the caller's terminal.

A sandbox without a terminal of its own never gets the caller's: a process that is left behind inside could read keys
from it, change its settings, and write to it when we are long gone. So where stdin, stdout or stderr is a terminal,
the command gets a pipe, and bytes are copied between the two for as long as we live.
"""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CHUNK_BYTES = 64 * 1024
INT_BYTES = 4
STDIN = 0


class StandIns:
    """One pipe for each of our descriptors that is a terminal.

    Args:
        terminals: Their numbers: some of 0, 1 and 2.
    """

    def __init__(self, terminals: Iterable[int]) -> None:
        self.theirs: dict[int, int] = {}
        """The ends that the command gets, by the numbers that they have there."""
        self._ours: dict[int, int] = {}
        self._typed = b""
        for number in terminals:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            ours, self.theirs[number] = (write_end, read_end) if number == STDIN else (read_end, write_end)
            os.set_blocking(ours, False)
            self._ours[number] = ours

    def close_theirs(self) -> None:
        """Once the command has its ends: else no pipe would ever come to its end. Idempotent."""
        while self.theirs:
            os.close(self.theirs.popitem()[1])

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
        import fcntl
        import sys
        import termios

        for number, ours in list(self._ours.items()):
            if number == STDIN:
                continue
            count = int.from_bytes(fcntl.ioctl(ours, termios.FIONREAD, bytes(INT_BYTES)), sys.byteorder)
            while count and (copied := self._show(number, min(count, CHUNK_BYTES))):
                count -= copied

    def _show(self, number: int, bytes_max: int) -> int:
        try:
            data = os.read(self._ours[number], bytes_max)
            left = data
            while left:
                left = left[os.write(number, left) :]
        except BlockingIOError:
            return 0
        except OSError:
            # The terminal is gone. The command learns of it as from any pipe that nobody reads.
            data = b""
        if not data:
            self._close(number)
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
        written = 0
        try:
            written = os.write(ours, self._typed)
        except BlockingIOError:
            return
        except OSError:
            self._typed = b""
        if not self._typed:
            self._close(STDIN)
        self._typed = self._typed[written:]

    def _close(self, number: int) -> None:
        os.close(self._ours.pop(number))
