"""What the daemon writes down before it acts, in SQLite.

A sandbox's record is written before its container is asked for, and deleted after its container is known to
be gone; so after a crash at any point, a container with our label is either in the journal or nobody's.

Commits do not wait for the disk (WAL, ``synchronous=NORMAL``): a killed daemon loses nothing. What was committed
is brought to the disk a moment later, off the hot path (``keep_durable``), for a host that loses power has lost its
running containers, but not what stopped ones and their layers hold.

All records are in memory as well, and that copy is what is read: a file that is damaged while the daemon runs costs
nothing that is known. There are two ways to write. What begins something new (``put``, ``put_command``) is refused
when it cannot be written down. What says what became of something (``keep``, ``delete``, ...) is remembered when it
cannot be written, and written with the next thing that can.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterator
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec

from runtimes.model import EngineName
from sandboxd.failures import JournalUnusable, NotFound
from sandboxd.journal_file import JournalFile, is_damage, sync_path
from sandboxd.records import CommandRecord, SandboxRecord

logger = logging.getLogger(__name__)

SYNC_DELAY_S = 0.05
"""From a change to that: who has just written something goes on writing, and would wait for the disk as well."""

SYNC_PAUSE_S = 0.5
"""Between two waits for the disk: a burst of changes costs one."""

_K = TypeVar("_K")
_V = TypeVar("_V")


class Journal:
    """The journal of one daemon. Not thread-safe: it belongs to the event loop. Made by ``open``."""

    def __init__(self, file: JournalFile) -> None:
        self._file = file
        self._owner = ""
        self._sandboxes: dict[str, SandboxRecord] = {}
        self._commands: dict[str, dict[int, CommandRecord]] = {}
        self._meta: dict[str, str] = {}
        self._late: dict[tuple[str, ...], None] = {}
        """What the file does not say yet: ``(sandbox,)``, ``(sandbox, command)``, or ``("meta", key, "")``."""
        self._damage = ""
        self._refusal = ""
        self._written = anyio.Event()
        self.unreadable: set[str] = set()
        """Ids of sandboxes whose records are there and cannot be read."""

    @classmethod
    def open(cls, path: str) -> Journal:
        """Open the journal, and make it if there is none (mode 0600).

        One that is damaged is opened, too: with whatever can still be read of it, and refusing anything new, until
        it is repaired.

        Raises:
            Failure: it cannot be opened at all, or a newer version wrote it.
        """
        file = JournalFile(path)
        journal = cls(file)
        owner = file.read_owner()
        try:
            try:
                file.connect(may_be_new=owner is None)
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise
                logger.error("the journal %s is damaged: %s", path, error)  # noqa: TRY400  (no defect of ours)
                journal._damage = str(error)
            journal._load(owner)
        except (sqlite3.Error, OSError) as error:
            file.close()
            raise JournalUnusable(
                f"cannot open the journal {path}",
                detail=str(error),
                hint=f"df -h {os.path.dirname(path)}; ls -l {path}",
            ) from error
        except BaseException:
            file.close()
            raise
        return journal

    def _load(self, owner: str | None) -> None:
        """Take everything into memory; of a damaged file what can be read."""
        torn = bool(self._damage)
        for key, value in self._file.rows("meta", "key, value", torn=torn):
            self._meta[str(key)] = str(value)
        for sandbox_id, raw in self._file.rows("sandboxes", "id, record", torn=torn):
            self._take(str(sandbox_id), raw)
        self.unreadable.update(str(row[0]) for row in self._file.rows("unreadable", "id", torn=torn))
        self.unreadable -= self._sandboxes.keys()
        for sandbox_id, command_id, raw in self._file.rows("commands", "sandbox_id, id, record", torn=torn):
            self._take_command(str(sandbox_id), int(command_id), raw)
        self._owner = owner or self._make_owner()
        self._meta["owner"] = self._owner
        if self._damage:
            # Nobody knows which sandboxes the file has lost: those of every engine are asked for.
            self._meta["unseen_engines"] = " ".join(EngineName)

    def _make_owner(self) -> str:
        """The owner of a journal that has no file beside it that says so: a new one, or one of an older daemon."""
        owner = self._meta.get("owner", "")
        if not owner and self._damage:
            raise JournalUnusable(
                f"cannot tell which containers are ours: the journal {self._file.path} is damaged",
                detail=f"{self._damage}; and nothing beside it says whose it is",
                hint=f"mv {self._file.path} {self._file.path}.damaged",
            )
        self._meta["owner"] = owner = owner or uuid.uuid4().hex
        if not self._damage:
            self._write(("meta", "owner", ""))
            self._file.sync()
        # Last: it says that there was a journal.
        self._file.write_owner(owner)
        return owner

    def _take(self, sandbox_id: str, raw: bytes) -> None:
        try:
            self._sandboxes[sandbox_id] = msgspec.json.decode(raw, type=SandboxRecord)
        except (msgspec.MsgspecError, TypeError) as error:
            logger.warning("cannot read the record of sandbox %s, set aside: %s", sandbox_id, error)
            self.unreadable.add(sandbox_id)
            if not self._damage:
                self._file.execute("INSERT OR REPLACE INTO unreadable (id, record) VALUES (?, ?)", (sandbox_id, raw))
                self._file.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))

    def _take_command(self, sandbox_id: str, command_id: int, raw: bytes) -> None:
        if sandbox_id not in self._sandboxes:
            return
        try:
            record = msgspec.json.decode(raw, type=CommandRecord)
        except (msgspec.MsgspecError, TypeError) as error:
            logger.warning("cannot read the record of command %s, dropped: %s", command_id, error)
            self.delete_command(sandbox_id, command_id)
        else:
            self._commands.setdefault(sandbox_id, {})[command_id] = record

    def close(self) -> None:
        """Close it; what was written stays."""
        self._file.close()

    # --- trouble --------------------------------------------------------------------------------------

    def require_usable(self) -> None:
        """Refuse what begins something new, while it could not be written down.

        Raises:
            JournalUnusable: it is damaged, or the disk does not take what was to be written.
        """
        if self._damage:
            raise self._refused()
        if self._late and not self.catch_up():
            raise self._refused()

    @property
    def trouble(self) -> str:
        """Why nothing new can be begun; empty: it can."""
        return self._damage or (self._refusal if self._late else "")

    @property
    def damaged(self) -> bool:
        """The trouble will not pass by itself: see ``repair``."""
        return bool(self._damage)

    def _refused(self) -> JournalUnusable:
        directory = os.path.dirname(self._file.path)
        if self._damage:
            return JournalUnusable(
                "cannot begin anything new: the journal is damaged",
                detail=f"{self._file.path}: {self._damage}; what runs goes on",
                hint="sandboxctl doctor --repair",
            )
        return JournalUnusable(
            "cannot begin anything new: the journal cannot be written",
            detail=f"{self._file.path}: {self._refusal}; what runs goes on",
            hint=f"df -h {directory}; sandboxctl rm frees what sandboxes have written",
        )

    def catch_up(self) -> bool:
        """Write what could not be written when it happened. Returns whether the file says all there is to say."""
        if self._damage:
            return False
        try:
            for key in list(self._late):
                self._write(key)
                del self._late[key]
        except sqlite3.Error as error:
            self._note_trouble(error)
        return not self._late

    def repair(self) -> str:
        """Write everything that is known into a new file; the old one is kept.

        Returns:
            Where the old file was put; empty: nothing was wrong with it.

        Raises:
            JournalUnusable: the disk does not take it; all is as it was.
        """
        if not self._damage:
            self.require_usable()
            return ""
        try:
            with self._file.replacement() as fresh:
                whole = Journal(fresh)
                whole._sandboxes, whole._commands, whole._meta = self._sandboxes, self._commands, self._meta
                for key in self._all_keys():
                    whole._write(key)
                aside = self._file.replace_by(fresh)
        except (sqlite3.Error, OSError) as error:
            raise JournalUnusable(
                f"cannot write a new journal {self._file.path}",
                detail=str(error),
                hint=f"df -h {os.path.dirname(self._file.path)}",
            ) from error
        self._damage = self._refusal = ""
        self._late.clear()
        return aside

    def _all_keys(self) -> Iterator[tuple[str, ...]]:
        yield from (("meta", key, "") for key in self._meta)
        yield from ((sandbox_id,) for sandbox_id in self._sandboxes)
        yield from ((sandbox_id, str(number)) for sandbox_id, known in self._commands.items() for number in known)

    async def keep_durable(self) -> None:
        """Bring what is committed to the disk, soon after it was, and without anybody waiting for it. Never ends."""
        while True:
            await self._written.wait()
            await anyio.sleep(SYNC_DELAY_S)
            self._written = anyio.Event()
            with contextlib.suppress(OSError):
                await anyio.to_thread.run_sync(sync_path, f"{self._file.path}-wal")
            await anyio.sleep(SYNC_PAUSE_S)

    # --- what is written ------------------------------------------------------------------------------

    def owner(self) -> str:
        """Return the id that labels this daemon's containers; made once per state directory."""
        return self._owner

    @property
    def unseen_engines(self) -> tuple[str, ...]:
        """The engines that were not asked since the file was damaged: what they have is somebody's."""
        return tuple(self._meta.get("unseen_engines", "").split())

    def note_seen(self, engines: Collection[str]) -> None:
        """Whatever these engines have is in the journal now."""
        left = [name for name in self.unseen_engines if name not in engines]
        if len(left) < len(self.unseen_engines):
            self._meta["unseen_engines"] = " ".join(left)
            self._write_late(("meta", "unseen_engines", ""))

    def reserve_event_numbers(self, count: int) -> int:
        """Take ``count`` numbers that no daemon ever took before; return the first.

        Where it is not known which were taken, the time of day is above all of them: there are not a thousand events
        in a second, year in, year out.
        """
        first = int(time.time() * 1000) if self._damage else int(self._meta.get("event_numbers", "1"))
        self._meta["event_numbers"] = str(first + count)
        self._write_late(("meta", "event_numbers", ""))
        return first

    def put(self, record: SandboxRecord) -> None:
        """Write a sandbox down before something new is begun with it.

        Raises:
            JournalUnusable: it cannot be written; nothing is changed.
        """
        self._write_now((record.id,), self._sandboxes, record.id, record)

    def keep(self, record: SandboxRecord) -> None:
        """Write down what became of a sandbox; later, if it cannot be written now."""
        if self._sandboxes.get(record.id) == record:
            return
        self._sandboxes[record.id] = record
        self._write_late((record.id,))

    def delete(self, sandbox_id: str) -> None:
        """Forget a sandbox and its commands; later, if that cannot be written now. Idempotent."""
        self._sandboxes.pop(sandbox_id, None)
        self._commands.pop(sandbox_id, None)
        self.unreadable.discard(sandbox_id)
        for key in [key for key in self._late if key[0] == sandbox_id]:
            del self._late[key]
        self._write_late((sandbox_id,))

    def sandboxes(self) -> list[SandboxRecord]:
        """All sandboxes, in the order of their making."""
        return list(self._sandboxes.values())

    def put_command(self, sandbox_id: str, record: CommandRecord) -> None:
        """Write a background command down, before it is started.

        Raises:
            JournalUnusable: it cannot be written; nothing is changed.
            NotFound: the sandbox is gone.
        """
        if sandbox_id not in self._sandboxes:
            raise NotFound(f"cannot find sandbox {sandbox_id!r}", hint="sandboxctl ls")
        known = self._commands.setdefault(sandbox_id, {})
        self._write_now((sandbox_id, str(record.id)), known, record.id, record)

    def keep_command(self, sandbox_id: str, record: CommandRecord) -> None:
        """Write down what became of a background command; later, if it cannot be written now."""
        if sandbox_id not in self._sandboxes:
            return
        self._commands.setdefault(sandbox_id, {})[record.id] = record
        self._write_late((sandbox_id, str(record.id)))

    def delete_command(self, sandbox_id: str, command_id: int) -> None:
        """Forget a background command; later, if that cannot be written now. Idempotent."""
        # One in the foreground was never written down, and is to cost no write either.
        if self._commands.get(sandbox_id, {}).pop(command_id, None) is not None:
            self._write_late((sandbox_id, str(command_id)))

    def commands(self, sandbox_id: str) -> list[CommandRecord]:
        """The background commands of one sandbox."""
        return list(self._commands.get(sandbox_id, {}).values())

    def command(self, sandbox_id: str, command_id: int) -> CommandRecord | None:
        """One background command."""
        return self._commands.get(sandbox_id, {}).get(command_id)

    # --- writing --------------------------------------------------------------------------------------

    def _write_now(self, key: tuple[str, ...], known: dict[_K, _V], name: _K, value: _V) -> None:
        self.require_usable()
        before = known.get(name)
        known[name] = value
        try:
            self._write(key)
        except sqlite3.Error as error:
            if before is None:
                del known[name]
            else:
                known[name] = before
            self._late[key] = None
            self._note_trouble(error)
            raise self._refused() from error

    def _write_late(self, key: tuple[str, ...]) -> None:
        # Behind what waits already: a command cannot be written before its sandbox.
        self._late[key] = None
        self.catch_up()

    def _note_trouble(self, error: sqlite3.Error | OSError) -> None:
        if not self.trouble or str(error) != self._refusal:
            logger.error("cannot write to the journal %s: %s", self._file.path, error)
        self._refusal = str(error)
        if is_damage(error):
            self._damage = str(error)

    def _write(self, key: tuple[str, ...]) -> None:
        """Have the file say of ``key`` what memory says."""
        match key:
            case ("meta", name, ""):
                self._file.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (name, self._meta[name]))
            case (sandbox_id, number):
                command_id = int(number)
                command = self.command(sandbox_id, command_id)
                if command is None:
                    values = (sandbox_id, command_id)
                    self._file.execute("DELETE FROM commands WHERE sandbox_id = ? AND id = ?", values)
                else:
                    self._file.execute(
                        "INSERT OR REPLACE INTO commands (sandbox_id, id, record) VALUES (?, ?, ?)",
                        (sandbox_id, command.id, msgspec.json.encode(command)),
                    )
            case (sandbox_id,):
                record = self._sandboxes.get(sandbox_id)
                if record is None:
                    self._file.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))
                else:
                    self._file.execute(
                        "INSERT INTO sandboxes (id, record) VALUES (?, ?) "
                        "ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                        (sandbox_id, msgspec.json.encode(record)),
                    )
        self._written.set()
