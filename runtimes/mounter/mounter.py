"""Mounting a directory of the host into a container that already runs, by the resident ``sandbox-mounter``.

A mount made by the engine costs an engine call, and only a container that is being created can have one. This
one is made in the container's own mount namespace through the kernel's new mount API: by descriptor, so that no
symlink can swap the directory; nosuid, nodev, private. It ends with the container, and is never seen on the host.

Works as root, and as an ordinary user for containers in user namespaces of that user (rootless Podman).
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct

import anyio
import msgspec

from runtimes.errors import UnreadableAnswer, Unsupported
from runtimes.process import Helper, start_helper

DEADLINE_S = 2.0
"""For one mount. Only a file system that does not answer takes longer than some milliseconds."""

_PATH_BYTES = 4096
_HOSTNAME_BYTES = 64
_REQUEST = struct.Struct(f"=QQQ{_PATH_BYTES}s{_PATH_BYTES}s{_HOSTNAME_BYTES}s")
_REPLY = struct.Struct("=Ii")

_READ_ONLY = 1
_IDMAPPED = 2
_ENTER_USER_NS = 4
_SET_HOSTNAME = 8

_STAGES = (
    "done",
    "cannot enter the container's namespaces",
    "cannot open the directory once more",
    "the directory was replaced by another",
    "cannot clone the mount",
    "cannot set the attributes of the mount",
    "cannot open the place to mount at",
    "cannot mount there",
    "something else is seen where it was mounted",
    "cannot set the host name",
)
"""As in ``enum stage`` of mounter.c."""

_KERNEL_STAGES = frozenset({4, 5, 7})
_CANNOT = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
"""At these stages: the kernel is too old, or the file system cannot be cloned or mapped."""


class LateMount(msgspec.Struct, frozen=True, kw_only=True):
    """What to mount into which container."""

    pid: int
    """The container's PID 1, known to be it; its namespaces are entered."""
    source_fd: int
    """An opened directory (``O_PATH`` is enough); stays the caller's."""
    source_path: str
    """Its real path: an ordinary user must open it once more."""
    target: str
    """Absolute path of a directory inside."""
    read_only: bool = False
    idmap_fd: int | None = None
    """A user namespace whose map the mount shows."""
    hostname: str | None = None
    """A new host name for the container."""


class Mounter:
    """The resident helper, started when it is first needed, and again if it has ended.

    Args:
        program: Absolute path of ``sandbox-mounter``.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._helper: Helper | None = None
        self._socket: socket.socket | None = None

    @property
    def helper_pid(self) -> int | None:
        """Of the helper; None before it is needed."""
        return None if self._helper is None else self._helper.pid

    def close(self) -> None:
        """End the helper. Mounts stay."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    async def mount(self, wanted: LateMount) -> None:
        """Mount, and see that it was done.

        Raises:
            Unsupported: this kernel or file system cannot; nothing was mounted.
            UnreadableAnswer: anything else; what is mounted in the container is not known then.
        """
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            try:
                self._ask(wanted, write_fd)
            finally:
                os.close(write_fd)
            with anyio.fail_after(DEADLINE_S):
                await anyio.wait_readable(read_fd)
            answer = os.read(read_fd, _REPLY.size)
        except TimeoutError:
            raise _failed(wanted, "its file system does not answer") from None
        except OSError as error:
            raise _failed(wanted, error.strerror or str(error)) from error
        finally:
            os.close(read_fd)
        if len(answer) != _REPLY.size:
            raise _failed(wanted, "the helper ended without an answer")
        _judge(wanted, *_REPLY.unpack(answer))

    def _ask(self, wanted: LateMount, reply_fd: int) -> None:
        with contextlib.ExitStack() as opened:

            def namespace(kind: str) -> int:
                descriptor = os.open(f"/proc/{wanted.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
                opened.callback(os.close, descriptor)
                return descriptor

            flags = _READ_ONLY if wanted.read_only else 0
            descriptors = [reply_fd, wanted.source_fd, namespace("mnt")]
            if wanted.idmap_fd is not None:
                flags |= _IDMAPPED
                descriptors.append(wanted.idmap_fd)
            if not _is_root():
                flags |= _ENTER_USER_NS
                descriptors.append(namespace("user"))
            if wanted.hostname is not None:
                flags |= _SET_HOSTNAME
                descriptors.append(namespace("uts"))
            self._send(_request(flags, wanted), descriptors)

    def _send(self, request: bytes, descriptors: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._connected().sendmsg([request], rights)
        except (BrokenPipeError, ConnectionResetError):
            # It was killed; one more, and only one.
            self.close()
            self._connected().sendmsg([request], rights)

    def _connected(self) -> socket.socket:
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            with theirs:
                self._helper = start_helper([self._program], stdin_fd=theirs.fileno())
            self._socket = ours
        return self._socket


def _is_root() -> bool:
    return os.geteuid() == 0


def _request(flags: int, wanted: LateMount) -> bytes:
    status = os.fstat(wanted.source_fd)
    source, target = os.fsencode(wanted.source_path), os.fsencode(wanted.target)
    name = (wanted.hostname or "").encode()
    if max(len(source), len(target)) >= _PATH_BYTES or len(name) >= _HOSTNAME_BYTES:
        raise Unsupported("cannot mount into a running container", detail="a path or a name is too long")
    return _REQUEST.pack(flags, status.st_dev, status.st_ino, source, target, name)


def _judge(wanted: LateMount, stage: int, code: int) -> None:
    if stage == 0:
        return
    what = _STAGES[stage] if stage < len(_STAGES) else f"stage {stage}"
    if stage in _KERNEL_STAGES and code in _CANNOT:
        raise Unsupported("cannot mount into a running container here", detail=f"{what}: {os.strerror(code)}")
    raise _failed(wanted, f"{what}: {os.strerror(code)}")


def _failed(wanted: LateMount, detail: str) -> UnreadableAnswer:
    return UnreadableAnswer(f"cannot mount {wanted.source_path!r} into a running container", detail=detail)
