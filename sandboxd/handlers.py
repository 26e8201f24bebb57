"""One method per row of the protocol's table: request struct in, use case, reply struct out.

Wire and domain meet here only. Errors of ``runtimes`` become failures here, in one place.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio
import msgspec
import psutil

from runtimes.cgroup.readings import Pressure as PressureReading
from runtimes.cgroup.readings import Usage
from runtimes.errors import CgroupUnreadable, RuntimeFailure
from runtimes.init.file_worker import FileRefused
from runtimes.init.files import FilesChannel
from runtimes.init.wire import InitError, Scope
from runtimes.model import EngineInfo, EngineName
from sandboxd import __version__, doctor, files, limits, protocol, running
from sandboxd.commands import Command, format_command_id
from sandboxd.engines import EngineRoom
from sandboxd.failures import Conflict, InvalidArgument, Unsupported
from sandboxd.image_builder import ImageBuilder
from sandboxd.lifecycle import State
from sandboxd.manager import Manager
from sandboxd.outlet import Outlet, OutputName
from sandboxd.provoking import provoke
from sandboxd.sandbox import Sandbox
from sandboxd.server import Context
from sandboxd.spool_plan import Chunk, Dropped, Truncated
from sandboxd.timings import Timings
from sandboxd.translation import failure_from

Handler = Callable[[Any, Context], Awaitable[msgspec.Struct]]

METADATA_CHARS_MAX = 64 * 1024

STARTED = "commands/started"
OUTPUT = "commands/output"
_WAITING = frozenset({"commands/run", "commands/wait", "commands/connect"})
"""Methods that may last as long as a command: a drain does not wait for them."""

_SCOPES = {"process": Scope.MAIN, "group": Scope.GROUP, "tree": Scope.TREE}


class Handlers:
    """What the server dispatches to.

    Args:
        manager: The sandboxes.
        engines: The engines.
        images: Makes images.
        examine: Gathers what doctor judges.
        daemon: What ``daemon/info`` says of this process, engines and counts excepted.
        config: What ``daemon/config`` says.
        shut_down: Begins the end of the daemon.
    """

    def __init__(
        self,
        *,
        manager: Manager,
        engines: EngineRoom,
        images: ImageBuilder,
        examine: Callable[[], Awaitable[doctor.Facts]],
        daemon: protocol.DaemonInfo,
        config: protocol.DaemonConfig,
        shut_down: Callable[[], None],
    ) -> None:
        self._manager = manager
        self._engines = engines
        self._images = images
        self._examine = examine
        self._daemon = daemon
        self._config = config
        self._shut_down = shut_down
        self._draining = False
        self._active = 0
        self._idle = anyio.Event()
        self._handlers: Mapping[str, Handler] = {
            "sandbox/create": self.create,
            "sandbox/get": self.get,
            "sandbox/list": self.list,
            "sandbox/update": self.update,
            "sandbox/stop": self.stop,
            "sandbox/start": self.start,
            "sandbox/kill": self.kill,
            "sandbox/metrics": self.metrics,
            "sandbox/verify": self.verify,
            "commands/run": self.run_command,
            "commands/start": self.start_command,
            "commands/wait": self.wait_command,
            "commands/signal": self.signal_command,
            "commands/kill": self.kill_command,
            "commands/connect": self.connect_command,
            "commands/logs": self.command_logs,
            "commands/send_stdin": self.send_input,
            "commands/close_stdin": self.close_input,
            "commands/resize": self.resize_command,
            "commands/list": self.list_commands,
            "files/read": self.read_file,
            "files/write": self.write_file,
            "files/list": self.list_files,
            "files/stat": self.stat_file,
            "files/make_dir": self.make_dir,
            "files/rename": self.rename_file,
            "files/remove": self.remove_file,
            "image/list": self.list_images,
            "image/build": self.build_image,
            "daemon/info": self.info,
            "daemon/doctor": self.doctor,
            "daemon/config": self.config,
            "daemon/shutdown": self.shutdown,
        }

    async def __call__(self, method: str, params: protocol.Params, context: Context) -> msgspec.Struct:
        """Carry out a request. See ``server.Dispatch``."""
        if self._draining:
            raise Conflict("cannot take requests any more", detail="the daemon is stopping", hint="try again")
        counted = method not in _WAITING
        self._active += counted
        try:
            return await self._handlers[method](params, context)
        except FileRefused as error:
            raise files.failure_from_refusal(error) from error
        except (RuntimeFailure, InitError) as error:
            raise failure_from(error) from error
        finally:
            self._active -= counted
            if self._active == 0:
                self._idle.set()

    async def drain(self, *, deadline_s: float) -> None:
        """Refuse new requests, and let those in flight finish."""
        self._draining = True
        self._idle = anyio.Event()
        if self._active:
            with anyio.move_on_after(deadline_s):
                await self._idle.wait()

    # --- sandboxes ------------------------------------------------------------------------------------

    async def create(self, params: protocol.SandboxCreateParams, context: Context) -> protocol.SandboxInfo:
        """Make a sandbox; an ephemeral one goes with the connection."""
        running.check_env(params.env)
        if sum(len(key) + len(value) for key, value in params.metadata.items()) > METADATA_CHARS_MAX:
            raise InvalidArgument(f"cannot keep more than {METADATA_CHARS_MAX} characters of metadata")
        timings = Timings()
        sandbox = await self._manager.create(params, timings)
        if params.ephemeral:
            sandbox.on_forgotten = context.on_close(lambda: self._manager.remove_soon(sandbox))
        return _info(sandbox, timings)

    async def get(self, params: protocol.SandboxParams, _: Context) -> protocol.SandboxInfo:
        """Everything, with the engine's view and the limits read again."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        facts = await self._manager.facts(sandbox)
        timings.mark("engine")
        self._manager.prove(sandbox, None if facts is None else facts.limits)
        timings.mark("verify")
        return _info(sandbox, timings)

    async def list(self, params: protocol.SandboxListParams, _: Context) -> protocol.SandboxList:
        """The rows."""
        return protocol.SandboxList(
            sandboxes=[
                _summary(sandbox)
                for sandbox in self._manager.all()
                if params.metadata.items() <= sandbox.record.metadata.items()
            ]
        )

    async def update(self, params: protocol.SandboxUpdateParams, _: Context) -> protocol.SandboxInfo:
        """Change limits and prove them."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        await self._manager.update(sandbox, params, timings)
        return _info(sandbox, timings)

    async def stop(self, params: protocol.SandboxStopParams, _: Context) -> protocol.SandboxInfo:
        """Stop."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        await self._manager.stop(sandbox, running.grace_seconds(params.grace))
        timings.mark("engine")
        return _info(sandbox, timings)

    async def start(self, params: protocol.SandboxParams, _: Context) -> protocol.SandboxInfo:
        """Start again."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        await self._manager.start(sandbox, timings)
        return _info(sandbox, timings)

    async def kill(self, params: protocol.SandboxParams, _: Context) -> protocol.SandboxGone:
        """Remove."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        await self._manager.remove(sandbox, timings)
        return protocol.SandboxGone(id=sandbox.record.id, name=sandbox.record.name, timings_ms=timings.as_dict())

    async def metrics(self, params: protocol.SandboxMetricsParams, _: Context) -> protocol.SandboxMetricsList:
        """Usage, straight from the control groups; no engine call."""
        sandboxes = [self._manager.get(ref) for ref in params.sandboxes] or self._manager.all()
        return protocol.SandboxMetricsList(sandboxes=[_metrics(sandbox) for sandbox in sandboxes])

    async def verify(self, params: protocol.SandboxVerifyParams, _: Context) -> protocol.SandboxVerification:
        """Read the limits again; provoke them if asked."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        running.require_running(sandbox)
        proofs = self._manager.prove(sandbox)
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

    # --- commands -------------------------------------------------------------------------------------

    async def run_command(self, params: protocol.CommandParams, context: Context) -> protocol.CommandEnd:
        """Run a command to its end."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        descriptors = context.take_descriptors()
        try:
            if params.user is not None:
                engine = self._engines.get(EngineName(sandbox.record.engine))
                return await running.run_as_other_user(
                    engine, sandbox, params, descriptors, timings, user=params.user
                )
            keep = params.on_disconnect == "keep"
            command, pty_fd = await running.start(sandbox, params, descriptors, keep=keep)
        finally:
            _close(descriptors)
        timings.mark("spawn")
        masters = () if pty_fd is None else (pty_fd,)
        context.notify(STARTED, _started(sandbox, command.id, command.pid, timings), masters)
        wait = sandbox.commands.wait if keep else sandbox.commands.wait_or_kill
        try:
            if params.follow and command.outlet is not None:
                async with anyio.create_task_group() as following:
                    following.start_soon(follow, sandbox, command, context, {})
                    end = await wait(command)
            else:
                end = await wait(command)
        finally:
            if not keep:
                sandbox.commands.release(command)
        timings.mark("command")
        return msgspec.structs.replace(end, timings_ms=timings.as_dict())

    async def start_command(self, params: protocol.CommandParams, context: Context) -> protocol.CommandStarted:
        """Start a command in the background."""
        timings = Timings()
        if params.pty is not None and params.stdio != "spool":
            raise InvalidArgument(
                "cannot start a terminal in the background",
                detail="nobody would hold its other end",
                hint='use commands/run, or stdio "spool"',
            )
        if params.user is not None:
            raise Unsupported(
                "cannot start a command of another user in the background", hint="leave out -d or --user"
            )
        sandbox = self._manager.get(params.sandbox)
        descriptors = context.take_descriptors()
        try:
            command, _ = await running.start(sandbox, params, descriptors, keep=True)
        finally:
            _close(descriptors)
        timings.mark("spawn")
        return _started(sandbox, command.id, command.pid, timings)

    async def wait_command(self, params: protocol.CommandRef, _: Context) -> protocol.CommandEnd:
        """Wait for an end."""
        commands = self._manager.get(params.sandbox).commands
        return await commands.wait(commands.get(int(params.command_id, 16)))

    async def signal_command(self, params: protocol.CommandSignalParams, _: Context) -> protocol.Acknowledged:
        """Send a signal."""
        commands = self._manager.get(params.sandbox).commands
        await commands.signal(commands.get(int(params.command_id, 16)), params.signal, _SCOPES[params.scope])
        return protocol.Acknowledged()

    async def kill_command(self, params: protocol.CommandRef, _: Context) -> protocol.CommandEnd:
        """Kill a tree."""
        commands = self._manager.get(params.sandbox).commands
        return await commands.kill(commands.get(int(params.command_id, 16)))

    async def connect_command(self, params: protocol.CommandConnectParams, context: Context) -> protocol.CommandEnd:
        """Follow output, and wait for the end."""
        sandbox = self._manager.get(params.sandbox)
        command = sandbox.commands.get(int(params.command_id, 16))
        running.outlet_of(command)
        offsets = {"stdout": params.stdout_offset, "stderr": params.stderr_offset}
        async with anyio.create_task_group() as following:
            following.start_soon(follow, sandbox, command, context, offsets)
            end = await sandbox.commands.wait(command)
        return end  # noqa: RET504  (a task group may swallow, says the type checker)

    async def command_logs(self, params: protocol.CommandLogsParams, _: Context) -> protocol.CommandLogs:
        """Read kept output."""
        command = self._manager.get(params.sandbox).commands.get(int(params.command_id, 16))
        spool = running.outlet_of(command).spool(params.stream)
        total = spool.bytes_written
        offset = max(0, total - params.length) if params.offset is None else params.offset
        excerpt = await spool.read_range(offset, params.length)
        chunks = [item for item in excerpt.items if isinstance(item, Chunk)]
        return protocol.CommandLogs(
            offset=chunks[0].offset if chunks else excerpt.end,
            data=b"".join(chunk.data for chunk in chunks),
            dropped=[
                protocol.ByteRange(start=item.start, end=item.end)
                for item in excerpt.items
                if isinstance(item, Dropped)
            ],
            bytes_total=total,
            ended=command.end is not None,
        )

    async def send_input(self, params: protocol.CommandInputParams, _: Context) -> protocol.Acknowledged:
        """Write to a stdin or a terminal."""
        await self._outlet(params.sandbox, params.command_id).send(params.data)
        return protocol.Acknowledged()

    async def close_input(self, params: protocol.CommandRef, _: Context) -> protocol.Acknowledged:
        """End a stdin."""
        self._outlet(params.sandbox, params.command_id).end_input()
        return protocol.Acknowledged()

    async def resize_command(self, params: protocol.CommandResizeParams, _: Context) -> protocol.Acknowledged:
        """Change a terminal's size."""
        self._outlet(params.sandbox, params.command_id).resize(params.size.rows, params.size.cols)
        return protocol.Acknowledged()

    def _outlet(self, sandbox: str, command_id: str) -> Outlet:
        return running.outlet_of(self._manager.get(sandbox).commands.get(int(command_id, 16)))

    async def list_commands(self, params: protocol.CommandListParams, _: Context) -> protocol.CommandList:
        """The rows."""
        return protocol.CommandList(commands=self._manager.get(params.sandbox).commands.infos())

    # --- files ----------------------------------------------------------------------------------------

    async def _files(self, params: protocol.PathParams) -> FilesChannel:
        return await self._manager.get(params.sandbox).files()

    async def read_file(self, params: protocol.FileReadParams, _: Context) -> protocol.FileContent:
        """Read."""
        return await files.read(await self._files(params), params)

    async def write_file(self, params: protocol.FileWriteParams, _: Context) -> protocol.FileInfo:
        """Write, whole or not at all."""
        return await files.write(await self._files(params), params)

    async def list_files(self, params: protocol.FileListParams, _: Context) -> protocol.FileList:
        """List a directory."""
        return await files.list_dir(await self._files(params), params)

    async def stat_file(self, params: protocol.FileStatParams, _: Context) -> protocol.FileInfo:
        """Look at one file."""
        return await files.look(await self._files(params), params)

    async def make_dir(self, params: protocol.FileMakeDirParams, _: Context) -> protocol.FileMade:
        """Make a directory."""
        channel = await self._files(params)
        created = await channel.make_dir(files.path_of(params), make_parents=params.make_parents)
        return protocol.FileMade(created=created)

    async def rename_file(self, params: protocol.FileRenameParams, _: Context) -> protocol.Acknowledged:
        """Rename."""
        channel = await self._files(params)
        await channel.rename(files.path_of(params), params.new_path.encode(), no_replace=not params.replace)
        return protocol.Acknowledged()

    async def remove_file(self, params: protocol.FileRemoveParams, _: Context) -> protocol.Acknowledged:
        """Remove."""
        channel = await self._files(params)
        await channel.remove(files.path_of(params), recursive=params.recursive)
        return protocol.Acknowledged()

    # --- images and the daemon ------------------------------------------------------------------------

    async def list_images(self, params: protocol.ImageListParams, _: Context) -> protocol.ImageList:
        """Images by engine."""
        return protocol.ImageList(images=await self._images.list(params.engine))

    async def build_image(self, params: protocol.ImageBuildParams, context: Context) -> protocol.ImageBuilt:
        """Make the default image."""
        return await self._images.build(params, context.progress)

    async def info(self, _: protocol.NoParams, __: Context) -> protocol.DaemonInfo:
        """This daemon."""
        default = self._engines.default()
        return msgspec.structs.replace(
            self._daemon,
            version=__version__,
            engines=[engine_report(info, default=info.name is default) for info in self._engines.infos],
            sandboxes=len(self._manager.all()),
            rss_bytes=psutil.Process().memory_info().rss,
        )

    async def doctor(self, _: protocol.NoParams, __: Context) -> protocol.DoctorReport:
        """Look at the host again, and judge it."""
        checks = doctor.judge(await self._examine())
        return protocol.DoctorReport(healthy=all(check.status != "failure" for check in checks), checks=checks)

    async def config(self, _: protocol.NoParams, __: Context) -> protocol.DaemonConfig:
        """The settings in force."""
        return self._config

    async def shutdown(self, _: protocol.NoParams, __: Context) -> protocol.Acknowledged:
        """Begin the end."""
        self._shut_down()
        return protocol.Acknowledged()


