"""Known secrets, found in texts by digests with a key, of which nobody can tell the secrets.

A secret may hold the marks that stand around it in a text: Base64 is padded with ``=``, keys have slashes, a URL with
a password is one secret. So its longest piece between such marks is looked for, and where that is found, all that the
text has in the secret's place is compared with the secret. Nothing is taken for a secret that is none. Only pieces
that are as long as one that is known are hashed, so that a long text costs little more than to be split.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

PART_CHARS_MIN = 8
"""Shorter secrets are found only where they are all of a text, for they are words, too."""

AROUND_CHARS_MAX = 16 * 1024 * 1024
"""How much is compared in one text: a secret of 64 KiB that repeats itself can be looked for in very many places."""

_MARKS = r"\s\"'`,;:=@/?&<>|(){}\[\]\\"
"""What stands around a secret in a header, a URL, JSON, or a line of a shell."""

_PIECE = re.compile(rf"[^{_MARKS}]+")


class _Known(msgspec.Struct, frozen=True):
    """One secret, without the white space around it."""

    name: str
    chars: int
    digest: bytes
    piece_chars: int
    """Of its longest piece; 0: it is never looked for as a part."""
    piece_digest: bytes
    before: int
    """How many characters of it come before that piece."""


class SecretDigests:
    """The secrets that are known by now.

    Args:
        key: Of the digests: random, and kept nowhere else.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._known: dict[str, _Known] = {}
        self._index()

    def learn(self, name: str, value: bytes) -> None:
        """Know a secret, new or changed."""
        text = value.decode(errors="surrogateescape").strip()
        if not text:
            self.forget(name)
            return
        piece, before = "", 0
        if len(text) >= PART_CHARS_MIN:
            found = max(_PIECE.finditer(text), key=lambda match: len(match[0]), default=None)
            piece, before = (found[0], found.start()) if found is not None else ("", 0)
        known = _Known(name, len(text), self._digest(text), len(piece), self._digest(piece), before)
        if self._known.get(name) != known:
            self._known[name] = known
            self._index()

    def forget(self, name: str) -> None:
        """Know it no more. Idempotent."""
        if self._known.pop(name, None) is not None:
            self._index()

    def name_in(self, text: str, *, chars_min: int) -> str | None:
        """The name of a secret that is all of a text of so many characters, or a part of it between marks."""
        whole = text.strip()
        if len(whole) < chars_min:
            return None
        if len(whole) in self._lengths:
            known = self._wholes.get(self._digest(whole))
            if known is not None:
                return known.name
        return self._name_of_part(text) if self._piece_lengths else None

    def _name_of_part(self, text: str) -> str | None:
        left = AROUND_CHARS_MAX
        for piece in self._piece.finditer(text):
            if piece.end() - piece.start() not in self._piece_lengths:
                continue
            for known in self._pieces.get(self._digest(piece[0]), ()):
                begin = piece.start() - known.before
                end = begin + known.chars
                if begin < 0 or end > len(text) or _goes_on(text, begin) or _goes_on(text, end):
                    continue
                left -= known.chars
                if left < 0:
                    return None
                if self._digest(text[begin:end]) == known.digest:
                    return known.name
        return None

    def _index(self) -> None:
        self._wholes = {known.digest: known for known in self._known.values()}
        self._lengths = frozenset(known.chars for known in self._known.values())
        self._pieces: dict[bytes, list[_Known]] = {}
        for known in self._known.values():
            if known.piece_chars:
                self._pieces.setdefault(known.piece_digest, []).append(known)
        self._piece_lengths = frozenset(known.piece_chars for known in self._known.values()) - {0}
        # Words that are too short for any are passed over without a look at each; no further, for a longer word that
        # is too short would be tried again from each of its characters.
        shortest = min(PART_CHARS_MIN, *self._piece_lengths) if self._piece_lengths else PART_CHARS_MIN
        self._piece = re.compile(rf"[^{_MARKS}]{{{shortest},}}")

    def _digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode(errors="surrogateescape"), key=self._key).digest()


def _goes_on(text: str, at: int) -> bool:
    """Whether there is no mark on either side of a place in a text, and so no end of a secret."""
    return 0 < at < len(text) and _PIECE.match(text[at - 1]) is not None and _PIECE.match(text[at]) is not None
