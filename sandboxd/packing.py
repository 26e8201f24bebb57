"""From a sandbox into an archive, by one thread and one file worker.

Only regular files are read, by descriptors that the worker opened; what else there is becomes an entry without data,
or is skipped and told of. The tree may change meanwhile. A file has the size in the archive that it had when it was
opened: what it grows by is left out, and what it loses is made up for with zeros and told of.
"""

from __future__ import annotations

import os
from functools import partial

from runtimes.init import files_wire as wire
from runtimes.init.file_pipeline import FilePipeline, taken_file
from runtimes.init.file_worker import FileRefused
from runtimes.init.files_wire import (
    DEPTH_MAX,
    Entry,
    Facts,
    FileRefusal,
    FilesReply,
    FileType,
    Flag,
    InvalidPath,
    OpenReply,
    PageReply,
    StatReply,
)
from sandboxd import tarstream
from sandboxd.failures import CapacityExceeded
from sandboxd.streams import Outgoing, Patience, Skips, Tally
from sandboxd.tarstream import Member, padding_of
from sandboxd.unpacking import Bounds, check_bytes, count_entry, reason_of

SECOND_NAMES_MAX = 100_000
"""Files with several names that are known as the same one; those beyond are packed anew for each name."""

ROOT = b"."

_WHAT = {
    FileType.FIFO: "it is a FIFO",
    FileType.SOCKET: "it is a socket",
    FileType.CHARACTER_DEVICE: "it is a character device",
    FileType.BLOCK_DEVICE: "it is a block device",
}


