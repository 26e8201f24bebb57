"""What is added to requests: which rules are understood, which requests they speak of, and what they come to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.failures import InvalidArgument
from sandboxd.injections import INJECTIONS_MAX, Injection, parse_injection, parse_injections, secrets_in

RULE = "api.example.com Authorization: Bearer {token}"


@pytest.mark.parametrize(
    ("text", "understood"),
    [
        (RULE, ("api.example.com", 443, True, "authorization", "Bearer {token}")),
        ("https://API.example.com.  X-Key:{a}-{b}", ("api.example.com", 443, True, "x-key", "{a}-{b}")),
        ("api.example.com:8443 X-Key: {a}", ("api.example.com", 8443, True, "x-key", "{a}")),
        ("http://inside.example X-Key: {a}", ("inside.example", 80, False, "x-key", "{a}")),
        ("http://127.0.0.1:8080 X-Key: {a}", ("127.0.0.1", 8080, False, "x-key", "{a}")),
        ("[2001:db8::1]:9000 X-Key: {a}", ("2001:db8::1", 9000, True, "x-key", "{a}")),
    ],
)
def test_a_rule_says_where_by_which_way_and_what(text: str, understood: tuple[object, ...]) -> None:
    rule = parse_injection(text)
    assert (rule.host, rule.port, rule.secure, rule.header, rule.value) == understood


@pytest.mark.parametrize(
    "text",
    [
        "",
        "api.example.com",
        "api.example.com Authorization",
        "api.example.com Authorization: Bearer abc",
        "api.example.com : {token}",
        "*.example.com Authorization: {token}",
        "* Authorization: {token}",
        "me:pw@api.example.com Authorization: {token}",
        "ftp://api.example.com Authorization: {token}",
        "api.example.com/path Authorization: {token}",
        "api.example.com:0 Authorization: {token}",
        "api.example.com Authorization: {token",
        "api.example.com Authorization: {} {token}",
        "api.example.com Authorization: {../x} {token}",
        "api.example.com Authorization: é {token}",
        "api.example.com Authorization: a\r\nb {token}",
        "api.example.com X Y: {token}",
        *(
            f"api.example.com {name}: {{token}}"
            for name in ("Host", "Content-Length", "transfer-encoding", "Upgrade")
        ),
        f"api.example.com X: {'x' * 1024}{{token}}",
    ],
)
def test_what_is_no_rule_is_refused_with_the_way_to_write_one(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_injection(text)
    assert "HOST[:PORT] HEADER: VALUE" in refused.value.hint


@pytest.mark.parametrize(
    "pair",
    [
        (RULE, "api.example.com authorization: {other}"),
        ("api.example.com X-Key: {a}", "api.example.com X_Key: {b}"),
        ("api.example.com X: {a}", "http://api.example.com Y: {b}"),
        ("api.example.com:443 X: {a}", "http://api.example.com:443 Y: {b}"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        parse_injections(pair)


def test_rules_for_one_host_can_add_several_headers_and_there_are_only_so_many() -> None:
    rules = parse_injections([RULE, "api.example.com X-Team: {team}", "other.example X: {token}"])
    assert secrets_in(rules) == ("token", "team")
    with pytest.raises(InvalidArgument):
        parse_injections(f"h{number}.example X: {{a}}" for number in range(INJECTIONS_MAX + 1))


@pytest.mark.parametrize(
    ("text", "fitting", "unfit"),
    [
        (RULE, [("api.example.com", 80), ("api.example.com", 443)], [("api.example.com", 8080)]),
        ("api.example.com:8443 X: {a}", [("api.example.com", 8443)], [("api.example.com", 80)]),
        ("http://api.example.com X: {a}", [("api.example.com", 80)], [("api.example.com", 443)]),
    ],
)
def test_a_rule_speaks_of_its_host_and_port_alone(
    text: str, fitting: list[tuple[str, int]], unfit: list[tuple[str, int]]
) -> None:
    rule = parse_injection(text)
    assert all(rule.fits(*request) for request in fitting)
    lookalikes = ("example.com", "xapi.example.com", "api.example.com.evil.example", "api-example.com")
    assert not any(rule.fits(*request) for request in (*unfit, *((host, rule.port) for host in lookalikes)))


def test_a_value_is_filled_with_secrets_and_a_secret_with_braces_is_no_rule_of_its_own() -> None:
    rule = parse_injection("a.example X: {one}:{two}:{one}")
    assert rule.filled({"one": b"{two}", "two": b"2"}) == b"{two}:2:{two}"


@given(st.binary(max_size=40))
def test_whatever_a_secret_holds_it_ends_no_header(value: bytes) -> None:
    rule: Injection = parse_injection("a.example X: -{s}-")
    if not value or set(value) & {*range(9), *range(10, 32), 127}:
        with pytest.raises(ValueError, match="the secret 's' has"):
            rule.filled({"s": value})
    else:
        assert rule.filled({"s": value}) == b"-" + value + b"-"
