"""What is written down must be there after a crash, and nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from runtimes.model import Limits
from sandboxd.failures import Failure, JournalUnusable, NotFound
from sandboxd.journal import Journal
from sandboxd.journal_file import SCHEMA_VERSION, JournalFile
from sandboxd.lifecycle import State
from sandboxd.protocol import CommandEnd
from sandboxd.records import (
    CommandRecord,
    EgressRecord,
    ForwardRecord,
    GrantRecord,
    LifetimeRecord,
    MountRecord,
    SandboxRecord,
    WorkspaceRecord,
)
from tests.unit.records import record

PAGE_BYTES = 4096
COMMAND = CommandRecord(id=7, argv=("sleep", "9"), started_at_ms=5, deadline_at_ms=None, grace_s=2.0)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """All fields survive, in the order of their making, and a change replaces."""
    path = str(tmp_path / "journal")
    journal = Journal.open(path)
    first, second = record(), record(id="sb-b", name="b")
    journal.put(first)
    journal.put(second)
    journal.put(record(state=State.STOPPED))
    journal.put_command(first.id, COMMAND)
    # Not closed: as after a kill.
    again = Journal.open(path)
    assert again.sandboxes() == [record(state=State.STOPPED), second]
    assert again.commands(first.id) == [COMMAND]
    assert again.commands(second.id) == []
    again.delete(first.id)
    assert again.commands(first.id) == []
    assert again.owner() == journal.owner()
    again.close()
    journal.close()


def test_a_command_that_was_never_written_down_is_forgotten_without_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command in the foreground is one, and there may be hundreds in a second."""
    journal = Journal.open(str(tmp_path / "journal"))
    box = record()
    journal.put(box)
    journal.put_command(box.id, COMMAND)
    statements: list[str] = []
    execute = JournalFile.execute

    def listening(file: JournalFile, statement: str, values: tuple[object, ...]) -> None:
        statements.append(statement.split(maxsplit=1)[0])
        execute(file, statement, values)

    monkeypatch.setattr(JournalFile, "execute", listening)
    journal.delete_command(box.id, COMMAND.id + 1)
    assert statements == []
    journal.delete_command(box.id, COMMAND.id)
    journal.delete_command(box.id, COMMAND.id)
    assert statements == ["DELETE"]
    journal.close()


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    """It holds environment variables."""
    path = str(tmp_path / "journal")
    Journal.open(path).close()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_newer_journal_is_not_touched(tmp_path: Path) -> None:
    """An older daemon must not misread what a newer one wrote."""
    path = str(tmp_path / "journal")
    Journal.open(path).close()
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()
    with pytest.raises(Failure, match="a newer sandboxd wrote it"):
        Journal.open(path)


def test_garbage_that_nothing_says_whose_it_is_is_a_clear_failure(tmp_path: Path) -> None:
    """Garbage must not become an empty list of sandboxes, nor a new owner to whom none of the containers belong."""
    path = tmp_path / "journal"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(JournalUnusable, match="cannot tell which containers are ours") as caught:
        Journal.open(str(path))
    assert caught.value.hint == f"mv {path} {path}.damaged"


def truncated(path: Path) -> None:
    os.truncate(path, 0)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbled(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"\xa5" * (path.stat().st_size - PAGE_BYTES))


