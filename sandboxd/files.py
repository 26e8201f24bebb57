"""The files of a sandbox: what the caller asks, made exact, and what the file worker answers, made plain.

Paths are resolved by a process inside, with the rights of the sandbox's own user. Nothing here resolves one.
"""

from __future__ import annotations

import errno
import os
import posixpath
import shlex
import stat
from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread

from runtimes.init.file_worker import FileRefused
from runtimes.init.files import FilesChannel, TempFile, read_bytes
from runtimes.init.files_wire import Entry, Facts, FileType
from sandboxd import protocol
from sandboxd.failures import (
    CapacityExceeded,
    Conflict,
    Failure,
    InvalidArgument,
    NoSuchFile,
    NotEnoughSpace,
    Unsupported,
)

NEW_FILE_MODE = 0o644

COPY_PIECE_BYTES = 8 * 1024 * 1024
"""Between two looks at whether the caller is still there."""

COPIES_MAX = 8
"""At once. A caller's file may lie on a file system that hangs, and must not take all threads of the daemon."""

PAGE_ENTRIES_MAX = 256
"""In one notification: with the longest paths it is 1 MiB of them, and in base64 once more."""

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
    errno.ENOENT: NoSuchFile,
    errno.EINVAL: InvalidArgument,
    errno.ENAMETOOLONG: InvalidArgument,
    errno.EISDIR: InvalidArgument,
    errno.ENOTDIR: InvalidArgument,
    errno.EOPNOTSUPP: Unsupported,
    errno.ENOSPC: NotEnoughSpace,
    errno.EDQUOT: NotEnoughSpace,
    errno.ENOMEM: CapacityExceeded,
    errno.EUSERS: CapacityExceeded,
    errno.EMFILE: CapacityExceeded,
    errno.ENFILE: CapacityExceeded,
}
"""Any other is a conflict with what is there: a link, a right that is missing, a directory that is not empty."""

_HINTS = {
    errno.EISDIR: "sandboxctl files ls {sandbox} {path}",
    errno.ENOTEMPTY: "with what is in it: sandboxctl files rm -r {sandbox} {path}",
}

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR)


def failure_from_refusal(error: FileRefused, sandbox: str | None) -> Failure:
    """The failure that says why it was not done; its detail begins with the name of the errno.

    Args:
        error: What was refused.
        sandbox: As it was typed; None: the request names none.
    """
    path = error.path.decode(errors="replace")
    hint = _HINTS.get(error.errno, "").format(
        sandbox=sandbox or "SANDBOX", path=shlex.quote(path) if path.isprintable() else "PATH"
    )
    return _failure(error.errno, str(error).partition(":")[0], hint)


def _failure(number: int, brief: str, hint: str = "") -> Failure:
    name = errno.errorcode.get(number, str(number))
    why = "as many as may be are under way" if number == errno.EUSERS else os.strerror(number)
    return _BY_ERRNO.get(number, Conflict)(brief, detail=f"{name}: {why}", hint=hint)


def path_of(params: protocol.PathParams) -> bytes:
    """The path as bytes."""
    return params.path.encode() if params.path_bytes is None else params.path_bytes


def text_of(path: bytes) -> tuple[str, bytes | None]:
    """A path for display, and the path itself where that is not the same."""
    text = path.decode(errors="backslashreplace")
    return text, None if text.encode() == path else path


async def read(files: FilesChannel, params: protocol.FileReadParams) -> protocol.FileContent:
    """Read a part of a regular file. Nothing else is opened: no FIFO, device or endless file."""
    opened = await files.open(path_of(params))
    try:
        data = await read_bytes(opened.descriptor, offset=params.offset, bytes_max=params.length)
    finally:
        os.close(opened.descriptor)
    return protocol.FileContent(data=data, size_bytes=opened.facts.size)


async def write(
    files: FilesChannel, params: protocol.FileWriteParams, source: int | None, copies: anyio.CapacityLimiter
) -> protocol.FileInfo:
    """Replace a file's content, whole or not at all.

    Args:
        files: Of the sandbox.
        params: What is asked.
        source: A descriptor of the caller's, to be read from its offset on. It stays the caller's to close.
        copies: How many may read from such a descriptor at once.
    """
    path = path_of(params)
    if source is not None:
        _check_source(source, params, path)
    mode = NEW_FILE_MODE if params.mode is None else params.mode
    async with await files.temp(
        path, mode=mode, keep_mode=params.mode is None, follow=True, make_parents=params.make_parents
    ) as temp:
        try:
            if source is None:
                await anyio.to_thread.run_sync(_write_all, temp, params.data)
            else:
                while await anyio.to_thread.run_sync(_copy_piece, temp, source, limiter=copies):
                    continue
        except OSError as error:
            raise _failure(error.errno or errno.EIO, f"cannot write {os.fsdecode(path)!r} in the sandbox") from error
        facts = await temp.commit()
    return _info(_absolute(files, path), facts, b"")


