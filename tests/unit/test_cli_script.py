"""What is installed as ``sandboxctl``."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("directory", ["/", "/home", "~", "~/.."])
def test_quickstart_refuses_a_directory_that_is_too_wide_before_anything_else(directory: str, tmp_path: Path) -> None:
    """The daemon would refuse it, after minutes of installing."""
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [ROOT / "hack" / "quickstart", "--dry-run"],
        cwd=directory.replace("~", str(home)),
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "too wide" in done.stderr
    assert "type: mkdir" in done.stderr


def test_quickstart_says_what_is_wrong() -> None:
    """Before all that is right."""
    done = subprocess.run([ROOT / "hack" / "quickstart", "--frist"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown option '--frist'\n")
