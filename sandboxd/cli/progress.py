"""How far something is, on one line of a terminal that is taken away in the end."""

from __future__ import annotations

import os
import sys
import time

from sandboxd.cli.tables import size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SHOWN_AFTER_S = 1.0
"""What is done sooner needs no bar."""

BAR_CHARACTERS = 24
COLUMNS_DEFAULT = 80
CLEAR_LINE = "\r\x1b[K"


class Progress:
    """A bar, if anybody watches.

    Args:
        total: How many bytes there will be; None if nobody knows.
        shown: Whether to show anything. Nothing is shown where stderr is no terminal.
    """

    def __init__(self, total: int | None, *, shown: bool) -> None:
        self._total = total
        self._shown = shown and os.isatty(2)
        self._begun = time.monotonic()
        self._drawn = False

    def take(self, params: dict[str, Any]) -> None:
        """What ``$/progress`` says."""
        elapsed_s = time.monotonic() - self._begun
        if not self._shown or elapsed_s < SHOWN_AFTER_S:
            return
        line = line_of(params.get("done") or 0, self._total, params.get("entries"), elapsed_s)
        sys.stderr.write(CLEAR_LINE + line[: _columns() - 1])
        sys.stderr.flush()
        self._drawn = True

    def end(self) -> None:
        """Take the line away. Idempotent."""
        if self._drawn:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()
            self._drawn = False


def line_of(done: int, total: int | None, entries: int | None, elapsed_s: float) -> str:
    """One line: a bar where the end is known, bytes, entries, and how fast it goes."""
    rate = done / elapsed_s
    parts = []
    if total:
        filled = min(BAR_CHARACTERS * done // total, BAR_CHARACTERS)
        parts += [f"[{'#' * filled}{' ' * (BAR_CHARACTERS - filled)}] {min(100 * done // total, 100):3d} %"]
    parts += [f"{size(done)} of {size(total)}" if total else size(done)]
    if entries and entries > 1:
        parts += [f"{entries} entries"]
    parts += [f"{size(int(rate))}/s"]
    if total and rate:
        parts += [f"{max(total - done, 0) / rate:.0f} s left"]
    return "   ".join(parts)


def _columns() -> int:
    try:
        return os.get_terminal_size(2).columns or COLUMNS_DEFAULT
    except OSError:
        return COLUMNS_DEFAULT
