"""Every request, reply, notification and error of the socket: the one source of truth.

The wire, ``--json``, the clients, ``rpc.discover`` and ``docs/PROTOCOL.md`` are all made from the structs
and the method table below. JSON-RPC 2.0; framing is in ``sandboxd.framing``.

Requests are for people and so take quantities as they write them (``"512m"``, ``"0.5"``, ``"1s"``) or as
plain numbers in the unit that the field names. Replies are for programs: numbers, with the unit last in the
name. ``null`` in a reply means "unknown", never zero.

Unknown fields in a request are refused: a misspelt limit must not become no limit.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

PROTOCOL_VERSION = 2
"""Raised with each release that adds a method or a field: by it a client knows that the daemon is older."""

FRAME_BYTES_MAX = 4 * 1024 * 1024
"""Largest message either way. argv and env are the large ones, and the kernel bounds those to 2 MiB."""

LOG_BYTES_MAX = 1024 * 1024
"""Most output, or input, in one message: base64 makes four bytes of three."""

SHELL_TEXT_CHARS_MAX = 128 * 1024
"""Of one text for a shell. A longer one is a script: write it to a file."""

DESCRIPTORS_PER_REQUEST_MAX = 3
"""stdin, stdout, stderr."""

AUDITED = Meta(extra={"audited": True})
"""On free text of a request: the audit log may have it, for it is a name, a path or an amount. What has no such mark,
and no shape that keeps everything else out, is never written down: see ``sandboxd.audit.arguments``."""

SandboxRef = Annotated[
    str,
    Meta(min_length=1, max_length=64, description="A sandbox id, an unambiguous prefix of one, or its name."),
    AUDITED,
]
Name = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?\Z",
        description="1 to 63 of a-z 0-9 . _ -, starting and ending with a letter or digit.",
    ),
]
"""With what is to be written instead as its description: see ``sandboxd.misfits``. So has all that has a pattern."""
Text = Annotated[str, Meta(max_length=4096), AUDITED]
"""Of a path or a name."""
Quantity = Annotated[int | float | str, Meta(description="A number, or text with a unit."), AUDITED]
EngineChoice = Literal["podman", "docker"]
HostPathBytes = Annotated[bytes, Meta(max_length=4095), AUDITED]
LimitsPolicy = Literal["strict", "degraded"]
NetworkMode = Literal["none", "allow", "full"]
Port = Annotated[int, Meta(ge=1, le=65535)]
ServiceName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9-]{0,30}\Z",
        description="1 to 31 of a-z 0-9 -, starting with a letter.",
        extra={"hint": "sandboxctl service list"},
    ),
]
Rules = Annotated[
    list[Annotated[str, Meta(max_length=512), AUDITED]],
    Meta(max_length=256, description="``[METHOD ]HOST[:PORT]``, such as ``*.example.org:443``, or a preset."),
]
Injections = Annotated[
    list[Annotated[str, Meta(max_length=1024), AUDITED]],
    Meta(
        max_length=64,
        description="``[http://]HOST[:PORT] HEADER: VALUE``, such as ``x.example Authorization: Bearer {NAME}``.",
    ),
]
SecretName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}\Z",
        description="1 to 63 of A-Z a-z 0-9 _ . -, starting with a letter, a digit or _.",
    ),
]
ServiceGrants = Annotated[
    list[Annotated[str, Meta(max_length=80), AUDITED]],
    Meta(max_length=16, description="``NAME`` or ``NAME=SCOPE``, such as ``chroma`` or ``chroma=private``."),
]
ImageReference = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_./:@+-]{0,511}\Z",
        description="the name of an image, such as docker.io/library/debian:12 or localhost/mine:1.",
        extra={"hint": "sandboxctl image list"},
    ),
    AUDITED,
]
OnTimeout = Literal["kill", "pause"]
SandboxState = Literal[
    "creating",
    "warm",
    "reserved",
    "running",
    "paused",
    "stopping",
    "stopped",
    "starting",
    "removing",
    "broken",
    "lost",
]
TemplateName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?\Z",
        description="1 to 63 of a-z 0-9 . _ -, starting and ending with a letter or digit.",
        extra={"hint": "sandboxctl template list"},
    ),
]
SlotCount = Annotated[int, Meta(ge=0, le=512)]


class Params(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all requests."""

    def descriptors_taken(self) -> int:
        """How many descriptors this very request carries."""
        return 0


class Reply(Struct, frozen=True, kw_only=True):
    """Base of all replies and of their parts."""


# --- limits ---------------------------------------------------------------------------------------------


class LimitsParams(Params, frozen=True):
    """Limits as a caller writes them. Absent: the daemon's configured default."""

    memory: Quantity | None = None
    """Bytes, or text such as ``512m``. Memory and swap together."""
    cpus: Quantity | None = None
    """CPUs, such as ``0.5`` or ``500m``."""
    pids: Quantity | None = None
    """Processes and threads at once, sandbox-init included."""
    cpuset: Annotated[str, AUDITED] | None = None
    """Host CPUs to run on, such as ``0-2,4``."""
    shm: Quantity | None = None
    """Size of /dev/shm. Create only."""
    tmp: Quantity | None = None
    """Size of /tmp, and of the home directory. Create only."""
    nofile: Quantity | None = None
    """Open files per process. Create only."""


class LimitReport(Reply, frozen=True):
    """One limit: what was asked, what the engine says, what the kernel enforces."""

    name: str
    """``memory memory_swap cpus pids cpuset shm nofile`` or ``tmpfs:PATH``."""
    unit: str
    """``bytes``, ``millicpu``, ``count`` or ``list``."""
    requested: int | str | None
    reported: int | str | None
    """The engine's own inspect; null until somebody asks for it (``sandbox/get``)."""
    effective: int | str | None
    """Read from the sandbox's real control group, or from /proc for what is not a control group."""
    verified: bool
    """True only if ``effective`` was read and is what was requested."""
    reason: str = ""
    """Why not verified, or what else is worth knowing."""


# --- sandboxes ------------------------------------------------------------------------------------------


class WorkspaceParams(Params, frozen=True):
    """The project, as seen inside at /workspace."""

    path: Text
    """Absolute host path of a directory."""
    path_bytes: HostPathBytes | None = None
    """For paths that are not UTF-8: taken instead of ``path``."""
    mode: Literal["rw", "bind", "ro", "overlay", "copy"] = "rw"
    """``rw``, also called ``bind``: the project itself. ``ro``: the same, and it cannot be written. ``overlay``: the
    project is below, and what is written goes to a layer of the sandbox's own. ``copy``: a copy of it, which shares
    its blocks where the file system can. The last two never touch the project; see ``workspace/diff``."""
    git_common: Literal["ro", "rw", "none"] = "ro"
    """Of a git worktree: how the repository that it belongs to is seen inside, at its own path."""


class MountParams(Params, frozen=True, kw_only=True):
    """Something else of the host that is seen inside."""

    path: Text
    """Absolute host path of a directory or a regular file."""
    path_bytes: HostPathBytes | None = None
    """For paths that are not UTF-8: taken instead of ``path``."""
    target: Text
    """Absolute path inside."""
    mode: Literal["rw", "ro"] = "rw"


class SandboxCreateParams(Params, frozen=True):
    """Make a sandbox."""

    name: Name | None = None
    engine: EngineChoice | None = None
    image: ImageReference | None = None
    workspace: WorkspaceParams | None = None
    mounts: Annotated[list[MountParams], Meta(max_length=32)] = []
    limits: LimitsParams = LimitsParams()
    limits_policy: LimitsPolicy | None = None
    env: dict[str, str] = {}
    network: NetworkMode | None = None
    """``none``: loopback only. ``allow``: besides, a proxy on the loopback that obeys ``allow`` and ``deny``.
    ``full``: the engine's own network. Default: the daemon's; ``allow`` where there are rules."""
    allow: Rules = []
    deny: Rules = []
    """What they match is refused, whatever allows it."""
    inject: Injections = []
    """What the proxy adds to requests. It grants nothing: ``allow`` must let them go where they are to go."""
    services: ServiceGrants | None = None
    """What appears on the loopback inside. Default: the daemon's."""
    secrets: Annotated[list[SecretName], Meta(max_length=64)] = []
    """Names of secrets that it finds as files in memory, at /run/secrets."""
    metadata: dict[str, str] = {}
    ephemeral: bool = False
    """Remove the sandbox when the connection that made it closes."""
    lifetime: Quantity | None = None
    """Seconds, or text such as ``30m``, from now on; ``none``: until it is removed. Default: the daemon's."""
    idle_timeout: Quantity | None = None
    """The same, of time in which no request uses it, nobody waits for a command in it, and it needs no CPU time."""
    on_timeout: OnTimeout | None = None
    """``kill`` removes it; ``pause`` keeps its memory until somebody resumes it."""
    wait_capacity: Quantity | None = None
    """Seconds, or text such as ``30s``: how long to wait in the queue where this host has no room. ``$/progress``
    says the place. Default: not at all, which is ``capacity_exceeded``."""
    template: TemplateName = "default"
    launch: Literal["auto", "warm", "wait", "cold"] = "auto"
    """auto: a warm slot when there is one, else a new container. warm: a slot, or fail at once. wait: a slot, as soon
    as it is this caller's turn. cold: always a new container."""
    wait: Quantity = 30
    """How long a launch of ``wait`` may wait, as a duration."""


