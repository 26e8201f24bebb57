"""How much of a host may be promised, and what a sandbox is told of its CPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.model import Limits
from sandboxd import admission
from sandboxd.admission import Budget, Share, shortage
from sandboxd.config import Capacity
from sandboxd.limits import Host

GIB = 2**30
HOST = Host(cpus_online=(0, 1, 2, 3), memory_bytes=8 * GIB, swap_bytes=0, pid_max=32768, nr_open=2**20)
BUDGET = Budget(memory_bytes=8 * GIB, cpu_millis=None, pids=1000, sandboxes=10)
LIMITS = Limits(memory_bytes_max=GIB, cpu_millis=1500, pids_max=100)


def test_a_budget_is_what_there_is_as_often_as_configured() -> None:
    """Zero is no bound: CPUs are shared by those who are there, memory is not."""
    capacity = Capacity(memory_overcommit=1.5, cpu_overcommit=0, pids_overcommit=2)
    budget = admission.budget_of(HOST, capacity, sandboxes_max=500)
    assert budget == Budget(memory_bytes=12 * GIB, cpu_millis=None, pids=65536, sandboxes=500)
    assert admission.budget_of(HOST, Capacity(cpu_overcommit=2), sandboxes_max=1).cpu_millis == 8000


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (Share(memory_bytes=4 * GIB + 1), "memory"),
        (Share(pids=501), "processes"),
        (Share(sandboxes=6), "sandboxes"),
    ],
)
def test_what_is_short_is_named_with_figures_and_the_setting(asked: Share, named: str) -> None:
    promised = Share(memory_bytes=4 * GIB, cpu_millis=10**6, pids=500, sandboxes=5)
    found = shortage(BUDGET, promised, asked)
    assert found is not None
    assert named in found.detail
    assert "overcommit" in found.hint or "sandboxes_max" in found.hint
    assert not found.for_ever


def test_the_last_bit_of_room_is_given() -> None:
    promised = Share(memory_bytes=4 * GIB, cpu_millis=10**6, pids=500, sandboxes=5)
    assert shortage(BUDGET, promised, Share(memory_bytes=4 * GIB, cpu_millis=10**6, pids=500, sandboxes=5)) is None


def test_whoever_asks_for_more_than_there_is_in_all_need_not_wait() -> None:
    found = shortage(BUDGET, Share(), Share(memory_bytes=9 * GIB))
    assert found is not None
    assert found.for_ever


def test_less_of_something_is_always_to_be_had() -> None:
    """A host that is over its budget, for its configuration was changed, refuses no change for the better."""
    over = Share(memory_bytes=100 * GIB, cpu_millis=0, pids=5000, sandboxes=5)
    grown = admission.growth(LIMITS, Limits(memory_bytes_max=GIB // 2, cpu_millis=1500, pids_max=100))
    assert grown == Share()
    assert shortage(BUDGET, over, grown) is None


def test_only_what_is_added_counts_in_a_change() -> None:
    after = Limits(memory_bytes_max=3 * GIB, cpu_millis=500, pids_max=150)
    assert admission.growth(LIMITS, after) == Share(memory_bytes=2 * GIB, pids=50)


SHARES = st.builds(
    Share,
    memory_bytes=st.integers(0, 10 * GIB),
    cpu_millis=st.integers(0, 10_000),
    pids=st.integers(0, 1200),
    sandboxes=st.integers(0, 3),
)


@given(st.lists(SHARES, max_size=30))
def test_what_is_let_in_one_after_the_other_never_exceeds_the_budget(wanted: list[Share]) -> None:
    promised = Share()
    for share in wanted:
        if shortage(BUDGET, promised, share) is None:
            promised = admission.total((promised, share))
    assert promised.memory_bytes <= 8 * GIB
    assert promised.pids <= 1000
    assert promised.sandboxes <= 10


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        (Limits(cpu_millis=500), 1),
        (Limits(cpu_millis=1000), 1),
        (Limits(cpu_millis=1001), 2),
        (Limits(cpu_millis=64_000), 4),
        (Limits(), 4),
        (Limits(cpu_millis=3000, cpuset_cpus=(1,)), 1),
    ],
)
def test_tools_are_told_of_as_many_cpus_as_they_can_use(limits: Limits, count: int) -> None:
    """Sixty-four compiler threads under a quota of one CPU only stand in each other's way."""
    assert admission.cpu_count(limits, 4) == count
    variables = admission.cpu_environment(limits, 4)
    assert set(variables.values()) == {str(count)}
    assert {"OMP_NUM_THREADS", "GOMAXPROCS"} <= variables.keys()
    assert "MAKEFLAGS" not in variables, "make -j breaks builds that were never run so"


def test_cpus_are_taken_where_the_fewest_others_are() -> None:
    online = (0, 1, 2, 3)
    assert admission.pack(online, [], 2) == (0, 1)
    assert admission.pack(online, [(0, 1)], 2) == (2, 3)
    assert admission.pack(online, [(0, 1), (2, 3), (0,)], 1) == (1,)
    assert admission.pack(online, [], 4) is None, "all of them are no choice"
    assert admission.pack(online, [], 8) is None
    assert admission.pack((), [], 1) is None


@given(st.integers(1, 7), st.lists(st.lists(st.integers(0, 7), max_size=8), max_size=20))
def test_a_choice_of_cpus_is_of_the_right_size_and_none_is_busier_than_one_left_out(
    count: int, taken: list[list[int]]
) -> None:
    online = tuple(range(8))
    chosen = admission.pack(online, taken, count)
    assert chosen is not None
    assert len(set(chosen)) == len(chosen) == count
    assert list(chosen) == sorted(chosen)
    users = [sum(cpu in cpus for cpus in taken) for cpu in online]
    assert max(users[cpu] for cpu in chosen) <= min(users[cpu] for cpu in online if cpu not in chosen)


def test_only_a_whole_number_of_cpus_is_packed_and_only_if_nobody_said_which() -> None:
    assert admission.whole_cpus(Limits(cpu_millis=2000)) == 2
    assert admission.whole_cpus(Limits(cpu_millis=1500)) is None
    assert admission.whole_cpus(Limits(cpu_millis=1000, cpuset_cpus=(3,))) is None
    assert admission.whole_cpus(Limits()) is None
