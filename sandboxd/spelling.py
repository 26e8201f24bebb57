"""Which of the words that there are was probably meant by one that there is not. Pure."""

from __future__ import annotations

import difflib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


LIKENESS_MIN = 0.6
"""Of a word that there is not, from which on one that there is was probably meant: ``difflib``'s ratio, up to 1."""


def nearest(word: str, words: Iterable[str], likeness_min: float = LIKENESS_MIN) -> str | None:
    """The one of the words that was probably meant, if any: above all one of the same letters in another order.

    Args:
        word: It is not there.
        words: Those that are.
        likeness_min: Higher where the word may be right as it is.
    """
    known = list(words)
    letters = sorted(word)
    found = [each for each in known if sorted(each) == letters] or difflib.get_close_matches(
        word, known, n=1, cutoff=likeness_min
    )
    return found[0] if found else None


def hint(word: str, words: Iterable[str], otherwise: str) -> str:
    """What to type next: the word that was probably meant, if any, and what else helps."""
    meant = nearest(word, words)
    return f"did you mean {meant}? else: {otherwise}" if meant else otherwise
