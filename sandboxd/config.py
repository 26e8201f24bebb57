"""Settings: text in, ``Config`` out.

Pure: the composition root reads the file and the environment and hands them over. A value is taken from the
environment (``SANDBOXD_<SECTION>_<KEY>``), else from the user's file (``~/.config/sandboxd/config.toml``), else
it is the default below. What a request says comes before all of these. Unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from sandboxd.failures import InvalidArgument
from sandboxd.protocol import ConfigEntry, EngineChoice, LimitsPolicy, NetworkMode

DEFAULT_IMAGE = "localhost/sandboxd/default:latest"


class Defaults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sandbox gets when its request does not say."""

    engine: Annotated[
        EngineChoice | Literal["auto"], Meta(description="Engine for new sandboxes; auto takes the best that works.")
    ] = "auto"
    image: Annotated[str, Meta(description="Image for new sandboxes.")] = DEFAULT_IMAGE
    memory: Annotated[str, Meta(description="Memory and swap together; at most half of the host's is given.")] = "2g"
    cpus: Annotated[str, Meta(description="CPU quota; at most the host's CPUs are given.")] = "2"
    pids: Annotated[int, Meta(description="Processes and threads at once.")] = 512
    shm: Annotated[str, Meta(description="Size of /dev/shm.")] = "64m"
    tmp: Annotated[str, Meta(description="Size of /tmp and of the home directory; counts as memory.")] = "512m"
    nofile: Annotated[int, Meta(description="Open files per process.")] = 4096
    output: Annotated[str, Meta(description="How much of each stream of a spooled command is kept.")] = "64m"
    network: Annotated[NetworkMode, Meta(description="none: loopback only. full: the engine's network.")] = "none"
    limits_policy: Annotated[
        LimitsPolicy, Meta(description="strict refuses what the host cannot enforce; degraded goes on and says so.")
    ] = "strict"


class Paths(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where workspaces may lie."""

    allow: Annotated[
        list[str], Meta(description="Directories that may be workspaces although the built-in rules refuse them.")
    ] = []


class Daemon(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the daemon behaves."""

    sandboxes_max: Annotated[int, Meta(ge=1, le=10_000, description="Sandboxes at once.")] = 500
    engine_calls_max: Annotated[
        int,
        Meta(ge=1, le=64, description="Calls of one engine at once; more than about three only lengthen each."),
    ] = 3


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings."""

    defaults: Defaults = Defaults()
    paths: Paths = Paths()
    daemon: Daemon = Daemon()


def load_config(text: str, *, origin: str, env: Mapping[str, str]) -> tuple[Config, list[ConfigEntry]]:
    """Return the settings in force and where each comes from.

    Args:
        text: The user's file, TOML; empty when there is none.
        origin: The file's path, for messages.
        env: The environment; only ``SANDBOXD_*`` names of known keys are looked at.

    Raises:
        InvalidArgument: the file or a variable does not hold what it may.
    """
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"cannot read {origin}", detail=str(error), hint="the file is TOML") from None
    origins = {
        f"{section}.{key}": origin
        for section, entries in values.items()
        if isinstance(entries, dict)
        for key in entries
    }
    for section, key in _keys():
        variable = f"SANDBOXD_{section}_{key}".upper()
        if variable in env:
            entries = values.setdefault(section, {})
            if isinstance(entries, dict):
                entries[key] = _from_environment(env[variable], list_expected=(section, key) == ("paths", "allow"))
                origins[f"{section}.{key}"] = variable
    try:
        config = msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArgument(
            f"cannot use the settings in {origin}", detail=str(error), hint="sandboxctl config lists the settings"
        ) from None
    return config, _entries(config, origins)


def _from_environment(text: str, *, list_expected: bool) -> str | list[str]:
    return [part for part in text.split(":") if part] if list_expected else text


def _keys() -> list[tuple[str, str]]:
    sections = get_type_hints(Config)
    return [(section, key) for section, struct in sections.items() for key in struct.__struct_fields__]


def _entries(config: Config, origins: Mapping[str, str]) -> list[ConfigEntry]:
    entries = []
    for section, key in _keys():
        struct = getattr(config, section)
        hint = get_type_hints(type(struct), include_extras=True)[key]
        description = next((meta.description or "" for meta in get_args(hint)[1:] if isinstance(meta, Meta)), "")
        value = getattr(struct, key)
        entries.append(
            ConfigEntry(
                key=f"{section}.{key}",
                value=":".join(value) if isinstance(value, list) else str(value),
                origin=origins.get(f"{section}.{key}", "default"),
                description=description,
            )
        )
    return entries
