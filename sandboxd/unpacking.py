"""From an archive into a sandbox, by one thread and one file worker.

The worker resolves every path inside, as the sandbox's user, so an archive can do there what a command could do. What
it must not do beyond that is leave the directory that it is unpacked into by means of its own: names that lead
elsewhere are skipped, and so is what would go through a link that came with it.

Files appear whole or not at all. Small ones are written while the worker is busy with the next ones. An entry that
cannot be made is skipped and told of; a full disk ends the whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial

import msgspec

from runtimes.init import files_wire as wire
from runtimes.init.file_pipeline import FilePipeline, taken_file
from runtimes.init.file_worker import FileRefused
from runtimes.init.files_wire import FileRefusal, FilesReply, FileType, Flag, InvalidPath, MadeReply, TempReply
from sandboxd import tarstream
from sandboxd.failures import CapacityExceeded
from sandboxd.streams import Incoming, Patience, Skips, Tally, write_all
from sandboxd.tarstream import Member, padding_of

HELD_BYTES_MAX = 128 * 1024
"""Files up to this size are held in memory while they wait for the worker; larger ones go by descriptor."""

REMEMBERED_BYTES_MAX = 32 * 1024 * 1024
"""Of the names of links and directories that must be known until the end."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EUSERS, errno.EIO, errno.EROFS)
"""What one entry meets, all that follow meet too."""

_DIRECTORY_RIGHTS = 0o700
"""What a directory needs while something is made in it."""


class Bounds(msgspec.Struct, frozen=True):
    """What one transfer may move."""

    bytes_max: int
    entries_max: int


def count_entry(tally: Tally, bounds: Bounds) -> None:
    """One more entry.

    Raises:
        CapacityExceeded: It is one too many.
    """
    tally.entries += 1
    if tally.entries > bounds.entries_max:
        raise CapacityExceeded(
            f"cannot move more than {bounds.entries_max} entries at once", hint="raise --entries-max, or move parts"
        )


def check_bytes(moved: int, bounds: Bounds) -> None:
    """Refuse what is more than may be moved.

    Raises:
        CapacityExceeded: It is.
    """
    if moved > bounds.bytes_max:
        raise CapacityExceeded(
            f"cannot move more than {bounds.bytes_max} bytes at once", hint="raise --bytes-max, or move parts"
        )


class _Directory(msgspec.Struct, frozen=True):
    path: bytes
    mode: int | None
    mtime_ns: int | None


