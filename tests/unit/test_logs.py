"""Where the daemon's messages go, what the journal is told with them, and that none can pretend to be another."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd import logs
from sandboxd.peers import Peer
from sandboxd.protocol import CommandParams, NoParams
from tests.engine.daemons import PATIENCE_S

logger = logging.getLogger("sandboxd.somewhere")
PEER = Peer(1, 1, 1)


class Journal:
    """What journald is to a client: a datagram socket, and a reader of its protocol."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(PATIENCE_S)
        self.socket.bind(self.path)

    def receive(self) -> dict[str, str]:
        return parsed(self.socket.recv(1 << 20))


def parsed(data: bytes) -> dict[str, str]:
    """https://systemd.io/JOURNAL_NATIVE_PROTOCOL: ``NAME=value``, or a name, a length and so many bytes."""
    fields = {}
    while data:
        line, newline, data = data.partition(b"\n")
        assert newline
        if b"=" in line:
            name, _, value = line.partition(b"=")
        else:
            name = line
            (length,) = struct.unpack("<Q", data[:8])
            value, newline, data = data[8 : 8 + length], data[8 + length : 9 + length], data[9 + length :]
            assert newline == b"\n"
        assert name.decode().replace("_", "").isalnum()
        assert name.decode().isupper()
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Pytest has handlers of its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = handlers, level


@pytest.fixture
def stderr(tmp_path: Path) -> Iterator[TextIO]:
    with open(tmp_path / "stderr", "w+") as file:
        yield file


def written(stderr: TextIO) -> str:
    stderr.flush()
    return Path(stderr.name).read_text()


def stream_of(stderr: TextIO) -> dict[str, str]:
    """What a service manager says of our stderr."""
    status = os.fstat(stderr.fileno())
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


@pytest.fixture
def journal(tmp_path: Path, stderr: TextIO) -> Iterator[Journal]:
    """A journal that the daemon has found."""
    journal = Journal(tmp_path / "journal.sock")
    logs.begin(stderr, stream_of(stderr), "info", journal=journal.path)
    with contextlib.closing(journal.socket):
        yield journal


# --- where to


def test_a_service_s_messages_go_to_the_journal_with_their_fields(journal: Journal, stderr: TextIO) -> None:
    logger.warning("cannot adopt %s: %s", "sb-abcdefgh23", "it is gone")
    fields = journal.receive()
    line = fields.pop("CODE_LINE")
    assert line.isdigit()
    assert fields == {
        "SYSLOG_IDENTIFIER": "sandboxd",
        "MESSAGE": "cannot adopt sb-abcdefgh23: it is gone",
        "PRIORITY": "4",
        "LOGGER": "sandboxd.somewhere",
        "CODE_FILE": __file__,
        "CODE_FUNC": "test_a_service_s_messages_go_to_the_journal_with_their_fields",
        "SANDBOX_ID": "sb-abcdefgh23",
    }
    assert written(stderr) == "", "and not there as well: the journal has it"


@pytest.mark.parametrize(
    ("level", "priority"), [("critical", "3"), ("error", "3"), ("warning", "4"), ("info", "6"), ("debug", "7")]
)
def test_priorities_are_those_of_syslog(journal: Journal, level: str, priority: str) -> None:
    """``journalctl -p warning`` shows what is at least that."""
    logs.set_level("debug")
    getattr(logger, level)("hello")
    assert journal.receive()["PRIORITY"] == priority


def test_without_a_service_manager_it_is_text(stderr: TextIO, tmp_path: Path) -> None:
    logs.begin(stderr, {}, "info", journal=str(tmp_path / "absent"))
    logger.info("listening")
    assert written(stderr).endswith(" INFO sandboxd.somewhere: listening\n")


def test_a_variable_that_speaks_of_another_file_counts_for_nothing(stderr: TextIO, tmp_path: Path) -> None:
    """It is handed on to whatever a service starts: a shell, a terminal, and a daemon in there."""
    status = os.fstat(stderr.fileno())
    good = f"{status.st_dev}:{status.st_ino}"
    assert logs.is_journal(stderr.fileno(), good)
    for stream in (
        "",
        ":",
        good + ":",
        f"{status.st_dev}:{status.st_ino + 1}",
        f"{status.st_dev + 1}:{status.st_ino}",
    ):
        assert not logs.is_journal(stderr.fileno(), stream), stream
    for stream in (
        f" {good}",
        f"+{good}",
        f"{status.st_dev}",
        f"{status.st_dev:#x}:{status.st_ino}",
        "\u0661:\u0662",
    ):
        assert not logs.is_journal(stderr.fileno(), stream), stream
    read_end, write_end = os.pipe()
    assert not logs.is_journal(write_end, good)
    os.close(read_end)
    os.close(write_end)
    assert not logs.is_journal(write_end, good), "closed"