class SandboxParams(Params, frozen=True):
    """Name one sandbox."""

    sandbox: SandboxRef


class SandboxTimeoutParams(Params, frozen=True):
    """Change how long a sandbox may last; what is absent stays as it is."""

    sandbox: SandboxRef
    lifetime: Quantity | None = None
    """From now on: seconds, or text such as ``30m``; ``none``: until it is removed."""
    idle_timeout: Quantity | None = None
    on_timeout: OnTimeout | None = None


class SandboxConnectParams(Params, frozen=True):
    """Have a sandbox that can be used: one that is paused goes on."""

    sandbox: SandboxRef
    lifetime: Quantity | None = None
    """It lasts for at least this long from now on."""


class SandboxKillParams(Params, frozen=True):
    """Remove a sandbox.

    The reply comes as soon as everything in it is killed and its name is free; its container, and what the host has
    of it, go in the background, and a daemon that starts later does what is left of that.
    """

    sandbox: SandboxRef
    wait: bool = False
    """Reply when nothing of it is left."""


class SandboxListParams(Params, frozen=True):
    """List sandboxes."""

    metadata: dict[str, str] = {}
    """Only those that carry all of these."""


class SandboxUpdateParams(Params, frozen=True):
    """Change limits of a running sandbox and prove them again."""

    sandbox: SandboxRef
    limits: LimitsParams
    limits_policy: LimitsPolicy | None = None


class SandboxStopParams(Params, frozen=True):
    """Stop a sandbox; it can be started again."""

    sandbox: SandboxRef
    grace: Quantity = 2
    """Seconds between TERM and KILL."""


class SandboxMetricsParams(Params, frozen=True):
    """Read usage from the control groups."""

    sandboxes: Annotated[list[SandboxRef], Meta(max_length=1024)] = []
    """Empty: all of them."""


class SandboxVerifyParams(Params, frozen=True):
    """Prove the limits."""

    sandbox: SandboxRef
    provoke: bool = False
    """Prove them the hard way: allocate past memory, fork past pids, spin past the quota. Needs a running
    sandbox, and whatever runs in it competes with the provocation."""


class WorkspaceInfo(Reply, frozen=True):
    """The project as mounted."""

    path: str
    mode: str
    mounted: str
    """How ownership is made right: ``same-uid``, ``keep-id``, ``idmapped`` or ``as-is``."""
    backend: str
    """What carries the mode out: ``bind``; ``overlay``, mounted by the daemon; ``podman-overlay`` or
    ``fuse-overlayfs``, by the engine; ``reflink``, a copy that shares its blocks, or ``copy``, one that does not."""
    path_bytes: bytes | None = None
    """The path itself, where it is not UTF-8."""


class MountInfo(Reply, frozen=True):
    """Something else of the host, as mounted."""

    path: str
    target: str
    mode: str
    mounted: str
    reason: str
    """Why, where it was not asked for by name: ``git``, the repository of a worktree."""
    path_bytes: bytes | None = None


class Problem(Reply, frozen=True):
    """Something that is wrong with a sandbox, and makes commands fail."""

    kind: Literal["init_gone", "disk_full", "pids_exhausted", "memory_at_limit"]
    detail: str
    hint: str
    """What to do about it."""


class SandboxInfo(Reply, frozen=True, kw_only=True):
    """Everything about one sandbox."""

    id: str
    name: str | None
    state: SandboxState
    state_reason: str
    engine: str
    image: str
    container_id: str | None
    pid: int | None
    """Host pid of sandbox-init."""
    user: str
    """``uid:gid`` inside."""
    workspace: WorkspaceInfo | None
    network: NetworkMode
    network_verified: bool | None = None
    """Whether the kernel shows what the mode says; ``network/get`` tells more. null: nobody looked, as in all but
    ``sandbox/get``, or nobody can, as in a sandbox that does not run."""
    services: list[str]
    mounts: list[MountInfo]
    secrets: list[str]
    """Their names."""
    limits: list[LimitReport]
    limits_policy: str
    verified: bool
    """All limits are verified."""
    metadata: dict[str, str]
    env: dict[str, str]
    created_at_ms: int
    """Milliseconds since the epoch."""
    ephemeral: bool
    commands_running: int
    template: str
    launch: Literal["warm", "cold"]
    miss_reason: str
    """Why it was not claimed from the pool; empty when it was, or was not to be."""
    """``cold``: made for this request."""
    warnings: list[str]
    problems: list[Problem] = []
    """What is wrong with it now."""
    timings_ms: dict[str, float]
    """What each step of this request cost."""
    lifetime_ms: int | None = None
    """What it was given; null: for ever."""
    expires_at_ms: int | None = None
    """Milliseconds since the epoch; null: never, or not while it is paused."""
    idle_timeout_ms: int | None = None
    on_timeout: OnTimeout = "kill"


class SandboxLifetime(Reply, frozen=True):
    """How long a sandbox lasts."""

    id: str
    lifetime_ms: int | None
    expires_at_ms: int | None
    """Milliseconds since the epoch; null: never, or not while it is paused."""
    idle_timeout_ms: int | None
    on_timeout: OnTimeout


class SandboxSummary(Reply, frozen=True):
    """One row of the list."""

    id: str
    name: str | None
    state: SandboxState
    engine: str
    template: str
    image: str
    workspace: str | None
    created_at_ms: int
    commands_running: int
    verified: bool
    metadata: dict[str, str] = {}
    expires_at_ms: int | None = None
    """Milliseconds since the epoch; null: never."""
    problems: list[Problem] = []
    """What its state and its counters tell. Whether a disk is full is only looked at for one: ``sandbox/get``."""


class SandboxList(Reply, frozen=True):
    """All sandboxes of this daemon."""

    sandboxes: list[SandboxSummary]


class SandboxGone(Reply, frozen=True):
    """A sandbox was removed."""

    id: str
    name: str | None
    gone: bool
    """Nothing of it is left. False: nothing runs in it, and the rest goes in the background."""
    timings_ms: dict[str, float]


class Pressure(Reply, frozen=True):
    """Pressure stall information of one resource: the share of time in which somebody waited for it."""

    some_avg10_percent: float | None
    full_avg10_percent: float | None
    some_total_us: int | None
    full_total_us: int | None


class SandboxMetrics(Reply, frozen=True):
    """Usage of one sandbox, from its control group."""

    id: str
    name: str | None
    state: SandboxState
    cpu_us: int | None
    cpu_percent: float | None
    """Of one CPU, since the last reading that is at least a fifth of a second old, else since the start."""
    cpu_millis: int | None
    throttled_periods: int | None
    throttled_us: int | None
    memory_bytes: int | None
    memory_bytes_peak: int | None
    memory_bytes_max: int | None
    pids: int | None
    pids_peak: int | None
    pids_max: int | None
    pids_refused: int | None
    """Forks refused because of the pids limit."""
    oom_kills: int | None
    ooms_own: int | None
    """How often memory ran out at its own limit, not at one above it; null where the kernel does not tell."""
    cpu_pressure: Pressure | None
    memory_pressure: Pressure | None
    io_pressure: Pressure | None
    reason: str = ""
    """Why nothing could be read."""


class SandboxMetricsList(Reply, frozen=True):
    """Usage of several sandboxes."""

    sandboxes: list[SandboxMetrics]


class Provocation(Reply, frozen=True):
    """One limit, provoked."""

    limit: str
    held: bool | None
    """null: it could not be run into here, and ``evidence`` says why."""
    evidence: str
    """What the control group's counters said, before and after."""


class SandboxVerification(Reply, frozen=True):
    """The proof."""

    id: str
    limits: list[LimitReport]
    provocations: list[Provocation]
    verified: bool
    timings_ms: dict[str, float]


# --- events ---------------------------------------------------------------------------------------------

EventKind = Literal[
    "created",
    "started",
    "adopted",
    "recovered",
    "paused",
    "resumed",
    "stopping",
    "stopped",
    "broken",
    "lost",
    "expiring",
    "expired",
    "timeout_changed",
    "removing",
    "removed",
    "oom",
    "limits_restored",
    "stray_removed",
    "command_started",
    "command_ended",
]


