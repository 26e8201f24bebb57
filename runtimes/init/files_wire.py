r"""The messages between the daemon and a file worker (`files.c`), as bytes and as structs.

A worker is asked for with FILES (`wire.py`). One `SOCK_SEQPACKET` datagram is one message; all numbers are little
endian; header and strings are as in `wire.py`, with the magic 0x4653. Requests are served one after the other.

| type   | message   | body                                                                                 |
|--------|-----------|--------------------------------------------------------------------------------------|
| 0x0001 | OPEN      | start, u32 mode, string path; flags follow parents read write create exclusive       |
|        |           | truncate append                                                                      |
| 0x8001 | reply     | facts; one descriptor, of a regular file, non-blocking                               |
| 0x0002 | STAT      | start, string path; flags follow                                                     |
| 0x8002 | reply     | facts, string target of a link                                                       |
| 0x0003 | LIST      | start, u32 depth, u32 token of a watch or 0, string path; flags follow               |
|        |           | directories_only                                                                     |
| 0x0004 | LIST_NEXT | u32 token                                                                            |
| 0x8003 | reply     | u32 token to go on with (0: that was all), u32 flags (1: something was left out), u32 |
|        |           | count, count x (facts, u32 watch number or 0, u32 errno, string path below the one    |
|        |           | listed, string target); 0x8004 likewise                                              |
| 0x0005 | CLOSE     | u32 token: ends a listing, a watch, or a temporary file that was not committed       |
| 0x0006 | MAKE_DIR  | start, u32 mode, string path; flags parents                                          |
| 0x8006 | reply     | u32 1 if it was made, 0 if it was there                                              |
| 0x0007 | RENAME    | start, string old, string new; flags no_replace exchange                             |
| 0x0008 | REMOVE    | start, string path; flags recursive                                                  |
| 0x8008 | reply     | u32 1 if there is more: ask again                                                    |
| 0x0009 | SYMLINK   | start, string target, string path; flags parents                                     |
| 0x000a | CHMOD     | start, u32 mode, string path; flags follow                                           |
| 0x000b | SET_TIMES | start, u64 mtime seconds, two's complement, u32 nanoseconds, string path; flags follow |
| 0x000c | TEMP      | start, u32 mode, string path; flags follow parents keep_mode (of the file that is    |
|        |           | there)                                                                               |
| 0x800c | reply     | u32 token; one descriptor, of a new file, to read and write                          |
| 0x000d | COMMIT    | u32 flags (no_replace), u32 token: the temporary file takes the path's place          |
| 0x800d | reply     | facts                                                                                |
| 0x000e | WATCH     | nothing                                                                              |
| 0x800e | reply     | u32 token; one descriptor, an inotify instance, for LIST to add watches to           |
| 0x000f | UNWATCH   | u32 token, u32 watch number                                                          |
| 0x8005 | reply     | nothing; 0x8007, 0x8009, 0x800a, 0x800b and 0x800f likewise                          |
| 0xffff | ERROR     | u32 errno, u32 type of what is in the way, as in st_mode, or 0                       |

start is `u32 flags, string base`: an absolute path to a directory, where relative paths start. Flags: 1 follow a
link that the path ends in, 2 make missing parents (mode 0755), 4 read, 8 write, 0x10 create, 0x20 exclusive, 0x40
truncate, 0x80 append, 0x100 directories only, 0x200 recursive, 0x400 no_replace, 0x800 exchange, 0x1000 keep_mode.
Modes are exact: the worker has no umask.

facts is `u32 mode, u32 nlink, u32 uid, u32 gid, u64 size, u64 allocated bytes, i64 mtime seconds, i64 ctime seconds,
u32 mtime nanoseconds, u32 ctime nanoseconds, u64 inode, u64 device`, all as inside of the sandbox.

The first entry of a listing is the path itself, under an empty path, then the tree in depth-first order, each
directory before what is in it; with depth 0 that is all. With a watch each directory that is read is watched first.
A page may be empty. A listing ends with its last page, or with CLOSE.

Bounds: paths have at most 4095 bytes and names 255, as the kernel has it; a request has at most 16 KiB and an answer
64 KiB; at most 64 temporary files, 8 listings, 16 watches; depth is at most 64.

Errors that tell something: EUSERS all places are taken; EBADF no such token; EISDIR, ENOTDIR, ENXIO (neither file nor
directory) the thing is of another type; EOPNOTSUPP the file belongs to procfs, sysfs or their like, or the type of
the request is not known; EAGAIN somebody holds a lease; EINVAL the path ends in no name, or the base is relative;
EBADMSG the request is not as above. All others are the kernel's.

Everything that a worker sends is untrusted: decoding accepts exactly this and raises `WireError` for anything else.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable

import msgspec

from runtimes.init.wire import InitError, WireError

FILES_VERSION = 1
MAGIC = 0x4653

REPLY_BYTES_MAX = 64 * 1024
PATH_BYTES_MAX = 4095
DEPTH_MAX = 64
MODE_MAX = 0o7777

_HEADER = struct.Struct("<HHI")
_U32 = struct.Struct("<I")
_TWO = struct.Struct("<II")
_TIMES = struct.Struct("<qI")
_FACTS = struct.Struct("<IIIIQQqqIIQQ")
_PAGE = struct.Struct("<III")
_ENTRY = struct.Struct("<IIIIQQqqIIQQIII")

_PAGE_CUT = 1
_ERRNO_MAX = 4095
_NANOSECONDS = 10**9
_I64_MIN, _I64_MAX = -(2**63), 2**63 - 1
_SECONDS_MAX = _I64_MAX // _NANOSECONDS
_TYPE_BITS = 0o170000
_NOT_A_NAME = (b"", b".", b"..")


class InvalidPath(InitError, ValueError):
    """A path, mode or number that cannot be put on the wire: with a NUL inside, too long, out of range."""


class RequestType(enum.IntEnum):
    """The type field; a reply's is its request's with the top bit set."""

    OPEN = 0x0001
    STAT = 0x0002
    LIST = 0x0003
    LIST_NEXT = 0x0004
    CLOSE = 0x0005
    MAKE_DIR = 0x0006
    RENAME = 0x0007
    REMOVE = 0x0008
    SYMLINK = 0x0009
    CHMOD = 0x000A
    SET_TIMES = 0x000B
    TEMP = 0x000C
    COMMIT = 0x000D
    WATCH = 0x000E
    UNWATCH = 0x000F


_REPLY = 0x8000
_ERROR = 0xFFFF


class Flag(enum.IntFlag):
    """How something is to be done; each request knows some."""

    NONE = 0
    FOLLOW = 1 << 0
    PARENTS = 1 << 1
    READ = 1 << 2
    WRITE = 1 << 3
    CREATE = 1 << 4
    EXCLUSIVE = 1 << 5
    TRUNCATE = 1 << 6
    APPEND = 1 << 7
    DIRECTORIES_ONLY = 1 << 8
    RECURSIVE = 1 << 9
    NO_REPLACE = 1 << 10
    EXCHANGE = 1 << 11
    KEEP_MODE = 1 << 12


class FileType(enum.IntEnum):
    """The type bits of a mode."""

    UNKNOWN = 0
    FIFO = 0o010000
    CHARACTER_DEVICE = 0o020000
    DIRECTORY = 0o040000
    BLOCK_DEVICE = 0o060000
    FILE = 0o100000
    SYMLINK = 0o120000
    SOCKET = 0o140000


class Facts(msgspec.Struct, frozen=True, gc=False):
    """What is known of a file, numbers as inside of the sandbox. `allocated` is what it takes on disk."""

    type: FileType
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    allocated: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One thing in a listing. `errno`: it could not be looked at, or not be gone into."""

    path: bytes
    facts: Facts
    target: bytes
    watch: int
    errno: int


