"""What the engines answer: bytes in, model out. Docker and Podman side by side.

Pure. An answer is untrusted input: it is validated field by field, and whatever is not what it should be raises
``UnreadableAnswer`` and nothing else. Unknown fields are passed over, for later versions of the engines.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar, assert_never

import msgspec
from msgspec import Meta

from runtimes.errors import UnreadableAnswer
from runtimes.model import (
    CONTAINER_NAME_PREFIX,
    CPU_MILLIS_PER_CPU,
    LABEL_NOTE,
    LABEL_OWNER,
    LABEL_SANDBOX,
    ContainerEvent,
    ContainerFacts,
    ContainerState,
    ContainerSummary,
    EngineName,
    Happening,
    Limits,
    Network,
    User,
)
from runtimes.quantities import parse_cpu_list

ERROR_CHARS_MAX = 1000
ERROR_LINES_MAX = 5

_NANO_PER_MILLI = 1_000_000
_CPU_PERIOD_US = 100_000
"""The kernel's default CFS period, which an engine means when it gives a quota and no period."""

_STATES = {
    "configured": ContainerState.CREATED,
    "created": ContainerState.CREATED,
    "initialized": ContainerState.CREATED,
    "running": ContainerState.RUNNING,
    "paused": ContainerState.PAUSED,
    "exited": ContainerState.EXITED,
    "stopped": ContainerState.EXITED,
}

_HAPPENINGS = {
    "start": Happening.STARTED,
    "die": Happening.ENDED,
    "died": Happening.ENDED,
    "pause": Happening.PAUSED,
    "unpause": Happening.RESUMED,
    "destroy": Happening.REMOVED,
    "remove": Happening.REMOVED,
}

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NOISE = re.compile(r'time="[^"]*" level=(?:debug|info|warning) |Run \'docker .* --help\'|See \'docker .* --help\'')
"""Lines of a client's stderr that do not say why a call failed."""

_CONTAINER_ID = r"^[0-9a-f]{64}$"
_ContainerId = Annotated[str, Meta(pattern=_CONTAINER_ID)]
_ImageId = Annotated[str, Meta(pattern=r"^(?:sha256:)?[0-9a-f]{64}$")]
_Word = Annotated[str, Meta(max_length=64)]
_Label = Annotated[str, Meta(max_length=4096)]
_Pid = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Count = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

_T = TypeVar("_T")


class _PodmanRow(msgspec.Struct, rename="pascal"):
    id: _ContainerId
    state: _Word
    labels: dict[str, Any] | None = None
    names: tuple[_Label, ...] = ()


class _PodmanEvent(msgspec.Struct, rename="pascal"):
    status: _Word
    id: _ContainerId = msgspec.field(name="ID")


class _State(msgspec.Struct, rename="pascal"):
    status: _Word
    pid: _Pid = 0
    exit_code: _Count = 0
    oom_killed: bool | None = msgspec.field(default=None, name="OOMKilled")


class _Ulimit(msgspec.Struct, rename="pascal"):
    name: _Word
    hard: _Count


class _HostConfig(msgspec.Struct, rename="pascal"):
    memory: _Count | None = None
    nano_cpus: _Count | None = None
    cpu_quota: _Count | None = None
    cpu_period: _Count | None = None
    pids_limit: _Count | None = None
    cpuset_cpus: Annotated[str, Meta(max_length=4096)] | None = None
    shm_size: _Count | None = None
    ulimits: list[_Ulimit] | None = None
    network_mode: _Label = ""


class _Config(msgspec.Struct, rename="pascal"):
    labels: dict[str, str] | None = None
    image: _Label = ""
    user: _Label = ""


class _Inspect(msgspec.Struct, rename="pascal"):
    id: _ContainerId
    state: _State
    image: _ImageId
    host_config: _HostConfig
    config: _Config


class DockerClientInfo(msgspec.Struct, frozen=True, rename="pascal"):
    """What ``docker info`` says of the client itself, whether or not a server answered."""

    version: _Word = ""


class DockerInfo(msgspec.Struct, frozen=True, rename="pascal"):
    """What is asked of ``docker info``."""

    server_version: _Word = ""
    operating_system: _Label = ""
    driver: _Word = ""
    cgroup_driver: _Word = ""
    default_runtime: _Word = ""
    memory_limit: bool = False
    swap_limit: bool = False
    cpu_cfs_quota: bool = False
    cpu_set: bool = msgspec.field(default=False, name="CPUSet")
    pids_limit: bool = False
    security_options: tuple[str, ...] | None = None
    client_info: DockerClientInfo = DockerClientInfo()
    host: dict[str, Any] | None = msgspec.field(default=None, name="host")
    """Only Podman says this: its own stand-in for the ``docker`` program answered."""


