"""What the daemon tells a monitoring system of itself: counted as it happens, or looked at when somebody asks."""

from __future__ import annotations

import os
import resource
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

import msgspec
import psutil

from runtimes.model import CPU_MILLIS_PER_CPU
from sandboxd import __version__
from sandboxd.audit.auditor import AuditState
from sandboxd.capacity import Capacity
from sandboxd.events import EventLog
from sandboxd.manager import Manager
from sandboxd.openmetrics import QUICK_S, SLOW_S, Counter, Histogram, Labels, counted, described, exposition, measured
from sandboxd.peers import Peer
from sandboxd.pool import Pools
from sandboxd.protocol import METHOD_BY_NAME, CommandEnd, CommandStarted, Params, SandboxInfo
from sandboxd.recipe import Recipe

MISS_REASONS = frozenset({"empty", "image", "network", "nofile", "shm", "tmp", "mounts", "workspace"})
"""Why no slot did for a request, as far as that is one word. Others are ``several`` or ``failed``."""

_PROCESS = psutil.Process()


class Measures:
    """Counts what happens. Whoever makes it happen calls the methods, on the loop."""

    def __init__(self) -> None:
        self._requests = Counter(
            "sandboxd_requests", "Requests that have ended, by what came of them.", ("method", "result")
        )
        self._claims = Histogram(
            "sandboxd_claim_seconds", "How long it took to make a warm slot a sandbox.", QUICK_S, ("engine",)
        )
        self._creates = Histogram(
            "sandboxd_create_seconds", "How long it took to make a sandbox without a slot.", SLOW_S, ("engine",)
        )
        self._hits = Counter("sandboxd_pool_hits", "Sandboxes that were a warm slot.", ("template", "engine"))
        self._misses = Counter(
            "sandboxd_pool_misses",
            "Sandboxes that could have been a slot, and why they were none.",
            ("template", "engine", "reason"),
        )
        self._ready = Histogram(
            "sandboxd_pool_ready_seconds", "How long it took until a slot was warm.", SLOW_S, ("template", "engine")
        )
        self._execs = Histogram("sandboxd_exec_seconds", "From a request to the start of its command.", QUICK_S)
        self._commands = Counter("sandboxd_commands", "Commands that have ended, by verdict.", ("verdict",))
        self._oom_kills = Counter("sandboxd_oom_kills", "Processes that were killed for memory while a command ran.")
        self._events = Counter("sandboxd_events", "Events that were told.", ("kind",))
        self._engine_calls = Histogram(
            "sandboxd_engine_call_seconds", "How long an engine's client ran.", SLOW_S, ("engine", "verb")
        )
        self._engine_failures = Counter(
            "sandboxd_engine_call_failures", "Calls of an engine's client that did not succeed.", ("engine", "verb")
        )

    @property
    def families(self) -> tuple[Counter | Histogram, ...]:
        """All of them."""
        return (
            *(self._requests, self._claims, self._creates, self._hits, self._misses, self._ready, self._execs),
            *(self._commands, self._oom_kills, self._events, self._engine_calls, self._engine_failures),
        )

    def observe(self, method: str, _: Params, __: Peer) -> Callable[[msgspec.Struct | None, str], None]:
        """Begin to measure a request. What is returned is told of its end."""
        started_s = time.monotonic()

        def ended(reply: msgspec.Struct | None, result: str) -> None:
            self._requests.add(method if method in METHOD_BY_NAME else "other", result)
            match reply:
                case SandboxInfo() if method == "sandbox/create":
                    self._made(reply, time.monotonic() - started_s)
                case CommandEnd() | CommandStarted() if "spawn" in reply.timings_ms:
                    self._execs.observe(reply.timings_ms["spawn"] / 1000)
                case _:
                    pass

        return ended

    def _made(self, made: SandboxInfo, took_s: float) -> None:
        if made.launch == "warm":
            self._claims.observe(took_s, made.engine)
            self._hits.add(made.template, made.engine)
            return
        self._creates.observe(took_s, made.engine)
        if made.miss_reason:
            self._misses.add(made.template, made.engine, miss_word(made.miss_reason))

    def tell(self, kind: str, sandbox: str, name: str | None, data: dict[str, str | int | None]) -> None:
        """Something happened to a sandbox: see ``sandbox.Tell``."""
        self._events.add(kind)
        match kind, data:
            case "command_ended", {"status": str(verdict)}:
                self._commands.add(verdict)
            case "oom", {"oom_kills": int(count)}:
                self._oom_kills.add(by=count)
            case _:
                pass

    def slot_ready(self, recipe: Recipe, took_s: float) -> None:
        """A slot is warm."""
        self._ready.observe(took_s, recipe.template, recipe.engine)

    def engine_called(self, engine: str, verb: str, took_s: float, *, succeeded: bool) -> None:
        """An engine's client has ended, or was ended."""
        self._engine_calls.observe(took_s, engine, verb)
        if not succeeded:
            self._engine_failures.add(engine, verb)


def miss_word(reason: str) -> str:
    """One of a few words for why a sandbox was no slot."""
    if reason in MISS_REASONS:
        return reason
    return "failed" if reason.startswith("claim failed") else "several" if ", " in reason else "other"


