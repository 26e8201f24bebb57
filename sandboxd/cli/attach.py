"""A command that is attached to the caller: its descriptors or its terminal, its signals, its end.

Without a terminal the command gets the caller's own stdin, stdout and stderr, and nothing is left to do but to
forward signals and wait; only where one of them is a terminal or a file it gets a pipe instead, see ``standins``.
With one, the terminal's master comes back, and bytes are moved between it and the caller's terminal, which is in raw
mode meanwhile and restored whatever happens.

Signals arrive as bytes in a pipe, so that one poll waits for everything and no handler interrupts a half-read reply.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time

from sandboxd.cli import wire
from sandboxd.client import RpcError, result_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping
    from typing import Any

    from sandboxd.cli.standins import StandIns
    from sandboxd.client import Connection, Message
else:
    try:
        # ``signal`` is 3 ms of ``enum`` around it.
        import _signal as signal
    except ImportError:
        import signal

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

FORCE_WINDOW_S = 1.0
"""A second Ctrl-C within this time kills the command's whole tree."""

DRAIN_MS = 100
"""How long the terminal may stay silent, after the command's end, before we take it that all was said. Usually the
kernel hangs the terminal up at once, and there is nothing to wait for."""

CHUNK_BYTES = 64 * 1024
WINDOW_SIZE_BYTES = 8
DEFAULT_ROWS, DEFAULT_COLS = 24, 80
NULL_DEVICE = os.makedev(1, 3)


