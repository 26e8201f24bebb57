"""What is written down of a sandbox, and of what runs in it. Pure.

The journal keeps these as JSON: a field that is added has a default, so that what an older daemon wrote can be read.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from runtimes.model import Limits, Network, User
from sandboxd.config import DEFAULT_TEMPLATE
from sandboxd.lifecycle import State
from sandboxd.protocol import CommandEnd


class WorkspaceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The project of a sandbox."""

    path: str
    """Absolute host path, resolved; for people, where ``path_bytes`` is given."""
    read_only: bool
    mounted: str
    """How ownership is made right: ``same-uid``, ``keep-id``, ``idmapped`` or ``as-is``."""
    path_bytes: bytes | None = None
    """The path itself, where it is not UTF-8."""
    layer: str = ""
    """What is written goes to: ``overlay`` or ``copy``; empty: to the project, if it may be written at all."""
    backend: str = "bind"
    """What it is carried out with: see ``protocol.WorkspaceInfo``."""
    device: int = 0
    inode: int = 0
    """Which directory it was when it was mounted."""

    @property
    def mode(self) -> str:
        """In the protocol's words."""
        return self.layer or ("ro" if self.read_only else "rw")


class MountRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Something else of the host that a sandbox sees."""

    path: str
    target: str
    read_only: bool
    mounted: str
    path_bytes: bytes | None = None
    reason: str = ""
    """Why, where it was not asked for by name."""


class LifetimeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How long a sandbox may last, and what happens then."""

    lifetime_ms: int | None = None
    """What it was given, at its making or later; None: for ever."""
    expires_at_ms: int | None = None
    """The time of day at which that is over; None: it is not counted now."""
    idle_timeout_ms: int | None = None
    on_timeout: str = "kill"
    """``kill`` or ``pause``."""


class EgressRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of a sandbox whose network is ``allow``, as they were written."""

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    inject: tuple[str, ...] = ()
    """What is added to its requests; of secrets, their names."""


class GrantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A service that a sandbox was given."""

    service: str
    scopes: tuple[str, ...] = ()


class ForwardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A place on the host that leads to a port inside a sandbox."""

    id: str
    port: int
    """Inside."""
    address: str = ""
    """An IP address of the host; empty: ``path`` is what counts."""
    host_port: int = 0
    path: str = ""
    """Of a Unix socket on the host."""


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that must be known of a sandbox to find, adopt, restart and remove it."""

    id: str
    name: str | None
    state: State
    state_reason: str
    engine: str
    image: str
    container_id: str | None
    user: User
    keep_id: bool
    workspace: WorkspaceRecord | None
    mounts: tuple[MountRecord, ...] = ()
    network: Network
    limits: Limits
    tmp_bytes_max: int
    limits_policy: str
    env: dict[str, str]
    metadata: dict[str, str]
    ephemeral: bool
    created_at_ms: int
    warnings: tuple[str, ...] = ()
    bin_dir: str = ""
    """Where the programs are that were mounted into it."""
    lifetime: LifetimeRecord = LifetimeRecord()
    cpus_packed: bool = False
    """Which CPUs it is bound to was chosen here, and follows its quota."""
    egress: EgressRecord | None = None
    """What its proxy lets through; None: it has none."""
    services: tuple[GrantRecord, ...] = ()
    forwards: tuple[ForwardRecord, ...] = ()
    template: str = DEFAULT_TEMPLATE
    slot: bool = False
    """Nobody's yet."""
    image_id: str | None = None
    """What its image was when it was made, where that was asked."""
    changed_late: bool = False
    """What the engine knows of it is what the slot was: project, sizes and name came after the start."""
    launch: Literal["warm", "cold"] = "cold"
    miss_reason: str = ""
    """Why it was not claimed from the pool."""
    secrets: tuple[str, ...] = ()
    """Names only."""
    network_now: Network | None = None
    """What it is to have instead of ``network``, with which its container was made; None: that."""

    @property
    def network_wanted(self) -> Network:
        """What it is to have."""
        return self.network if self.network_now is None else self.network_now


class CommandRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A background command: one that must survive the daemon."""

    id: int
    argv: tuple[str, ...]
    started_at_ms: int
    deadline_at_ms: int | None
    """Wall-clock time of its timeout; None: it has none."""
    grace_s: float
    streams: tuple[str, ...] = ()
    """Of its spools; empty: its output is not kept."""
    end: CommandEnd | None = None
    """How it ended, once it has."""