class Metrics:
    """All figures of one daemon, as text.

    Args:
        measures: What was counted.
        manager: The sandboxes.
        pools: The slots.
        capacity: What is promised of this host.
        events: The event log.
        audit: How the audit log fares.
    """

    def __init__(
        self,
        measures: Measures,
        *,
        manager: Manager,
        pools: Pools,
        capacity: Capacity,
        events: EventLog,
        audit: Callable[[], AuditState],
    ) -> None:
        self._measures = measures
        self._manager = manager
        self._pools = pools
        self._capacity = capacity
        self._events = events
        self._audit = audit

    def text(self) -> str:
        """OpenMetrics text, as of now."""
        return exposition(
            [
                described("sandboxd_build", "Which daemon this is.", {"version": __version__}),
                *(family.lines() for family in self._measures.families),
                *self._sandboxes(),
                *self._slots(),
                *self._host(),
                *self._logs(),
                *_process(),
            ]
        )

    def _sandboxes(self) -> Iterator[Iterable[str]]:
        present = self._manager.present()
        states = Tally((sandbox.record.state.value, sandbox.record.engine) for sandbox in present)
        yield measured("sandboxd_sandboxes", "Sandboxes that there are.", states.items(), ("state", "engine"))
        unverified = Tally(
            proof.name.partition(":")[0] for sandbox in present for proof in sandbox.proofs if not proof.verified
        )
        yield measured(
            "sandboxd_limits_unverified",
            "Limits of sandboxes that are not proven.",
            _by_word(unverified),
            ("limit",),
        )
        running = sum(sandbox.commands.running_count for sandbox in present)
        yield measured("sandboxd_commands_running", "Commands that run.", [((), running)])

    def _slots(self) -> Iterator[Iterable[str]]:
        figures: dict[str, Tally[Labels]] = {name: Tally() for name in ("warm", "target", "filling", "waiting")}
        for bucket in self._pools.buckets():
            place = (bucket.recipe.template, bucket.recipe.engine)
            figures["warm"][place] += len(bucket.warm)
            figures["target"][place] += bucket.target
            figures["filling"][place] += bucket.filling
            figures["waiting"][place] += len(bucket.waiters)
        about = {
            "warm": "Slots that are warm.",
            "target": "Slots that there should be.",
            "filling": "Slots that are being made.",
            "waiting": "Callers who wait for a slot.",
        }
        for name, tally in figures.items():
            yield measured(f"sandboxd_pool_{name}", about[name], tally.items(), ("template", "engine"))

    def _host(self) -> Iterator[Iterable[str]]:
        promised, budget = self._capacity.promised, self._capacity.budget
        yield measured(
            "sandboxd_promised_memory_bytes",
            "Memory that is promised to sandboxes.",
            [((), promised.memory_bytes)],
            unit="bytes",
        )
        yield measured(
            "sandboxd_budget_memory_bytes",
            "Memory that may be promised.",
            _bounded(budget.memory_bytes),
            unit="bytes",
        )
        yield measured(
            "sandboxd_available_memory_bytes",
            "Memory that this host has to give.",
            [((), self._capacity.available_bytes)],
            unit="bytes",
        )
        cpus = promised.cpu_millis / CPU_MILLIS_PER_CPU
        yield measured("sandboxd_promised_cpus", "CPUs that are promised to sandboxes.", [((), cpus)])
        cpus_max = None if budget.cpu_millis is None else budget.cpu_millis / CPU_MILLIS_PER_CPU
        yield measured("sandboxd_budget_cpus", "CPUs that may be promised.", _bounded(cpus_max))
        yield measured("sandboxd_promised_pids", "Processes that are promised to sandboxes.", [((), promised.pids)])
        yield measured("sandboxd_budget_pids", "Processes that may be promised.", _bounded(budget.pids))
        yield measured("sandboxd_budget_sandboxes", "Sandboxes that there may be.", _bounded(budget.sandboxes))
        yield measured(
            "sandboxd_capacity_waiting", "Callers who wait for room on this host.", [((), self._capacity.waiting)]
        )

    def _logs(self) -> Iterator[Iterable[str]]:
        audit = self._audit()
        yield counted(
            "sandboxd_event_gaps", "How often a subscriber was told that it missed events.", [((), self._events.gaps)]
        )
        yield counted("sandboxd_audit_lines", "Lines that were written to the audit log.", [((), audit.written)])
        yield counted("sandboxd_audit_lost", "Lines of the audit log that were lost.", [((), audit.lost)])
        yield measured(
            "sandboxd_audit_failing", "Whether the audit log cannot be written.", [((), int(bool(audit.failing)))]
        )


def _by_word(tally: Tally[str]) -> list[tuple[Labels, float]]:
    return [((word,), count) for word, count in tally.items()]


def _bounded(most: float | None) -> list[tuple[Labels, float]]:
    """One sample; none where there is no bound."""
    return [] if most is None else [((), most)]


def _process() -> Iterator[Iterable[str]]:
    """By the names that every exporter has for them."""
    cpu = _PROCESS.cpu_times()
    yield counted("process_cpu_seconds", "CPU time used.", [((), cpu.user + cpu.system)], unit="seconds")
    yield measured(
        "process_resident_memory_bytes", "Memory in use.", [((), _PROCESS.memory_info().rss)], unit="bytes"
    )
    yield measured("process_open_fds", "Open files.", [((), len(os.listdir("/proc/self/fd")))])
    yield measured(
        "process_max_fds", "Files that may be open.", [((), resource.getrlimit(resource.RLIMIT_NOFILE)[0])]
    )
    yield measured(
        "process_start_time_seconds",
        "When it began, since the epoch.",
        [((), _PROCESS.create_time())],
        unit="seconds",
    )