class Attached:
    """One attached command.

    Args:
        tty: Give it a terminal. Our stdin must be one then.
        interactive: Hand over our stdin.
    """

    def __init__(self, connection: Connection, *, tty: bool, interactive: bool) -> None:
        self._connection = connection
        self._tty = tty
        self._interactive = interactive
        self._request_id = 0
        self._command_id: str | None = None
        self._sandbox = ""
        self._master = -1
        self._standins: StandIns | None = None
        self._typed = b""
        self._typing = tty and interactive
        self._held_signal: int | None = None
        self._interrupted_at = float("-inf")

    def run(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Run a command to its end and return the end record.

        Args:
            fields: Of ``commands/run``, without those about stdio.

        Raises:
            RpcError: It did not run, or nobody knows how it ended.
            SystemExit: A signal ended us, because the command does not start, or has our terminal.
        """
        self._sandbox = fields["sandbox"]
        signals, restore_signals = catch_signals(FORWARDED + ((signal.SIGWINCH,) if self._tty else ()))
        restore_terminal = make_raw(0) if self._typing else nothing
        try:
            self._send(fields)
            reply = self._wait(signals)
            if self._master >= 0:
                self._drain()
            if self._standins is not None:
                self._standins.drain()
            result = result_of(reply)
            if self._standins is not None and self._standins.failure is not None:
                raise RpcError(0, "internal", "cannot write", self._standins.failure.strerror or "")
            return result
        finally:
            restore_terminal()
            restore_signals()
            if self._master >= 0:
                os.close(self._master)
            if self._standins is not None:
                self._standins.close()

    def _send(self, fields: dict[str, Any]) -> None:
        if self._tty:
            rows, cols = terminal_size()
            params = wire.build("commands/run", **fields, pty={"rows": rows, "cols": cols})
            self._request_id = self._connection.send("commands/run", params)
            return
        params = wire.build("commands/run", **fields, stdio="descriptors")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        given = {0: 0 if self._interactive else null, 1: 1, 2: 2}
        try:
            kept = [number for number in given.values() if number != null and not _may_be_handed_over(number)]
            if kept:
                from sandboxd.cli.standins import StandIns

                self._standins = StandIns(kept)
                given.update(self._standins.theirs)
            self._request_id = self._connection.send("commands/run", params, (given[0], given[1], given[2]))
        finally:
            os.close(null)
            if self._standins is not None:
                self._standins.close_theirs()

    def _wait(self, signals: int) -> dict[str, Any]:
        """Move bytes and signals until the reply is there."""
        while True:
            poll = select.poll()
            poll.register(self._connection.fileno(), select.POLLIN)
            poll.register(signals, select.POLLIN)
            self._register(poll)
            ready = dict(poll.poll())
            if signals in ready:
                for number in os.read(signals, CHUNK_BYTES):
                    self._take_signal(number)
            self._serve(ready)
            if self._connection.fileno() in ready:
                for message in self._connection.read():
                    self._take_message(message)
                reply = self._connection.take_reply(self._request_id)
                if reply is not None:
                    return reply

    def _register(self, poll: select.poll) -> None:
        if self._standins is not None:
            self._standins.register(poll)
        if self._master >= 0:
            poll.register(self._master, select.POLLIN | (select.POLLOUT if self._typed else 0))
            if self._typing and not self._typed:
                poll.register(0, select.POLLIN)

    def _serve(self, ready: Mapping[int, int]) -> None:
        if self._standins is not None:
            self._standins.serve(ready)
        elif 0 in ready:
            self._read_typed()
        if self._master in ready:
            self._serve_master(ready[self._master])

    def _take_message(self, message: Message) -> None:
        if "method" not in message.content:
            self._connection.keep(message)
        elif message.content["method"] == "commands/started":
            self._command_id = message.content["params"]["command_id"]
            if self._held_signal is not None:
                self._forward(self._held_signal)
            if self._tty:
                for master in self._connection.take_descriptors(message, 1):
                    os.set_blocking(master, False)
                    self._master = master
                    # The window may have changed while the command was being started.
                    self._resize()

    # --- the terminal

    def _read_typed(self) -> None:
        try:
            self._typed = os.read(0, CHUNK_BYTES)
        except OSError:
            self._typed = b""
        self._typing = bool(self._typed)

    def _serve_master(self, events: int) -> None:
        if events & select.POLLOUT and self._typed:
            try:
                self._typed = self._typed[os.write(self._master, self._typed) :]
            except BlockingIOError:
                pass
            except OSError:
                self._typed = b""
        if events & ~select.POLLOUT and not self._show():
            os.close(self._master)
            self._master = -1

    def _show(self) -> bool:
        """Show one portion of what the command wrote. False: its side of the terminal is closed for good."""
        try:
            data = os.read(self._master, CHUNK_BYTES)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        while data:
            data = data[os.write(1, data) :]
        return True

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        while poll.poll(DRAIN_MS) and self._show():
            pass

    def _resize(self) -> None:
        import fcntl
        import termios

        if self._master >= 0:
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(WINDOW_SIZE_BYTES))
            fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    # --- signals

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number not in FORWARDED:
            return
        elif self._tty and number in (signal.SIGTERM, signal.SIGHUP):
            # An interactive shell would ignore it. The daemon ends the command when we are gone.
            raise SystemExit(128 + number)
        elif self._command_id is None and self._held_signal is None:
            # It may run already, and the word of it be on its way: the signal is for the command then.
            self._held_signal = number
        elif self._command_id is None:
            self._connection.cancel(self._request_id)
            raise SystemExit(128 + number)
        else:
            self._forward(number)

    def _forward(self, number: int) -> None:
        scope = "group"
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._interrupted_at < FORCE_WINDOW_S:
                number, scope = signal.SIGKILL, "tree"
            self._interrupted_at = now
        params = wire.build(
            "commands/signal",
            sandbox=self._sandbox,
            command_id=self._command_id,
            signal=int(number),
            scope=scope,
        )
        self._connection.send("commands/signal", params)


def _may_be_handed_over(number: int) -> bool:
    """Whether a descriptor of ours is one of those with which nothing but reading and writing can be done inside."""
    found = os.fstat(number)
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == NULL_DEVICE
    return stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode)


def nothing() -> None:
    """Restore what was not changed."""


def catch_signals(numbers: tuple[int, ...]) -> tuple[int, Callable[[], None]]:
    """Have these signals arrive as bytes in a pipe; return its read end, and what undoes it.

    What the caller of this program has set to be ignored, as nohup does, stays ignored.
    """
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    previous = {
        number: signal.signal(number, lambda _number, _frame: None)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN
    }

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(read_end)
        os.close(write_end)

    return read_end, restore


def make_raw(terminal: int) -> Callable[[], None]:
    """Pass every key through; return what undoes it."""
    import termios

    before = termios.tcgetattr(terminal)
    raw = termios.tcgetattr(terminal)
    raw[0] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    raw[1] &= ~termios.OPOST
    raw[2] = (raw[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
    raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    termios.tcsetattr(terminal, termios.TCSADRAIN, raw)

    def restore() -> None:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    return restore


def terminal_size() -> tuple[int, int]:
    """Rows and columns of the terminal at stdin; what is usual where there is none."""
    try:
        cols, rows = os.get_terminal_size(0)
    except OSError:
        return DEFAULT_ROWS, DEFAULT_COLS
    return rows or DEFAULT_ROWS, cols or DEFAULT_COLS
