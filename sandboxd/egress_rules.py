"""Which connections a sandbox may make: rules as people write them, and what they say of one request.

Pure. A rule is ``[METHOD,METHOD ]HOST[:PORT,PORT]``: ``pypi.org``, ``*.debian.org:80``, ``GET api.github.com``. A
host is a name, ``*.NAME`` for everything below it (not the name itself), ``*`` for every name, or an address. Without
ports a rule speaks of 80 and 443; ``:*`` of all. What matches a deny rule is refused, then what matches an allow rule
is granted, and everything else is refused.

What is encrypted cannot be looked into: a rule with methods other than CONNECT speaks of plain HTTP alone.

An address that a name resolves to must be a public one (``forbidden``). A rule that names an address itself is taken
at its word, except for those that no rule can name: link-local ones, where clouds keep their metadata.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from sandboxd.failures import InvalidArgument
from sandboxd.spelling import nearest

RULES_MAX = 256
RULE_CHARS_MAX = 512
HOST_CHARS_MAX = 253
PORT_MAX = 65535
SLIP_LIKENESS_MIN = 0.8
"""Of a name without a dot, from which on it is a preset with a slip in it: ``git`` is not, and may be a host."""

DEFAULT_PORTS = frozenset({80, 443})
LOOPBACK = "127.0.0.1"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

PRESETS: dict[str, tuple[str, ...]] = {
    "pypi": ("pypi.org:443", "files.pythonhosted.org:443"),
    "npm": ("registry.npmjs.org:443", "registry.yarnpkg.com:443"),
    "debian": ("deb.debian.org", "security.debian.org", "snapshot.debian.org"),
    "ubuntu": ("*.ubuntu.com", "archive.ubuntu.com", "security.ubuntu.com"),
    "github": (
        "github.com:443",
        "api.github.com:443",
        "codeload.github.com:443",
        "*.githubusercontent.com:443",
    ),
    "crates": ("crates.io:443", "index.crates.io:443", "static.crates.io:443"),
    "go": ("proxy.golang.org:443", "sum.golang.org:443"),
}
"""What the usual tools need, by the name that stands for it in a list of rules."""

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)\Z")
_METHOD = re.compile(r"[A-Z]{1,16}\Z")

_REFUSED_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # shared by carriers; Alibaba's metadata is in it
        "168.63.129.16/32",  # Azure's own services
        "192.0.0.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",
        "64:ff9b::/96",  # NAT64: an IPv4 address inside
        "64:ff9b:1::/48",
        "2001::/32",  # Teredo: likewise
        "2002::/16",  # 6to4: likewise
        "fec0::/10",
    )
)


class Rule(msgspec.Struct, frozen=True):
    """One rule, understood."""

    text: str
    """As it was written."""
    host: str
    """Lower case; ``*``, ``*.NAME``, a name, or an address in its canonical form."""
    ports: frozenset[int] | None
    """None: all."""
    methods: frozenset[str] | None
    """None: all."""

    @property
    def address(self) -> Address | None:
        """The address that it names; None: it names names."""
        return address_of(self.host)

    def fits(self, host: str, port: int, method: str) -> bool:
        """Whether it speaks of this request."""
        if self.ports is not None and port not in self.ports:
            return False
        if self.methods is not None and method not in self.methods:
            return False
        if self.host == "*":
            return address_of(host) is None
        if self.host.startswith("*."):
            return host.endswith(self.host[1:])
        return host == self.host


class Egress(msgspec.Struct, frozen=True):
    """All rules of one sandbox."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()

    def judge(self, host: str, port: int, method: str) -> Verdict:
        """Whether a request may be made, before its host is looked up. ``host`` is one of ``canonical_host``."""
        for rule in self.deny:
            if rule.fits(host, port, method):
                return Verdict("denied", f"the rule {rule.text!r} denies it")
        for rule in self.allow:
            if rule.fits(host, port, method):
                return Verdict("granted", "", by_address=rule.address is not None)
        return Verdict("denied", self._why_none_allows(host), useful_rule=_rule_for(host, port))

    def _why_none_allows(self, host: str) -> str:
        address = address_of(host)
        if address is not None and unnameable(address):
            return "no rule can allow it: clouds keep their metadata at link-local addresses"
        if address is not None and any(rule.host == "*" for rule in self.allow):
            return "'*' is for names, and no rule names this address"
        return "no rule allows it"