class OpenReply(msgspec.Struct, frozen=True):
    """A file was opened."""

    facts: Facts


class StatReply(msgspec.Struct, frozen=True):
    """`target` is that of a link, otherwise empty."""

    facts: Facts
    target: bytes


class PageReply(msgspec.Struct, frozen=True):
    """Part of a listing; `token` is None on the last page. `cut`: something was left out."""

    token: int | None
    cut: bool
    entries: list[Entry]


class MadeReply(msgspec.Struct, frozen=True):
    """Whether the directory is new."""

    created: bool


class RemovedReply(msgspec.Struct, frozen=True):
    """Whether there is more to remove."""

    more: bool


class TempReply(msgspec.Struct, frozen=True):
    """A temporary file was opened."""

    token: int


class CommitReply(msgspec.Struct, frozen=True):
    """The file that now bears the name."""

    facts: Facts


class WatchReply(msgspec.Struct, frozen=True):
    """A place for watches was opened."""

    token: int


class Done(msgspec.Struct, frozen=True):
    """It was done."""

    request: RequestType


class FileRefusal(msgspec.Struct, frozen=True):
    """It was not done; `type` is of what is in the way, if that is the reason."""

    errno: int
    type: FileType


FilesReply = (
    OpenReply
    | StatReply
    | PageReply
    | MadeReply
    | RemovedReply
    | TempReply
    | CommitReply
    | WatchReply
    | Done
    | FileRefusal
)


