"""JSON text to values and back, for the command line: what ``json`` does, without what importing it costs.

``json`` brings ``re`` and ``enum`` with it, 7 ms in a process that lives for 15, and leaves the work to ``_json``,
which is compiled and brings nothing. So ``_json`` is used directly, and ``json`` only by a Python without it.

Stricter than ``json`` where RFC 8259 is: UTF-8 and nothing else, and neither NaN nor Infinity in either direction.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_WHITESPACE = " \t\n\r"
_ITEM_SEPARATOR, _KEY_SEPARATOR = ",", ":"


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _refuse_value(value: object) -> object:
    raise TypeError(f"a {type(value).__name__} cannot be JSON")


class _Settings:
    """What the compiled scanner wants to know, under the names of ``json.JSONDecoder``."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    array_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_refuse_constant)


_scan: Callable[[str, int], tuple[Any, int]]
_chunks: Callable[[object, int], Iterable[str]]

try:
    import _json

    _scan = _json.make_scanner(_Settings)  # type: ignore[arg-type]  # only attributes are asked for
    _chunks = _json.make_encoder(
        None, _refuse_value, _json.encode_basestring, None, _KEY_SEPARATOR, _ITEM_SEPARATOR, False, False, False
    )
except (ImportError, AttributeError, TypeError):
    import json

    _scan = json.JSONDecoder(parse_constant=_refuse_constant).scan_once  # type: ignore[attr-defined]
    _encoder = json.JSONEncoder(
        ensure_ascii=False,
        check_circular=False,
        allow_nan=False,
        separators=(_ITEM_SEPARATOR, _KEY_SEPARATOR),
        default=_refuse_value,
    )

    def _chunks(value: object, _level: int) -> Iterable[str]:
        return _encoder.iterencode(value)


def decode(data: bytes) -> Any:
    """The value that a JSON text means.

    Raises:
        ValueError: It is no JSON, or not in UTF-8.
        RecursionError: It is nested too deeply.
    """
    text = data.decode()
    try:
        value, end = _scan(text, len(text) - len(text.lstrip(_WHITESPACE)))
    except StopIteration as stop:
        raise ValueError(f"there is no value at character {stop.value}") from None
    if text[end:].strip(_WHITESPACE):
        raise ValueError(f"something follows the value at character {end}")
    return value


def encode(value: object) -> bytes:
    """The shortest JSON text of a value, in UTF-8, with no newline in it.

    Raises:
        UnicodeEncodeError: Text in it is not Unicode, such as a file name that is not UTF-8.
        ValueError: A number in it is none to JSON.
        TypeError: It holds something that JSON does not know.
        RecursionError: It is nested too deeply.
    """
    return "".join(_chunks(value, 0)).encode()