class Verdict(msgspec.Struct, frozen=True):
    """What the rules say of one request."""

    outcome: Literal["granted", "denied"]
    reason: str
    by_address: bool = False
    """Granted by a rule that names the very address: it may be a private one."""
    useful_rule: str = ""
    """Denied, and with this rule it would be granted; empty: no rule alone changes it."""


def _rule_for(host: str, port: int) -> str:
    address = address_of(host)
    if address is not None and unnameable(address):
        return ""
    shown = f"[{host}]" if isinstance(address, ipaddress.IPv6Address) else host
    return f"{LOOPBACK if is_localhost(host) else shown}:{port}"


def is_localhost(host: str) -> bool:
    """Whether this name is the host's own, on its loopback: a name, and so it leads nowhere."""
    return host == "localhost" or host.endswith(".localhost")


def check_allowed(rules: Iterable[Rule]) -> None:
    """Refuse to allow what is refused all the same, and what was meant to be a preset.

    Raises:
        InvalidArgument: a rule allows it.
    """
    for rule in rules:
        if rule.text == rule.host and "." not in rule.text:
            preset = nearest(rule.text, PRESETS, SLIP_LIKENESS_MIN)
            if preset is not None:
                raise InvalidArgument(
                    f"cannot allow {rule.text!r}",
                    detail=f"it is nearly the preset {preset}",
                    hint=f"--allow {preset}, or for a host of that name --allow {rule.text}:80,443",
                )
        if is_localhost(rule.host):
            ports = "*" if rule.ports is None else ",".join(map(str, sorted(rule.ports)))
            raise InvalidArgument(
                f"cannot allow {rule.text!r}",
                detail="no name may lead to this host, only an address",
                hint=f"--allow {LOOPBACK}:{ports}",
            )