def test_while_the_journal_does_not_listen_messages_are_text_with_a_priority(stderr: TextIO, tmp_path: Path) -> None:
    """The journal reads a service's stderr as well, and tells what is important by the number before each line."""
    logs.begin(stderr, stream_of(stderr), "info", journal=str(tmp_path / "absent"))
    logger.error("cannot go on")
    assert written(stderr) == "<3>sandboxd.somewhere: cannot go on\n"
    journal = Journal(tmp_path / "absent")
    logger.error("here I am")
    assert journal.receive()["MESSAGE"] == "here I am"
    journal.socket.close()


def test_a_journal_that_is_behind_holds_up_nobody_and_is_told_what_it_missed(journal: Journal) -> None:
    """The daemon's loop must not wait for it."""
    count = 0
    handler = logging.getLogger().handlers[0]
    assert isinstance(handler, logs._JournalHandler)
    while not handler._lost:
        logger.info("message %d", count)
        count += 1
        assert count < 100_000
    logger.info("one more")
    taken = [journal.receive()["MESSAGE"] for _ in range(count - 1)]
    assert taken == [f"message {number}" for number in range(count - 1)]
    logger.info("room again")
    assert [journal.receive()["MESSAGE"] for _ in range(2)] == [
        "room again",
        "2 messages before this one were lost",
    ]


# --- what a message is about


def test_what_a_request_s_task_says_is_about_that_request(journal: Journal) -> None:
    """Its method, and its sandbox by the id, whatever it was called."""
    logs.resolve_by({"box": "sb-boxboxbox2"}.get)
    logs.observe("commands/run", CommandParams(sandbox="box", argv=["true"]), PEER)
    logger.info("said")
    fields = journal.receive()
    assert (fields["METHOD"], fields["SANDBOX_ID"]) == ("commands/run", "sb-boxboxbox2")
    logger.info("about sb-other22222")
    assert journal.receive()["SANDBOX_ID"] == "sb-other22222", "the one that it names comes first"
    logs.observe("daemon/info", NoParams(), PEER)
    logger.info("said")
    fields = journal.receive()
    assert (fields["METHOD"], "SANDBOX_ID" in fields) == ("daemon/info", False)
    logs._asked.set(None)


# --- one message is one line


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_message_looks_like_two_or_moves_a_cursor(text: str) -> None:
    line = logs.one_line(text)
    assert len(f"a{line}b".splitlines()) == 1
    assert "\x1b" not in line
    assert "\x9b" not in line


def test_a_sandbox_cannot_forge_a_message(stderr: TextIO) -> None:
    """Whoever reads the log believes that the daemon wrote it."""
    logs.begin(stderr, {}, "info")
    logger.info("a command is called %s", "x\n2026-01-01 00:00:00,000 ERROR sandboxd: all is lost\x1b[2J")
    assert len(written(stderr).splitlines()) == 1
    assert r"x\n2026" in written(stderr)
    assert r"\x1b[2J" in written(stderr)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["MESSAGE", "METHOD", "A_B"]), st.text(max_size=40), min_size=1))
def test_no_value_can_pretend_to_be_a_field(fields: dict[str, str]) -> None:
    assert parsed(logs.datagram(fields)) == fields


def test_a_message_without_end_is_cut(journal: Journal) -> None:
    """The kernel takes no datagram of any size."""
    logger.info("%s", "x" * 10_000_000)
    message = journal.receive()["MESSAGE"]
    assert message.startswith("x" * logs.MESSAGE_CHARS_MAX)
    assert message.endswith("(10000000 characters)")


def test_where_a_defect_is_stands_below_its_message_and_cannot_be_taken_for_one(
    journal: Journal, stderr: TextIO
) -> None:
    def fail() -> None:
        raise ValueError("bad\nERROR not a line of its own")

    try:
        fail()
    except ValueError:
        logger.exception("a task failed")
    first, *rest = journal.receive()["MESSAGE"].split("\n")
    assert first == "a task failed"
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in rest)
    assert any("in fail" in line for line in rest)


def test_the_level_can_be_changed_while_it_runs(stderr: TextIO) -> None:
    logs.begin(stderr, {}, "warning")
    logger.info("unseen")
    logs.set_level("debug")
    logger.debug("seen")
    assert [line.split(": ")[1] for line in written(stderr).splitlines()] == ["seen"]
