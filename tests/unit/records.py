"""Sandbox records for tests, with only what a test is about spelt out."""

from __future__ import annotations

from typing import Any

import msgspec

from runtimes.model import ContainerState, ContainerSummary, Limits, Network, User
from sandboxd.lifecycle import State
from sandboxd.records import SandboxRecord

CONTAINER_ID = "c" * 64

_RECORD = SandboxRecord(
    id="sb-aaaaaaaaaa",
    name=None,
    state=State.RUNNING,
    state_reason="",
    engine="podman",
    image="image",
    container_id=CONTAINER_ID,
    user=User(uid=1000, gid=1000),
    keep_id=False,
    workspace=None,
    network=Network.NONE,
    limits=Limits(memory_bytes_max=64 * 1024 * 1024),
    tmp_bytes_max=64 * 1024 * 1024,
    limits_policy="strict",
    env={},
    metadata={},
    ephemeral=False,
    created_at_ms=1,
)


def record(**changes: Any) -> SandboxRecord:
    """A running sandbox of Podman, changed."""
    return msgspec.structs.replace(_RECORD, **changes)


def container(sandbox_id: str = _RECORD.id, **changes: Any) -> ContainerSummary:
    """The running container of that sandbox, changed."""
    summary = ContainerSummary(
        container_id=CONTAINER_ID, sandbox_id=sandbox_id, owner="me", state=ContainerState.RUNNING
    )
    return msgspec.structs.replace(summary, **changes)
