"""A daemon without engines, for tests of the command line: its sandboxes are names, its commands real processes here.

Run as ``python stub_server.py [--ready-fd N] [--late FIFO]``; it listens where ``SANDBOXD_SOCKET`` says, until it
is told to stop.
"""

import contextlib
import fcntl
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup

from sandboxd import failures
from sandboxd import protocol as p
from sandboxd.connection import Context
from sandboxd.listener import AlreadyRunning, Listener, open_listener
from sandboxd.server import serve

LIMIT = p.LimitReport(
    name="memory", unit="bytes", requested=1 << 29, reported=None, effective=1 << 29, verified=True, reason=""
)
TIMINGS = {"total": 0.1}
KEPT_BYTES_MAX = 1 << 20


class Kept:
    """What a spooled command wrote to one stream: the last of it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.first = 0
        self.whole = False
        self._changed = anyio.Event()

    @property
    def total(self) -> int:
        return self.first + len(self.data)

    def append(self, data: bytes) -> None:
        """Nothing is the end."""
        self.data += data
        self.whole = self.whole or not data
        excess = max(len(self.data) - KEPT_BYTES_MAX, 0)
        del self.data[:excess]
        self.first += excess
        self._changed.set()
        self._changed = anyio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    def read(self, offset: int, length: int) -> tuple[int, bytes]:
        start = min(max(offset, self.first), self.total)
        return start, bytes(self.data[start - self.first :][:length])


class Spooled:
    """A command that goes on without its caller."""

    def __init__(self, sandbox: str, argv: list[str], stdin: int | None, terminal: int | None) -> None:
        self.sandbox = sandbox
        self.argv = argv
        self.input = terminal if terminal is not None else stdin
        self.terminal = terminal
        self.started_at_ms = int(time.time() * 1000)
        self.streams = {name: Kept() for name in (("stdout",) if terminal is not None else ("stdout", "stderr"))}
        self.end: p.CommandEnd | None = None
        self.ended = anyio.Event()

    def close_input(self) -> None:
        if self.input is not None:
            os.close(self.input)
            self.input = self.terminal = None


def _change(path: str, **fields: Any) -> p.WorkspaceChange:
    plain: dict[str, Any] = {
        "path_bytes": None,
        "kind": "modified",
        "type": "file",
        "old_path": None,
        "old_mode": 0o100644,
        "new_mode": 0o100644,
        "old_size_bytes": 2,
        "new_size_bytes": 2,
        "binary": False,
        "insertions": 0,
        "deletions": 0,
        "patch": None,
        "patch_bytes": None,
        "note": "",
    }
    return p.WorkspaceChange(path=path, **{**plain, **fields})


class Stub:
    def __init__(self, listener: Listener, tasks: TaskGroup) -> None:
        self._listener = listener
        self._tasks = tasks
        self._spooled: dict[str, Spooled] = {}
        self._shells: dict[str, p.ShellInfo] = {}
        self._sandboxes: dict[str, p.SandboxInfo] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._numbers = itertools.count(1)
        self._drained = False
        self.stopping = anyio.Event()

    async def __call__(self, method: str, params: p.Params, context: Context) -> Any:
        handler: Callable[[Any, Context], Awaitable[Any]] = getattr(self, method.replace("/", "_"))
        return await handler(params, context)

    # --- sandboxes

    async def sandbox_create(self, params: p.SandboxCreateParams, context: Context) -> p.SandboxInfo:
        if params.limits.memory == "banana":
            raise failures.InvalidArgument("cannot use memory 'banana'", detail="a size is a number, or such as 512m")
        if params.image == "slow":
            await anyio.sleep_forever()
        if params.image == "no-engine":
            raise failures.EngineUnavailableFailure(
                "cannot reach podman", detail="no socket", hint="sandboxctl doctor"
            )
        number = next(self._numbers)
        info = p.SandboxInfo(
            id=f"{number:08x}{0:024x}",
            name=params.name,
            state="running",
            state_reason="",
            engine=params.engine or "podman",
            image=params.image or "default",
            container_id="c" * 64,
            pid=number,
            user="1000:1000",
            workspace=params.workspace
            and p.WorkspaceInfo(
                path=params.workspace.path,
                path_bytes=params.workspace.path_bytes,
                mode=params.workspace.mode,
                mounted="as-is",
                backend="bind",
            ),
            mounts=[
                p.MountInfo(
                    path=mount.path,
                    path_bytes=mount.path_bytes,
                    target=mount.target,
                    mode=mount.mode,
                    mounted="as-is",
                    reason="",
                )
                for mount in params.mounts
            ],
            network=params.network or "none",
            services=[],
            secrets=[],
            limits=[LIMIT],
            limits_policy=params.limits_policy or "strict",
            verified=params.image != "unverified",
            metadata=params.metadata,
            env=params.env,
            created_at_ms=int(time.time() * 1000),
            ephemeral=params.ephemeral,
            commands_running=0,
            template=params.template,
            launch="cold" if params.launch in ("auto", "cold") else "warm",
            miss_reason="",
            warnings=["the sky is low"] if params.image == "warned" else [],
            timings_ms=TIMINGS,
        )
        self._sandboxes[info.id] = info
        if params.ephemeral:
            context.on_close(lambda: self._sandboxes.pop(info.id, None))
        return info

    def _find(self, reference: str) -> p.SandboxInfo:
        for info in self._sandboxes.values():
            if reference == info.name or info.id.startswith(reference):
                return info
        raise failures.NoSuchSandbox(f"cannot find {reference!r}", detail="no such sandbox", hint="sandboxctl ls")

    async def sandbox_get(self, params: p.SandboxParams, context: Context) -> p.SandboxInfo:
        return self._find(params.sandbox)

    sandbox_start = sandbox_update = sandbox_stop = sandbox_pause = sandbox_resume = sandbox_get

    async def sandbox_connect(self, params: p.SandboxConnectParams, context: Context) -> p.SandboxInfo:
        return self._find(params.sandbox)

    async def sandbox_set_timeout(self, params: p.SandboxTimeoutParams, context: Context) -> p.SandboxLifetime:
        return p.SandboxLifetime(
            id=self._find(params.sandbox).id,
            lifetime_ms=600_000,
            expires_at_ms=int(time.time() * 1000) + 600_000,
            idle_timeout_ms=None,
            on_timeout=params.on_timeout or "kill",
        )

    async def events_subscribe(self, params: p.EventsParams, context: Context) -> p.EventsEnd:
        context.notify("events/begun", p.EventsBegun(next_seq=1))
        context.notify("events/lost", p.EventsLost(first_seq=1, last_seq=6))
        event = p.EventInfo(seq=7, at_ms=0, kind="removed", sandbox="sb-gone", name="box", data={"reason": "old"})
        context.notify("events/event", event)
        return p.EventsEnd(last_seq=7)

    async def audit_query(self, params: p.AuditQueryParams, context: Context) -> p.AuditEntries:
        """One request of a hostile name, and what was asked for as the arguments of another."""
        hostile = p.AuditEntry(
            seq=7,
            at_ms=0,
            kind="request",
            uid=1000,
            pid=42,
            exe="/opt/a b\x1b[2J",
            method="commands/run",
            sandbox="sb-a",
            arguments={"argv": ["echo", "a\nb"], "sandbox": "box"},
            result="not_found",
            duration_ms=1.25,
        )
        asked = msgspec.to_builtins(params)
        begun = p.AuditEntry(seq=8, at_ms=0, kind="begun", data={name: str(value) for name, value in asked.items()})
        return p.AuditEntries(entries=[hostile, begun], more=params.limit == 2)

    async def daemon_metrics(self, params: p.NoParams, context: Context) -> p.DaemonMetrics:
        return p.DaemonMetrics(content_type="text/plain", text="# TYPE a gauge\na 1\n# EOF\n")

    async def audit_verify(self, params: p.NoParams, context: Context) -> p.AuditVerified:
        """Intact, until somebody has a sandbox called tampered."""
        broken = any(info.name == "tampered" for info in self._sandboxes.values())
        problem = p.AuditProblem(
            file="audit-000001.jsonl", line=12, seq=11, kind="changed", detail="\x1b[2J it is not"
        )
        return p.AuditVerified(
            intact=not broken,
            files=1,
            records=20,
            first_seq=1,
            last_seq=20,
            head="ab" * 32,
            gaps=3,
            torn=1,
            problems=[problem] if broken else [],
            problem_count=2 if broken else 0,
        )

    # --- what they did to their projects

    async def workspace_diff(self, params: p.WorkspaceDiffParams, _: Context) -> p.WorkspaceDiff:
        """Three changes, one to a page: text, text that is not UTF-8, and a directory."""
        text = "diff --git a/t b/t\n--- a/t\n+++ b/t\n@@ -1,1 +1,1 @@\n-a\n+\x1b[2Jb\n"
        pages = [
            _change("t\x1b[2J", patch=text if params.patch else None, insertions=1, deletions=1),
            _change("raw", patch_bytes=b"\xff\n" if params.patch else None, insertions=1),
            _change("d", type="dir", kind="added", new_mode=0o40755, old_mode=None),
        ]
        offset = params.offset
        return p.WorkspaceDiff(
            changes=[pages[offset]], total=3, next_offset=offset + 1 if offset < 2 else None, timings_ms={}
        )

    async def workspace_apply(self, params: p.WorkspaceApplyParams, _: Context) -> p.WorkspaceApplied:
        raw = [path.decode("latin-1") for path in params.paths_bytes]
        conflicts = [p.WorkspaceProblem(path="clash", path_bytes=None, reason="it was changed in the project")]
        return p.WorkspaceApplied(
            applied=[*params.paths, *raw],
            applied_total=len(params.paths) + len(raw),
            conflicts=conflicts if params.dry_run or params.force else [],
            failed=[],
            dry_run=params.dry_run,
            timings_ms={},
        )

    async def sandbox_list(self, params: p.SandboxListParams, context: Context) -> p.SandboxList:
        rows = [
            p.SandboxSummary(
                id=info.id,
                name=info.name,
                state=info.state,
                engine=info.engine,
                template=info.template,
                image=info.image,
                workspace=info.workspace and info.workspace.path,
                created_at_ms=info.created_at_ms,
                commands_running=0,
                verified=info.verified,
                metadata=info.metadata,
            )
            for info in self._sandboxes.values()
            if params.metadata.items() <= info.metadata.items()
        ]
        return p.SandboxList(sandboxes=rows)

    async def service_list(self, params: p.NoParams, context: Context) -> p.ServiceList:
        return p.ServiceList(services=[])

    async def sandbox_kill(self, params: p.SandboxKillParams, context: Context) -> p.SandboxGone:
        info = self._find(params.sandbox)
        del self._sandboxes[info.id]
        return p.SandboxGone(id=info.id, name=info.name, gone=params.wait, timings_ms=TIMINGS)

    async def sandbox_verify(self, params: p.SandboxVerifyParams, context: Context) -> p.SandboxVerification:
        info = self._find(params.sandbox)
        held = p.Provocation(limit="memory", held=True, evidence="oom_kill 0 -> 1")
        return p.SandboxVerification(
            id=info.id,
            limits=info.limits,
            provocations=[held] if params.provoke else [],
            verified=info.verified,
            timings_ms=TIMINGS,
        )

    async def sandbox_metrics(self, params: p.SandboxMetricsParams, context: Context) -> p.SandboxMetricsList:
        nothing: dict[str, Any] = dict.fromkeys(p.SandboxMetrics.__struct_fields__)
        rows = [
            p.SandboxMetrics(**nothing | {"id": info.id, "name": info.name, "state": info.state, "reason": "a stub"})
            for info in [self._find(reference) for reference in params.sandboxes] or self._sandboxes.values()
        ]
        return p.SandboxMetricsList(sandboxes=rows)

    # --- commands

    async def commands_run(self, params: p.CommandParams, context: Context) -> p.CommandEnd:
        info = self._find(params.sandbox)
        command_id, master = self._spawn(params, context)
        process = self._processes[command_id]
        started = p.CommandStarted(sandbox=info.id, command_id=command_id, pid=process.pid, timings_ms=TIMINGS)
        context.notify("commands/started", started, [] if master is None else [master])
        seconds = float(str(params.timeout).removesuffix("s")) if params.timeout is not None else None
        try:
            with anyio.move_on_after(seconds) as scope:
                await _exit_of(process)
            return await self._end(command_id, "timeout" if scope.cancelled_caught else None)
        finally:
            _kill(process)

    async def commands_start(self, params: p.CommandParams, context: Context) -> p.CommandStarted:
        info = self._find(params.sandbox)
        if params.stdio == "spool":
            command_id = self._spawn_spooled(params, info.id)
        else:
            command_id, _ = self._spawn(params, context)
        pid = self._processes[command_id].pid
        return p.CommandStarted(sandbox=info.id, command_id=command_id, pid=pid, timings_ms=TIMINGS)

    def _spawn_spooled(self, params: p.CommandParams, sandbox: str) -> str:
        outputs: list[int] = []
        stdin = terminal = None
        if params.pty is not None:
            terminal, slave = os.openpty()
            _resize(slave, params.pty)
            command_id = self._popen(params, [slave] * 3)
            outputs = [os.dup(terminal)]
        else:
            (out, out_end), (err, err_end) = os.pipe(), os.pipe()
            stdin_end, stdin = os.pipe() if params.stdin == "pipe" else (os.open(os.devnull, os.O_RDONLY), None)
            command_id = self._popen(params, [stdin_end, out_end, err_end])
            outputs = [out, err]
        spooled = self._spooled[command_id] = Spooled(sandbox, params.argv, stdin, terminal)
        self._tasks.start_soon(self._see_to_end, command_id, spooled, outputs)
        return command_id

    async def _see_to_end(self, command_id: str, spooled: Spooled, outputs: list[int]) -> None:
        async with anyio.create_task_group() as copying:
            for number, kept in zip(outputs, spooled.streams.values(), strict=True):
                copying.start_soon(_copy, number, kept)
        await _exit_of(self._processes[command_id])
        totals = {f"{name}_bytes": kept.total for name, kept in spooled.streams.items()}
        spooled.end = msgspec.structs.replace(await self._end(command_id, None), **totals)
        spooled.close_input()
        spooled.ended.set()

    def _kept(self, command_id: str) -> Spooled:
        if command_id not in self._spooled:
            raise failures.NotFound(f"cannot find command {command_id}", detail="it never was")
        return self._spooled[command_id]

    async def commands_list(self, params: p.CommandListParams, context: Context) -> p.CommandList:
        info = self._find(params.sandbox)
        rows = [
            p.CommandInfo(
                command_id=command_id,
                pid=self._processes[command_id].pid,
                argv=spooled.argv,
                state="running" if spooled.end is None else "ended",
                started_at_ms=spooled.started_at_ms,
                end=spooled.end,
            )
            for command_id, spooled in self._spooled.items()
            if spooled.sandbox == info.id
        ]
        return p.CommandList(commands=rows)

    async def commands_wait(self, params: p.CommandRef, context: Context) -> p.CommandEnd:
        spooled = self._kept(params.command_id)
        await spooled.ended.wait()
        assert spooled.end is not None
        return spooled.end

    async def commands_kill(self, params: p.CommandRef, context: Context) -> p.CommandEnd:
        self._kept(params.command_id)
        _kill(self._processes[params.command_id])
        return await self.commands_wait(params, context)

    async def commands_connect(self, params: p.CommandConnectParams, context: Context) -> p.CommandEnd:
        spooled = self._kept(params.command_id)
        offsets = {"stdout": params.stdout_offset, "stderr": params.stderr_offset}
        async with anyio.create_task_group() as following:
            for name, kept in spooled.streams.items():
                following.start_soon(_follow, kept, name, offsets[name], params.command_id, context)
        return await self.commands_wait(p.CommandRef(sandbox="any", command_id=params.command_id), context)

    async def commands_logs(self, params: p.CommandLogsParams, context: Context) -> p.CommandLogs:
        spooled = self._kept(params.command_id)
        if params.stream not in spooled.streams:
            raise failures.NotFound(f"cannot read {params.stream} of this command", detail="it is a terminal")
        kept = spooled.streams[params.stream]
        asked = max(kept.total - params.length, 0) if params.offset is None else params.offset
        offset, data = kept.read(asked, params.length)
        dropped = [p.ByteRange(start=asked, end=offset)] if asked < offset else []
        return p.CommandLogs(
            offset=offset, data=data, dropped=dropped, bytes_total=kept.total, ended=spooled.end is not None
        )

    def _open_input(self, command_id: str) -> int:
        number = self._kept(command_id).input
        if number is None:
            raise failures.Conflict("cannot write to the command", detail="it has no open stdin", hint="use -i")
        return number

    async def commands_send_stdin(self, params: p.CommandInputParams, context: Context) -> p.Acknowledged:
        number = self._open_input(params.command_id)
        # The later of two requests would overtake this one, if they were not sent one after the other.
        await anyio.sleep(0.02 if len(params.data) > 1 else 0)
        os.write(number, params.data)
        return p.Acknowledged()

    async def commands_close_stdin(self, params: p.CommandRef, context: Context) -> p.Acknowledged:
        self._open_input(params.command_id)
        self._kept(params.command_id).close_input()
        return p.Acknowledged()

    async def commands_resize(self, params: p.CommandResizeParams, context: Context) -> p.Acknowledged:
        terminal = self._kept(params.command_id).terminal
        if terminal is None:
            raise failures.Conflict("cannot resize", detail="the command has no terminal")
        _resize(terminal, params.size)
        return p.Acknowledged()

    async def commands_signal(self, params: p.CommandSignalParams, context: Context) -> p.Acknowledged:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._processes[params.command_id].pid, params.signal)
        return p.Acknowledged()

    def _spawn(self, params: p.CommandParams, context: Context) -> tuple[str, int | None]:
        given = list(context.take_descriptors())
        master = None
        if params.pty is not None:
            master, slave = os.openpty()
            _resize(slave, params.pty)
            given = [slave] * 3
        try:
            return self._popen(params, given or [os.open(os.devnull, os.O_RDWR)] * 3), master
        except failures.CommandNotStarted:
            if master is not None:
                os.close(master)
            raise

    def _popen(self, params: p.CommandParams, given: list[int]) -> str:
        """Start a process with these descriptors, which are closed here, and return its id."""
        stdin, stdout, stderr = given
        try:
            process = subprocess.Popen(
                params.argv,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={"PATH": os.environ["PATH"], **params.env},
                cwd=params.cwd,
                start_new_session=True,
                preexec_fn=_take_terminal if params.pty is not None else None,
            )
        except OSError as error:
            name = "ENOENT" if isinstance(error, FileNotFoundError) else "EACCES"
            raise failures.CommandNotStarted(
                f"cannot execute {params.argv[0]!r}", detail=f"{name}: {error.strerror}"
            ) from None
        finally:
            for number in set(given):
                os.close(number)
        command_id = f"{next(self._numbers):012x}"
        self._processes[command_id] = process
        return command_id

    async def _end(self, command_id: str, status: Any) -> p.CommandEnd:
        process = self._processes[command_id]
        _kill(process)
        code = process.wait()
        if status is None:
            status = "ok" if code == 0 else "nonzero" if code > 0 else "signaled"
        return p.CommandEnd(
            command_id=command_id,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            status=status,
            oom_kills=0,
            cpu_ms=1.0,
            wall_ms=1.0,
            memory_bytes_peak=None,
            stdout_bytes=None,
            stderr_bytes=None,
            truncated=False,
            timings_ms=TIMINGS,
        )

    # --- shells: they keep their directory, and nothing else

    async def shells_open(self, params: p.ShellOpenParams, context: Context) -> p.ShellInfo:
        shell_id = f"{next(self._numbers):x}".rjust(12, "5")
        info = p.ShellInfo(
            sandbox=self._find(params.sandbox).id,
            shell_id=shell_id,
            shell=params.shell,
            state="idle",
            cwd=params.cwd or "/",
            opened_at_ms=int(time.time() * 1000),
            command_id=None,
        )
        self._shells[shell_id] = info
        return info

    async def shells_list(self, params: p.ShellListParams, context: Context) -> p.ShellList:
        sandbox = self._find(params.sandbox).id
        return p.ShellList(shells=[info for info in self._shells.values() if info.sandbox == sandbox])

    async def shells_run(self, params: p.ShellRunParams, context: Context) -> p.ShellEnd:
        """``hang`` cannot be interrupted, and ``exit`` ends the shell."""
        info = self._shell(params)
        command_id = f"{next(self._numbers):012x}"
        code, written, cwd = -9, (b"", b""), info.cwd
        if params.text != "hang":
            script = f"cd {info.cwd}; . /proc/self/fd/0; code=$?; pwd >&2; exit $code"
            ran = await anyio.run_process(["sh", "-c", script], input=params.text.encode(), check=False)
            stderr, _, last = ran.stderr.removesuffix(b"\n").rpartition(b"\n")
            code, written, cwd = ran.returncode, (ran.stdout, stderr), last.decode()
        if params.follow:
            for name, data in zip(("stdout", "stderr"), written, strict=True):
                output = p.CommandOutput(
                    sandbox=info.sandbox,
                    command_id=command_id,
                    stream=name,  # type: ignore[arg-type]
                    offset=0,
                    data=data,
                    dropped_bytes=0,
                )
                context.notify("commands/output", output)
        ended, hung = params.text.startswith("exit"), params.text == "hang"
        self._shells[info.shell_id] = msgspec.structs.replace(info, cwd=cwd)
        if ended:
            del self._shells[info.shell_id]
        full = p.Problem(kind="disk_full", detail="/tmp has no room left", hint="remove files below /tmp")
        return p.ShellEnd(
            command_id=command_id,
            exit_code=None if hung else code,
            signal=9 if hung else None,
            status="timeout" if hung else "nonzero" if code else "ok",
            oom_kills=0,
            cpu_ms=None,
            wall_ms=1.0,
            memory_bytes_peak=None,
            stdout_bytes=len(written[0]),
            stderr_bytes=len(written[1]),
            truncated=False,
            timings_ms=TIMINGS,
            problems=[full] if code == 28 else [],
            shell_id=info.shell_id,
            ended=ended,
            interrupted=hung,
            restarted=hung,
            restored=hung,
            cwd=cwd,
        )

    async def shells_interrupt(self, params: p.ShellRef, context: Context) -> p.ShellInterrupted:
        self._shell(params)
        return p.ShellInterrupted(interrupted=False, restarted=False)

    async def shells_close(self, params: p.ShellRef, context: Context) -> p.Acknowledged:
        del self._shells[self._shell(params).shell_id]
        return p.Acknowledged()

    def _shell(self, params: p.ShellRef | p.ShellRunParams) -> p.ShellInfo:
        self._find(params.sandbox)
        if params.shell_id not in self._shells:
            raise failures.NotFound(f"cannot find shell {params.shell_id}", detail="it has ended, or never was")
        return self._shells[params.shell_id]

    # --- pools: two slots, once somebody has a sandbox of the template

    def _warm(self) -> int:
        return 2 if not self._drained and any(info.template == "pooled" for info in self._sandboxes.values()) else 0

    async def pool_list(self, params: p.NoParams, context: Context) -> p.PoolList:
        row = p.PoolInfo(
            template="pooled",
            engine="podman",
            image="default",
            user="1000:1000",
            workspace=None,
            min=2,
            max=4,
            target=2,
            warm=self._warm(),
            filling=0,
            waiting=0,
            drained=self._drained,
            made=2,
            hits=0,
            misses={},
            lost=0,
            ready_ms=None,
            failure="",
        )
        return p.PoolList(pools=[row])

    async def pool_drain(self, params: p.TemplateParams, context: Context) -> p.PoolDrained:
        drained = self._warm()
        self._drained = True
        return p.PoolDrained(drained=drained)

    # --- images, daemon

    async def image_list(self, params: p.ImageListParams, context: Context) -> p.ImageList:
        return p.ImageList(images=[self._image(params.engine)])

    async def image_build(self, params: p.ImageBuildParams, context: Context) -> p.ImageBuilt:
        if params.reference == "present":
            return p.ImageBuilt(images=[self._image(params.engine)], source="present", timings_ms=TIMINGS)
        context.progress("copying files", done=1, total=2)
        context.progress("copying files", done=2, total=2)
        context.progress("importing")
        return p.ImageBuilt(images=[self._image(params.engine)], source="busybox", timings_ms=TIMINGS)

    def _image(self, engine: str | None) -> p.ImageInfo:
        return p.ImageInfo(
            engine=engine or "podman", image_id="sha256:" + "a" * 64, tags=["default"], size_bytes=1, created_at_ms=1
        )

    async def daemon_info(self, params: p.NoParams, context: Context) -> p.DaemonInfo:
        return p.DaemonInfo(
            pid=os.getpid(),
            version="0.0.0",
            protocol_version=p.PROTOCOL_VERSION,
            socket=self._listener.path,
            state_dir="/nowhere",
            started_at_ms=1,
            engines=[],
            sandboxes=len(self._sandboxes),
            rss_bytes=1,
        )

    async def daemon_doctor(self, params: p.NoParams, context: Context) -> p.DoctorReport:
        check = p.Check(name="memory controller", status="failure", detail="not delegated", fix="systemctl fix-it")
        return p.DoctorReport(healthy=False, checks=[check])

    async def daemon_config(self, params: p.NoParams, context: Context) -> p.DaemonConfig:
        return p.DaemonConfig(
            entries=[p.ConfigEntry(key="image", value="default", origin="default", description="What it is.")]
        )

    async def daemon_reload(self, params: p.NoParams, context: Context) -> p.DaemonReloaded:
        return p.DaemonReloaded(changed=["defaults.memory"], waiting=["chroma.port"])

    async def daemon_handover(self, params: p.NoParams, context: Context) -> p.Acknowledged:
        self.stopping.set()
        return p.Acknowledged()

    async def daemon_shutdown(self, params: p.NoParams, context: Context) -> p.Acknowledged:
        self.stopping.set()
        return p.Acknowledged()


async def _copy(number: int, kept: Kept) -> None:
    try:
        while not kept.whole:
            await anyio.wait_readable(number)
            try:
                kept.append(os.read(number, 65536))
            except OSError:
                kept.append(b"")
    finally:
        os.close(number)


async def _follow(kept: Kept, name: Any, offset: int, command_id: str, context: Context) -> None:
    while True:
        start, data = kept.read(offset, 65536)
        if data:
            output = p.CommandOutput(
                sandbox="any",
                command_id=command_id,
                stream=name,
                offset=start,
                data=data,
                dropped_bytes=start - offset,
            )
            await context.deliver("commands/output", output)
            offset = start + len(data)
        elif kept.whole:
            return
        else:
            await kept.changed()


def _resize(terminal: int, size: p.PtySize) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", size.rows, size.cols, 0, 0))


async def _exit_of(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is not None:
        return
    pidfd = os.pidfd_open(process.pid)
    try:
        await anyio.wait_readable(pidfd)
    finally:
        os.close(pidfd)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


async def run(listener: Listener) -> None:
    async with anyio.create_task_group() as tasks:
        stub = Stub(listener, tasks)
        tasks.start_soon(_serve, listener, stub)
        await stub.stopping.wait()
        tasks.cancel_scope.cancel()


async def _serve(listener: Listener, stub: Stub) -> None:
    await serve(listener.socket, stub)


def main() -> None:
    ready = int(sys.argv[sys.argv.index("--ready-fd") + 1]) if "--ready-fd" in sys.argv else 1
    if "--broken" in sys.argv:
        error = {"type": "engine_unavailable", "brief": "cannot find an engine", "detail": "none", "hint": "get one"}
        os.write(ready, f"error: {json.dumps(error)}\n".encode())
        return
    if "--silent" in sys.argv:
        print("it hurts", flush=True)
        return
    if "--late" in sys.argv:
        # A pipe with a name: until somebody has opened it for writing.
        with open(sys.argv[sys.argv.index("--late") + 1], "rb"):
            pass
    with contextlib.suppress(AlreadyRunning), open_listener(os.environ["SANDBOXD_SOCKET"]) as listener:
        os.write(ready, b"ready\n")
        anyio.run(run, listener)
        return
    os.write(ready, b"running\n")


if __name__ == "__main__":
    main()
