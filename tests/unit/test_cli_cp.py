"""What ``cp`` takes for a sandbox's path, and what its bar says."""

from __future__ import annotations

import pytest

from sandboxd.cli.copy import Place
from sandboxd.cli.progress import line_of

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "sandbox", "path"),
    [
        ("box:/tmp/x", "box", b"/tmp/x"),
        ("box:", "box", b"."),
        ("box:a:b", "box", b"a:b"),
        ("./a:b", None, b"./a:b"),
        ("/a:b", None, b"/a:b"),
        ("d/a:b", None, b"d/a:b"),
        ("plain", None, b"plain"),
        ("-", None, None),
        ("box:odd\udce9", "box", b"odd\xe9"),
    ],
)
def test_a_place_is_the_hosts_or_a_sandboxs(text: str, sandbox: str | None, path: bytes | None) -> None:
    place = Place(text)
    assert (place.sandbox, place.path) == (sandbox, path)


@pytest.mark.parametrize(
    ("done", "total", "entries", "line"),
    [
        (GIB // 2, GIB, None, "[############            ]  50 %   512 MiB of 1 GiB   256 MiB/s   2 s left"),
        (2 * GIB, GIB, 1, "[########################] 100 %   2 GiB of 1 GiB   1 GiB/s   0 s left"),
        (GIB, None, 1200, "1 GiB   1200 entries   512 MiB/s"),
        (0, GIB, None, "[                        ]   0 %   0 B of 1 GiB   0 B/s"),
    ],
)
def test_a_bar_says_how_far_and_how_fast(done: int, total: int | None, entries: int | None, line: str) -> None:
    """A file may be larger than it was said to be."""
    assert line_of(done, total, entries, elapsed_s=2.0) == line
