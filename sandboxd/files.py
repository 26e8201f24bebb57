"""The files of a sandbox: what the caller asks, made exact, and what the file worker answers, made plain.

Paths are resolved by a process inside, with the rights of the sandbox's own user. Nothing here resolves one.
"""

from __future__ import annotations

import errno
import os
import stat

import anyio.to_thread

from runtimes.init.file_worker import FileRefused
from runtimes.init.files import FilesChannel, TempFile, read_bytes
from runtimes.init.files_wire import Facts, FileType
from sandboxd import protocol
from sandboxd.failures import CapacityExceeded, Conflict, Failure, InvalidArgument, NotFound, Unsupported

NEW_FILE_MODE = 0o644

_TYPES = {
    FileType.FILE: "file",
    FileType.DIRECTORY: "dir",
    FileType.SYMLINK: "symlink",
    FileType.FIFO: "fifo",
    FileType.SOCKET: "socket",
    FileType.CHARACTER_DEVICE: "char",
    FileType.BLOCK_DEVICE: "block",
    FileType.UNKNOWN: "unknown",
}

_BY_ERRNO: dict[int, type[Failure]] = {
    errno.ENOENT: NotFound,
    errno.EINVAL: InvalidArgument,
    errno.ENAMETOOLONG: InvalidArgument,
    errno.EOPNOTSUPP: Unsupported,
    errno.ENOSPC: CapacityExceeded,
    errno.EDQUOT: CapacityExceeded,
    errno.ENOMEM: CapacityExceeded,
}
"""Any other is a conflict with what is there: a directory in the way, a link, a right that is missing."""


def failure_from_refusal(error: FileRefused) -> Failure:
    """The failure that says why it was not done."""
    name = errno.errorcode.get(error.errno, str(error.errno))
    return _BY_ERRNO.get(error.errno, Conflict)(
        str(error).partition(":")[0], detail=f"{name}: {os.strerror(error.errno)}"
    )


def path_of(params: protocol.PathParams) -> bytes:
    """The path as bytes."""
    return params.path.encode() if params.path_bytes is None else params.path_bytes


async def read(files: FilesChannel, params: protocol.FileReadParams) -> protocol.FileContent:
    """Read a part of a regular file. Nothing else is opened: no FIFO, device or endless file."""
    opened = await files.open(path_of(params))
    try:
        data = await read_bytes(opened.descriptor, offset=params.offset, bytes_max=params.length)
    finally:
        os.close(opened.descriptor)
    return protocol.FileContent(data=data, size_bytes=opened.facts.size)


async def write(files: FilesChannel, params: protocol.FileWriteParams) -> protocol.FileInfo:
    """Replace a file's content, whole or not at all."""
    mode = NEW_FILE_MODE if params.mode is None else params.mode
    path = path_of(params)
    async with await files.temp(
        path, mode=mode, keep_mode=params.mode is None, follow=True, make_parents=params.make_parents
    ) as temp:
        await anyio.to_thread.run_sync(_write_all, temp, params.data)
        facts = await temp.commit()
    return _info(path, facts, b"")


def _write_all(temp: TempFile, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(temp.descriptor, view) :]


async def list_dir(files: FilesChannel, params: protocol.FileListParams) -> protocol.FileList:
    """List a directory, in the order of the names."""
    listing = await files.list_dir(path_of(params), depth=params.depth, entries_max=params.entries_max)
    entries = sorted(listing.entries, key=lambda entry: entry.path)
    return protocol.FileList(
        entries=[_info(entry.path, entry.facts, entry.target) for entry in entries], truncated=listing.truncated
    )


async def look(files: FilesChannel, params: protocol.FileStatParams) -> protocol.FileInfo:
    """Look at one file."""
    found = await files.stat(path_of(params), follow=params.follow)
    return _info(path_of(params), found.facts, found.target)


def _info(path: bytes, facts: Facts, target: bytes) -> protocol.FileInfo:
    text = path.decode(errors="backslashreplace")
    return protocol.FileInfo(
        path=text,
        path_bytes=None if text.encode() == path else path,
        type=_TYPES[facts.type],  # type: ignore[arg-type]
        size_bytes=facts.size,
        mode=stat.S_IMODE(facts.mode),
        uid=facts.uid,
        gid=facts.gid,
        mtime_ns=facts.mtime_ns,
        target=target.decode(errors="backslashreplace") if facts.type is FileType.SYMLINK else None,
    )
