"""Says in words why the params of a request do not fit: nobody is shown a regular expression, or a type.

Pure. What is said of a pattern stands beside it, in ``protocol``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec

from sandboxd.failures import InvalidArgument
from sandboxd.protocol import Method, Params

VALUE_CHARS_SHOWN_MAX = 80

_OF_PATTERN = re.compile(r"Expected `str` matching regex .* - at `\$(?P<path>(?:\.\w+|\[\d+\])+)`\Z", re.DOTALL)
_OUT_OF_BOUNDS = re.compile(
    r"Expected `(?:int|float)` (?P<sign>>=|<=) (?P<bound>-?[\d.]+) - at `\$(?P<path>(?:\.\w+|\[\d+\])+)`\Z"
)
_BOUNDS = {">=": "at least", "<=": "at most"}
_STEP = re.compile(r"\.(?P<field>\w+)|\[(?P<place>\d+)\]")


def misfit(method: Method, params: bytes, error: msgspec.ValidationError) -> InvalidArgument:
    """What is said of params that the decoder refused.

    Args:
        method: That they are of.
        params: As they came.
        error: The decoder's.
    """
    text = str(error)
    out_of_bounds = _OUT_OF_BOUNDS.match(text)
    found = out_of_bounds or _OF_PATTERN.match(text)
    steps = [step["field"] or int(step["place"]) for step in _STEP.finditer(found["path"])] if found else []
    value = _value_at(params, steps) if steps else None
    fields = [step for step in steps if isinstance(step, str)]
    if out_of_bounds and isinstance(value, int | float):
        return InvalidArgument(
            f"cannot use {value} as {fields[-1].replace('_', ' ')}",
            detail=f"it must be {_BOUNDS[out_of_bounds['sign']]} {out_of_bounds['bound']}",
        )
    if out_of_bounds or not isinstance(value, str):
        return InvalidArgument(f"cannot understand the params of {method.name!r}", detail=text)
    shape = _pattern_of(method.params, fields)
    shown = value if len(value) <= VALUE_CHARS_SHOWN_MAX else f"{value[:VALUE_CHARS_SHOWN_MAX]}..."
    return InvalidArgument(
        f"cannot use {shown!r} as {fields[-1].replace('_', ' ')}",
        detail=f"write {shape.description}",
        hint=(shape.extra or {}).get("hint", ""),
    )


def _value_at(params: bytes, steps: list[str | int]) -> Any:
    """What was refused, or something else, for a field may come twice, and the last one is another."""
    value: Any = msgspec.json.decode(params)
    try:
        for step in steps:
            value = value[step]
    except (LookupError, TypeError):
        return None
    return value


def _pattern_of(params: type[Params], fields: list[str]) -> msgspec.Meta:
    """What the protocol says of a field that has a pattern; ``fields`` are the names that lead to it."""
    within: Any = params
    for field in fields:
        structs = (part for part in _parts(within) if isinstance(part, type) and issubclass(part, msgspec.Struct))
        within = next(
            hints[field] for struct in structs if field in (hints := get_type_hints(struct, None, None, True))
        )
    return next(part for part in _parts(within) if isinstance(part, msgspec.Meta) and part.pattern is not None)


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation, and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)
