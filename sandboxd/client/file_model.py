"""What the file rooms of the Python client take and give, and how requests and replies are made of it. Pure."""

from __future__ import annotations

import binascii
import enum
import posixpath
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypedDict

from sandboxd.client.errors import InvalidArgumentException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import IO

    Data = str | bytes | bytearray | memoryview | IO[str] | IO[bytes]

UTF8_OR_BYTES = ("utf-8", "surrogateescape")
"""How a name that is not UTF-8 becomes text, and bytes again: as ``os.fsdecode`` does it where UTF-8 is in use."""


class FileType(enum.Enum):
    """What something is."""

    FILE = "file"
    DIR = "dir"
    SYMLINK = "symlink"
    FIFO = "fifo"
    SOCKET = "socket"
    CHAR = "char"
    BLOCK = "block"
    UNKNOWN = "unknown"


class FilesystemEventType(enum.Enum):
    """What happened."""

    CHMOD = "chmod"
    CREATE = "create"
    REMOVE = "remove"
    RENAME = "rename"
    """It bears another name now, under which a ``CREATE`` follows."""
    WRITE = "write"
    OVERFLOW = "overflow"
    """Events were lost: look again."""


@dataclass(frozen=True, slots=True)
class FilesystemEvent:
    """One event. ``name`` is relative to what is watched, which is itself the empty name."""

    name: str
    type: FilesystemEventType


@dataclass(frozen=True, slots=True)
class WriteInfo:
    """What was written."""

    name: str
    type: FileType | None
    path: str


@dataclass(frozen=True, slots=True)
class EntryInfo(WriteInfo):
    """One file, numbers as inside the sandbox."""

    size: int
    mode: int
    permissions: str
    owner: str
    """A number: nobody knows what it is called inside."""
    group: str
    modified_time: datetime
    symlink_target: str | None = None


class WriteEntry(TypedDict):
    """One of several files to be written."""

    path: str
    data: Data


# --- requests


def path_params(sandbox_id: str, path: str, user: str | None = None) -> dict[str, Any]:
    """What names a file.

    Raises:
        InvalidArgumentException: It is to be reached as somebody else.
    """
    if user is not None:
        raise InvalidArgumentException(
            f"cannot use files as user {user!r}", "files are the sandbox's own user's", "leave out user"
        )
    return {"sandbox": sandbox_id, **text_params("path", path)}


def text_params(name: str, path: str) -> dict[str, str]:
    """A path under its name, or as bytes where it is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        encoded = path.encode(*UTF8_OR_BYTES)
        return {name: "", f"{name}_bytes": binascii.b2a_base64(encoded, newline=False).decode()}
    return {name: path}


# --- replies


def text_of(row: Mapping[str, Any], name: str = "path") -> str:
    """A path in a reply."""
    exact = row[f"{name}_bytes"]
    text: str = row[name] if exact is None else binascii.a2b_base64(exact).decode(*UTF8_OR_BYTES)
    return text


def write_info(row: Mapping[str, Any]) -> WriteInfo:
    """Read a ``FileInfo`` of the protocol."""
    path = text_of(row)
    return WriteInfo(name=posixpath.basename(path), type=FileType(row["type"]), path=path)


def entry_info(row: Mapping[str, Any], folder: str = "") -> EntryInfo:
    """Read a ``FileInfo`` of the protocol, of something below a folder."""
    path = posixpath.join(folder, text_of(row))
    return EntryInfo(
        name=posixpath.basename(path),
        type=FileType(row["type"]),
        path=path,
        size=row["size_bytes"],
        mode=row["mode"],
        permissions=stat.filemode(_TYPE_BITS.get(row["type"], 0) | row["mode"]),
        owner=str(row["uid"]),
        group=str(row["gid"]),
        modified_time=_time(row["mtime_ns"]),
        symlink_target=row["target"],
    )


_TYPE_BITS = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
}

_TIME_FIRST = datetime.min.replace(tzinfo=UTC)
_TIME_LAST = datetime.max.replace(tzinfo=UTC)


def _time(mtime_ns: int) -> datetime:
    """A file may bear any time, and more than Python knows."""
    try:
        return datetime.fromtimestamp(mtime_ns / 1e9, UTC)
    except (ValueError, OverflowError, OSError):
        return _TIME_LAST if mtime_ns > 0 else _TIME_FIRST


def entries(reply: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[EntryInfo]:
    """What is in a directory, in the order of the paths: from its pages, and the reply that ended them."""
    folder = text_of(reply)
    return sorted((entry_info(row, folder) for row in rows), key=lambda entry: entry.path)


def rows_of(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries in a notification, if it has any."""
    return list(content["params"]["entries"]) if content["method"] == "files/listed" else []


def events(content: Mapping[str, Any]) -> list[FilesystemEvent]:
    """The events in a notification. What was closed by who wrote it was told as written before."""
    if content["method"] != "files/changed":
        return []
    return [event for row in content["params"]["changes"] for event in _events_of(row)]


_EVENT_TYPES = {
    "created": FilesystemEventType.CREATE,
    "modified": FilesystemEventType.WRITE,
    "attributes": FilesystemEventType.CHMOD,
    "removed": FilesystemEventType.REMOVE,
    "overflow": FilesystemEventType.OVERFLOW,
}


def _events_of(row: Mapping[str, Any]) -> list[FilesystemEvent]:
    name = text_of(row)
    if row["kind"] == "renamed":
        return [
            FilesystemEvent(text_of(row, "old_path"), FilesystemEventType.RENAME),
            FilesystemEvent(name, FilesystemEventType.CREATE),
        ]
    kind = _EVENT_TYPES.get(row["kind"])
    return [] if kind is None else [FilesystemEvent(name, kind)]
