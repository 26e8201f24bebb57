"""Who may import whom, held by import-linter; and proof that the contracts bite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("sandboxd", "runtimes", "images")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the checkout, or a copy of it, at ``root``."""
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=root,
        # An editable install names the checkout; a copy must come before it.
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and their contracts, to be broken."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "sandbox-init")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_no_module_imports_what_it_may_not() -> None:
    answer = lint_imports(ROOT)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert " 0 broken" in answer.stdout


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("runtimes/model.py", "import sandboxd.failures"),
        ("sandboxd/lifecycle.py", "import os"),
        ("sandboxd/cli/render.py", "import runtimes.model"),
        ("sandboxd/client/connection.py", "import psutil"),
        ("runtimes/parse.py", "import subprocess"),
        ("sandboxd/manager.py", "import runtimes.docker"),
        ("sandboxd/health.py", "import sandboxd.shells"),
        ("runtimes/docker.py", "import python_on_whales"),
    ],
)
def test_a_forbidden_import_breaks_a_contract(copy: Path, module: str, forbidden: str) -> None:
    """A contract that nothing can break would let the rooms grow together unseen."""
    path = copy / module
    path.write_text(f"{path.read_text()}\n\n{forbidden}\n")
    answer = lint_imports(copy)
    assert answer.returncode != 0, answer.stdout
    assert "BROKEN" in answer.stdout, answer.stdout + answer.stderr
