"""The values that cross the engine contract.

Pure data, frozen, with units in the names. ``None`` always means "not asked for" in a request and
"unknown" in a reading, never zero.
"""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

LABEL_SANDBOX = "io.sandboxd.sandbox"
"""Label that carries the sandbox id: what a container is found by."""

LABEL_OWNER = "io.sandboxd.owner"
"""Label that carries the id of the daemon's state directory: whose container it is."""

LABEL_NOTE = "io.sandboxd.note"
"""Label that carries what else its owner wants to know of a container that it finds again."""

CONTAINER_NAME_PREFIX = "sandboxd-"
"""Before the sandbox id: what people read in ``docker ps``."""

CPU_MILLIS_PER_CPU = 1000


class EngineName(enum.StrEnum):
    """The engines that can be driven."""

    PODMAN = "podman"
    DOCKER = "docker"


class CgroupVersion(enum.StrEnum):
    """How the host mounts its control groups."""

    V1 = "v1"
    HYBRID = "hybrid"
    """v1 controllers with an empty v2 tree beside them: for limits it is v1, for crun it is neither."""
    V2 = "v2"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resource limits of one container. ``None``: not limited by us."""

    memory_bytes_max: int | None = None
    """Memory and swap together: swap is never given on top of it."""
    cpu_millis: int | None = None
    """CPU time per second of wall time, in thousandths of a CPU."""
    pids_max: int | None = None
    cpuset_cpus: tuple[int, ...] | None = None
    """The host CPUs, ascending, that the container may run on."""
    shm_bytes_max: int | None = None
    """Size of /dev/shm. Fixed when the container is created."""
    nofile_max: int | None = None
    """Open files per process, soft and hard. Fixed when the container is created."""


class OverlayDirs(msgspec.Struct, frozen=True, kw_only=True):
    """Where an overlay that the engine makes keeps what is written to it: absolute host paths of two directories."""

    upper: str
    work: str


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A host path bound into the container."""

    source: str
    """Absolute host path."""
    target: str
    """Absolute path inside."""
    read_only: bool = False
    sealed: bool = False
    """The source is a mount that is already as this one is to be: nosuid, nodev, read-only if asked for."""
    passes_on: bool = False
    """What is mounted on the source later is to be seen inside too."""
    overlay: OverlayDirs | None = None
    """The source is only read, and what is written goes there. Podman's alone."""


class Tmpfs(msgspec.Struct, frozen=True, kw_only=True):
    """A sized tmpfs, nosuid and nodev, that belongs to PID 1's user and is writable by every uid (mode 1777).

    An old OCI runtime may put back the mode that the image's folder has: then it is writable by that user alone.
    """

    target: str
    size_bytes_max: int
    executable: bool = False


class User(msgspec.Struct, frozen=True, kw_only=True):
    """Who PID 1 is inside the container."""

    uid: int
    gid: int


class Network(enum.StrEnum):
    """What the engine gives the container for a network."""

    NONE = "none"
    """Loopback only."""
    FULL = "full"
    """The engine's own default network."""


NetworkSwitch = Literal["", "engine", "user_mode"]
"""``engine``: by the engine itself. ``user_mode``: by a program that speaks for it, see ``runtimes.usernet``."""


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One container, whole: everything the engine is told, before it is told it.

    Hardening is not optional and so is not here: every container is created with all capabilities
    dropped, no-new-privileges, a read-only root and the given seccomp profile.
    """

    sandbox_id: str
    owner: str
    image: str
    command: tuple[str, ...]
    """argv of PID 1, as an absolute path inside the container and its arguments."""
    user: User
    keep_id: bool = False
    """Map the caller's uid to itself (rootless Podman), so that bind-mounted files are its own inside."""
    hostname: str = "sandbox"
    working_dir: str = "/"
    limits: Limits = Limits()
    mounts: tuple[Mount, ...] = ()
    tmpfs: tuple[Tmpfs, ...] = ()
    network: Network = Network.NONE
    seccomp_profile: str
    """Absolute host path of a seccomp profile in the OCI JSON form."""
    nproc_max: int | None = None
    """RLIMIT_NPROC, for engines whose own default is above the host's hard limit."""
    selinux_disable: bool = False
    """Run without SELinux separation, on hosts where bind mounts would otherwise be unreadable inside."""
    note: str = ""
    """What ``ContainerFacts.note`` says later. Everybody who may use the engine can read it."""


