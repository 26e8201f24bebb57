"""The audit log on the disk: what a line is, that none is changed unnoticed, what a crash or a full disk does."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.audit import files as audit_files
from sandboxd.audit import reading
from sandboxd.audit.chain import GENESIS_PREV, Line, decode, digest, encode, file_name, file_number
from sandboxd.audit.files import AuditFiles, Note
from sandboxd.protocol import AuditQueryParams, AuditVerified


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditFiles]:
    log = AuditFiles(str(tmp_path / "audit"), bytes_max=1 << 20, files_max=3)
    yield log
    log.close()


def note(method: str = "sandbox/kill", **fields: object) -> Note:
    return Note(kind="request", at_ms=1000, fields={"method": method, "uid": 1000, "result": "ok", **fields})


def write(log: AuditFiles, count: int) -> None:
    assert log.write([note(pid=number) for number in range(count)]) == count


def verified(log: AuditFiles) -> AuditVerified:
    with log.snapshot() as files:
        return reading.verify(files, log.head)


def reopened(log: AuditFiles) -> AuditFiles:
    """As a daemon finds it that starts later."""
    log.close()
    again = AuditFiles(log.directory, bytes_max=1 << 20, files_max=3)
    again.open()
    return again


def path_of(log: AuditFiles, number: int = 1) -> Path:
    return Path(log.directory, file_name(number))


def lines_of(log: AuditFiles, number: int = 1) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path_of(log, number).read_bytes().splitlines()]


# --- lines


@settings(deadline=None)
@given(st.text(max_size=40))
def test_whatever_a_caller_chose_is_one_line_of_printable_ascii(text: str) -> None:
    """A name with a newline in it must not look like two lines, and none may move a cursor."""
    line = Line(seq=1, at_ms=0, kind="request", exe=text, arguments={"argv": [text]}, prev=GENESIS_PREV)
    raw = encode(line)
    assert all(0x20 <= byte < 0x7F for byte in raw), raw
    assert decode(raw) == line


def test_each_line_holds_the_hash_of_the_one_before(log: AuditFiles) -> None:
    """By hand, as anybody can check it with sha256sum."""
    write(log, 3)
    raw = path_of(log).read_bytes().splitlines()
    assert [json.loads(line)["seq"] for line in raw] == [1, 2, 3, 4]
    assert [json.loads(line)["prev"] for line in raw] == [GENESIS_PREV, *(digest(line) for line in raw[:-1])]
    assert json.loads(raw[0])["kind"] == "genesis"
    assert verified(log).intact


def test_only_its_user_can_read_it(log: AuditFiles) -> None:
    write(log, 1)
    log.sync()
    assert os.stat(log.directory).st_mode & 0o777 == 0o700
    assert {entry.name: entry.stat().st_mode & 0o777 for entry in os.scandir(log.directory)} == {
        file_name(1): 0o600,
        "head": 0o600,
    }


def test_names_of_files_are_told_from_others() -> None:
    assert [file_number(name) for name in ("audit-000012.jsonl", "audit-1234567.jsonl")] == [12, 1234567]
    for name in ("head", "audit-12.jsonl", "audit-.jsonl", "audit-000012.jsonl.gz", "audit-00001२.jsonl"):
        assert file_number(name) is None, name


def test_a_symlink_in_its_place_is_not_followed(log: AuditFiles, tmp_path: Path) -> None:
    """Whatever it leads to would be written to."""
    target = tmp_path / "precious"
    target.write_text("")
    os.mkdir(log.directory)
    path_of(log).symlink_to(target)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        log.open()
    assert target.read_text() == ""


def test_a_symlink_in_the_directorys_place_is_not_followed(log: AuditFiles, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    Path(log.directory).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="Not a directory"):
        log.open()
    assert os.listdir(tmp_path / "elsewhere") == []


# --- tampering: what is done to the lines, what is said, and about which


def changed(lines: list[bytes]) -> None:
    lines[4] = lines[4].replace(b'"uid":1000', b'"uid":1001')


def removed(lines: list[bytes]) -> None:
    del lines[4]


def inserted(lines: list[bytes]) -> None:
    forged = decode(lines[4])
    assert forged is not None
    lines.insert(5, encode(Line(seq=6, at_ms=0, kind="request", method="sandbox/kill", prev=digest(lines[4]))))


def swapped(lines: list[bytes]) -> None:
    lines[4], lines[5] = lines[5], lines[4]


def overwritten(lines: list[bytes]) -> None:
    lines[4] = b"x" * len(lines[4])


def cut_at_the_end(lines: list[bytes]) -> None:
    del lines[-2:]


def cut_at_the_beginning(lines: list[bytes]) -> None:
    del lines[:2]


def last_changed(lines: list[bytes]) -> None:
    lines[-1] = lines[-1].replace(b'"uid":1000', b'"uid":1001')


def rewritten(lines: list[bytes]) -> None:
    """A line changed, and all that follow it made to fit: only the end gives it away."""
    prev = digest(lines[3])
    for number in range(4, len(lines)):
        line = json.loads(lines[number]) | {"uid": 1001, "prev": prev}
        lines[number] = json.dumps(line, separators=(",", ":")).encode()
        prev = digest(lines[number])


def appended(lines: list[bytes]) -> None:
    lines.append(encode(Line(seq=11, at_ms=0, kind="request", method="sandbox/kill", prev=digest(lines[-1]))))


@pytest.mark.parametrize(
    ("tamper", "kind", "line"),
    [
        (changed, "changed", 5),
        (removed, "removed", 5),
        (inserted, "inserted", 7),
        (swapped, "removed", 5),
        (overwritten, "unreadable", 5),
        (cut_at_the_end, "removed", 8),
        (cut_at_the_beginning, "removed", 1),
        (last_changed, "changed", 10),
        (rewritten, "changed", 10),
        (appended, "inserted", 11),
    ],
)
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_whatever_is_done_to_a_line_is_found_and_said_where(
    log: AuditFiles, tamper: Callable[[list[bytes]], None], kind: str, line: int, *, restarted: bool
) -> None:
    """Under the daemon that wrote it, and under the next one: that goes on with the chain, and must not mend it."""
    write(log, 9)
    log.sync()
    lines = path_of(log).read_bytes().splitlines()
    tamper(lines)
    path_of(log).write_bytes(b"".join(each + b"\n" for each in lines))
    if restarted:
        log = reopened(log)
        write(log, 1)
    found = verified(log)
    if restarted and tamper in (last_changed, rewritten, cut_at_the_end):
        kind, line = "mismatch", len(lines) + 1
    if restarted and tamper is appended:
        assert found.intact, "a line behind the head may be one that a crash kept from being counted"
        return
    assert not found.intact
    assert (found.problems[0].kind, found.problems[0].line) == (kind, line), found.problems
    log.close()


def test_every_single_byte_counts(log: AuditFiles) -> None:
    """Not only the fields that somebody thought of."""
    write(log, 4)
    path = path_of(log)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not verified(log).intact, (place, whole[place : place + 20])
    path.write_bytes(whole)
    assert verified(log).intact


# --- crashes


def test_a_line_that_a_crash_cut_short_is_told_from_one_that_somebody_cut(log: AuditFiles) -> None:
    """The next daemon says what it found, goes on behind it, and what it found stays as it was."""
    write(log, 3)
    whole = path_of(log).read_bytes()
    log.sync()
    with open(path_of(log), "ab") as file:
        file.write(b'{"seq":5,"at_ms":17')
    again = reopened(log)
    write(again, 2)
    found = verified(again)
    assert (found.intact, found.torn, found.last_seq) == (True, 1, 7)
    assert path_of(log).read_bytes().startswith(whole + b'{"seq":5,"at_ms":17\n')
    torn = lines_of_whole(again)[4]
    assert (torn["kind"], torn["data"]["bytes"]) == ("torn", 19)
    again.close()


def lines_of_whole(log: AuditFiles) -> list[dict[str, Any]]:
    return [{**json.loads(line)} for line in path_of(log).read_bytes().splitlines() if decode(line) is not None]


def test_a_line_that_was_written_to_its_end_and_cut_later_is_no_crash(log: AuditFiles) -> None:
    """It had reached the disk, and the head says so."""
    write(log, 3)
    log.sync()
    with open(path_of(log), "r+b") as file:
        file.truncate(os.path.getsize(path_of(log)) - 7)
    again = reopened(log)
    found = verified(again)
    assert [problem.kind for problem in found.problems] == ["mismatch"]
    assert "4 had been written" in found.problems[0].detail
    again.close()


def test_a_daemon_that_is_killed_goes_on_where_it_was(log: AuditFiles) -> None:
    write(log, 3)
    for _ in range(3):
        log = reopened(log)
        write(log, 1)
    assert (verified(log).intact, verified(log).last_seq) == (True, 7)
    log.close()


def test_a_crash_between_a_new_file_and_its_first_line_harms_nothing(log: AuditFiles) -> None:
    write(log, 3)
    path_of(log, 2).write_bytes(b"")
    path_of(log, 2).chmod(0o600)
    again = reopened(log)
    write(again, 2)
    found = verified(again)
    assert (found.intact, found.files, found.last_seq) == (True, 2, 6)
    again.close()


# --- files


def test_a_file_that_is_full_is_followed_by_the_next_and_only_so_many_are_kept(tmp_path: Path) -> None:
    """The chain goes on from file to file, and what is not kept any longer is missed by nobody."""
    log = AuditFiles(str(tmp_path / "audit"), bytes_max=1000, files_max=3)
    for _ in range(40):
        write(log, 1)
    assert log.numbers() == list(range(log.numbers()[0], log.numbers()[0] + 3))
    assert log.numbers()[0] > 1
    found = verified(log)
    assert (found.intact, found.files, found.last_seq) == (True, 3, log.head.seq if log.head else None)
    assert found.first_seq is not None
    assert found.first_seq > 1
    assert all(path_of(log, number).stat().st_size < 2000 for number in log.numbers())
    log.close()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_that_is_gone_and_should_be_there_is_missed(tmp_path: Path, which: int) -> None:
    log = AuditFiles(str(tmp_path / "audit"), bytes_max=1000, files_max=3)
    for _ in range(40):
        write(log, 1)
    path_of(log, log.numbers()[which]).unlink()
    assert not verified(log).intact
    log.close()


def test_who_removes_the_file_that_is_written_does_not_stop_the_log(log: AuditFiles) -> None:
    """What comes then would be written to a file that nobody can find."""
    write(log, 3)
    path_of(log).unlink()
    write(log, 2)
    assert log.numbers() == [2]
    found = verified(log)
    assert [problem.kind for problem in found.problems] == ["mismatch"]
    assert found.last_seq == 8


def test_who_removes_everything_is_told_of_by_the_head(log: AuditFiles) -> None:
    write(log, 3)
    log.sync()
    path_of(log).unlink()
    again = reopened(log)
    found = verified(again)
    assert "4 lines had been written" in found.problems[0].detail
    again.close()


# --- a disk that is full


class Disk:
    """Takes so many bytes."""

    def __init__(self) -> None:
        self.room = 1 << 30

    def append(self, descriptor: int, data: bytes) -> int:
        if data and self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = os.write(descriptor, data[: self.room])
        self.room -= taken
        return taken


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(audit_files, "_append", disk.append)
    return disk


@pytest.mark.parametrize("room", range(0, 700, 13))
def test_wherever_a_disk_is_full_the_chain_goes_on_once_there_is_room(log: AuditFiles, disk: Disk, room: int) -> None:
    """In the middle of a line, at its end, or between two: each line is there once and whole."""
    write(log, 1)
    disk.room = room
    notes = [note(pid=number) for number in range(5)]
    done = 0
    try:
        done = log.write(notes)
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017 - whether it is raised depends on the room
    assert verified(log).intact, "also while there is no room"
    disk.room = 1 << 30
    while done < len(notes):
        done += log.write(notes[done:])
    log.write([])
    assert verified(log).intact
    assert [line.get("pid") for line in lines_of(log)[2:]] == [0, 1, 2, 3, 4]


def test_a_new_file_that_finds_no_room_leaves_nothing_behind(tmp_path: Path, disk: Disk) -> None:
    log = AuditFiles(str(tmp_path / "audit"), bytes_max=300, files_max=3)
    write(log, 3)
    disk.room = 20
    with pytest.raises(OSError, match="No space"):
        log.write([note()])
    assert log.numbers() == [1]
    disk.room = 1 << 30
    write(log, 1)
    assert (log.numbers(), verified(log).intact) == ([1, 2], True)
    log.close()


# --- questions


def found_by(log: AuditFiles, sandbox: str | None = None, **wanted: Any) -> list[int | None]:
    with log.snapshot() as files:
        return [entry.pid for entry in reading.query(files, AuditQueryParams(**wanted), sandbox).entries]


def test_a_question_finds_what_fits_all_of_it(log: AuditFiles) -> None:
    log.write(
        [
            Note(kind="begun", at_ms=0),
            Note(kind="request", at_ms=10, fields={"pid": 1, "uid": 5, "method": "sandbox/create", "result": "ok"}),
            Note(
                kind="request",
                at_ms=20,
                fields={"pid": 2, "uid": 6, "method": "commands/run", "sandbox": "sb-a", "result": "not_found"},
            ),
            Note(
                kind="underway",
                at_ms=30,
                fields={"pid": 3, "uid": 5, "method": "commands/start", "arguments": {"sandbox": "box"}},
            ),
        ]
    )
    assert found_by(log, method="commands") == [2, 3]
    assert found_by(log, method="sandbox/create") == [1]
    assert found_by(log, method="sand") == []
    assert found_by(log, uid=5) == [1, 3]
    assert found_by(log, since_ms=20, until_ms=20) == [2]
    assert found_by(log, result="failed") == [2]
    assert found_by(log, result="ok") == [1]
    assert found_by(log, sandbox="sb-a") == [2]
    assert found_by(log, sandbox="box") == [3]


def test_the_last_ones_are_found_first_and_that_there_are_more_is_said(tmp_path: Path) -> None:
    """Also where they are in several files."""
    log = AuditFiles(str(tmp_path / "audit"), bytes_max=1000, files_max=9)
    for number in range(20):
        log.write([note(pid=number)])
    assert len(log.numbers()) > 2
    with log.snapshot() as files:
        some = reading.query(files, AuditQueryParams(limit=12, method="sandbox"), None)
        everything = reading.query(files, AuditQueryParams(limit=20, method="sandbox"), None)
    assert ([entry.pid for entry in some.entries], some.more) == (list(range(8, 20)), True)
    assert ([entry.pid for entry in everything.entries], everything.more) == (list(range(20)), False)
    log.close()