# ---- to the worker


def _path(path: bytes) -> bytes:
    if b"\0" in path:
        raise InvalidPath(f"cannot use a path with a NUL inside: {path[:80]!r}")
    if len(path) > PATH_BYTES_MAX:
        raise InvalidPath(f"cannot use a path of {len(path)} bytes: at most {PATH_BYTES_MAX}")
    return _U32.pack(len(path)) + path + b"\0"


def _number(name: str, value: int, largest: int = 0xFFFFFFFF) -> bytes:
    if not 0 <= value <= largest:
        raise InvalidPath(f"cannot send {name} {value}: it must be between 0 and {largest}")
    return _U32.pack(value)


def _start(kind: RequestType, request_id: int, flags: Flag, base: bytes) -> bytes:
    return _HEADER.pack(MAGIC, kind, request_id) + _U32.pack(flags) + _path(base)


def _with_mode(kind: RequestType, request_id: int, flags: Flag, base: bytes, mode: int, path: bytes) -> bytes:
    return _start(kind, request_id, flags, base) + _number("a mode", mode, MODE_MAX) + _path(path)


def encode_open(request_id: int, flags: Flag, base: bytes, mode: int, path: bytes) -> bytes:
    """OPEN.

    Raises:
        InvalidPath: a NUL inside, too long; a mode out of range. So do all of these.
    """
    return _with_mode(RequestType.OPEN, request_id, flags, base, mode, path)


def encode_stat(request_id: int, flags: Flag, base: bytes, path: bytes) -> bytes:
    """STAT."""
    return _start(RequestType.STAT, request_id, flags, base) + _path(path)


def encode_list(request_id: int, flags: Flag, base: bytes, depth: int, watch: int, path: bytes) -> bytes:
    """LIST; `watch` is a token, or 0."""
    return (
        _start(RequestType.LIST, request_id, flags, base)
        + _number("a depth", depth, DEPTH_MAX)
        + _number("a token", watch)
        + _path(path)
    )


def _with_token(kind: RequestType, request_id: int, token: int) -> bytes:
    return _HEADER.pack(MAGIC, kind, request_id) + _number("a token", token)


def encode_list_next(request_id: int, token: int) -> bytes:
    """LIST_NEXT."""
    return _with_token(RequestType.LIST_NEXT, request_id, token)


def encode_close(request_id: int, token: int) -> bytes:
    """CLOSE."""
    return _with_token(RequestType.CLOSE, request_id, token)


def encode_make_dir(request_id: int, flags: Flag, base: bytes, mode: int, path: bytes) -> bytes:
    """MAKE_DIR."""
    return _with_mode(RequestType.MAKE_DIR, request_id, flags, base, mode, path)


def encode_rename(request_id: int, flags: Flag, base: bytes, old: bytes, new: bytes) -> bytes:
    """RENAME."""
    return _start(RequestType.RENAME, request_id, flags, base) + _path(old) + _path(new)


def encode_remove(request_id: int, flags: Flag, base: bytes, path: bytes) -> bytes:
    """REMOVE."""
    return _start(RequestType.REMOVE, request_id, flags, base) + _path(path)


def encode_symlink(request_id: int, flags: Flag, base: bytes, target: bytes, path: bytes) -> bytes:
    """SYMLINK."""
    return _start(RequestType.SYMLINK, request_id, flags, base) + _path(target) + _path(path)


