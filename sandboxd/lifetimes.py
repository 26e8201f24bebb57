"""Ends sandboxes whose time is over, or pauses them; says so before, and keeps those that somebody uses.

What counts while the daemon runs is a clock that nobody can set: CLOCK_BOOTTIME for lifetimes, which pass also while
the host sleeps, and CLOCK_MONOTONIC for idleness, which a sleeping host is not guilty of. What is written down is the
time of day, for no other clock outlives the daemon; when that is set, the written deadlines are moved with it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import anyio
import msgspec

from runtimes.errors import RuntimeFailure
from sandboxd import expiry
from sandboxd.background import Background
from sandboxd.engines import require_pausable
from sandboxd.expiry import Standing, Verdict
from sandboxd.failures import Failure, InvalidArgument
from sandboxd.lifecycle import State
from sandboxd.manager import Manager
from sandboxd.protocol import SandboxTimeoutParams
from sandboxd.records import LifetimeRecord
from sandboxd.sandbox import Sandbox
from sandboxd.timings import Timings, now_ms

logger = logging.getLogger(__name__)

RETRY_S = 5.0
"""After a pause that the engine refused."""

LOOKING = frozenset(
    {
        "sandbox/get",
        "sandbox/metrics",
        "sandbox/verify",
        "sandbox/set_timeout",
        "commands/list",
        "shells/list",
        "events/subscribe",
    }
)
"""Methods that name a sandbox and do not use it: a monitor must not keep alive what it watches."""

_LASTING = (State.STOPPED, State.BROKEN, State.LOST)
"""States in which a lifetime passes, though nothing can be seen inside."""


class _Watch:
    """What is known of one sandbox's time since this daemon knows it."""

    def __init__(self) -> None:
        self.expires_at_ms: int | None = None
        self.deadline_s: float | None = None
        """On the clock of ``_boot_s``; of the ``expires_at_ms`` above."""
        self.touched_s = time.monotonic()
        self.users = 0
        """Requests under way that use it."""
        self.looks = 0
        """Beginnings and ends of requests that only looked at it, since its CPU time was read."""
        self.cpu_us: int | None = None
        self.cpu_read_s = self.touched_s
        self.running = False
        self.warned = False
        self.acting = False