class EventsParams(Params, frozen=True):
    """Be told what happens to sandboxes, in ``events/event`` and ``events/lost``."""

    since: Annotated[int, Meta(ge=0)] | None = None
    """The number of the last event that is known: those after it come first, as far as they are kept, and one that
    no event has yet means from now on. Default: all that is kept."""
    follow: bool = True
    """Go on until the request is cancelled. Off: reply once all that is kept was sent."""
    sandbox: SandboxRef | None = None
    """Only those of this one; it may be gone already, if it is given by its id."""
    kinds: Annotated[list[EventKind], Meta(max_length=64)] = []
    """Only these. Empty: all."""


class EventInfo(Reply, frozen=True):
    """Params of ``events/event``: something happened to a sandbox."""

    seq: int
    """Rises from event to event, over restarts of the daemon as well, not always by one."""
    at_ms: int
    """Milliseconds since the epoch."""
    kind: EventKind
    sandbox: str
    name: str | None
    data: dict[str, str | int | None]
    """What else there is to say: ``reason``, which a start's and a sweep's decisions have; of what is created
    ``launch``, ``miss_reason`` and ``ready_us``, until the slot was the caller's or the container ran, since it was
    asked for; ``engine`` and ``container`` of one that had our label and no owner; ``cause``, ``action`` and
    ``ends_in_ms`` of what expires; ``command_id``, ``argv``, ``status``, ``exit_code`` and ``oom_kills`` of
    commands."""


class EventsLost(Reply, frozen=True):
    """Params of ``events/lost``: events with these numbers are not kept any longer, whatever they were."""

    first_seq: int
    last_seq: int


class EventsBegun(Reply, frozen=True):
    """Params of ``events/begun``, which comes first: from here on nothing is missed unsaid."""

    next_seq: int


class EventsEnd(Reply, frozen=True):
    """All that is kept was sent."""

    last_seq: int
    """To go on from."""


# --- commands -------------------------------------------------------------------------------------------


class PtySize(Params, frozen=True):
    """A terminal's size in characters."""

    rows: Annotated[int, Meta(ge=1, le=65535)]
    cols: Annotated[int, Meta(ge=1, le=65535)]


class CommandParams(Params, frozen=True):
    """Run a command in a sandbox.

    ``stdio`` says where its output goes:

    * ``descriptors``: the request carries three descriptors (SCM_RIGHTS), which become its stdin, stdout and
      stderr; no byte passes through the daemon. With ``pty`` it carries none, and ``commands/started`` carries the
      terminal's master.
    * ``spool``: into files that the daemon keeps, bounded, with head and tail: for callers that cannot pass
      descriptors, and for what runs in the background. Follow it with ``follow``, ``commands/connect`` or
      ``commands/logs``. With ``pty`` the daemon holds the terminal, and any number of clients may attach to it.
    * ``null``: nowhere.
    """

    sandbox: SandboxRef
    argv: Annotated[list[Annotated[str, AUDITED]], Meta(min_length=1, max_length=4096)]
    env: dict[str, str] = {}
    cwd: Text | None = None
    """Absolute, or relative to /workspace. Default: /workspace, or / where there is none."""
    user: Text | None = None
    """Another user than the sandbox's: takes the engine's own exec, which is slow, has no pty and no tree kill."""
    stdio: Literal["descriptors", "spool", "null"] = "null"
    stdin: Literal["null", "pipe"] = "null"
    """With ``spool``: ``pipe`` is written to by ``commands/send_stdin``. It is closed when the daemon ends."""
    merge_stderr: bool = False
    """With ``spool``: stderr goes where stdout goes, in the order in which it was written."""
    follow: bool = False
    """With ``spool`` and ``commands/run``: send ``commands/output`` while it runs, and all of it before the reply."""
    pty: PtySize | None = None
    timeout: Quantity | None = None
    """Seconds, or text such as ``90s``: then TERM, and KILL after the grace, to the whole tree."""
    grace: Quantity = 2
    """Seconds between TERM and KILL."""
    on_disconnect: Literal["kill", "keep"] = "kill"
    """What happens to the command when the connection of ``commands/run`` closes. ``commands/start`` always keeps."""

    def descriptors_taken(self) -> int:
        """Three, unless the command gets a terminal of its own or nothing at all."""
        return DESCRIPTORS_PER_REQUEST_MAX if self.stdio == "descriptors" and self.pty is None else 0


CommandId = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{12}\Z",
        description="Twelve hexadecimal digits.",
        extra={"hint": "sandboxctl ps SANDBOX"},
    ),
]


class CommandRef(Params, frozen=True):
    """Name one command."""

    sandbox: SandboxRef
    command_id: CommandId


class CommandConnectParams(Params, frozen=True):
    """Follow the output of a command from byte offsets on, and wait for its end."""

    sandbox: SandboxRef
    command_id: CommandId
    stdout_offset: Annotated[int, Meta(ge=0)] = 0
    stderr_offset: Annotated[int, Meta(ge=0)] = 0


class CommandLogsParams(Params, frozen=True):
    """Read kept output of a command, whether it runs or not."""

    sandbox: SandboxRef
    command_id: CommandId
    stream: Literal["stdout", "stderr"] = "stdout"
    offset: Annotated[int, Meta(ge=0)] | None = None
    """Where to begin. Default: as far from the end as ``length`` reaches."""
    length: Annotated[int, Meta(ge=1, le=LOG_BYTES_MAX)] = 64 * 1024


class CommandInputParams(Params, frozen=True):
    """Write to the stdin of a command that has a pipe or a terminal there."""

    sandbox: SandboxRef
    command_id: CommandId
    data: Annotated[bytes, Meta(max_length=LOG_BYTES_MAX)]


class CommandResizeParams(Params, frozen=True):
    """Change the size of a command's terminal. The size that it has already makes a program draw its screen anew."""

    sandbox: SandboxRef
    command_id: CommandId
    size: PtySize


class CommandSignalParams(Params, frozen=True):
    """Send a signal."""

    sandbox: SandboxRef
    command_id: CommandId
    signal: Annotated[int, Meta(ge=1, le=64)]
    scope: Literal["process", "group", "tree"] = "group"


class CommandListParams(Params, frozen=True):
    """List the commands of one sandbox."""

    sandbox: SandboxRef


class CommandStarted(Reply, frozen=True):
    """A command runs. Also the params of the ``commands/started`` notification."""

    sandbox: str
    command_id: str
    pid: int
    """As seen inside."""
    timings_ms: dict[str, float]


class CommandOutput(Reply, frozen=True):
    """Params of ``commands/output``: bytes that a command wrote.

    ``data`` is empty where there is only something to be told: that bytes before ``offset`` were dropped and none
    follows them, or that the output ends at ``offset`` and not where it was followed from.
    """

    sandbox: str
    command_id: str
    stream: Literal["stdout", "stderr"]
    """A terminal, and merged output, are ``stdout``."""
    offset: int
    """Of the first byte of ``data``, counted from the command's start. Less than what was followed so far, if the
    command cut its output short."""
    data: bytes
    dropped_bytes: int
    """How many bytes before ``offset`` were written and not kept."""


class ByteRange(Reply, frozen=True):
    """Some bytes of an output."""

    start: int
    end: int
    """One behind the last."""


class CommandLogs(Reply, frozen=True):
    """Kept output."""

    offset: int
    """Of the first byte of ``data``."""
    data: bytes
    dropped: list[ByteRange]
    """What was written and not kept."""
    bytes_total: int
    """How many bytes were written so far."""
    ended: bool


class CommandEnd(Reply, frozen=True, kw_only=True):
    """How a command ended. A non-zero exit is an outcome, never an error."""

    command_id: str
    exit_code: int | None
    """null when a signal ended it."""
    signal: int | None
    status: Literal["ok", "nonzero", "signaled", "timeout", "oom", "killed", "lost"]
    oom_kills: int | None
    """How many processes of this sandbox the kernel killed for memory while the command ran."""
    cpu_ms: float | None
    wall_ms: float
    memory_bytes_peak: int | None
    """Largest resident set of one process of the command."""
    stdout_bytes: int | None
    stderr_bytes: int | None
    truncated: bool
    timings_ms: dict[str, float]
    problems: list[Problem] = []
    """Of a command that failed: what is wrong with its sandbox."""


class CommandInfo(Reply, frozen=True):
    """One row of the command list."""

    command_id: str
    pid: int | None
    argv: list[str]
    state: Literal["running", "lingering", "ended"]
    """``lingering``: it ended, and left processes behind."""
    started_at_ms: int
    end: CommandEnd | None


class CommandList(Reply, frozen=True):
    """The commands of one sandbox that run, linger, or ended lately."""

    commands: list[CommandInfo]


# --- shells ---------------------------------------------------------------------------------------------


