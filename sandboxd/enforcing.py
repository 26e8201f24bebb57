"""Limits that hold: refused where this host cannot enforce them, written, read back, changed while a sandbox runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping

import anyio
import msgspec

from runtimes.cgroup.readings import EffectiveLimits
from runtimes.cgroup.verify import LimitProof, enforceable
from runtimes.engine import Engine
from runtimes.errors import CgroupUnreadable, RuntimeFailure
from runtimes.model import EngineInfo, EngineName, Limits
from runtimes.quantities import format_bytes
from sandboxd import admission
from sandboxd.engine_records import EngineRecords
from sandboxd.engines import EngineRoom
from sandboxd.failures import Conflict, Failure, LimitNotEnforceable
from sandboxd.lifecycle import State
from sandboxd.limits import Host, difference, merged, passable, resolve_update
from sandboxd.protocol import SandboxUpdateParams
from sandboxd.sandbox import Sandbox, container_id_of
from sandboxd.timings import Timings

logger = logging.getLogger(__name__)


class Enforcer:
    """Enforces the limits of all sandboxes.

    Args:
        host: What there is to be had.
        engines: Those that run the sandboxes.
        present: The sandboxes that use the host.
        packs_cpus: Bind a sandbox that gets whole CPUs to as many.
        engine_records: Told of limits that were written past the engine.
    """

    def __init__(
        self,
        host: Host,
        engines: EngineRoom,
        present: Callable[[], list[Sandbox]],
        *,
        packs_cpus: bool,
        engine_records: EngineRecords,
    ) -> None:
        self._host = host
        self._engines = engines
        self._present = present
        self._packs_cpus = packs_cpus
        self._engine_records = engine_records

    def prove(
        self,
        sandbox: Sandbox,
        reported: Limits | None = None,
        *,
        ahead: EffectiveLimits | None = None,
        tmpfs_bytes: Mapping[str, int] | None = None,
    ) -> tuple[LimitProof, ...]:
        """Read the limits of a running sandbox, and keep the proofs; see ``Sandbox.prove``."""
        swap_bytes = self._host.swap_bytes
        return sandbox.prove(swap_bytes=swap_bytes, reported=reported, ahead=ahead, tmpfs_bytes=tmpfs_bytes)

    def prove_again(self, sandbox: Sandbox) -> None:
        """Prove; where that fails, write the limits once more, and prove.

        The engine starts a container with the limits of its creation: later updates are ours to repeat. And an
        update may have been cut short.
        """
        if not all(proof.verified for proof in self.prove(sandbox)):
            with contextlib.suppress(CgroupUnreadable):
                sandbox.write_limits(sandbox.record.limits)
            self.prove(sandbox)

    def restore(self, sandbox: Sandbox) -> None:
        """Read the limits of a sandbox that runs, and write them again where somebody else has changed them."""
        at_rest = sandbox.connected and not sandbox.lock.locked() and not sandbox.is_unthrottled
        if sandbox.record.state not in (State.RUNNING, State.WARM) or not at_rest:
            return
        if sandbox.record.state is State.RUNNING:
            sandbox.let_limits_go()
        before = {proof.name for proof in sandbox.proofs if proof.verified}
        changed = [proof for proof in self.prove(sandbox) if proof.name in before and not proof.verified]
        if not changed:
            return
        said = "; ".join(f"{proof.name}: {proof.reason}" for proof in changed)
        logger.warning("somebody changed limits of %s: %s", sandbox.record.id, said)
        try:
            sandbox.write_limits(sandbox.record.limits)
        except CgroupUnreadable as error:
            logger.warning("cannot restore the limits of %s: %s", sandbox.record.id, error)
            return
        if before <= {proof.name for proof in self.prove(sandbox) if proof.verified}:
            sandbox.tell("limits_restored", reason=said)

    def limits_after(self, sandbox: Sandbox, params: SandboxUpdateParams) -> Limits:
        """The limits that a sandbox has after this request.

        Raises:
            InvalidArgument: nonsense, or a limit that is fixed at creation.
        """
        return merged(sandbox.record.limits, resolve_update(params.limits, self._host))

    async def update(self, sandbox: Sandbox, params: SandboxUpdateParams, timings: Timings) -> None:
        """Change limits of a running sandbox and prove them; when they cannot be proven, the old ones are put back.

        Raises:
            InvalidArgument: nonsense, or a limit that is fixed at creation.
            Conflict: it does not run, or uses more than the new limit.
            LimitNotEnforceable: the new limits could not be proven.
        """
        changed = resolve_update(params.limits, self._host)
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is not State.RUNNING:
                    verb = "resume" if sandbox.record.state is State.PAUSED else "start"
                    raise Conflict(
                        f"cannot change the limits of a sandbox that is {sandbox.record.state.value}",
                        hint=f"sandboxctl {verb} {sandbox.record.id}",
                    )
                engine = self._engines.get(EngineName(sandbox.record.engine))
                chosen = changed.cpuset_cpus is not None
                changed = self._repacked(sandbox, changed)
                policy = params.limits_policy or sandbox.record.limits_policy
                check_enforceable(changed, engine.info, policy)
                _check_use(sandbox, changed)
                before = sandbox.record.limits
                await self._apply(sandbox, engine, merged(before, changed), changed, policy)
                if chosen and sandbox.record.cpus_packed:
                    sandbox.put(cpus_packed=False)
                timings.mark("apply")

    async def _apply(self, sandbox: Sandbox, engine: Engine, limits: Limits, changed: Limits, policy: str) -> None:
        before, policy_before = sandbox.record.limits, sandbox.record.limits_policy
        sandbox.put(limits=limits, limits_policy=policy)
        try:
            await self.write(sandbox, engine, changed)
            self.prove(sandbox)
            require_proof(sandbox)
        except (RuntimeFailure, Failure):
            sandbox.put(limits=before, limits_policy=policy_before)
            with contextlib.suppress(RuntimeFailure):
                await self.write(sandbox, engine, before)
            self.prove(sandbox)
            raise

    async def write(self, sandbox: Sandbox, engine: Engine, limits: Limits) -> None:
        """Through the engine, so that its records stay right; what it cannot, straight into the control group."""
        limits = passable(limits, engine.info)
        if limits == Limits():
            return
        left = await engine.update(container_id_of(sandbox), limits)
        if left != Limits():
            sandbox.write_limits(left)

    async def write_changes(self, sandbox: Sandbox, engine: Engine, before: Limits) -> None:
        """Give a sandbox that runs with the limits ``before`` those of its record.

        Straight into the control group; where that belongs to somebody else, through the engine.
        """
        changed = difference(before, passable(sandbox.record.limits, engine.info))
        if changed == Limits():
            return
        try:
            sandbox.write_limits(changed)
        except CgroupUnreadable:
            await self.write(sandbox, engine, changed)
        else:
            self._engine_records.stale(sandbox)

    def packed(self, limits: Limits, info: EngineInfo) -> Limits:
        """The limits of a new sandbox, bound to some CPUs if that is configured, can be done and says something."""
        able = info.capabilities
        if not self._packs_cpus or able is None or not able.cpuset_limit:
            return limits
        cpus = admission.pack(self._host.cpus_online, self._cpus_taken(), admission.whole_cpus(limits) or 0)
        return limits if cpus is None else msgspec.structs.replace(limits, cpuset_cpus=cpus)

    def _repacked(self, sandbox: Sandbox, changed: Limits) -> Limits:
        """A change of limits of a sandbox that was bound to some CPUs here: they follow its quota."""
        if not sandbox.record.cpus_packed or changed.cpu_millis is None or changed.cpuset_cpus is not None:
            return changed
        online = self._host.cpus_online
        cpus = admission.pack(online, self._cpus_taken(besides=sandbox), admission.whole_cpus(changed) or 0)
        return msgspec.structs.replace(changed, cpuset_cpus=cpus or online)

    def _cpus_taken(self, besides: Sandbox | None = None) -> list[tuple[int, ...]]:
        return [
            sandbox.record.limits.cpuset_cpus
            for sandbox in self._present()
            if sandbox is not besides
            and sandbox.record.limits.cpuset_cpus
            and sandbox.record.state not in (State.STOPPED, State.LOST)
        ]


def _above(used: int | None, limit: int | None) -> bool:
    return used is not None and limit is not None and used > limit


def require_proof(sandbox: Sandbox) -> None:
    """Refuse to go on with limits that are not proven, unless the caller does without.

    Raises:
        LimitNotEnforceable: one is not.
    """
    unproven = [proof for proof in sandbox.proofs if not proof.verified]
    if unproven and sandbox.record.limits_policy == "strict":
        raise LimitNotEnforceable(
            f"cannot prove {', '.join(proof.name for proof in unproven)}",
            detail="; ".join(dict.fromkeys(proof.reason for proof in unproven)),
            hint="sandboxctl doctor, or go on without proof: --degraded",
        )


def check_enforceable(limits: Limits, info: EngineInfo, policy: str) -> None:
    """Refuse limits that this host cannot enforce, unless the caller does without.

    Raises:
        LimitNotEnforceable: with what mends it.
    """
    missing = enforceable(limits, info)
    if missing and policy == "strict":
        raise LimitNotEnforceable(
            f"cannot enforce {', '.join(entry.limit for entry in missing)} with {info.name}",
            detail="; ".join(dict.fromkeys(entry.reason for entry in missing)),
            hint=f"{missing[0].hint}   (or go on without proof: --degraded)",
        )


def _check_use(sandbox: Sandbox, changed: Limits) -> None:
    """Lowering a limit below what is used would kill at once, or be refused half-way."""
    try:
        usage = sandbox.usage()
    except CgroupUnreadable:
        return
    if _above(usage.memory_bytes, changed.memory_bytes_max):
        raise Conflict(
            f"cannot lower memory to {format_bytes(changed.memory_bytes_max or 0)}",
            detail=f"{format_bytes(usage.memory_bytes or 0)} are in use",
            hint=f"sandboxctl stats {sandbox.record.id}",
        )
    if _above(usage.pids, changed.pids_max):
        raise Conflict(
            f"cannot lower pids to {changed.pids_max}",
            detail=f"{usage.pids} are in use",
            hint=f"sandboxctl stats {sandbox.record.id}",
        )
