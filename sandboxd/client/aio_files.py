"""``AsyncFiles``: the files of a sandbox, for async code. The twin of ``files``, method for method.

What takes long, which is reading and writing content, is done in worker threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import anyio
import anyio.to_thread

from sandboxd.client.aio_calls import call, connect, open_file, settled
from sandboxd.client.calls import late
from sandboxd.client.connection import result_of
from sandboxd.client.content import INLINE_BYTES_MAX, FileStream, read_all, source
from sandboxd.client.errors import SandboxException, TimeoutException, translated
from sandboxd.client.file_model import (
    EntryInfo,
    FilesystemEvent,
    WriteEntry,
    WriteInfo,
    entries,
    entry_info,
    events,
    path_params,
    rows_of,
    text_params,
    write_info,
)
from sandboxd.client.files import LIST_DEPTH, end_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from sandboxd.client.connection import Connection, Message
    from sandboxd.client.copying import End, TransferInfo
    from sandboxd.client.file_model import Data

    EventCallback = Callable[[FilesystemEvent], object]
    ExitCallback = Callable[[Exception], object]

WATCH_TIMEOUT_S = 60.0

T = TypeVar("T")


class AsyncFileStream:
    """What is in a file, a piece at a time: iterate over it. It is closed at its end, or by ``aclose``."""

    def __init__(self, number: int) -> None:
        self._stream = FileStream(number)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await anyio.to_thread.run_sync(next, self._stream, b"")
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Give up the rest. Idempotent."""
        self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncFiles:
    """The files of a sandbox. Relative paths begin at /workspace, or at / where there is none.

    Every method raises what those of ``Files`` do.
    """

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id

    @overload
    async def read(
        self,
        path: str,
        format: Literal["text"] = "text",
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> str: ...
    @overload
    async def read(
        self,
        path: str,
        format: Literal["bytes"],
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> bytearray: ...
    @overload
    async def read(
        self,
        path: str,
        format: Literal["stream"],
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> AsyncFileStream: ...
    async def read(
        self,
        path: str,
        format: Literal["text", "bytes", "stream"] = "text",  # noqa: A002
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> str | bytearray | AsyncFileStream:
        """What is in a file: as text, with replacement characters where it is not UTF-8; as bytes; or piece by piece.

        A file above 1 GiB is only read as a stream.
        """
        number = await open_file(path_params(self._sandbox_id, path, user), request_timeout)
        if format == "stream":
            return AsyncFileStream(number)
        if os.fstat(number).st_size <= INLINE_BYTES_MAX:
            content = read_all(number, path)
        else:
            # Not to be given up before it has begun: the descriptor is the thread's to close.
            with anyio.CancelScope(shield=True):
                content = await anyio.to_thread.run_sync(read_all, number, path)
        return content if format == "bytes" else content.decode(errors="replace")

    async def write(
        self, path: str, data: Data, user: str | None = None, request_timeout: float | None = None
    ) -> WriteInfo:
        """Make a file of text, bytes, or what is in a stream; its directories are made, and an old content replaced.

        Whole or not at all: whoever looks sees what was there before, or all of what is written.
        """
        params = path_params(self._sandbox_id, path, user)
        async with _prepared(data) as (content, descriptors):
            return write_info(await call("files/write", {**params, **content}, request_timeout, descriptors))

    async def write_files(
        self, files: Sequence[WriteEntry], user: str | None = None, request_timeout: float | None = None
    ) -> list[WriteInfo]:
        """Write several, one after the other. Each is whole; those before one that fails stay."""
        return [await self.write(entry["path"], entry["data"], user, request_timeout) for entry in files]

    async def list(
        self, path: str, depth: int = LIST_DEPTH, user: str | None = None, request_timeout: float | None = None
    ) -> list[EntryInfo]:
        """What is in a directory, so many levels of it, in the order of the paths."""
        rows: list[Mapping[str, Any]] = []
        params = {**path_params(self._sandbox_id, path, user), "depth": depth, "pages": True}

        def take(message: Message) -> None:
            rows.extend(rows_of(message.content))

        return entries(await call("files/list", params, request_timeout, (), take), rows)

    async def exists(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Whether something bears the name, be it a link that leads nowhere."""
        reply = await call("files/exists", path_params(self._sandbox_id, path, user), request_timeout)
        return bool(reply["exists"])

    async def get_info(self, path: str, user: str | None = None, request_timeout: float | None = None) -> EntryInfo:
        """Everything about one file; links are not followed."""
        return entry_info(await call("files/stat", path_params(self._sandbox_id, path, user), request_timeout))

    async def remove(self, path: str, user: str | None = None, request_timeout: float | None = None) -> None:
        """Remove a file, or a directory with all that is in it. That there is none is no error."""
        params = {**path_params(self._sandbox_id, path, user), "recursive": True, "missing_ok": True}
        await call("files/remove", params, request_timeout)

    async def rename(
        self, old_path: str, new_path: str, user: str | None = None, request_timeout: float | None = None
    ) -> EntryInfo:
        """Give another name, in the same file system, replacing what bears it."""
        params = {**path_params(self._sandbox_id, old_path, user), **text_params("new_path", new_path)}
        await call("files/rename", params, request_timeout)
        return await self.get_info(new_path, None, request_timeout)

    async def make_dir(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Make a directory, and those above it. False: it was there."""
        reply = await call("files/make_dir", path_params(self._sandbox_id, path, user), request_timeout)
        return bool(reply["created"])

    async def upload(
        self,
        local: str | os.PathLike[str],
        path: str,
        user: str | None = None,
        request_timeout: float | None = None,
        exact: bool = False,
    ) -> TransferInfo:
        """Copy a file of this host to ``path``, or what is in a directory into ``path``. As ``Files.upload``."""
        from sandboxd.client.copying import uploading

        params = {**path_params(self._sandbox_id, path, user), "make_parents": True}
        end = await _in_thread(partial(uploading, local, exact=exact))
        return await _copy("files/upload", params, end, request_timeout)

    async def download(
        self,
        path: str,
        local: str | os.PathLike[str],
        user: str | None = None,
        request_timeout: float | None = None,
        exact: bool = False,
    ) -> TransferInfo:
        """Copy a file of the sandbox to ``local``, or what is in a directory into it. As ``Files.download``."""
        from sandboxd.client.copying import downloading

        params = path_params(self._sandbox_id, path, user)
        info = await call("files/stat", {**params, "follow": True}, request_timeout)
        end = await _in_thread(partial(downloading, local, info, exact=exact))
        return await _copy("files/download", params, end, request_timeout)

    async def watch_dir(
        self,
        path: str,
        on_event: EventCallback,
        on_exit: ExitCallback | None = None,
        user: str | None = None,
        request_timeout: float | None = None,
        timeout: float | None = WATCH_TIMEOUT_S,  # noqa: ASYNC109 - of the watch, not of this call
        recursive: bool = False,
    ) -> AsyncWatchHandle:
        """Watch a directory, or a file, from a task of its own; needs an asyncio loop.

        Args:
            path: What to watch.
            on_event: Called with each event, in order; may be async, and holds up only this watch.
            on_exit: Called with the reason when the watch ends and nobody stopped it; may be async.
            user: Nobody but the sandbox's own.
            request_timeout: Seconds until the watch must stand.
            timeout: Seconds until it ends; 0 or None: never.
            recursive: All that is below, and will be.
        """
        params = {**path_params(self._sandbox_id, path, user), "recursive": recursive}
        with translated():
            connection = await connect()
            try:
                happened: list[FilesystemEvent] = []
                with anyio.move_on_after(request_timeout) as waiting:
                    happened = await _stands(connection, params)
                if waiting.cancelled_caught:
                    raise late()
            except BaseException:
                connection.close()
                raise
        return AsyncWatchHandle(connection, path, happened, on_event, on_exit, timeout or None)


@contextlib.asynccontextmanager
async def _prepared(data: Data) -> AsyncIterator[tuple[dict[str, Any], list[int]]]:
    """As ``source``, which may take long where there is much, or a stream to read from."""
    prepared = source(data)
    if isinstance(data, str | bytes | bytearray) and len(data) <= INLINE_BYTES_MAX:
        content = prepared.__enter__()
    else:
        content = await anyio.to_thread.run_sync(prepared.__enter__)
    try:
        yield content
    finally:
        prepared.__exit__(None, None, None)


async def _stands(connection: Connection, params: dict[str, Any]) -> list[FilesystemEvent]:
    """Begin to watch; return what happened by the time that the watch is known to stand."""
    connection.send("files/watch", params)
    happened: list[FilesystemEvent] = []
    stands = False
    while not stands:
        await anyio.wait_readable(connection.fileno())
        for message in connection.read():
            if "method" not in message.content:
                result_of(message.content)
            stands = stands or message.content.get("method") == "files/watching"
            happened += events(message.content)
    return happened


class AsyncWatchHandle:
    """A watch that goes on until it is stopped, or ends."""

    def __init__(
        self,
        connection: Connection,
        path: str,
        happened: Sequence[FilesystemEvent],
        on_event: EventCallback,
        on_exit: ExitCallback | None,
        timeout_s: float | None,
    ) -> None:
        self._connection = connection
        self._path = path
        self._on_event = on_event
        self._on_exit = on_exit
        self._task = asyncio.get_running_loop().create_task(self._follow(happened, timeout_s))

    async def stop(self) -> None:
        """End the watch, and wait until no callback runs any more, unless it is one that stops it. Idempotent."""
        self._task.cancel()
        if asyncio.current_task() is not self._task:
            await asyncio.wait([self._task])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _follow(self, happened: Sequence[FilesystemEvent], timeout_s: float | None) -> None:
        try:
            with self._connection, translated():
                await self._tell(happened)
                await self._read(timeout_s)
        except SandboxException as error:
            # Not the callback's: that ends the task, and asyncio tells whoever listens.
            if self._on_exit is not None:
                await settled(self._on_exit(error))

    async def _read(self, timeout_s: float | None) -> None:
        deadline = anyio.current_time() + timeout_s if timeout_s is not None else float("inf")
        while True:
            with anyio.move_on_at(deadline) as waiting:
                await anyio.wait_readable(self._connection.fileno())
            if waiting.cancelled_caught:
                raise TimeoutException(f"the watch of {self._path!r} is over", hint="give timeout=0", type="timeout")
            for message in self._connection.read():
                if "method" not in message.content:
                    raise end_of(message.content, self._path)
                await self._tell(events(message.content))

    async def _tell(self, happened: Sequence[FilesystemEvent]) -> None:
        for event in happened:
            await settled(self._on_event(event))


async def _in_thread(work: Callable[[], T]) -> T:
    """Its result; not to be given up before it is there, for it may hold descriptors."""
    with anyio.CancelScope(shield=True):
        result = await anyio.to_thread.run_sync(work)
    # A scope may swallow an exception, as far as types can tell.
    return result  # noqa: RET504


async def _copy(method: str, params: Mapping[str, Any], end: End, timeout_s: float | None) -> TransferInfo:
    from sandboxd.client.copying import transfer_info

    with contextlib.closing(end):
        reply: dict[str, Any] = {}
        failure: SandboxException | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_in_thread, end.work)
            try:
                reply = await call(method, {**params, **end.params}, timeout_s, [end.descriptor])
            except SandboxException as error:
                end.stop()
                failure = error
            except BaseException:
                end.stop()
                raise
            finally:
                end.leave()
        await _in_thread(partial(end.check, failure))
        return transfer_info(reply, end)
