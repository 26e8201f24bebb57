"""Changing a container that already runs, by the resident ``sandbox-mounter``.

A mount made by the engine costs an engine call, and only a container that is being created can have one. This
one is made in the container's own mount namespace through the kernel's new mount API: by descriptor, so that no
symlink can swap the directory; nosuid, nodev, private. It ends with the container, and is never seen on the host.
With the same request its tmpfs get other sizes, and it another host name: all that an engine fixes at creation and
the kernel does not. What sizes they have in the end comes with the answer.

Works as root, and as an ordinary user for containers in user namespaces of that user (rootless Podman).
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Mapping

import anyio
import msgspec

from runtimes.cgroup.readings import UNLIMITED
from runtimes.errors import UnreadableAnswer, Unsupported
from runtimes.process import Helper, start_helper

DEADLINE_S = 2.0
"""For one request. Only a file system that does not answer takes longer than some milliseconds."""

_PATH_BYTES = 4096
_HOSTNAME_BYTES = 64
_SIZES_MAX = 6
_SIZE_PATH_BYTES = 256
_SIZE = struct.Struct(f"={_SIZE_PATH_BYTES}s24s")
_REQUEST = struct.Struct(f"=QQQ{_PATH_BYTES}s{_PATH_BYTES}s{_HOSTNAME_BYTES}s")
_REPLY = struct.Struct(f"=Ii{_SIZES_MAX}Q")
_SIZE_UNKNOWN = 2**64 - 1

_ENTER_USER_NS = 1
_MOUNT_SOURCE = 2
_SET_HOSTNAME = 4
_READ_ONLY = 8

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
    "cannot change the size of a tmpfs",
    "cannot set the host name",
)
"""As in ``enum stage`` of mounter.c."""

_WHAT = "cannot change a running container"

_KERNEL_STAGES = frozenset({4, 5, 7, 9})
_CANNOT = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
"""At these stages: the kernel is too old, or the file system cannot be cloned or mapped."""


class LateMount(msgspec.Struct, frozen=True, kw_only=True):
    """What to mount into a container that runs."""

    source_fd: int
    """As root: a mount that is nowhere yet, see ``mounts.detached_bind``. Else an opened directory (``O_PATH`` is
    enough), whose mount is made nosuid, nodev and private. Stays the caller's."""
    source_path: str
    """Its real path: an ordinary user must open it once more."""
    target: str
    """Absolute path of a directory inside."""
    read_only: bool = False
    """Of the mount that is made for an ordinary user."""


