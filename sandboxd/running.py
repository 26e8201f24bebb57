"""Running a command in a sandbox: what the caller said, made exact, and what init answers, made plain."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import shlex
import signal
import stat
from collections.abc import Iterator, Mapping, Sequence

import anyio
import msgspec

from runtimes import quantities
from runtimes.engine import Engine
from runtimes.errors import EngineTimeout
from runtimes.init.channel import SpawnFailed
from runtimes.init.wire import InitError, PtySize, Scope, SpawnRequest, Stage
from runtimes.quantities import QuantityError
from sandboxd.admission import cpu_environment
from sandboxd.commands import Command, deadline_at_ms, format_command_id, shown_argv
from sandboxd.failures import CapacityExceeded, CommandNotStarted, Conflict, InvalidArgument, Unsupported
from sandboxd.lifecycle import State
from sandboxd.network.egress import PROXY_ENV
from sandboxd.outlet import Outlet, opening
from sandboxd.protocol import CommandEnd, CommandParams
from sandboxd.records import CommandRecord
from sandboxd.sandbox import HOME, INSIDE_BIN, Sandbox, container_id_of
from sandboxd.timings import Timings, now_ms
from sandboxd.workspace import TARGET

ENV_CHARS_MAX = 128 * 1024
"""Of all variables of a sandbox: what one message to init can hold, with room for a command."""

GRACE_MS_MAX = 5 * 60 * 1000
"""A sandbox that is being stopped can be used for nothing else."""

HARMLESS_DEVICES = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9))
"""/dev/null, zero, full, random and urandom."""

IDENTITY_DEADLINE_S = 5.0
IDENTITY_BYTES_MAX = 64

_BASE_ENV = {"HOME": HOME, "TMPDIR": "/tmp"}  # noqa: S108  (inside the sandbox)
_TERM = "xterm-256color"


class Times(msgspec.Struct, frozen=True):
    """How long a command may take, in seconds."""

    timeout_s: float | None
    grace_s: float


def times_of(params: CommandParams) -> Times:
    """Read timeout and grace.

    Raises:
        InvalidArgument: one of them is no duration.
    """
    return Times(
        None if params.timeout is None else seconds(params.timeout, option="--timeout"),
        grace_seconds(params.grace),
    )


def seconds(value: float | str, *, option: str, ms_max: int = quantities.DURATION_MS_MAX) -> float:
    """Seconds in a quantity such as ``90``, ``1.5`` or ``"90s"``.

    Raises:
        InvalidArgument: it is none.
    """
    try:
        return quantities.parse_duration_ms(str(value), option=option, ms_max=ms_max) / 1000
    except QuantityError as error:
        raise InvalidArgument(str(error)) from None


def grace_seconds(value: float | str) -> float:
    """Seconds between TERM and KILL; none at all is allowed.

    Raises:
        InvalidArgument: it is no duration, or longer than anybody should wait.
    """
    return 0.0 if value in (0, "0", "0s") else seconds(value, option="--grace", ms_max=GRACE_MS_MAX)


def check_env(env: Mapping[str, str]) -> None:
    """Refuse variables that no process could be given. Says which, and never what they hold.

    Raises:
        InvalidArgument: a name or a value that cannot be one, or too much in all.
    """
    for name, value in env.items():
        check_name(name)
        if "\0" in value:
            raise InvalidArgument(f"cannot set the variable {name!r}", detail="its value has a NUL")
    if sum(len(name) + len(value) for name, value in env.items()) > ENV_CHARS_MAX:
        raise InvalidArgument(f"cannot set more than {ENV_CHARS_MAX} characters of variables")


def environment(
    sandbox_env: Mapping[str, str], command_env: Mapping[str, str], *, pty: bool, cpus: Mapping[str, str]
) -> list[bytes]:
    """The variables that a command gets on top of the image's own; what the caller says wins over all others.

    Args:
        sandbox_env: Of the whole sandbox.
        command_env: Of this command.
        pty: It has a terminal.
        cpus: What tells tools how many CPUs there are for them.

    Raises:
        InvalidArgument: a name that cannot be one.
    """
    merged = {**_BASE_ENV, **cpus, **({"TERM": _TERM} if pty else {}), **sandbox_env, **command_env}
    return [f"{check_name(name)}={value}".encode() for name, value in merged.items()]


def check_name(name: str) -> str:
    """Return the name of an environment variable.

    Raises:
        InvalidArgument: it is empty, or has a ``=`` or a NUL.
    """
    if not name or "=" in name or "\0" in name:
        raise InvalidArgument(f"cannot set the variable {name!r}", hint="a name has neither = nor NUL")
    return name


def working_dir(cwd: str | None) -> str:
    """Where a command starts: as given, relative to the workspace."""
    return TARGET if cwd is None else posixpath.join(TARGET, cwd)


def spawn_request(sandbox: Sandbox, params: CommandParams, *, keep: bool) -> SpawnRequest:
    """Make the request for init; ``keep`` is as of ``start``."""
    record = sandbox.record
    return SpawnRequest(
        command_id=sandbox.commands.new_id(),
        argv=[argument.encode() for argument in params.argv],
        env=environment(
            _own_env(sandbox),
            params.env,
            pty=params.pty is not None,
            cpus=cpu_environment(record.limits, len(os.sched_getaffinity(0))),
        ),
        inherit_env=True,
        cwd=working_dir(params.cwd).encode(),
        pty=None if params.pty is None else PtySize(params.pty.rows, params.pty.cols),
        keep_pty=keep,
    )


def _own_env(sandbox: Sandbox) -> dict[str, str]:
    """What a sandbox gives to each of its commands; where it has a way out, the commands are told."""
    record = sandbox.record
    return {
        # Engines set it when they make a container, and a claimed one had another name then.
        **({"HOSTNAME": record.name} if record.launch == "warm" and record.name else {}),
        **(PROXY_ENV if record.egress is not None else {}),
        **record.env,
    }


async def start(
    sandbox: Sandbox, params: CommandParams, descriptors: Sequence[int], *, keep: bool
) -> tuple[Command, int | None]:
    """Start a command; the descriptors stay the caller's.

    Args:
        sandbox: Where.
        params: What.
        descriptors: stdin, stdout, stderr; none for a terminal, for spools, or for /dev/null.
        keep: Write it down, so that it survives the daemon.

    Returns:
        The command, and the terminal's master descriptor where it is for the caller, who closes it.

    Raises:
        CommandNotStarted: the program cannot be executed.
        CapacityExceeded: the sandbox has no process left to give.
    """
    require_running(sandbox)
    times = times_of(params)
    spooled = params.stdio == "spool"
    request = spawn_request(sandbox, params, keep=keep and spooled)
    merged = params.merge_stderr or params.pty is not None
    if keep:
        streams = (("both",) if merged else ("out", "err")) if spooled else ()
        sandbox.note_command(_record(request.command_id, params, times, streams))
    try:
        if spooled:
            command, master = await _start_spooled(sandbox, params, request, times, keep=keep), None
        else:
            for descriptor in descriptors:
                _check_harmless(descriptor)
            with _standard_descriptors(params, descriptors) as passed:
                command, master = await sandbox.commands.start(
                    request, passed, background=keep, timeout_s=times.timeout_s, grace_s=times.grace_s
                )
        sandbox.commands.announce(command)
        return command, master
    except BaseException as error:
        if keep or spooled:
            sandbox.drop_command(request.command_id)
        if isinstance(error, SpawnFailed):
            raise not_started(error, request) from None
        raise


async def _start_spooled(
    sandbox: Sandbox,
    params: CommandParams,
    request: SpawnRequest,
    times: Times,
    *,
    keep: bool,
) -> Command:
    ended = anyio.Event()
    with opening(
        sandbox.spools,
        request.command_id,
        ended=ended,
        user=sandbox.record.user,
        merge=params.merge_stderr,
        stdin=params.stdin == "pipe",
        pty=params.pty is not None,
    ) as opened:
        command, master = await sandbox.commands.start(
            request,
            opened.passed,
            background=keep,
            timeout_s=times.timeout_s,
            grace_s=times.grace_s,
            ended=ended,
        )
        sandbox.commands.take_outlet(command, opened.outlet)
        if master is not None and opened.terminal_writer is not None:
            opened.outlet.take_terminal(master, opened.terminal_writer, sandbox.background)
            opened.terminal_writer = None
    return command


def _record(command_id: int, params: CommandParams, times: Times, streams: tuple[str, ...]) -> CommandRecord:
    return CommandRecord(
        id=command_id,
        argv=tuple(shown_argv(params.argv)),
        started_at_ms=now_ms(),
        deadline_at_ms=deadline_at_ms(times.timeout_s),
        grace_s=times.grace_s,
        streams=streams,
    )


def outlet_of(command: Command) -> Outlet:
    """The kept output of a command.

    Raises:
        Conflict: it was not started with ``stdio = "spool"``.
    """
    if command.outlet is None:
        raise Conflict(
            f"cannot read the output of command {format_command_id(command.id)}",
            detail="it was not kept",
            hint='start it with stdio "spool"',
        )
    return command.outlet


async def resize(sandbox: Sandbox, command: Command, size: PtySize) -> None:
    """Give a command's terminal a size.

    One that it has already has it drawn anew: whoever says its size has just come, and what is left of what was
    written before shows a program that fills the screen only in part.

    Raises:
        Conflict: it has no terminal.
    """
    changed = outlet_of(command).resize(size.rows, size.cols)
    if not changed and sandbox.record.state is State.RUNNING:
        with contextlib.suppress(Conflict, InitError):
            await sandbox.commands.signal(command, signal.SIGWINCH, Scope.TREE)


def require_running(sandbox: Sandbox) -> None:
    """Refuse what only a running sandbox can do.

    Raises:
        Conflict: it does not run, with the reason.
    """
    if sandbox.record.state is not State.RUNNING:
        verb = {State.STOPPED: "start", State.PAUSED: "resume"}.get(sandbox.record.state, "inspect")
        raise Conflict(
            f"cannot use a sandbox that is {sandbox.record.state.value}",
            detail=sandbox.record.state_reason,
            hint=f"sandboxctl {verb} {sandbox.record.id}",
        )


def require_awake(sandbox: Sandbox) -> None:
    """Refuse what would wait for an init that is frozen.

    Raises:
        Conflict: it is paused.
    """
    if sandbox.record.state is State.PAUSED:
        require_running(sandbox)


async def run_as_other_user(
    engine: Engine,
    sandbox: Sandbox,
    params: CommandParams,
    descriptors: Sequence[int],
    timings: Timings,
    *,
    user: str,
) -> CommandEnd:
    """Run a command as another user, through the engine's own exec. The descriptors are its client's, not handed in.

    A timeout ends the engine's client. What it had started inside may go on: the engines offer no way to end it.

    Raises:
        Unsupported: with a terminal.
    """
    require_running(sandbox)
    if params.pty is not None:
        raise Unsupported("cannot give another user a terminal", hint="leave out -t or --user")
    times = times_of(params)
    env = {**cpu_environment(sandbox.record.limits, len(os.sched_getaffinity(0))), **_own_env(sandbox), **params.env}
    check_env(env)
    exit_code: int | None = None
    with _standard_descriptors(params, descriptors) as passed, contextlib.suppress(EngineTimeout):
        exit_code = await engine.exec(
            container_id_of(sandbox),
            params.argv,
            user=user,
            env=list(env.items()),
            working_dir=working_dir(params.cwd),
            descriptors=(passed[0], passed[1], passed[2]),
            timeout_s=times.timeout_s,
        )
    timings.mark("engine")
    return CommandEnd(
        command_id=format_command_id(0),
        exit_code=exit_code,
        signal=None,
        status={None: "timeout", 0: "ok"}.get(exit_code, "nonzero"),  # type: ignore[arg-type]
        oom_kills=None,
        cpu_ms=None,
        wall_ms=timings.as_dict()["total"],
        memory_bytes_peak=None,
        stdout_bytes=None,
        stderr_bytes=None,
        truncated=False,
        timings_ms=timings.as_dict(),
    )


async def identity_inside(sandbox: Sandbox, path: str) -> tuple[int, int] | None:
    """Device and inode of ``path`` as seen inside; None when it cannot be found out.

    Asked by init's own program, before anything else runs inside.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read_fd, False)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    with os.fdopen(read_fd, "rb") as answer:
        try:
            command, _ = await sandbox.commands.start(
                SpawnRequest(
                    command_id=sandbox.commands.new_id(),
                    argv=[f"{INSIDE_BIN}/sandbox-init".encode(), b"--identity", path.encode()],
                    env=[],
                    cwd=b"/",
                ),
                (null, write_fd, null),
                background=False,
                timeout_s=IDENTITY_DEADLINE_S,
                grace_s=0,
            )
        finally:
            os.close(write_fd)
            os.close(null)
        await sandbox.commands.wait_or_kill(command)
        fields = (answer.read(IDENTITY_BYTES_MAX) or b"").split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 and all(map(bytes.isdigit, fields)) else None