async def follow(sandbox: Sandbox, command: Command, context: Context, offsets: Mapping[str, int]) -> None:
    """Send ``commands/output`` for all streams of a command, until it has ended and all of it was sent."""
    outlet = running.outlet_of(command)
    async with anyio.create_task_group() as streams:
        for name in outlet.spools:
            streams.start_soon(_follow_one, sandbox, command, outlet, name, offsets.get(name, 0), context)


async def _follow_one(
    sandbox: Sandbox, command: Command, outlet: Outlet, name: OutputName, offset: int, context: Context
) -> None:
    dropped_bytes = 0
    with outlet.spool(name).follow(offset, until_ended=outlet.finished) as items:
        async for item in items:
            match item:
                case Dropped():
                    dropped_bytes += item.end - item.start
                case Chunk():
                    output = protocol.CommandOutput(
                        sandbox=sandbox.record.id,
                        command_id=format_command_id(command.id),
                        stream=name,
                        offset=item.offset,
                        data=item.data,
                        dropped_bytes=dropped_bytes,
                    )
                    dropped_bytes = 0
                    await context.deliver(OUTPUT, output)
                case Truncated():
                    pass


def engine_report(info: EngineInfo, *, default: bool) -> protocol.EngineReport:
    """The wire's form of an engine."""
    return protocol.EngineReport(
        name=info.name.value,
        usable=info.usable,
        reason=info.reason,
        hint=info.hint,
        default=default,
        client_version=info.client_version,
        server_version=info.server_version,
        rootless=info.rootless,
        cgroup_version=None if info.cgroup_version is None else info.cgroup_version.value,
        cgroup_manager=info.cgroup_manager,
        controllers=list(info.controllers),
        oci_runtime=info.oci_runtime,
        oci_runtime_reason=info.oci_runtime_reason,
        storage_driver=info.storage_driver,
        socket_path=info.socket_path,
        nofile_hard_max=info.nofile_hard_max,
        capabilities={} if info.capabilities is None else msgspec.structs.asdict(info.capabilities),
        warnings=[warning.what for warning in info.warnings],
    )


