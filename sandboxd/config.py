"""Settings: text in, ``Config`` out.

Pure: the composition root reads the file and the environment and hands them over. A value is taken from the
environment (``SANDBOXD_<SECTION>_<KEY>``), else from the user's file (``~/.config/sandboxd/config.toml``), else
it is the default below. What a request says comes before all of these. Unknown keys are refused.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from runtimes.argv import host_path, image_reference
from runtimes.errors import Unsupported
from runtimes.quantities import (
    CPU_NUMBER_MAX,
    PIDS_MIN,
    QuantityError,
    parse_cpus,
    parse_duration_ms,
    parse_memory,
    parse_optional_duration_ms,
)
from sandboxd import spelling
from sandboxd.egress_rules import address_of, authority, parse_rules
from sandboxd.failures import InvalidArgument, NotFound
from sandboxd.injections import parse_injections
from sandboxd.protocol import (
    ConfigEntry,
    EngineChoice,
    LimitsPolicy,
    OnTimeout,
    SecretName,
    ServiceName,
    TemplateName,
)

DEFAULT_TEMPLATE = "default"

DEFAULT_IMAGE = "localhost/sandboxd/default:latest"

NOFILE_MIN = 64
"""Fewer, and a shell cannot start."""

SMALL_TMPFS_BYTES_MIN = 64 * 1024
"""For /dev/shm and /tmp: sixteen pages."""

OUTPUT_BYTES_MIN = 64 * 1024
OUTPUT_BYTES_MAX = 2**40
"""Of what is kept of one stream: a head and a tail that say something, and no more than a disk holds."""

SIZE_BYTES_MAX = 2**60

AUDIT_BYTES_MIN = 64 * 1024
"""Of one file of the audit log: some hundred lines."""

SLOTS_MAX = 512
"""Warm slots of one template."""

COUNT_MAX = 2**30
"""Of a default, which is cut to what the host has; this only bounds the arithmetic."""


class Defaults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sandbox gets when its request does not say."""

    engine: Annotated[
        EngineChoice | Literal["auto"], Meta(description="Engine for new sandboxes; auto takes the best that works.")
    ] = "auto"
    image: Annotated[str, Meta(description="Image for new sandboxes.")] = DEFAULT_IMAGE
    memory: Annotated[str, Meta(description="Memory and swap together; at most half of the host's is given.")] = "2g"
    cpus: Annotated[str, Meta(description="CPU quota; at most the host's CPUs are given.")] = "2"
    pids: Annotated[int, Meta(ge=PIDS_MIN, le=COUNT_MAX, description="Processes and threads at once.")] = 512
    shm: Annotated[str, Meta(description="Size of /dev/shm.")] = "64m"
    tmp: Annotated[str, Meta(description="Size of /tmp and of the home directory; counts as memory.")] = "512m"
    nofile: Annotated[int, Meta(ge=NOFILE_MIN, le=COUNT_MAX, description="Open files per process.")] = 4096
    output: Annotated[str, Meta(description="How much of each stream of a spooled command is kept.")] = "64m"
    lifetime: Annotated[
        str, Meta(description="How long a sandbox lasts, such as 12h; none: until it is removed.")
    ] = "none"
    idle_timeout: Annotated[
        str, Meta(description="How long nothing may happen in a sandbox, such as 1h; none: as long as it likes.")
    ] = "none"
    on_timeout: Annotated[
        OnTimeout, Meta(description="What happens then: kill removes the sandbox, pause keeps its memory.")
    ] = "kill"
    network: Annotated[
        Literal["none", "full"], Meta(description="none: loopback only. full: the engine's network.")
    ] = "none"
    services: Annotated[
        str,
        Meta(description="What every sandbox finds on its loopback, such as chroma=private, separated by spaces."),
    ] = ""
    limits_policy: Annotated[
        LimitsPolicy, Meta(description="strict refuses what the host cannot enforce; degraded goes on and says so.")
    ] = "strict"


