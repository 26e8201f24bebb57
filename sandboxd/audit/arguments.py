"""What of a request may be written down, by a table that is made from the protocol.

A field is recorded if nothing but a plain value fits into it (a number, a switch, one of several words, text of a
given pattern), or if the protocol marks its text as a name, a path or an amount (``protocol.AUDITED``). Of variables
and metadata only the names are. All else is left out: what is typed, written, or secret has neither shape nor mark,
and so has a field that somebody adds tomorrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import msgspec.inspect as shapes

from sandboxd.protocol import METHODS, Params

TEXT_CHARS_MAX = 256
"""Of one value."""

ITEMS_MAX = 32
"""Of one list."""

CHARS_MAX = 2048
"""Of all values of one request together."""

CUT = "..."
HIDDEN = "(a secret)"

Recorded = dict[str, Any]
Reader = Callable[[Any, "Budget"], Any]


class Budget:
    """How much may still be written down of one request."""

    __slots__ = ("_hides", "left")

    def __init__(self, hides: Callable[[str], bool]) -> None:
        self.left = CHARS_MAX
        self._hides = hides

    def text(self, value: str) -> str:
        """The beginning of a text, as much of it as fits; nothing of one that is to be hidden."""
        value = HIDDEN if self._hides(value) else value
        most = max(0, min(TEXT_CHARS_MAX, self.left))
        self.left -= min(len(value), most) + 1
        return value if len(value) <= most else value[:most] + CUT


def recorded(method: str, params: Params, hides: Callable[[str], bool]) -> Recorded:
    """What is written down of a request: what differs from the default, in the order of the protocol.

    Args:
        method: Its name.
        params: Of the request.
        hides: Whether a text is not to be written down, for it holds a secret.
    """
    budget = Budget(hides)
    found = {}
    for name, default, reader in _TABLE[method]:
        value = getattr(params, name)
        if value is not default and value != default:
            found[name] = reader(value, budget)
    return found


def fields_of(method: str) -> tuple[str, ...]:
    """Which fields of a method's request are written down."""
    return tuple(name for name, _, _ in _TABLE[method])


def _plain(value: Any, budget: Budget) -> Any:
    match value:
        case str():
            return budget.text(value)
        case bytes():
            return budget.text(value[:TEXT_CHARS_MAX].decode("utf-8", "backslashreplace"))
        case _:
            budget.left -= 1
            return value


def _names(value: Mapping[str, object], budget: Budget) -> list[str]:
    return _list_of(_plain)(sorted(value), budget)  # type: ignore[no-any-return]


def _list_of(reader: Reader) -> Reader:
    def read(values: list[Any], budget: Budget) -> list[Any]:
        found: list[Any] = []
        for value in values[:ITEMS_MAX]:
            if budget.left <= 0:
                return [*found, CUT]
            found.append(reader(value, budget))
        return found if len(values) <= ITEMS_MAX else [*found, CUT]

    return read


def _parts(struct: shapes.StructType) -> tuple[tuple[str, object, Reader], ...]:
    return tuple(
        (field.name, _default_of(field), reader)
        for field in struct.fields
        if (reader := _reader(field.type, audited=False)) is not None
    )


def _struct(struct: shapes.StructType) -> Reader:
    parts = _parts(struct)

    def read(value: Any, budget: Budget) -> Recorded:
        return {
            name: reader(part, budget) for name, default, reader in parts if (part := getattr(value, name)) != default
        }

    return read


def _reader(shape: shapes.Type, *, audited: bool) -> Reader | None:
    match shape:
        case shapes.Metadata():
            return _reader(shape.type, audited=audited or bool((shape.extra or {}).get("audited")))
        case shapes.StrType():
            return _plain if audited or shape.pattern is not None else None
        case shapes.BytesType():
            return _plain if audited else None
        case shapes.IntType() | shapes.FloatType() | shapes.BoolType() | shapes.LiteralType() | shapes.NoneType():
            return _plain
        case shapes.UnionType():
            readers = [_reader(each, audited=audited) for each in shape.types]
            found = [reader for reader in readers if reader is not None and reader is not _plain]
            return None if None in readers else found[0] if found else _plain
        case shapes.ListType():
            inner = _reader(shape.item_type, audited=audited)
            return None if inner is None else _list_of(inner)
        case shapes.DictType():
            return _names
        case shapes.StructType():
            return _struct(shape)
        case _:
            return None


def _default_of(field: shapes.Field) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def _table() -> dict[str, tuple[tuple[str, object, Reader], ...]]:
    table = {}
    for method in METHODS:
        shape = shapes.type_info(method.params)
        assert isinstance(shape, shapes.StructType)
        table[method.name] = _parts(shape)
    return table


_TABLE = _table()