class ContainerState(enum.StrEnum):
    """What the engine says of a container, the same words for both engines."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    OTHER = "other"
    """Restarting, removing, dead and whatever a later version may add."""


class ContainerSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the engine's list."""

    container_id: str
    """64 lower-case hexadecimal digits."""
    sandbox_id: str
    owner: str
    state: ContainerState
    named_by_us: bool = True
    """It has the name that we give. One that somebody made of a committed sandbox has our labels and another name:
    it is not ours to remove."""


class Happening(enum.StrEnum):
    """What an engine says has happened to a container."""

    STARTED = "started"
    ENDED = "ended"
    PAUSED = "paused"
    RESUMED = "resumed"
    REMOVED = "removed"


class ContainerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened, whoever did it."""

    container_id: str
    happening: Happening


class ContainerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's inspect of one container, reduced to what we ask of it."""

    container_id: str
    sandbox_id: str | None
    owner: str | None
    state: ContainerState
    pid: int | None
    """Host pid of PID 1, None when it does not run."""
    exit_code: int | None
    oom_killed: bool | None
    image_id: str
    limits: Limits
    """Limits as the engine reports them."""
    note: str = ""
    """As it was given when the container was made; it cannot be changed."""
    image: str = ""
    """The image by the name that it was asked for with."""
    user: User = User(uid=0, gid=0)
    network: Network = Network.NONE


class ImageFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One image that the engine holds."""

    image_id: str
    tags: tuple[str, ...]
    size_bytes: int | None
    created_at_s: float | None
    """Seconds since the epoch."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this engine can do on this host. What it cannot do is refused, never ignored."""

    memory_limit: bool
    cpu_limit: bool
    pids_limit: bool
    cpuset_limit: bool
    keep_id: bool
    """The caller's uid can be mapped to itself inside."""
    rootless: bool
    """Containers are in a user namespace of the caller's: nobody else is master of them."""
    network_none: bool
    pause: bool
    update_pids: bool
    """The engine's own ``update`` can change the pids limit of a running container."""
    update_limits: bool
    """The engine's own ``update`` exists."""
    network_switch: NetworkSwitch = ""
    """How a container that was made without the engine's network gets it while it runs. Empty: it cannot."""
    network_switch_fix: str = ""
    """What to type for that."""
    own_slice: bool = False
    """Containers can be put into a slice of ours that systemd makes, on which all of them can be seen and bounded."""
    update_says_no_healthcheck: bool = False
    """Its ``update`` fails for a container without a health check unless it is told again that there is none."""
    pids_uncounted: bool = False
    """Nobody counts processes here, and yet the engine limits them unless told not to, and then starts nothing."""
    late_for_callers: bool = False
    """Who made a container may change it while it runs, without being root: mounts, sizes of tmpfs, its host name."""
    late_shm: bool = False
    """The size of /dev/shm is among what can be changed late; else it is a namespace's above the container's."""
    overlay_for_callers: bool = False
    """The engine lays an overlay over a directory for callers who may not mount."""
    enters_userns: bool = False
    """The engine runs a program in the user namespace that its containers' users are of."""


class Shortcoming(msgspec.Struct, frozen=True, kw_only=True):
    """Something that an engine lacks on this host, and works without."""

    what: str
    fix: str
    """What to type to mend it."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as found on this host, or the reason why it cannot be used."""

    name: EngineName
    usable: bool
    reason: str
    """One clause: why it can be used, or why not."""
    hint: str = ""
    """What to type to mend it; empty when nothing is wrong."""
    client_path: str | None = None
    client_version: str | None = None
    server_version: str | None = None
    rootless: bool | None = None
    cgroup_version: CgroupVersion | None = None
    cgroup_manager: str | None = None
    """``systemd`` or ``cgroupfs``."""
    controllers: tuple[str, ...] = ()
    """Controllers that limits can be set with: delegated to us, or the engine's own when it is rootful."""
    oci_runtime: str | None = None
    """Name of the OCI runtime that is used."""
    oci_runtime_reason: str = ""
    """Why that runtime; not empty when it is not the engine's default."""
    storage_driver: str | None = None
    socket_path: str | None = None
    nofile_hard_max: int | None = None
    nproc_hard_max: int | None = None
    selinux_enforcing: bool = False
    capabilities: Capabilities | None = None
    warnings: tuple[Shortcoming, ...] = ()
