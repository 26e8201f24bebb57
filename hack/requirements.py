"""Prints what pip is to install. Run by hack/venv and hack/stock.

`requirements.py inputs`: all of pyproject.toml that bears on what is installed.
`requirements.py package`: what the package itself needs.
`requirements.py dev`: the dev group of pyproject.toml, for pips that know no groups.
`requirements.py chroma`: the extra of that name.
`requirements.py constraints`: the versions of uv.lock, so that every checkout tests the same ones.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def inputs() -> list[str]:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    kept = {name: tables[name] for name in ("build-system", "project", "dependency-groups")}
    return [json.dumps({**kept, "hatch": tables["tool"]["hatch"]}, indent=1)]


def package() -> list[str]:
    return [*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]


def dev() -> list[str]:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    return [requirement for requirement in groups["dev"] if isinstance(requirement, str)]


def chroma() -> list[str]:
    extras: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return extras["chroma"]


def constraints() -> list[str]:
    versions: defaultdict[str, set[str]] = defaultdict(set)
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        if "registry" in package["source"]:
            versions[package["name"]].add(package["version"])
    # A package locked to several versions differs by Python version; pip decides those.
    return [f"{name}=={next(iter(found))}" for name, found in sorted(versions.items()) if len(found) == 1]


if __name__ == "__main__":
    kinds = {"inputs": inputs, "package": package, "dev": dev, "chroma": chroma, "constraints": constraints}
    print("\n".join(kinds[sys.argv[1]]()))
