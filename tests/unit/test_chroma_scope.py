"""Scopes of the shared ChromaDB: there is no other access control, so what is not granted here is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.failures import InvalidArgument
from sandboxd.services.chroma_scope import Forward, Refused, Scope, judge, parse_scopes

ID = "1520e089-0f38-4da1-a181-1669ae367f4a"
SHARED = "/api/v2/tenants/default_tenant/databases/default_database"
PRIVATE = "/api/v2/tenants/sandboxd/databases/private-sb-1"


def scopes(*texts: str) -> tuple[Scope, ...]:
    return parse_scopes(texts, sandbox_id="sb-1")


READS = [
    ("GET", ""),
    ("GET", "/collections"),
    ("GET", "/collections?limit=10&offset=2"),
    ("GET", "/collections_count"),
    ("GET", "/collections/notes"),
    ("GET", f"/collections/by-id/{ID}"),
    ("GET", f"/collections/{ID}/count"),
    ("POST", f"/collections/{ID}/get"),
    ("POST", f"/collections/{ID}/query"),
    ("POST", f"/collections/{ID}/search"),
]
WRITES = [
    ("POST", "/collections"),
    ("DELETE", "/collections/notes"),
    ("PUT", f"/collections/{ID}"),
    *(("POST", f"/collections/{ID}/{verb}") for verb in ("add", "update", "upsert", "delete", "fork")),
]


@pytest.mark.parametrize(("method", "rest"), READS + WRITES)
def test_what_a_stock_client_says_is_said_in_the_scopes_own_database(method: str, rest: str) -> None:
    for scope, base in (("shared", SHARED), ("private", PRIVATE)):
        said = judge(method, SHARED + rest, scopes(scope))
        assert isinstance(said, Forward)
        assert said.target == base + rest


@pytest.mark.parametrize(("method", "rest"), [entry for entry in READS + WRITES if ID in entry[1]])
def test_an_id_that_chroma_does_not_check_is_to_be_checked_first(method: str, rest: str) -> None:
    """Chroma finds a collection by its id alone, whatever database the path names."""
    said = judge(method, SHARED + rest, scopes("private"))
    assert isinstance(said, Forward)
    assert said.collection == (None if "by-id" in rest else ID)


def test_a_scope_to_read_cannot_be_written_and_everything_in_it_can_be_read() -> None:
    for method, rest in WRITES:
        refused = judge(method, SHARED + rest, scopes("shared-ro"))
        assert isinstance(refused, Refused)
        assert (refused.status, refused.error) == (403, "AuthorizationError")
    for method, rest in READS:
        assert isinstance(judge(method, SHARED + rest, scopes("shared-ro")), Forward)


def test_several_scopes_have_names_and_the_first_is_the_default() -> None:
    granted = scopes("shared-ro", "private", "private:team")
    for database, base in (
        ("default_database", SHARED),
        ("shared", SHARED),
        ("private", PRIVATE),
        ("team", "/api/v2/tenants/sandboxd/databases/kept-team"),
    ):
        said = judge("GET", f"/api/v2/tenants/default_tenant/databases/{database}/collections", granted)
        assert isinstance(said, Forward)
        assert said.target == f"{base}/collections"


def test_the_names_in_chromas_answers_can_be_used_as_they_come() -> None:
    """A client goes on with the tenant and database that a collection says it is in."""
    said = judge("POST", f"{PRIVATE}/collections/{ID}/get", scopes("private"))
    assert isinstance(said, Forward)
    assert said.target == f"{PRIVATE}/collections/{ID}/get"


@pytest.mark.parametrize(
    "base",
    [
        "/api/v2/tenants/sandboxd/databases/private-sb-2",
        "/api/v2/tenants/sandboxd/databases/kept-team",
        "/api/v2/tenants/sandboxd/databases/default_database",
        "/api/v2/tenants/default_tenant/databases/shared",
        "/api/v2/tenants/default_tenant/databases/private-sb-1",
        "/api/v2/tenants/other/databases/default_database",
    ],
)
def test_no_other_database_is_there(base: str) -> None:
    refused = judge("GET", f"{base}/collections", scopes("private"))
    assert isinstance(refused, Refused)
    assert refused.status == 404


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/api/v2/reset"),
        ("POST", "/api/v2/tenants"),
        ("GET", "/api/v2/tenants/other"),
        ("PATCH", "/api/v2/tenants/default_tenant"),
        ("GET", "/api/v2/tenants/default_tenant/databases"),
        ("POST", "/api/v2/tenants/default_tenant/databases"),
        ("DELETE", SHARED),
        ("POST", SHARED),
        ("GET", "/api/v2/collections/default_tenant:default_database:notes"),
        ("GET", "/api/v2/collections/x"),
        ("POST", f"{SHARED}/collections/{ID}/functions/attach"),
        ("POST", f"{SHARED}/collections/{ID}/attached_functions/f/detach"),
        ("GET", f"{SHARED}/collections/{ID}/functions/f"),
        ("GET", f"{SHARED}/collections/{ID}/add"),
        ("DELETE", f"{SHARED}/collections/{ID}/add"),
        ("POST", f"{SHARED}/collections/notes/add"),
        ("PUT", f"{SHARED}/collections/notes"),
        ("PUT", f"{SHARED}/collections/{ID.upper()}"),
        ("GET", f"{SHARED}/collections/"),
        ("GET", f"{SHARED}/collections/../../x"),
        ("GET", f"{SHARED}//collections"),
        ("GET", f"{SHARED}/collections/%2e%2e"),
        ("GET", f"{SHARED}/collections/a%2fb"),
        ("GET", f"{SHARED}/collections?a=%00"),
        ("GET", f"{SHARED}/collections#x"),
        ("GET", f"{SHARED}/collections;x"),
        ("GET", f"{SHARED}\\collections"),
        ("GET", f"http://127.0.0.1:8000{SHARED}"),
        ("GET", f"{SHARED}\n"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/api/v1/heartbeat"),
        ("GET", "/api/v2"),
        ("GET", "/"),
        ("GET", ""),
        ("GET", "*"),
        ("OPTIONS", f"{SHARED}/collections"),
        ("HEAD", "/api/v2/heartbeat"),
        ("get", "/api/v2/heartbeat"),
    ],
)
def test_what_is_not_in_the_table_is_refused(method: str, target: str) -> None:
    assert isinstance(judge(method, target, scopes("shared")), Refused)


@pytest.mark.parametrize(
    "texts",
    [
        ("",),
        ("Shared",),
        ("shared:x",),
        ("private:",),
        ("private:ab",),
        ("private:a/b/c",),
        ("private:" + "x" * 41),
        ("private:shared",),
        ("private:private",),
        ("shared", "shared-ro"),
        ("private", "private"),
    ],
)
def test_what_is_no_scope_is_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument):
        scopes(*texts)


METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"])
WORDS = st.sampled_from(
    f"tenants databases collections default_tenant default_database sandboxd private-sb-1 by-id {ID} private-sb-2 "
    "kept-team reset add get .. %2e notes functions /".replace("/", "").split(" ")
)


@given(METHODS, st.lists(WORDS, max_size=9) | st.lists(st.text(max_size=8), max_size=9))
def test_whatever_is_asked_for_stays_in_the_scope(method: str, words: list[str]) -> None:
    said = judge(method, "/".join(["/api/v2", *words]), scopes("private"))
    if isinstance(said, Forward) and said.scope is not None:
        assert said.target.startswith((f"{PRIVATE}/", f"{PRIVATE}?")) or said.target in (
            PRIVATE,
            "/api/v2/tenants/sandboxd",
        )
        assert ".." not in said.target
