"""What the clients were told, and what they may rely on therefore; and how often what happened."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field

HISTORY_MAX = 8

FORBIDDEN = {
    "double_owner": "sandboxes that two callers were given, or containers in two records",
    "sandbox_lost": "sandboxes that were promised, and are not there",
    "sandbox_undead": "sandboxes that were removed, and are still there",
    "command_lost": "background commands of which nothing is known any more",
    "command_touched": "commands that ended although nobody ended them",
    "wrong_answer": "answers that are not true",
    "internal_error": "errors that the daemon did not expect itself",
    "unanswered": "requests without an answer in time",
    "refused_without_cause": "refusals although nothing was wrong",
    "orphan": "containers that nobody owns",
    "ghost": "records of running sandboxes without a container",
    "mount_left": "mounts on the host",
    "directory_left": "directories of sandboxes that are gone",
    "cgroup_left": "control groups of containers that are gone",
    "process_left": "processes of containers that are gone, and clients of the engines",
    "journal_damaged": "journals that SQLite does not like",
    "memory_grown": "daemons that kept memory",
    "descriptors_grown": "daemons that kept descriptors",
    "disk_grown": "daemons that left files",
    "daemon_died": "daemons that ended by themselves",
}
"""What may not happen, whatever goes wrong around it."""


@dataclass
class Expected:
    """A background command, and how it ends if nobody touches it."""

    text: str
    exit_code: int
    certain: bool
    """Nothing was wrong since it was started that could have changed it."""


@dataclass(eq=False)
class Held:
    """A sandbox that a client was promised."""

    id: str
    token: str
    engine: str
    container_id: str
    mode: str
    witness: str | None = None
    """The command that runs all the time."""
    commands: dict[str, Expected] = field(default_factory=dict)
    shaken: bool = False
    """Its init or its container was taken from it: what ran is gone, and it may be, too."""
    interrupted: bool = False
    """Its engine was stopped: what ran is gone, and it is there."""
    unclear: bool = False
    """An answer was lost: it may be paused, or stopped, or as it was."""
    history: deque[str] = field(default_factory=lambda: deque(maxlen=HISTORY_MAX))
    """What was done with it lately."""

    def interrupt(self) -> None:
        """Its engine was stopped."""
        self.interrupted = True
        self.witness = None
        self.doubt()

    def doubt(self) -> None:
        """What its commands were to end with, and to write, is not certain any more."""
        for expected in list(self.commands.values()):
            expected.certain = False

    def __str__(self) -> str:
        return f"{self.id} on {self.engine} {self.mode} (lately: {', '.join(self.history)})"


class Book:
    """Figures, and what went wrong. For many threads."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.happened: dict[str, list[str]] = {kind: [] for kind in FORBIDDEN}
        self.over = threading.Event()
        """Nobody is to begin anything more."""
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        self._done = 0

    def did(self, kind: str) -> None:
        with self._moved:
            self.operations[kind] += 1
            self._done += 1
            self._moved.notify_all()

    def refused(self, kind: str) -> None:
        with self._lock:
            self.refusals[kind] += 1

    def broke(self, kind: str) -> None:
        with self._lock:
            self.faults[kind] += 1

    def happen(self, kind: str, what: str) -> None:
        """Something that may not."""
        with self._lock:
            self.happened[kind].append(what)

    def begin_turn(self) -> None:
        with self._lock:
            self._done = 0

    @property
    def done(self) -> int:
        """Operations of this round."""
        return self._done

    def wait_done(self, count: int, timeout_s: float) -> bool:
        """Wait until so many operations of the round are done."""
        with self._moved:
            return self._moved.wait_for(lambda: self._done >= count, timeout_s)

    @property
    def clean(self) -> bool:
        return not any(self.happened.values())