def encode_chmod(request_id: int, flags: Flag, base: bytes, mode: int, path: bytes) -> bytes:
    """CHMOD."""
    return _with_mode(RequestType.CHMOD, request_id, flags, base, mode, path)


def encode_set_times(request_id: int, flags: Flag, base: bytes, mtime_ns: int, path: bytes) -> bytes:
    """SET_TIMES."""
    if not _I64_MIN <= mtime_ns <= _I64_MAX:
        raise InvalidPath(f"cannot set the time {mtime_ns}: it must fit into 64 bits")
    times = _TIMES.pack(*divmod(mtime_ns, _NANOSECONDS))
    return _start(RequestType.SET_TIMES, request_id, flags, base) + times + _path(path)


def encode_temp(request_id: int, flags: Flag, base: bytes, mode: int, path: bytes) -> bytes:
    """TEMP."""
    return _with_mode(RequestType.TEMP, request_id, flags, base, mode, path)


def encode_commit(request_id: int, flags: Flag, token: int) -> bytes:
    """COMMIT."""
    return _HEADER.pack(MAGIC, RequestType.COMMIT, request_id) + _U32.pack(flags) + _number("a token", token)


def encode_watch(request_id: int) -> bytes:
    """WATCH."""
    return _HEADER.pack(MAGIC, RequestType.WATCH, request_id)


def encode_unwatch(request_id: int, token: int, watch: int) -> bytes:
    """UNWATCH."""
    return _with_token(RequestType.UNWATCH, request_id, token) + _number("a watch", watch, 0x7FFFFFFF)


# ---- from the worker


def _nanoseconds(seconds: int, nanoseconds: int) -> int:
    """A time, or the nearest to it that 64 bits hold: a file may bear any."""
    if nanoseconds >= _NANOSECONDS:
        raise WireError(f"the file worker sent {nanoseconds} nanoseconds")
    if -_SECONDS_MAX < seconds < _SECONDS_MAX:
        return seconds * _NANOSECONDS + nanoseconds
    return _I64_MAX if seconds > 0 else _I64_MIN


_FILE_TYPES = {int(kind): kind for kind in FileType}


def _file_type(bits: int) -> FileType:
    kind = _FILE_TYPES.get(bits)
    if kind is None:
        raise WireError(f"the file worker sent a file of type {bits:#o}")
    return kind


def _facts(
    mode: int,
    nlink: int,
    uid: int,
    gid: int,
    size: int,
    allocated: int,
    mtime_s: int,
    ctime_s: int,
    mtime_ns: int,
    ctime_ns: int,
    inode: int,
    device: int,
) -> Facts:
    if mode > 0xFFFF or size > _I64_MAX:
        raise WireError(f"the file worker sent a file of mode {mode:#o} and size {size}")
    return Facts(
        _file_type(mode & _TYPE_BITS),
        mode & MODE_MAX,
        nlink,
        uid,
        gid,
        size,
        allocated,
        _nanoseconds(mtime_s, mtime_ns),
        _nanoseconds(ctime_s, ctime_ns),
        inode,
        device,
    )


def _string_at(body: bytes, at: int, length: int) -> bytes:
    """The string whose length was just read, and which starts at `at`."""
    end = at + length
    if length <= PATH_BYTES_MAX and body.find(b"\0", at, end + 1) == end:
        return body[at:end]
    raise WireError("the file worker sent a string that is not one")


