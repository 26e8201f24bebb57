"""The thin path cannot say what the protocol does not know."""

import msgspec
import pytest

from sandboxd import failures, protocol
from sandboxd.cli import execution, wire, wire_table
from sandboxd.cli.verb import LIMITS, LIMITS_OF_CREATE


def test_what_was_not_given_is_not_sent() -> None:
    """The daemon's own defaults and its configuration apply then."""
    assert wire.build("sandbox/stop", sandbox="s", grace=None) == {"sandbox": "s"}
    assert wire.build("commands/run", sandbox="s", argv=["a"], grace=2, env={}) == {"sandbox": "s", "argv": ["a"]}


def test_a_field_that_the_protocol_does_not_know_is_an_error() -> None:
    """Found here, in a test, and not by somebody whose flag does nothing."""
    with pytest.raises(TypeError, match="no field 'sandbx'"):
        wire.build("sandbox/stop", sandbx="s")


def test_a_field_that_is_missing_is_an_error() -> None:
    """The same."""
    with pytest.raises(TypeError, match="requires 'sandbox'"):
        wire.build("sandbox/stop")


def test_every_limit_has_a_flag() -> None:
    """A limit that cannot be set from the command line would be found by the one who needs it."""
    flags = {names[-1].lstrip("-") for names, _, _ in (*LIMITS, *LIMITS_OF_CREATE)}
    assert flags == {field.name for field in msgspec.structs.fields(protocol.LimitsParams)}


def test_exit_codes_are_those_of_the_failures() -> None:
    """They are written twice, because the failures are too heavy to import there."""
    assert {failure.type: int(failure.exit_code) for failure in failures.FAILURES} == wire_table.EXIT_CODES
    ours = (execution.EXEC_FAILED, execution.NOT_EXECUTABLE, execution.NOT_FOUND, execution.SIGNAL_BASE)
    theirs = failures.Exit
    assert ours == (theirs.EXEC_FAILED, theirs.NOT_EXECUTABLE, theirs.NOT_FOUND, theirs.SIGNAL_BASE)