class ShellOpenParams(Params, frozen=True):
    """Open a shell that keeps its working directory, variables, functions and aliases from one run to the next.

    It survives a restart of the daemon. What is running in it then is lost.
    """

    sandbox: SandboxRef
    shell: Annotated[str, Meta(min_length=1, max_length=4096), AUDITED] = "auto"
    """A name or path inside: ``bash``, or one that reads what a POSIX shell does. ``auto``: bash, else sh."""
    env: dict[str, str] = {}
    cwd: Text | None = None
    """Absolute, or relative to /workspace. Default: /workspace, or / where there is none."""


ShellId = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{12}\Z",
        description="Twelve hexadecimal digits.",
        extra={"hint": "sandboxctl session ls SANDBOX"},
    ),
]


class ShellRef(Params, frozen=True):
    """Name one shell."""

    sandbox: SandboxRef
    shell_id: ShellId


class ShellRunParams(Params, frozen=True):
    """Let a shell evaluate some text, as if it were sourced. One text at a time: another is refused meanwhile.

    Its stdin is empty, and its output is kept like that of a command with ``stdio = "spool"``. The reply comes when
    the shell is ready again, whatever the text left in the background. When the connection closes, it is interrupted.
    """

    sandbox: SandboxRef
    shell_id: ShellId
    text: Annotated[str, Meta(max_length=SHELL_TEXT_CHARS_MAX)]
    timeout: Quantity | None = None
    """Seconds, or text such as ``90s``: then it is interrupted, as by ``shells/interrupt``."""
    follow: bool = False
    """Send ``commands/output`` while it runs, and all of it before the reply."""


class ShellListParams(Params, frozen=True):
    """List the shells of one sandbox."""

    sandbox: SandboxRef


class ShellInfo(Reply, frozen=True):
    """One shell."""

    sandbox: str
    shell_id: str
    shell: str
    """As it was asked for."""
    state: Literal["idle", "busy"]
    cwd: str | None
    """After the last run; null: none has ended yet under this daemon."""
    opened_at_ms: int
    command_id: str | None
    """Of the text that it evaluates now."""


class ShellList(Reply, frozen=True):
    """The shells of one sandbox, the oldest first."""

    shells: list[ShellInfo]


class ShellEnd(CommandEnd, frozen=True, kw_only=True):
    """How a text ended. ``cpu_ms`` and ``memory_bytes_peak`` are null: they are the shell's, not one text's."""

    shell_id: str
    ended: bool
    """The shell has ended with it: by ``exit``, ``exec`` or ``set -e``. There is nothing left to run in."""
    interrupted: bool
    """By a timeout, by ``shells/interrupt``, or because the caller went away."""
    restarted: bool
    """It did not come back, or was killed, and a new shell is in its place, without functions, aliases, options and
    variables that were not exported."""
    restored: bool
    """If restarted: the new one has the working directory and the exported variables of after the last run."""
    cwd: str | None


class ShellInterrupted(Reply, frozen=True):
    """What became of an interrupt."""

    interrupted: bool
    """False: nothing was running."""
    restarted: bool


# --- files ----------------------------------------------------------------------------------------------


class PathParams(Params, frozen=True):
    """Name one file.

    Paths are resolved inside the sandbox, by the sandbox's own user; relative ones begin at /workspace, or at / where
    there is none.
    """

    sandbox: SandboxRef
    path: Text
    path_bytes: HostPathBytes | None = None
    """For names that are not UTF-8: taken instead of ``path``."""


class FileReadParams(PathParams, frozen=True):
    """Read a part of a regular file."""

    offset: Annotated[int, Meta(ge=0)] = 0
    length: Annotated[int, Meta(ge=1, le=LOG_BYTES_MAX)] = LOG_BYTES_MAX
    descriptor: bool = False
    """Send ``files/opened`` with a descriptor to read all of the file from, and no data: for any size."""


class FileWriteParams(PathParams, frozen=True, kw_only=True):
    """Replace a file's content, or make it: whole or not at all."""

    data: Annotated[bytes, Meta(max_length=LOG_BYTES_MAX)] = b""
    descriptor: bool = False
    """The request carries a descriptor of a regular file or a memfd, and no ``data``: what is in it from its offset
    on is written, whatever its size."""
    mode: Annotated[int, Meta(ge=0, le=0o777)] | None = None
    """Default: that of the file that is there, else 0644."""
    make_parents: bool = True

    def descriptors_taken(self) -> int:
        """One, if the content is in it."""
        return 1 if self.descriptor else 0


class FileListParams(PathParams, frozen=True):
    """List a directory."""

    depth: Annotated[int, Meta(ge=1, le=64)] = 1
    entries_max: Annotated[int, Meta(ge=1, le=10_000)] = 1000
    pages: bool = False
    """Send all entries in ``files/listed``, as they are found and whatever their number, and none in the reply."""


class FileStatParams(PathParams, frozen=True):
    """Look at one file."""

    follow: bool = False


class FileMakeDirParams(PathParams, frozen=True):
    """Make a directory."""

    make_parents: bool = True


class FileRenameParams(PathParams, frozen=True, kw_only=True):
    """Rename within one file system."""

    new_path: Text
    new_path_bytes: HostPathBytes | None = None
    """For names that are not UTF-8: taken instead of ``new_path``."""
    replace: bool = True


class FileRemoveParams(PathParams, frozen=True):
    """Remove a file, a link or a directory."""

    recursive: bool = False
    missing_ok: bool = False
    """That there is none is no error."""


class FileWatchParams(PathParams, frozen=True):
    """Watch a file or a directory, until the request is cancelled.

    ``files/watching`` says when the watch stands, ``files/changed`` what happens from then on. What a caller does not
    take in time is dropped, and told as an ``overflow``. The request ends when the path itself is gone; with the
    sandbox; or with the connection.
    """

    recursive: bool = False
    """All that is below a directory, and what will be."""


TRANSFER_BYTES_MAX = 64 * 1024**3
"""Default bound of one transfer."""

TRANSFER_ENTRIES_MAX = 1_000_000
"""Likewise."""


class TransferParams(PathParams, frozen=True):
    """Move files over one descriptor that the request carries: a pipe, a stream socket or a regular file.

    A file is read or written from where it stands. ``$/progress`` tells bytes and entries. The transfer ends with the
    connection, and with ``$/cancelRequest``.
    """

    form: Literal["tar", "file"] = "tar"
    """``tar``: the descriptor has an archive, of a tree or of one file. ``file``: the bytes of one file."""
    bytes_max: Annotated[int, Meta(ge=0)] = TRANSFER_BYTES_MAX
    """Most bytes of content. A file of which more is promised is refused before it is moved."""
    entries_max: Annotated[int, Meta(ge=1)] = TRANSFER_ENTRIES_MAX
    idle_timeout: Quantity = 60
    """Seconds that the descriptor may be silent."""

    def descriptors_taken(self) -> int:
        """The one."""
        return 1


class FileUploadParams(TransferParams, frozen=True):
    """Put a tree into a directory, or bytes into a file.

    An archive may be ustar, pax, or GNU's. What it holds goes below ``path``, whatever its names say: entries that
    would lead elsewhere, or through a link that the archive brought, are skipped, and so are devices and FIFOs. Files
    belong to the sandbox's user, and have no setuid bits. Each appears whole or not at all.
    """

    make_parents: bool = False
    """Also those of ``path``. ``path`` itself is made where it is missing."""
    keep_times: bool = True
    """``tar``: files get the times that the archive tells."""
    mode: Annotated[int, Meta(ge=0, le=0o777)] | None = None
    """``file``: default: that of the file that is there, else 0644."""
    mtime_ns: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """``file``: default: now."""
    size_bytes: Annotated[int, Meta(ge=0)] | None = None
    """``file``: how much is to come; what ends earlier is refused. Default: what comes until the end."""


class FileDownloadParams(TransferParams, frozen=True):
    """Get a tree, or the bytes of a file.

    Archives are pax. A file has the size that it had when it was opened. FIFOs, sockets, devices and files of the
    kernel's own are skipped.
    """

    name: Annotated[bytes, Meta(min_length=1, max_length=4095)] | None = None
    """``tar``: what the tree is called in the archive. Default: the last name of ``path``."""
    follow: bool = False
    """A link at ``path`` is followed. Links below are always links."""


class FileInfo(Reply, frozen=True):
    """One file, numbers as seen inside."""

    path: str
    """Absolute, links in it not resolved; in a listing, relative to what was listed. For display where it is not
    UTF-8."""
    path_bytes: bytes | None
    """The name itself, where it is not UTF-8."""
    type: Literal["file", "dir", "symlink", "fifo", "socket", "char", "block", "unknown"]
    size_bytes: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str | None
    """Where a symlink leads."""


class FileContent(Reply, frozen=True):
    """A part of a file."""

    data: bytes
    size_bytes: int
    """Of the whole file, when it was opened."""


