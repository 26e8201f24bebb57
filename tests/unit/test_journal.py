"""What is written down must be there after a crash, and nowhere else."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import msgspec
import pytest

from sandboxd.failures import Failure
from sandboxd.journal import SCHEMA_VERSION, CommandRecord, Journal, LifetimeRecord
from sandboxd.lifecycle import State
from tests.unit.records import record

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


def test_a_damaged_journal_is_a_clear_failure(tmp_path: Path) -> None:
    """Garbage must not become an empty list of sandboxes."""
    path = tmp_path / "journal"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(Failure, match="cannot open the journal"):
        Journal.open(str(path))


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


def test_numbers_of_events_never_come_again(tmp_path: Path) -> None:
    """Not even after a daemon that was killed before it had used them."""
    path = str(tmp_path / "journal")
    journal = Journal.open(path)
    assert [journal.reserve_event_numbers(100), journal.reserve_event_numbers(100)] == [1, 101]
    again = Journal.open(path)
    assert again.reserve_event_numbers(5) == 201
    again.close()
    journal.close()