class PodmanRuntime(msgspec.Struct, frozen=True):
    """The OCI runtime that Podman takes when it is told nothing."""

    name: _Word = ""


class IdMapping(msgspec.Struct, frozen=True):
    """One range of uids of the user namespace."""

    size: int = 0


class IdMappings(msgspec.Struct, frozen=True):
    """The uids of the user namespace; nothing for a rootful Podman."""

    uidmap: tuple[IdMapping, ...] | None = None


class PodmanSecurity(msgspec.Struct, frozen=True):
    """How Podman runs."""

    rootless: bool


class PodmanHost(msgspec.Struct, frozen=True, rename="camel"):
    """The host as Podman sees it."""

    security: PodmanSecurity
    cgroup_manager: _Word
    cgroup_controllers: tuple[_Word, ...] | None = None
    oci_runtime: PodmanRuntime = PodmanRuntime()
    id_mappings: IdMappings = IdMappings()
    service_is_remote: bool = False


class PodmanStore(msgspec.Struct, frozen=True, rename="camel"):
    """Where images and containers are kept."""

    graph_driver_name: _Word = ""


class PodmanVersion(msgspec.Struct, frozen=True, rename="pascal"):
    """Podman is its own server: one version is both."""

    version: _Word


class PodmanInfo(msgspec.Struct, frozen=True):
    """What is asked of ``podman info``."""

    host: PodmanHost
    version: PodmanVersion
    store: PodmanStore = PodmanStore()


def container_id(answer: bytes) -> str:
    """The id that ``run --detach`` printed: the last line, for a client may print others before it."""
    lines = answer.decode(errors="replace").split()
    if not lines or re.match(_CONTAINER_ID, lines[-1]) is None:
        raise _unreadable("the id of a new container", repr(answer[-200:]))
    return lines[-1]


def containers(engine: EngineName, answer: bytes) -> list[ContainerSummary]:
    """The rows of ``list_argv`` that carry both identity labels."""
    match engine:
        case EngineName.DOCKER:
            rows = _docker_rows(answer)
        case EngineName.PODMAN:
            rows = _podman_rows(answer)
        case _:
            assert_never(engine)
    return [row for row in rows if row.sandbox_id and row.owner]


def container_event(engine: EngineName, line: bytes) -> ContainerEvent | None:
    """One line of ``events_argv``; None where it is of no interest."""
    match engine:
        case EngineName.DOCKER:
            container_id, word = _decode(line, tuple[_ContainerId, _Word], "an event")
        case EngineName.PODMAN:
            event = _decode(line, _PodmanEvent, "an event")
            container_id, word = event.id, event.status
        case _:
            assert_never(engine)
    happening = _HAPPENINGS.get(word)
    return None if happening is None else ContainerEvent(container_id=container_id, happening=happening)


def container_facts(answer: bytes) -> ContainerFacts:
    """``container inspect`` of one container, by either engine."""
    found = _decode(answer, list[_Inspect], "inspect")
    if len(found) != 1:
        raise _unreadable("inspect", f"{len(found)} containers instead of one")
    (inspect,) = found
    labels = inspect.config.labels or {}
    state = _state(inspect.state.status)
    return ContainerFacts(
        container_id=inspect.id,
        sandbox_id=labels.get(LABEL_SANDBOX),
        owner=labels.get(LABEL_OWNER),
        state=state,
        pid=inspect.state.pid or None,
        exit_code=inspect.state.exit_code if state is ContainerState.EXITED else None,
        oom_killed=inspect.state.oom_killed,
        image_id=image_id(inspect.image),
        limits=_limits(inspect.host_config),
        note=labels.get(LABEL_NOTE, ""),
        image=inspect.config.image,
        user=_user(inspect.config.user),
        network=Network.NONE if inspect.host_config.network_mode == "none" else Network.FULL,
    )


def _user(text: str) -> User:
    """We always say both numbers; whatever else there is means root."""
    match = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    return User(uid=int(match[1]), gid=int(match[2])) if match else User(uid=0, gid=0)


def image_id(text: str) -> str:
    """An image's id as 64 digits: Docker writes ``sha256:`` before it, Podman does not."""
    digits = text.strip().removeprefix("sha256:")
    if re.match(_CONTAINER_ID, digits) is None:
        raise _unreadable("the id of an image", repr(text[-200:]))
    return digits


