"""What is done and what goes wrong, in which order: all of it drawn from the seed, and from nothing else.

Each client has a generator of its own per round, so that what one of them does depends on no other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NUMBER_BITS = 32

OPERATIONS = {
    "create": 12,
    "exec": 26,
    "start": 14,
    "collect": 14,
    "shell": 5,
    "write": 8,
    "list": 3,
    "copy": 4,
    "update": 6,
    "pause": 4,
    "restart": 2,
    "remove": 7,
    "expire": 2,
    "forward": 4,
    "events": 4,
    "verify": 2,
    "metrics": 2,
    "diff": 3,
}
"""Kind and weight. A client that has no sandbox makes one instead, whatever was drawn."""

FAULTS = {
    "daemon_killed": 5,
    "daemon_restarted": 2,
    "init_killed": 4,
    "client_killed": 4,
    "container_removed": 4,
    "engine_restarted": 4,
    "engine_refuses": 3,
    "engine_hangs": 3,
    "killed_while_hanging": 2,
    "disk_full": 3,
    "descriptors_exhausted": 3,
    "slow_clients": 3,
    "malicious_clients": 5,
}
"""Kind and weight."""


class Operation(NamedTuple):
    """One thing that a client does."""

    kind: str
    number: int
    """What else has to be drawn for it comes from here."""


class Fault(NamedTuple):
    """One thing that goes wrong."""

    after: int
    """How many operations of the round, of all clients together, are done when it comes."""
    kind: str
    number: int


def operations(seed: int, turn: int, client: int, count: int) -> list[Operation]:
    """What one client does in one round."""
    chance = random.Random(f"{seed}/{turn}/client/{client}")
    kinds, weights = list(OPERATIONS), list(OPERATIONS.values())
    return [Operation(chance.choices(kinds, weights)[0], chance.getrandbits(NUMBER_BITS)) for _ in range(count)]


def faults(seed: int, turn: int, kinds: Sequence[str], count: int, operations_count: int) -> list[Fault]:
    """What goes wrong in one round, in order.

    Args:
        seed: The run's.
        turn: Which round.
        kinds: What may go wrong.
        count: How often.
        operations_count: Of the round, of all clients together.
    """
    chance = random.Random(f"{seed}/{turn}/faults")
    drawn = chance.choices(kinds, [FAULTS[kind] for kind in kinds], k=count) if kinds else []
    moments = sorted(chance.randrange(max(operations_count, 1)) for _ in drawn)
    return [Fault(after, kind, chance.getrandbits(NUMBER_BITS)) for after, kind in zip(moments, drawn, strict=True)]


def fingerprint(steps: Iterable[Operation | Fault]) -> str:
    """A few digits that are the same for the same steps in the same order."""
    digest = hashlib.sha256()
    for step in steps:
        digest.update(repr(tuple(step)).encode())
    return digest.hexdigest()[:12]