def _exactly(shape: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != shape.size:
        raise WireError(f"the file worker sent a body of {len(body)} bytes where {shape.size} belong")
    return shape.unpack(body)


def _boolean(body: bytes) -> bool:
    (value,) = _exactly(_U32, body)
    if value > 1:
        raise WireError(f"the file worker sent {value} for yes or no")
    return value == 1


def _token(body: bytes) -> int:
    (token,) = _exactly(_U32, body)
    if token == 0:
        raise WireError("the file worker sent no token")
    return token


def _decode_stat(body: bytes) -> StatReply:
    if len(body) < _FACTS.size + _U32.size + 1:
        raise WireError("the file worker sent a STAT that is too short")
    (length,) = _U32.unpack_from(body, _FACTS.size)
    target = _string_at(body, _FACTS.size + _U32.size, length)
    if len(body) != _FACTS.size + _U32.size + length + 1:
        raise WireError("the file worker sent a STAT that is too long")
    return StatReply(_facts(*_FACTS.unpack_from(body)), target)


def _entry_at(body: bytes, at: int) -> tuple[Entry, int]:
    """One entry of a page, and where the next one begins."""
    *fields, watch, errno, length = _ENTRY.unpack_from(body, at)
    at += _ENTRY.size
    path = _string_at(body, at, length)
    at += length + 1
    (length,) = _U32.unpack_from(body, at)
    at += _U32.size
    target = _string_at(body, at, length)
    if path and not _is_below(path):
        raise WireError(f"the file worker sent a path that leads elsewhere: {path[:80]!r}")
    if errno > _ERRNO_MAX or watch > 0x7FFFFFFF:
        raise WireError(f"the file worker sent errno {errno} and watch {watch}")
    return Entry(path, _facts(*fields), target, watch, errno), at + length + 1


def _is_below(path: bytes) -> bool:
    """Whether every step of the path is a name: whoever extracts it elsewhere relies on that."""
    if b"/" not in path:
        return path not in _NOT_A_NAME
    return not any(name in _NOT_A_NAME for name in path.split(b"/"))


def _decode_page(body: bytes) -> PageReply:
    if len(body) < _PAGE.size:
        raise WireError("the file worker sent a page that is too short")
    token, flags, count = _PAGE.unpack_from(body)
    if flags & ~_PAGE_CUT:
        raise WireError(f"the file worker sent unknown flags {flags:#x}")
    entries = []
    at = _PAGE.size
    if count > len(body):
        raise WireError(f"the file worker sent {count} entries in {len(body)} bytes")
    try:
        for _ in range(count):
            entry, at = _entry_at(body, at)
            entries.append(entry)
    except struct.error:
        raise WireError("the file worker sent a page that is cut short") from None
    if at != len(body):
        raise WireError("the file worker sent a page that is too long")
    return PageReply(token or None, bool(flags), entries)


def _decode_error(body: bytes) -> FileRefusal:
    errno, bits = _exactly(_TWO, body)
    if not 0 < errno <= _ERRNO_MAX:
        raise WireError(f"the file worker sent errno {errno}")
    return FileRefusal(errno, _file_type(bits))


_DONE = {
    _REPLY | kind: Done(kind)
    for kind in (
        RequestType.CLOSE,
        RequestType.RENAME,
        RequestType.SYMLINK,
        RequestType.CHMOD,
        RequestType.SET_TIMES,
        RequestType.UNWATCH,
    )
}
_DECODERS: dict[int, Callable[[bytes], FilesReply]] = {
    _REPLY | RequestType.OPEN: lambda body: OpenReply(_facts(*_exactly(_FACTS, body))),
    _REPLY | RequestType.STAT: _decode_stat,
    _REPLY | RequestType.LIST: _decode_page,
    _REPLY | RequestType.LIST_NEXT: _decode_page,
    _REPLY | RequestType.MAKE_DIR: lambda body: MadeReply(_boolean(body)),
    _REPLY | RequestType.REMOVE: lambda body: RemovedReply(_boolean(body)),
    _REPLY | RequestType.TEMP: lambda body: TempReply(_token(body)),
    _REPLY | RequestType.COMMIT: lambda body: CommitReply(_facts(*_exactly(_FACTS, body))),
    _REPLY | RequestType.WATCH: lambda body: WatchReply(_token(body)),
    _ERROR: _decode_error,
}


def decode_files_message(message: bytes) -> tuple[int, FilesReply]:
    """What a worker said: the request that it answers, and the answer.

    Raises:
        WireError: anything that a worker, as documented above, does not send.
    """
    if len(message) < _HEADER.size or len(message) > REPLY_BYTES_MAX:
        raise WireError(f"the file worker sent a message of {len(message)} bytes")
    magic, kind, request_id = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise WireError(f"the file worker sent a message that starts with {magic:#06x}")
    body = message[_HEADER.size :]
    done = _DONE.get(kind)
    if done is not None and not body:
        return request_id, done
    decode = _DECODERS.get(kind)
    if decode is None:
        raise WireError(f"the file worker sent a message of type {kind:#06x} with {len(body)} bytes")
    return request_id, decode(body)
