"""The socket's place in the file system: one daemon at a time, in a directory that is ours alone.

The lock beside the socket is what makes a daemon the only one; the socket file is only what clients look for. So a
socket that a killed daemon left behind is replaced without asking whether somebody answers on it.

Where a service manager listens for us, the socket is its own: it was there before, and stays when we are gone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self

from sandboxd.failures import Conflict, InvalidArgument, Unauthorized
from sandboxd.paths import SOCKET_NAME, lock_path

BACKLOG = 128


class AlreadyRunning(Conflict):
    """Another daemon holds this socket's lock."""


class Listener:
    """A listening socket, and the lock that makes it the only one. Close it to give up both."""

    def __init__(self, path: str, listening: socket.socket, directory: int, lock: int, *, made: bool) -> None:
        self.path = path
        self.socket = listening
        self._directory = directory
        self._lock = lock
        self._identity = _identity(directory, os.path.basename(path)) if made else None

    def leave_open(self) -> None:
        """Leave the socket where it is when this is closed: somebody else goes on listening on it."""
        self._identity = None

    @property
    def stays(self) -> bool:
        """Somebody else listens on it as well, and will when this is closed."""
        return self._identity is None

    def close(self) -> None:
        """Remove the socket, if it is still the one that we made, and let go of the lock. Idempotent."""
        if self._lock < 0:
            return
        name = os.path.basename(self.path)
        with suppress(FileNotFoundError):
            if self._identity is not None and _identity(self._directory, name) == self._identity:
                os.unlink(name, dir_fd=self._directory)
        self.socket.close()
        os.close(self._directory)
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_listener(path: str, listening: socket.socket | None = None, *, ours: bool = False) -> Listener:
    """Listen on ``path``; the directory is made, with mode 0700, where it is missing.

    Args:
        path: Where clients look.
        listening: A socket that somebody else made there and passed to us. It is taken over, but not its file.
        ours: It is from a daemon before us, so that its file is ours as well.

    Raises:
        AlreadyRunning: Another daemon listens there, or is about to.
        Unauthorized: Somebody else could tamper with the directory, or owns what stands at ``path``, or may connect.
        InvalidArgument: ``path`` cannot be a socket.
    """
    parent, name = os.path.split(os.path.abspath(path))
    with ExitStack() as undo:
        directory = _open_directory(parent)
        undo.callback(os.close, directory)
        lock = _lock(directory, name, path)
        undo.callback(os.close, lock)
        made = ours or listening is None
        if listening is None:
            _check_replaceable(directory, name, path)
            listening = _listen(directory, name, path)
            undo.callback(listening.close)
        else:
            undo.callback(listening.close)
            _check_passed(directory, name, path)
        listener = Listener(os.path.join(parent, name), listening, directory, lock, made=made)
        undo.pop_all()
        return listener


def _open_directory(path: str) -> int:
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.EEXIST):
            raise _unsafe(path, "it is not a directory, or is a symlink to one") from error
        raise InvalidArgument(f"cannot use the directory {path!r}", detail=error.strerror or "") from error
    status = os.fstat(directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(directory)
        detail = f"it belongs to uid {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):04o}"
        raise _unsafe(path, detail)
    return directory


def _unsafe(path: str, detail: str) -> Unauthorized:
    return Unauthorized(
        f"cannot put the socket into {path!r}",
        detail=f"{detail}; it must be a directory of uid {os.geteuid()} that nobody else can write to",
        hint=f"mkdir -m 700 DIR, and set SANDBOXD_SOCKET=DIR/{SOCKET_NAME}",
    )


def _lock(directory: int, name: str, path: str) -> int:
    lock = os.open(
        lock_path(name),
        os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
        0o600,
        dir_fd=directory,
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise AlreadyRunning(
            f"cannot listen on {path!r}", detail="another daemon does", hint="sandboxctl daemon status"
        ) from None
    return lock


def _identity(directory: int, name: str) -> tuple[int, int]:
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    return status.st_dev, status.st_ino


def _check_replaceable(directory: int, name: str, path: str) -> None:
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise InvalidArgument(f"cannot listen on {path!r}", detail="there is something else than a socket")
    if status.st_uid != os.geteuid():
        raise Unauthorized(f"cannot listen on {path!r}", detail=f"there is a socket of uid {status.st_uid}")


def _check_passed(directory: int, name: str, path: str) -> None:
    """A socket that somebody else made must be as ours would be."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError as error:
        raise InvalidArgument(f"cannot listen on {path!r}", detail=error.strerror or "") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise InvalidArgument(f"cannot listen on {path!r}", detail="there is something else than a socket")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise Unauthorized(
            f"cannot listen on {path!r}",
            detail=f"the socket belongs to uid {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):04o}; "
            f"it must be uid {os.geteuid()}'s alone",
            hint="SocketMode=0600 in the unit: sandboxctl daemon install",
        )


def _listen(directory: int, name: str, path: str) -> socket.socket:
    """Listen under a name of our own first, then rename: clients find a socket that answers, or the old one, or none.

    Through /proc/self/fd the address is short, however long the path: the kernel's bound is 107 bytes.
    """
    temporary = f".{os.getpid()}.sock"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        # The mode of the unbound socket becomes the file's mode, so it is never open to others.
        os.fchmod(listening.fileno(), 0o600)
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        listening.bind(f"/proc/self/fd/{directory}/{temporary}")
        listening.listen(BACKLOG)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as error:
        listening.close()
        raise InvalidArgument(f"cannot listen on {path!r}", detail=error.strerror or "") from error
    return listening
