"""What is installed as ``sandboxctl``."""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_script_is_installed_as_it_is() -> None:
    """An installer replaces ``#!python`` by its own interpreter, and keeps the mode."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [(path, name)] = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-scripts"].items()
    assert name == "sandboxctl"
    assert (ROOT / path).read_text().startswith("#!python\n")
    assert os.access(ROOT / path, os.X_OK)


def test_no_entry_point_overwrites_it() -> None:
    """Installers write both to the same place, and which comes last is theirs to say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "sandboxctl" not in project["project"]["scripts"]