def _started(sandbox: Sandbox, command_id: int, pid: int | None, timings: Timings) -> protocol.CommandStarted:
    return protocol.CommandStarted(
        sandbox=sandbox.record.id,
        command_id=format_command_id(command_id),
        pid=pid or 0,
        timings_ms=timings.as_dict(),
    )


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _all_verified(sandbox: Sandbox) -> bool:
    return bool(sandbox.proofs) and all(proof.verified for proof in sandbox.proofs)


def _summary(sandbox: Sandbox) -> protocol.SandboxSummary:
    record = sandbox.record
    return protocol.SandboxSummary(
        id=record.id,
        name=record.name,
        state=record.state.value,
        engine=record.engine,
        image=record.image,
        workspace=None if record.workspace is None else record.workspace.path,
        created_at_ms=record.created_at_ms,
        commands_running=sandbox.commands.running_count,
        verified=_all_verified(sandbox),
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
            path=workspace.path, mode="ro" if workspace.read_only else "rw", mounted=workspace.mounted
        ),
        network=record.network.value,
        limits=limits.reports(sandbox.proofs),
        limits_policy=record.limits_policy,
        verified=_all_verified(sandbox),
        metadata=record.metadata,
        env=record.env,
        created_at_ms=record.created_at_ms,
        ephemeral=record.ephemeral,
        commands_running=sandbox.commands.running_count,
        launch="cold",
        warnings=list(record.warnings),
        timings_ms=timings.as_dict(),
    )


def _metrics(sandbox: Sandbox) -> protocol.SandboxMetrics:
    record = sandbox.record
    reason = ""
    usage = Usage()
    if record.state is State.RUNNING:
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
