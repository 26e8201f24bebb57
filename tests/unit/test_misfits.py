"""Params that do not fit are explained to people."""

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from sandboxd.failures import InvalidArgument
from sandboxd.misfits import misfit
from sandboxd.protocol import METHOD_BY_NAME, METHODS


def refused(method: str, **params: object) -> InvalidArgument:
    text = msgspec.json.encode(params)
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(text, type=METHOD_BY_NAME[method].params)
    return misfit(METHOD_BY_NAME[method], text, caught.value)


def patterns(annotation: Any) -> Iterator[msgspec.Meta]:
    if isinstance(annotation, msgspec.Meta) and annotation.pattern is not None:
        yield annotation
    for part in get_args(annotation):
        yield from patterns(part)


def test_a_name_that_is_none_is_told_what_a_name_is() -> None:
    """The decoder's own words are a regular expression and a path into the protocol."""
    failure = refused("sandbox/create", name="bad name!")
    assert failure.brief == "cannot use 'bad name!' as name"
    assert failure.detail == "write 1 to 63 of a-z 0-9 . _ -, starting and ending with a letter or digit."


def test_an_id_that_is_none_is_told_where_the_ids_are() -> None:
    """Nobody makes one up: it was the wrong word."""
    failure = refused("ports/close", sandbox="box", forward_id="nosuch")
    assert (failure.brief, failure.hint) == ("cannot use 'nosuch' as forward id", "sandboxctl ports SANDBOX")


@pytest.mark.parametrize(
    ("method", "params", "said"),
    [
        ("pool/warm", {"count": 0}, "cannot use 0 as count: it must be at least 1"),
        ("pool/warm", {"count": 9999}, "cannot use 9999 as count: it must be at most 512"),
        ("events/subscribe", {"since": -1}, "cannot use -1 as since: it must be at least 0"),
    ],
)
def test_a_number_out_of_bounds_is_told_the_bounds(method: str, params: dict[str, Any], said: str) -> None:
    """And not the decoder's notation for them."""
    assert str(refused(method, **params)) == said


def test_the_name_of_an_image_that_is_none_is_told_what_one_looks_like() -> None:
    """It was an unsupported thing, with the exit code of a prerequisite that is missing."""
    failure = refused("sandbox/create", image="bad image")
    assert failure.brief == "cannot use 'bad image' as image"
    assert "debian:12" in failure.detail


def test_the_one_of_several_that_does_not_fit_is_named() -> None:
    """A list of secrets may be long."""
    assert refused("sandbox/create", secrets=["fits", "does not"]).brief == "cannot use 'does not' as secrets"


def test_a_text_without_end_is_not_repeated_whole() -> None:
    """What is said is for a terminal."""
    assert len(refused("sandbox/create", name="x" * 100_000).brief) < 200


@pytest.mark.parametrize("last", [b'"secrets":[]', b'"secrets":5', b'"secrets":[5]'])
def test_a_field_that_comes_twice_harms_nobody(last: bytes) -> None:
    """The decoder speaks of the first one, and what is read again is the last one."""
    text = b'{"secrets":["does not"],' + last + b"}"
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(text, type=METHOD_BY_NAME["sandbox/create"].params)
    assert misfit(METHOD_BY_NAME["sandbox/create"], text, caught.value).brief.startswith(
        "cannot understand the params"
    )


def test_what_has_no_pattern_is_explained_as_the_decoder_does() -> None:
    """Its words for a misspelt field or a number out of range are plain."""
    assert refused("sandbox/create", label="x").detail == "Object contains unknown field `label`"


def test_whatever_has_a_pattern_says_what_it_takes() -> None:
    """Else there would be nothing to say but the pattern."""
    found = [
        (method.name, field, pattern)
        for method in METHODS
        for field, hint in get_type_hints(method.params, include_extras=True).items()
        for pattern in patterns(hint)
    ]
    assert found
    assert [(name, field) for name, field, pattern in found if not pattern.description] == []


@pytest.mark.parametrize("last", [b'"count":"many"', b'"count":null', b'"count":[]'])
def test_a_number_that_comes_twice_harms_nobody(last: bytes) -> None:
    text = b'{"count":0,' + last + b"}"
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(text, type=METHOD_BY_NAME["pool/warm"].params)
    assert misfit(METHOD_BY_NAME["pool/warm"], text, caught.value).brief.startswith("cannot understand the params")
