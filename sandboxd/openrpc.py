"""The protocol, described: the OpenRPC document, the page for people, and the command line's table of fields.

Pure, and made from ``protocol.py`` alone, so none of them can say anything else::

    python -m sandboxd.openrpc --markdown    > docs/PROTOCOL.md
    python -m sandboxd.openrpc --wire-table  > sandboxd/cli/wire_table.py
    python -m sandboxd.openrpc --document

msgspec knows types and constraints. What a field means stands as a string below it in the source, so the functions
here take that source text.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import msgspec

from sandboxd import __version__, protocol
from sandboxd.failures import (
    FAILURES,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    REQUEST_CANCELLED,
)
from sandboxd.framing import HEADER_BYTES_MAX
from sandboxd.protocol import METHODS, Method

OPENRPC_VERSION = "1.3.2"
SCHEMA_REFERENCE = "#/components/schemas/{name}"

FieldDocs = dict[str, dict[str, str]]
Schemas = dict[str, dict[str, Any]]


def field_docs(source: str) -> FieldDocs:
    """What each class says about each of its fields: the string that follows it."""
    docs: FieldDocs = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            docs[node.name] = dict(_strings_below(node.body))
    return docs


def _strings_below(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for field, below in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            yield field.target.id, " ".join(below.value.value.split()).replace("``", "`")


def schemas(source: str) -> Schemas:
    """JSON Schema of every struct that a method, a notification or an error uses, by name."""
    structs: list[type[msgspec.Struct]] = [
        *(method.params for method in METHODS),
        *(method.result for method in METHODS),
        *(params for _, params, _ in NOTIFICATIONS),
        protocol.ErrorData,
    ]
    _, components = msgspec.json.schema_components(structs, ref_template=SCHEMA_REFERENCE)
    docs = field_docs(source)
    for name, schema in components.items():
        schema["description"] = _one_line(schema.get("description", ""))
        for field, text in docs.get(name, {}).items():
            schema["properties"][field]["description"] = text
    return dict(sorted(components.items()))


NOTIFICATIONS: tuple[tuple[str, type[msgspec.Struct], str], ...] = (
    ("$/cancelRequest", protocol.CancelParams, "To the daemon: stop working on a request."),
    ("$/progress", protocol.ProgressParams, "From the daemon: how far a request is."),
    (
        "commands/started",
        protocol.CommandStarted,
        "From the daemon, before the reply to `commands/run`. With `pty` it carries the terminal's master.",
    ),
    (
        "commands/output",
        protocol.CommandOutput,
        "From the daemon, before the reply to `commands/run` with `follow`, or to `commands/connect`.",
    ),
    (
        "daemon/left",
        protocol.DaemonLeft,
        "From the daemon, before the reply to `daemon/handover`: what goes on, unless systemd has it.",
    ),
    (
        "files/opened",
        protocol.FileOpened,
        "From the daemon, before the reply to `files/read` with `descriptor`. It carries the file's.",
    ),
    ("files/listed", protocol.FilePage, "From the daemon, before the reply to `files/list` with `pages`."),
    ("files/watching", protocol.FileWatching, "From the daemon, once after `files/watch`."),
    ("files/changed", protocol.FileChanges, "From the daemon, after `files/watching`."),
)


def document(source: str) -> dict[str, Any]:
    """The OpenRPC document of this version."""
    return {
        "openrpc": OPENRPC_VERSION,
        "info": {"title": "sandboxd", "version": __version__, "description": _one_line(protocol.__doc__ or "")},
        "methods": [_method(method) for method in METHODS],
        "components": {"schemas": schemas(source)},
    }


def _method(method: Method) -> dict[str, Any]:
    fields = msgspec.structs.fields(method.params)
    schema = msgspec.json.schema_components([method.params], ref_template=SCHEMA_REFERENCE)[1]
    properties = schema[method.params.__name__]["properties"]
    return {
        "name": method.name,
        "summary": method.summary,
        "paramStructure": "by-name",
        "params": [
            {"name": field.encode_name, "required": field.required, "schema": properties[field.encode_name]}
            for field in fields
        ],
        "result": {"name": "result", "schema": {"$ref": SCHEMA_REFERENCE.format(name=method.result.__name__)}},
    }


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


# --- the command line's table -----------------------------------------------------------------------------


def wire_table() -> str:
    """Python source: each method's params, each struct's fields with defaults, each failure's exit code."""
    structs: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        _add_fields(method.params, structs)
    lines = [
        '"""Fields and defaults of requests, and exit codes. Made by: python -m sandboxd.openrpc --wire-table."""',
        "",
        "from __future__ import annotations",
        "",
        f"PROTOCOL_VERSION = {protocol.PROTOCOL_VERSION}",
        "",
        "PARAMS: dict[str, str] = {",
        *(f'    "{method.name}": "{method.params.__name__}",' for method in METHODS),
        "}",
        "",
        "REQUIRED = object()",
        "",
        "FIELDS: dict[str, dict[str, object]] = {",
    ]
    for name, fields in sorted(structs.items()):
        if not fields:
            lines.append(f'    "{name}": {{}},')
            continue
        lines.append(f'    "{name}": {{')
        lines += [f'        "{field}": {default},' for field, default in fields.items()]
        lines.append("    },")
    lines += [
        "}",
        "",
        "EXIT_CODES: dict[str, int] = {",
        *(f'    "{kind}": {code},' for kind, code in {each.type: int(each.exit_code) for each in FAILURES}.items()),
    ]
    return "\n".join([*lines, "}", ""])


