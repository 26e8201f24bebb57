"""What the Python client takes and gives: plain values, and how they are read from replies and put into requests."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from sandboxd.client.errors import InvalidArgumentException, NotFoundException

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

SHELL = "/bin/sh"
LOGIN_SHELL = (
    SHELL,
    "-c",
    f"if command -v bash >/dev/null; then exec bash -i -l; fi; exec {SHELL} -i -l",
)
"""What a terminal runs unless told otherwise: the best shell that the image has."""

COMMAND_TIMEOUT_S = 60.0
"""For commands that are waited for. Those in the background have none unless they are given one."""

LOOPBACK = "127.0.0.1"
MIB_BYTES = 1024 * 1024

SIGNAL_BASE = 128
"""A shell's way to put the number of a signal into an exit code."""

_ERRORS = {"oom": "out of memory", "killed": "killed", "timeout": "timed out", "lost": "the sandbox went away"}

Quantity = int | float | str
Env = dict[str, str]


class LimitOptions(TypedDict, total=False):
    """Limits as ``LimitsParams`` of the protocol has them: numbers, or text such as ``"512m"``."""

    memory: Quantity
    cpus: Quantity
    pids: Quantity
    cpuset: str
    shm: Quantity
    tmp: Quantity
    nofile: Quantity
    limits_policy: Literal["strict", "degraded"]


class CreateOptions(LimitOptions, total=False):
    """What a sandbox is made with, beside its template, metadata and variables."""

    name: str
    image: str
    """Another image than the template's, or the configured one."""
    launch: Literal["auto", "warm", "wait", "cold"]
    """Whether a warm slot is to be used: one if there is one, one or fail, one as soon as there is one, none."""
    wait: Quantity
    """How long ``launch="wait"`` may wait, in seconds."""
    engine: Literal["podman", "docker"]
    workspace: str | os.PathLike[str]
    """A directory of the host, seen at /workspace."""
    read_only: bool
    """The workspace cannot be written to."""
    workspace_mode: Literal["rw", "ro", "overlay", "copy"]
    """``overlay`` and ``copy``: the directory itself is never touched."""
    network: Literal["none", "allow", "full"]
    allow_internet_access: bool
    """``network``, as others call it."""
    allow: Sequence[str]
    """Rules of what it may reach through its proxy, such as ``"pypi"`` or ``"*.example.org:443"``."""
    deny: Sequence[str]
    inject: Sequence[str]
    """What its proxy adds to requests, such as ``"api.example.com Authorization: Bearer {NAME}"``: secrets that the
    sandbox does not know."""
    services: Sequence[str]
    """What it finds on its loopback, such as ``"chroma"`` or ``"chroma=private"``."""
    secrets: Sequence[str]
    """Names of secrets that it finds as files at /run/secrets."""
    timeout: Quantity
    """How long it lasts, in seconds; ``"none"``: until it is killed."""
    idle_timeout: Quantity
    """How long nothing may happen in it, in seconds."""
    on_timeout: Literal["kill", "pause"]
    """What happens then."""
    request_timeout: float


