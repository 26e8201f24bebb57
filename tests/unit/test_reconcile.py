"""What a start decides about each record and each container."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtimes.model import ContainerState
from sandboxd.lifecycle import State
from sandboxd.reconcile import WENT_DOWN, Action, decide
from tests.unit.records import CONTAINER_ID, container, record


def _actions(records: list, listed: dict) -> dict[str, Action]:  # type: ignore[type-arg]
    return {decision.sandbox_id: decision.action for decision in decide(records, listed, reachable=set(listed))}


def test_a_running_container_with_a_record_is_adopted() -> None:
    """Sandboxes outlive the daemon."""
    assert _actions([record()], {"podman": [container()]}) == {"sb-aaaaaaaaaa": Action.ADOPT}


def test_a_container_that_no_record_knows_is_removed() -> None:
    """Nothing labelled may be left that nobody owns."""
    assert _actions([], {"docker": [container()]}) == {"sb-aaaaaaaaaa": Action.REMOVE_CONTAINER}


def test_a_create_that_was_cut_short_is_forgotten_with_or_without_its_container() -> None:
    """Its caller is gone and never learnt its id."""
    cut_short = record(state=State.CREATING, container_id=None)
    assert _actions([cut_short], {"podman": [container()]}) == {cut_short.id: Action.FORGET}
    assert _actions([cut_short], {"podman": []}) == {cut_short.id: Action.FORGET}


def test_an_ephemeral_sandbox_does_not_survive_its_connection() -> None:
    """``run --rm`` leaves nothing, also when the daemon is killed."""
    assert _actions([record(ephemeral=True)], {"podman": [container()]}) == {"sb-aaaaaaaaaa": Action.FORGET}


def test_a_record_whose_engine_is_silent_is_kept() -> None:
    """An engine that is down for a moment must not cost a sandbox."""
    decisions = decide([record()], {}, reachable=set())
    assert [decision.action for decision in decisions] == [Action.NOTE_UNREACHABLE]


def test_a_paused_container_is_paused_whoever_did_it() -> None:
    """By us, before a restart, or by somebody behind our back: it is to be resumed, and one of them says why."""
    paused = container(state=ContainerState.PAUSED)
    ours = record(state=State.PAUSED, state_reason="its time was up")
    for box, reason in ((record(), "not by sandboxd"), (ours, "its time was up")):
        (decision,) = decide([box], {"podman": [paused]}, reachable={"podman"})
        assert decision.action is Action.NOTE_PAUSED
        assert reason in decision.reason


def test_a_paused_sandbox_whose_container_runs_is_adopted() -> None:
    """Somebody unpaused it behind our back."""
    assert _actions([record(state=State.PAUSED)], {"podman": [container()]}) == {"sb-aaaaaaaaaa": Action.ADOPT}


def test_a_sandbox_that_was_stopped_is_not_said_to_have_ended_by_itself() -> None:
    """Whoever stopped it knows; of one that ran there is something to tell."""
    ended = container(state=ContainerState.EXITED)
    for box, reason in ((record(state=State.STOPPED), ""), (record(), "its container is exited")):
        (decision,) = decide([box], {"podman": [ended]}, reachable={"podman"})
        assert (decision.action, decision.reason) == (Action.NOTE_STOPPED, reason)


def test_a_host_that_went_down_is_what_stopped_what_ran() -> None:
    """How its container ended tells nobody anything; of one that had been stopped nothing new is to be told."""
    ended = container(state=ContainerState.EXITED)
    for box, reason in ((record(state=State.STOPPED), ""), (record(), WENT_DOWN)):
        (decision,) = decide([box], {"podman": [ended]}, reachable={"podman"}, went_down=True)
        assert (decision.action, decision.reason) == (Action.NOTE_STOPPED, reason)
    (decision,) = decide([record()], {"podman": [container()]}, reachable={"podman"}, went_down=True)
    assert decision.action is Action.ADOPT, "an engine's daemon may have started it"


def test_a_vanished_container_is_said_to_be_lost() -> None:
    """Somebody removed it behind our back: the user is told, not left guessing."""
    assert _actions([record()], {"podman": []}) == {"sb-aaaaaaaaaa": Action.NOTE_LOST}


def test_a_second_container_with_the_same_label_is_removed() -> None:
    """A record owns one container; a copy with its label is nobody's."""
    copy = container(container_id="d" * 64)
    decisions = decide([record()], {"podman": [container(), copy]}, reachable={"podman"})
    removed = [decision.container for decision in decisions if decision.action is Action.REMOVE_CONTAINER]
    assert removed == [copy]


