"""Async objects as blocking ones, so that one test is for both clients."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Self

from sandboxd.client import AsyncCommandHandle, AsyncFiles, AsyncSandbox
from sandboxd.client.aio import AsyncCommands, AsyncPty, AsyncShell, AsyncShells
from sandboxd.client.aio_files import AsyncFileStream

_WRAPPED = (
    AsyncSandbox,
    AsyncCommandHandle,
    AsyncCommands,
    AsyncPty,
    AsyncFiles,
    AsyncFileStream,
    AsyncShell,
    AsyncShells,
)


class Twin:
    """Does what the async object does, and waits for it."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        self._inner = inner
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return self._blocking(getattr(self._inner, name))

    def __iter__(self) -> Iterator[Any]:
        portions = aiter(self._inner)
        try:
            while True:
                yield self._runner.run(_awaited(portions.__anext__))
        except StopAsyncIteration:
            return

    def __enter__(self) -> Self:
        self._runner.run(_awaited(self._inner.__aenter__))
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(_awaited(self._inner.__aexit__, *error))

    def _blocking(self, value: Any) -> Any:
        if isinstance(value, _WRAPPED):
            return Twin(value, self._runner)
        if not inspect.isroutine(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            return self._blocking(self._runner.run(_awaited(value, *arguments, **named)))

        return call


async def _awaited(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    value = function(*arguments, **named)
    return await value if inspect.isawaitable(value) else value