@dataclass(frozen=True, slots=True)
class PtySize:
    """A terminal's size in characters."""

    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class SandboxQuery:
    """Which sandboxes to list: those with all of this metadata, in one of these states."""

    metadata: Env = field(default_factory=dict)
    state: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class LimitReport:
    """One limit: what was asked, what the engine says, what the kernel enforces."""

    name: str
    unit: str
    requested: int | str | None
    reported: int | str | None
    effective: int | str | None
    verified: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with a sandbox, and makes commands fail."""

    kind: str
    """``init_gone``, ``disk_full``, ``pids_exhausted`` or ``memory_at_limit``."""
    detail: str
    hint: str


@dataclass(frozen=True, slots=True)
class SandboxInfo:
    """Everything about one sandbox."""

    sandbox_id: str
    template_id: str
    """The name of its template."""
    image: str
    name: str | None
    metadata: Env
    started_at: datetime
    state: str
    state_reason: str
    engine: str
    network: str
    workspace: str | None
    envs: Env
    user: str
    limits: list[LimitReport]
    verified: bool
    warnings: list[str]
    problems: list[Problem]
    timings_ms: dict[str, float]
    launch: str
    """``warm``: it was a slot before; else ``cold``."""
    end_at: datetime | None
    """When its lifetime is over; None: never, or not while it is paused."""
    idle_timeout: float | None
    """Seconds."""
    on_timeout: str

    @property
    def cpu_count(self) -> float | None:
        """How many CPUs it may use; None: no limit of its own was proven."""
        millis = self._effective("cpus")
        return None if millis is None else millis / 1000

    @property
    def memory_mb(self) -> int | None:
        """How much memory it may use, in MiB; None: no limit of its own was proven."""
        limit = self._effective("memory")
        return None if limit is None else limit // MIB_BYTES

    def _effective(self, name: str) -> int | None:
        for limit in self.limits:
            if limit.name == name and isinstance(limit.effective, int):
                return limit.effective
        return None


@dataclass(frozen=True, slots=True)
class ListedSandbox:
    """One row of the list."""

    sandbox_id: str
    template_id: str
    image: str
    name: str | None
    metadata: Env
    started_at: datetime
    state: str
    engine: str
    workspace: str | None
    commands_running: int
    verified: bool
    end_at: datetime | None
    problems: list[Problem]


class SandboxPaginator(list[ListedSandbox]):
    """Sandboxes: a list, and for code that turns pages one page."""

    def __init__(self, listed: Iterable[ListedSandbox] = ()) -> None:
        super().__init__(listed)
        self._has_next = True

    @property
    def has_next(self) -> bool:
        """Whether the page was not yet taken."""
        return self._has_next

    def next_items(self) -> list[ListedSandbox]:
        """All of them; after that, none."""
        page = list(self) if self._has_next else []
        self._has_next = False
        return page


@dataclass(frozen=True, slots=True)
class SandboxMetrics:
    """Usage, read from the control group. None means unknown, never zero."""

    timestamp: datetime
    state: str
    cpu_used_pct: float | None
    cpu_count: float | None
    mem_used: int | None
    mem_total: int | None
    mem_peak: int | None
    pids: int | None
    pids_max: int | None
    oom_kills: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Provocation:
    """One limit, run into on purpose. ``held`` is None where that could not be done."""

    limit: str
    held: bool | None
    evidence: str


@dataclass(frozen=True, slots=True)
class SandboxVerification:
    """The proof that the limits hold."""

    verified: bool
    limits: list[LimitReport]
    provocations: list[Provocation]


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One command of a sandbox."""

    pid: int | None
    command_id: str
    cmd: str
    args: list[str]
    state: str
    """``running``, ``lingering`` (it ended, and left processes behind) or ``ended``."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended, and what it wrote."""

    stdout: str
    stderr: str
    exit_code: int
    """128 and the number of the signal, where one ended it."""
    error: str | None
    """Why it ended, where the exit code does not say it."""
    status: str
    """``ok nonzero signaled timeout oom killed lost``, by the control group's counters."""
    signal: int | None
    cpu_ms: float | None
    wall_ms: float
    memory_bytes_peak: int | None
    oom_kills: int | None
    truncated: bool
    """Not all of what it wrote was kept."""
    stdout_bytes: bytes
    stderr_bytes: bytes
    stdout_bytes_total: int | None
    """How many it wrote, kept or not; None where nobody counted."""
    stderr_bytes_total: int | None
    problems: list[Problem]
    """Of a command that failed: what is wrong with its sandbox."""


@dataclass(frozen=True, slots=True)
class ShellResult(CommandResult):
    """How a text ended that a shell evaluated, and what became of the shell."""

    shell_ended: bool
    """The text has ended the shell: by ``exit``, ``exec`` or ``set -e``."""
    interrupted: bool
    restarted: bool
    """The shell was lost, and a new one is in its place, without functions, aliases and unexported variables."""
    restored: bool
    """The new one has the working directory and the exported variables of after the run before."""
    cwd: str | None


@dataclass(frozen=True, slots=True)
class ShellInfo:
    """One shell of a sandbox."""

    shell_id: str
    shell: str
    state: str
    """``idle`` or ``busy``."""
    cwd: str | None


# --- requests


def given(**fields: object) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


_NAMES = ("allow", "deny", "inject", "services", "secrets")
_LIMITS = ("memory", "cpus", "pids", "cpuset", "shm", "tmp", "nofile")


