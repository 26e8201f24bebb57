"""Carries out ``cp``: requests with one end of a pipe, and the work at its other end.

The daemon has the sandbox's end of every copy. Ours is a file, which it reads or writes by itself; a tree, which a
thread of ours packs or unpacks; the caller's stdin or stdout; or another sandbox, so that nothing passes through us.
"""

from __future__ import annotations

import base64
import contextlib
import os
import threading

from sandboxd.cli import wire
from sandboxd.cli.progress import Progress
from sandboxd.cli.session import CANCEL_TIMEOUT_S
from sandboxd.client import RpcError
from sandboxd.client.trees import Packer, Unpacker
from sandboxd.streams import EndedEarly, Incoming, Outgoing, Patience, Skips, Stopped, Tally
from sandboxd.tarstream import TarError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from sandboxd.client import Connection, Message

PROGRESS = "$/progress"

_NOT_OURS = (BrokenPipeError, ConnectionError, EndedEarly, Stopped)
"""What only says that the other end had to give up."""

_ENDED = "the stream ended before all had come"


def path_fields(path: bytes) -> dict[str, Any]:
    """A path inside, as a request has it: text, or bytes where it is none."""
    try:
        return {"path": path.decode()}
    except UnicodeDecodeError:
        return {"path": "", "path_bytes": base64.b64encode(path).decode()}


def name_field(name: bytes) -> str:
    """The name of an archive's root, as a request has it."""
    return base64.b64encode(name).decode()


class Mover:
    """Requests over one connection, with a bar while they last.

    Args:
        connection: To the daemon.
        bounds: The fields of a request that bound it.
        quiet: Show no bar.
    """

    def __init__(self, connection: Connection, bounds: dict[str, Any], *, quiet: bool) -> None:
        self._connection = connection
        self._bounds = bounds
        self._quiet = quiet
        self.local_skips = Skips()

    def stream(self, method: str, descriptor: int, total: int | None = None, **fields: Any) -> dict[str, Any]:
        """One request with a descriptor that stays the caller's."""
        (reply,) = self._wait([self._send(method, descriptor, fields)], total)
        return _result(reply)

    def upload_tree(self, tree: bytes, name: bytes, *, follow: bool, **fields: Any) -> dict[str, Any]:
        """Pack a tree of the host into a request that unpacks it."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)

        def pack(patience: Patience) -> None:
            with contextlib.closing(Outgoing(write_end, patience, tally := Tally())) as outgoing:
                Packer(outgoing, tally, self.local_skips).run(tree, name, follow=follow)

        return self._with_thread("files/upload", read_end, pack, fields)

    def download_tree(self, directory: int, *, exact: bool, **fields: Any) -> dict[str, Any]:
        """Unpack what a request packs into a directory of the host."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        tally = Tally()
        unpacker = Unpacker(directory, exact=exact, tally=tally, skips=self.local_skips)

        def unpack(patience: Patience) -> None:
            with contextlib.closing(Incoming(read_end, patience, tally)) as incoming:
                unpacker.run(incoming)

        return self._with_thread("files/download", write_end, unpack, fields)

    def between(self, source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
        """From one sandbox into another, or the same."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            requests = [self._send("files/download", write_end, source)]
            requests.append(self._send("files/upload", read_end, target))
        finally:
            os.close(read_end)
            os.close(write_end)
        packed, unpacked = self._wait(requests, None)
        if isinstance(unpacked, RpcError) and (unpacked.detail != _ENDED or not isinstance(packed, RpcError)):
            raise unpacked
        packed, unpacked = _result(packed), _result(unpacked)
        unpacked["skipped"] = [*packed["skipped"], *unpacked["skipped"]]
        unpacked["skipped_count"] += packed["skipped_count"]
        return unpacked

    def _with_thread(
        self, method: str, theirs: int, work: Callable[[Patience], None], fields: dict[str, Any]
    ) -> dict[str, Any]:
        patience = Patience(None)
        errors: list[Exception] = []

        def run() -> None:
            try:
                work(patience)
            except Exception as error:  # noqa: BLE001 - told by the thread that waits
                errors.append(error)

        thread = threading.Thread(target=run)
        try:
            request = self._send(method, theirs, fields)
        finally:
            os.close(theirs)
        thread.start()
        try:
            (reply,) = self._wait([request], None)
            if isinstance(reply, RpcError):
                patience.stop()
            thread.join()
        finally:
            patience.stop()
            thread.join()
            patience.close()
        mine = [error for error in errors if not isinstance(error, _NOT_OURS)]
        if mine and not isinstance(mine[0], OSError | TarError):
            raise mine[0]
        if mine:
            raise RpcError(0, "conflict", "cannot copy", _said(mine[0]))
        result = _result(reply)
        if errors:
            raise RpcError(0, "conflict", "cannot copy", _ENDED)
        return result

    def _send(self, method: str, descriptor: int, fields: dict[str, Any]) -> int:
        return self._connection.send(method, wire.build(method, **self._bounds, **fields), [descriptor])

    def _wait(self, requests: Sequence[int], total: int | None) -> list[dict[str, Any] | RpcError]:
        """The outcome of each. Ctrl-C cancels them, and waits until the daemon has let go."""
        progress = Progress(total, shown=not self._quiet)

        def note(message: Message) -> None:
            params = message.content.get("params")
            if message.content["method"] == PROGRESS and isinstance(params, dict) and params["token"] == requests[-1]:
                progress.take(params)

        try:
            return [self._outcome(request, note) for request in requests]
        except KeyboardInterrupt:
            for request in requests:
                self._connection.cancel(request)
            for request in requests:
                with contextlib.suppress(RpcError):
                    self._connection.wait(request, timeout_s=CANCEL_TIMEOUT_S)
            raise
        finally:
            progress.end()

    def _outcome(self, request: int, note: Callable[[Message], None]) -> dict[str, Any] | RpcError:
        try:
            return self._connection.wait(request, note)
        except RpcError as error:
            if not error.code:
                raise
            return error


def _result(outcome: dict[str, Any] | RpcError) -> dict[str, Any]:
    if isinstance(outcome, RpcError):
        raise outcome
    return outcome


def _said(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
