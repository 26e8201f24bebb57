"""What is said to type next, where a first try goes wrong."""

from __future__ import annotations

import contextlib
import errno
from typing import Any, cast, get_args

import pytest

from runtimes.init.channel import SpawnFailed
from runtimes.init.file_worker import FileRefused
from runtimes.init.files_wire import FileType
from runtimes.init.wire import SpawnRequest, Stage
from sandboxd.cli import execution, lifetime, shells
from sandboxd.cli.execution import MORE_ANEW, exit_code_of_end
from sandboxd.cli.main import main
from sandboxd.cli.shortcut import ExecArguments
from sandboxd.cli.tables import until
from sandboxd.client import Message
from sandboxd.failures import CommandNotStarted
from sandboxd.files import failure_from_refusal
from sandboxd.protocol import EventKind
from sandboxd.running import not_started


def test_the_command_knows_every_kind_of_event() -> None:
    """It has its own list, for it does not import the protocol."""
    assert get_args(EventKind) == lifetime.EVENT_KINDS


@pytest.mark.parametrize(
    ("program", "hint"),
    [
        (b"--timeout", "flags go before the sandbox: sandboxctl exec [FLAG ...] SANDBOX COMMAND"),
        (b"ls -l", "this is one word; for a shell to take it apart: sh -c 'ls -l'"),
        (b"a\n b", ""),
        (b"nothing", ""),
    ],
)
def test_what_is_no_program_is_told_what_was_meant(program: bytes, hint: str) -> None:
    """Of a text with lines of its own nothing is said: a terminal would show it as several."""
    request = SpawnRequest(command_id=1, argv=[program], env=[], cwd=b"/")
    failure = not_started(SpawnFailed(errno.ENOENT, Stage.EXEC), request)
    assert isinstance(failure, CommandNotStarted)
    assert failure.hint == hint


def test_a_program_that_is_there_and_is_refused_is_not_explained_away() -> None:
    """A file may well have a space in its name."""
    request = SpawnRequest(command_id=1, argv=[b"./my tool"], env=[], cwd=b"/")
    failure = not_started(SpawnFailed(errno.EACCES, Stage.EXEC), request)
    assert isinstance(failure, CommandNotStarted)
    assert not failure.hint


@pytest.mark.parametrize(
    ("number", "path", "hint"),
    [
        (errno.EISDIR, b"d", "sandboxctl files ls box d"),
        (errno.ENOTEMPTY, b"my d", "with what is in it: sandboxctl files rm -r box 'my d'"),
        (errno.ENOTEMPTY, b"a\x1b[2J", "with what is in it: sandboxctl files rm -r box PATH"),
        (errno.ENOENT, b"d", ""),
    ],
)
def test_a_directory_where_a_file_was_meant_is_told_what_takes_directories(
    number: int, path: bytes, hint: str
) -> None:
    """The words of the errno alone leave one to guess, and what can be typed as it stands is typed."""
    assert failure_from_refusal(FileRefused(number, FileType.DIRECTORY, path), "box").hint == hint


@pytest.mark.parametrize(("left_ms", "shown"), [(600_000, "10m"), (599_990, "10m"), (599_400, "9m"), (0, "now")])
def test_what_was_just_given_is_what_is_left(left_ms: int, shown: str) -> None:
    """A reply is some milliseconds late, which is no minute less."""
    assert until(1_000_000 + left_ms, 1_000_000) == shown


@pytest.mark.parametrize(("given", "shown"), [("1", "1s"), ("1.5", "1.5s"), ("90s", "90s"), ("2m", "2m")])
def test_a_time_limit_is_told_with_its_unit(given: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare number is seconds, and says so."""
    end = {"status": "timeout", "signal": 9, "exit_code": None}
    assert exit_code_of_end(end, "box", given) == 124
    assert capsys.readouterr().err == f"sandboxctl: the command ran into its time limit of {shown}\n"


def test_more_memory_is_for_a_sandbox_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """That of ``run --rm`` is gone: only another one can have more."""
    end = {"status": "oom", "signal": 9, "exit_code": None}
    exit_code_of_end(end, "box")
    assert capsys.readouterr().err.endswith("hint: sandboxctl update -m SIZE box\n")
    exit_code_of_end(end, "box", more_memory=MORE_ANEW)
    assert capsys.readouterr().err.endswith("hint: sandboxctl run -m SIZE\n")


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        (["kill"], "the command was ended with its sandbox, whose time was over"),
        (["pause", "kill"], "the command was ended with its sandbox, whose time was over"),
        (["pause"], "the command was killed: its sandbox was stopped or removed, or somebody ended it"),
        ([], "the command was killed: its sandbox was stopped or removed, or somebody ended it"),
    ],
)
def test_the_end_of_a_sandboxs_time_is_told_from_a_kill(
    actions: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who gave it a lifetime has forgotten that, or hears of it for the first time."""

    class Ended:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, _: object) -> dict[str, Any]:
            return {"status": "killed", "signal": None, "exit_code": None}

    def call(_: object, method: str, take: Any, **fields: object) -> dict[str, Any]:
        assert (method, fields["sandbox"], fields["kinds"]) == ("events/subscribe", "box", ["expired"])
        for action in actions:
            content = {"method": "events/event", "params": {"data": {"action": action}}}
            take(cast("Message", Told(content)))
        return {}

    class Told:
        def __init__(self, content: dict[str, Any]) -> None:
            self.content = content

    monkeypatch.setattr(execution, "Attached", Ended)
    monkeypatch.setattr(execution, "call", call)
    code = execution.run_in(cast("Any", None), "box", ["sleep", "9"], ExecArguments(), {})
    assert (code, capsys.readouterr().err) == (125, f"sandboxctl: {said}\n")


def test_what_was_interrupted_in_a_shell_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sandbox is there still, and so is the shell."""
    gone = {"stdout_bytes": 0, "stderr_bytes": 0, "stdout_dropped": 0, "stderr_dropped": 0, "truncated": False}
    end = {
        "status": "killed",
        "interrupted": True,
        "ended": False,
        "restarted": False,
        "exit_code": 130,
        "signal": None,
    }
    monkeypatch.setattr(shells, "connect", contextlib.nullcontext)
    monkeypatch.setattr(shells, "call", lambda *_, **__: {**end, **gone})
    assert main(["session", "run", "box", "0123456789ab", "sleep 9"]) == 130
    assert capsys.readouterr().err == "sandboxctl: the command was interrupted\n"
