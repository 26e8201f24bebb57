"""The table of states."""

from __future__ import annotations

import pytest

from sandboxd.failures import Conflict
from sandboxd.lifecycle import TRANSITIONS, Event, State, next_state


@pytest.mark.parametrize("state", list(State))
def test_a_sandbox_can_be_removed_from_every_state(state: State) -> None:
    """No state is a dead end: ``rm`` always works."""
    assert next_state(state, Event.REMOVE) is State.REMOVING


def test_what_the_table_does_not_name_is_a_conflict() -> None:
    """A stopped sandbox cannot be stopped into something else by accident."""
    with pytest.raises(Conflict, match="cannot stop a sandbox that is stopped"):
        next_state(State.STOPPED, Event.STOP)


def test_a_removal_is_never_undone() -> None:
    """Nothing but the removal itself may happen to a sandbox that is being removed."""
    assert {event for state, event in TRANSITIONS if state is State.REMOVING} == {Event.REMOVE}


@pytest.mark.parametrize("state", [state for state in State if state not in (State.CREATING, State.REMOVING)])
def test_every_settled_state_can_be_found_again(state: State) -> None:
    """After a restart the engine says whether a container runs, stopped or vanished: each must be bookable."""
    for event in (Event.EXITED, Event.VANISHED, Event.UNREACHABLE, Event.ADOPTED):
        assert next_state(state, event) in State
