"""What hack/chaos draws: the same from the same seed, whoever else takes part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "hack"))

from chaos_storm import faults, plan  # noqa: E402
from chaos_storm.ledger import Book, Expected, Held  # noqa: E402

KINDS = list(plan.FAULTS)


def test_a_seed_draws_the_same_again_and_another_does_not() -> None:
    """What was found with a seed can be looked for with it."""

    def drawn(seed: int, turn: int) -> str:
        operations = [step for client in range(4) for step in plan.operations(seed, turn, client, 20)]
        return plan.fingerprint([*plan.faults(seed, turn, KINDS, 5, 80), *operations])

    assert drawn(1, 0) == drawn(1, 0)
    assert len({drawn(seed, turn) for seed in (1, 2) for turn in (0, 1)}) == 4


def test_what_a_client_does_depends_on_no_other() -> None:
    assert plan.operations(1, 0, 2, 5) == plan.operations(1, 0, 2, 9)[:5]
    assert plan.operations(1, 0, 2, 9) != plan.operations(1, 0, 3, 9)


def test_everything_is_drawn_sooner_or_later() -> None:
    operations = {step.kind for turn in range(30) for step in plan.operations(1, turn, 0, 50)}
    faults = [step for turn in range(60) for step in plan.faults(1, turn, KINDS, 5, 80)]
    assert operations == set(plan.OPERATIONS)
    assert {step.kind for step in faults} == set(plan.FAULTS)
    assert all(0 <= step.after < 80 for step in faults)


@pytest.mark.parametrize("count", [0, 3])
def test_faults_come_in_the_order_of_their_moments(count: int) -> None:
    moments = [step.after for step in plan.faults(5, 0, KINDS[:1], count, 10)]
    assert moments == sorted(moments)
    assert len(moments) == count


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run([ROOT / "hack/chaos", "--help"], capture_output=True, text=True, check=True)
    assert "--seed" in done.stdout


def test_what_a_full_disk_may_have_silenced_is_held_against_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was started before may write after it, and find no room: that is no wrong answer."""
    monkeypatch.setattr(faults, "SPAN_S_MAX", 0.0)
    held = Held("sb-a", "c1-1", "podman", "c" * 64, "")
    held.commands["1"] = Expected("text", 0, certain=True)
    certain: list[bool] = []
    ground = SimpleNamespace(fill_disk=lambda: certain.append(held.commands["1"].certain), free_disk=lambda: None)
    storm = faults.Faults(ground, Book(), lambda: [held])  # type: ignore[arg-type]
    storm.carry_out([plan.Fault(0, "disk_full", 1)], over=lambda: True)
    assert certain == [False]