class Unpacking:
    """One archive on its way into a sandbox.

    Args:
        pipeline: The worker.
        base: Where relative paths start.
        root: The directory to unpack into. It must be there.
        keep_times: Give what is made the times that the archive tells.
        bounds: What the archive may hold.
        tally: Counts.
    """

    def __init__(
        self,
        pipeline: FilePipeline,
        *,
        base: bytes,
        root: bytes,
        keep_times: bool,
        bounds: Bounds,
        tally: Tally,
        patience: Patience,
    ) -> None:
        self._pipeline = pipeline
        self._base = base
        self._root = root.rstrip(b"/") + b"/"
        self._keep_times = keep_times
        self._bounds = bounds
        self._tally = tally
        self._patience = patience
        self._promised_bytes = 0
        self._remembered_bytes = 0
        self._links: set[bytes] = set()
        self._directories: list[_Directory] = []
        self.skips = Skips()

    def run(self, incoming: Incoming) -> None:
        """Unpack all of it.

        Raises:
            TarError, EndedEarly: The archive is none, or not whole. What came before stays.
            CapacityExceeded: It holds more than it may, or there is no room.
        """
        while (member := tarstream.next_member(incoming.take)) is not None:
            self._patience.check()
            count_entry(self._tally, self._bounds)
            self._promised_bytes += member.size
            check_bytes(self._promised_bytes, self._bounds)
            if not self._take(member, incoming):
                incoming.discard(member.size)
            incoming.discard(padding_of(member.size))
        incoming.read_trailer()
        self._pipeline.settle()
        for directory in reversed(self._directories):
            self._finish_directory(directory)
        self._pipeline.settle()

    def _take(self, member: Member, incoming: Incoming) -> bool:
        """Whether the entry's data were taken from the stream."""
        steps = tarstream.steps_of(member.name)
        reason = self._reason_against(member, steps)
        if reason or steps is None:
            self.skips.add(member.name, reason)
            return False
        if not steps:
            return False
        path = self._root + b"/".join(steps)
        try:
            if member.kind == tarstream.FILE:
                return self._file(path, member, incoming)
            if member.kind == tarstream.DIRECTORY:
                self._directory(path, member)
            elif member.kind == tarstream.SYMLINK:
                self._remember(path)
                self._links.add(b"/".join(steps))
                self._symlink(path, member)
            else:
                self._copy(path, member)
        except InvalidPath as error:
            self.skips.add(member.name, str(error))
        return False

    def _reason_against(self, member: Member, steps: list[bytes] | None) -> str:
        if steps is None:
            return "its name leads elsewhere, or is too long"
        if member.kind == tarstream.OTHER:
            return f"it is {member.what}"
        if not steps and member.kind != tarstream.DIRECTORY:
            return "it has no name"
        if self._goes_through_link(steps if member.kind == tarstream.DIRECTORY else steps[:-1]):
            return "it would go through a link that came with the archive"
        if member.kind == tarstream.HARDLINK:
            source = tarstream.steps_of(member.target)
            if not source or self._goes_through_link(source):
                return "it is a second name of something that the archive cannot mean"
        return ""

    def _goes_through_link(self, steps: list[bytes]) -> bool:
        return bool(self._links) and any(b"/".join(steps[:end]) in self._links for end in range(1, len(steps) + 1))

    def _remember(self, path: bytes) -> None:
        self._remembered_bytes += len(path) + 100
        if self._remembered_bytes > REMEMBERED_BYTES_MAX:
            raise CapacityExceeded(
                "cannot unpack this archive", detail="it has too many links and directories", hint="move parts of it"
            )

    # --- files

    def _file(self, path: bytes, member: Member, incoming: Incoming) -> bool:
        mode = member.mode & 0o777
        encode = partial(wire.encode_temp, flags=Flag.PARENTS, base=self._base, mode=mode, path=path)
        if member.size <= HELD_BYTES_MAX:
            encode(1)
            data = incoming.take(member.size)
            self._pipeline.send(encode, partial(self._write_held, path, member, data))
            return True
        reply, received = self._pipeline.ask(encode)
        if not isinstance(reply, TempReply):
            self._note_refusal(path, reply)
            return False
        descriptor = taken_file(received, write=True)
        try:
            incoming.copy_to(descriptor, member.size)
            timed = self._set_time_of(descriptor, member)
        finally:
            os.close(descriptor)
        self._commit(path, reply.token, None if timed else member)
        return True

    def _write_held(self, path: bytes, member: Member, data: bytes, reply: FilesReply, received: list[int]) -> None:
        if not isinstance(reply, TempReply):
            self._note_refusal(path, reply)
            return
        descriptor = taken_file(received, write=True)
        try:
            write_all(descriptor, data)
            timed = self._set_time_of(descriptor, member)
        finally:
            os.close(descriptor)
        self._tally.bytes += len(data)
        self._commit(path, reply.token, None if timed else member)

    def _set_time_of(self, descriptor: int, member: Member) -> bool:
        """Whether nothing is left to do. It is not ours to do where the file belongs to another user."""
        if not self._keep_times:
            return True
        try:
            os.utime(descriptor, ns=(member.mtime_ns, member.mtime_ns))
        except (OSError, OverflowError):
            return False
        return True

    def _commit(self, path: bytes, token: int, untimed: Member | None) -> None:
        def committed(reply: FilesReply, _: list[int]) -> None:
            if isinstance(reply, FileRefusal):
                self._note_refusal(path, reply)
            elif untimed is not None:
                self._set_times(path, untimed.mtime_ns)

        self._pipeline.send(partial(wire.encode_commit, flags=Flag.NONE, token=token), committed)

    def _copy(self, path: bytes, member: Member) -> None:
        """A second name of a file becomes a copy of it: its content, and not what happens to either later."""
        first = self._root + b"/".join(tarstream.steps_of(member.target) or [])
        ask = self._pipeline.ask
        self._pipeline.settle()  # the first name may not be given yet
        reply, received = ask(partial(wire.encode_open, flags=Flag.READ, base=self._base, mode=0, path=first))
        if isinstance(reply, FileRefusal) or not received:
            self._note_refusal(path, reply)
            return
        original = taken_file(received, write=False)
        try:
            facts = os.fstat(original)
            self._promised_bytes += facts.st_size
            check_bytes(self._promised_bytes, self._bounds)
            mode = facts.st_mode & 0o777
            reply, received = ask(
                partial(wire.encode_temp, flags=Flag.PARENTS, base=self._base, mode=mode, path=path)
            )
            if not isinstance(reply, TempReply):
                self._note_refusal(path, reply)
                return
            descriptor = taken_file(received, write=True)
            try:
                with contextlib.closing(Incoming(os.dup(original), self._patience, self._tally)) as source:
                    source.copy_up_to(descriptor, facts.st_size)
                timed = self._set_time_of(descriptor, member)
            finally:
                os.close(descriptor)
        finally:
            os.close(original)
        self._commit(path, reply.token, None if timed else member)

    # --- what is no file

    def _directory(self, path: bytes, member: Member) -> None:
        mode = member.mode & 0o777
        handicapped = mode & _DIRECTORY_RIGHTS != _DIRECTORY_RIGHTS
        later = _Directory(path, mode if handicapped else None, member.mtime_ns if self._keep_times else None)

        def made(reply: FilesReply, _: list[int]) -> None:
            if not isinstance(reply, MadeReply):
                self._note_refusal(path, reply)
            elif reply.created and (handicapped or self._keep_times):
                self._remember(path)
                self._directories.append(later)

        encode = partial(
            wire.encode_make_dir, flags=Flag.PARENTS, base=self._base, mode=mode | _DIRECTORY_RIGHTS, path=path
        )
        self._pipeline.send(encode, made)

    def _finish_directory(self, directory: _Directory) -> None:
        if directory.mtime_ns is not None:
            self._set_times(directory.path, directory.mtime_ns)
        if directory.mode is not None:
            encode = partial(
                wire.encode_chmod, flags=Flag.NONE, base=self._base, mode=directory.mode, path=directory.path
            )
            self._pipeline.send(encode, partial(self._done, directory.path))

    def _symlink(self, path: bytes, member: Member) -> None:
        encode = partial(wire.encode_symlink, flags=Flag.PARENTS, base=self._base, target=member.target, path=path)

        def linked(reply: FilesReply, received: list[int]) -> None:
            if isinstance(reply, FileRefusal) and reply.errno == errno.EEXIST:
                remove = partial(wire.encode_remove, flags=Flag.NONE, base=self._base, path=path)
                self._pipeline.send(remove, lambda *_: None)
                self._pipeline.send(encode, finished)
            else:
                finished(reply, received)

        def finished(reply: FilesReply, _: list[int]) -> None:
            if isinstance(reply, FileRefusal):
                self._note_refusal(path, reply)
            elif self._keep_times:
                self._set_times(path, member.mtime_ns)

        self._pipeline.settle()  # a file of that name, that came before, must not come after
        self._pipeline.send(encode, linked)

    def _set_times(self, path: bytes, mtime_ns: int) -> None:
        encode = partial(wire.encode_set_times, flags=Flag.NONE, base=self._base, mtime_ns=mtime_ns, path=path)
        self._pipeline.send(encode, partial(self._done, path))

    def _done(self, path: bytes, reply: FilesReply, _: list[int]) -> None:
        if isinstance(reply, FileRefusal):
            self._note_refusal(path, reply)

    def _note_refusal(self, path: bytes, reply: FilesReply) -> None:
        if not isinstance(reply, FileRefusal):
            return
        if reply.errno in _FULL:
            raise FileRefused(reply.errno, reply.type, path)
        self.skips.add(path[len(self._root) :], reason_of(reply))


