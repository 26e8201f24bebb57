"""The keys that leave a command running and take us out of it. Pure."""

from __future__ import annotations

DEFAULT = "ctrl-p,ctrl-q"

_CTRL = "ctrl-"
_CTRL_MASK = 0x1F
_CTRL_KEYS = "abcdefghijklmnopqrstuvwxyz@[\\]^_"


def parse(text: str) -> bytes:
    """The bytes that a terminal sends for keys such as ``ctrl-p,ctrl-q``; none for the empty text.

    Raises:
        ValueError: Something in it is no key.
    """
    return b"".join(_parse_key(name) for name in text.split(",")) if text else b""


def _parse_key(name: str) -> bytes:
    key = name.lower().removeprefix(_CTRL) if name.lower().startswith(_CTRL) else ""
    if len(key) == 1 and key in _CTRL_KEYS:
        return bytes([ord(key.upper()) & _CTRL_MASK])
    if len(name) == 1 and name.isascii() and name.isprintable():
        return name.encode()
    raise ValueError(f"{name!r} is no key: use single characters and ctrl-a to ctrl-z, with commas between them")


class DetachKeys:
    """Finds the keys in what is typed.

    Args:
        sequence: As ``parse`` returns it. Empty: nothing is found.
    """

    def __init__(self, sequence: bytes) -> None:
        self._sequence = sequence
        self._held = b""

    def feed(self, typed: bytes) -> tuple[bytes, bool]:
        """Take what was typed; return what is the command's, and whether the keys were among it.

        The beginning of the keys is held back until it is known whether the rest follows. What comes after them is
        nobody's.
        """
        if not self._sequence:
            return typed, False
        passed = bytearray()
        for position in range(len(typed)):
            self._held += typed[position : position + 1]
            while not self._sequence.startswith(self._held):
                passed += self._held[:1]
                self._held = self._held[1:]
            if self._held == self._sequence:
                return bytes(passed), True
        return bytes(passed), False