class FileOpened(Reply, frozen=True):
    """Params of ``files/opened``, which carries the descriptor of a regular file, to be read."""

    token: int | str
    """The request's id."""
    size_bytes: int


class FileList(Reply, frozen=True):
    """What is below a directory."""

    path: str
    """Of what was listed, absolute; for display where it is not UTF-8."""
    path_bytes: bytes | None
    """The path itself, where it is not UTF-8."""
    entries: list[FileInfo]
    """In the order of the names."""
    truncated: bool
    """There is more than this."""


class FilePage(Reply, frozen=True):
    """Params of ``files/listed``: a part of a listing, each directory before what is in it, else in no order."""

    token: int | str
    """The request's id."""
    entries: list[FileInfo]


class SkippedEntry(Reply, frozen=True):
    """What a transfer left out."""

    path: str
    """As in the archive; for display where it is not UTF-8."""
    path_bytes: bytes | None
    """The name itself, where it is not UTF-8."""
    reason: str


class FileTransfer(Reply, frozen=True):
    """What was moved."""

    entries: int
    """Of the archive; those that were skipped on the way in are among them."""
    bytes: int
    """Of content; holes are not counted where they stay holes."""
    skipped: list[SkippedEntry]
    """The first hundred."""
    skipped_count: int
    timings_ms: dict[str, float]


class FileMade(Reply, frozen=True):
    """A directory is there."""

    created: bool


class FileExists(Reply, frozen=True):
    """Whether something bears a name, be it a link that leads nowhere."""

    exists: bool


class FileWatching(Reply, frozen=True):
    """Params of ``files/watching``: nothing that happens from now on is missed."""

    token: int | str
    """The request's id."""
    truncated: bool
    """Some directories are not watched: they are too many, too deep, or not readable."""


class FileChange(Reply, frozen=True):
    """What happened to one file."""

    kind: Literal["created", "modified", "written", "attributes", "removed", "renamed", "overflow"]
    """``written``: closed by who wrote it. ``overflow``: changes were lost, look again."""
    path: str
    """Relative to what is watched, which is itself the empty path; for display where it is not UTF-8."""
    path_bytes: bytes | None
    """The path itself, where it is not UTF-8."""
    old_path: str | None
    """Of what was ``renamed``."""
    old_path_bytes: bytes | None
    is_dir: bool
    """False of what is watched itself, when it goes."""


class FileChanges(Reply, frozen=True):
    """Params of ``files/changed``: what happened, in order."""

    token: int | str
    """The request's id."""
    changes: list[FileChange]
    truncated: bool
    """As in ``files/watching``; it may become true."""


class FileWatchEnd(Reply, frozen=True):
    """The watch is over, for what was watched is gone: removed, or moved away."""

    path: str


# --- the network ----------------------------------------------------------------------------------------


class NetworkSetParams(Params, frozen=True):
    """Change what a running sandbox may reach; it counts from its next request on.

    ``full`` is the engine's own network. When it is taken away, connections through it are cut.
    """

    sandbox: SandboxRef
    mode: NetworkMode | None = None
    """Default: ``allow`` where there is a word of rules, else as it was."""
    allow: Rules | None = None
    """All of them; absent: as they were."""
    deny: Rules | None = None
    add_allow: Rules = []
    """On top of those."""
    add_deny: Rules = []
    inject: Injections | None = None
    """All of them; absent: as they were."""
    add_inject: Injections = []
    services: ServiceGrants | None = None
    """All of them; absent: as they were."""


class Denied(Reply, frozen=True):
    """A connection that a sandbox wanted and was refused."""

    at_ms: int
    method: str
    host: str
    port: int
    reason: str
    command: str | None
    """Which command asked: its program, and its id where it is one of ours; null where that could not be seen."""


class ServiceGranted(Reply, frozen=True):
    """A service as one sandbox sees it."""

    name: str
    scopes: list[str]
    port: int
    """On the loopback inside."""
    state: str
    """Of the service: ``idle starting ready degraded stopped``; or ``absent``, where its port is taken inside."""
    reason: str


class NetworkInterface(Reply, frozen=True):
    """An interface inside, as the kernel shows it."""

    name: str
    received_bytes: int
    sent_bytes: int


class NetworkInfo(Reply, frozen=True):
    """What a sandbox may reach, and what it did with that since the daemon knows it."""

    id: str
    mode: NetworkMode
    allow: list[str]
    deny: list[str]
    inject: list[str]
    """What is added to its requests; of secrets, their names."""
    proxy: str | None
    """URL of the proxy inside."""
    services: list[ServiceGranted]
    requests: int
    connections: int
    """Open now."""
    sent_bytes: int
    received_bytes: int
    denied: int
    denials: list[Denied]
    """The last hundred."""
    problems: list[str]
    """What is not as it should be, on the loopback inside or beside it, and why."""
    interfaces: list[NetworkInterface] | None
    """All but the loopback; null: it does not run, or the host may not look."""
    verified: bool
    """The kernel shows what ``mode`` says: a way out for ``full``, and no interface for the others."""


class PortForwardParams(Params, frozen=True):
    """Lead a place on the host to a port inside, until it is closed, or the sandbox is gone."""

    sandbox: SandboxRef
    port: Port
    """Inside: on its loopback, or on all its addresses."""
    host_port: Annotated[int, Meta(ge=0, le=65535)] = 0
    """0: one that is free."""
    address: Annotated[str, Meta(max_length=64), AUDITED] = "127.0.0.1"
    """An IP address of the host. Any but a loopback one lets others in than programs of this host."""
    path: Text | None = None
    """A Unix socket, made for this user alone, instead of a port."""


class PortCloseParams(Params, frozen=True):
    """Close one forward."""

    sandbox: SandboxRef
    forward_id: Annotated[
        str,
        Meta(
            pattern=r"^[0-9a-f]{8}\Z",
            description="Eight hexadecimal digits.",
            extra={"hint": "sandboxctl ports SANDBOX"},
        ),
    ]


class PortForward(Reply, frozen=True):
    """A place on the host that leads into a sandbox."""

    forward_id: str
    port: int
    """Inside."""
    address: str | None
    host_port: int | None
    path: str | None
    connections: int
    """Open now."""
    problem: str
    """Why it is not open; empty: it is."""


class ListeningPort(Reply, frozen=True):
    """Something that listens inside."""

    address: str
    port: int
    protocol: Literal["tcp", "udp"] = "tcp"


class PortList(Reply, frozen=True):
    """The ports of one sandbox."""

    forwards: list[PortForward]
    listening: list[ListeningPort] | None
    """Our own doors included; null where the host may not look. Forwards lead to TCP ports."""
    truncated: bool = False
    """More listens than this: 1 024 are told at most, fewer where a sandbox has thousands of UDP sockets."""


# --- services -------------------------------------------------------------------------------------------


class ServiceParams(Params, frozen=True):
    """Name one service."""

    service: ServiceName


class ServiceLogsParams(Params, frozen=True):
    """Read what a service printed."""

    service: ServiceName
    length: Annotated[int, Meta(ge=1, le=LOG_BYTES_MAX)] = 64 * 1024


class ServiceFileParams(Params, frozen=True):
    """Name one service, and a file on the host."""

    service: ServiceName
    path: Text
    """Absolute."""


class ServiceInfo(Reply, frozen=True, kw_only=True):
    """A service that sandboxes may share."""

    name: str
    state: Literal["idle", "starting", "ready", "degraded", "stopped"]
    """``idle``: nobody wanted it so far. ``degraded``: it should run, and does not; it is tried again."""
    reason: str
    hint: str
    pid: int | None
    address: str | None
    """On the host, or in the network of its own."""
    network: Literal["own", "host"] | None = None
    """``own``: nobody but the daemon reaches it. ``host``: every user of the host can connect to its port. null: it
    does not run, or is not run by the daemon."""
    sandbox: str | None
    """Id of the sandbox that it runs in, where it is a container."""
    port: int
    """On the loopback of sandboxes."""
    restarts: int
    since_ms: int
    """Since when it is in this state."""
    data_dir: str | None
    sandboxes: list[str]
    """Ids of those that it is given to."""


class ServiceList(Reply, frozen=True):
    """The services of this daemon."""

    services: list[ServiceInfo]


class ServiceLogs(Reply, frozen=True):
    """The end of what a service printed."""

    text: str


class ServiceBackup(Reply, frozen=True):
    """A copy of a service's data was made, or put back."""

    name: str
    path: str
    size_bytes: int | None
    former_data_dir: str | None
    """After a restore: where the data is that was there before."""


# --- what a sandbox did to its project ------------------------------------------------------------------


ProjectPath = Annotated[
    str, Meta(min_length=1, max_length=4096, description="Relative to the project, or below /workspace."), AUDITED
]


