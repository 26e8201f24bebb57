"""The states of a sandbox and what leads from one to the next, as a table.

Pure. A state is named for what is true in the world. Every state has a way out through REMOVE, so that
``rm`` always works.
"""

from __future__ import annotations

from enum import StrEnum

from sandboxd.failures import Conflict


class State(StrEnum):
    """What is true of a sandbox."""

    CREATING = "creating"
    """Written down; the engine may or may not have a container yet."""
    WARM = "warm"
    """A slot: it runs, its limits are proven, and it is nobody's."""
    RESERVED = "reserved"
    """A slot that is being made into somebody's sandbox."""
    RUNNING = "running"
    """The container runs and its init answers."""
    PAUSED = "paused"
    """The container is frozen: it keeps its memory, and takes no CPU time."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    """The container is there and does not run."""
    STARTING = "starting"
    REMOVING = "removing"
    """It is being removed; after a crash the removal is finished."""
    BROKEN = "broken"
    """The container may run, but its init does not answer, or its engine does not."""
    LOST = "lost"
    """The container is gone, and not by us."""


class Event(StrEnum):
    """What can happen to a sandbox."""

    CREATED = "created"
    FILLED = "filled"
    RESERVE = "reserve"
    CLAIMED = "claimed"
    STOP = "stop"
    START = "start"
    PAUSE = "pause"
    """The container was paused, or was seen to be."""
    EXITED = "exited"
    """The container was seen not to run."""
    ADOPTED = "adopted"
    """The container runs, and its init answered."""
    UNREACHABLE = "unreachable"
    VANISHED = "vanished"
    """The engine no longer knows the container."""
    REMOVE = "remove"


_ALIVE = (
    State.CREATING,
    State.WARM,
    State.RESERVED,
    State.RUNNING,
    State.PAUSED,
    State.STOPPING,
    State.STOPPED,
    State.STARTING,
    State.BROKEN,
)

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.CREATING, Event.CREATED): State.RUNNING,
    (State.CREATING, Event.FILLED): State.WARM,
    (State.WARM, Event.ADOPTED): State.WARM,
    (State.WARM, Event.RESERVE): State.RESERVED,
    (State.RESERVED, Event.CLAIMED): State.RUNNING,
    (State.RESERVED, Event.ADOPTED): State.RESERVED,
    (State.WARM, Event.EXITED): State.STOPPED,
    (State.RESERVED, Event.EXITED): State.STOPPED,
    (State.RUNNING, Event.STOP): State.STOPPING,
    (State.PAUSED, Event.STOP): State.STOPPING,
    (State.BROKEN, Event.STOP): State.STOPPING,
    (State.STOPPED, Event.START): State.STARTING,
    **{
        (state, Event.PAUSE): State.PAUSED
        for state in (State.RUNNING, State.PAUSED, State.STARTING, State.STOPPING, State.BROKEN, State.LOST)
    },
    (State.PAUSED, Event.ADOPTED): State.RUNNING,
    (State.PAUSED, Event.EXITED): State.STOPPED,
    (State.STARTING, Event.ADOPTED): State.RUNNING,
    (State.RUNNING, Event.ADOPTED): State.RUNNING,
    (State.STOPPING, Event.ADOPTED): State.RUNNING,
    (State.BROKEN, Event.ADOPTED): State.RUNNING,
    (State.STOPPED, Event.ADOPTED): State.RUNNING,
    (State.LOST, Event.ADOPTED): State.RUNNING,
    (State.RUNNING, Event.EXITED): State.STOPPED,
    (State.STOPPING, Event.EXITED): State.STOPPED,
    (State.STARTING, Event.EXITED): State.STOPPED,
    (State.BROKEN, Event.EXITED): State.STOPPED,
    (State.STOPPED, Event.EXITED): State.STOPPED,
    (State.LOST, Event.EXITED): State.STOPPED,
    (State.LOST, Event.VANISHED): State.LOST,
    (State.LOST, Event.UNREACHABLE): State.LOST,
    **{(state, Event.UNREACHABLE): State.BROKEN for state in _ALIVE if state is not State.CREATING},
    **{(state, Event.VANISHED): State.LOST for state in _ALIVE if state is not State.CREATING},
    **{(state, Event.REMOVE): State.REMOVING for state in State},
}


def next_state(state: State, event: Event) -> State:
    """Return the state that ``event`` leads to.

    Raises:
        Conflict: this cannot happen to a sandbox in this state.
    """
    following = TRANSITIONS.get((state, event))
    if following is None and state is State.REMOVING:
        raise Conflict("cannot go on with this sandbox", detail="it is being removed", hint="sandboxctl ls")
    if following is None:
        raise Conflict(
            f"cannot {event.value} a sandbox that is {state.value}",
            hint="sandboxctl inspect SANDBOX shows its state and the reason",
        )
    return following
