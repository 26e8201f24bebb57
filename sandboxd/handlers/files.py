"""``files/*``."""

from __future__ import annotations

import contextlib
import os

import anyio

from runtimes.init.files import FilesChannel
from sandboxd import files, protocol, watching
from sandboxd.connection import Context
from sandboxd.failures import InvalidArgument
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.transfer import Transfers

OPENED = "files/opened"
LISTED = "files/listed"
WATCHING = "files/watching"
CHANGED = "files/changed"


class FileHandlers:
    """Files inside sandboxes."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._copies = anyio.CapacityLimiter(files.COPIES_MAX)
        self._transfers = Transfers()

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "files/read": self.read,
            "files/write": self.write,
            "files/list": self.list,
            "files/stat": self.stat,
            "files/exists": self.exists,
            "files/make_dir": self.make_dir,
            "files/rename": self.rename,
            "files/remove": self.remove,
            "files/watch": self.watch,
            "files/upload": self.upload,
            "files/download": self.download,
        }

    async def _files(self, params: protocol.PathParams) -> FilesChannel:
        return await self._manager.get(params.sandbox).files()

    async def read(self, params: protocol.FileReadParams, context: Context) -> protocol.FileContent:
        """Read, or hand out what to read from."""
        channel = await self._files(params)
        if not params.descriptor:
            return await files.read(channel, params)
        token = _token(context)
        opened = await channel.open(files.path_of(params))
        size = opened.facts.size
        context.notify(OPENED, protocol.FileOpened(token=token, size_bytes=size), (opened.descriptor,))
        return protocol.FileContent(data=b"", size_bytes=size)

    async def write(self, params: protocol.FileWriteParams, context: Context) -> protocol.FileInfo:
        """Write, whole or not at all."""
        channel = await self._files(params)
        descriptors = context.take_descriptors()
        try:
            return await files.write(channel, params, descriptors[0] if descriptors else None, self._copies)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def list(self, params: protocol.FileListParams, context: Context) -> protocol.FileList:
        """List a directory."""
        channel = await self._files(params)
        if not params.pages:
            return await files.list_dir(channel, params)
        token = _token(context)

        async def deliver(entries: list[protocol.FileInfo]) -> None:
            await context.deliver(LISTED, protocol.FilePage(token=token, entries=entries))

        return await files.list_pages(channel, params, deliver)

    async def stat(self, params: protocol.FileStatParams, _: Context) -> protocol.FileInfo:
        """Look at one file."""
        return await files.look(await self._files(params), params)

    async def exists(self, params: protocol.FileStatParams, _: Context) -> protocol.FileExists:
        """Look whether there is one."""
        return protocol.FileExists(exists=await files.exists(await self._files(params), params))

    async def make_dir(self, params: protocol.FileMakeDirParams, _: Context) -> protocol.FileMade:
        """Make a directory."""
        channel = await self._files(params)
        created = await channel.make_dir(files.path_of(params), make_parents=params.make_parents)
        return protocol.FileMade(created=created)

    async def rename(self, params: protocol.FileRenameParams, _: Context) -> protocol.Acknowledged:
        """Rename."""
        await files.rename(await self._files(params), params)
        return protocol.Acknowledged()

    async def remove(self, params: protocol.FileRemoveParams, _: Context) -> protocol.Acknowledged:
        """Remove."""
        await files.remove(await self._files(params), params)
        return protocol.Acknowledged()

    async def upload(self, params: protocol.FileUploadParams, context: Context) -> protocol.FileTransfer:
        """Put a tree or a file into it."""
        return await self._transfers.upload(self._manager.get(params.sandbox), params, context)

    async def download(self, params: protocol.FileDownloadParams, context: Context) -> protocol.FileTransfer:
        """Get a tree or a file from it."""
        return await self._transfers.download(self._manager.get(params.sandbox), params, context)

    async def watch(self, params: protocol.FileWatchParams, context: Context) -> protocol.FileWatchEnd:
        """Tell changes until the caller has enough of them, or they cannot be told any more."""
        token = _token(context)
        channel = await self._files(params)
        watcher = await channel.watch(files.path_of(params), recursive=params.recursive)

        async def deliver(changes: list[protocol.FileChange]) -> None:
            told = protocol.FileChanges(token=token, changes=changes, truncated=watcher.truncated)
            await context.deliver(CHANGED, told)

        with contextlib.closing(watcher):
            context.notify(WATCHING, protocol.FileWatching(token=token, truncated=watcher.truncated))
            await watching.tell(watcher, params.path, deliver)
        return protocol.FileWatchEnd(path=params.path)


def _token(context: Context) -> int | str:
    """What names the request in notifications."""
    if context.request_id is None:
        raise InvalidArgument("cannot answer with notifications", detail="the request has no id", hint="give it one")
    return context.request_id
