"""What must be true whenever nothing is under way, seen from outside: by the engines', the kernel's, SQLite's word.

None of it is taken from the daemon, but for what it wrote down.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from chaos_storm.faults import calls_of_engines
from chaos_storm.ground import Ground
from runtimes.argv import owner_label_argument

CGROUPS = "/sys/fs/cgroup"
CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
RUNNING = ("running", "paused", "warm")

DESCRIPTORS_PER_SANDBOX = 32
"""About twenty, most of them for its counters, and those of its commands and forwards."""
DESCRIPTORS_MARGIN = 16
MEMORY_BASE_BYTES = 48 * 1024 * 1024
"""What allocators keep after a storm. Sandboxes and their commands come on top."""
MEMORY_PER_SANDBOX_BYTES = 1024 * 1024


class Wrong(NamedTuple):
    """Something that must not be."""

    kind: str
    what: str


class Weight(NamedTuple):
    """What the daemon takes."""

    rss_bytes: int
    descriptors: int
    sandboxes: int


class Observer:
    """Looks at a daemon's world."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._owner = ground.daemon.owner
        self.seen: set[str] = set()
        """Containers that ever were."""

    def note(self) -> None:
        """Remember which containers there are."""
        self.seen.update(record["container_id"] for record in self._ground.daemon.journal() if record["container_id"])

    def weigh(self) -> Weight:
        process = psutil.Process(self._ground.daemon.pid)
        return Weight(process.memory_info().rss, process.num_fds(), len(self._ground.daemon.journal()))

    def too_heavy(self, base: Weight) -> list[Wrong]:
        """What the daemon has kept, against what it took when it was new and had nothing."""
        now = self.weigh()
        wrong = []
        sandboxes = max(now.sandboxes - base.sandboxes, 0)
        if now.descriptors > base.descriptors + DESCRIPTORS_MARGIN + DESCRIPTORS_PER_SANDBOX * sandboxes:
            wrong.append(Wrong("descriptors_grown", f"{now.descriptors}, with {now.sandboxes} sandboxes"))
        if now.rss_bytes > base.rss_bytes + MEMORY_BASE_BYTES + MEMORY_PER_SANDBOX_BYTES * sandboxes:
            wrong.append(Wrong("memory_grown", f"{now.rss_bytes / 2**20:.0f} MiB, {now.sandboxes} sandboxes"))
        return wrong

    def wrong(self) -> list[Wrong]:
        """All that is not as it must be now; some of it may be only not yet."""
        return list(self._look())

    def _look(self) -> Iterator[Wrong]:
        daemon = self._ground.daemon
        records = daemon.journal()
        self.note()
        ids = {record["id"] for record in records}
        recorded = Counter(record["container_id"] for record in records if record["container_id"])
        yield from (Wrong("double_owner", f"container {key}") for key, count in recorded.items() if count > 1)

        there = {engine: set(daemon.containers(engine)) for engine in self._ground.engines}
        everywhere = set().union(*there.values())
        self.seen.update(everywhere)
        yield from (Wrong("orphan", f"container {key}") for key in everywhere - set(recorded))
        for record in records:
            if record["state"] in RUNNING and record["container_id"] not in there[record["engine"]]:
                yield Wrong("ghost", f"{record['id']} is {record['state']} on {record['engine']}")
        yield from (Wrong("mount_left", path) for path in self._ground.mounts())
        yield from (Wrong("directory_left", path) for path in self._directories(ids))
        gone = self.seen - everywhere
        yield from (Wrong("cgroup_left", path) for path in _groups_of(gone))
        yield from (Wrong("process_left", what) for what in _processes_of(gone))
        clients = calls_of_engines(owner_label_argument(self._owner))
        yield from (Wrong("process_left", f"client of an engine, {pid}") for pid in clients)
        if (verdict := self._journal_verdict()) != "ok":
            yield Wrong("journal_damaged", verdict)

    def left(self) -> list[Wrong]:
        """What there is although everything was removed."""
        return [Wrong("orphan", f"{record['id']} is still recorded") for record in self._ground.daemon.journal()]

    def _directories(self, ids: set[str]) -> list[str]:
        daemon = self._ground.daemon
        left = []
        for parent in (daemon.boxes, daemon.state / "layers", daemon.state / "spools"):
            with contextlib.suppress(FileNotFoundError):
                left += [str(parent / name) for name in os.listdir(parent) if name not in ids]
        return left

    def _journal_verdict(self) -> str:
        path = self._ground.daemon.state / "journal.sqlite3"
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=10)) as database:
                return str(database.execute("PRAGMA integrity_check").fetchone()[0])
        except sqlite3.Error as error:
            return str(error)


def _groups_of(containers: set[str]) -> list[str]:
    """Control groups that are named for one of these."""
    return [
        os.path.join(parent, name)
        for parent, names, _ in os.walk(CGROUPS)
        for name in names
        if (found := CONTAINER_ID.search(name)) and found.group() in containers
    ]


def _processes_of(containers: set[str]) -> list[str]:
    """Processes in a control group of one of these, or started for one: monitors and shims."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            text = _read(f"/proc/{name}/cgroup") + _read(f"/proc/{name}/cmdline")
            if containers.intersection(CONTAINER_ID.findall(text)):
                found.append(f"{name}: {_read(f'/proc/{name}/cmdline')[:120]}")
    return found


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().replace("\0", " ")
