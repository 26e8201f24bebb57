"""``Files``: the files of a sandbox, blocking. Its twin for async code is ``aio_files``."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from typing import TYPE_CHECKING, Any, Literal, overload

from sandboxd.client.calls import call, open_file
from sandboxd.client.connection import RpcError, result_of
from sandboxd.client.content import FileStream, read_all, source
from sandboxd.client.errors import NotFoundException, SandboxException, exception_from, translated
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
from sandboxd.client.starting import connect_or_start

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from sandboxd.client.connection import Connection, Message
    from sandboxd.client.copying import End, TransferInfo
    from sandboxd.client.file_model import Data

LIST_DEPTH = 1


class Files:
    """The files of a sandbox. Relative paths begin at /workspace, or at / where there is none.

    Every method raises:
        NotFoundException: There is nothing at the path, or no such sandbox.
        InvalidArgumentException: The path cannot be meant: a directory where a file is wanted, or a file for one.
        NotEnoughSpaceException: The sandbox has no room left.
        SandboxException: What else is in the way; ``detail`` begins with the name of the errno.
    """

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id

    @overload
    def read(
        self,
        path: str,
        format: Literal["text"] = "text",
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> str: ...
    @overload
    def read(
        self,
        path: str,
        format: Literal["bytes"],
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> bytearray: ...
    @overload
    def read(
        self,
        path: str,
        format: Literal["stream"],
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> FileStream: ...
    def read(
        self,
        path: str,
        format: Literal["text", "bytes", "stream"] = "text",  # noqa: A002
        user: str | None = None,
        request_timeout: float | None = None,
    ) -> str | bytearray | FileStream:
        """What is in a file: as text, with replacement characters where it is not UTF-8; as bytes; or piece by piece.

        A file above 1 GiB is only read as a stream.
        """
        params = path_params(self._sandbox_id, path, user)
        with translated(), connect_or_start(os.environ) as connection:
            number = open_file(connection, params, request_timeout)
        if format == "stream":
            return FileStream(number)
        content = read_all(number, path)
        return content if format == "bytes" else content.decode(errors="replace")

    def write(
        self, path: str, data: Data, user: str | None = None, request_timeout: float | None = None
    ) -> WriteInfo:
        """Make a file of text, bytes, or what is in a stream; its directories are made, and an old content replaced.

        Whole or not at all: whoever looks sees what was there before, or all of what is written.
        """
        with source(data) as (content, descriptors):
            params = {**path_params(self._sandbox_id, path, user), **content}
            return write_info(call("files/write", params, request_timeout, descriptors))

    def write_files(
        self, files: Sequence[WriteEntry], user: str | None = None, request_timeout: float | None = None
    ) -> list[WriteInfo]:
        """Write several, one after the other. Each is whole; those before one that fails stay."""
        return [self.write(entry["path"], entry["data"], user, request_timeout) for entry in files]

    def list(
        self, path: str, depth: int = LIST_DEPTH, user: str | None = None, request_timeout: float | None = None
    ) -> list[EntryInfo]:
        """What is in a directory, so many levels of it, in the order of the paths."""
        rows: list[Mapping[str, Any]] = []
        params = {**path_params(self._sandbox_id, path, user), "depth": depth, "pages": True}
        reply = call("files/list", params, request_timeout, (), lambda message: rows.extend(rows_of(message.content)))
        return entries(reply, rows)

    def exists(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Whether something bears the name, be it a link that leads nowhere."""
        return bool(call("files/exists", path_params(self._sandbox_id, path, user), request_timeout)["exists"])

    def get_info(self, path: str, user: str | None = None, request_timeout: float | None = None) -> EntryInfo:
        """Everything about one file; links are not followed."""
        return entry_info(call("files/stat", path_params(self._sandbox_id, path, user), request_timeout))

    def remove(self, path: str, user: str | None = None, request_timeout: float | None = None) -> None:
        """Remove a file, or a directory with all that is in it. That there is none is no error."""
        params = {**path_params(self._sandbox_id, path, user), "recursive": True, "missing_ok": True}
        call("files/remove", params, request_timeout)

    def rename(
        self, old_path: str, new_path: str, user: str | None = None, request_timeout: float | None = None
    ) -> EntryInfo:
        """Give another name, in the same file system, replacing what bears it."""
        params = {**path_params(self._sandbox_id, old_path, user), **text_params("new_path", new_path)}
        call("files/rename", params, request_timeout)
        return self.get_info(new_path, None, request_timeout)

    def make_dir(self, path: str, user: str | None = None, request_timeout: float | None = None) -> bool:
        """Make a directory, and those above it. False: it was there."""
        return bool(call("files/make_dir", path_params(self._sandbox_id, path, user), request_timeout)["created"])

    def upload(
        self,
        local: str | os.PathLike[str],
        path: str,
        user: str | None = None,
        request_timeout: float | None = None,
        exact: bool = False,
    ) -> TransferInfo:
        """Copy a file of this host to ``path``, or what is in a directory into ``path``, which is made.

        Args:
            local: What to copy. Links below are copied as links; FIFOs, sockets and devices are skipped.
            path: The name that it gets inside. Each file is under its name whole or not at all.
            user: The sandbox's own; any other is refused.
            request_timeout: Seconds that it may take. It is given up when nothing moves for a minute anyway.
            exact: Keep times.

        Raises:
            OSError: A file of this host cannot be read.
        """
        from sandboxd.client.copying import uploading

        params = {**path_params(self._sandbox_id, path, user), "make_parents": True}
        return _copy("files/upload", params, uploading(local, exact=exact), request_timeout)

    def download(
        self,
        path: str,
        local: str | os.PathLike[str],
        user: str | None = None,
        request_timeout: float | None = None,
        exact: bool = False,
    ) -> TransferInfo:
        """Copy a file of the sandbox to ``local``, or what is in a directory into ``local``, which is made.

        Nothing of it leads out of ``local``, whatever the sandbox sends.

        Args:
            path: What to copy. A link is followed; those below are copied as links.
            local: The name that it gets on this host. Each file is under its name whole or not at all.
            user: The sandbox's own; any other is refused.
            request_timeout: Seconds that it may take. It is given up when nothing moves for a minute anyway.
            exact: Keep times, and modes whatever the umask.

        Raises:
            OSError: A file of this host cannot be written.
        """
        from sandboxd.client.copying import downloading

        params = path_params(self._sandbox_id, path, user)
        info = call("files/stat", {**params, "follow": True}, request_timeout)
        return _copy("files/download", params, downloading(local, info, exact=exact), request_timeout)

    def watch_dir(
        self, path: str, user: str | None = None, request_timeout: float | None = None, recursive: bool = False
    ) -> WatchHandle:
        """Watch a directory, or a file; with ``recursive`` all that is below, and will be."""
        params = {**path_params(self._sandbox_id, path, user), "recursive": recursive}
        return WatchHandle(params, request_timeout)


