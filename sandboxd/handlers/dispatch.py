"""From a request to the handler of its method, and from errors of ``runtimes`` to failures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import anyio
import msgspec

from runtimes.errors import RuntimeFailure
from runtimes.init.file_worker import FileRefused
from runtimes.init.wire import InitError
from sandboxd import files, protocol
from sandboxd.connection import Context
from sandboxd.failures import Conflict, Failure, Stopping
from sandboxd.handlers.table import Handler
from sandboxd.peers import Peer
from sandboxd.translation import failure_from, failure_of_host

INTERRUPT_S_MAX = 10.0
"""How long what was cut short may take to clean up behind it, such as a command that is killed with its caller."""

_WAITING = frozenset(
    {"commands/run", "commands/wait", "commands/connect", "files/watch", "shells/run", "events/subscribe"}
)
"""Methods that may last as long as a command or a caller's interest: a drain does not wait for them."""

_RESUMED = _WAITING - {"commands/run", "shells/run"}
"""Those of them that a caller can send again as they are, and that go on where they were."""

_READS = frozenset(row.name for row in protocol.METHODS if row.reads)

Observer = Callable[[str, protocol.Params, Peer], Callable[[msgspec.Struct | None, str], None] | None]
"""Told of a request and of who sent it; returns what is told its reply, if there is one, and ``ok`` or the error's
type."""


class Dispatcher:
    """What the server dispatches to.

    Args:
        families: Their tables; no method is in two of them.
        used_by: Entered while a request is carried out, by its method and params.
        refuse: Refuses a request by its variables, its metadata and its arguments, where they must not be passed so.
            It may take a while; a drain knows of requests that wait for it.
        observers: Told of each request, and of its end if they want to be. They may refuse it.
    """

    def __init__(
        self,
        families: Iterable[Mapping[str, Handler]],
        used_by: Callable[[str, protocol.Params], AbstractContextManager[None]],
        refuse: Callable[[Mapping[str, str], Mapping[str, str], Sequence[str]], Awaitable[None]],
        observers: Sequence[Observer] = (),
    ) -> None:
        self._refuse = refuse
        self._observers = observers
        self._used_by = used_by
        self._handlers = {method: handler for family in families for method, handler in family.items()}
        self._draining = False
        self._active = 0
        self._under_way: set[anyio.CancelScope] = set()
        self._idle = anyio.Event()

    @property
    def methods(self) -> frozenset[str]:
        """All that it knows."""
        return frozenset(self._handlers)

    async def __call__(self, method: str, params: protocol.Params, context: Context) -> msgspec.Struct:
        """Carry out a request. See ``connection.Dispatch``."""
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
            raise _stopping()
        counted = method not in _WAITING
        self._active += counted
        scope = anyio.CancelScope()
        self._under_way.add(scope)
        begun = False
        try:
            with scope:
                await self._refuse_what_is_kept(method, params)
                begun = True
                with self._used_by(method, params):
                    return await self._handlers[method](params, context)
            if not begun:
                raise _stopping()
            raise _interrupted(method)
        except FileRefused as error:
            raise files.failure_from_refusal(error, getattr(params, "sandbox", None)) from error
        except (RuntimeFailure, InitError) as error:
            raise failure_from(error) from error
        except OSError as error:
            failure = failure_of_host(error)
            if failure is None:
                raise
            raise failure from error
        finally:
            self._under_way.discard(scope)
            self._active -= counted
            self._idle.set()

    async def _refuse_what_is_kept(self, method: str, params: protocol.Params) -> None:
        """A question is written down nowhere, and does not wait until secrets are known."""
        if method not in _READS:
            await self._refuse(
                getattr(params, "env", {}), getattr(params, "metadata", {}), getattr(params, "argv", ())
            )

    async def drain(self, *, deadline_s: float) -> None:
        """Refuse new requests, let those in flight finish, and then cut short what is left: its callers are told."""
        self._draining = True
        with anyio.move_on_after(deadline_s):
            await self._wait_until(lambda: not self._active)
        for scope in list(self._under_way):
            scope.cancel()
        with anyio.move_on_after(INTERRUPT_S_MAX):
            await self._wait_until(lambda: not self._under_way)

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._idle = anyio.Event()
            await self._idle.wait()


def _stopping() -> Stopping:
    return Stopping(
        "cannot take requests any more", detail="the daemon is stopping, and nothing was begun", hint="try again"
    )


def _interrupted(method: str) -> Failure:
    if method in _RESUMED:
        return Stopping(f"cannot go on with {method!r}", detail="the daemon is stopping", hint="try again")
    ran = method.startswith("commands/")
    return Conflict(
        f"cannot finish {method!r}",
        detail="the daemon stopped before it was done, and a command that was attached has ended with it",
        hint="what outlives it: sandboxctl exec -d SANDBOX COMMAND; sandboxctl attach" if ran else "sandboxctl ls",
    )


def _kind_of(error: BaseException) -> str:
    """The type of an error as its caller is told it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, Failure):
        return error.type
    return "internal" if isinstance(error, Exception) else "cancelled"
