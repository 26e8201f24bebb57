"""What the tests of transfers share: a real file worker in a tree of the test's own, and both directions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtimes.init.file_pipeline import FilePipeline
from sandboxd.packing import Packing
from sandboxd.streams import Incoming, Outgoing, Patience, Skips, Tally
from sandboxd.unpacking import Bounds, Unpacking
from tests.unit.init_files import Tree

IDLE_S = 20.0
"""A bound for what must happen; nothing takes that long unless it is broken."""

WIDE = Bounds(bytes_max=2**40, entries_max=10**6)


class Moved:
    """How a transfer ended."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.skips = Skips()
        self.data = b""

    def reasons(self) -> dict[bytes, str]:
        assert self.skips.count == len(self.skips.listed)
        return dict(self.skips.listed)


async def _with_worker(tree: Tree, work: Callable[[FilePipeline, Patience], None], idle_s: float) -> None:
    worker = await tree.host.channel.take_file_worker()
    patience = Patience(idle_s)
    try:
        with FilePipeline(worker, patience.wait_for) as pipeline:
            await asyncio.to_thread(work, pipeline, patience)
    finally:
        patience.close()


async def unpack(
    tree: Tree, archive: bytes, *, into: bytes = b".", bounds: Bounds = WIDE, keep_times: bool = True
) -> Moved:
    """Send an archive through a pipe into the tree."""
    moved = Moved()
    read_end, write_end = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "wb") as pipe:
            pipe.write(archive)

    def work(pipeline: FilePipeline, patience: Patience) -> None:
        with contextlib.closing(Incoming(read_end, patience, moved.tally)) as incoming:
            unpacking = Unpacking(
                pipeline,
                base=os.fsencode(tree.root),
                root=into,
                keep_times=keep_times,
                bounds=bounds,
                tally=moved.tally,
                patience=patience,
            )
            moved.skips = unpacking.skips
            unpacking.run(incoming)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        await _with_worker(tree, work, IDLE_S)
    finally:
        feeder.join()
    return moved


async def pack(
    tree: Tree, path: bytes, *, name: bytes | None = b".", bounds: Bounds = WIDE, follow: bool = False, **hooks: Any
) -> Moved:
    """Get an archive from the tree through a pipe."""
    moved = Moved()
    read_end, write_end = os.pipe()

    def collect() -> None:
        with os.fdopen(read_end, "rb") as pipe:
            moved.data = pipe.read()

    def work(pipeline: FilePipeline, patience: Patience) -> None:
        with contextlib.closing(Outgoing(write_end, patience, moved.tally)) as outgoing:
            packing = Packing(
                pipeline, base=os.fsencode(tree.root), bounds=bounds, tally=moved.tally, patience=patience
            )
            moved.skips = packing.skips
            packing.run(outgoing, path, name, follow=follow)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        await _with_worker(tree, work, IDLE_S)
    finally:
        collector.join()
    return moved


def describe(root: Path) -> dict[bytes, tuple[Any, ...]]:
    """A tree as its names say it: kind, mode, time, and content or target."""
    found: dict[bytes, tuple[Any, ...]] = {}
    for folder, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            below = os.path.relpath(path, os.fsencode(root))
            if os.path.islink(path):
                found[below] = ("link", os.readlink(path), status.st_mtime_ns)
            elif os.path.isdir(path):
                found[below] = ("dir", status.st_mode & 0o7777, status.st_mtime_ns)
            else:
                with open(path, "rb") as file:
                    found[below] = ("file", status.st_mode & 0o7777, status.st_mtime_ns, file.read())
    return found


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what another process does, and nobody tells."""
    deadline = time.monotonic() + IDLE_S
    while not condition():
        assert time.monotonic() < deadline, f"it never happened that {what}"
        time.sleep(0.01)
