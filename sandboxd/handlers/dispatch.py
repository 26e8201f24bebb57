"""From a request to the handler of its method, and from errors of ``runtimes`` to failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import anyio
import msgspec

from runtimes.errors import RuntimeFailure
from runtimes.init.file_worker import FileRefused
from runtimes.init.wire import InitError
from sandboxd import files, protocol
from sandboxd.failures import Conflict
from sandboxd.handlers.table import Handler
from sandboxd.server import Context
from sandboxd.translation import failure_from

_WAITING = frozenset(
    {"commands/run", "commands/wait", "commands/connect", "files/watch", "shells/run", "events/subscribe"}
)
"""Methods that may last as long as a command or a caller's interest: a drain does not wait for them."""


class Dispatcher:
    """What the server dispatches to.

    Args:
        families: Their tables; no method is in two of them.
        used_by: Entered while a request is carried out, by its method and params.
        refuse_in: Refuses variables of a request that must not be passed so.
    """

    def __init__(
        self,
        families: Iterable[Mapping[str, Handler]],
        used_by: Callable[[str, protocol.Params], AbstractContextManager[None]],
        refuse_in: Callable[[Mapping[str, str]], None],
    ) -> None:
        self._refuse_in = refuse_in
        self._used_by = used_by
        self._handlers = {method: handler for family in families for method, handler in family.items()}
        self._draining = False
        self._active = 0
        self._idle = anyio.Event()

    @property
    def methods(self) -> frozenset[str]:
        """All that it knows."""
        return frozenset(self._handlers)

    async def __call__(self, method: str, params: protocol.Params, context: Context) -> msgspec.Struct:
        """Carry out a request. See ``server.Dispatch``."""
        if self._draining:
            raise Conflict("cannot take requests any more", detail="the daemon is stopping", hint="try again")
        self._refuse_in(getattr(params, "env", {}))
        counted = method not in _WAITING
        self._active += counted
        try:
            with self._used_by(method, params):
                return await self._handlers[method](params, context)
        except FileRefused as error:
            raise files.failure_from_refusal(error) from error
        except (RuntimeFailure, InitError) as error:
            raise failure_from(error) from error
        finally:
            self._active -= counted
            if self._active == 0:
                self._idle.set()

    async def drain(self, *, deadline_s: float) -> None:
        """Refuse new requests, and let those in flight finish."""
        self._draining = True
        self._idle = anyio.Event()
        if self._active:
            with anyio.move_on_after(deadline_s):
                await self._idle.wait()
