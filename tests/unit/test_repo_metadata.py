"""What the checkout says about itself is true: the lock file, the links, the commands that the README opens with."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sandboxd.config import load_config
from sandboxd.failures import Exit

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("images/*/README.md")])


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    return tomllib.loads((ROOT / "uv.lock").read_text())


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found is not None
    return found[0].lower().replace("_", "-")


def test_lock_file_holds_every_requirement(project: dict[str, Any], lock: dict[str, Any]) -> None:
    """Else ``hack/venv`` would install a version that nobody else has."""
    own = next(package for package in lock["package"] if package["name"] == "sandboxd")
    locked = {(entry["name"], entry.get("specifier", "")) for entry in own["metadata"]["requires-dist"]}
    asked = {(name_of(text), text[len(name_of(text)) :]) for text in project["project"]["dependencies"]}
    assert asked <= locked, "type: uv lock"
    group = {entry["name"] for entry in own["metadata"]["requires-dev"]["dev"]}
    assert group == {name_of(text) for text in project["dependency-groups"]["dev"]}, "type: uv lock"


def test_lock_file_names_the_public_index_only(lock: dict[str, Any]) -> None:
    for package in lock["package"]:
        assert package["source"] in ({"registry": "https://pypi.org/simple"}, {"editable": "."})
    addresses = set(re.findall(r'url = "(https?://[^/"]+)', (ROOT / "uv.lock").read_text()))
    assert addresses == {"https://files.pythonhosted.org"}


def test_every_package_is_shipped_and_typed(project: dict[str, Any]) -> None:
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(shipped) == sorted(project["tool"]["mypy"]["packages"]) == ["images", "runtimes", "sandboxd"]


def test_every_decision_has_a_number_of_its_own() -> None:
    """They are called by it; two that were written at the same time would both be 16."""
    pages = sorted((ROOT / "docs/adr").iterdir())
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        assert page.read_text().startswith(f"# {int(page.name[:4])}. "), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_opens_with_commands_that_exist() -> None:
    block = (ROOT / "README.md").read_text().partition("```")[2].partition("```")[0]
    commands = [line.split() for line in block.splitlines() if line.startswith("hack/")]
    assert [words[0] for words in commands] == ["hack/quickstart", "hack/test"]
    for words in commands:
        assert (ROOT / words[0]).is_file()


def test_the_changelog_has_an_entry_for_what_is_coming() -> None:
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_setting_is_documented_and_every_documented_setting_exists() -> None:
    """A setting that is only on paper is refused by the daemon; one that is only in the code is found by nobody."""
    page = (ROOT / "docs" / "CONFIGURATION.md").read_text()
    _, entries = load_config("", origin="none", env={})
    rows = dict(re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| (?:`([^`]*)`)? ?\|", page, re.MULTILINE))
    assert rows == {entry.key: entry.value for entry in entries}


@pytest.mark.parametrize(("section", "folder"), [("sandboxd/", "sandboxd"), ("runtimes/", "runtimes")])
def test_the_code_map_names_every_room(section: str, folder: str) -> None:
    """And none that is gone."""
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    table = page.partition(f"### {section} ")[2].partition("\n#")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    assert [name for name in sorted(named) if not (ROOT / folder / name).exists()] == []
    rooms = {f"{name.partition('/')[0]}/" if "/" in name else name for name in named}
    there = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")}
    assert rooms == there


def test_what_the_code_map_calls_pure_is_held_to_it(project: dict[str, Any]) -> None:
    """A room that is pure by word only is impure at the next opportunity."""
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    contracts = {contract["name"]: contract for contract in project["tool"]["importlinter"]["contracts"]}
    held = set(contracts["Pure rooms do no IO"]["source_modules"])
    for package in ("sandboxd", "runtimes"):
        table = page.partition(f"### {package}/ ")[2].partition("\n#")[0]
        for line in table.splitlines():
            rooms = re.findall(r"`([\w/]+)\.py`", line.split("|")[1]) if "| P |" in line else []
            for room in rooms:
                assert f"{package}.{room.replace('/', '.')}" in held


def test_the_exit_codes_of_the_readme_are_the_ones_in_use() -> None:
    """Scripts are written by this table."""
    text = (ROOT / "README.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    documented = {int(number) for number in re.findall(r"\b([0-9]+)\b", text)}
    assert documented == {int(code) for code in Exit}
