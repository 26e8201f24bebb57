"""Which of the words that there are was probably meant by one that there is not. Pure."""

from __future__ import annotations

import difflib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of the words that was probably meant, if any: above all one of the same letters in another order."""
    known = list(words)
    letters = sorted(word)
    found = [each for each in known if sorted(each) == letters] or difflib.get_close_matches(word, known, n=1)
    return found[0] if found else None


def hint(word: str, words: Iterable[str], otherwise: str) -> str:
    """What to type next: the word that was probably meant, if any, and what else helps."""
    meant = nearest(word, words)
    return f"did you mean {meant}? else: {otherwise}" if meant else otherwise
