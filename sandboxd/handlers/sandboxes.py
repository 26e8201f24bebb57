"""``sandbox/*``."""

from __future__ import annotations

import msgspec

from runtimes.cgroup.readings import Pressure as PressureReading
from runtimes.cgroup.readings import Usage
from runtimes.errors import CgroupUnreadable
from sandboxd import admission, expiry, health, limits, protocol, running
from sandboxd.attaching import Attachments, is_as_wanted, mode_of
from sandboxd.capacity import Capacity
from sandboxd.connection import Context
from sandboxd.failures import InvalidArgument
from sandboxd.handlers.table import Handler
from sandboxd.launching import Launcher
from sandboxd.lifecycle import State
from sandboxd.lifetimes import Lifetimes
from sandboxd.manager import Manager
from sandboxd.provoking import provoke
from sandboxd.sandbox import Sandbox
from sandboxd.timings import Timings

METADATA_CHARS_MAX = 64 * 1024

_WAIT = "--wait-capacity"


class SandboxHandlers:
    """Making sandboxes, looking at them, changing and removing them."""

    def __init__(
        self,
        manager: Manager,
        launcher: Launcher,
        lifetimes: Lifetimes,
        capacity: Capacity,
        attachments: Attachments,
    ) -> None:
        self._manager = manager
        self._attachments = attachments
        self._launcher = launcher
        self._capacity = capacity
        self._lifetimes = lifetimes

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "sandbox/create": self.create,
            "sandbox/get": self.get,
            "sandbox/list": self.list,
            "sandbox/update": self.update,
            "sandbox/stop": self.stop,
            "sandbox/start": self.start,
            "sandbox/connect": self.connect,
            "sandbox/set_timeout": self.set_timeout,
            "sandbox/touch": self.touch,
            "sandbox/pause": self.pause,
            "sandbox/resume": self.resume,
            "sandbox/kill": self.kill,
            "sandbox/metrics": self.metrics,
            "sandbox/verify": self.verify,
        }

    async def create(self, params: protocol.SandboxCreateParams, context: Context) -> protocol.SandboxInfo:
        """Make a sandbox; an ephemeral one goes with the connection."""
        running.check_env(params.env)
        if sum(len(key) + len(value) for key, value in params.metadata.items()) > METADATA_CHARS_MAX:
            raise InvalidArgument(f"cannot keep more than {METADATA_CHARS_MAX} characters of metadata")
        timings = Timings()
        async with self._capacity.admitted(
            admission.share_of(self._launcher.limits_of(params)),
            wait_s=None if params.wait_capacity is None else running.seconds(params.wait_capacity, option=_WAIT),
            progress=context.progress,
        ):
            timings.mark("admit")
            sandbox = await self._launcher.create(params, timings, context.progress)
        if params.ephemeral:
            sandbox.on_forgotten = context.on_close(lambda: self._manager.remove_soon(sandbox))
        return _info(sandbox, timings)

    async def get(self, params: protocol.SandboxParams, _: Context) -> protocol.SandboxInfo:
        """Everything, with the engine's view and the limits read again."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        facts = await self._manager.facts(sandbox)
        timings.mark("engine")
        self._manager.enforcer.prove(sandbox, None if facts is None else facts.limits)
        timings.mark("verify")
        problems = await health.look(sandbox)
        timings.mark("health")
        view = await self._attachments.evidence(sandbox)
        timings.mark("network")
        return msgspec.structs.replace(
            _info(sandbox, timings),
            problems=problems,
            network_verified=None if view is None else is_as_wanted(sandbox, view),
        )

    async def list(self, params: protocol.SandboxListParams, _: Context) -> protocol.SandboxList:
        """The rows."""
        return protocol.SandboxList(
            sandboxes=[
                _summary(sandbox)
                for sandbox in self._manager.present()
                if params.metadata.items() <= sandbox.record.metadata.items()
            ]
        )

    async def update(self, params: protocol.SandboxUpdateParams, context: Context) -> protocol.SandboxInfo:
        """Change limits and prove them."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        grown = admission.growth(sandbox.record.limits, self._manager.enforcer.limits_after(sandbox, params))
        async with self._capacity.admitted(grown, wait_s=None, progress=context.progress):
            await self._manager.enforcer.update(sandbox, params, timings)
        return _info(sandbox, timings)

    async def stop(self, params: protocol.SandboxStopParams, _: Context) -> protocol.SandboxInfo:
        """Stop."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        await self._manager.stop(sandbox, running.grace_seconds(params.grace))
        timings.mark("engine")
        return _info(sandbox, timings)

    async def start(self, params: protocol.SandboxParams, context: Context) -> protocol.SandboxInfo:
        """Start again."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        stopped = sandbox.record.state is State.STOPPED
        share = admission.share_of(sandbox.record.limits) if stopped else admission.Share()
        async with self._capacity.admitted(share, wait_s=None, progress=context.progress):
            await self._manager.start(sandbox, timings)
        return _info(sandbox, timings)

    async def connect(self, params: protocol.SandboxConnectParams, _: Context) -> protocol.SandboxInfo:
        """Resume if need be, and give it time."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        if sandbox.record.state is State.PAUSED:
            await self._manager.resume(sandbox, timings)
        if params.lifetime is not None:
            self._lifetimes.extend(sandbox, expiry.duration_ms(params.lifetime, "--lifetime"))
        return _info(sandbox, timings)

    async def set_timeout(self, params: protocol.SandboxTimeoutParams, _: Context) -> protocol.SandboxLifetime:
        """From now on."""
        sandbox = self._manager.get(params.sandbox)
        self._lifetimes.change(sandbox, params)
        return _lifetime(sandbox)

    async def touch(self, params: protocol.SandboxParams, _: Context) -> protocol.SandboxLifetime:
        """It is still needed."""
        sandbox = self._manager.get(params.sandbox)
        self._lifetimes.touch(sandbox)
        return _lifetime(sandbox)

    async def pause(self, params: protocol.SandboxParams, _: Context) -> protocol.SandboxInfo:
        """Freeze."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        await self._manager.pause(sandbox, timings)
        return _info(sandbox, timings)

    async def resume(self, params: protocol.SandboxParams, _: Context) -> protocol.SandboxInfo:
        """Go on."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        await self._manager.resume(sandbox, timings)
        return _info(sandbox, timings)

    async def kill(self, params: protocol.SandboxKillParams, _: Context) -> protocol.SandboxGone:
        """Remove; at once, as far as anybody can tell who does not wait."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox, leaving=params.wait)
        if params.wait:
            await self._manager.remove(sandbox, timings)
        else:
            self._manager.remove_soon(sandbox)
            timings.mark("kill")
        return protocol.SandboxGone(
            id=sandbox.record.id, name=sandbox.record.name, gone=params.wait, timings_ms=timings.as_dict()
        )

    async def metrics(self, params: protocol.SandboxMetricsParams, _: Context) -> protocol.SandboxMetricsList:
        """Usage, straight from the control groups; no engine call."""
        sandboxes = [self._manager.get(ref) for ref in params.sandboxes] or self._manager.present()
        return protocol.SandboxMetricsList(sandboxes=[_metrics(sandbox) for sandbox in sandboxes])

    async def verify(self, params: protocol.SandboxVerifyParams, _: Context) -> protocol.SandboxVerification:
        """Read the limits again; provoke them if asked."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        running.require_running(sandbox)
        proofs = self._manager.enforcer.prove(sandbox)
        timings.mark("verify")
        provocations = await provoke(sandbox) if params.provoke else []
        if params.provoke:
            timings.mark("provoke")
        return protocol.SandboxVerification(
            id=sandbox.record.id,
            limits=limits.reports(proofs),
            provocations=provocations,
            verified=_all_verified(sandbox) and all(entry.held is not False for entry in provocations),
            timings_ms=timings.as_dict(),
        )


def _all_verified(sandbox: Sandbox) -> bool:
    return bool(sandbox.proofs) and all(proof.verified for proof in sandbox.proofs)


def _lifetime(sandbox: Sandbox) -> protocol.SandboxLifetime:
    lifetime = sandbox.record.lifetime
    return protocol.SandboxLifetime(
        id=sandbox.record.id,
        lifetime_ms=lifetime.lifetime_ms,
        expires_at_ms=lifetime.expires_at_ms,
        idle_timeout_ms=lifetime.idle_timeout_ms,
        on_timeout=lifetime.on_timeout,  # type: ignore[arg-type]
    )


def _summary(sandbox: Sandbox) -> protocol.SandboxSummary:
    record = sandbox.record
    return protocol.SandboxSummary(
        id=record.id,
        name=record.name,
        state=record.state.value,
        engine=record.engine,
        template=record.template,
        image=record.image,
        workspace=None if record.workspace is None else record.workspace.path,
        created_at_ms=record.created_at_ms,
        commands_running=sandbox.commands.running_count,
        verified=_all_verified(sandbox),
        metadata=record.metadata,
        expires_at_ms=record.lifetime.expires_at_ms,
        problems=health.counted(sandbox),
    )


def _info(sandbox: Sandbox, timings: Timings) -> protocol.SandboxInfo:
    record = sandbox.record
    workspace = record.workspace
    return protocol.SandboxInfo(
        id=record.id,
        name=record.name,
        state=record.state.value,
        state_reason=record.state_reason,
        engine=record.engine,
        image=record.image,
        container_id=record.container_id,
        pid=sandbox.pid,
        user=f"{record.user.uid}:{record.user.gid}",
        workspace=None
        if workspace is None
        else protocol.WorkspaceInfo(
            path=workspace.path,
            path_bytes=workspace.path_bytes,
            mode=workspace.mode,
            mounted=workspace.mounted,
            backend=workspace.backend,
        ),
        network=mode_of(sandbox),
        services=[
            f"{grant.service}={scope}" if scope else grant.service
            for grant in record.services
            for scope in grant.scopes or ("",)
        ],
        mounts=[
            protocol.MountInfo(
                path=mount.path,
                path_bytes=mount.path_bytes,
                target=mount.target,
                mode="ro" if mount.read_only else "rw",
                mounted=mount.mounted,
                reason=mount.reason,
            )
            for mount in record.mounts
        ],
        secrets=list(record.secrets),
        limits=limits.reports(sandbox.proofs),
        limits_policy=record.limits_policy,
        verified=_all_verified(sandbox),
        metadata=record.metadata,
        env=record.env,
        created_at_ms=record.created_at_ms,
        ephemeral=record.ephemeral,
        commands_running=sandbox.commands.running_count,
        template=record.template,
        launch=record.launch,
        miss_reason=record.miss_reason,
        warnings=list(record.warnings),
        timings_ms=timings.as_dict(),
        lifetime_ms=record.lifetime.lifetime_ms,
        expires_at_ms=record.lifetime.expires_at_ms,
        idle_timeout_ms=record.lifetime.idle_timeout_ms,
        on_timeout=record.lifetime.on_timeout,  # type: ignore[arg-type]
    )


def _metrics(sandbox: Sandbox) -> protocol.SandboxMetrics:
    record = sandbox.record
    reason = ""
    usage = Usage()
    if record.state in (State.RUNNING, State.PAUSED):
        try:
            usage = sandbox.usage()
        except CgroupUnreadable as error:
            reason = str(error)
    else:
        reason = record.state_reason or f"it is {record.state.value}"
    return protocol.SandboxMetrics(
        id=record.id,
        name=record.name,
        state=record.state.value,
        cpu_us=usage.cpu_us,
        cpu_percent=sandbox.cpu_percent(usage.cpu_us),
        cpu_millis=record.limits.cpu_millis,
        throttled_periods=usage.throttled_periods,
        throttled_us=usage.throttled_us,
        memory_bytes=usage.memory_bytes,
        memory_bytes_peak=usage.memory_bytes_peak,
        memory_bytes_max=record.limits.memory_bytes_max,
        pids=usage.pids,
        pids_peak=usage.pids_peak,
        pids_max=record.limits.pids_max,
        pids_refused=usage.pids_refused,
        oom_kills=usage.oom_kills,
        ooms_own=usage.ooms_own,
        cpu_pressure=_pressure(usage.cpu_pressure),
        memory_pressure=_pressure(usage.memory_pressure),
        io_pressure=_pressure(usage.io_pressure),
        reason=reason,
    )


def _pressure(reading: PressureReading | None) -> protocol.Pressure | None:
    if reading is None:
        return None
    return protocol.Pressure(
        some_avg10_percent=reading.some_avg10_percent,
        full_avg10_percent=reading.full_avg10_percent,
        some_total_us=reading.some_total_us,
        full_total_us=reading.full_total_us,
    )
