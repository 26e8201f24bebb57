"""What hints, help texts and documents tell people to type is what the command line takes."""

import argparse
import ast
import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from sandboxd.cli import services, session
from sandboxd.cli.main import FAMILIES, build_parser, main

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for room in ("sandboxd", "runtimes", "images") for path in (ROOT / room).rglob("*.py"))
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "images").rglob("*.md")),
]
HISTORY = "CHANGELOG.md"
"""Tells also of what there no longer is."""

PLACEHOLDER = "VALUE"
COMMAND = re.compile(r"(?<![\w./_-])sandboxctl +(?P<words>[a-z\[-][^\n]*)")
END = re.compile(r"[,;:)]+(?= |$)| \(|  | (?:\||&&|\d?>|<|#) ?|`")
"""What ends a command within a sentence, a table or a line of shell."""
OPTIONAL = re.compile(r"\[[^\]]*\]")


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


def values_of(node: ast.expr, names: dict[str, list[str]]) -> list[str]:
    """What an expression within an f-string may say, as far as the source tells."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=body, orelse=other):
            return [*values_of(body, names), *values_of(other, names)]
        case ast.Name(id=name) if name in names:
            return names[name]
    return [PLACEHOLDER]


def texts_of(source: str) -> Iterator[str]:
    """Every text in a module but the docstrings; a place that is filled in stands as each of what may fill it."""
    tree = ast.parse(source)
    names: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values = values_of(node.value, {})
            if PLACEHOLDER not in values:
                names.setdefault(node.targets[0].id, []).extend(values)
    within: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            within |= {id(part) for part in ast.walk(node)}
            parts = [
                values_of(part.value, names) if isinstance(part, ast.FormattedValue) else values_of(part, names)
                for part in node.values
            ]
            yield from ("".join(chosen) for chosen in product(*parts))
        elif isinstance(node, ast.Expr):
            within.add(id(node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            yield node.value


def commands_in(text: str) -> Iterator[str]:
    """The words after each ``sandboxctl`` of a text."""
    for line in text.splitlines():
        for found in COMMAND.finditer(line):
            rest = found["words"]
            # A sentence may name two.
            yield up_to_its_end(OPTIONAL.sub("", rest.partition(" sandboxctl ")[0])).strip(" .")


def up_to_its_end(text: str) -> str:
    """A command without what follows it; within quotes nothing ends it."""
    for found in re.finditer(rf"'[^'\n]*'|\"[^\"\n]*\"|(?P<end>{END.pattern})", text):
        if found["end"] is not None:
            return text[: found.start()]
    return text


def shown_in(document: str) -> Iterator[str]:
    """Each command that a document shows: in its blocks of code, and within a sentence."""
    for block in re.findall(r"^```\w*\n(.*?)^```|((?:^    .*\n)+)", document, re.MULTILINE | re.DOTALL):
        yield from commands_in("".join(block))
    for span in re.findall(r"`([^`\n]+)`", document):
        yield from commands_in(span)


def refusal_of(command: str, parser: argparse.ArgumentParser) -> str | None:
    """What the command line has against a command; None: nothing."""
    words = shlex.split(command)
    if not words or words == ["VERB", "--help"]:
        return None
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            parser.parse_args(words)
        except SystemExit as error:
            said = stderr.getvalue()
            filled_in = f"invalid choice: '{PLACEHOLDER}'" in said and "argument VERB" not in said
            return said if error.code and not filled_in else None
    return None


def is_mention(command: str, parser: argparse.ArgumentParser) -> bool:
    """Whether it only names a verb, without what the verb is to work on."""
    words = command.split()
    for word in words:
        verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not verbs or word not in verbs[0].choices:
            return False
        parser = verbs[0].choices[word]
    return True


def test_the_readme_has_a_row_for_every_verb(parser: argparse.ArgumentParser) -> None:
    """What is not there is not found, and what is there and does not exist is asked for."""
    table = (ROOT / "README.md").read_text().partition("## The verbs")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([a-z ]+)(?: -[^`]*)?`", row.split("|")[1]) for row in table.splitlines() if "| `" in row]
    for first, *others in rows:
        family = first.split()[0]
        assert is_mention(first, parser)
        for name in others:
            assert is_mention(name, parser) or is_mention(f"{family} {name}", parser), name
    assert {name.split()[0] for row in rows for name in row} >= set(FAMILIES)


def test_the_readme_leads_to_every_document() -> None:
    """A page that nothing leads to is read by nobody."""
    linked = set(re.findall(r"\]\((docs/[A-Z]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}


def test_hints_and_help_texts_name_commands_that_exist(parser: argparse.ArgumentParser) -> None:
    """A hint is what to type next: one that is refused leaves a user with two problems."""
    refused, count = [], 0
    for path in SOURCES:
        for text in texts_of(path.read_text()):
            for command in commands_in(text):
                count += 1
                refusal = None if is_mention(command, parser) else refusal_of(command, parser)
                if refusal is not None:
                    refused.append(f"{path.relative_to(ROOT)}: sandboxctl {command}\n{refusal}")
    assert count > len(FAMILIES)
    assert not refused, "\n".join(refused)


def test_what_documents_show_is_taken_by_the_command_line(parser: argparse.ArgumentParser) -> None:
    """People copy it before they read it."""
    refused, count = [], 0
    for path in DOCUMENTS:
        if path.name == HISTORY:
            continue
        for command in shown_in(path.read_text()):
            count += 1
            refusal = None if is_mention(command, parser) else refusal_of(command, parser)
            if refusal is not None:
                refused.append(f"{path.relative_to(ROOT)}: sandboxctl {command}\n{refusal}")
    assert count > len(FAMILIES)
    assert not refused, "\n".join(refused)


def test_what_a_sandbox_chose_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """A failure may name its files."""
    session.complain(session.RpcError(-32001, "conflict", "cannot apply", "a\x1b[2Jb\tc\r", "sandboxctl ls \x9b1A"))
    session.say("plain: é")
    assert capsys.readouterr().err == (
        "sandboxctl: cannot apply: a\\x1b[2Jb\tc\\r\nhint: sandboxctl ls \\x9b1A\nsandboxctl: plain: é\n"
    )
    name = "é\x1b\x7f\x9b1A"
    session.show_json({"path": name})
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert json.loads(out) == {"path": name}


def test_what_a_service_printed_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe gets it as it came."""
    monkeypatch.setattr(services, "request", lambda _, **__: {"text": "a\x1b[2Jb\tc\nd\n"})
    assert main(["service", "logs", "mine"]) == 0
    assert capsys.readouterr().out == "a\x1b[2Jb\tc\nd\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["service", "logs", "mine"]) == 0
    assert capsys.readouterr().out == "a\\x1b[2Jb\tc\nd\n"


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("the parent container", "service install"),
        ("a worker", "create"),
        ("the pool manager", "pool list"),
        ("the coordinator", "stats"),
        ("the tmux dashboard", "top"),
        ("the shared ChromaDB", "service status"),
    ],
)
def test_who_comes_from_hal_9000_finds_what_does_each_of_its_jobs_now(former: str, now: str) -> None:
    """One row for each of its parts, with a command in it; that it exists is tested above."""
    page = (ROOT / "docs" / "MIGRATION.md").read_text()
    (row,) = [line for line in page.splitlines() if re.match(rf"\| \*\*{former}\*\*", line)]
    assert re.search(rf"`sandboxctl [^`]*\b{now}\b", row) or re.search(rf"`{now}`", row), row
