"""A daemon without engines, for tests of the command line: its sandboxes are names, its commands real processes here.

Run as ``python stub_server.py [--ready-fd N]``; it listens where ``SANDBOXD_SOCKET`` says, until it is told to stop.
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

from sandboxd import failures
from sandboxd import protocol as p
from sandboxd.listener import AlreadyRunning, Listener, open_listener
from sandboxd.server import Context, serve

LIMIT = p.LimitReport(
    name="memory", unit="bytes", requested=1 << 29, reported=None, effective=1 << 29, verified=True, reason=""
)
TIMINGS = {"total": 0.1}


class Stub:
    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._sandboxes: dict[str, p.SandboxInfo] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._numbers = itertools.count(1)
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
            and p.WorkspaceInfo(path=params.workspace.path, mode=params.workspace.mode, mounted="as-is"),
            network=params.network or "none",
            limits=[LIMIT],
            limits_policy=params.limits_policy or "strict",
            verified=params.image != "unverified",
            metadata=params.metadata,
            env=params.env,
            created_at_ms=int(time.time() * 1000),
            ephemeral=params.ephemeral,
            commands_running=0,
            launch="cold",
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
        raise failures.NotFound(f"cannot find {reference!r}", detail="no such sandbox", hint="sandboxctl ls")

    async def sandbox_get(self, params: p.SandboxGetParams, context: Context) -> p.SandboxInfo:
        return self._find(params.sandbox)

    sandbox_start = sandbox_update = sandbox_stop = sandbox_get

    async def sandbox_list(self, params: p.SandboxListParams, context: Context) -> p.SandboxList:
        rows = [
            p.SandboxSummary(
                id=info.id,
                name=info.name,
                state=info.state,
                engine=info.engine,
                image=info.image,
                workspace=info.workspace and info.workspace.path,
                created_at_ms=info.created_at_ms,
                commands_running=0,
                verified=info.verified,
            )
            for info in self._sandboxes.values()
            if params.metadata.items() <= info.metadata.items()
        ]
        return p.SandboxList(sandboxes=rows)

    async def sandbox_kill(self, params: p.SandboxParams, context: Context) -> p.SandboxGone:
        info = self._find(params.sandbox)
        del self._sandboxes[info.id]
        return p.SandboxGone(id=info.id, name=info.name, timings_ms=TIMINGS)

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
            for info in self._sandboxes.values()
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
        command_id, _ = self._spawn(params, context)
        pid = self._processes[command_id].pid
        return p.CommandStarted(sandbox=info.id, command_id=command_id, pid=pid, timings_ms=TIMINGS)

    async def commands_signal(self, params: p.CommandSignalParams, context: Context) -> p.Acknowledged:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._processes[params.command_id].pid, params.signal)
        return p.Acknowledged()

    def _spawn(self, params: p.CommandParams, context: Context) -> tuple[str, int | None]:
        given = list(context.take_descriptors())
        master = None
        if params.pty is not None:
            master, slave = os.openpty()
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", params.pty.rows, params.pty.cols, 0, 0))
            given = [slave]
        stdin, stdout, stderr = given * 3 if params.pty is not None else given or [subprocess.DEVNULL] * 3
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
            if master is not None:
                os.close(master)
            name = "ENOENT" if isinstance(error, FileNotFoundError) else "EACCES"
            raise failures.CommandNotStarted(
                f"cannot execute {params.argv[0]!r}", detail=f"{name}: {error.strerror}"
            ) from None
        finally:
            for number in given:
                os.close(number)
        command_id = f"{next(self._numbers):012x}"
        self._processes[command_id] = process
        return command_id, master

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

    # --- images, daemon

    async def image_list(self, params: p.ImageListParams, context: Context) -> p.ImageList:
        return p.ImageList(images=[self._image(params.engine)])

    async def image_build(self, params: p.ImageBuildParams, context: Context) -> p.ImageBuilt:
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

    async def daemon_shutdown(self, params: p.DaemonShutdownParams, context: Context) -> p.Acknowledged:
        self.stopping.set()
        return p.Acknowledged()


async def _exit_of(process: subprocess.Popen[bytes]) -> None:
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
    stub = Stub(listener)
    async with anyio.create_task_group() as tasks:
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
    with contextlib.suppress(AlreadyRunning), open_listener(os.environ["SANDBOXD_SOCKET"]) as listener:
        os.write(ready, b"ready\n")
        anyio.run(run, listener)
        return
    os.write(ready, b"running\n")


if __name__ == "__main__":
    main()
