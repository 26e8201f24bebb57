"""What the tests of the file worker share: a tree of their own, and a worker that works in it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from runtimes.init.files import FilesChannel
from runtimes.init.files_wire import Flag, RequestType, encode_set_times
from tests.unit.init_harness import Host, descriptor_count, running_init, state_of, until


class Tree:
    """A directory, the worker that resolves paths below it, and the init that it came from."""

    def __init__(self, host: Host, files: FilesChannel, root: Path) -> None:
        self.host = host
        self.files = files
        self.root = root

    @property
    def worker(self) -> int:
        """The worker's pid; there must be one."""
        (pid,) = self.host.file_workers()
        return pid

    async def names(self, path: bytes = b".", depth: int = 64) -> set[bytes]:
        return {entry.path for entry in (await self.files.list_dir(path, depth=depth)).entries}

    async def set_times(self, path: bytes, mtime_ns: int, *, follow: bool = True) -> None:
        """What an upload asks for at the end of a file."""
        worker = self.files._worker
        base, flags = worker.base_of(path), Flag.FOLLOW if follow else Flag.NONE
        await worker.do(
            lambda n: encode_set_times(n, flags, base, mtime_ns, path), path, RequestType.SET_TIMES, again=True
        )


@contextlib.asynccontextmanager
async def tree(*, prepare: Callable[[], None] | None = None) -> AsyncIterator[Tree]:
    """A tree; in the end the worker must hold no more descriptors than in the beginning."""
    root = Path(tempfile.mkdtemp(prefix="files-"))
    try:
        async with running_init(prepare=prepare) as host:
            files = await host.channel.open_files(os.fsencode(root))
            with contextlib.closing(files):
                await files.stat(b"/")  # it answers, so it bears its name by now
                (first,) = host.file_workers()
                await until(lambda: state_of(first) == "S", "it waits for a request")
                before = descriptor_count(first)
                yield Tree(host, files, root)
                await until(lambda: descriptors_left(first) in (0, before), "the worker closed all")
            await until(lambda: not host.file_workers(), "the worker ends")
    finally:
        shutil.rmtree(root)


def descriptors_left(pid: int) -> int:
    """0 of a process that has ended."""
    try:
        return descriptor_count(pid)
    except FileNotFoundError:
        return 0


def refuse_unnamed_files() -> None:
    """For this process and its children: O_TMPFILE is answered as by a file system that does not know it."""
    bpf_load, bpf_jump_set, bpf_jump_equal, bpf_return = 0x20, 0x45, 0x15, 0x06
    sys_openat = {"x86_64": 257, "aarch64": 56}[os.uname().machine]
    tmpfile_bit, third_argument = os.O_TMPFILE & ~os.O_DIRECTORY, 16 + 2 * 8
    steps = [
        (bpf_load, 0, 0, 0),
        (bpf_jump_equal, 0, 3, sys_openat),
        (bpf_load, 0, 0, third_argument),
        (bpf_jump_set, 0, 1, tmpfile_bit),
        (bpf_return, 0, 0, 0x00050000 | errno.EOPNOTSUPP),
        (bpf_return, 0, 0, 0x7FFF0000),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, ctypes.byref(header), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def make_deep(folder: Path, levels: int) -> None:
    """Directories in each other, deeper than any path can say."""
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