@contextlib.contextmanager
def _standard_descriptors(params: CommandParams, descriptors: Sequence[int]) -> Iterator[Sequence[int]]:
    """What the command gets for stdin, stdout and stderr: what the caller passed, or /dev/null."""
    if params.pty is not None or descriptors:
        yield descriptors
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield (null, null, null)
    finally:
        os.close(null)


def _check_harmless(descriptor: int) -> None:
    """Only what is nothing but a stream may be handed in.

    A file can be opened anew through /proc/self/fd, with other rights, and written where it was to be appended; a
    directory leads to all that lies beneath and above it; a terminal gives away what is typed into it later.
    """
    status = os.fstat(descriptor)
    kind = stat.S_IFMT(status.st_mode)
    streams = kind in (stat.S_IFIFO, stat.S_IFSOCK)
    if not streams and not (kind == stat.S_IFCHR and status.st_rdev in HARMLESS_DEVICES):
        raise InvalidArgument(
            "cannot hand this descriptor to a sandbox",
            detail="it is a file, a directory, a terminal or a device, which grants more than a stream",
            hint="pass a pipe or a socket, and copy; for a terminal use pty",
        )


def _exec_hint(program: str) -> str:
    """What was probably meant by a program that is not there."""
    if program.startswith("-"):
        return "flags go before the sandbox: sandboxctl exec [FLAG ...] SANDBOX COMMAND"
    if " " in program and program.isprintable():
        return f"this is one word; for a shell to take it apart: sh -c {shlex.quote(program)}"
    return ""


def not_started(error: SpawnFailed, request: SpawnRequest) -> Exception:
    """The failure that says why init could not start a command."""
    program = request.argv[0].decode()
    name = errno.errorcode.get(error.errno, str(error.errno))
    said = f"{name}: {os.strerror(error.errno)}"
    match error.stage:
        case Stage.EXEC:
            hint = _exec_hint(program) if error.errno == errno.ENOENT else ""
            return CommandNotStarted(f"cannot execute {program!r}", detail=said, hint=hint)
        case Stage.CHDIR:
            return CommandNotStarted(f"cannot enter {request.cwd.decode()!r}", detail=f"working directory: {said}")
        case Stage.FORK | Stage.KEEPER if error.errno in (errno.EAGAIN, errno.ENOMEM):
            return CapacityExceeded(
                "cannot start another process in the sandbox",
                detail=f"its pids or memory limit is reached ({name})",
                hint="sandboxctl stats shows both; sandboxctl update raises them",
            )
        case Stage.ADMIT if error.errno == errno.ENOSPC:
            return CapacityExceeded("cannot run more commands in this sandbox at once", detail=said)
        case _:
            return CommandNotStarted(f"cannot start {program!r}", detail=f"{error.stage.name.lower()}: {said}")
