"""Tasks of the daemon that nobody waits for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVarTuple, Unpack

import anyio.abc

logger = logging.getLogger(__name__)

_Arguments = TypeVarTuple("_Arguments")


class Background:
    """Runs tasks for as long as the daemon runs. One that fails is logged and ends alone: nobody else suffers.

    Args:
        tasks: The daemon's own task group.
    """

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self._tasks = tasks

    def start(self, function: Callable[[Unpack[_Arguments]], Awaitable[object]], *arguments: *_Arguments) -> None:
        """Begin to run ``function(*arguments)``, and return at once."""
        self._tasks.start_soon(_contained, function, arguments)


async def _contained(function: Callable[..., Awaitable[object]], arguments: tuple[object, ...]) -> None:
    try:
        await function(*arguments)
    except Exception:
        logger.exception("a background task failed: %s", getattr(function, "__qualname__", function))
