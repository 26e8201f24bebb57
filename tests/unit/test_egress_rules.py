"""Egress rules: what people write, and what it grants; everything else is refused."""

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.egress_rules import (
    PRESETS,
    Egress,
    canonical_host,
    check_allowed,
    forbidden,
    parse_rule,
    parse_rules,
)
from sandboxd.failures import InvalidArgument


def outcome(rules: list[str], host: str, port: int = 443, method: str = "GET", deny: list[str] | None = None) -> str:
    return Egress(parse_rules(rules), parse_rules(deny or [])).judge(host, port, method).outcome


@pytest.mark.parametrize(
    ("rule", "host", "port", "method"),
    [
        ("pypi.org", "pypi.org", 443, "CONNECT"),
        ("pypi.org", "pypi.org", 80, "GET"),
        ("PyPI.org.", "pypi.org", 80, "GET"),
        ("*.debian.org:80", "deb.debian.org", 80, "GET"),
        ("*.debian.org", "a.b.debian.org", 80, "GET"),
        ("*", "anything.example", 443, "GET"),
        ("*:*", "anything.example", 22, "CONNECT"),
        ("GET,HEAD example.org", "example.org", 80, "HEAD"),
        ("example.org:8080,9090", "example.org", 9090, "GET"),
        ("10.1.2.3:5432", "10.1.2.3", 5432, "CONNECT"),
        ("[fd00::1]:80", "fd00::1", 80, "GET"),
        ("fd00::1", "fd00::1", 443, "GET"),
    ],
)
def test_a_rule_grants_what_it_says(rule: str, host: str, port: int, method: str) -> None:
    assert outcome([rule], host, port, method) == "granted"


@pytest.mark.parametrize(
    ("rule", "host", "port", "method"),
    [
        ("pypi.org", "pypi.org", 22, "CONNECT"),
        ("pypi.org", "evilpypi.org", 443, "CONNECT"),
        ("pypi.org", "pypi.org.evil.example", 443, "CONNECT"),
        ("pypi.org", "sub.pypi.org", 443, "CONNECT"),
        ("*.debian.org", "debian.org", 80, "GET"),
        ("*.debian.org", "evildebian.org", 80, "GET"),
        ("GET example.org", "example.org", 80, "POST"),
        ("GET example.org", "example.org", 443, "CONNECT"),
        ("*", "10.1.2.3", 80, "GET"),
        ("*:*", "8.8.8.8", 53, "CONNECT"),
    ],
)
def test_a_rule_grants_nothing_else(rule: str, host: str, port: int, method: str) -> None:
    """An end of a name is not a domain, and an address is not a name."""
    assert outcome([rule], host, port, method) == "denied"


def test_without_rules_nothing_is_granted() -> None:
    assert outcome([], "pypi.org") == "denied"


def test_what_is_denied_is_denied_whatever_allows_it() -> None:
    assert outcome(["*"], "evil.example", deny=["*.example"]) == "denied"
    assert outcome(["*"], "good.org", deny=["*.example"]) == "granted"


def test_every_preset_is_made_of_rules() -> None:
    for name in PRESETS:
        assert parse_rules([name])
    assert outcome(["pypi"], "files.pythonhosted.org", 443, "CONNECT") == "granted"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b c",
        "http://pypi.org",
        "pypi.org:0",
        "pypi.org:65536",
        "pypi.org:٤٤٣",
        "pypi.org:99999999999999999999",
        "*pypi.org",
        "*.*.org",
        "a..b",
        "-a.org",
        "127.1",
        "0x7f.1",
        "2130706433",
        "*.1.2.3.4",
        "169.254.169.254",
        "169.254.169.254:80",
        "[fe80::1]:80",
        "[fe80::1%eth0]:80",
        "[::ffff:169.254.169.254]:80",
        "[::1]junk",
        "x" * 600,
    ],
)
def test_what_is_no_rule_is_refused_and_not_guessed(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_rule(text)


def test_too_many_rules_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        parse_rules(["a.example"] * 257)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "fec0::1",
        "203.0.113.7",  # documentation
        "1.2.3.4",  # ours, below
    ],
)
def test_no_name_leads_to_an_address_that_is_not_public(address: str) -> None:
    """Whoever controls a name can have it resolve to anything, and differently each time."""
    assert forbidden(ipaddress.ip_address(address), frozenset({ipaddress.ip_address("1.2.3.4")}))


