"""The daemon's log: to the journal with fields where a service manager started it, and else as text on stderr.

A message may quote what a sandbox or a caller chose. Control characters in it are written as they would be typed, so
one message is one line, and none can look like another, or move a cursor.

The journal's protocol is that of https://systemd.io/JOURNAL_NATIVE_PROTOCOL: one datagram per message.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TextIO

from sandboxd.peers import Peer
from sandboxd.protocol import Params

JOURNAL_SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "sandboxd"

MESSAGE_CHARS_MAX = 16 * 1024
"""A datagram has room for ten times as much. A longer message is a mistake, and its beginning says which."""

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
"""Of syslog(3), from which level on; below is 7."""

_SANDBOX_ID = re.compile(r"\bsb-[a-z0-9]{10}\b")

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROLS |= {ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}

_asked: ContextVar[tuple[str, str | None] | None] = ContextVar("asked", default=None)
"""Method and sandbox of the request that is carried out, as they were asked for."""


def begin(stderr: TextIO, environ: Mapping[str, str], level: str, *, journal: str = JOURNAL_SOCKET) -> None:
    """Have the daemon's messages go where they belong.

    Args:
        stderr: Ours.
        environ: As the service manager made it.
        level: From which on.
        journal: Where the journal listens.
    """
    handler: logging.Handler = _TextHandler(stderr)
    stream = environ.get("JOURNAL_STREAM", "")
    if stream and is_journal(stderr.fileno(), stream):
        handler = _JournalHandler(journal, _TextHandler(stderr, prefixed=True))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def set_level(level: str) -> None:
    """Have messages of less importance left out from now on."""
    logging.getLogger().setLevel(level.upper())


def resolve_by(id_of: Callable[[str], str | None]) -> None:
    """Say which sandbox a message is about by its id, whatever it was called in the request."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _JournalHandler):
            handler.id_of = id_of


def observe(method: str, params: Params, _: Peer) -> None:
    """A request begins: what its task logs is about it. For the dispatcher."""
    _asked.set((method, getattr(params, "sandbox", None)))


def is_journal(descriptor: int, stream: str) -> bool:
    """Whether a descriptor is the one that the service manager says to be the journal's.

    The variable is handed on to whatever a service starts, and says nothing where stderr is another file.

    Args:
        descriptor: Ours.
        stream: ``$JOURNAL_STREAM``: device and inode, in decimal.
    """
    device, colon, inode = stream.partition(":")
    if not colon or not all(text.isascii() and text.isdigit() for text in (device, inode)):
        return False
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (int(device), int(inode))


def one_line(text: str) -> str:
    """A text in which nothing ends a line or moves a cursor, cut if it is too long."""
    cut = f"{text[:MESSAGE_CHARS_MAX]}... ({len(text)} characters)" if len(text) > MESSAGE_CHARS_MAX else text
    return cut if cut.isprintable() else cut.translate(_CONTROLS)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


class _OneLine(logging.Formatter):
    """One line per message, and indented ones below it for where a defect is."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.getMessage())
        if self.usesTime():
            record.asctime = self.formatTime(record, self.datefmt)
        return self.formatMessage(record) + below(self, record)


def below(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback of a message, if it has one."""
    if not record.exc_info:
        return ""
    lines = formatter.formatException(record.exc_info)[-MESSAGE_CHARS_MAX:].split("\n")
    return "".join(f"\n    {one_line(line)}" for line in lines)


class _TextHandler(logging.StreamHandler[TextIO]):
    """Lines on a stream.

    Args:
        stream: Where to.
        prefixed: Each begins with its priority, as sd-daemon(3) says: the journal reads it off a service's stderr.
    """

    def __init__(self, stream: TextIO, *, prefixed: bool = False) -> None:
        super().__init__(stream)
        self._prefixed = prefixed
        self.setFormatter(_OneLine("%(name)s: %(message)s" if prefixed else TEXT_FORMAT))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self._prefixed:
            return text
        return "\n".join(f"<{_priority(record.levelno)}>{line}" for line in text.split("\n"))


class _JournalHandler(logging.Handler):
    """Messages with fields, to the journal.

    Args:
        path: Of its socket.
        otherwise: What takes messages while the journal does not listen.
    """

    def __init__(self, path: str, otherwise: logging.Handler) -> None:
        super().__init__()
        self._path = path
        self._otherwise = otherwise
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._lost = 0
        self.id_of: Callable[[str], str | None] = lambda _: None
        self.setFormatter(_OneLine("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send a message. One that the journal has no room for is counted, and told of by the next that it takes."""
        try:
            self._send(self._fields(record))
            if self._lost:
                lost, self._lost = self._lost, 0
                self._send({"MESSAGE": f"{lost} messages before this one were lost", "PRIORITY": "4"})
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE}:
                # The daemon must not wait for a journal that is behind.
                self._lost += 1
            else:
                self._otherwise.handle(record)
        except Exception:  # noqa: BLE001 - logging's own way: a message that cannot be made stops no work
            self.handleError(record)

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_priority(record.levelno)),
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
        }
        asked = _asked.get()
        named = _SANDBOX_ID.search(fields["MESSAGE"])
        sandbox = named[0] if named else None
        if asked is not None:
            fields["METHOD"], reference = asked
            sandbox = sandbox or (None if reference is None else self.id_of(reference))
        return fields if sandbox is None else {**fields, "SANDBOX_ID": sandbox}

    def _send(self, fields: Mapping[str, str]) -> None:
        self._socket.sendto(datagram({"SYSLOG_IDENTIFIER": IDENTIFIER, **fields}), self._path)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()
        super().close()


def datagram(fields: Mapping[str, str]) -> bytes:
    """A message in the journal's own form.

    A value with a newline in it has its length before it, so that nothing can look like a field that is none.
    """
    parts = []
    for name, value in fields.items():
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)