class WorkspaceDiffParams(Params, frozen=True):
    """What a sandbox changed, compared on the host. For the modes ``overlay`` and ``copy``."""

    sandbox: SandboxRef
    paths: Annotated[list[ProjectPath], Meta(max_length=1024)] = []
    """Only what is at or below one of these."""
    paths_bytes: Annotated[list[HostPathBytes], Meta(max_length=1024)] = []
    """The same, for names that are not UTF-8."""
    patch: bool = True
    """With the text of each patch."""
    offset: Annotated[int, Meta(ge=0)] = 0
    """How many changes to leave out: ``next_offset`` of the reply before."""


class WorkspaceApplyParams(Params, frozen=True):
    """Carry changes back to the project. Each file is replaced whole or not at all."""

    sandbox: SandboxRef
    paths: Annotated[list[ProjectPath], Meta(max_length=1024)] = []
    """Only what is at or below one of these."""
    paths_bytes: Annotated[list[HostPathBytes], Meta(max_length=1024)] = []
    """The same, for names that are not UTF-8."""
    force: bool = False
    """Also over what was changed in the project meanwhile, which is lost."""
    dry_run: bool = False
    """Only say what would be done, and what stands against it."""


class WorkspaceResetParams(Params, frozen=True):
    """Undo what a sandbox changed: it sees the project as it is."""

    sandbox: SandboxRef
    paths: Annotated[list[ProjectPath], Meta(max_length=1024)] = []
    """Only what is at or below one of these."""
    paths_bytes: Annotated[list[HostPathBytes], Meta(max_length=1024)] = []
    """The same, for names that are not UTF-8."""


class WorkspaceChange(Reply, frozen=True):
    """One path on which sandbox and project differ."""

    path: str
    """Relative to the project; for display where it is not UTF-8."""
    path_bytes: bytes | None
    """The path itself, where it is not UTF-8."""
    kind: Literal["added", "modified", "removed", "renamed", "mode"]
    """``mode``: only its permissions differ. What became another type of file was removed, and then added."""
    type: Literal["file", "dir", "symlink", "other"]
    old_path: str | None
    """What a renamed file is called in the project."""
    old_mode: int | None
    """Type and permissions, as in ``st_mode``; null: it is not in the project."""
    new_mode: int | None
    old_size_bytes: int | None
    new_size_bytes: int | None
    binary: bool
    """It is not text, or too large to be compared line by line."""
    insertions: int
    deletions: int
    patch: str | None
    """In git's form; null where there is none to see, where it was not asked for, and where it is not UTF-8."""
    patch_bytes: bytes | None
    """The patch, where it is not UTF-8."""
    note: str
    """Why it can be neither shown nor applied; empty: it can."""


class WorkspaceDiff(Reply, frozen=True):
    """Changes, by path."""

    changes: list[WorkspaceChange]
    total: int
    """Of all changes."""
    next_offset: int | None
    """There are more than fit into a reply; null: there are not."""
    timings_ms: dict[str, float]


class WorkspaceProblem(Reply, frozen=True):
    """A path, and what stands against it."""

    path: str
    path_bytes: bytes | None
    reason: str


class WorkspaceApplied(Reply, frozen=True):
    """What was carried back, or undone. At most a thousand of each are listed."""

    applied: list[str]
    applied_total: int
    conflicts: list[WorkspaceProblem]
    """Changed in the project meanwhile: left alone, or with ``force`` replaced."""
    failed: list[WorkspaceProblem]
    """Could not be carried over."""
    dry_run: bool
    timings_ms: dict[str, float]


# --- secrets --------------------------------------------------------------------------------------------


class SecretSetParams(Params, frozen=True):
    """Keep a secret, new or changed: exactly one of value, command and credential.

    Sandboxes that have it keep what they have, until it is given anew.
    """

    name: SecretName
    value: Annotated[bytes, Meta(min_length=1, max_length=65536)] | None = None
    command: Annotated[list[Annotated[str, Meta(max_length=4096)]], Meta(min_length=1, max_length=64)] | None = None
    """Program and arguments, run by the daemon each time the value is needed; what it prints is the value, without a
    line feed at its end. It has 30 seconds."""
    credential: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    """Of those that systemd gives to the daemon's unit (``LoadCredential=``)."""


class SecretRemoveParams(Params, frozen=True):
    """Forget a secret. Refused where sandboxes have it: they could not be started again."""

    name: SecretName
    force: bool = False
    """All the same. What sandboxes were given stays with them until they stop."""


class SecretGiveParams(Params, frozen=True):
    """Give secrets to a running sandbox: those that it has are renewed, too."""

    sandbox: SandboxRef
    secrets: Annotated[list[SecretName], Meta(min_length=1, max_length=64)]


class SecretTakeParams(Params, frozen=True):
    """Take secrets from a sandbox that runs or is stopped: their files, and that it is given them when it starts.

    What has read one knows it all the same.
    """

    sandbox: SandboxRef
    secrets: Annotated[list[SecretName], Meta(min_length=1, max_length=64)]


class SecretInfo(Reply, frozen=True):
    """What may be said of a secret: never its value."""

    name: str
    size_bytes: int | None
    """null: nobody knows before its command is run."""
    changed_at_ms: int
    source: Literal["file", "command", "credential"]
    origin: str
    """The command, or the credential's name; empty: it is kept in a file of the daemon's own."""
    sandboxes: list[str]
    """Ids of those that it was given to, or whose requests it is added to."""


class SecretList(Reply, frozen=True):
    """The secrets that are kept."""

    secrets: list[SecretInfo]


# --- the audit log --------------------------------------------------------------------------------------


AuditKind = Literal[
    "request", "underway", "refused", "begun", "ended", "genesis", "continued", "gap", "torn", "mismatch"
]


class AuditQueryParams(Params, frozen=True):
    """Read the audit log."""

    since_ms: Annotated[int, Meta(ge=0)] | None = None
    """Milliseconds since the epoch."""
    until_ms: Annotated[int, Meta(ge=0)] | None = None
    sandbox: SandboxRef | None = None
    """By its id it may be gone."""
    method: Annotated[str, Meta(min_length=1, max_length=64), AUDITED] | None = None
    """A method, or a family of them, such as ``commands``."""
    uid: Annotated[int, Meta(ge=0)] | None = None
    result: Annotated[str, Meta(min_length=1, max_length=64), AUDITED] | None = None
    """``ok``, the type of an error, or ``failed`` for whatever is not ``ok``."""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    """How many at most: the last ones."""


class AuditEntry(Reply, frozen=True):
    """One line of the audit log."""

    seq: int
    at_ms: int
    """Milliseconds since the epoch; of a request, when it came."""
    kind: AuditKind
    """``request``: one that has ended. ``underway``: one that has not, after a second. ``refused``: another user who
    connected, and was turned away. ``begun``, ``ended``: the daemon. ``genesis``: the first line of all.
    ``continued``: the first of another file. ``gap``: lines before this one could not be written and are lost.
    ``torn``: the line before was cut short when the daemon was killed. ``mismatch``: the log was not as the daemon
    had left it."""
    uid: int | None = None
    pid: int | None = None
    exe: str | None = None
    """The program of the peer when it connected, as far as that could be seen."""
    method: str | None = None
    sandbox: str | None = None
    """Its id."""
    arguments: dict[str, Any] = {}
    """Of variables and metadata only the names, of long ones the beginning; never what was written or typed."""
    result: str | None = None
    """``ok``, or the type of the error."""
    duration_ms: float | None = None
    data: dict[str, str | int | None] = {}
    """What else there is to say: ``lost`` of a gap; ``bytes`` and ``sha256`` of what was torn."""


class AuditEntries(Reply, frozen=True):
    """What was found, the oldest first."""

    entries: list[AuditEntry]
    more: bool
    """There are older ones that fit as well."""


class AuditProblem(Reply, frozen=True):
    """A line that is not as it was written."""

    file: str
    line: int
    """From 1 on; 0: the file as a whole."""
    seq: int | None
    kind: Literal["changed", "removed", "inserted", "unreadable", "missing", "mismatch"]
    """``inserted``: or moved. ``missing``: a whole file."""
    detail: str


class AuditVerified(Reply, frozen=True):
    """What became of the chain of lines."""

    intact: bool
    files: int
    records: int
    first_seq: int | None
    last_seq: int | None
    head: str
    """SHA-256 of the last line: kept elsewhere, it proves later that nothing before it was changed."""
    gaps: int
    """Lines that could not be written and are lost, which the log itself says."""
    torn: int
    """Lines that were cut short by a crash, which the log itself says."""
    problems: list[AuditProblem]
    """The first hundred."""
    problem_count: int


# --- images, daemon -------------------------------------------------------------------------------------