def _add_fields(struct: type[msgspec.Struct], structs: dict[str, dict[str, Any]]) -> None:
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        fields[field.encode_name] = _default(field)
        for nested in _structs_in(field.type):
            _add_fields(nested, structs)
    structs[struct.__name__] = fields


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "REQUIRED"
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if isinstance(default, msgspec.Struct | bytes):
        default = msgspec.to_builtins(default)
    return json.dumps(default) if isinstance(default, str) else repr(default)


def _structs_in(annotation: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _structs_in(argument)


# --- the page for people ----------------------------------------------------------------------------------

_PREFACE = """\
# The protocol

<!-- Generated: python -m sandboxd.openrpc --markdown > docs/PROTOCOL.md -->

JSON-RPC 2.0 on a Unix stream socket. `rpc.discover` answers this page as an OpenRPC document.

## Where

`$SANDBOXD_SOCKET`, else `$XDG_RUNTIME_DIR/sandboxd/sandboxd.sock`; where that variable is not set or the directory is
not the user's own, `/run/user/UID`, for root `/run/sandboxd`, and else a private `/tmp/sandboxd-UID`. The socket is
its owner's alone: another user gets one `unauthorized` error and is disconnected.

## Framing

The base protocol of the Language Server Protocol: `Content-Length: N`, an empty line (both end in CR LF), N bytes of
JSON in UTF-8. Other header fields are ignored. A connection whose first byte is `{` speaks one JSON object per line
instead, and gets its replies so:

```
echo '{"jsonrpc":"2.0","id":1,"method":"daemon/info"}' | socat -t 5 - UNIX-CONNECT:$SANDBOXD_SOCKET
```

| what | happens |
|---|---|
| a message above %(frame_bytes_max)d bytes | error %(invalid_request)d, then the connection is closed |
| a header above %(header_bytes_max)d bytes | the same |
| bytes that are no header at all | the same |
| a frame that is not JSON, or is nested absurdly deep | error %(parse_error)d, and the connection goes on |
| a batch (an array of requests) | error %(invalid_request)d; send the requests one after the other, without waiting |
| a request whose id is that of one that has not ended | error %(invalid_params)d |
| a request without id | not carried out: nobody could learn that it failed |
| `params` absent, `null` or `[]` | the same as `{}`; positional params are refused |
| a field that no one knows | error %(invalid_params)d: a misspelt limit must not become no limit |
| the same key twice in an object | the last one counts |
| requests sent without waiting | carried out concurrently, replies come in the order in which they end |
| the peer stops sending but still listens (as `socat` does) | what it asked for is finished |
| the peer goes away | its requests are cancelled; one that must not stop half-way finishes |
| the peer does not read | disconnected once a few MiB wait for it |
| the daemon stops | what is under way is finished, for some seconds; what was not begun or only asks is `stopping` |
| it restarts | the same; who connects meanwhile waits, and what was `stopping` can be sent again, whatever it was |

`$/cancelRequest` ends a request with error %(request_cancelled)d, unless it finished first: then its reply comes.

## Descriptors

Some requests and notifications carry file descriptors (`SCM_RIGHTS`), which ride with the first byte of the frame:
one `sendmsg` whose data begins with the frame and whose control message holds the descriptors. A request carries
exactly as many as its params say: three (stdin, stdout, stderr) for `commands/run` and `commands/start` with
`"stdio": "descriptors"` and no `pty`, one for `files/write` with `"descriptor": true`, one for every `files/upload`
and `files/download`, else none. Others are closed unseen. `files/opened` brings one to the client,
and `daemon/left`.

"""


def markdown(source: str) -> str:
    """``docs/PROTOCOL.md``."""
    numbers = {
        "frame_bytes_max": protocol.FRAME_BYTES_MAX,
        "header_bytes_max": HEADER_BYTES_MAX,
        "invalid_request": INVALID_REQUEST,
        "parse_error": PARSE_ERROR,
        "invalid_params": INVALID_PARAMS,
        "request_cancelled": REQUEST_CANCELLED,
    }
    known = schemas(source)
    lines = [_PREFACE % numbers + "## Methods", "", "| method | params | result | |", "|---|---|---|---|"]
    lines += [
        f"| `{method.name}` | {_link(method.params.__name__)} | {_link(method.result.__name__)} | {method.summary} |"
        for method in METHODS
    ]
    lines += ["", "## Notifications", "", "| method | params | |", "|---|---|---|"]
    lines += [f"| `{name}` | {_link(params.__name__)} | {summary} |" for name, params, summary in NOTIFICATIONS]
    lines += ["", "## Errors", "", *_error_rows(), "", "## Structs", ""]
    for name, schema in known.items():
        lines += _struct_rows(name, schema)
    return "\n".join(lines).rstrip() + "\n"


def _error_rows() -> Iterator[str]:
    yield "`error.data` is an [ErrorData](#errordata): what, why, and what to type next."
    yield ""
    yield "| code | `data.type` | |"
    yield "|---|---|---|"
    yield f"| {PARSE_ERROR} | `invalid_argument` | Not JSON. |"
    yield f"| {INVALID_REQUEST} | `invalid_argument` | JSON, but no request; or no frame. |"
    yield f"| {METHOD_NOT_FOUND} | `unsupported` | No such method. |"
    yield f"| {INTERNAL_ERROR} | `internal` | A fault of the daemon; its log has it. |"
    yield f"| {REQUEST_CANCELLED} | `cancelled` | Cancelled by `$/cancelRequest`. |"
    for failure in FAILURES[1:]:
        summary = _one_line(failure.__doc__ or "").split(" Args:")[0]
        yield f"| {failure.code} | `{failure.type}` | {summary} |"


def _struct_rows(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}"
    yield ""
    yield schema["description"]
    yield ""
    properties: dict[str, dict[str, Any]] = schema.get("properties", {})
    if not properties:
        return
    required = set(schema.get("required", ()))
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for field, shape in properties.items():
        default = "" if field in required else f"`{json.dumps(shape.get('default'))}`"
        yield f"| `{field}` | {_type(shape)} | {default} | {_cell(shape.get('description', ''))} |"
    yield ""


def _type(shape: dict[str, Any]) -> str:
    """A type in words, as short as a table wants it."""
    if "$ref" in shape:
        return _link(shape["$ref"].rpartition("/")[2])
    if "anyOf" in shape:
        return " or ".join(_type(option) for option in shape["anyOf"])
    if "enum" in shape:
        return " or ".join(f"`{json.dumps(value)}`" for value in shape["enum"])
    match shape.get("type"):
        case "array":
            return f"list of {_type(shape['items'])}"
        case "object":
            return f"object of {_type(shape.get('additionalProperties', {}))}"
        case str(name):
            return name
        case _:
            return "any"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Print one of the three."""
    source = inspect.getsource(protocol)
    match arguments:
        case ["--markdown"]:
            text = markdown(source)
        case ["--wire-table"]:
            text = wire_table()
        case ["--document"]:
            text = json.dumps(document(source), indent=2) + "\n"
        case _:
            sys.stderr.write("usage: python -m sandboxd.openrpc --markdown | --wire-table | --document\n")
            return 2
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