_IN_THE_WAY = {
    FileType.FIFO: "a FIFO",
    FileType.SOCKET: "a socket",
    FileType.DIRECTORY: "a directory",
    FileType.CHARACTER_DEVICE: "a character device",
    FileType.BLOCK_DEVICE: "a block device",
}


def reason_of(refusal: FileRefusal) -> str:
    """Why something was not done, for people."""
    what = _IN_THE_WAY.get(refusal.type)
    if what is not None and refusal.errno in (errno.ENXIO, errno.EISDIR):
        return f"there is {what}"
    if refusal.errno == errno.EOPNOTSUPP:
        return "it is the kernel's own, and no file of the sandbox"
    text = os.strerror(refusal.errno)
    return text[:1].lower() + text[1:]


def directory_refusal(pipeline: FilePipeline, base: bytes, path: bytes, *, make_parents: bool) -> FileRefusal | None:
    """Make the directory to unpack into, if it is missing. What stands against it, if anything does."""
    flags = Flag.PARENTS if make_parents else Flag.NONE
    reply, _ = pipeline.ask(partial(wire.encode_make_dir, flags=flags, base=base, mode=0o755, path=path))
    if isinstance(reply, FileRefusal) and reply.errno == errno.EEXIST:
        reply, _ = pipeline.ask(partial(wire.encode_stat, flags=Flag.FOLLOW, base=base, path=path))
        if isinstance(reply, wire.StatReply) and reply.facts.type is not FileType.DIRECTORY:
            return FileRefusal(errno.ENOTDIR, reply.facts.type)
    return reply if isinstance(reply, FileRefusal) else None