def complaint(stderr: bytes) -> str:
    """The last lines of a client's stderr as bounded plain text, without warnings and advice."""
    text = _ESCAPE_SEQUENCE.sub("", stderr.decode(errors="replace"))
    lines = [_CONTROL.sub("", line).strip() for line in text.replace("\r", "\n").split("\n")]
    telling = [line for line in lines if line and _NOISE.match(line) is None]
    return "\n".join(telling[-ERROR_LINES_MAX:])[-ERROR_CHARS_MAX:]


def docker_info(answer: bytes) -> DockerInfo:
    """``docker info``. Where no server answered, ``server_version`` is empty and the rest says nothing."""
    info: DockerInfo = _decode(answer, DockerInfo, "info")
    return info


def chooses_context(settings: bytes) -> bool:
    """Whether the ``config.json`` of Docker's client may choose another context than the default one.

    The client takes a key however its letters are written, and the last of several.

    Raises:
        UnreadableAnswer: it is no such file.
    """
    fields: dict[str, msgspec.Raw] = _decode(settings, dict[str, msgspec.Raw], "config.json")
    return any(key.lower() == "currentcontext" and bytes(value) not in _NO_CONTEXT for key, value in fields.items())


_NO_CONTEXT = frozenset({b'""', b'"default"'})


def podman_info(answer: bytes) -> PodmanInfo:
    """``podman info``."""
    info: PodmanInfo = _decode(answer, PodmanInfo, "info")
    return info


def version(text: str) -> tuple[int, int]:
    """Major and minor number of an engine's version; (0, 0) where there are none."""
    match = re.match(r"v?([0-9]{1,5})\.([0-9]{1,5})", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _docker_rows(answer: bytes) -> list[ContainerSummary]:
    rows = (
        _decode(line, tuple[_ContainerId, _Word, _Label, _Label, _Label], "a list of containers")
        for line in answer.splitlines()
        if line.strip()
    )
    return [
        ContainerSummary(
            container_id=identifier,
            sandbox_id=sandbox_id,
            owner=owner,
            state=_state(state),
            named_by_us=_own_name(sandbox_id) in names.split(","),
        )
        for identifier, state, sandbox_id, owner, names in rows
    ]


def _podman_rows(answer: bytes) -> list[ContainerSummary]:
    rows = _decode(answer, list[_PodmanRow] | None, "a list of containers") or []
    return [
        ContainerSummary(
            container_id=row.id,
            sandbox_id=_label(row.labels, LABEL_SANDBOX),
            owner=_label(row.labels, LABEL_OWNER),
            state=_state(row.state),
            named_by_us=_own_name(_label(row.labels, LABEL_SANDBOX)) in row.names,
        )
        for row in rows
    ]


def _own_name(sandbox_id: str) -> str:
    return f"{CONTAINER_NAME_PREFIX}{sandbox_id}"


def _label(labels: dict[str, Any] | None, name: str) -> str:
    value = (labels or {}).get(name, "")
    if not isinstance(value, str):
        raise _unreadable("a list of containers", f"the label {name} is no text")
    return value


def _state(word: str) -> ContainerState:
    return _STATES.get(word.lower(), ContainerState.OTHER)


def _limits(config: _HostConfig) -> Limits:
    cpus = config.cpuset_cpus
    nofile = [limit.hard for limit in config.ulimits or () if limit.name.lower().endswith("nofile")]
    return Limits(
        memory_bytes_max=_positive(config.memory),
        cpu_millis=_cpu_millis(config),
        pids_max=_positive(config.pids_limit),
        cpuset_cpus=_cpuset(cpus) if cpus else None,
        shm_bytes_max=_positive(config.shm_size),
        nofile_max=_positive(nofile[-1]) if nofile else None,
    )


def _cpuset(text: str) -> tuple[int, ...]:
    cpus = parse_cpu_list(text)
    if cpus is None:
        raise _unreadable("a set of CPUs", repr(text[:200]))
    return cpus


def _positive(value: int | None) -> int | None:
    """Zero and minus one are the engines' words for "not limited"."""
    return value if value is not None and value > 0 else None


def _cpu_millis(config: _HostConfig) -> int | None:
    nano = _positive(config.nano_cpus)
    if nano is not None:
        return nano // _NANO_PER_MILLI
    quota = _positive(config.cpu_quota)
    if quota is None:
        return None
    return quota * CPU_MILLIS_PER_CPU // (_positive(config.cpu_period) or _CPU_PERIOD_US)


def _decode(answer: bytes, shape: type[_T] | Any, what: str) -> Any:
    try:
        return msgspec.json.decode(answer, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(what, str(error)) from error


def _unreadable(what: str, detail: str) -> UnreadableAnswer:
    return UnreadableAnswer(f"cannot read the engine's answer: {what}", detail=detail[:ERROR_CHARS_MAX])
