"""What the daemon writes down before it acts, in SQLite.

A sandbox's record is written before its container is asked for, and deleted after its container is known to
be gone; so after a crash at any point, a container with our label is either in the journal or nobody's.
Commits do not wait for the disk (WAL, ``synchronous=NORMAL``): a killed daemon loses nothing, and a host that
loses power has lost its running containers too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import uuid
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from runtimes.model import Limits, Network, User
from sandboxd.config import DEFAULT_TEMPLATE
from sandboxd.failures import Failure
from sandboxd.lifecycle import State
from sandboxd.protocol import CommandEnd

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2

_MIGRATIONS: dict[int, tuple[str, ...]] = {
    # Records have a lifetime, and may be paused, which an older daemon would take for a damaged record and remove.
    1: (),
}
"""What makes the schema of this version one of the next."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE sandboxes (id TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
CREATE TABLE unreadable (id TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT;
CREATE TABLE commands (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    id INTEGER NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (sandbox_id, id)
) STRICT;
"""


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


class Journal:
    """The journal of one daemon. Not thread-safe: it belongs to the event loop."""

    def __init__(self, database: sqlite3.Connection, path: str) -> None:
        self._database = database
        self._path = path

    @classmethod
    def open(cls, path: str) -> Journal:
        """Open the journal, and make it if there is none (mode 0600).

        Raises:
            Failure: it is damaged, or a newer version wrote it.
        """
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            database = sqlite3.connect(path, isolation_level=None, timeout=5.0)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("PRAGMA foreign_keys = ON")
            version = int(database.execute("PRAGMA user_version").fetchone()[0])
            if version == 0:
                with _transaction(database):
                    for statement in _SCHEMA.split(";\n"):
                        database.execute(statement)
                    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version < SCHEMA_VERSION:
                with _transaction(database):
                    for older in range(version, SCHEMA_VERSION):
                        for statement in _MIGRATIONS[older]:
                            database.execute(statement)
                    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise Failure(
                f"cannot open the journal {path}", detail=str(error), hint=f"mv {path} {path}.damaged"
            ) from error
        if version > SCHEMA_VERSION:
            raise Failure(
                f"cannot use the journal {path}",
                detail=f"a newer sandboxd wrote it (schema {version}, this one knows {SCHEMA_VERSION})",
                hint="start the newer sandboxd",
            )
        return cls(database, path)

    def close(self) -> None:
        """Close it; what was written stays."""
        self._database.close()

    def owner(self) -> str:
        """Return the id that labels this daemon's containers; made once per state directory."""
        rows = self._rows("SELECT value FROM meta WHERE key = 'owner'")
        if rows:
            return str(rows[0][0])
        owner = uuid.uuid4().hex
        self._execute("INSERT INTO meta (key, value) VALUES ('owner', ?)", (owner,))
        return owner

    def reserve_event_numbers(self, count: int) -> int:
        """Take ``count`` numbers that no daemon ever took before; return the first."""
        rows = self._rows("SELECT value FROM meta WHERE key = 'event_numbers'")
        first = int(rows[0][0]) if rows else 1
        self._execute(
            "INSERT INTO meta (key, value) VALUES ('event_numbers', ?) "
            "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (str(first + count),),
        )
        return first

    def put(self, record: SandboxRecord) -> None:
        """Write a sandbox down, new or changed."""
        self._execute(
            "INSERT INTO sandboxes (id, record) VALUES (?, ?) "
            "ON CONFLICT (id) DO UPDATE SET record = excluded.record",
            (record.id, msgspec.json.encode(record)),
        )

    def delete(self, sandbox_id: str) -> None:
        """Forget a sandbox and its commands. Idempotent."""
        self._execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))

    def sandboxes(self) -> list[SandboxRecord]:
        """All sandboxes, in the order of their making.

        A record that cannot be read is set aside and logged: the others must not suffer for it. Its container is then
        nobody's, and is removed like any other that no record knows.
        """
        records = []
        for sandbox_id, raw in self._rows("SELECT id, record FROM sandboxes ORDER BY rowid"):
            try:
                records.append(msgspec.json.decode(raw, type=SandboxRecord))
            except msgspec.MsgspecError as error:
                logger.warning("cannot read the record of sandbox %s, set aside: %s", sandbox_id, error)
                self._execute("INSERT OR REPLACE INTO unreadable (id, record) VALUES (?, ?)", (sandbox_id, raw))
                self.delete(sandbox_id)
        return records

    def put_command(self, sandbox_id: str, record: CommandRecord) -> None:
        """Write a background command down."""
        self._execute(
            "INSERT OR REPLACE INTO commands (sandbox_id, id, record) VALUES (?, ?, ?)",
            (sandbox_id, record.id, msgspec.json.encode(record)),
        )

    def delete_command(self, sandbox_id: str, command_id: int) -> None:
        """Forget a background command. Idempotent."""
        self._execute("DELETE FROM commands WHERE sandbox_id = ? AND id = ?", (sandbox_id, command_id))

    def commands(self, sandbox_id: str) -> list[CommandRecord]:
        """The background commands of one sandbox."""
        records = []
        for command_id, raw in self._rows("SELECT id, record FROM commands WHERE sandbox_id = ?", (sandbox_id,)):
            try:
                records.append(msgspec.json.decode(raw, type=CommandRecord))
            except msgspec.MsgspecError as error:
                logger.warning("cannot read the record of command %s, dropped: %s", command_id, error)
                self.delete_command(sandbox_id, command_id)
        return records

    def _rows(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise Failure(
                "cannot read the journal", detail=str(error), hint=f"move {self._path} away, and start again"
            ) from error

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise Failure(
                "cannot write to the journal", detail=str(error), hint=f"df -h {os.path.dirname(self._path)}"
            ) from error


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
