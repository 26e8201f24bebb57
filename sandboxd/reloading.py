"""Settings that are read again while the daemon runs: what changes at once, and what waits for a restart. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from sandboxd.config import Config
from sandboxd.protocol import ConfigEntry

FOLLOWED = frozenset({"defaults", "pool", "paths", "capacity", "templates"})
"""Sections whose settings are looked at anew each time."""

FOLLOWED_KEYS = frozenset({"daemon.sandboxes_max", "daemon.log_level"})
"""The same of other sections, of which the rest is built into something when the daemon starts."""

FIXED = frozenset({"defaults.image", "defaults.services", "pool.fills_max", "pool.image_look", "capacity.pack_cpus"})
"""And what is built in of those above: services that run, how CPUs were shared out among those that are there."""


class Reload(msgspec.Struct, frozen=True, kw_only=True):
    """What comes of reading the settings again."""

    config: Config
    """What is in force from now on."""
    entries: Sequence[ConfigEntry]
    """The same for a person, with where each comes from."""
    changed: Sequence[str]
    """Keys that are in force now."""
    waiting: Sequence[str]
    """Keys that were changed as well, and will be in force after a restart."""


def plan(
    before: Config, entries_before: Sequence[ConfigEntry], after: Config, entries_after: Sequence[ConfigEntry]
) -> Reload:
    """Take over what can be. A template that is gone from the file stays until a restart, with its slots."""
    changed: list[str] = []
    waiting: list[str] = []
    sections: dict[str, object] = {}
    for section in Config.__struct_fields__:
        old, new = getattr(before, section), getattr(after, section)
        if isinstance(new, dict):
            sections[section] = _table(section, old, new, changed, waiting)
        else:
            sections[section] = _section(section, old, new, changed, waiting)
    kept = [entry for entry in entries_before if _belongs(entry.key, waiting)]
    entries = [entry for entry in entries_after if not _belongs(entry.key, waiting)]
    order = {entry.key: place for place, entry in enumerate((*entries_before, *entries_after))}
    entries = sorted((*entries, *kept), key=lambda entry: order[entry.key])
    return Reload(config=Config(**sections), entries=entries, changed=changed, waiting=waiting)  # type: ignore[arg-type]


def _section(
    section: str, old: msgspec.Struct, new: msgspec.Struct, changed: list[str], waiting: list[str]
) -> msgspec.Struct:
    taken = {}
    for name in new.__struct_fields__:
        if getattr(old, name) == getattr(new, name):
            continue
        key = f"{section}.{name}"
        if key not in FOLLOWED_KEYS and (section not in FOLLOWED or key in FIXED):
            waiting.append(key)
        else:
            changed.append(key)
            taken[name] = getattr(new, name)
    return msgspec.structs.replace(old, **taken)


def _table(
    section: str,
    old: Mapping[str, msgspec.Struct],
    new: Mapping[str, msgspec.Struct],
    changed: list[str],
    waiting: list[str],
) -> dict[str, msgspec.Struct]:
    differing = [name for name in (*new, *(old.keys() - new.keys())) if old.get(name) != new.get(name)]
    taken = dict(old)
    for name in differing:
        if section not in FOLLOWED or name not in new:
            waiting.append(f"{section}.{name}")
        else:
            changed.append(f"{section}.{name}")
            taken[name] = new[name]
    return taken


def _belongs(key: str, keys: Sequence[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in keys)