def test_a_container_that_somebody_made_of_a_committed_sandbox_is_left_alone() -> None:
    """It has our labels, which images pass on, and another name; and it never stands in for the real one."""
    copy = container(container_id="d" * 64, named_by_us=False, state=ContainerState.CREATED)
    assert decide([], {"podman": [copy]}, reachable={"podman"}) == []
    (decision,) = decide([record()], {"podman": [container(), copy]}, reachable={"podman"})
    assert (decision.action, decision.container) == (Action.ADOPT, container())
    cut_short = record(state=State.CREATING, container_id=None)
    (decision,) = decide([cut_short], {"podman": [copy]}, reachable={"podman"})
    assert (decision.action, decision.container) == (Action.FORGET, None)


def test_the_same_id_at_another_engine_is_not_the_same_sandbox() -> None:
    """Identity is engine and label together."""
    decisions = decide([record()], {"podman": [container()], "docker": [container()]}, reachable={"podman", "docker"})
    assert sorted((decision.engine, decision.action) for decision in decisions) == [
        ("docker", Action.REMOVE_CONTAINER),
        ("podman", Action.ADOPT),
    ]


@given(
    st.lists(
        st.builds(
            lambda number, state, known, ephemeral: record(
                id=f"sb-{number}", state=state, container_id=CONTAINER_ID if known else None, ephemeral=ephemeral
            ),
            st.integers(0, 5),
            st.sampled_from(State),
            st.booleans(),
            st.booleans(),
        ),
        unique_by=lambda each: each.id,
    ),
    st.lists(
        st.builds(
            lambda number, state, own: container(
                f"sb-{number}", state=state, container_id=CONTAINER_ID if own else "e" * 64
            ),
            st.integers(0, 8),
            st.sampled_from(ContainerState),
            st.booleans(),
        )
    ),
)
def test_no_container_is_left_without_an_owner(records: list, containers: list) -> None:  # type: ignore[type-arg]
    """Whatever a crash left: each container is its record's, or is removed; each record gets one decision."""
    decisions = decide(records, {"podman": containers}, reachable={"podman"})
    kept = {decision.sandbox_id for decision in decisions if decision.action is not Action.REMOVE_CONTAINER}
    assert kept == {each.id for each in records}
    removed = [decision.container for decision in decisions if decision.action is Action.REMOVE_CONTAINER]
    owned = [decision.container for decision in decisions if decision.action is not Action.REMOVE_CONTAINER]
    for each in containers:
        assert (each in removed) != (each in owned)


def test_a_warm_slot_that_runs_is_adopted_and_any_other_is_forgotten() -> None:
    """It is nobody's: nothing is lost with it, and nobody would ever start it again."""
    warm = record(state=State.WARM, slot=True)
    assert _actions([warm], {"podman": [container()]}) == {warm.id: Action.ADOPT}
    for state in (ContainerState.EXITED, ContainerState.PAUSED, ContainerState.CREATED):
        assert _actions([warm], {"podman": [container(state=state)]}) == {warm.id: Action.FORGET}
    assert _actions([warm], {"podman": []}) == {warm.id: Action.FORGET}
    for slot_state in (State.STOPPED, State.BROKEN, State.LOST):
        slot = record(state=slot_state, slot=True)
        assert _actions([slot], {"podman": [container()]}) == {slot.id: Action.FORGET}


def test_a_slot_that_was_half_claimed_is_forgotten_whatever_its_container_does() -> None:
    """Its caller never learnt its id, and it may have the project already."""
    reserved = record(state=State.RESERVED, launch="warm")
    assert _actions([reserved], {"podman": [container()]}) == {reserved.id: Action.FORGET}
    assert _actions([reserved], {"podman": []}) == {reserved.id: Action.FORGET}
