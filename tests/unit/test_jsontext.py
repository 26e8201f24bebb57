"""JSON text as ``json`` reads and writes it, whichever of the two ways does the work."""

import importlib.util
import json
import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import jsontext


def without_compiled_parts() -> ModuleType:
    """The module as a Python without ``_json`` has it."""
    spec = importlib.util.find_spec("sandboxd.jsontext")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "_json", None)
        spec.loader.exec_module(module)
    return module


def refuse(name: str) -> Any:
    raise ValueError(name)


def by_json(data: bytes) -> str:
    """The value, written so that 1, 1.0 and True differ; or that there is none."""
    try:
        return repr(json.loads(data.decode(), parse_constant=refuse))
    except ValueError:
        return "refused"


either = pytest.mark.parametrize("text", [jsontext, without_compiled_parts()], ids=["compiled", "plain"])

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)
spellings = st.builds(
    lambda value, indent, ascii_only: json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode(),
    *(values, st.none() | st.integers(0, 2), st.booleans()),
)
damage = st.tuples(
    st.integers(0, 200), st.integers(0, 3), st.binary(max_size=3) | st.sampled_from([b"NaN", b"\\", b" "])
)


def damaged(data: bytes, where: tuple[int, int, bytes]) -> bytes:
    at, cut, put = where
    return data[:at] + put + data[at + cut :]


def test_the_compiled_parts_are_in_use() -> None:
    """Else this Python pays for what it does not need, and nobody would notice."""
    assert type(jsontext._scan).__module__ == type(jsontext._chunks).__module__ == "_json"


@either
@given(value=values)
def test_it_writes_what_json_writes(text: ModuleType, value: Any) -> None:
    """Byte for byte, so that the daemon cannot tell."""
    written = text.encode(value)
    assert written == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    assert b"\n" not in written
    assert repr(text.decode(written)) == repr(json.loads(written))


@either
@given(data=spellings)
def test_it_reads_what_json_writes(text: ModuleType, data: bytes) -> None:
    """In each of the spellings that a value has."""
    assert repr(text.decode(data)) == by_json(data)


@either
@given(data=st.builds(damaged, spellings, damage) | st.binary(max_size=12))
def test_it_refuses_what_json_refuses(text: ModuleType, data: bytes) -> None:
    """And with one kind of error, which the client makes into words."""
    try:
        read = repr(text.decode(data))
    except ValueError:
        read = "refused"
    assert read == by_json(data)


@either
@pytest.mark.parametrize(
    "data",
    [b"", b" ", b"NaN", b"[-Infinity]", b'{"a":Infinity}', b"1 2", b"\xef\xbb\xbf1", "1".encode("utf-16"), b'"\xff"'],
)
def test_what_is_no_json_is_refused(text: ModuleType, data: bytes) -> None:
    """``json`` lets some of it pass; the standard does not."""
    with pytest.raises(ValueError, match=r"."):
        text.decode(data)


@either
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), ValueError),
        ({"a": [float("-inf")]}, ValueError),
        ("\udcff", UnicodeEncodeError),
        (b"bytes", TypeError),
        ({(1, 2): 3}, TypeError),
    ],
)
def test_what_json_has_no_word_for_is_not_written(text: ModuleType, value: object, error: type[Exception]) -> None:
    """The other end would refuse it, and could not say where it came from."""
    with pytest.raises(error):
        text.encode(value)


@either
def test_nesting_is_bounded(text: ModuleType) -> None:
    """By the interpreter's own limit: an error, and no crash."""
    depth = 500_000
    with pytest.raises(RecursionError):
        text.decode(b"[" * depth + b"]" * depth)
