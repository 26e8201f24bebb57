"""The keys that leave a command running."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.cli.detach_keys import DEFAULT, DetachKeys, parse


@pytest.mark.parametrize(
    ("text", "sequence"),
    [(DEFAULT, b"\x10\x11"), ("CTRL-A,d", b"\x01d"), ("ctrl-],ctrl-@", b"\x1d\x00"), ("x", b"x"), ("", b"")],
)
def test_keys_are_the_bytes_that_a_terminal_sends(text: str, sequence: bytes) -> None:
    """As docker names them."""
    assert parse(text) == sequence


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-1", "ctrl-ab", "escape", "a,", ",", "ü", "\x10"])
def test_what_is_no_key_is_refused(text: str) -> None:
    """Else nobody could leave, and would learn of it too late."""
    with pytest.raises(ValueError, match="is no key"):
        parse(text)


@given(st.binary(min_size=1, max_size=4), st.lists(st.binary(max_size=6), max_size=8))
def test_whatever_comes_in_whatever_pieces_goes_on_up_to_the_keys(sequence: bytes, pieces: list[bytes]) -> None:
    """Nothing is lost, nothing is doubled, and the keys themselves are never the command's."""
    keys = DetachKeys(sequence)
    typed, passed, found = b"".join(pieces), b"", False
    for piece in pieces:
        part, found = keys.feed(piece)
        passed += part
        if found:
            break
    if sequence in typed:
        assert found
        assert passed == typed.partition(sequence)[0]
    else:
        assert not found
        assert typed.startswith(passed)
        assert sequence.startswith(typed[len(passed) :])


@given(st.lists(st.binary(max_size=3)))
def test_no_keys_find_nothing(pieces: list[bytes]) -> None:
    """``--detach-keys ''``: everything is the command's."""
    keys = DetachKeys(b"")
    assert [keys.feed(piece) for piece in pieces] == [(piece, False) for piece in pieces]