class ImageListParams(Params, frozen=True):
    """List the images that the engines hold."""

    engine: EngineChoice | None = None


class ImageInfo(Reply, frozen=True):
    """One image."""

    engine: str
    image_id: str
    tags: list[str]
    size_bytes: int | None
    created_at_ms: int | None


class ImageList(Reply, frozen=True):
    """Images."""

    images: list[ImageInfo]


class ImageBuildParams(Params, frozen=True):
    """Make the default image, without any registry where none answers.

    ``registry``: build the shipped Containerfile. ``distribution``: from this distribution's own packages.
    ``busybox``: one static busybox. ``auto``: the first of these that works. Progress comes as ``$/progress``.
    """

    engine: EngineChoice | None = None
    """Default: every usable engine."""
    source: Literal["auto", "registry", "distribution", "busybox"] = "auto"
    reference: Text | None = None
    """Default: the configured image."""
    force: bool = False
    """Build even if the engine holds it already."""


class ImageBuilt(Reply, frozen=True):
    """Images were made."""

    images: list[ImageInfo]
    source: str
    timings_ms: dict[str, float]


class NoParams(Params, frozen=True):
    """Nothing to say."""


class EngineReport(Reply, frozen=True):
    """One engine, as found."""

    name: str
    usable: bool
    reason: str
    hint: str
    default: bool
    client_version: str | None
    server_version: str | None
    rootless: bool | None
    cgroup_version: str | None
    cgroup_manager: str | None
    controllers: list[str]
    oci_runtime: str | None
    oci_runtime_reason: str
    storage_driver: str | None
    socket_path: str | None
    nofile_hard_max: int | None
    capabilities: dict[str, bool | str]
    warnings: list[str]


class DaemonInfo(Reply, frozen=True):
    """The daemon."""

    pid: int
    version: str
    protocol_version: int
    socket: str
    state_dir: str
    started_at_ms: int
    engines: list[EngineReport]
    sandboxes: int
    rss_bytes: int


class Check(Reply, frozen=True):
    """One finding of doctor."""

    name: str
    status: Literal["ok", "warning", "failure"]
    detail: str
    fix: str
    """The one command that mends it; empty when nothing is wrong."""


class DoctorReport(Reply, frozen=True):
    """All findings."""

    healthy: bool
    checks: list[Check]


class JournalRepaired(Reply, frozen=True):
    """What was done about the journal."""

    kept_aside: str
    """Where the damaged file is now; empty: the journal was whole, and nothing was done."""
    sandboxes: int
    rebuilt: list[str]
    """Ids of the sandboxes that only their containers were left of."""
    unseen_engines: list[str]
    """Engines that did not answer; what they have is taken in when they do."""


class DaemonMetrics(Reply, frozen=True):
    """Figures for a monitoring system."""

    content_type: str
    text: str
    """OpenMetrics text."""


class GcParams(Params, frozen=True):
    """Which of it."""

    dry_run: bool = False
    """Only look."""


class GcFinding(Reply, frozen=True):
    """Something that is not as it should be, or is nobody's."""

    kind: Literal["container", "sandbox", "output", "layer", "directory", "programs"]
    name: str
    """Of what would be removed or changed: a container's id, a sandbox's, a directory."""
    engine: str
    """Empty where it is on the host."""
    action: str
    """``remove``, or what is noted of a sandbox: ``adopt forget note_paused note_stopped note_lost``."""
    reason: str


class GcReport(Reply, frozen=True):
    """What was found, and, unless it was only looked for, dealt with."""

    dry_run: bool
    found: list[GcFinding]
    unseen_engines: list[str]
    """Engines that did not answer: what they have is not looked at."""


class ConfigEntry(Reply, frozen=True):
    """One setting, as it is in force."""

    key: str
    value: str
    origin: str
    """``default``, the file's path, or the environment variable's name."""
    description: str


class DaemonConfig(Reply, frozen=True):
    """All settings in force."""

    entries: list[ConfigEntry]


class DaemonLeft(Reply, frozen=True):
    """Carries something for the daemon that comes next."""

    name: str
    """``sandboxd-handover`` for the listening socket, else that of the stdin of a command."""


class DaemonReloaded(Reply, frozen=True):
    """What came of reading the settings again."""

    changed: list[str]
    """Keys of settings that are in force now."""
    waiting: list[str]
    """Keys of those that were changed as well, and will be in force after a restart of the daemon."""


class Acknowledged(Reply, frozen=True):
    """Done."""


class CancelParams(Params, frozen=True):
    """Params of ``$/cancelRequest``."""

    id: int | str


class ProgressParams(Reply, frozen=True):
    """Params of ``$/progress``: how far the request ``token`` is."""

    token: int | str
    message: str
    done: int | None = None
    """Of a transfer: bytes."""
    total: int | None = None
    entries: int | None = None
    """Of a transfer."""


# --- pools and templates --------------------------------------------------------------------------------


class TemplateParams(Params, frozen=True):
    """Name one template."""

    template: TemplateName = "default"


class TemplateInfo(Reply, frozen=True):
    """A named recipe for sandboxes."""

    name: str
    description: str
    engine: str
    image: str
    memory: str
    cpus: str
    pids: int
    shm: str
    tmp: str
    nofile: int
    network: str
    allow: list[str]
    deny: list[str]
    inject: list[str]
    env: dict[str, str]
    pool_min: int
    pool_max: int


class TemplateList(Reply, frozen=True):
    """All templates."""

    templates: list[TemplateInfo]


class PoolResizeParams(TemplateParams, frozen=True):
    """Change the bounds of a pool until the daemon ends; also ends a drain."""

    min: SlotCount | None = None
    max: SlotCount | None = None


class PoolWarmParams(TemplateParams, frozen=True):
    """Make slots now, as if they had just been asked for."""

    count: Annotated[int, Meta(ge=1, le=512)] = 1
    timeout: Quantity = 120
    """How long to wait for them, as a duration."""


class PoolInfo(Reply, frozen=True):
    """The slots of one recipe: a template, as it is on one engine, for one user."""

    template: str
    engine: str
    image: str
    user: str
    """uid:gid inside."""
    workspace: str | None
    """The project that is mounted into its slots, where that cannot be done later."""
    min: int
    max: int
    target: int
    """How many there should be now."""
    warm: int
    filling: int
    waiting: int
    """Callers who wait for a slot."""
    drained: bool
    made: int
    hits: int
    misses: dict[str, int]
    """By reason."""
    lost: int
    """Slots that died."""
    ready_ms: float | None
    """How long a slot takes to be made; a moving average."""
    failure: str
    """Why the last slot could not be made; empty once one could."""


class PoolList(Reply, frozen=True):
    """All pools."""

    pools: list[PoolInfo]


class PoolDrained(Reply, frozen=True):
    """How many slots were let go."""

    drained: int


class PoolWarmed(Reply, frozen=True):
    """How many slots are warm."""

    warm: int


# --- the table ------------------------------------------------------------------------------------------


class Method(Struct, frozen=True):
    """One row of the method table."""

    name: str
    params: type[Params]
    result: type[Reply]
    summary: str
    descriptors: int = 0
    """How many descriptors a request may carry."""
    reads: bool = False
    """It changes nothing: the audit log has it only where ``audit.reads`` says so."""


