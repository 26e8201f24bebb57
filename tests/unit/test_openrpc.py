"""What is generated from the protocol says what the protocol says, and is current."""

import inspect
import json
import re
from pathlib import Path

import msgspec
import pytest

from sandboxd import openrpc, protocol
from sandboxd.cli import wire_table
from sandboxd.failures import FAILURES, Failure

ROOT = Path(__file__).parents[2]
SOURCE = inspect.getsource(protocol)


def test_the_page_is_current() -> None:
    """Regenerate it: python -m sandboxd.openrpc --markdown > docs/PROTOCOL.md."""
    assert (ROOT / "docs/PROTOCOL.md").read_text() == openrpc.markdown(SOURCE)


def test_the_page_says_which_requests_carry_descriptors() -> None:
    """A request with one too few is refused, and nothing else says how many."""
    section = openrpc.markdown(SOURCE).partition("## Descriptors")[2].partition("##")[0]
    assert {method.name for method in protocol.METHODS if method.descriptors} == set(
        re.findall(r"`((?!files/opened|daemon/left)[a-z]+/[a-z_]+)`", section)
    )


def test_the_page_names_every_type_of_failure() -> None:
    """Programs decide by it."""
    types = openrpc.schemas(SOURCE)["ErrorData"]["properties"]["type"]["description"]
    assert set(re.findall(r"[a-z]+(?:_[a-z]+)*", types)) == {failure.type for failure in FAILURES} | {Failure.type}


def test_the_wire_table_is_current() -> None:
    """Regenerate it: python -m sandboxd.openrpc --wire-table > sandboxd/cli/wire_table.py."""
    assert (ROOT / "sandboxd/cli/wire_table.py").read_text() == openrpc.wire_table()


def test_the_document_describes_every_method_and_every_reference_leads_somewhere() -> None:
    """Tools generate clients from it; one dead reference and they stop."""
    document = openrpc.document(SOURCE)
    assert [method["name"] for method in document["methods"]] == [method.name for method in protocol.METHODS]
    text = json.dumps(document)
    for name in set(text.split(openrpc.SCHEMA_REFERENCE.format(name=""))[1:]):
        assert name.partition('"')[0] in document["components"]["schemas"]


def test_fields_carry_the_sentence_that_stands_below_them() -> None:
    """The source is where they are written; the document is where they are read."""
    memory = openrpc.schemas(SOURCE)["LimitsParams"]["properties"]["memory"]
    assert memory["description"] == "Bytes, or text such as `512m`. Memory and swap together."


@pytest.mark.parametrize("method", protocol.METHODS, ids=lambda method: method.name)
def test_the_wire_table_knows_each_field_and_default(method: protocol.Method) -> None:
    """The thin path of the command line builds requests from it without msgspec."""
    fields = wire_table.FIELDS[wire_table.PARAMS[method.name]]
    given = {name: default for name, default in fields.items() if default is not wire_table.REQUIRED}
    required = {field.encode_name for field in msgspec.structs.fields(method.params) if field.required}
    assert required == fields.keys() - given.keys()
    size = {"rows": 1, "cols": 1}
    stand_in = {"sandbox": "s", "argv": ["true"], "command_id": "0" * 12, "signal": 1, "limits": {}}
    stand_in |= {
        "data": "",
        "size": size,
        "path": "p",
        "new_path": "q",
        "shell_id": "0" * 12,
        "text": "true",
        "service": "chroma",
        "port": 80,
        "name": "token",
        "value": "dA==",
        "secrets": ["token"],
        "forward_id": "0" * 8,
    }
    least = {name: stand_in[name] for name in required}
    assert msgspec.convert(given | least, method.params) == msgspec.convert(least, method.params)


def test_the_command_prints_what_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """It is how the files are made."""
    assert openrpc.main(["--document"]) == 0
    assert json.loads(capsys.readouterr().out)["openrpc"] == openrpc.OPENRPC_VERSION
    assert openrpc.main(["--wrong"]) == 2