@pytest.mark.parametrize("address", ["8.8.8.8", "151.101.0.223", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_a_name_may_lead_to_a_public_address(address: str) -> None:
    assert forbidden(ipaddress.ip_address(address), frozenset()) == ""


def test_only_a_rule_that_names_an_address_grants_a_private_one() -> None:
    """The user named his own database; a name that resolves to it is somebody else's word."""
    egress = Egress(parse_rules(["10.1.2.3:5432", "*"]))
    assert egress.judge("10.1.2.3", 5432, "CONNECT").by_address
    assert not egress.judge("db.example", 443, "CONNECT").by_address


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("PyPI.Org.", "pypi.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("::FFFF:8.8.8.8", "8.8.8.8"),
        ("2606:4700:0::1111", "2606:4700::1111"),
        ("localhost", "localhost"),
        ("127.1", None),
        ("0177.0.0.1", None),
        ("1.2.3.4.5", None),
        ("a b", None),
        ("a\0b", None),
        ("a/b", None),
        ("a@b", None),
        ("user%40host", None),
        ("", None),
        (".", None),
        ("..", None),
        ("x" * 64 + ".org", None),
        (".".join(["x" * 60] * 5), None),
    ],
)
def test_a_host_is_written_in_one_way_or_is_none(text: str, canonical: str | None) -> None:
    assert canonical_host(text) == canonical


@given(st.text(max_size=80))
def test_any_text_is_a_rule_or_is_refused(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        rule = parse_rule(text)
        assert rule.ports is None or all(1 <= port <= 65535 for port in rule.ports)


@given(st.text(max_size=300))
def test_a_canonical_host_stays_what_it_is(text: str) -> None:
    """Else a rule and a request could differ by how often they were read."""
    host = canonical_host(text)
    assert host is None or canonical_host(host) == host


@pytest.mark.parametrize(
    ("host", "useful"),
    [
        ("a.example", "a.example:8080"),
        ("10.0.0.1", "10.0.0.1:8080"),
        ("fd00::1", "[fd00::1]:8080"),
        ("localhost", "127.0.0.1:8080"),
        ("169.254.169.254", ""),
        ("fe80::1", ""),
    ],
)
def test_a_rule_is_proposed_only_where_it_would_help(host: str, useful: str) -> None:
    """A rule for a cloud's metadata is refused, and one for localhost never grants anything."""
    assert Egress().judge(host, 8080, "GET").useful_rule == useful
    if useful:
        check_allowed([parse_rule(useful)])


def test_a_clouds_metadata_is_said_to_be_out_of_every_rules_reach() -> None:
    """Else one goes on to write rules for it."""
    assert Egress().judge("169.254.169.254", 80, "GET").reason.startswith("no rule can allow it")


def test_no_rule_is_proposed_against_one_that_denies() -> None:
    """It would go before."""
    assert Egress(deny=parse_rules(["a.example"])).judge("a.example", 80, "GET").useful_rule == ""


def test_every_name_is_no_address_and_says_so() -> None:
    """``*`` looks like everything."""
    every = Egress(parse_rules(["*"]))
    verdict = every.judge("10.0.0.1", 80, "GET")
    assert verdict.reason == "'*' is for names, and no rule names this address"
    assert verdict.useful_rule == "10.0.0.1:80"
    assert every.judge("a.example", 22, "GET").reason == "no rule allows it"


@pytest.mark.parametrize(
    ("rule", "instead"),
    [
        ("localhost:18765", "--allow 127.0.0.1:18765"),
        ("localhost:*", "--allow 127.0.0.1:*"),
        ("LOCALHOST", "--allow 127.0.0.1:80,443"),
        ("*.localhost:1", "--allow 127.0.0.1:1"),
    ],
)
def test_the_hosts_own_name_cannot_be_allowed(rule: str, instead: str) -> None:
    """It was taken, and then led nowhere."""
    with pytest.raises(InvalidArgument) as caught:
        check_allowed([parse_rule(rule)])
    assert caught.value.hint == instead
