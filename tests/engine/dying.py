"""A daemon that kills itself at a chosen step: run as ``python -m tests.engine.dying`` in the place of sandboxd.

A step is one statement of the journal, or one call of an engine. They are counted while the file that ``DYING_ARMED``
names is there, from 0 whenever it is another one; it says ``before N`` or ``after N``. The daemon itself knows
nothing of all this.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from runtimes import cli_engine
from runtimes.process import Finished
from sandboxd import daemon, recovery
from sandboxd.journal_file import JournalFile

_execute = JournalFile.execute
_run = cli_engine.run
_counts: dict[tuple[int, int], int] = {}
"""By inode and time of the file."""


@contextmanager
def _step() -> Iterator[None]:
    number = None
    for moment in ("before", "after"):
        with suppress(FileNotFoundError), open(os.environ["DYING_ARMED"], encoding="utf-8") as file:
            if moment == "before":
                status = os.fstat(file.fileno())
                which = (status.st_ino, status.st_mtime_ns)
                number = _counts.get(which, 0)
                _counts[which] = number + 1
            # Read again after the step: by then nobody may wish for it any more.
            if file.read() == f"{moment} {number}":
                os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before":
            yield


def _mortal_execute(self: JournalFile, statement: str, values: tuple[object, ...]) -> None:
    with _step():
        _execute(self, statement, values)


async def _mortal_run(*args: Any, **settings: Any) -> Finished:
    with _step():
        return await _run(*args, **settings)


if __name__ == "__main__":
    JournalFile.execute = _mortal_execute  # type: ignore[method-assign]
    cli_engine.run = _mortal_run
    # What goes on by itself is not what is counted.
    recovery.SWEEP_AFTER_START_S = ()
    raise SystemExit(daemon.main())
