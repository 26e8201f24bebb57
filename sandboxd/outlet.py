"""Where the output of one spooled command goes, and where its input comes from.

A command without a terminal writes straight into its spools; the daemon only follows them. A command with a
terminal writes into the terminal, whose other end the daemon holds and copies into one spool, so that any number of
clients may follow it from any byte on, leave, and come back. Init keeps a second copy of that end for the next
daemon: until then nobody copies, and a command that has filled the terminal's buffer waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from typing import Literal

import anyio
import msgspec

from runtimes.model import User
from sandboxd.background import Background
from sandboxd.failures import Conflict, NotFound, Timeout
from sandboxd.spool import Spool, SpoolDirectory
from sandboxd.spool_plan import Stream

OutputName = Literal["stdout", "stderr"]

TERMINAL_READ_BYTES_MAX = 64 * 1024

INPUT_DEADLINE_S = 10.0
"""How long a command may leave its input unread before whoever writes is told."""

_SIZE = struct.Struct("HHHH")
"""Rows, columns, and pixels that nobody uses: ``struct winsize``."""

_STREAM_SETS: tuple[dict[OutputName, Stream], ...] = (
    {"stdout": Stream.OUT, "stderr": Stream.ERR},
    {"stdout": Stream.BOTH},
)
"""Apart, or together: merged output and a terminal are ``stdout`` to the caller."""


class Copied(Enum):
    """What came of a try to copy terminal output."""

    SOME = auto()
    NOTHING = auto()
    """There is none now."""
    OVER = auto()
    """Nobody is left at the other end."""


class Summary(msgspec.Struct, frozen=True):
    """What a command has written."""

    stdout_bytes: int | None
    stderr_bytes: int | None
    truncated: bool


class Outlet:
    """The spools of one command, and its stdin or terminal.

    Args:
        spools: What is kept of its output.
        ended: Set when its main process has ended.
    """

    def __init__(self, spools: Mapping[OutputName, Spool], ended: anyio.Event) -> None:
        self.spools = spools
        self.finished = ended
        """Set when everything that the main process wrote is in the spools."""
        self._ended = ended
        self._input_fd: int | None = None
        self._terminal_writer: int | None = None
        self._pumping = anyio.CancelScope()
        self._summary: Summary | None = None
        self._counting = anyio.Lock()

    def start(self, background: Background, gone: anyio.Event) -> None:
        """Keep the spools bounded for as long as anything of the command is left to write."""
        for spool in self.spools.values():
            background.start(spool.keep_bounded, gone)

    def take_input(self, descriptor: int) -> None:
        """Own the writing end of the command's stdin."""
        os.set_blocking(descriptor, False)
        self._input_fd = descriptor

    def take_terminal(self, master: int, writer: int, background: Background) -> None:
        """Own the terminal's master, and copy what comes out of it into the spool behind ``writer``."""
        self.take_input(master)
        self._terminal_writer = writer
        self.finished = anyio.Event()
        background.start(self._pump)
        background.start(self._finish)

    def close(self) -> None:
        """Let go of everything: a terminal hangs up, a stdin ends. Idempotent."""
        self._pumping.cancel()
        self.close_input()
        if self._terminal_writer is not None:
            os.close(self._terminal_writer)
            self._terminal_writer = None
        for spool in self.spools.values():
            spool.close()

    async def rest(self) -> None:
        """Hold nothing open once nobody is left to write: what is kept can be read all the same.

        The summary is made before, for the spools may be removed at any time from then on.
        """
        await self.finished.wait()
        while self._copy_once() is Copied.SOME:
            pass
        async with self._counting:
            with contextlib.suppress(NotFound):
                self._summary = await self._count()
            self.close()

    # --- output ---------------------------------------------------------------------------------------

    def spool(self, name: OutputName) -> Spool:
        """The spool of one stream.

        Raises:
            NotFound: the command has none of that name.
        """
        spool = self.spools.get(name)
        if spool is None:
            raise NotFound(f"cannot read {name} of this command", detail="it is merged into stdout, or a terminal")
        return spool

    async def summary(self) -> Summary:
        """How much was written, and whether all of it is kept."""
        async with self._counting:
            return self._summary or await self._count()

    async def _count(self) -> Summary:
        stats = {name: await spool.stat() for name, spool in self.spools.items()}
        return Summary(
            stdout_bytes=stats["stdout"].bytes_written,
            stderr_bytes=stats["stderr"].bytes_written if "stderr" in stats else None,
            truncated=any(stat.truncated for stat in stats.values()),
        )

    async def _pump(self) -> None:
        with self._pumping:
            while self._input_fd is not None:
                await anyio.wait_readable(self._input_fd)
                if self._copy_once() is Copied.OVER:
                    break
        self.close_input()

    async def _finish(self) -> None:
        """Copy what the terminal still holds when the main process has ended; then followers need not wait."""
        await self._ended.wait()
        while self._copy_once() is Copied.SOME:
            pass
        self.finished.set()

    def _copy_once(self) -> Copied:
        if self._input_fd is None or self._terminal_writer is None:
            return Copied.OVER
        try:
            data = os.read(self._input_fd, TERMINAL_READ_BYTES_MAX)
        except BlockingIOError:
            return Copied.NOTHING
        except OSError:
            # EIO: the last process has closed the terminal.
            return Copied.OVER
        os.write(self._terminal_writer, data)
        return Copied.SOME if data else Copied.OVER

    @property
    def input_fd(self) -> int | None:
        """The writing end of its stdin, which stays ours; None: it has none that is open, or a terminal."""
        return self._input_fd if self._terminal_writer is None else None

    # --- input ----------------------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """Write all of ``data`` to the command's stdin or terminal.

        Raises:
            Conflict: it has none, or reads no more.
            Timeout: it does not read.
        """
        self._open_input()
        view = memoryview(data)
        with anyio.move_on_after(INPUT_DEADLINE_S):
            while view:
                view = view[self._write_some(view) :]
                if view:
                    await anyio.wait_writable(self._open_input())
            return
        raise Timeout("cannot write to the command", detail=f"it has not read its input for {INPUT_DEADLINE_S:g} s")

    def _write_some(self, view: memoryview) -> int:
        try:
            return os.write(self._open_input(), view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Conflict("cannot write to the command", detail=error.strerror or "", hint="it has ended") from None

    def _open_input(self) -> int:
        if self._input_fd is None:
            raise Conflict(
                "cannot write to the command",
                detail="it has no open stdin",
                hint='start it with stdin "pipe" or a pty: sandboxctl exec -di SANDBOX COMMAND, or -dt',
            )
        return self._input_fd

    def close_input(self) -> None:
        """End the command's stdin. A terminal is hung up. Idempotent."""
        descriptor, self._input_fd = self._input_fd, None
        if descriptor is not None:
            os.close(descriptor)

    def end_input(self) -> None:
        """Let the command read end of file: what its caller asks for, and what a terminal says with Ctrl-D.

        Raises:
            Conflict: it has no open stdin.
        """
        if self._terminal_writer is not None:
            os.write(self._open_input(), b"\x04")
        else:
            self._open_input()
            self.close_input()

    def resize(self, rows: int, cols: int) -> bool:
        """Change the terminal's size; the kernel sends SIGWINCH then. Returns whether it was another size.

        Raises:
            Conflict: it has no terminal.
        """
        if self._terminal_writer is None:
            raise Conflict("cannot resize", detail="the command has no terminal", hint="start it with a pty")
        master = self._open_input()
        before = _SIZE.unpack(fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(_SIZE.size)))
        fcntl.ioctl(master, termios.TIOCSWINSZ, _SIZE.pack(rows, cols, 0, 0))
        return before[:2] != (rows, cols)


