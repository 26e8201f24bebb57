"""Our end of a copy between this host and a sandbox: what goes along with the request, and the work beside it.

A file is handed over as it is. A tree goes through a pipe, whose other end a thread of ours packs or unpacks. What
the host itself has against it is an ``OSError``, as of any other use of its files.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd.client.errors import InvalidArgumentException, SandboxException
from sandboxd.client.file_model import UTF8_OR_BYTES
from sandboxd.client.trees import NewFile, Packer, Unpacker, umask
from sandboxd.streams import EndedEarly, Incoming, Outgoing, Patience, Skips, Stopped, Tally
from sandboxd.tarstream import TarError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Path = str | os.PathLike[str]

_NOT_OURS = (BrokenPipeError, ConnectionError, EndedEarly, Stopped)
"""What only says that the other end had to give up."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was left out, and why. The path is that in the tree."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class TransferInfo:
    """What was moved."""

    entries: int
    bytes: int
    skipped: list[Skipped]
    """The first hundred of each end."""
    skipped_count: int


class End:
    """One end of a copy.

    Args:
        descriptor: Goes along with the request. Ours to close.
        params: Of the request.
        own: The other end of the pipe, for the work.
        work: Takes ``own`` over, and returns when all has passed, or soon after the order to stop.
    """

    def __init__(
        self,
        descriptor: int,
        params: Mapping[str, Any],
        own: int | None = None,
        work: Callable[[int, Patience, Skips], None] | None = None,
    ) -> None:
        self.params = params
        self.descriptor = descriptor
        self.skips = Skips()
        self.place: Callable[[], None] | None = None
        """What is left to do when all has come."""
        self._own = own
        self._work = work
        self._patience = Patience(None)
        self._error: Exception | None = None

    def work(self) -> None:
        """For a thread, once. What goes wrong is told by ``check``."""
        own, self._own = self._own, None
        if own is None or self._work is None:
            return
        try:
            self._work(own, self._patience, self.skips)
        except Exception as error:  # noqa: BLE001 - told to who waits
            self._error = error

    def stop(self) -> None:
        """Have the work end soon. Idempotent."""
        self._patience.stop()

    def leave(self) -> None:
        """Close our copy of what was sent: from now on the work ends with the daemon's. Idempotent."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def check(self, failure: Exception | None) -> None:
        """Raise what went wrong, when the work has ended: here first, for the daemon only hears of an early end.

        Raises:
            OSError: A file of this host cannot be read or written.
            SandboxException: The daemon's failure, or the stream was none, or was cut off.
        """
        if isinstance(self._error, TarError):
            raise SandboxException("cannot unpack what the sandbox sent", str(self._error)) from self._error
        if self._error is not None and not isinstance(self._error, _NOT_OURS):
            raise self._error
        if failure is not None:
            raise failure
        if self._error is not None:
            raise SandboxException("cannot copy", "the stream ended before all had come") from self._error
        if self.place is not None:
            self.place()

    def close(self) -> None:
        """When the work has ended, or never began."""
        self.leave()
        if self._own is not None:
            os.close(self._own)
        self._patience.close()


@contextlib.contextmanager
def closed_by_us(descriptor: int) -> Iterator[int]:
    """A descriptor that is closed unless all goes well."""
    try:
        yield descriptor
    except BaseException:
        os.close(descriptor)
        raise


def uploading(source: Path, *, exact: bool) -> End:
    """Our end of an upload of a file or of what is in a directory.

    Raises:
        InvalidArgumentException: It is something else.
        OSError: It cannot be read.
    """
    path = os.fsencode(source)
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):

        def pack(own: int, patience: Patience, skips: Skips) -> None:
            with contextlib.closing(Outgoing(own, patience, tally := Tally())) as outgoing:
                Packer(outgoing, tally, skips).run(path, b".", follow=True)

        theirs, own = os.pipe2(os.O_CLOEXEC)
        return End(theirs, {"form": "tar", "keep_times": exact}, own, pack)
    _require_file(source, regular=stat.S_ISREG(status.st_mode))
    with closed_by_us(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)) as descriptor:
        status = os.fstat(descriptor)
        _require_file(source, regular=stat.S_ISREG(status.st_mode))
        params: dict[str, Any] = {"form": "file", "mode": stat.S_IMODE(status.st_mode) & 0o777}
        if exact:
            params["mtime_ns"] = status.st_mtime_ns
        return End(descriptor, params)


def downloading(target: Path, info: Mapping[str, Any], *, exact: bool) -> End:
    """Our end of a download of what a ``files/stat`` told of. The directories above ``target`` are made.

    Raises:
        InvalidArgumentException: It is neither a file nor a directory.
        OSError: It cannot be written.
    """
    path = os.fsencode(target)
    if info["type"] == "dir":
        os.makedirs(path, exist_ok=True)
        with closed_by_us(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:

            def unpack(own: int, patience: Patience, skips: Skips) -> None:
                tally = Tally()
                with contextlib.closing(Incoming(own, patience, tally)) as incoming:
                    Unpacker(directory, exact=exact, tally=tally, skips=skips).run(incoming)

            own, theirs = os.pipe2(os.O_CLOEXEC)
            return _Download(theirs, {"form": "tar", "name": "Lg==", "follow": True}, own, unpack, directory)
    _require_file(info["path"], regular=info["type"] == "file")
    parent, name = os.path.split(path)
    os.makedirs(parent or b".", exist_ok=True)
    with closed_by_us(os.open(parent or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
        new = NewFile(directory)
        end = _Download(os.dup(new.descriptor), {"form": "file", "follow": True}, None, None, directory, new)

        def place() -> None:
            mode = info["mode"] & 0o777
            new.finish(mode if exact else mode & ~umask(), info["mtime_ns"] if exact else None)
            new.place(name)

        end.place = place
        return end


class _Download(End):
    """Has a directory of the host open, and perhaps a file without a name in it."""

    def __init__(
        self,
        descriptor: int,
        params: Mapping[str, Any],
        own: int | None,
        work: Callable[[int, Patience, Skips], None] | None,
        directory: int,
        new: NewFile | None = None,
    ) -> None:
        super().__init__(descriptor, params, own, work)
        self._directory = directory
        self._new = new

    def close(self) -> None:
        super().close()
        if self._new is not None:
            self._new.close()
        os.close(self._directory)


def transfer_info(reply: Mapping[str, Any], end: End) -> TransferInfo:
    """Read a ``FileTransfer``, and add what was left out here."""
    skipped = [Skipped(row["path"], row["reason"]) for row in reply["skipped"]]
    skipped += [Skipped(path.decode(*UTF8_OR_BYTES), reason) for path, reason in end.skips.listed]
    return TransferInfo(reply["entries"], reply["bytes"], skipped, reply["skipped_count"] + end.skips.count)


def _require_file(path: Path, *, regular: bool) -> None:
    if not regular:
        raise InvalidArgumentException(f"cannot copy {os.fspath(path)!r}", "it is neither a file nor a directory")