def headless(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(PAGE_BYTES))


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncated, cut, garbled, headless, gone])
def test_a_damaged_journal_begins_nothing_new_and_forgets_nothing_that_it_is_told(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """And when it is repaired it has all of that, and the damaged file is kept."""
    path = tmp_path / "journal"
    journal = Journal.open(str(path))
    for number in range(40):
        journal.put(record(id=f"sb-{number:010}"))
    owner = journal.owner()
    journal.close()
    damage(path)
    damaged = path.read_bytes() if path.exists() else b""

    journal = Journal.open(str(path))
    assert journal.owner() == owner, "or the containers would be nobody's"
    assert journal.damaged
    assert set(journal.unseen_engines) == {"docker", "podman"}
    with pytest.raises(JournalUnusable, match="damaged") as caught:
        journal.put(record(id="sb-new"))
    assert caught.value.hint == "sandboxctl doctor --repair"
    assert "sb-new" not in [box.id for box in journal.sandboxes()]
    journal.keep(record(id="sb-found", state=State.STOPPED))
    with pytest.raises(JournalUnusable):
        journal.put_command("sb-found", COMMAND)
    journal.keep_command("sb-found", COMMAND)
    journal.keep(record(id="sb-removed"))
    journal.delete("sb-removed")
    numbers = journal.reserve_event_numbers(10)
    journal.note_seen({"docker"})

    aside = journal.repair()
    assert aside == f"{path}.damaged"
    if damaged:
        assert Path(aside).read_bytes()[: PAGE_BYTES // 2] == damaged[: PAGE_BYTES // 2]
    assert not journal.damaged
    journal.put(record(id="sb-new"))
    assert journal.repair() == "", "it is whole"
    known = journal.sandboxes()
    # Not closed: as after a kill.
    again = Journal.open(str(path))
    assert again.sandboxes() == known
    assert [box.id for box in known][-2:] == ["sb-found", "sb-new"]
    assert again.commands("sb-found") == [COMMAND]
    assert again.owner() == owner
    assert again.unseen_engines == ("podman",), "it may still have what nobody else knows of"
    assert again.reserve_event_numbers(1) >= numbers + 10
    again.close()
    journal.close()


def test_others_may_read_it_meanwhile(tmp_path: Path) -> None:
    """The last one to close a database tidies it up. Who reads it is not the last while the daemon has it open."""
    path = tmp_path / "journal"
    journal = Journal.open(str(path))
    reader = f"import sqlite3; sqlite3.connect({str(path)!r}).execute('SELECT * FROM sandboxes').fetchall()"
    for number in range(2):
        journal.put(record(id=f"sb-{number}"))
        subprocess.run([sys.executable, "-c", reader], check=True)
    again = Journal.open(str(path))
    assert [box.id for box in again.sandboxes()] == ["sb-0", "sb-1"]
    again.close()
    journal.close()


def test_what_was_damaged_before_is_never_overwritten(tmp_path: Path) -> None:
    """Whoever wants to look at it later can."""
    path = tmp_path / "journal"
    Journal.open(str(path)).close()
    for name in ("journal.damaged", "journal.damaged.1"):
        truncated(path)
        journal = Journal.open(str(path))
        assert journal.repair() == str(tmp_path / name)
        journal.close()


def test_an_owner_of_an_older_daemon_is_kept(tmp_path: Path) -> None:
    """It wrote its owner into the journal and nowhere else."""
    path = tmp_path / "journal"
    journal = Journal.open(str(path))
    owner = journal.owner()
    journal.close()
    (tmp_path / "owner").unlink()
    journal = Journal.open(str(path))
    assert journal.owner() == owner
    assert (tmp_path / "owner").read_text() == f"{owner}\n"
    assert stat.S_IMODE((tmp_path / "owner").stat().st_mode) == 0o600
    journal.close()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow, or be written at all."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_begins_nothing_new_and_what_happened_meanwhile_is_written_later(tmp_path: Path) -> None:
    """``rm`` is how a full disk gets better: it must not need the disk."""
    path = str(tmp_path / "journal")
    journal = Journal.open(path)
    box, other = record(id="sb-box"), record(id="sb-other")
    journal.put(box)
    journal.put(other)
    with full_disk():
        with pytest.raises(JournalUnusable, match="cannot be written") as caught:
            journal.put(record(id="sb-new"))
        assert caught.value.hint.startswith("df -h ")
        with pytest.raises(JournalUnusable):
            journal.put(record(id="sb-box", name="other"))
        with pytest.raises(JournalUnusable):
            journal.put_command(box.id, COMMAND)
        journal.keep(record(id="sb-box", state=State.STOPPED))
        journal.keep_command(box.id, COMMAND)
        journal.delete(other.id)
        assert journal.trouble
        assert not journal.damaged
        with pytest.raises(JournalUnusable):
            journal.require_usable()
    journal.require_usable()
    assert not journal.trouble
    again = Journal.open(path)
    assert again.sandboxes() == [record(id="sb-box", state=State.STOPPED)]
    assert again.commands(box.id) == [COMMAND]
    again.close()
    journal.close()


def test_what_is_written_already_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart finds most sandboxes as it left them, and says so of each."""
    journal = Journal.open(str(tmp_path / "journal"))
    journal.put(record(id="sb-box"))
    statements: list[str] = []
    execute = JournalFile.execute

    def noted(file: JournalFile, statement: str, values: tuple[object, ...]) -> None:
        statements.append(statement)
        execute(file, statement, values)

    monkeypatch.setattr(JournalFile, "execute", noted)
    journal.keep(record(id="sb-box"))
    assert statements == []
    journal.keep(record(id="sb-box", state=State.STOPPED))
    assert len(statements) == 1
    journal.close()


def test_a_command_that_ends_after_its_sandbox_troubles_nobody(tmp_path: Path) -> None:
    """A row without its sandbox could not be written, now or ever."""
    journal = Journal.open(str(tmp_path / "journal"))
    journal.keep_command("sb-gone", COMMAND)
    with pytest.raises(NotFound):
        journal.put_command("sb-gone", COMMAND)
    assert not journal.trouble
    assert journal.commands("sb-gone") == []
    journal.close()


@pytest.mark.anyio
async def test_what_is_written_reaches_the_disk_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once for a burst: a power cut may cost a moment, and nobody waits for a disk."""
    synced: list[str] = []
    monkeypatch.setattr("sandboxd.journal.sync_path", synced.append)
    monkeypatch.setattr("sandboxd.journal.SYNC_DELAY_S", 0.0)
    monkeypatch.setattr("sandboxd.journal.SYNC_PAUSE_S", 0.0)
    journal = Journal.open(str(tmp_path / "journal"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(journal.keep_durable)
        await anyio.wait_all_tasks_blocked()
        before = len(synced)
        for number in range(20):
            journal.put(record(id=f"sb-{number}"))
        with anyio.fail_after(10):
            while len(synced) == before:
                await anyio.wait_all_tasks_blocked()
        assert synced[before:] == [str(tmp_path / "journal-wal")]
        tasks.cancel_scope.cancel()
    journal.close()


@pytest.mark.anyio
async def test_the_disk_is_not_asked_while_a_burst_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has written something writes more at once, and would wait for the disk as well."""
    synced: list[str] = []
    monkeypatch.setattr("sandboxd.journal.sync_path", synced.append)
    monkeypatch.setattr("sandboxd.journal.SYNC_DELAY_S", 3600.0)
    journal = Journal.open(str(tmp_path / "journal"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(journal.keep_durable)
        journal.put(record())
        await anyio.wait_all_tasks_blocked()
        assert not synced
        tasks.cancel_scope.cancel()
    journal.close()


def test_a_symlink_in_its_place_is_refused(tmp_path: Path) -> None:
    """The state directory is ours, but a journal elsewhere is not what was meant."""
    (tmp_path / "journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Failure, match="cannot open the journal"):
        Journal.open(str(tmp_path / "journal"))
    assert not (tmp_path / "elsewhere").exists()


def test_one_record_that_cannot_be_read_costs_no_other(tmp_path: Path) -> None:
    """Otherwise one bad row would keep the daemon from ever starting again. It is set aside, not thrown away."""
    path = str(tmp_path / "journal")
    journal = Journal.open(path)
    good, bad = record(), record(id="sb-bad")
    journal.put(good)
    journal.put(bad)
    journal.put_command(good.id, COMMAND)
    journal.put_command(good.id, CommandRecord(**{**msgspec.structs.asdict(COMMAND), "id": 8}))
    journal.close()
    database = sqlite3.connect(path)
    database.execute("UPDATE sandboxes SET record = x'7b7d' WHERE id = 'sb-bad'")
    database.execute("UPDATE commands SET record = x'ff' WHERE id = 8")
    database.commit()
    journal = Journal.open(path)
    assert journal.sandboxes() == [good]
    assert journal.commands(good.id) == [COMMAND]
    assert journal.unreadable == {"sb-bad"}, "its container is not nobody's"
    journal.close()
    assert database.execute("SELECT id, record FROM unreadable").fetchall() == [("sb-bad", b"{}")]
    database.close()


def test_a_journal_of_the_first_schema_loads(tmp_path: Path) -> None:
    """What an older daemon wrote must always be read: this file is never changed, only joined by newer ones."""
    path = tmp_path / "journal"
    database = sqlite3.connect(path)
    database.executescript((Path(__file__).parent.parent / "golden" / "journal-schema-1.sql").read_text())
    database.close()
    journal = Journal.open(str(path))
    (box,) = journal.sandboxes()
    assert (box.id, box.name, box.state, box.engine) == ("sb-golden2345", "gold", State.RUNNING, "podman")
    assert box.limits.memory_bytes_max == 67108864
    assert [command.argv for command in journal.commands(box.id)] == [("sleep", "1000")]
    assert journal.owner() == "0123456789abcdef0123456789abcdef"
    journal.close()
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,), "it is one of ours now"
    database.close()
    assert box.lifetime == LifetimeRecord()


def test_a_journal_of_the_second_schema_loads(tmp_path: Path) -> None:
    """With a lifetime, and paused."""
    path = tmp_path / "journal"
    database = sqlite3.connect(path)
    database.executescript((Path(__file__).parent.parent / "golden" / "journal-schema-2.sql").read_text())
    database.close()
    journal = Journal.open(str(path))
    (box,) = journal.sandboxes()
    assert (box.id, box.state, box.state_reason) == ("sb-golden2345", State.PAUSED, "its lifetime of 30m is over")
    assert box.lifetime == LifetimeRecord(lifetime_ms=1_800_000, idle_timeout_ms=600_000, on_timeout="pause")
    assert [command.argv for command in journal.commands(box.id)] == [("sleep", "1000")]
    assert journal.reserve_event_numbers(10) == 200_001
    journal.close()


WRITTEN = (SandboxRecord, WorkspaceRecord, MountRecord, LifetimeRecord, EgressRecord, GrantRecord, ForwardRecord)
GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("journal-schema-*.sql"))


def values_in(path: Path) -> dict[tuple[str, int | None], Any]:
    """All records of a journal, as they stand in the file, by sandbox and command."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        sandboxes = database.execute("SELECT id, NULL, record FROM sandboxes").fetchall()
        commands = database.execute("SELECT sandbox_id, id, record FROM commands").fetchall()
    return {(row[0], row[1]): json.loads(row[2]) for row in (*sandboxes, *commands)}


def is_kept(old: Any, new: Any) -> bool:
    """Whether all that was said is said still; more may be said."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(key in new and is_kept(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return isinstance(new, list) and len(old) == len(new) and all(map(is_kept, old, new))
    return bool(old == new)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_nothing_that_was_ever_written_down_is_lost(golden: Path, tmp_path: Path) -> None:
    """A field that is renamed, or read in another way, would be; and nobody would be told."""
    with contextlib.closing(sqlite3.connect(tmp_path / "journal")) as database:
        database.executescript(golden.read_text())
    before = values_in(tmp_path / "journal")
    journal = Journal.open(str(tmp_path / "journal"))
    assert journal.unreadable == set()
    for box in journal.sandboxes():
        journal.put(box)
        for command in journal.commands(box.id):
            journal.put_command(box.id, command)
    journal.close()
    after = values_in(tmp_path / "journal")
    assert after.keys() == before.keys()
    for key, old in before.items():
        assert is_kept(old, after[key]), key


def test_every_field_is_in_a_journal_that_is_kept(tmp_path: Path) -> None:
    """One that is added is to be read for ever, too: it comes with a file that has it, and no file is changed."""
    said: set[str] = set()

    def collect(value: Any) -> None:
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(each)
        if isinstance(value, dict):
            said.update(value)

    for number, golden in enumerate(GOLDEN):
        path = tmp_path / str(number)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(golden.read_text())
        for record_said in values_in(path).values():
            collect(record_said)
    for struct in (*WRITTEN, Limits, CommandRecord, CommandEnd):
        assert set(struct.__struct_fields__) <= said, struct
    assert f"journal-schema-{SCHEMA_VERSION}" in {path.stem for path in GOLDEN}


def test_numbers_of_events_never_come_again(tmp_path: Path) -> None:
    """Not even after a daemon that was killed before it had used them."""
    path = str(tmp_path / "journal")
    journal = Journal.open(path)
    assert [journal.reserve_event_numbers(100), journal.reserve_event_numbers(100)] == [1, 101]
    again = Journal.open(path)
    assert again.reserve_event_numbers(5) == 201
    again.close()
    journal.close()
