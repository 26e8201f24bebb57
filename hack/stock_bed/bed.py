"""What each bed can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from stock_bed.roots import USER, Root


class Bed(Protocol):
    """One that is up."""

    root: Root
    boot_s: float

    @property
    def reboots(self) -> Mapping[str, Callable[[], None]]:
        """Ways to have it go down and come up again with what was written to its disk, by what they are called."""

    def argv(self, words: Sequence[str], *, user: str = USER) -> list[str]:
        """How a command is run inside as ``user``."""
