"""A word that is not there is told which one was meant, wherever one is looked up."""

from __future__ import annotations

import msgspec
import pytest

from sandboxd import spelling
from sandboxd.config import Config, Template, template_defaults
from sandboxd.egress_rules import PRESETS, check_allowed, parse_rules
from sandboxd.failures import InvalidArgument, NotFound
from sandboxd.handlers import audit
from sandboxd.protocol import AuditQueryParams
from sandboxd.services.room import ServiceRoom


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("croma", "chroma"), ("pipy", "pypi"), ("wbe", "web"), ("pypi", "pypi"), ("nothing", None), ("", None)],
)
def test_what_was_meant_is_near_or_of_the_same_letters(word: str, meant: str | None) -> None:
    """Letters that changed places are the commonest slip, and in short words they are half of it."""
    assert spelling.nearest(word, ["chroma", "pypi", "web"]) == meant


def test_a_template_is_told_from_one_that_was_meant() -> None:
    config = msgspec.structs.replace(Config(), templates={"node": Template()})
    with pytest.raises(NotFound) as caught:
        template_defaults(config, "nodex")
    assert caught.value.hint == "did you mean node? else: sandboxctl template list"


@pytest.mark.anyio
async def test_a_service_is_told_from_one_that_was_meant() -> None:
    with pytest.raises(NotFound) as caught:
        ServiceRoom(Config(), "/nowhere", list).get("croma")
    assert caught.value.hint == "did you mean chroma? else: sandboxctl service list"


def test_a_preset_that_is_spelt_wrong_is_no_name_of_a_host() -> None:
    """It was taken for one, and then every request was refused. Who means such a host says its ports."""
    with pytest.raises(InvalidArgument) as caught:
        check_allowed(parse_rules(["pipy"]))
    assert caught.value.hint == "--allow pypi, or for a host of that name --allow pipy:80,443"
    check_allowed(parse_rules([*PRESETS, "pipy:80,443", "wiki", "pipy.org", "git", "gitlab", "npmjs"]))


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        (AuditQueryParams(result="failedx"), "did you mean failed? else: --result failed"),
        (AuditQueryParams(result="not_fuond"), "did you mean not_found? else: --result failed"),
        (
            AuditQueryParams(method="sandbox/crate"),
            "did you mean sandbox/create? else: --method sandbox, or one: sandbox/create",
        ),
        (
            AuditQueryParams(method="commandz"),
            "did you mean commands? else: --method sandbox, or one: sandbox/create",
        ),
    ],
)
def test_a_word_that_no_line_of_the_audit_log_has_is_refused(wanted: AuditQueryParams, hint: str) -> None:
    """To find nothing looks as if nothing had failed."""
    with pytest.raises(InvalidArgument) as caught:
        audit.check(wanted)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "wanted",
    [
        *(AuditQueryParams(result=result) for result in ("ok", "failed", "cancelled", "not_found", "stopping")),
        *(AuditQueryParams(method=method) for method in ("commands", "commands/", "sandbox/create")),
        AuditQueryParams(),
    ],
)
def test_what_a_line_can_have_is_looked_for(wanted: AuditQueryParams) -> None:
    audit.check(wanted)
