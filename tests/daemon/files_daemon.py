"""The methods of ``files/*`` on a real socket, for one sandbox that is a directory and a file worker on this host."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from anyio.from_thread import BlockingPortal, start_blocking_portal

from runtimes.init.files import FilesChannel
from sandboxd.connection import Limits
from sandboxd.failures import NotFound
from sandboxd.handlers.dispatch import Dispatcher
from sandboxd.handlers.files import FileHandlers
from sandboxd.lifecycle import State
from sandboxd.listener import open_listener
from sandboxd.server import serve
from tests.unit.init_files import Tree, tree

SANDBOX = "box"


class _Sandbox:
    def __init__(self, served: Tree) -> None:
        self.record = SimpleNamespace(id=SANDBOX, state=State.RUNNING, state_reason="")
        self.files_base = os.fsencode(served.root)
        self.take_file_worker = served.host.channel.take_file_worker
        self._channel = served.files

    async def files(self) -> FilesChannel:
        return self._channel


class _Manager:
    def __init__(self, served: Tree) -> None:
        self._sandbox = _Sandbox(served)

    def get(self, reference: str) -> _Sandbox:
        if reference != SANDBOX:
            raise NotFound(f"cannot find {reference!r}", detail="no such sandbox", hint="sandboxctl ls")
        return self._sandbox


def _unused(*_: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


async def _nothing_to_refuse(*_: object) -> None:
    return None


class FilesDaemon(NamedTuple):
    """A daemon that knows files and nothing else."""

    socket: str
    root: Path
    """Where relative paths start."""
    tree: Tree
    portal: BlockingPortal
    """Into its loop."""

    def close_files(self) -> None:
        """As when the sandbox goes away."""
        self.portal.call(self.tree.files.close)


@contextlib.contextmanager
def files_daemon(directory: Path, limits: Limits | None = None) -> Iterator[FilesDaemon]:
    """The daemon, in a thread of its own; in the end its worker holds nothing that it should not."""
    with (
        open_listener(str(directory / "s" / "sandboxd.sock")) as listener,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(tree()) as served,
    ):
        manager: Any = _Manager(served)
        dispatch = Dispatcher([FileHandlers(manager).table()], _unused, _nothing_to_refuse)

        async def run() -> None:
            await serve(listener.socket, dispatch, limits=limits)

        serving = portal.start_task_soon(run)
        try:
            yield FilesDaemon(listener.path, served.root, served, portal)
        finally:
            serving.cancel()
            with contextlib.suppress(BaseException):
                serving.exception()