METHODS: tuple[Method, ...] = (
    Method("sandbox/create", SandboxCreateParams, SandboxInfo, "Make a sandbox and prove its limits."),
    Method(
        "sandbox/get",
        SandboxParams,
        SandboxInfo,
        "Everything about one sandbox, the engine's view included.",
        reads=True,
    ),
    Method("sandbox/list", SandboxListParams, SandboxList, "The sandboxes of this daemon.", reads=True),
    Method("sandbox/update", SandboxUpdateParams, SandboxInfo, "Change limits while it runs and prove them again."),
    Method("sandbox/stop", SandboxStopParams, SandboxInfo, "Stop; it can be started again."),
    Method("sandbox/start", SandboxParams, SandboxInfo, "Start a stopped sandbox and prove its limits again."),
    Method(
        "sandbox/connect", SandboxConnectParams, SandboxInfo, "Have a sandbox that can be used: resumed if need be."
    ),
    Method("sandbox/set_timeout", SandboxTimeoutParams, SandboxLifetime, "Change how long it lasts, from now on."),
    Method("sandbox/touch", SandboxParams, SandboxLifetime, "Say that it is still needed: it is not idle."),
    Method("sandbox/pause", SandboxParams, SandboxInfo, "Freeze all that runs in it; it keeps its memory."),
    Method("sandbox/resume", SandboxParams, SandboxInfo, "Let a paused sandbox go on."),
    Method("sandbox/kill", SandboxKillParams, SandboxGone, "End everything in it and remove it without a trace."),
    Method(
        "sandbox/metrics",
        SandboxMetricsParams,
        SandboxMetricsList,
        "Usage, read from the control groups.",
        reads=True,
    ),
    Method("sandbox/verify", SandboxVerifyParams, SandboxVerification, "Read the limits again, or provoke them."),
    Method("commands/run", CommandParams, CommandEnd, "Run a command and wait for its end.", 3),
    Method("commands/start", CommandParams, CommandStarted, "Run a command in the background.", 3),
    Method("commands/wait", CommandRef, CommandEnd, "Wait for a command's end.", reads=True),
    Method("commands/signal", CommandSignalParams, Acknowledged, "Send a signal to a command."),
    Method("commands/kill", CommandRef, CommandEnd, "Kill a command's whole tree and wait until nothing is left."),
    Method(
        "commands/connect", CommandConnectParams, CommandEnd, "Follow a command's output, to its end.", reads=True
    ),
    Method("commands/logs", CommandLogsParams, CommandLogs, "Read kept output.", reads=True),
    Method("commands/send_stdin", CommandInputParams, Acknowledged, "Write to a command's stdin or terminal."),
    Method("commands/close_stdin", CommandRef, Acknowledged, "Close a command's stdin: it reads end of file."),
    Method("commands/resize", CommandResizeParams, Acknowledged, "Change the size of a command's terminal."),
    Method(
        "commands/list", CommandListParams, CommandList, "Commands that run, linger, or ended lately.", reads=True
    ),
    Method("shells/open", ShellOpenParams, ShellInfo, "Open a shell that keeps its state from run to run."),
    Method(
        "shells/run", ShellRunParams, ShellEnd, "Let a shell evaluate some text, and wait until it is ready again."
    ),
    Method("shells/interrupt", ShellRef, ShellInterrupted, "End what a shell runs: INT, TERM, KILL, or a new shell."),
    Method("shells/list", ShellListParams, ShellList, "The shells of a sandbox.", reads=True),
    Method("shells/close", ShellRef, Acknowledged, "End a shell and all that it left running."),
    Method("files/read", FileReadParams, FileContent, "Read a part of a regular file.", reads=True),
    Method("files/write", FileWriteParams, FileInfo, "Replace a file's content: whole or not at all.", 1),
    Method("files/list", FileListParams, FileList, "What is below a directory.", reads=True),
    Method("files/stat", FileStatParams, FileInfo, "Look at one file.", reads=True),
    Method("files/exists", FileStatParams, FileExists, "Whether something bears a name.", reads=True),
    Method("files/make_dir", FileMakeDirParams, FileMade, "Make a directory."),
    Method("files/rename", FileRenameParams, Acknowledged, "Rename a file or directory."),
    Method("files/remove", FileRemoveParams, Acknowledged, "Remove a file, or a whole tree."),
    Method(
        "files/watch", FileWatchParams, FileWatchEnd, "Tell what changes below a path, until cancelled.", reads=True
    ),
    Method("files/upload", FileUploadParams, FileTransfer, "Put a tree or a file into it, over a descriptor.", 1),
    Method(
        "files/download",
        FileDownloadParams,
        FileTransfer,
        "Get a tree or a file from it, over a descriptor.",
        1,
        reads=True,
    ),
    Method(
        "events/subscribe",
        EventsParams,
        EventsEnd,
        "Be told what happens to sandboxes, from a number on.",
        reads=True,
    ),
    Method(
        "network/get",
        SandboxParams,
        NetworkInfo,
        "What a sandbox may reach, what it did, what was refused.",
        reads=True,
    ),
    Method("network/set", NetworkSetParams, NetworkInfo, "Change what a running sandbox may reach."),
    Method("ports/forward", PortForwardParams, PortForward, "Lead a port or a Unix socket of the host inside."),
    Method("ports/list", SandboxParams, PortList, "What is forwarded, and what listens inside.", reads=True),
    Method("ports/close", PortCloseParams, Acknowledged, "Close a forward."),
    Method("secret/set", SecretSetParams, Acknowledged, "Keep a secret."),
    Method("secret/list", NoParams, SecretList, "The names of the secrets, and who has them.", reads=True),
    Method("secret/remove", SecretRemoveParams, Acknowledged, "Forget a secret."),
    Method("secret/give", SecretGiveParams, Acknowledged, "Give secrets to a running sandbox."),
    Method("secret/take", SecretTakeParams, Acknowledged, "Take secrets from a sandbox."),
    Method("service/list", NoParams, ServiceList, "The services that sandboxes may share.", reads=True),
    Method("service/logs", ServiceLogsParams, ServiceLogs, "What a service printed.", reads=True),
    Method("service/restart", ServiceParams, ServiceInfo, "End a service and start it anew."),
    Method("service/backup", ServiceFileParams, ServiceBackup, "Copy a service's data, as it is at one moment."),
    Method("service/restore", ServiceFileParams, ServiceBackup, "Put a copy of a service's data back."),
    Method(
        "workspace/diff", WorkspaceDiffParams, WorkspaceDiff, "What a sandbox changed of its project.", reads=True
    ),
    Method("workspace/apply", WorkspaceApplyParams, WorkspaceApplied, "Carry changes back to the project."),
    Method("workspace/reset", WorkspaceResetParams, WorkspaceApplied, "Undo what a sandbox changed."),
    Method("pool/list", NoParams, PoolList, "Warm slots, and how they were used.", reads=True),
    Method("pool/resize", PoolResizeParams, PoolList, "Change how many slots a template has."),
    Method("pool/drain", TemplateParams, PoolDrained, "Let all slots of a template go, and make no more."),
    Method("pool/warm", PoolWarmParams, PoolWarmed, "Make slots of a template now."),
    Method("template/list", NoParams, TemplateList, "The named recipes for sandboxes.", reads=True),
    Method("template/get", TemplateParams, TemplateInfo, "One of them.", reads=True),
    Method("image/list", ImageListParams, ImageList, "Images that the engines hold.", reads=True),
    Method("image/build", ImageBuildParams, ImageBuilt, "Make the default image, without a registry if need be."),
    Method("daemon/info", NoParams, DaemonInfo, "The daemon and the engines that it drives.", reads=True),
    Method("daemon/doctor", NoParams, DoctorReport, "Check the host, and say what mends it.", reads=True),
    Method("daemon/config", NoParams, DaemonConfig, "Every setting in force, and where it comes from.", reads=True),
    Method(
        "daemon/repair",
        NoParams,
        JournalRepaired,
        "Write a journal that was damaged anew, from what is left of it, the containers and their init.",
    ),
    Method(
        "daemon/gc", GcParams, GcReport, "Remove what is nobody's, and make records and engines agree; or only look."
    ),
    Method("daemon/reload", NoParams, DaemonReloaded, "Read the settings again; SIGHUP does the same."),
    Method("daemon/metrics", NoParams, DaemonMetrics, "Figures of the daemon, as OpenMetrics text.", reads=True),
    Method(
        "daemon/handover",
        NoParams,
        Acknowledged,
        "Stop the daemon, and send `daemon/left` first: who connects waits for the next daemon.",
    ),
    Method("daemon/shutdown", NoParams, Acknowledged, "Stop the daemon; sandboxes stay."),
    Method("audit/query", AuditQueryParams, AuditEntries, "Who asked for what, and what came of it.", reads=True),
    Method("audit/verify", NoParams, AuditVerified, "Whether the audit log is as it was written.", reads=True),
)

METHOD_BY_NAME: dict[str, Method] = {method.name: method for method in METHODS}


# --- JSON-RPC envelope ----------------------------------------------------------------------------------


class Request(Struct, frozen=True):
    """A request, or a notification when ``id`` is absent. ``params`` stays raw until the method is known."""

    jsonrpc: Literal["2.0"]
    method: Annotated[str, Meta(max_length=64)]
    id: int | Annotated[str, Meta(max_length=64)] | UnsetType | None = UNSET
    params: msgspec.Raw = msgspec.Raw(b"{}")


class ErrorData(Struct, frozen=True, kw_only=True):
    """What our own errors carry."""

    type: str
    """``invalid_argument not_found conflict timeout limit_not_enforceable capacity_exceeded not_enough_space
    pool_exhausted sandbox_gone engine_unavailable engine_refused unauthorized unsupported prerequisite_missing
    audit_unavailable command_not_started journal_unusable stopping internal``."""
    brief: str
    detail: str
    hint: str


class ErrorObject(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A JSON-RPC error."""

    code: int
    message: str
    data: ErrorData | None = None


class Response(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A reply to a request."""

    jsonrpc: Literal["2.0"]
    id: int | str | None
    result: Any = UNSET
    error: ErrorObject | UnsetType = UNSET


class Notification(Struct, frozen=True, kw_only=True):
    """What the daemon says unasked."""

    jsonrpc: Literal["2.0"]
    method: str
    params: Any
