"""``audit/*``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread

from sandboxd import protocol
from sandboxd.audit import reading
from sandboxd.audit.chain import Head
from sandboxd.audit.files import OpenFile
from sandboxd.audit.trail import Trail
from sandboxd.connection import Context
from sandboxd.failures import AuditUnavailable, Unsupported
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager

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
        """What fits."""
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