def parse_rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Rules, with presets replaced by what they stand for.

    Raises:
        InvalidArgument: one is none, or there are too many.
    """
    rules = tuple(rule for text in texts for rule in _expanded(text))
    if len(rules) > RULES_MAX:
        raise InvalidArgument(f"cannot use more than {RULES_MAX} rules", detail=f"these are {len(rules)}")
    return rules


def _expanded(text: str) -> Sequence[Rule]:
    return [parse_rule(part) for part in PRESETS.get(text, (text,))]


def parse_rule(text: str) -> Rule:
    """One rule.

    Raises:
        InvalidArgument: it is none.
    """
    if len(text) > RULE_CHARS_MAX:
        raise _not_a_rule(text[:40] + "...", f"it has more than {RULE_CHARS_MAX} characters")
    methods_text, space, target = text.strip().rpartition(" ")
    methods = frozenset(methods_text.strip().upper().split(",")) if space else None
    if methods is not None and not all(_METHOD.match(method) for method in methods):
        raise _not_a_rule(text, f"{methods_text!r} are no methods")
    host_text, ports_text = _host_and_ports(target)
    host = _rule_host(host_text)
    if host is None:
        raise _not_a_rule(text, f"{host_text!r} is neither a host name nor *.NAME nor an address")
    address = address_of(host)
    if address is not None and unnameable(address):
        raise _not_a_rule(text, "clouds keep their metadata at link-local addresses")
    return Rule(text.strip(), host, _ports(text, ports_text), methods)


def _host_and_ports(target: str) -> tuple[str, str]:
    if target.startswith("["):
        host, _, rest = target[1:].partition("]")
        return host, rest.removeprefix(":")
    if target.count(":") > 1:
        return target, ""
    host, _, ports = target.partition(":")
    return host, ports


def _rule_host(text: str) -> str | None:
    if text == "*":
        return text
    if text.startswith("*."):
        below = canonical_host(text[2:])
        return None if below is None or address_of(below) is not None else f"*.{below}"
    return canonical_host(text)


def _ports(rule: str, text: str) -> frozenset[int] | None:
    if text == "":
        return DEFAULT_PORTS
    if text == "*":
        return None
    ports = set()
    for part in text.split(","):
        if not part.isascii() or not part.isdigit() or not 1 <= int(part[:6]) <= PORT_MAX:
            raise _not_a_rule(rule, f"{part!r} is no port")
        ports.add(int(part))
    return frozenset(ports)


def _not_a_rule(text: str, detail: str) -> InvalidArgument:
    return InvalidArgument(
        f"cannot use {text!r} as a rule",
        detail=detail,
        hint=f"write [METHOD ]HOST[:PORT], such as '*.example.org:443', or one of {', '.join(PRESETS)}",
    )


def authority(text: str, *, default_port: int | None = None) -> tuple[str, int] | None:
    """Host and port of ``HOST:PORT``, ``[ADDRESS]:PORT`` or, where there is a default, ``HOST``; None: it is none."""
    if text.startswith("["):
        host_text, bracket, rest = text[1:].partition("]")
        if not bracket or not isinstance(address_of(host_text), Address) or ":" not in host_text:
            return None
    else:
        host_text, colon, rest = text.partition(":")
        rest = colon + rest
    host = canonical_host(host_text)
    if host is None:
        return None
    if rest == "":
        return None if default_port is None else (host, default_port)
    digits = rest.removeprefix(":")
    if rest == digits or not (digits.isascii() and digits.isdigit() and len(digits) <= 5):
        return None
    port = int(digits)
    return (host, port) if 1 <= port <= PORT_MAX else None


def http_target(text: str) -> tuple[str, int, str] | None:
    """Host, port and origin-form of ``http://HOST[:PORT][/PATH][?QUERY]``; None: it is something else.

    Nobody's name and password go in a URL: whoever reads it next might take another part of it for the host.
    """
    scheme, separator, rest = text.partition("://")
    if scheme.lower() != "http" or not separator or "#" in rest or "\\" in rest:
        return None
    end = min((at for mark in "/?" if (at := rest.find(mark)) >= 0), default=len(rest))
    where = authority(rest[:end], default_port=80)
    if where is None:
        return None
    path = rest[end:]
    return (*where, path if path.startswith("/") else f"/{path}")


def canonical_host(text: str) -> str | None:
    """The one way in which a host is written here; None: it is no host.

    Names become lower case, internationalised ones ASCII, and lose a dot at the end. Addresses in other spellings
    than the usual ones (``0x7f.1``, ``127.1``, ``017700000001``) are no hosts: what resolves them would not agree on
    what they mean.
    """
    text = text.removesuffix(".")
    address = address_of(text)
    if address is not None:
        return str(address)
    if not text.isascii():
        try:
            text = text.encode("idna").decode("ascii")
        except UnicodeError:
            return None
    text = text.lower()
    labels = text.split(".")
    if not text or len(text) > HOST_CHARS_MAX or not all(_LABEL.match(label) for label in labels):
        return None
    # No top-level domain is a number: this would be an address in a spelling of old.
    if labels[-1].isdigit() or labels[-1].startswith("0x"):
        return None
    return text


def address_of(text: str) -> Address | None:
    """The address that this is; an IPv4 address in IPv6's clothes is the IPv4 address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return None
        return address.ipv4_mapped or address
    return address


def unnameable(address: Address) -> bool:
    """Whether no rule may name it."""
    return address.is_link_local or address.is_multicast or address.is_unspecified or str(address) == "fd00:ec2::254"


def forbidden(address: Address, own: frozenset[Address]) -> str:
    """Why a name must not lead a sandbox to this address; empty: it may.

    Args:
        address: What a name was resolved to.
        own: The addresses of this host.
    """
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    address = mapped or address
    if address in own:
        return f"{address} is this host"
    if address.is_loopback:
        return f"{address} is a loopback address"
    if unnameable(address):
        return f"{address} is a link-local address, where clouds keep their metadata"
    if not address.is_global or address.is_reserved or any(address in network for network in _REFUSED_NETWORKS):
        return f"{address} is not a public address"
    return ""
