"""What is kept of a value that somebody pipes into ``secret set``."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from sandboxd.cli import secrets
from sandboxd.cli.verb import Parser

KEY = b"-----BEGIN KEY-----\nabc\n-----END KEY-----\n"


def kept(monkeypatch: pytest.MonkeyPatch, value: bytes, *words: str) -> bytes | None:
    """The value that ``secret set token`` asks the daemon to keep; None: it asks for nothing."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(secrets, "request", lambda _, **fields: asked.append(fields))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(value)))
    parser = Parser()
    secrets.VERBS["secret"].add_arguments(parser)
    arguments = parser.parse_args(["set", "token", *words])
    assert secrets.VERBS["secret"].run(arguments) == (0 if asked else 2)
    return base64.b64decode(asked[0]["value"]) if asked else None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"s3cret\n", b"s3cret"),
        (b"s3cret", b"s3cret"),
        (b"s3cret\n\n", b"s3cret\n\n"),
        (KEY, KEY),
        (b"\xff\xfe\n", b"\xff\xfe\n"),
        (b"\n", None),
        (b"", None),
    ],
    ids=["echo", "printf", "two line feeds", "key", "no text", "empty line", "nothing"],
)
def test_the_line_feed_of_a_single_line_is_no_part_of_a_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: bytes, expected: bytes | None
) -> None:
    """A header cannot hold it, and nobody sees it; a private key without its last is refused by what reads it."""
    assert kept(monkeypatch, given) == expected
    (tmp_path / "value").write_bytes(given)
    assert kept(monkeypatch, b"", "--file", str(tmp_path / "value")) == expected


def test_a_raw_value_is_kept_to_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, b"s3cret\n", "--raw") == b"s3cret\n"