class WatchHandle:
    """A watch. What happens is kept by the kernel until it is fetched, or is too much: then it is an ``OVERFLOW``."""

    def __init__(self, params: Mapping[str, Any], request_timeout: float | None = None) -> None:
        self._path = params["path"]
        self._events: list[FilesystemEvent] = []
        self._failure: SandboxException | None = None
        self._connection: Connection | None = None
        self.truncated = False
        """Some directories are not watched: they are too many, too deep, or not readable."""
        with translated():
            connection = connect_or_start(os.environ)
            try:
                self._request_id = connection.send("files/watch", {**params})
                self._await_watching(connection, request_timeout)
            except BaseException:
                connection.close()
                raise
        self._connection = connection

    def get_new_events(self) -> list[FilesystemEvent]:
        """What happened since the last call; does not wait.

        Raises:
            NotFoundException: What was watched is gone, or the sandbox is. All events before were returned.
            SandboxException: It was stopped, or the daemon went away.
        """
        if self._connection is None and self._failure is None:
            raise SandboxException("cannot get new events", "the watch was stopped")
        with translated():
            while self._connection is not None and _readable(self._connection, 0):
                for message in self._connection.read():
                    self._take(message)
        happened, self._events = self._events, []
        if not happened and self._failure is not None:
            raise self._failure
        return happened

    def stop(self) -> None:
        """End the watch. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _await_watching(self, connection: Connection, timeout_s: float | None) -> None:
        stands = False
        while not stands:
            if not _readable(connection, timeout_s):
                raise RpcError(0, "timeout", "the daemon did not answer in time", hint="give request_timeout")
            for message in connection.read():
                if not stands and "method" not in message.content:
                    result_of(message.content)
                stands = stands or message.content.get("method") == "files/watching"
                self._take(message)

    def _take(self, message: Message) -> None:
        if "method" in message.content:
            self.truncated = bool(message.content["params"].get("truncated", self.truncated))
            self._events += events(message.content)
            return
        self.stop()
        self._failure = end_of(message.content, self._path)


def _copy(method: str, params: Mapping[str, Any], end: End, timeout_s: float | None) -> TransferInfo:
    from sandboxd.client.copying import transfer_info

    with contextlib.closing(end):
        reply: dict[str, Any] = {}
        failure: SandboxException | None = None
        thread = threading.Thread(target=end.work)
        thread.start()
        try:
            reply = call(method, {**params, **end.params}, timeout_s, [end.descriptor])
        except SandboxException as error:
            end.stop()
            failure = error
        except BaseException:
            end.stop()
            raise
        finally:
            end.leave()
            thread.join()
        end.check(failure)
        return transfer_info(reply, end)


def end_of(reply: dict[str, Any], path: str) -> SandboxException:
    """Why a watch is over that nobody stopped."""
    try:
        result_of(reply)
    except RpcError as error:
        return exception_from(error)
    return NotFoundException(f"cannot watch {path!r} any longer", "it was removed, or moved away", type="not_found")


def _readable(connection: Connection, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
