"""``audit/*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread

from sandboxd import protocol, spelling
from sandboxd.audit import reading
from sandboxd.audit.chain import Head
from sandboxd.audit.files import OpenFile
from sandboxd.audit.trail import Trail
from sandboxd.connection import Context
from sandboxd.failures import FAILURES, AuditUnavailable, InvalidArgument, Unsupported
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager

RESULTS = ("ok", "failed", "cancelled", *dict.fromkeys(failure.type for failure in FAILURES))
"""What a request comes to, ``failed`` for whatever is not ``ok``."""

FLUSH_S_MAX = 5.0
"""How long is waited for lines that are not written yet; what cannot be written cannot be read, either."""

_Found = TypeVar("_Found")


class AuditHandlers:
    """Reading the audit log.

    Args:
        trail: Writes it; None: it is switched off.
        manager: Knows which sandbox is meant.
    """

    def __init__(self, trail: Trail | None, manager: Manager) -> None:
        self._trail = trail
        self._manager = manager

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {"audit/query": self.query, "audit/verify": self.verify}

    async def query(self, params: protocol.AuditQueryParams, _: Context) -> protocol.AuditEntries:
        """What fits. A word that no line can have would find nothing, and tell nobody why."""
        check(params)
        sandbox = None if params.sandbox is None else self._manager.id_of(params.sandbox) or params.sandbox
        return await self._read(lambda files, _: reading.query(files, params, sandbox))

    async def verify(self, _: protocol.NoParams, __: Context) -> protocol.AuditVerified:
        """Follow the chain."""
        return await self._read(reading.verify)

    async def _read(self, read: Callable[[list[OpenFile], Head | None], _Found]) -> _Found:
        trail = self._trail
        if trail is None:
            raise Unsupported(
                "cannot read the audit log",
                detail="it is switched off",
                hint="set audit.enabled, and: sandboxctl daemon restart",
            )

        def run() -> _Found:
            trail.flush(timeout_s=FLUSH_S_MAX)
            with trail.snapshot() as (files, head):
                return read(files, head)

        try:
            return await anyio.to_thread.run_sync(run)
        except OSError as error:
            raise AuditUnavailable(
                "cannot read the audit log", detail=error.strerror or str(error), hint="sandboxctl doctor"
            ) from error


def check(wanted: protocol.AuditQueryParams) -> None:
    """Refuse words that no line can have.

    Raises:
        InvalidArgument: there is one.
    """
    if wanted.result is not None and wanted.result not in RESULTS:
        raise InvalidArgument(
            f"cannot look for the result {wanted.result!r}",
            detail=f"a request comes to {', '.join(RESULTS)}",
            hint=spelling.hint(wanted.result, RESULTS, "--result failed"),
        )
    if wanted.method is not None and wanted.method not in protocol.METHOD_BY_NAME:
        families = sorted({name.partition("/")[0] for name in protocol.METHOD_BY_NAME})
        if wanted.method.removesuffix("/") not in families:
            raise InvalidArgument(
                f"cannot look for the method {wanted.method!r}",
                detail=f"the families of methods are {', '.join(families)}",
                hint=spelling.hint(
                    wanted.method, [*families, *protocol.METHOD_BY_NAME], "--method sandbox, or one: sandbox/create"
                ),
            )
