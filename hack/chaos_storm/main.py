"""The command line of hack/chaos, and the course of a run."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_storm import plan
from chaos_storm.clients import Client
from chaos_storm.faults import Faults
from chaos_storm.ground import Ground
from chaos_storm.invariants import Observer, Weight, Wrong
from chaos_storm.ledger import FORBIDDEN, Book
from chaos_storm.review import Reviewer
from chaos_storm.steady import Steady
from tests.engine.daemons import ENGINES

SEED_BITS = 32
SETTLE_S_MAX = 45.0
"""What is under way when a round ends has an end by then: the daemon tries again what failed, with growing pauses."""

SETTLE_LOOK_S = 0.1
CALM_EVERY = 4
"""Every fourth round nothing goes wrong, and so nothing may be refused."""

BAR_CHARS = 30
STEPS = 20
"""How often the bar is drawn where there are no rounds."""

SHOWN_MAX = 5
UNEXPECTED = ("Traceback", " CRITICAL ")
"""What the daemon logs when it did not expect an error itself."""


class Run:
    """One run: rounds of operations and faults, and what came of them."""

    def __init__(self, ground: Ground, options: argparse.Namespace) -> None:
        self.book = Book()
        self.turns = 0
        self.weights: list[Weight] = []
        self.fingerprints: list[str] = []
        self._options = options
        self._ground = ground
        self.clients = [Client(ground, self.book, number) for number in range(options.clients)]
        self._faults = Faults(ground, self.book, lambda: [held for client in self.clients for held in client.held])
        for client in self.clients:
            client.troubled = lambda: self._faults.active
            client.interrupted = lambda engine: engine in self._faults.interrupted
        self._observer = Observer(ground)
        self._reviewer = Reviewer(ground, self.book)
        self._base = self._observer.weigh()
        self._log_read = 0
        self._threads: list[threading.Thread] = []
        self.told: Counter[str] = Counter()
        """How many of what may not happen were printed already, by kind."""

    def turn(self) -> None:
        """One round."""
        options, turn = self._options, self.turns
        drawn = [plan.operations(options.seed, turn, client.number, options.operations) for client in self.clients]
        total = options.clients * options.operations
        calm = turn % CALM_EVERY == CALM_EVERY - 1
        faults = plan.faults(options.seed, turn, options.fault, 0 if calm else options.faults, total)
        self.fingerprints.append(plan.fingerprint([*faults, *(step for steps in drawn for step in steps)]))
        self.book.begin_turn()
        self._faults.active = False
        self._faults.interrupted.clear()
        self._threads = [
            threading.Thread(target=self._guarded, args=(client.run, steps))
            for client, steps in zip(self.clients, drawn, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        self._guarded(self._faults.carry_out, faults, lambda: not any(each.is_alive() for each in self._threads))
        for thread in self._threads:
            thread.join()
        self._faults.end_turn()
        for held in (held for client in self.clients for held in client.held):
            if held.engine in self._faults.interrupted:
                held.interrupt()
        self._observer.seen |= self._faults.seen
        self._observer.note()
        self._settle()
        self.turns += 1

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        """A defect of ours, or of a daemon that does not come back, must end neither the thread nor the run."""
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001
            self.book.happen("daemon_died", f"{type(error).__name__}: {error}"[-2000:])

    def _settle(self) -> None:
        """Wait until nothing is under way; what is wrong even then is counted."""
        self._revive()
        for client in self.clients:
            for held in list(client.held):
                self._guarded(self._reviewer.review, client, held)
        self._guarded(self._reviewer.remove_strangers, self.clients)
        self._await_nothing_wrong(self._observer.wrong)
        self.weights.append(self._observer.weigh())
        for wrong in self._observer.too_heavy(self._base):
            self.book.happen(*wrong)
        self._read_log()

    def _revive(self) -> None:
        if not self._ground.daemon.alive:
            self.book.happen("daemon_died", "it does not run")
            self._guarded(self._ground.daemon.start)

    def _await_nothing_wrong(self, look: Callable[[], list[Wrong]]) -> None:
        deadline_s = time.monotonic() + SETTLE_S_MAX
        while (wrong := look()) and time.monotonic() < deadline_s:
            time.sleep(SETTLE_LOOK_S)
        for each in wrong:
            self.book.happen(*each)

    def _read_log(self) -> None:
        with open(self._ground.daemon.log, "rb") as log:
            log.seek(self._log_read)
            text = log.read().decode(errors="replace")
            self._log_read = log.tell()
        for line in text.splitlines():
            if any(word in line for word in UNEXPECTED):
                self.book.happen("internal_error", f"in the log: {line}")

    def steady(self, operations: int, plot: str | None) -> dict[str, object]:
        """Many claims and commands with nothing wrong; what is kept of them."""
        steady = Steady(self._ground, self.book, self.clients, operations)
        self._threads = steady.threads
        drawn = -1

        def draw(share: float) -> None:
            nonlocal drawn
            if int(share * STEPS) > drawn:
                drawn = int(share * STEPS)
                _draw(share, self)

        steady.run(draw)
        if plot is not None:
            steady.draw_plot(plot)
        return steady.figures()

    def end(self) -> None:
        """Remove everything; nothing may be left."""
        self.book.over.set()
        for thread in self._threads:
            thread.join()
        self._faults.end_turn()
        self._revive()
        self._guarded(self._reviewer.remove_everything)
        self._await_nothing_wrong(lambda: [*self._observer.wrong(), *self._observer.left()])
        self.weights.append(self._observer.weigh())
        for wrong in self._observer.too_heavy(self._base):
            self.book.happen(*wrong)
        self._read_log()

    def figures(self) -> dict[str, object]:
        heaviest = max(self.weights, key=lambda weight: weight.rss_bytes)
        return {
            "seed": self._options.seed,
            "engines": list(self._ground.engines),
            "rounds": self.turns,
            "sequence": plan.fingerprint([plan.Operation(each, 0) for each in self.fingerprints]),
            "operations": dict(sorted(self.book.operations.items())),
            "refusals": dict(sorted(self.book.refusals.items())),
            "faults": dict(sorted(self.book.faults.items())),
            "forbidden": {kind: len(self.book.happened[kind]) for kind in FORBIDDEN},
            "examples": {kind: found[:SHOWN_MAX] for kind, found in self.book.happened.items() if found},
            "rss_bytes": {"new": self._base.rss_bytes, "most": heaviest.rss_bytes, "end": self.weights[-1].rss_bytes},
            "descriptors": {
                "new": self._base.descriptors,
                "most": max(weight.descriptors for weight in self.weights),
                "end": self.weights[-1].descriptors,
            },
            "sandboxes_most": max(weight.sandboxes for weight in self.weights),
        }


def main(document: str, arguments: Sequence[str]) -> int:
    """The exit status: 0 where nothing happened that may not."""
    options = _parse(document, arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.geteuid() != 0:
        print("chaos: it mounts, and kills what others started: run it as root", file=sys.stderr)
        return 1
    engines = ENGINES if options.engine == "both" else (options.engine,)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as directory:
        ground = Ground(Path(directory), engines)
        with ground.standing():
            run = Run(ground, options)
            began_s = time.monotonic()
            kept: dict[str, object] = {}
            try:
                if options.steady is not None:
                    kept = {"steady": run.steady(options.steady, options.plot)}
                while options.steady is None and (share := _share(run, options, began_s)) < 1:
                    _draw(share, run)
                    run.turn()
                _draw(1.0, run)
            finally:
                # Also where it was interrupted: containers would outlive it.
                run.end()
        figures = {**run.figures(), **kept, "seconds": round(time.monotonic() - began_s)}
        if not run.book.clean and options.log is not None:
            Path(options.log).write_bytes(ground.daemon.log.read_bytes())
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)
    return 0 if run.book.clean else 1


def _parse(document: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hack/chaos", description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10.0, help="begin no round after so many (10)")
    length.add_argument("--rounds", type=int, help="so many, however long they take")
    length.add_argument("--steady", type=int, metavar="N", help="so many claims and commands with nothing wrong")
    parser.add_argument("--plot", metavar="FILE", help="with --steady: draw what the daemon took, as SVG")
    parser.add_argument("--seed", type=int, help="a number; without it one is drawn and printed")
    parser.add_argument("--engine", choices=["podman", "docker", "both"], default="both")
    parser.add_argument("--clients", type=int, default=6, help="at once (6)")
    parser.add_argument("--operations", type=int, default=12, help="per client and round (12)")
    parser.add_argument("--faults", type=int, default=3, help="per round (3); every fourth round has none")
    parser.add_argument("--fault", action="append", choices=list(plan.FAULTS), help="only this kind; may be repeated")
    parser.add_argument("--log", metavar="FILE", help="keep the daemon's log there if something forbidden happened")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = random.SystemRandom().getrandbits(SEED_BITS)
    options.fault = options.fault or list(plan.FAULTS)
    return options


def _share(run: Run, options: argparse.Namespace, began_s: float) -> float:
    if options.rounds is not None:
        return run.turns / options.rounds if options.rounds else 1.0
    return (time.monotonic() - began_s) / (options.minutes * 60) if options.minutes else 1.0


def _draw(share: float, run: Run) -> None:
    """The progress bar: one that moves on a terminal, one line per round elsewhere."""
    filled = round(min(share, 1.0) * BAR_CHARS)
    book = run.book
    forbidden = sum(len(found) for found in book.happened.values())
    line = (
        f"[{'#' * filled:.<{BAR_CHARS}}] round {run.turns}, {book.operations.total()} operations, "
        f"{book.faults.total()} faults, {forbidden} forbidden"
    )
    tty = sys.stderr.isatty()
    start = "\r\x1b[K" if tty else ""
    for kind, found in book.happened.items():
        for what in found[run.told[kind] :]:
            print(f"{start}{kind}: {what}", file=sys.stderr)
        run.told[kind] = len(found)
    print(f"{start}{line}", end="" if tty and share < 1 else "\n", file=sys.stderr, flush=True)


def _print(figures: dict[str, object]) -> None:
    rows = {key: value for key, value in figures.items() if key not in {"forbidden", "examples"}}
    for key, value in rows.items():
        if isinstance(value, dict):
            print(f"{key}: {sum(value.values()) if key in {'operations', 'refusals', 'faults'} else ''}".rstrip())
            for name, count in value.items():
                shown = f"{count / 2**20:.1f} MiB" if key.endswith("_bytes") else str(count)
                print(f"    {name:<24} {shown:>10}")
        else:
            print(f"{key}: {' '.join(value) if isinstance(value, list) else value}")
    print("may not happen:")
    forbidden, examples = figures["forbidden"], figures["examples"]
    for kind, count in forbidden.items():  # type: ignore[attr-defined]
        print(f"    {kind:<24} {count:>10}   {FORBIDDEN[kind]}")
        for example in examples.get(kind, ()):  # type: ignore[attr-defined]
            print(f"        {example}")
