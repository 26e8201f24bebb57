"""The client: one thin connection to the daemon, and how a daemon is started that does not run."""

from __future__ import annotations

from sandboxd.client.connection import FRAME_BYTES_MAX, Connection, Message, NotRunning, RpcError, result_of

__all__ = ["FRAME_BYTES_MAX", "Connection", "Message", "NotRunning", "RpcError", "result_of"]
