"""What to do about each sandbox after a start, and about each container that carries our label.

Pure: what the journal says and what the engines say in, decisions out. The rule behind the table: a container
of ours is either in the journal, or nobody's and removed; a record whose container is gone says so until it is
removed by its user.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

import msgspec

from runtimes.model import ContainerState, ContainerSummary
from sandboxd.lifecycle import State
from sandboxd.records import SandboxRecord

PAUSED = "its container is paused, and not by sandboxd"
WENT_DOWN = "the host went down, or its user was logged out, while it ran"


class Action(StrEnum):
    """What is done."""

    ADOPT = "adopt"
    """Its container runs: connect to its init."""
    NOTE_PAUSED = "note_paused"
    NOTE_STOPPED = "note_stopped"
    NOTE_LOST = "note_lost"
    NOTE_UNREACHABLE = "note_unreachable"
    """Its engine does not answer."""
    FORGET = "forget"
    """Remove whatever there is of it, and its record."""
    REMOVE_CONTAINER = "remove_container"
    """A container with our label that no record knows."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do, and why."""

    action: Action
    reason: str
    sandbox_id: str
    engine: str
    container: ContainerSummary | None = None


def decide(
    records: Sequence[SandboxRecord],
    containers: Mapping[str, Sequence[ContainerSummary]],
    *,
    reachable: Collection[str],
    went_down: bool = False,
) -> list[Decision]:
    """Return what to do, one decision per record, and one per container that no record knows.

    Args:
        records: The journal.
        containers: Engine name to its containers of ours.
        reachable: Names of the engines that answered.
        went_down: The host, or all that ran for this user, did since the journal was written.
    """
    stopped_by = WENT_DOWN if went_down else ""
    decisions = [
        _for_record(record, _container_of(record, containers.get(record.engine, ())), reachable, stopped_by)
        for record in records
    ]
    owned = {(decision.engine, decision.container) for decision in decisions}
    decisions += [
        Decision(
            action=Action.REMOVE_CONTAINER,
            reason="it carries our label and no sandbox owns it",
            sandbox_id=container.sandbox_id,
            engine=engine,
            container=container,
        )
        for engine, listed in containers.items()
        for container in listed
        if container.named_by_us and (engine, container) not in owned
    ]
    return decisions


def _container_of(record: SandboxRecord, listed: Sequence[ContainerSummary]) -> ContainerSummary | None:
    """The record's container: by its id where that is known, else by our label and our name."""
    for container in listed:
        if record.container_id is None:
            if container.sandbox_id == record.id and container.named_by_us:
                return container
        elif container.container_id == record.container_id:
            return container
    return None


def _for_record(
    record: SandboxRecord, container: ContainerSummary | None, reachable: Collection[str], stopped_by: str
) -> Decision:
    action, reason = _judge(record, container, answered=record.engine in reachable, stopped_by=stopped_by)
    return Decision(action=action, reason=reason, sandbox_id=record.id, engine=record.engine, container=container)


def _judge(
    record: SandboxRecord, container: ContainerSummary | None, *, answered: bool, stopped_by: str
) -> tuple[Action, str]:
    if not answered:
        return Action.NOTE_UNREACHABLE, f"{record.engine} does not answer"
    if record.state is State.CREATING:
        return Action.FORGET, "the daemon ended while it was created"
    if record.state is State.RESERVED:
        return Action.FORGET, "the daemon ended while it was claimed"
    runs = container is not None and container.state is ContainerState.RUNNING
    if record.slot and not (runs and record.state is State.WARM):
        return Action.FORGET, "a slot that does not run"
    if record.state is State.REMOVING:
        return Action.FORGET, "the daemon ended while it was removed"
    if record.ephemeral:
        return Action.FORGET, "the connection that it belonged to is gone"
    if container is None:
        return Action.NOTE_LOST, f"{record.engine} no longer has its container"
    if container.state is ContainerState.RUNNING:
        return Action.ADOPT, "its container runs"
    if container.state is ContainerState.PAUSED:
        return Action.NOTE_PAUSED, record.state_reason if record.state is State.PAUSED else PAUSED
    if record.state is State.STOPPED:
        return Action.NOTE_STOPPED, record.state_reason
    return Action.NOTE_STOPPED, stopped_by or f"its container is {container.state.value}"