class Lifetimes:
    """Watches the time of all sandboxes of one manager."""

    def __init__(self, manager: Manager, background: Background) -> None:
        self._manager = manager
        self._background = background
        self._watches: dict[str, _Watch] = {}
        self._changed = anyio.Event()
        self._clock_offset_ms = _clock_offset_ms()
        self._limited: set[str] = set()
        """The sandboxes that do not last for ever: all others cost nothing."""
        manager.watchers.append(self.look_again)

    def look_again(self, sandbox: Sandbox) -> None:
        """A sandbox, or its time, has changed."""
        if sandbox.gone.is_set():
            self._watches.pop(sandbox.record.id, None)
            self._limited.discard(sandbox.record.id)
            return
        lifetime = sandbox.record.lifetime
        if lifetime.expires_at_ms is not None or lifetime.idle_timeout_ms is not None:
            self._limited.add(sandbox.record.id)
        elif sandbox.record.id not in self._limited:
            return
        self._changed.set()

    @contextlib.contextmanager
    def using(self, sandbox: Sandbox) -> Iterator[None]:
        """For as long as it is entered, and from its end on, the sandbox is not idle."""
        watch = self._watch(sandbox)
        watch.users += 1
        try:
            yield
        finally:
            watch.users -= 1
            watch.touched_s = time.monotonic()
            if sandbox.gone.is_set():
                self._watches.pop(sandbox.record.id, None)

    def touch(self, sandbox: Sandbox) -> None:
        """Somebody wants it to stay: it is not idle."""
        self._watch(sandbox).touched_s = time.monotonic()
        self.look_again(sandbox)

    def change(self, sandbox: Sandbox, params: SandboxTimeoutParams) -> None:
        """Give it another lifetime, from now on, or another idle timeout; what is not given stays.

        Raises:
            InvalidArgument: one of them is no duration, or nothing is given.
            Unsupported: it cannot be paused.
        """
        if params.lifetime is None and params.idle_timeout is None and params.on_timeout is None:
            raise InvalidArgument("cannot change nothing", hint="give a lifetime, --idle-timeout or --on-timeout")
        before = sandbox.record.lifetime
        if params.on_timeout is not None:
            require_pausable(self._manager.engine_of(sandbox), params.on_timeout)
        lifetime = msgspec.structs.replace(
            before,
            idle_timeout_ms=before.idle_timeout_ms
            if params.idle_timeout is None
            else expiry.duration_ms(params.idle_timeout, "--idle-timeout"),
            on_timeout=params.on_timeout or before.on_timeout,
        )
        if params.lifetime is not None:
            lifetime = self._renewed(sandbox, lifetime, expiry.duration_ms(params.lifetime, "--lifetime"))
        self._put(sandbox, lifetime)

    def extend(self, sandbox: Sandbox, lifetime_ms: int | None) -> None:
        """Let it last for at least so long from now on; None: for ever."""
        left_ms = self.left_ms(sandbox)
        if left_ms is not None and (lifetime_ms is None or lifetime_ms > left_ms):
            self._put(sandbox, self._renewed(sandbox, sandbox.record.lifetime, lifetime_ms))

    @staticmethod
    def _renewed(sandbox: Sandbox, lifetime: LifetimeRecord, lifetime_ms: int | None) -> LifetimeRecord:
        begun = expiry.begun(lifetime_ms, lifetime.idle_timeout_ms, lifetime.on_timeout, now_ms())
        if sandbox.record.state is State.PAUSED:
            return msgspec.structs.replace(begun, expires_at_ms=None)
        return begun

    def _put(self, sandbox: Sandbox, lifetime: LifetimeRecord) -> None:
        sandbox.put(lifetime=lifetime)
        watch = self._watch(sandbox)
        watch.touched_s, watch.warned = time.monotonic(), False
        sandbox.tell("timeout_changed", lifetime_ms=lifetime.lifetime_ms, idle_timeout_ms=lifetime.idle_timeout_ms)

    def used_by(self, method: str, params: object) -> AbstractContextManager[None]:
        """What is entered while a request is carried out: whoever only looks at a sandbox does not use it."""
        reference = getattr(params, "sandbox", None)
        if reference is None:
            return contextlib.nullcontext()
        try:
            sandbox = self._manager.get(reference)
        except Failure:
            return contextlib.nullcontext()
        return self._looking(sandbox) if method in LOOKING else self.using(sandbox)

    @contextlib.contextmanager
    def _looking(self, sandbox: Sandbox) -> Iterator[None]:
        """What a look costs inside is no work of the sandbox's."""
        watch = self._watch(sandbox)
        watch.looks += 1
        try:
            yield
        finally:
            watch.looks += 1
            if sandbox.gone.is_set():
                self._watches.pop(sandbox.record.id, None)

    def left_ms(self, sandbox: Sandbox) -> int | None:
        """How long its lifetime still is, by the clock that nobody can set."""
        watch = self._watch(sandbox)
        expires_at_ms = sandbox.record.lifetime.expires_at_ms
        if expires_at_ms != watch.expires_at_ms:
            watch.expires_at_ms = expires_at_ms
            watch.deadline_s = None if expires_at_ms is None else _boot_s() + (expires_at_ms - now_ms()) / 1000
        return None if watch.deadline_s is None else round((watch.deadline_s - _boot_s()) * 1000)

    async def run(self) -> None:
        """Watch, until cancelled. What was over before the start is ended at once."""
        for sandbox in self._manager.present():
            self.look_again(sandbox)
        while True:
            self._changed = anyio.Event()
            look_in_ms = self._look()
            with anyio.move_on_after(None if look_in_ms is None else look_in_ms / 1000):
                await self._changed.wait()

    def _look(self) -> int | None:
        """Look at all of them; return in how many milliseconds to look again, None: when something changes."""
        self._follow_clock()
        looks = [self._look_at(sandbox) for sandbox in self._limited_sandboxes()]
        return min((look for look in looks if look is not None), default=None)

    def _limited_sandboxes(self) -> list[Sandbox]:
        found = {sandbox_id: self._manager.find(sandbox_id) for sandbox_id in self._limited}
        present = [sandbox for sandbox in found.values() if sandbox is not None and not sandbox.leaving]
        self._limited = {sandbox.record.id for sandbox in present}
        return present

    def _look_at(self, sandbox: Sandbox) -> int | None:
        record = sandbox.record
        watch = self._watch(sandbox)
        if watch.acting or (record.lifetime.expires_at_ms is None and record.lifetime.idle_timeout_ms is None):
            return None
        running = record.state is State.RUNNING
        if not running and (record.state not in _LASTING or record.lifetime.on_timeout != "kill"):
            watch.running = False
            return None
        idle_ms = self._idle_ms(sandbox, watch) if running else 0
        watch.running = running
        verdict = expiry.judge(
            Standing(
                left_ms=self.left_ms(sandbox),
                lifetime_ms=record.lifetime.lifetime_ms,
                idle_ms=idle_ms,
                idle_timeout_ms=record.lifetime.idle_timeout_ms if running else None,
            )
        )
        if verdict.due:
            self._end(sandbox, watch, verdict)
            return None
        self._warn(sandbox, watch, verdict)
        return verdict.look_in_ms

    def _idle_ms(self, sandbox: Sandbox, watch: _Watch) -> int:
        """How long nothing has happened inside: no request, no command that somebody waits for, no CPU time used."""
        if sandbox.record.lifetime.idle_timeout_ms is None:
            return 0
        now_s = time.monotonic()
        if watch.users or not watch.running or self._worked(sandbox, watch, now_s):
            watch.touched_s = now_s
        return round((now_s - watch.touched_s) * 1000)

    @staticmethod
    def _worked(sandbox: Sandbox, watch: _Watch, now_s: float) -> bool:
        """Whether it has used CPU time since the last reading that is old enough to say something."""
        over_ms = round((now_s - watch.cpu_read_s) * 1000)
        if watch.cpu_us is not None and over_ms < expiry.LOOK_MS_MIN:
            return False
        before_us, watch.cpu_us, watch.cpu_read_s = watch.cpu_us, sandbox.cpu_us(), now_s
        looks, watch.looks = watch.looks, 0
        if watch.cpu_us is None:
            return sandbox.commands.running_count > 0
        return before_us is not None and expiry.was_active(watch.cpu_us - before_us, over_ms, looks)

    def _warn(self, sandbox: Sandbox, watch: _Watch, verdict: Verdict) -> None:
        if verdict.warn and not watch.warned:
            sandbox.tell(
                "expiring",
                cause=verdict.cause,
                action=sandbox.record.lifetime.on_timeout,
                ends_in_ms=verdict.ends_in_ms,
            )
        watch.warned = verdict.warn

    def _end(self, sandbox: Sandbox, watch: _Watch, verdict: Verdict) -> None:
        action = sandbox.record.lifetime.on_timeout
        why = expiry.reason(verdict.cause, sandbox.record.lifetime)
        logger.info("%s %s: %s", action, sandbox.record.id, why)
        sandbox.tell("expired", cause=verdict.cause, action=action)
        if action == "kill":
            self._manager.remove_soon(sandbox)
        else:
            watch.acting = True
            self._background.start(self._pause, sandbox, watch, why)

    async def _pause(self, sandbox: Sandbox, watch: _Watch, why: str) -> None:
        try:
            await self._manager.pause(sandbox, Timings(), reason=why)
        except (RuntimeFailure, Failure) as error:
            logger.warning("cannot pause %s, whose time is over: %s", sandbox.record.id, error)
            await anyio.sleep(RETRY_S)
        finally:
            watch.acting = False
            self.look_again(sandbox)

    def _follow_clock(self) -> None:
        """The time of day was set: what is written down as such has to be what it was meant to be."""
        offset_ms = _clock_offset_ms()
        if abs(offset_ms - self._clock_offset_ms) < expiry.CLOCK_JUMP_MS_MIN:
            return
        logger.warning("the time of day was set by %d ms: deadlines move with it", offset_ms - self._clock_offset_ms)
        for sandbox in self._limited_sandboxes():
            watch = self._watch(sandbox)
            if watch.deadline_s is None or watch.expires_at_ms != sandbox.record.lifetime.expires_at_ms:
                continue
            moved_ms = now_ms() + round((watch.deadline_s - _boot_s()) * 1000)
            try:
                sandbox.put(lifetime=msgspec.structs.replace(sandbox.record.lifetime, expires_at_ms=moved_ms))
            except Failure as error:
                logger.warning("cannot move the deadline of %s: %s", sandbox.record.id, error)
                return
            watch.expires_at_ms = moved_ms
        self._clock_offset_ms = offset_ms

    def _watch(self, sandbox: Sandbox) -> _Watch:
        return self._watches.setdefault(sandbox.record.id, _Watch())


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _clock_offset_ms() -> int:
    return now_ms() - round(_boot_s() * 1000)