class Packing:
    """One tree, or one file, on its way out of a sandbox.

    Args:
        pipeline: The worker.
        base: Where relative paths start.
        bounds: What may be sent.
        tally: Counts.
    """

    def __init__(
        self, pipeline: FilePipeline, *, base: bytes, bounds: Bounds, tally: Tally, patience: Patience
    ) -> None:
        self._pipeline = pipeline
        self._base = base
        self._bounds = bounds
        self._tally = tally
        self._patience = patience
        self._promised_bytes = 0
        self._first_names: dict[tuple[int, int], bytes] = {}
        self._deeper: list[bytes] = []
        self._outgoing: Outgoing
        self.skips = Skips()

    def run(self, outgoing: Outgoing, path: bytes, name: bytes | None, *, follow: bool) -> None:
        """Send an archive of what is at ``path``, under the name ``name``, or the last of its path.

        Raises:
            FileRefused: There is nothing, or something that cannot be sent.
        """
        self._outgoing = outgoing
        flags = Flag.FOLLOW if follow else Flag.NONE
        reply, _ = self._pipeline.ask(partial(wire.encode_stat, flags=flags, base=self._base, path=path))
        if not isinstance(reply, StatReply):
            raise _refused(reply, path)
        name = own_name(path) if name is None else name
        if reply.facts.type is FileType.DIRECTORY:
            self._add_directory(name, reply.facts)
            self._tree(path, name, flags)
            while self._deeper:
                below = self._deeper.pop()
                below_name = name + below[len(path.rstrip(b"/")) :]
                try:
                    self._tree(below, below_name, Flag.NONE)
                except FileRefused as error:
                    self.skips.add(below_name, os.strerror(error.errno).lower())
        else:
            self._add(Entry(b"", reply.facts, reply.target, 0, 0), path, name, flags)
        self._pipeline.settle()
        outgoing.write(tarstream.END)
        outgoing.flush()

    def _tree(self, path: bytes, name: bytes, flags: Flag) -> None:
        encode = partial(wire.encode_list, flags=flags, base=self._base, depth=DEPTH_MAX, watch=0, path=path)
        reply, _ = self._pipeline.ask(encode)
        root = True
        while True:
            if not isinstance(reply, PageReply):
                raise _refused(reply, path)
            for entry in reply.entries[1:] if root else reply.entries:
                self._add(entry, path.rstrip(b"/") + b"/" + entry.path, name + b"/" + entry.path, Flag.NONE)
            root = False
            if reply.token is None:
                break
            reply, _ = self._pipeline.ask(partial(wire.encode_list_next, token=reply.token))
        if reply.cut:
            self.skips.add(name, "it has names that are too long, or could not be read to its end")

    def _add(self, entry: Entry, path: bytes, name: bytes, flags: Flag) -> None:
        self._patience.check()
        facts = entry.facts
        if entry.errno and facts.type is not FileType.DIRECTORY:
            self.skips.add(name, reason_of(FileRefusal(entry.errno, FileType.UNKNOWN)))
            return
        match facts.type:
            case FileType.DIRECTORY:
                self._add_directory(name, facts)
                if entry.errno:
                    self.skips.add(name + b"/", reason_of(FileRefusal(entry.errno, FileType.UNKNOWN)))
                elif entry.path.count(b"/") == DEPTH_MAX - 1:
                    self._deeper.append(path)
            case FileType.SYMLINK:
                self._add_link(name, entry)
            case FileType.FILE:
                self._add_file(name, path, flags)
            case _:
                self.skips.add(name, _WHAT.get(facts.type, "it is of a type that nobody knows"))

    def _add_directory(self, name: bytes, facts: Facts) -> None:
        count_entry(self._tally, self._bounds)
        self._outgoing.write(
            tarstream.header_of(Member(name, tarstream.DIRECTORY, mode=facts.mode, mtime_ns=facts.mtime_ns))
        )

    def _add_link(self, name: bytes, entry: Entry) -> None:
        count_entry(self._tally, self._bounds)
        facts = entry.facts
        self._outgoing.write(
            tarstream.header_of(
                Member(name, tarstream.SYMLINK, mode=0o777, mtime_ns=facts.mtime_ns, target=entry.target)
            )
        )

    def _add_file(self, name: bytes, path: bytes, flags: Flag) -> None:
        encode = partial(wire.encode_open, flags=flags | Flag.READ, base=self._base, mode=0, path=path)
        try:
            self._pipeline.send(encode, partial(self._send_file, name))
        except InvalidPath as error:
            self.skips.add(name, str(error))

    def _send_file(self, name: bytes, reply: FilesReply, received: list[int]) -> None:
        if not isinstance(reply, OpenReply):
            if isinstance(reply, FileRefusal):
                self.skips.add(name, reason_of(reply))
            return
        descriptor = taken_file(received, write=False)
        try:
            self._send_opened(name, reply.facts, descriptor)
        finally:
            os.close(descriptor)

    def _send_opened(self, name: bytes, facts: Facts, descriptor: int) -> None:
        count_entry(self._tally, self._bounds)
        identity = (facts.device, facts.inode)
        if facts.nlink > 1:
            first = self._first_names.get(identity)
            if first is not None:
                member = Member(name, tarstream.HARDLINK, mode=facts.mode, mtime_ns=facts.mtime_ns, target=first)
                self._outgoing.write(tarstream.header_of(member))
                return
            if len(self._first_names) < SECOND_NAMES_MAX:
                self._first_names[identity] = name
        self._promised_bytes += facts.size
        self._check(name)
        member = Member(name, tarstream.FILE, mode=facts.mode, mtime_ns=facts.mtime_ns, size=facts.size)
        self._outgoing.write(tarstream.header_of(member))
        sent = self._outgoing.copy_from(descriptor, facts.size)
        if sent < facts.size:
            self.skips.add(name, f"it was cut short while it was read: {facts.size - sent} bytes of it are zeros")
            self._outgoing.fill(facts.size - sent)
        self._outgoing.fill(padding_of(facts.size))

    def _check(self, name: bytes) -> None:
        try:
            check_bytes(self._promised_bytes, self._bounds)
        except CapacityExceeded as error:
            shown = name.decode(errors="backslashreplace")
            raise CapacityExceeded(error.brief, detail=f"{shown!r} is one too many", hint=error.hint) from None


def own_name(path: bytes) -> bytes:
    """The last name of a path, or what stands for it."""
    name = path.rstrip(b"/").rpartition(b"/")[2]
    return ROOT if name in (b"", b".", b"..") else name


def _refused(reply: FilesReply, path: bytes) -> FileRefused:
    assert isinstance(reply, FileRefusal)
    return FileRefused(reply.errno, reply.type, path)
