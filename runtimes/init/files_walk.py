"""A directory tree inside of a sandbox, a page at a time."""

from __future__ import annotations

from functools import partial
from typing import Self

import msgspec

from runtimes.init import files_wire as wire
from runtimes.init.file_worker import FileWorker, Life, mismatch
from runtimes.init.files_wire import DEPTH_MAX, Entry, Facts, FileType, Flag, PageReply


class Watching(msgspec.Struct, frozen=True):
    """An inotify instance inside of the sandbox, and the worker that can add to it."""

    descriptor: int
    token: int
    life: Life


class Walk:
    """A tree, page by page, in depth-first order. Use as an async context manager.

    The tree may change meanwhile: an entry may be seen that is gone, or twice, or not.
    """

    root: Facts

    def __init__(self, worker: FileWorker, path: bytes, flags: Flag, depth: int, watching: Watching | None) -> None:
        self._worker = worker
        self._path = path
        self._flags = flags
        self._depth = depth
        self._watching = watching
        self._life: Life | None = None
        self._token: int | None = None
        self.root_watch = 0
        self.truncated = False

    async def next_page(self) -> list[Entry] | None:
        """Some entries, maybe none; None when there are no more. `root` is known after the first.

        Raises:
            FileRefused: ENOTDIR there is no directory at the path.
        """
        if self._life is None:
            return await self._first_page()
        if self._token is None:
            return None
        page = await self._worker.request(
            partial(wire.encode_list_next, token=self._token), self._path, PageReply, life=self._life
        )
        return self._taken(page, page.entries)

    async def _first_page(self) -> list[Entry]:
        token, life = (0, None) if self._watching is None else (self._watching.token, self._watching.life)
        encode = partial(
            wire.encode_list,
            flags=self._flags,
            base=self._worker.base_of(self._path),
            depth=self._depth,
            watch=token,
            path=self._path,
        )
        reply, received, self._life = await self._worker.ask(encode, self._path, again=True, life=life)
        if received or not isinstance(reply, PageReply) or not reply.entries or reply.entries[0].path:
            raise mismatch(self._life, received)
        self.root = reply.entries[0].facts
        self.root_watch = reply.entries[0].watch
        return self._taken(reply, reply.entries[1:])

    def _taken(self, page: PageReply, entries: list[Entry]) -> list[Entry]:
        self._token = page.token
        self.truncated |= page.cut
        for entry in entries:
            if not entry.path:
                assert self._life is not None
                raise mismatch(self._life, [])
            if self._depth == DEPTH_MAX and entry.facts.type is FileType.DIRECTORY:
                self.truncated |= entry.path.count(b"/") == DEPTH_MAX - 1
        return entries

    def close(self) -> None:
        """Gives up what was not read. Idempotent."""
        if self._token is not None and self._life is not None:
            self._life.tell(wire.encode_close(0, self._token))
            self._token = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()
