"""What is added to the requests of a sandbox that does not know it: rules as people write them. Pure.

A rule is ``[http://]HOST[:PORT] HEADER: VALUE``, such as ``api.example.com Authorization: Bearer {token}``, where
``{token}`` stands for the value of the secret ``token``. It speaks of exactly this host, never of one that resembles
it, and of this port, or 443. A request to it, ``http://HOST/`` for 443, is carried on over TLS, so that what is added
can be read there alone; with ``http://`` in the rule it goes on as it came, and the port is 80 if none is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from sandboxd.egress_rules import authority
from sandboxd.failures import InvalidArgument

INJECTIONS_MAX = 64
INJECTION_CHARS_MAX = 1024

SECURE_PORT, PLAIN_PORT = 443, 80

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}\Z")
_PLACE = re.compile(r"\{([A-Za-z0-9_][A-Za-z0-9_.-]{0,62})\}")
_PRINTABLE = re.compile(r"[\x20-\x7e]+\Z")
_FIT_FOR_A_HEADER = re.compile(rb"[\x20-\x7e\x80-\xff\t]+\Z")

_NEVER = frozenset(
    {
        *("host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade"),
        *("expect", "proxy-connection", "proxy-authorization", "proxy-authenticate"),
    }
)
"""What frames a message, or concerns one connection: two readers would understand it in two ways."""


class Injection(msgspec.Struct, frozen=True):
    """One rule, understood."""

    text: str
    """As it was written: of secrets it has names only."""
    host: str
    port: int
    """Of the host; where the request goes."""
    secure: bool
    """By TLS."""
    header: str
    """Lower case."""
    value: str
    """With ``{NAME}`` for the values of secrets."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """The names of the secrets in it."""
        return tuple(dict.fromkeys(_PLACE.findall(self.value)))

    @property
    def asked_for(self) -> frozenset[int]:
        """The ports of ``http://HOST:PORT/`` that it speaks of."""
        return frozenset({PLAIN_PORT, SECURE_PORT} if self.secure and self.port == SECURE_PORT else {self.port})

    def fits(self, host: str, port: int) -> bool:
        """Whether it speaks of a request to this host, which is one of ``canonical_host``."""
        return host == self.host and port in self.asked_for

    def filled(self, values: Mapping[str, bytes]) -> bytes:
        """The header's value.

        Raises:
            ValueError: a secret is not fit to stand in a header. Does not repeat it.
        """
        for name in self.secrets:
            if not _FIT_FOR_A_HEADER.match(values[name]):
                raise ValueError(f"the secret {name!r} has a line break or another character that no header can hold")
        parts = _PLACE.split(self.value)
        return b"".join(
            values[part] if number % 2 else part.encode("ascii") for number, part in enumerate(parts)
        ).strip(b" \t")

    def replaces(self, header: bytes) -> bool:
        """Whether a header of the sandbox's own is the one that it adds, in any spelling that servers take."""
        return header.lower().replace(b"_", b"-") == self.header.replace("_", "-").encode("ascii")


def parse_injections(texts: Iterable[str]) -> tuple[Injection, ...]:
    """Rules.

    Raises:
        InvalidArgument: one is none, there are too many, or two of them do not go together.
    """
    rules = tuple(parse_injection(text) for text in texts)
    if len(rules) > INJECTIONS_MAX:
        raise InvalidArgument(
            f"cannot use more than {INJECTIONS_MAX} rules of what is added", detail=f"these are {len(rules)}"
        )
    for number, rule in enumerate(rules):
        for other in rules[:number]:
            if rule.host == other.host and rule.asked_for & other.asked_for:
                _check_together(rule, other)
    return rules


def _check_together(rule: Injection, other: Injection) -> None:
    if (rule.port, rule.secure) != (other.port, other.secure):
        raise _not_one(rule.text, f"the rule {other.text!r} leads the same requests elsewhere")
    if rule.replaces(other.header.encode("ascii")):
        raise _not_one(rule.text, f"the rule {other.text!r} says something else for the same header")


def parse_injection(text: str) -> Injection:
    """One rule.

    Raises:
        InvalidArgument: it is none.
    """
    if len(text) > INJECTION_CHARS_MAX:
        raise _not_one(text[:40] + "...", f"it has more than {INJECTION_CHARS_MAX} characters")
    where, _, said = text.strip().partition(" ")
    scheme, separator, place = where.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise _not_one(text, f"{scheme!r} is neither http nor https")
    secure = scheme != "http"
    target = authority(place, default_port=SECURE_PORT if secure else PLAIN_PORT)
    if target is None:
        raise _not_one(text, f"{place!r} is no host: it is one name or address, without wildcards")
    header, colon, value = (part.strip() for part in said.partition(":"))
    if not colon or not _HEADER.match(header) or header.lower() in _NEVER:
        raise _not_one(text, f"{header!r} is no header that can be added")
    if not _PRINTABLE.match(value) or "{" in (rest := _PLACE.sub("", value)) or "}" in rest:
        raise _not_one(text, "its value is text in ASCII with secrets as {NAME}")
    if not _PLACE.search(value):
        raise _not_one(text, "no secret is in it: whatever stands there itself would be seen by everybody")
    return Injection(text.strip(), *target, secure, header.lower(), value)


def secrets_in(rules: Sequence[Injection]) -> tuple[str, ...]:
    """The names of all secrets in them."""
    return tuple(dict.fromkeys(name for rule in rules for name in rule.secrets))


def _not_one(text: str, detail: str) -> InvalidArgument:
    return InvalidArgument(
        f"cannot use {text!r} as a rule of what is added to requests",
        detail=detail,
        hint="write HOST[:PORT] HEADER: VALUE, such as 'api.example.com Authorization: Bearer {NAME}'",
    )
