"""A daemon for ``files/*`` alone: real handlers and a real file worker, on this host instead of in a container.

Its sandboxes ``box`` and ``other`` are directories, named on the command line. Run by ``test_cp.py``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import anyio

from runtimes.init.files import FilesChannel
from sandboxd.failures import NotFound
from sandboxd.handlers.dispatch import Dispatcher
from sandboxd.handlers.files import FileHandlers
from sandboxd.lifecycle import State
from sandboxd.listener import open_listener
from sandboxd.server import serve
from tests.unit.init_harness import Host, running_init


class Directory:
    """What the handlers need of a sandbox."""

    def __init__(self, name: str, host: Host, base: str) -> None:
        self.record = SimpleNamespace(id=name, state=State.RUNNING, state_reason="")
        self.files_base = os.fsencode(base)
        self.take_file_worker = host.channel.take_file_worker
        self._host = host
        self._files: FilesChannel | None = None

    async def files(self) -> FilesChannel:
        if self._files is None:
            self._files = await self._host.channel.open_files(self.files_base)
        return self._files

    def close(self) -> None:
        if self._files is not None:
            self._files.close()


class Directories:
    """What the handlers need of a manager."""

    def __init__(self, sandboxes: dict[str, Directory]) -> None:
        self._sandboxes = sandboxes

    def get(self, ref: str) -> Directory:
        if ref not in self._sandboxes:
            raise NotFound(f"cannot find a sandbox {ref!r}", hint="sandboxctl ls")
        return self._sandboxes[ref]


def _unused(*_: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


async def _nothing_to_refuse(*_: object) -> None:
    return None


async def main(bases: list[str]) -> None:
    async with running_init() as host:
        boxes = {name: Directory(name, host, base) for name, base in zip(("box", "other"), bases, strict=True)}
        handlers: Any = FileHandlers(Directories(boxes))  # type: ignore[arg-type]
        with contextlib.ExitStack() as stack:
            for box in boxes.values():
                stack.callback(box.close)
            listener = stack.enter_context(open_listener(os.environ["SANDBOXD_SOCKET"]))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(serve, listener.socket, Dispatcher([handlers.table()], _unused, _nothing_to_refuse))
                print("ready", flush=True)
                with anyio.open_signal_receiver(signal.SIGTERM) as signals:
                    async for _ in signals:
                        break
                tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1:])
