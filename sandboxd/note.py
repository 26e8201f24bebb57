"""What a container says of its sandbox, for the day on which the journal is lost.

Pure. It is a label, which everybody who may use the engine can read: so it holds what the engine knows anyway and
what names things, and never a variable, a secret or what its user wrote on it. Nor does it hold what may change later
and would be wrong then, such as the rules of its network: looser ones must not come back.
"""

from __future__ import annotations

import msgspec

from runtimes.model import Limits, Network, User
from sandboxd.records import MountRecord, SandboxRecord, WorkspaceRecord

CHARS_MAX = 16 * 1024
"""Of a label; what is longer, for its many mounts, is left out: the journal has it."""


class Note(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields of a ``SandboxRecord``, of the same names."""

    image: str
    user: User
    created_at_ms: int
    limits: Limits
    tmp_bytes_max: int
    limits_policy: str
    network: Network
    template: str
    bin_dir: str
    name: str | None = None
    keep_id: bool = False
    workspace: WorkspaceRecord | None = None
    mounts: tuple[MountRecord, ...] = ()
    ephemeral: bool = False
    slot: bool = False
    changed_late: bool = False
    cpus_packed: bool = False


def written(record: SandboxRecord) -> str:
    """The note of a sandbox; empty where it would be too long."""
    fields = {field: getattr(record, field) for field in Note.__struct_fields__}
    text = msgspec.json.encode(Note(**fields)).decode()
    return text if len(text) <= CHARS_MAX else ""


def read(text: str) -> Note | None:
    """The note that was written; None where there is none, or none that can be read."""
    if not text or len(text) > CHARS_MAX:
        return None
    try:
        return msgspec.json.decode(text, type=Note)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return None
