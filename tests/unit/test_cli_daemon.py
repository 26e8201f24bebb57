"""What ``daemon stop`` and ``daemon restart`` ask before they act."""

import argparse
import io
import sys
from typing import cast

import pytest

from sandboxd.cli import daemon
from sandboxd.client import Connection


class Typed(io.StringIO):
    """A terminal, or something that is none."""

    def __init__(self, text: str = "", *, tty: bool = True) -> None:
        super().__init__(text)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.mark.parametrize(
    ("typed", "tty", "yes", "attached", "goes_on", "asked"),
    [
        ("\n", True, False, 1, False, True),
        ("y\n", True, False, 1, True, True),
        ("", True, True, 1, True, False),
        ("", False, False, 1, True, False),
        ("", True, False, 0, True, False),
    ],
)
def test_attached_commands_are_counted_before_they_end_with_the_daemon(
    monkeypatch: pytest.MonkeyPatch, typed: str, tty: bool, yes: bool, attached: int, goes_on: bool, asked: bool
) -> None:
    """Only where somebody is there to answer, and something to lose: scripts go on as they did."""
    screen = Typed(tty=tty)
    monkeypatch.setattr(sys, "stdin", Typed(typed, tty=tty))
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(daemon, "_count_attached", lambda _: attached)
    assert daemon._may_end(cast("Connection", None), argparse.Namespace(yes=yes)) is goes_on
    question = "1 attached command will end with the daemon; go on? [y/N] "
    assert screen.getvalue() == (question if asked else "")
