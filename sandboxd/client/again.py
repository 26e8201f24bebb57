"""Sending a request once more, when the daemon went away under it: it was restarted, or was killed.

A daemon that is restarted hands its listening socket over, and with systemd it never has one of its own: to connect
again is to wait for the next one. So there is no pause between attempts, and no need for many.
"""

from __future__ import annotations

from sandboxd.client.connection import RpcError

ATTEMPTS_MAX = 3
"""Of one request. The second goes to the next daemon; the third is for one that is restarted twice."""

IDEMPOTENT = frozenset(
    """
    audit/query audit/verify commands/list commands/logs commands/wait daemon/config daemon/doctor daemon/info
    daemon/metrics files/exists files/list files/read files/stat image/list network/get pool/list ports/list
    sandbox/get sandbox/list sandbox/metrics secret/list service/list service/logs shells/list template/get
    template/list workspace/diff
    """.split()
)
"""Methods that change nothing, and may be sent again although nobody knows whether they were carried out. Those that
bring a stream are not among them: who follows one says himself where it goes on."""


def worth_it(method: str, error: RpcError) -> bool:
    """Whether a request that failed so may be sent again: it was not begun, or it changes nothing."""
    return error.type == "stopping" or (error.type == "disconnected" and method in IDEMPOTENT)