def _check_source(source: int, params: protocol.FileWriteParams, path: bytes) -> None:
    """Only what ends, and never waits for somebody."""
    brief = f"cannot write {os.fsdecode(path)!r} in the sandbox"
    if params.data:
        raise InvalidArgument(brief, detail="it was given data and a descriptor", hint="give one of them")
    if not stat.S_ISREG(os.fstat(source).st_mode):
        raise InvalidArgument(brief, detail="the descriptor is not of a regular file", hint="copy it to a file first")


def _write_all(temp: TempFile, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(temp.descriptor, view) :]


def _copy_piece(temp: TempFile, source: int) -> int:
    """How many bytes were copied; 0 at the end."""
    return os.sendfile(temp.descriptor, source, None, COPY_PIECE_BYTES)


async def list_dir(files: FilesChannel, params: protocol.FileListParams) -> protocol.FileList:
    """List a directory, in the order of the names."""
    path = path_of(params)
    listing = await files.list_dir(path, depth=params.depth, entries_max=params.entries_max)
    entries = [_entry_info(entry) for entry in sorted(listing.entries, key=lambda entry: entry.path)]
    return _list(files, path, entries, truncated=listing.truncated)


async def list_pages(
    files: FilesChannel,
    params: protocol.FileListParams,
    deliver: Callable[[list[protocol.FileInfo]], Awaitable[None]],
) -> protocol.FileList:
    """Deliver a directory's entries as they are found; return a list without any."""
    path = path_of(params)
    async with files.walk(path, depth=params.depth) as walk:
        while (page := await walk.next_page()) is not None:
            for start in range(0, len(page), PAGE_ENTRIES_MAX):
                await deliver([_entry_info(entry) for entry in page[start : start + PAGE_ENTRIES_MAX]])
        return _list(files, path, [], truncated=walk.truncated)


async def look(files: FilesChannel, params: protocol.FileStatParams) -> protocol.FileInfo:
    """Look at one file."""
    path = path_of(params)
    found = await files.stat(path, follow=params.follow)
    return _info(_absolute(files, path), found.facts, found.target)


async def exists(files: FilesChannel, params: protocol.FileStatParams) -> bool:
    """Whether something bears the name."""
    try:
        await files.stat(path_of(params), follow=params.follow)
    except FileRefused as error:
        if error.errno in _NOTHING_THERE:
            return False
        raise
    return True


async def rename(files: FilesChannel, params: protocol.FileRenameParams) -> None:
    """Give another name."""
    new = params.new_path.encode() if params.new_path_bytes is None else params.new_path_bytes
    await files.rename(path_of(params), new, no_replace=not params.replace)


async def remove(files: FilesChannel, params: protocol.FileRemoveParams) -> None:
    """Remove a file, or a whole tree."""
    try:
        await files.remove(path_of(params), recursive=params.recursive)
    except FileRefused as error:
        if not params.missing_ok or error.errno not in _NOTHING_THERE:
            raise


def _absolute(files: FilesChannel, path: bytes) -> bytes:
    """From the root on, without what means nothing; ``..`` stays, for what it means is known inside only."""
    names = posixpath.join(files.base, path).split(b"/")
    return b"/" + b"/".join(name for name in names if name not in (b"", b"."))


def _list(
    files: FilesChannel, path: bytes, entries: list[protocol.FileInfo], *, truncated: bool
) -> protocol.FileList:
    text, exact = text_of(_absolute(files, path))
    return protocol.FileList(path=text, path_bytes=exact, entries=entries, truncated=truncated)


def _entry_info(entry: Entry) -> protocol.FileInfo:
    return _info(entry.path, entry.facts, entry.target)


def _info(path: bytes, facts: Facts, target: bytes) -> protocol.FileInfo:
    text, exact = text_of(path)
    return protocol.FileInfo(
        path=text,
        path_bytes=exact,
        type=_TYPES[facts.type],  # type: ignore[arg-type]
        size_bytes=facts.size,
        mode=stat.S_IMODE(facts.mode),
        uid=facts.uid,
        gid=facts.gid,
        mtime_ns=facts.mtime_ns,
        target=target.decode(errors="backslashreplace") if facts.type is FileType.SYMLINK else None,
    )
