"""The journal's file: opened, checked, migrated, replaced; and the file beside it that says whose it is.

What its rows mean is ``journal``'s. Errors are SQLite's own and the system's: see ``is_damage`` for which of them
will not pass by themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

from sandboxd.failures import Failure

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

OWNER_NAME = "owner"
"""The file beside the journal that says what labels our containers: they must be found without the journal, too."""

_OWNER = re.compile(r"[0-9a-f]{32}")
_OWNER_CHARS_MAX = 64

_COMPANIONS = ("", "-wal", "-shm")
"""What SQLite keeps beside a database goes where that goes."""

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})

_EXTENDED = 0xFF
"""The part of SQLite's error codes that names the kind."""


class Damaged(sqlite3.DatabaseError):
    """The file is not what it was."""


def is_damage(error: BaseException) -> bool:
    """Whether this will not pass by itself, as a full disk may."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, Damaged) or (code is not None and code & _EXTENDED in _DAMAGED)


class JournalFile:
    """One SQLite file, and its owner beside it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._directory = os.path.dirname(path)
        self._database: sqlite3.Connection | None = None

    def connect(self, *, may_be_new: bool) -> None:
        """Open the file (mode 0600), make or migrate what is in it, and see that it is whole.

        Args:
            may_be_new: There may be none yet. Otherwise one that is missing or empty has been lost.

        Raises:
            sqlite3.Error, OSError: it cannot be; where it is damaged, ``rows`` may be tried.
            Failure: a newer version wrote it.
        """
        if not may_be_new and not os.path.lexists(self.path):
            raise Damaged("it is gone")
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._database = database = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA foreign_keys = ON")
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise Failure(
                f"cannot use the journal {self.path}",
                detail=f"a newer sandboxd wrote it (schema {version}, this one knows {SCHEMA_VERSION})",
                hint="start the newer sandboxd",
            )
        if version == 0 and not may_be_new:
            raise Damaged("it is empty, and was not")
        found = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
        if found != "ok":
            raise Damaged(found.splitlines()[-1])
        if version < SCHEMA_VERSION:
            _migrate(database, version)
        database.execute("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def rows(self, table: str, columns: str, *, torn: bool) -> list[tuple[Any, ...]]:
        """The rows of a table in the order of their making.

        Args:
            table: Its name.
            columns: Theirs.
            torn: The file is damaged, and what comes before the damage is all there is.
        """
        found: list[tuple[Any, ...]] = []
        if self._database is None:
            return found
        try:
            for row in self._database.execute(f"SELECT {columns} FROM {table} ORDER BY rowid"):  # noqa: S608  (ours)
                found.append(row)  # noqa: PERF402  (an error in the middle keeps what came before it)
        except sqlite3.Error:
            if not torn:
                raise
        return found

    def execute(self, statement: str, values: tuple[object, ...]) -> None:
        """Carry out one statement, whole or not at all."""
        if self._database is None:
            raise sqlite3.OperationalError("it is not open")
        self._database.execute(statement, values)

    def sync(self) -> None:
        """Bring all that was written to the disk, and wait for that: a checkpoint does.

        Never by opening and closing the file itself, which would take SQLite's locks off it.
        """
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)", ())

    @contextlib.contextmanager
    def replacement(self) -> Iterator[JournalFile]:
        """A new, empty file that may take the place of this one; gone in the end if it did not."""
        fresh = JournalFile(f"{self.path}.new")
        fresh._remove()
        try:
            fresh.connect(may_be_new=True)
            yield fresh
        finally:
            fresh.close()
            fresh._remove()

    def _remove(self) -> None:
        for companion in _COMPANIONS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + companion)

    def replace_by(self, fresh: JournalFile) -> str:
        """Put another file in the place of this one, and open that; return where the old one is now."""
        fresh.sync()
        fresh.close()
        self.close()
        aside = _free_name(f"{self.path}.damaged")
        for companion in _COMPANIONS:
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path + companion, aside + companion)
        os.rename(fresh.path, self.path)
        sync_path(self._directory)
        self.connect(may_be_new=False)
        return aside

    def read_owner(self) -> str | None:
        """What labels our containers; None: there never was a journal here, or one of an older daemon."""
        try:
            with open(os.path.join(self._directory, OWNER_NAME), encoding="ascii") as file:
                owner = file.read(_OWNER_CHARS_MAX).strip()
        except (OSError, UnicodeDecodeError):
            return None
        return owner if _OWNER.fullmatch(owner) else None

    def write_owner(self, owner: str) -> None:
        """Write that down for good."""
        path = os.path.join(self._directory, OWNER_NAME)
        with open(f"{path}.new", "w", encoding="ascii", opener=_private) as file:
            file.write(f"{owner}\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{path}.new", path)
        sync_path(self._directory)


def sync_path(path: str) -> None:
    """Bring a file or a directory to the disk, and wait for that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(path: str) -> str:
    """``path``, or the first of ``path.1``, ``path.2``, ... that is not taken: nothing is overwritten."""
    name, number = path, 0
    while os.path.lexists(name):
        number += 1
        name = f"{path}.{number}"
    return name


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _migrate(database: sqlite3.Connection, version: int) -> None:
    if version == 0:
        statements = tuple(_SCHEMA.split(";\n"))
    else:
        statements = tuple(each for older in range(version, SCHEMA_VERSION) for each in _MIGRATIONS[older])
    with _transaction(database):
        for statement in statements:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
