"""What one sandbox may do in the ChromaDB that all share: scopes, and what each request comes to.

Pure. ChromaDB has no authentication, and checks only that a collection's id exists: with the id of a collection in
another database ``get``, ``add`` and ``PUT`` work (seen with 1.5.9). So a request is taken apart here, and put
together anew from parts that are known; what is not in the table is refused. Whoever carries it out looks first
whether a collection's id belongs to the database (``Forward.collection``).

A sandbox knows its scopes as databases of ``default_tenant``: the first of them is ``default_database``, and each has
a name of its own, ``shared``, ``private``, or what follows ``private:``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from sandboxd.failures import InvalidArgument

TENANT = "default_tenant"
DATABASE = "default_database"
"""What a stock client asks for; and where all that is shared is kept."""

PRIVATE_TENANT = "sandboxd"
PRIVATE_PREFIX = "private-"
"""Of the database of one sandbox, which goes with it; the sandbox's id follows."""
KEPT_PREFIX = "kept-"

SCOPES = ("shared", "shared-ro", "private", "private:NAME")

_API = "/api/v2"
_TARGET = re.compile(r"/[A-Za-z0-9._/-]*(?:\?[A-Za-z0-9._=&-]*)?\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,510}\Z")
_COLLECTION_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_SCOPE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,38}[a-z0-9]\Z")

_PLAIN = frozenset({"heartbeat", "version", "pre-flight-checks", "healthcheck", "auth/identity"})
_READS = frozenset(
    {
        ("GET", "count"),
        ("GET", "fork_count"),
        ("GET", "indexing_status"),
        ("POST", "get"),
        ("POST", "query"),
        ("POST", "search"),
    }
)
_WRITES = frozenset(("POST", name) for name in ("add", "update", "upsert", "delete", "fork"))


class Scope(msgspec.Struct, frozen=True):
    """One part of the database that a sandbox may use."""

    text: str
    """As it was written."""
    tenant: str
    database: str
    """Where it is kept."""
    alias: str
    """What the sandbox calls the database."""
    writable: bool


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """A request that may be made, as it is to be said."""

    target: str
    scope: Scope | None = None
    """None: it is about no database."""
    collection: str | None = None
    """An id that ChromaDB will not check: look first whether it belongs to the scope's database."""


class Refused(msgspec.Struct, frozen=True):
    """A request that may not be made."""

    status: int
    error: str
    """As ChromaDB's own client names it."""
    message: str


def parse_scope(text: str, *, sandbox_id: str) -> Scope:
    """One scope.

    Raises:
        InvalidArgument: it is none.
    """
    kind, colon, name = text.partition(":")
    if text in ("shared", "shared-ro"):
        return Scope(text, TENANT, DATABASE, "shared", writable=text == "shared")
    if text == "private":
        return Scope(text, PRIVATE_TENANT, f"{PRIVATE_PREFIX}{sandbox_id}", "private", writable=True)
    if kind == "private" and colon and _SCOPE_NAME.match(name) and name not in ("shared", "private"):
        return Scope(text, PRIVATE_TENANT, f"{KEPT_PREFIX}{name}", name, writable=True)
    raise InvalidArgument(
        f"cannot use {text!r} as a scope of chroma",
        detail="NAME has 3 to 40 of a-z 0-9 -, and begins and ends with a letter or digit" if colon else "",
        hint=f"write one of {', '.join(SCOPES)}",
    )


def parse_scopes(texts: Sequence[str], *, sandbox_id: str) -> tuple[Scope, ...]:
    """The scopes of one sandbox; without any, the shared one.

    Raises:
        InvalidArgument: one is none, or two have one name.
    """
    scopes = tuple(parse_scope(text, sandbox_id=sandbox_id) for text in texts or ("shared",))
    if len({scope.alias for scope in scopes}) < len(scopes):
        raise InvalidArgument(
            "cannot give a sandbox the same part of chroma twice", detail=", ".join(scope.text for scope in scopes)
        )
    return scopes


def judge(method: str, target: str, scopes: Sequence[Scope]) -> Forward | Refused:
    """What one request comes to."""
    if not _TARGET.match(target) or ".." in target or "//" in target:
        return _refused("only plain paths are served here")
    path, mark, query = target.partition("?")
    if not path.startswith(f"{_API}/"):
        return _refused("only the API of version 2 is served here")
    rest = path.removeprefix(f"{_API}/")
    if method == "GET" and rest in _PLAIN:
        return Forward(target=path)
    match rest.split("/"):
        case ["tenants", tenant] if method == "GET" and tenant in (TENANT, PRIVATE_TENANT):
            return Forward(target=f"{_API}/tenants/{scopes[0].tenant}", scope=scopes[0])
        case ["tenants", tenant, "databases", database, *words]:
            scope = _scope_of(tenant, database, scopes)
            if scope is None:
                return Refused(404, "NotFoundError", f"Database [{database}] does not exist")
            return _in_database(method, words, scope, mark + query)
        case _:
            return _refused(f"{method} {path} is not served here")


def _scope_of(tenant: str, database: str, scopes: Sequence[Scope]) -> Scope | None:
    if tenant == TENANT and database == DATABASE:
        return scopes[0]
    for scope in scopes:
        if (tenant, database) in ((TENANT, scope.alias), (scope.tenant, scope.database)):
            return scope
    return None


def _in_database(method: str, words: Sequence[str], scope: Scope, query: str) -> Forward | Refused:
    base = f"{_API}/tenants/{scope.tenant}/databases/{scope.database}"
    target = "/".join((base, *words)) + query
    collection = None
    match (method, *words):
        case ("GET",) | ("GET", "collections") | ("GET", "collections_count"):
            writes = False
        case ("GET", "collections", name) | ("GET", "collections", "by-id", name) if _NAME.match(name):
            writes = False
        case ("POST", "collections"):
            writes = True
        case ("DELETE", "collections", name) if _NAME.match(name):
            writes = True
        case ("PUT", "collections", identity) if _COLLECTION_ID.match(identity):
            writes, collection = True, identity
        case (_, "collections", identity, verb) if _COLLECTION_ID.match(identity) and (method, verb) in _READS:
            writes, collection = False, identity
        case (_, "collections", identity, verb) if _COLLECTION_ID.match(identity) and (method, verb) in _WRITES:
            writes, collection = True, identity
        case _:
            return _refused(f"{method} {'/'.join(words) or 'of a database'} is not served here")
    if writes and not scope.writable:
        return _refused(f"the scope {scope.text} can only be read")
    return Forward(target=target, scope=scope, collection=collection)


def _refused(message: str) -> Refused:
    return Refused(403, "AuthorizationError", message)
