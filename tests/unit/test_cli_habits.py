"""What people type by habit is understood."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from sandboxd.cli import background, network, pools
from sandboxd.cli.main import main

FORWARDS = [
    {"forward_id": "aaaaaaaa", "host_port": 8080},
    {"forward_id": "bbbbbbbb", "host_port": 9090},
    {"forward_id": "cccccccc", "host_port": 9090},
    {"forward_id": "dddddddd", "host_port": None},
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What the daemon was asked, without what was not given."""
    requests: list[tuple[str, dict[str, Any]]] = []

    def request(method: str, /, **fields: object) -> dict[str, Any]:
        requests.append((method, {name: value for name, value in fields.items() if value is not None}))
        return {"pools": [], "drained": 0, "warm": 0, "forwards": FORWARDS, "commands": []}

    for module in (background, network, pools):
        monkeypatch.setattr(module, "request", request)
    return requests


@pytest.mark.parametrize(
    ("line", "method", "fields"),
    [
        ("warm", "pool/warm", {}),
        ("warm web", "pool/warm", {"template": "web"}),
        ("warm web 2", "pool/warm", {"template": "web", "count": 2}),
        ("warm 2", "pool/warm", {"count": 2}),
        ("warm 2 --template web --timeout 9s", "pool/warm", {"template": "web", "count": 2, "timeout": "9s"}),
        ("drain web", "pool/drain", {"template": "web"}),
        ("resize web 2 4", "pool/resize", {"template": "web", "min": 2, "max": 4}),
        ("resize 2 4", "pool/resize", {"min": 2, "max": 4}),
        ("resize web --max 4", "pool/resize", {"template": "web", "max": 4}),
        ("resize web 2 --max 4", "pool/resize", {"template": "web", "min": 2, "max": 4}),
    ],
)
def test_a_template_stands_where_every_other_verb_has_its_subject(
    asked: list[tuple[str, dict[str, Any]]], line: str, method: str, fields: dict[str, Any]
) -> None:
    """Beside the flag, which scripts have."""
    assert main(["pool", *shlex.split(line)]) == 0
    assert asked == [(method, fields)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("warm web two", "'two' is no number"),
        ("warm 2 3", "'3' is one word too many"),
        ("drain web --template web", "template is given twice"),
        ("resize web 2 --min 2", "min is given twice"),
    ],
)
def test_words_that_make_no_sense_are_refused(
    asked: list[tuple[str, dict[str, Any]]], line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pool", *shlex.split(line)]) == 2
    assert said in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize(
    ("text", "closed"), [("8080", "aaaaaaaa"), ("bbbbbbbb", "bbbbbbbb"), ("12345678", "12345678")]
)
def test_a_forward_is_closed_by_its_id_or_by_the_port_that_it_was_made_with(
    asked: list[tuple[str, dict[str, Any]]], text: str, closed: str
) -> None:
    """Nobody knows the id who made it by its port. An id of eight digits is too long for a port."""
    assert main(["forward", "box", "--close", text]) == 0
    assert asked[-1] == ("ports/close", {"sandbox": "box", "forward_id": closed})


@pytest.mark.parametrize(
    ("port", "code", "said"), [("9090", 2, "bbbbbbbb and cccccccc"), ("7070", 5, "from port 7070")]
)
def test_a_port_that_is_not_one_forwards_alone_closes_none(
    asked: list[tuple[str, dict[str, Any]]], port: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forward", "box", "--close", port]) == code
    assert [method for method, _ in asked] == ["ports/list"]
    stderr = capsys.readouterr().err
    assert said in stderr
    assert "sandboxctl ports box" in stderr


def test_ps_takes_the_flag_that_others_need(asked: list[tuple[str, dict[str, Any]]]) -> None:
    """It shows all of them anyway."""
    assert main(["ps", "-a", "box"]) == 0
    assert asked == [("commands/list", {"sandbox": "box"})]
