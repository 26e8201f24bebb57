"""A day's worth of claims and commands in fast motion, and what the daemon keeps of them: nothing, or it grows."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from chaos_storm import plot
from chaos_storm.clients import ANSWER_S_MAX, Client
from chaos_storm.ground import Ground
from chaos_storm.ledger import Book, Held
from sandboxd.client import RpcError

SAMPLE_S = 0.5
COMMANDS_PER_CLAIM = 40
BLOCK_BYTES = 512
MEBIBYTE = 2**20

GROWTH_MAX = {"memory_grown": 6 * MEBIBYTE, "descriptors_grown": 24, "disk_grown": 4 * MEBIBYTE}
"""From the second quarter to the last one, in the median: a leak of a hundred bytes per command would be seen."""


class Sample(NamedTuple):
    """What the daemon took at one moment."""

    operations: int
    rss_bytes: int
    descriptors: int
    disk_bytes: int
    """All of its state."""
    audit_bytes: int
    """What of it is the audit log, which grows by design, until it is rotated."""


class Steady:
    """Clients that claim, run commands and remove, until so much is done."""

    def __init__(self, ground: Ground, book: Book, clients: Sequence[Client], operations: int) -> None:
        self.samples: list[Sample] = []
        self._ground = ground
        self._book = book
        self._wanted = operations
        self.threads = [threading.Thread(target=self._work, args=(client,)) for client in clients]

    def run(self, draw: Callable[[float], None]) -> None:
        """Do it all, and look at the daemon meanwhile."""
        for thread in self.threads:
            thread.start()
        while any(thread.is_alive() for thread in self.threads):
            self.samples.append(self._sample())
            draw(self._done() / self._wanted)
            time.sleep(SAMPLE_S)
        for kind, most in GROWTH_MAX.items():
            early, late = self._medians(kind)
            if late > early + most:
                self._book.happen(kind, f"from {early:.0f} to {late:.0f}")

    def _done(self) -> int:
        return self._book.operations.total()

    def _work(self, client: Client) -> None:
        engines = itertools.cycle(self._ground.engines)
        while self._done() < self._wanted and not self._book.over.is_set():
            try:
                self._cycle(client, next(engines))
            except RpcError as error:
                self._book.happen("refused_without_cause", f"client {client.number}: {error.type}: {error}")

    def _cycle(self, client: Client, engine: str) -> None:
        params = {"template": engine, "launch": "wait", "wait": ANSWER_S_MAX, "env": {"CALLER": str(client.number)}}
        box = client.call("sandbox/create", workspace={"path": str(client.project)}, **params)
        self._book.did(f"claim_{box['launch']}")
        held = Held(box["id"], str(client.number), engine, box["container_id"], "bind")
        for number in range(COMMANDS_PER_CLAIM):
            self._command(client, held, number)
        client.call("sandbox/kill", sandbox=held.id)
        self._book.did("remove")

    def _command(self, client: Client, held: Held, number: int) -> None:
        match number % 4:
            case 0:
                ref = {"sandbox": held.id}
                started = client.call("commands/start", **ref, argv=["echo", held.token], stdio="spool")
                end = client.call("commands/wait", **ref, command_id=started["command_id"])
                right = end["stdout_bytes"] == len(held.token) + 1
                self._book.did("background")
            case 1:
                end = client.call("commands/run", sandbox=held.id, argv=["echo", "kept"], stdio="spool")
                right = end["stdout_bytes"] == len("kept\n")
                self._book.did("spooled")
            case _:
                end, said = client.command(held, "sh", "-c", "echo $CALLER")
                right = said.strip() == held.token.encode()
                self._book.did("foreground")
        if not right:
            self._book.happen("wrong_answer", f"{held}: {end}")

    def _sample(self) -> Sample:
        process, state = psutil.Process(self._ground.daemon.pid), self._ground.daemon.state
        return Sample(
            operations=self._done(),
            rss_bytes=process.memory_info().rss,
            descriptors=process.num_fds(),
            disk_bytes=disk_bytes(state),
            audit_bytes=disk_bytes(state / "audit"),
        )

    def _medians(self, kind: str) -> tuple[float, float]:
        """Of the second quarter of all operations, and of the last."""
        quarters: list[list[float]] = [[], [], [], []]
        for sample in self.samples:
            taken = {
                "memory_grown": sample.rss_bytes,
                "descriptors_grown": sample.descriptors,
                "disk_grown": sample.disk_bytes - sample.audit_bytes,
            }
            quarters[min(sample.operations * 4 // self._wanted, 3)].append(taken[kind])
        return statistics.median(quarters[1] or [0]), statistics.median(quarters[3] or [0])

    def figures(self) -> dict[str, object]:
        medians = {kind: self._medians(kind) for kind in GROWTH_MAX}
        return {
            "rss_mib": [round(value / MEBIBYTE, 1) for value in medians["memory_grown"]],
            "descriptors": list(medians["descriptors_grown"]),
            "disk_mib_without_audit": [round(value / MEBIBYTE, 2) for value in medians["disk_grown"]],
        }

    def draw_plot(self, path: str) -> None:
        figure = plot.svg(
            "The daemon under claims and commands",
            "claims, commands and removals",
            [sample.operations for sample in self.samples],
            [
                plot.Panel("resident memory, MiB", [sample.rss_bytes / MEBIBYTE for sample in self.samples]),
                plot.Panel("descriptors", [sample.descriptors for sample in self.samples]),
                plot.Panel("state on disk, MiB", [sample.disk_bytes / MEBIBYTE for sample in self.samples]),
            ],
        )
        Path(path).write_text(figure, encoding="utf-8")


def disk_bytes(directory: Path) -> int:
    """What a directory takes on disk. What goes meanwhile counts as gone."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * BLOCK_BYTES
            except FileNotFoundError:
                continue
    return total