class Told:
    """What the kernel says of a container that was changed, once it is known that it was."""

    def __init__(self) -> None:
        self.tmpfs_bytes: dict[str, int] = {}
        """The size of each tmpfs that was named, by its path inside; without those of which it cannot be said so."""


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

    def prepare(self) -> None:
        """Have the helper running: whoever needs it first must not wait for its start. Idempotent.

        Raises:
            OSError: it cannot be started.
        """
        self._connected()

    def close(self) -> None:
        """End the helper. Mounts stay."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    async def change(
        self,
        pid: int,
        *,
        mount: LateMount | None = None,
        tmpfs_bytes: Mapping[str, int | None] | None = None,
        hostname: str | None = None,
    ) -> Told:
        """Change a container, and see that it was done; see ``changing``."""
        async with self.changing(pid, mount=mount, tmpfs_bytes=tmpfs_bytes, hostname=hostname) as told:
            pass
        return told

    @contextlib.asynccontextmanager
    async def changing(
        self,
        pid: int,
        *,
        mount: LateMount | None = None,
        tmpfs_bytes: Mapping[str, int | None] | None = None,
        hostname: str | None = None,
    ) -> AsyncIterator[Told]:
        """Change a container: asked for before the body, which need not wait for it, and seen to be done after it.

        Where the body fails, nobody knows whether it was done. What it is given knows something after it.

        Args:
            pid: The container's PID 1, known to be it; its namespaces are entered.
            mount: What to mount into it.
            tmpfs_bytes: Path of a tmpfs inside to its new size; None: that stays, and is only told. Six at most.
            hostname: Its new host name.

        Raises:
            Unsupported: this kernel or file system cannot.
            UnreadableAnswer: anything else; what the container sees now is not known.
        """
        try:
            reply_fd = self._begin(pid, mount, tmpfs_bytes or {}, hostname)
        except OSError as error:
            raise UnreadableAnswer(_WHAT, detail=error.strerror or str(error)) from error
        told = Told()
        try:
            yield told
            answer = await _answer(reply_fd)
        finally:
            os.close(reply_fd)
        if len(answer) != _REPLY.size:
            raise UnreadableAnswer(_WHAT, detail="the helper ended without an answer")
        stage, code, *sizes = _REPLY.unpack(answer)
        _judge(stage, code)
        told.tmpfs_bytes = _known(dict(zip(tmpfs_bytes or {}, sizes, strict=False)))

    def _begin(
        self, pid: int, mount: LateMount | None, tmpfs_bytes: Mapping[str, int | None], hostname: str | None
    ) -> int:
        """Ask; returns the pipe that the answer comes on."""
        flags, descriptors, fields = 0, [], (0, 0, b"", b"")
        if mount is not None:
            flags |= _MOUNT_SOURCE | (_READ_ONLY if mount.read_only else 0)
            descriptors.append(mount.source_fd)
            status = os.fstat(mount.source_fd)
            fields = (status.st_dev, status.st_ino, os.fsencode(mount.source_path), os.fsencode(mount.target))
        request = _packed(flags | (_SET_HOSTNAME if hostname is not None else 0), fields, hostname, tmpfs_bytes)
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._ask(pid, request, write_fd, descriptors, uts=hostname is not None)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        return read_fd

    def _ask(self, pid: int, request: bytes, reply_fd: int, descriptors: list[int], *, uts: bool) -> None:
        with contextlib.ExitStack() as opened:

            def namespace_fd(kind: str) -> int:
                descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
                opened.callback(os.close, descriptor)
                return descriptor

            passed = [reply_fd, namespace_fd("mnt"), *descriptors]
            if uts:
                passed.append(namespace_fd("uts"))
            if not _is_root():
                passed.append(namespace_fd("user"))
            self._send(request, passed)

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


def _packed(
    flags: int, fields: tuple[int, int, bytes, bytes], hostname: str | None, tmpfs_bytes: Mapping[str, int | None]
) -> bytes:
    if not _is_root():
        flags |= _ENTER_USER_NS
    name = (hostname or "").encode()
    sizes = [
        (os.fsencode(target), b"" if size_bytes is None else str(size_bytes).encode())
        for target, size_bytes in tmpfs_bytes.items()
    ]
    _, _, source, target = fields
    fits = (
        max(len(source), len(target)) < _PATH_BYTES
        and len(name) < _HOSTNAME_BYTES
        and len(sizes) <= _SIZES_MAX
        and all(len(path) < _SIZE_PATH_BYTES for path, _ in sizes)
    )
    if not fits:
        raise Unsupported(_WHAT, detail="a path or a name is too long")
    padded = [*sizes, *[(b"", b"")] * (_SIZES_MAX - len(sizes))]
    return _REQUEST.pack(flags, *fields, name) + b"".join(_SIZE.pack(*size) for size in padded)


async def _answer(reply_fd: int) -> bytes:
    """What the helper says; empty where it ended. Often it has said so by now."""
    with contextlib.suppress(BlockingIOError):
        return os.read(reply_fd, _REPLY.size)
    try:
        with anyio.fail_after(DEADLINE_S):
            await anyio.wait_readable(reply_fd)
        return os.read(reply_fd, _REPLY.size)
    except TimeoutError:
        raise UnreadableAnswer(_WHAT, detail="its file system does not answer") from None
    except OSError as error:
        raise UnreadableAnswer(_WHAT, detail=error.strerror or str(error)) from error


def _known(sizes: Mapping[str, int]) -> dict[str, int]:
    """Those that are known; of a tmpfs without a limit the kernel says 0."""
    return {target: size or UNLIMITED for target, size in sizes.items() if size != _SIZE_UNKNOWN}


def _judge(stage: int, code: int) -> None:
    if stage == 0:
        return
    said = f"{_STAGES[stage] if stage < len(_STAGES) else f'stage {stage}'}: {os.strerror(code)}"
    if stage in _KERNEL_STAGES and code in _CANNOT:
        raise Unsupported("cannot change a running container here", detail=said)
    raise UnreadableAnswer(_WHAT, detail=said)