class Opening(msgspec.Struct):
    """What a command is about to be started with."""

    outlet: Outlet
    passed: tuple[int, ...]
    """stdin, stdout and stderr; none with a terminal."""
    terminal_writer: int | None
    """With a terminal: where its output is copied to. Whoever takes it sets None."""


@contextlib.contextmanager
def opening(
    directory: SpoolDirectory,
    command_id: int,
    *,
    ended: anyio.Event,
    user: User,
    merge: bool,
    stdin: bool,
    pty: bool,
) -> Iterator[Opening]:
    """Make spools and stdin for a command. Closes what was passed on at the end, and everything on an error.

    The spools belong to whoever runs inside, where we may give them away: a script that opens /dev/stderr opens them.
    """
    with contextlib.ExitStack() as passed, contextlib.ExitStack() as kept:
        spools: dict[OutputName, Spool] = {}
        writers: list[int] = []
        for name, stream in _STREAM_SETS[merge or pty].items():
            spools[name], writer = directory.create(command_id, stream)
            kept.callback(spools[name].close)
            passed.callback(os.close, writer)
            if os.geteuid() == 0:
                os.fchown(writer, user.uid, user.gid)
            writers.append(writer)
        outlet = Outlet(spools, ended)
        kept.callback(outlet.close)
        opened = Opening(outlet=outlet, passed=(), terminal_writer=None)
        if pty:
            opened.terminal_writer = os.dup(writers[0])
        else:
            opened.passed = (_open_stdin(outlet, passed, piped=stdin), writers[0], writers[-1])
        try:
            yield opened
        except BaseException:
            if opened.terminal_writer is not None:
                os.close(opened.terminal_writer)
            raise
        kept.pop_all()


def _open_stdin(outlet: Outlet, passed: contextlib.ExitStack, *, piped: bool) -> int:
    if piped:
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        outlet.take_input(write_fd)
    else:
        read_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    passed.callback(os.close, read_fd)
    return read_fd


def reopened(directory: SpoolDirectory, command_id: int, streams: Sequence[str], ended: anyio.Event) -> Outlet:
    """The outlet of a command that a former daemon started; its stdin, if it had one, has ended.

    Raises:
        NotFound: its spools are gone.
    """
    with contextlib.ExitStack() as undo:
        spools: dict[OutputName, Spool] = {}
        for name, stream in _STREAM_SETS[Stream.BOTH in streams].items():
            spools[name] = directory.open(command_id, stream)
            undo.callback(spools[name].close)
        undo.pop_all()
    return Outlet(spools, ended)