class Paths(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which paths of the host may be seen inside."""

    allow: Annotated[
        list[str], Meta(description="Directories that may be workspaces although the built-in rules refuse them.")
    ] = []
    deny: Annotated[
        list[str], Meta(description="Directories that are never seen inside, whatever paths.allow says.")
    ] = []


class Workspaces(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Copies of projects."""

    copy_bytes: Annotated[str, Meta(description="Most that a copy of a project may take.")] = "20g"
    copy_entries: Annotated[
        int, Meta(ge=1, le=COUNT_MAX, description="Most files that a copy of a project may have.")
    ] = 500_000


class Daemon(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the daemon behaves."""

    sandboxes_max: Annotated[int, Meta(ge=1, le=10_000, description="Sandboxes at once.")] = 500
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="Messages of less importance are not logged.")
    ] = "info"
    engine_calls_max: Annotated[
        int,
        Meta(ge=1, le=64, description="Calls of one engine at once; more than about three only lengthen each."),
    ] = 3


class Capacity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of this host is promised to sandboxes, all of them together."""

    memory_overcommit: Annotated[
        float, Meta(ge=0, le=10_000, description="How many times the host's memory may be promised; 0: no bound.")
    ] = 32.0
    cpu_overcommit: Annotated[
        float, Meta(ge=0, le=10_000, description="How many times the host's CPUs may be promised; 0: no bound.")
    ] = 0.0
    pids_overcommit: Annotated[
        float, Meta(ge=0, le=10_000, description="How many times the host's pids may be promised; 0: no bound.")
    ] = 4.0
    pack_cpus: Annotated[
        bool,
        Meta(description="Bind sandboxes with a whole number of CPUs to as many, those with the fewest others."),
    ] = False
    memory_reserve: Annotated[
        str, Meta(description="No new sandbox while less of the host's memory than this is available.")
    ] = "128m"


class Audit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The log of who asked for what."""

    enabled: Annotated[bool, Meta(description="Write down each request that changes something.")] = True
    reads: Annotated[bool, Meta(description="And those that only look.")] = False
    required: Annotated[
        bool,
        Meta(description="Refuse requests while they cannot be written down; else work goes on, and it is told."),
    ] = False
    size: Annotated[str, Meta(description="A file of this size is followed by the next.")] = "16m"
    files: Annotated[int, Meta(ge=2, le=10_000, description="So many files are kept.")] = 8


class Metrics(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Figures for a monitoring system."""

    listen: Annotated[
        str, Meta(description="Where they are served over HTTP: unix:/PATH, or ADDRESS:PORT; empty: nowhere.")
    ] = ""


class Chroma(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ChromaDB that sandboxes share."""

    python: Annotated[
        str, Meta(description="Interpreter that has the package chromadb; empty: the daemon's own, with its extra.")
    ] = ""
    memory: Annotated[str, Meta(description="Of its own data; what it maps from files does not count.")] = "4g"
    port: Annotated[int, Meta(ge=1, le=65535, description="Where sandboxes see it.")] = 8000


class Service(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A service of the user's own, declared as ``[services.NAME]``."""

    port: Annotated[int, Meta(ge=1, le=65535)]
    """Where sandboxes see it."""
    command: list[str] = []
    """Run and watched by the daemon; ``{port}`` is the port on 127.0.0.1 that it is to listen on, ``{data}`` a
    directory for its data. Empty: it is run by somebody else, at ``address``."""
    image: str = ""
    """Run it in a container of this image, which has no network; ``{port}`` is then ``port``."""
    engine: EngineChoice | None = None
    cpus: str | None = None
    pids: Annotated[int, Meta(ge=PIDS_MIN, le=COUNT_MAX)] | None = None
    env: dict[str, str] = {}
    data: str = ""
    """Of a container: a directory of the host, seen inside as ``{data}``; empty: it is in memory."""
    secrets: list[SecretName] = []
    """Of a container: secrets that it finds at /run/secrets."""
    address: str = ""
    """``HOST:PORT`` with a loopback address, or the path of a Unix socket."""
    health: str = ""
    """A path that answers GET with 200 while all is well; empty: that it takes connections is enough."""
    memory: str = "2g"
    network: Literal["none", "host"] = "none"
    """Of a command: ``none``, a loopback of its own, on which nobody but the daemon reaches it; ``host``, that of the
    host, for one that has to connect to something, with a port that every user of the host can connect to."""


class Pool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Warm slots, of every template that does not say otherwise."""

    min: Annotated[int, Meta(ge=0, le=SLOTS_MAX, description="Slots that are always kept warm.")] = 0
    max: Annotated[
        int, Meta(ge=0, le=SLOTS_MAX, description="Slots at most, however many are asked for; 0: no pool.")
    ] = 8
    idle: Annotated[str, Meta(description="How long a demand is remembered before its slots are let go.")] = "10m"
    age_max: Annotated[str, Meta(description="A slot that is older is replaced.")] = "6h"
    fills_max: Annotated[int, Meta(ge=1, le=16, description="Slots made at once.")] = 2
    image_look: Annotated[str, Meta(description="How often the image of warm slots is looked at.")] = "15s"
    memory_reserve: Annotated[
        str, Meta(description="No slot is made when the host has less memory than this to give.")
    ] = "1g"


class Template(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named recipe for sandboxes: what it does not say is as in ``defaults``."""

    description: Annotated[str, Meta(max_length=200)] = ""
    engine: EngineChoice | Literal["auto"] | None = None
    image: str | None = None
    memory: str | None = None
    cpus: str | None = None
    pids: Annotated[int, Meta(ge=PIDS_MIN, le=COUNT_MAX)] | None = None
    shm: str | None = None
    tmp: str | None = None
    nofile: Annotated[int, Meta(ge=NOFILE_MIN, le=COUNT_MAX)] | None = None
    network: Literal["none", "full"] | None = None
    allow: list[str] = []
    """Rules of its network, which is then ``allow``, unless a sandbox asks for another one; likewise the next two."""
    deny: list[str] = []
    inject: list[str] = []
    env: dict[str, str] = {}
    pool_min: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] | None = None
    pool_max: Annotated[int, Meta(ge=0, le=SLOTS_MAX)] | None = None


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings."""

    defaults: Defaults = Defaults()
    pool: Pool = Pool()
    paths: Paths = Paths()
    workspaces: Workspaces = Workspaces()
    daemon: Daemon = Daemon()
    capacity: Capacity = Capacity()
    audit: Audit = Audit()
    metrics: Metrics = Metrics()
    chroma: Chroma = Chroma()
    services: dict[str, Service] = {}
    templates: dict[str, Template] = {}


def load_config(text: str, *, origin: str, env: Mapping[str, str]) -> tuple[Config, list[ConfigEntry]]:
    """Return the settings in force and where each comes from.

    Every value is checked here, so that a daemon that starts can make a sandbox of its own defaults.

    Args:
        text: The user's file, TOML; empty when there is none.
        origin: The file's path, for messages.
        env: The environment; only names that begin as those of settings do are looked at.

    Raises:
        InvalidArgument: the file or a variable does not hold what it may; names the setting and where it stands.
    """
    read = _parsed(text, origin)
    services = _services(read.pop("services", {}), origin)
    templates = _templates(read.pop("templates", {}), origin)
    given = _from_file(read, origin) | _from_environment(env)
    sections: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for (section, key), kind in _SETTINGS.items():
        if (section, key) in given:
            sections[section][key] = _checked(f"{section}.{key}", kind, given[section, key])
    config = msgspec.structs.replace(msgspec.convert(sections, Config), services=services, templates=templates)
    entries = _entries(config, {key: value.origin for key, value in given.items()})
    return config, entries + _service_entries(services, origin) + _template_entries(templates, origin)


class _Given(NamedTuple):
    """One value as it was found."""

    value: object
    origin: str
    """A path, or the name of a variable."""
    hint: str


def _settings() -> dict[tuple[str, str], Any]:
    """Section and key of every setting, and its annotated type."""
    return {
        (section, key): hint
        for section, struct in get_type_hints(Config).items()
        if section not in ("services", "templates")
        for key, hint in get_type_hints(struct, include_extras=True).items()
    }


_SETTINGS = _settings()
_SECTIONS = tuple(dict.fromkeys(section for section, _ in _SETTINGS))


def _edit(origin: str) -> str:
    return f"${{EDITOR:-vi}} {shlex.quote(origin)}"


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(
            f"cannot read {origin}", detail=f"it is not TOML: {error}", hint=_edit(origin)
        ) from None


def _services(tables: object, origin: str) -> dict[str, Service]:
    """The services that a user declares."""
    try:
        services = msgspec.convert(tables, dict[ServiceName, Service])
        if "chroma" in services:
            raise msgspec.ValidationError("chroma has a section of its own, [chroma]")
        for name, service in services.items():
            _check_service(name, service)
    except (msgspec.ValidationError, QuantityError, Unsupported) as error:
        raise InvalidArgument(f"cannot use the services in {origin}", detail=str(error), hint=_edit(origin)) from None
    return services


def _check_service(name: str, service: Service) -> None:
    if bool(service.command) == bool(service.address):
        raise msgspec.ValidationError(f"services.{name} needs a command or an address, and not both")
    if service.image and not service.command:
        raise msgspec.ValidationError(f"services.{name} needs a command to run in its container")
    if not service.image and (service.engine or service.cpus or service.pids or service.env or service.data):
        raise msgspec.ValidationError(
            f"services.{name} has no image: engine, cpus, pids, env and data are a container's"
        )
    if not service.image and service.secrets:
        raise msgspec.ValidationError(f"services.{name} has no image: secrets are a container's")
    if service.network != "none" and (service.image or service.address):
        raise msgspec.ValidationError(f"services.{name} is no command on this host: network is such a one's")
    if service.data:
        host_path(service.data)
    if service.image:
        image_reference(service.image)
    if service.cpus is not None:
        parse_cpus(service.cpus, cpu_count=CPU_NUMBER_MAX)
    if service.health and not service.health.startswith("/"):
        raise msgspec.ValidationError(f"services.{name}.health is no path")
    if service.address:
        loopback_address(service.address)
    parse_memory(service.memory, bytes_max=SIZE_BYTES_MAX)


def loopback_address(text: str) -> tuple[str, int] | str:
    """Host and port, or the path of a Unix socket, of a service on this host.

    Raises:
        ValidationError: it is neither.
    """
    if text.startswith("/"):
        return text
    where = authority(text)
    address = None if where is None else address_of(where[0])
    if where is None or address is None or address.version == 6 or not address.is_loopback:
        raise msgspec.ValidationError(f"{text!r} is neither 127.0.0.1:PORT nor the path of a Unix socket")
    return where


def metrics_address(text: str) -> tuple[str, int] | str | None:
    """An IP address of this host and a port, or the path of a Unix socket; None: metrics are served nowhere.

    Raises:
        ValidationError: it is neither.
    """
    if not text:
        return None
    if text.startswith("unix:/"):
        return text.removeprefix("unix:")
    where = authority(text)
    if where is None or address_of(where[0]) is None:
        raise msgspec.ValidationError("give unix:/PATH, or an address and a port such as 127.0.0.1:9464")
    return where


def _service_entries(services: Mapping[str, Service], origin: str) -> list[ConfigEntry]:
    return [
        ConfigEntry(
            key=f"services.{name}",
            value=shlex.join(service.command) or service.address,
            origin=origin,
            description=f"A service, seen at port {service.port} inside.",
        )
        for name, service in services.items()
    ]


def _from_file(sections: Mapping[str, Any], origin: str) -> dict[tuple[str, str], _Given]:
    hint = _edit(origin)
    given = {}
    for section, entries in sections.items():
        if section not in Config.__struct_fields__ or not isinstance(entries, dict):
            raise InvalidArgument(
                f"cannot use {section!r} in {origin}",
                detail=f"the sections are {', '.join(f'[{name}]' for name in Config.__struct_fields__)}",
                hint=hint,
            )
        for key, value in entries.items():
            if (section, key) not in _SETTINGS:
                raise InvalidArgument(
                    f"cannot use {f'{section}.{key}'!r} in {origin}", detail="there is no such setting", hint=hint
                )
            given[section, key] = _Given(value, origin, hint)
    return given


def _from_environment(env: Mapping[str, str]) -> dict[tuple[str, str], _Given]:
    names = {f"SANDBOXD_{section}_{key}".upper(): (section, key) for section, key in _SETTINGS}
    prefixes = tuple(f"SANDBOXD_{section}_".upper() for section in _SECTIONS)
    given = {}
    for variable in sorted(name for name in env if name.startswith(prefixes)):
        hint = f"unset {variable}"
        if variable not in names:
            raise InvalidArgument(f"cannot use the variable {variable}", detail="there is no such setting", hint=hint)
        setting = names[variable]
        text = env[variable]
        value = [part for part in text.split(":") if part] if setting[0] == "paths" else text
        given[setting] = _Given(value, variable, hint)
    return given


def _checked(key: str, kind: Any, given: _Given) -> object:
    """The value in its setting's type.

    Raises:
        InvalidArgument: it is not what the setting takes.
    """
    try:
        value = msgspec.convert(given.value, kind, strict=False)
        if key in _CHECKS:
            _CHECKS[key](value)
    except msgspec.ValidationError as error:
        detail = str(error)
    except QuantityError as error:
        detail = f"give {error.allowed}"
    except Unsupported as error:
        detail = str(error)
    else:
        return value
    raise InvalidArgument(f"cannot use {given.value!r} for {key} in {given.origin}", detail=detail, hint=given.hint)


def _templates(tables: object, origin: str) -> dict[str, Template]:
    """The templates that a user writes down, every value as strictly looked at as that of ``[defaults]``."""
    try:
        templates = msgspec.convert(tables, dict[TemplateName, Template])
    except msgspec.ValidationError as error:
        raise InvalidArgument(
            f"cannot use the templates in {origin}", detail=str(error), hint=_edit(origin)
        ) from None
    for name, template in templates.items():
        _check_rules(name, template, origin)
        for key, value in msgspec.structs.asdict(template).items():
            if value is not None and ("defaults", key) in _SETTINGS:
                _checked(f"defaults.{key}", _SETTINGS["defaults", key], _Given(value, origin, _edit(origin)))
    return templates


def _check_rules(name: str, template: Template, origin: str) -> None:
    lists = (template.allow, template.deny, template.inject)
    if template.network == "full" and any(lists):
        raise InvalidArgument(
            f"cannot use the template {name} in {origin}",
            detail="the engine's own network, which is what full means, obeys no rules",
            hint=_edit(origin),
        )
    try:
        parse_rules(template.allow)
        parse_rules(template.deny)
        parse_injections(template.inject)
    except InvalidArgument as error:
        raise InvalidArgument(
            f"cannot use the template {name} in {origin}", detail=str(error), hint=error.hint
        ) from None


def template_defaults(config: Config, name: str) -> tuple[Template, Defaults]:
    """A template, and the defaults of a sandbox that is made of it. ``default`` needs not be written down.

    Raises:
        NotFound: there is none of this name.
    """
    template = config.templates.get(name)
    if template is None and name != DEFAULT_TEMPLATE:
        names = sorted({DEFAULT_TEMPLATE, *config.templates})
        raise NotFound(
            f"cannot find the template {name!r}",
            detail=f"there are {', '.join(names)}",
            hint=spelling.hint(name, names, "sandboxctl template list"),
        )
    template = template or Template()
    said = {
        key: value
        for key, value in msgspec.structs.asdict(template).items()
        if value is not None and key in Defaults.__struct_fields__
    }
    return template, msgspec.structs.replace(config.defaults, **said)


def _refuse_relative(paths: list[str]) -> None:
    for path in paths:
        host_path(path)


_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "defaults.image": image_reference,
    "defaults.memory": partial(parse_memory, bytes_max=SIZE_BYTES_MAX),
    "defaults.cpus": partial(parse_cpus, cpu_count=CPU_NUMBER_MAX),
    "defaults.shm": partial(parse_memory, bytes_max=SIZE_BYTES_MAX, bytes_min=SMALL_TMPFS_BYTES_MIN),
    "defaults.tmp": partial(parse_memory, bytes_max=SIZE_BYTES_MAX, bytes_min=SMALL_TMPFS_BYTES_MIN),
    "defaults.lifetime": partial(parse_optional_duration_ms, option="defaults.lifetime"),
    "defaults.idle_timeout": partial(parse_optional_duration_ms, option="defaults.idle_timeout"),
    "defaults.output": partial(parse_memory, bytes_max=OUTPUT_BYTES_MAX, bytes_min=OUTPUT_BYTES_MIN),
    "capacity.memory_reserve": partial(parse_memory, bytes_max=SIZE_BYTES_MAX, bytes_min=1),
    "paths.allow": _refuse_relative,
    "chroma.memory": partial(parse_memory, bytes_max=SIZE_BYTES_MAX),
    "paths.deny": _refuse_relative,
    "workspaces.copy_bytes": partial(parse_memory, bytes_max=SIZE_BYTES_MAX),
    "metrics.listen": metrics_address,
    "audit.size": partial(parse_memory, bytes_max=SIZE_BYTES_MAX, bytes_min=AUDIT_BYTES_MIN),
    "pool.idle": partial(parse_duration_ms, option="pool.idle"),
    "pool.age_max": partial(parse_duration_ms, option="pool.age_max"),
    "pool.image_look": partial(parse_duration_ms, option="pool.image_look"),
    "pool.memory_reserve": partial(parse_memory, bytes_max=SIZE_BYTES_MAX),
}
"""What a type cannot say. Raise QuantityError or Unsupported. What is more than this host has is cut later."""


def _template_entries(templates: Mapping[str, Template], origin: str) -> list[ConfigEntry]:
    return [
        ConfigEntry(
            key=f"templates.{name}.{key}",
            value=", ".join(value) if isinstance(value, dict | list) else str(value),
            origin=origin,
            description="Of a template; of its variables only the names are shown.",
        )
        for name, template in templates.items()
        for key, value in msgspec.structs.asdict(template).items()
        if value not in (None, "", {}, [])
    ]


def _as_written(value: object) -> str:
    """A value as it is in the environment; but for quotes, also as it is in a file."""
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list():
            return ":".join(value)
        case _:
            return str(value)


def _entries(config: Config, origins: Mapping[tuple[str, str], str]) -> list[ConfigEntry]:
    entries = []
    for (section, key), kind in _SETTINGS.items():
        description = next((meta.description or "" for meta in get_args(kind)[1:] if isinstance(meta, Meta)), "")
        value = getattr(getattr(config, section), key)
        entries.append(
            ConfigEntry(
                key=f"{section}.{key}",
                value=_as_written(value),
                origin=origins.get((section, key), "default"),
                description=description,
            )
        )
    return entries
