"""Tasks of the daemon that nobody waits for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVarTuple, Unpack

import anyio
import anyio.abc

from runtimes.errors import RuntimeFailure
from sandboxd.failures import Failure

logger = logging.getLogger(__name__)

AGAIN_S_MIN, AGAIN_S_MAX = 0.25, 30.0
"""Between two tries of what must be done in the end: twice as long each time."""
TRIES_MAX = 12
"""Two minutes. What is not done by then the next start does."""

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

    def persist(self, function: Callable[[Unpack[_Arguments]], Awaitable[object]], *arguments: *_Arguments) -> None:
        """The same for what must be done in the end: what the host refuses for now is tried again."""
        self._tasks.start_soon(_contained, _persisted, (function, arguments))


async def _persisted(function: Callable[..., Awaitable[object]], arguments: tuple[object, ...]) -> None:
    pause_s = AGAIN_S_MIN
    for _ in range(TRIES_MAX):
        try:
            await function(*arguments)
        except (OSError, RuntimeFailure, Failure) as error:
            logger.warning("tried again in %g s: %s: %s", pause_s, _name_of(function), error)
        else:
            return
        await anyio.sleep(pause_s)
        pause_s = min(2 * pause_s, AGAIN_S_MAX)


async def _contained(function: Callable[..., Awaitable[object]], arguments: tuple[object, ...]) -> None:
    try:
        await function(*arguments)
    except Exception:
        logger.exception("a background task failed: %s", _name_of(function))


def _name_of(function: Callable[..., Awaitable[object]]) -> str:
    return str(getattr(function, "__qualname__", function))
