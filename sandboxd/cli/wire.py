"""Builds requests from the generated table: what ``protocol.py`` would accept, without importing it."""

from __future__ import annotations

from sandboxd.cli.wire_table import FIELDS, PARAMS, REQUIRED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def build(method: str, /, **fields: object) -> dict[str, Any]:
    """The params of a method. ``None`` means not given, and what equals the default is left out.

    Raises:
        TypeError: The protocol has no such field, or requires one that is missing.
    """
    return part(PARAMS[method], **fields)


def part(struct: str, /, **fields: object) -> dict[str, Any]:
    """The same for a struct inside params."""
    known = FIELDS[struct]
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in known:
            raise TypeError(f"{struct} has no field {name!r}")
    for name, default in known.items():
        if default is REQUIRED and name not in given:
            raise TypeError(f"{struct} requires {name!r}")
    return {name: value for name, value in given.items() if value != known[name]}
