"""``files/*``."""

from __future__ import annotations

from runtimes.init.files import FilesChannel
from sandboxd import files, protocol
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.server import Context


class FileHandlers:
    """Files inside sandboxes."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "files/read": self.read,
            "files/write": self.write,
            "files/list": self.list,
            "files/stat": self.stat,
            "files/make_dir": self.make_dir,
            "files/rename": self.rename,
            "files/remove": self.remove,
        }

    async def _files(self, params: protocol.PathParams) -> FilesChannel:
        return await self._manager.get(params.sandbox).files()

    async def read(self, params: protocol.FileReadParams, _: Context) -> protocol.FileContent:
        """Read."""
        return await files.read(await self._files(params), params)

    async def write(self, params: protocol.FileWriteParams, _: Context) -> protocol.FileInfo:
        """Write, whole or not at all."""
        return await files.write(await self._files(params), params)

    async def list(self, params: protocol.FileListParams, _: Context) -> protocol.FileList:
        """List a directory."""
        return await files.list_dir(await self._files(params), params)

    async def stat(self, params: protocol.FileStatParams, _: Context) -> protocol.FileInfo:
        """Look at one file."""
        return await files.look(await self._files(params), params)

    async def make_dir(self, params: protocol.FileMakeDirParams, _: Context) -> protocol.FileMade:
        """Make a directory."""
        channel = await self._files(params)
        created = await channel.make_dir(files.path_of(params), make_parents=params.make_parents)
        return protocol.FileMade(created=created)

    async def rename(self, params: protocol.FileRenameParams, _: Context) -> protocol.Acknowledged:
        """Rename."""
        channel = await self._files(params)
        await channel.rename(files.path_of(params), params.new_path.encode(), no_replace=not params.replace)
        return protocol.Acknowledged()

    async def remove(self, params: protocol.FileRemoveParams, _: Context) -> protocol.Acknowledged:
        """Remove."""
        channel = await self._files(params)
        await channel.remove(files.path_of(params), recursive=params.recursive)
        return protocol.Acknowledged()
