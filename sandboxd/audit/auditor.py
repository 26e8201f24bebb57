"""What becomes a line of the audit log: requests that change something, who was turned away, the daemon itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

from sandboxd.audit.arguments import recorded
from sandboxd.audit.files import Note
from sandboxd.audit.trail import Trail
from sandboxd.failures import AuditUnavailable, Failure, Unauthorized
from sandboxd.peers import Peer
from sandboxd.protocol import METHOD_BY_NAME, Params, SandboxInfo

Ended = Callable[[msgspec.Struct | None, str], None]
"""Told the reply, if there is one, and ``ok`` or the type of the error."""


class AuditState(msgspec.Struct, frozen=True, kw_only=True):
    """How the log fares."""

    enabled: bool
    required: bool
    failing: str
    """Why it cannot be written; empty: it can."""
    lost: int
    """Lines that were lost since the daemon began."""
    written: int


class Auditor:
    """Has requests written down.

    Args:
        trail: Writes; None: the log is switched off.
        reads: Those that only look, too.
        required: Refuse what cannot be written down.
        id_of: The id of the sandbox that a caller means, if there is one.
        hides: Whether a text holds a secret: it is not written down, whatever field it is in.
    """

    def __init__(
        self,
        trail: Trail | None,
        *,
        reads: bool,
        required: bool,
        id_of: Callable[[str], str | None],
        hides: Callable[[str], bool],
    ) -> None:
        self._hides = hides
        self._trail = trail
        self._reads = reads
        self._required = required
        self._id_of = id_of

    @property
    def state(self) -> AuditState:
        """How the log fares."""
        trail = self._trail
        return AuditState(
            enabled=trail is not None,
            required=self._required,
            failing="" if trail is None else trail.failing,
            lost=0 if trail is None else trail.lost,
            written=0 if trail is None else trail.written,
        )

    def observe(self, method: str, params: Params, peer: Peer) -> Ended | None:
        """Begin to record a request. What is returned is told of its end; None: it is not recorded.

        Raises:
            AuditUnavailable: it must be recorded, and cannot be.
        """
        trail = self._trail
        if trail is None or (METHOD_BY_NAME[method].reads and not self._reads):
            return None
        if self._required and trail.failing:
            raise AuditUnavailable(
                f"cannot carry out {method!r}",
                detail=f"it could not be written to the audit log ({trail.failing}), and audit.required is set",
                hint="sandboxctl doctor",
            )
        started_s = time.monotonic()
        reference = getattr(params, "sandbox", None)
        fields: dict[str, object] = {
            **_who(peer),
            "method": method,
            "sandbox": None if reference is None else self._id_of(reference),
            "arguments": recorded(method, params, self._hides),
        }
        lasting = trail.lasting(Note(kind="underway", fields=fields))

        def ended(reply: msgspec.Struct | None, result: str) -> None:
            lasting.ended = True
            done = {**fields, "result": result, "duration_ms": round((time.monotonic() - started_s) * 1000, 3)}
            if reference is None and isinstance(reply, SandboxInfo):
                done["sandbox"] = reply.id
            trail.take(Note(kind="request", at_ms=lasting.note.at_ms, fields=done))

        return ended

    def refused(self, peer: Peer, why: Failure) -> None:
        """Have it written down that another user was turned away; of our own, it is the daemon's log that tells."""
        if self._trail is not None and isinstance(why, Unauthorized):
            self._trail.take(Note(kind="refused", fields={**_who(peer), "result": why.type}))

    def tell(self, kind: Literal["begun", "ended"], **data: str | int | None) -> None:
        """Have it written down that the daemon begins or ends."""
        if self._trail is not None:
            self._trail.take(Note(kind=kind, fields={"data": data}))


def _who(peer: Peer) -> dict[str, object]:
    return {"uid": peer.uid, "pid": peer.pid, "exe": peer.exe or None}
