"""From a request to the handler of its method, and from errors of ``runtimes`` to failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import anyio
import msgspec

from runtimes.errors import RuntimeFailure
from runtimes.init.file_worker import FileRefused
from runtimes.init.wire import InitError
from sandboxd import files, protocol
from sandboxd.failures import Conflict, Failure
from sandboxd.handlers.table import Handler
from sandboxd.peers import Peer
from sandboxd.server import Context
from sandboxd.translation import failure_from, failure_of_host

_WAITING = frozenset(
    {"commands/run", "commands/wait", "commands/connect", "files/watch", "shells/run", "events/subscribe"}
)
"""Methods that may last as long as a command or a caller's interest: a drain does not wait for them."""

Observer = Callable[[str, protocol.Params, Peer], Callable[[msgspec.Struct | None, str], None] | None]
"""Told of a request and of who sent it; returns what is told its reply, if there is one, and ``ok`` or the error's
type."""


class Dispatcher:
    """What the server dispatches to.

    Args:
        families: Their tables; no method is in two of them.
        used_by: Entered while a request is carried out, by its method and params.
        refuse_in: Refuses variables of a request that must not be passed so.
        observers: Told of each request, and of its end if they want to be. They may refuse it.
    """

    def __init__(
        self,
        families: Iterable[Mapping[str, Handler]],
        used_by: Callable[[str, protocol.Params], AbstractContextManager[None]],
        refuse_in: Callable[[Mapping[str, str]], None],
        observers: Sequence[Observer] = (),
    ) -> None:
        self._refuse_in = refuse_in
        self._observers = observers
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
        observing = [
            ended for observe in self._observers if (ended := observe(method, params, context.peer)) is not None
        ]
        reply: msgspec.Struct | None = None
        result = "ok"
        try:
            reply = await self._carry_out(method, params, context)
        except BaseException as error:
            result = _kind_of(error)
            raise
        finally:
            for ended in observing:
                ended(reply, result)
        return reply

    async def _carry_out(self, method: str, params: protocol.Params, context: Context) -> msgspec.Struct:
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
        except OSError as error:
            failure = failure_of_host(error)
            if failure is None:
                raise
            raise failure from error
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


def _kind_of(error: BaseException) -> str:
    """The type of an error as its caller is told it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Failure):
        return error.type
    return "internal" if isinstance(error, Exception) else "cancelled"