def _refuse_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """What nobody reads would be left out without a word, and a limit with it.

    Raises:
        InvalidArgumentException: There is no option of this name.
    """
    unknown = [name for name in options if name not in known]
    if not unknown:
        return
    from sandboxd.spelling import nearest

    names = sorted(known)
    near = nearest(unknown[0], names)
    hint = f"did you mean {near}?" if near else f"one of {' '.join(names)}"
    raise InvalidArgumentException(f"unknown option {unknown[0]!r}", hint=hint, type="invalid_argument")


def update_params(options: LimitOptions) -> dict[str, Any]:
    """What ``sandbox/update`` is to change.

    Raises:
        InvalidArgumentException: There is no limit of this name.
    """
    _refuse_unknown(options, LimitOptions.__optional_keys__)
    return _limits_params(options)


def _limits_params(options: LimitOptions) -> dict[str, Any]:
    """``limits`` and ``limits_policy`` of a request."""
    values: dict[str, Any] = {**options}
    limits = given(**{name: values.get(name) for name in _LIMITS})
    return given(limits=limits, limits_policy=options.get("limits_policy"))


def _names(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """The options that are several texts; one text alone would be taken for its letters.

    Raises:
        InvalidArgumentException: One is.
    """
    for name in _NAMES:
        if isinstance(values.get(name), str):
            raise InvalidArgumentException(
                f"cannot use {values[name]!r} for {name}", hint=f"{name}=[{values[name]!r}]"
            )
    return {name: list(values[name]) for name in _NAMES if values.get(name) is not None}


def create_params(
    template: str | None, metadata: Env | None, envs: Env | None, options: CreateOptions
) -> dict[str, Any]:
    """Params of ``sandbox/create``.

    Raises:
        InvalidArgumentException: There is no such option, or two contradict each other.
    """
    _refuse_unknown(options, CreateOptions.__optional_keys__)
    workspace = options.get("workspace")
    if workspace is None and options.get("read_only"):
        raise InvalidArgumentException("cannot make a workspace read-only", "there is none", "give workspace")
    internet = options.get("allow_internet_access")
    network = options.get("network")
    if internet is not None:
        if network is not None and internet != (network == "full"):
            raise InvalidArgumentException(
                f"cannot use network {network!r} with allow_internet_access={internet}", hint="give one of them"
            )
        network = "full" if internet else "none"
    return given(
        template=template,
        image=options.get("image"),
        launch=options.get("launch"),
        wait=options.get("wait"),
        metadata=metadata,
        env=envs,
        name=options.get("name"),
        engine=options.get("engine"),
        network=network,
        **_names({**options}),
        lifetime=options.get("timeout"),
        idle_timeout=options.get("idle_timeout"),
        on_timeout=options.get("on_timeout"),
        workspace=None
        if workspace is None
        else {
            "path": os.path.abspath(os.path.expanduser(workspace)),
            "mode": options.get("workspace_mode") or ("ro" if options.get("read_only") else "rw"),
        },
        **_limits_params(options),
    )


def command_params(
    sandbox_id: str, cmd: str | Sequence[str], envs: Env | None, cwd: str | None, timeout: float | None
) -> dict[str, Any]:
    """Params of ``commands/run`` and ``commands/start``. Text is for the shell, a list is run as it is."""
    argv = [SHELL, "-c", cmd] if isinstance(cmd, str) else list(cmd)
    return given(sandbox=sandbox_id, argv=argv, env=envs, cwd=cwd, timeout=timeout or None)


def input_bytes(stdin: bool | str | bytes | None) -> bytes | None:
    """What a command is given to read; None if that is somebody else's business, or nothing."""
    return stdin.encode() if isinstance(stdin, str) else stdin if isinstance(stdin, bytes) else None


def run_params(stdin: bool | str | bytes | None) -> dict[str, Any]:
    """What ``commands/run`` is asked for by who wants the output while it comes."""
    piped = stdin is not None and stdin is not False
    return {"stdio": "spool", "follow": True, **given(stdin="pipe" if piped else None)}


def check_background(stdin: object) -> None:
    """Refuse what only a caller that waits can do.

    Raises:
        InvalidArgumentException: It is to be given its whole stdin.
    """
    if isinstance(stdin, str | bytes):
        raise InvalidArgumentException(
            "cannot give a command in the background its stdin at once", hint="stdin=True, then send_stdin"
        )


def list_params(query: SandboxQuery | None) -> dict[str, Any]:
    """Params of ``sandbox/list``."""
    return {} if query is None else {"metadata": query.metadata}


@contextlib.contextmanager
def memory_files(stdin: bytes | None) -> Iterator[list[int]]:
    """Descriptors for stdin, stdout and stderr of a command whose output is read when it has ended."""
    with contextlib.ExitStack() as opened:
        files = []
        for name in ("stdin", "stdout", "stderr"):
            files.append(os.memfd_create(name))
            opened.callback(os.close, files[-1])
        with open(files[0], "wb", closefd=False) as file:
            file.write(stdin or b"")
        os.lseek(files[0], 0, os.SEEK_SET)
        yield files


def read_files(files: Sequence[int]) -> tuple[bytes, bytes]:
    """What was written to stdout and to stderr."""
    stdout, stderr = (_read_whole(number) for number in files[1:])
    return stdout, stderr


def _read_whole(number: int) -> bytes:
    os.lseek(number, 0, os.SEEK_SET)
    with open(number, "rb", closefd=False) as file:
        return file.read()


# --- replies


def started_at(reply: Mapping[str, Any]) -> datetime:
    """When a sandbox was made."""
    return datetime.fromtimestamp(reply["created_at_ms"] / 1000, UTC)


def end_at(reply: Mapping[str, Any]) -> datetime | None:
    """When the lifetime of a sandbox is over."""
    expires_at_ms = reply["expires_at_ms"]
    return None if expires_at_ms is None else datetime.fromtimestamp(expires_at_ms / 1000, UTC)


def host_of(forwards: Sequence[Mapping[str, Any]], port: int) -> str | None:
    """The place on this host's own loopback that leads to a port inside; None: none of these does."""
    for forward in forwards:
        if forward["port"] == port and forward["address"] == LOOPBACK and not forward["problem"]:
            return f"{LOOPBACK}:{forward['host_port']}"
    return None


def limit_reports(reply: Mapping[str, Any]) -> list[LimitReport]:
    """The limits in a reply."""
    names = LimitReport.__slots__
    return [LimitReport(**{name: limit[name] for name in names}) for limit in reply["limits"]]


def problems_of(reply: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a sandbox, as a reply about it or its command says; an older daemon says nothing."""
    return [Problem(**problem) for problem in reply.get("problems", ())]


def sandbox_info(reply: Mapping[str, Any]) -> SandboxInfo:
    """Read a ``SandboxInfo`` of the protocol."""
    return SandboxInfo(
        sandbox_id=reply["id"],
        template_id=reply["template"],
        image=reply["image"],
        name=reply["name"],
        metadata=reply["metadata"],
        started_at=started_at(reply),
        state=reply["state"],
        state_reason=reply["state_reason"],
        engine=reply["engine"],
        network=reply["network"],
        workspace=(reply["workspace"] or {}).get("path"),
        envs=reply["env"],
        user=reply["user"],
        limits=limit_reports(reply),
        verified=reply["verified"],
        warnings=reply["warnings"],
        problems=problems_of(reply),
        timings_ms=reply["timings_ms"],
        launch=reply["launch"],
        end_at=end_at(reply),
        idle_timeout=None if reply["idle_timeout_ms"] is None else reply["idle_timeout_ms"] / 1000,
        on_timeout=reply["on_timeout"],
    )


def listed_sandboxes(reply: Mapping[str, Any], query: SandboxQuery | None) -> list[ListedSandbox]:
    """Read a ``SandboxList``, and keep the rows in the states that are asked for."""
    states = None if query is None else query.state
    return [
        ListedSandbox(
            sandbox_id=row["id"],
            template_id=row["template"],
            image=row["image"],
            name=row["name"],
            metadata=row.get("metadata", {}),
            started_at=started_at(row),
            state=row["state"],
            engine=row["engine"],
            workspace=row["workspace"],
            commands_running=row["commands_running"],
            verified=row["verified"],
            end_at=end_at(row),
            problems=problems_of(row),
        )
        for row in reply["sandboxes"]
        if states is None or row["state"] in states
    ]


def sandbox_metrics(reply: Mapping[str, Any]) -> SandboxMetrics:
    """Read the only row of a ``SandboxMetricsList``."""
    [row] = reply["sandboxes"]
    return SandboxMetrics(
        timestamp=datetime.now(UTC),
        state=row["state"],
        cpu_used_pct=row["cpu_percent"],
        cpu_count=None if row["cpu_millis"] is None else row["cpu_millis"] / 1000,
        mem_used=row["memory_bytes"],
        mem_total=row["memory_bytes_max"],
        mem_peak=row["memory_bytes_peak"],
        pids=row["pids"],
        pids_max=row["pids_max"],
        oom_kills=row["oom_kills"],
        reason=row["reason"],
    )


def verification(reply: Mapping[str, Any]) -> SandboxVerification:
    """Read a ``SandboxVerification`` of the protocol."""
    return SandboxVerification(
        verified=reply["verified"],
        limits=limit_reports(reply),
        provocations=[
            Provocation(limit=row["limit"], held=row["held"], evidence=row["evidence"])
            for row in reply["provocations"]
        ],
    )


def processes(reply: Mapping[str, Any]) -> list[ProcessInfo]:
    """Read a ``CommandList``."""
    return [
        ProcessInfo(
            pid=row["pid"],
            command_id=row["command_id"],
            cmd=row["argv"][0],
            args=row["argv"][1:],
            state=row["state"],
        )
        for row in reply["commands"]
    ]


def find_command(listed: Sequence[ProcessInfo], pid: int | str) -> ProcessInfo:
    """The command with an id, or a pid: one that runs before one that has ended, for pids are given out again.

    Raises:
        NotFoundException: There is none.
    """
    having = [info for info in listed if pid in (info.pid, info.command_id)]
    if not having:
        raise NotFoundException(f"cannot find command {pid!r}", "no such command", type="not_found")
    return next((info for info in having if info.state != "ended"), having[-1])


def command_result(end: Mapping[str, Any], stdout: bytes, stderr: bytes) -> CommandResult:
    """Read a ``CommandEnd``, and put what the command wrote beside it."""
    number = end["signal"]
    exit_code = end["exit_code"]
    if exit_code is None:
        exit_code = SIGNAL_BASE + (number or 0)
    error = _ERRORS.get(end["status"])
    if error is None and number is not None:
        error = f"ended by signal {number}"
    return CommandResult(
        stdout=stdout.decode(errors="replace"),
        stderr=stderr.decode(errors="replace"),
        exit_code=exit_code,
        error=error,
        status=end["status"],
        signal=number,
        cpu_ms=end["cpu_ms"],
        wall_ms=end["wall_ms"],
        memory_bytes_peak=end["memory_bytes_peak"],
        oom_kills=end["oom_kills"],
        truncated=end["truncated"],
        stdout_bytes=stdout,
        stderr_bytes=stderr,
        stdout_bytes_total=end["stdout_bytes"],
        stderr_bytes_total=end["stderr_bytes"],
        problems=problems_of(end),
    )


def shell_params(sandbox_id: str, shell_id: str, text: str, timeout: float | None) -> dict[str, Any]:
    """Params of ``shells/run``."""
    limit = COMMAND_TIMEOUT_S if timeout is None else timeout
    return given(sandbox=sandbox_id, shell_id=shell_id, text=text, timeout=limit or None, follow=True)


def shell_info(reply: Mapping[str, Any]) -> ShellInfo:
    """Read a ``ShellInfo`` of the protocol."""
    return ShellInfo(shell_id=reply["shell_id"], shell=reply["shell"], state=reply["state"], cwd=reply["cwd"])


def shell_result(end: Mapping[str, Any], stdout: bytes, stderr: bytes) -> ShellResult:
    """Read a ``ShellEnd``, and put what the text wrote beside it."""
    plain = command_result(end, stdout, stderr)
    return ShellResult(
        **{name: getattr(plain, name) for name in CommandResult.__slots__},
        shell_ended=end["ended"],
        interrupted=end["interrupted"],
        restarted=end["restarted"],
        restored=end["restored"],
        cwd=end["cwd"],
    )
