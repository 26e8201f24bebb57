"""The README's table of what was run has a row for each engine that a bed has, as it is there."""

from __future__ import annotations

import platform
from typing import NamedTuple

from tests.engine.daemons import Daemon
from tests.stock.bed import BED, CHECKOUT, run

BEDS = {"machine": {"both beds"}, "namespaces": {"both beds", "the quick bed"}}
"""Of which rows of the table a bed is one."""


class Row(NamedTuple):
    """One of the table."""

    distribution: str
    control_groups: str
    engine: str
    whose: str
    run_by: str


def row_of(engine: str, whose: str) -> Row:
    """The one of this bed for an engine."""
    distribution = f"Debian {platform.freedesktop_os_release()['VERSION_ID']}"
    lines = (line.strip("| ") for line in (CHECKOUT / "README.md").read_text().splitlines() if line.count("|") == 6)
    rows = [Row(*(cell.strip() for cell in line.split("|"))) for line in lines]
    (row,) = (
        row
        for row in rows
        if (row.distribution, row.whose, row.engine.split()[0]) == (distribution, whose, engine)
        and row.run_by.removeprefix("`hack/stock`, ") in BEDS[BED]
    )
    assert row.control_groups.endswith("no controllers") is row.run_by.endswith("the quick bed")
    return row


def release_of(version: str) -> list[str]:
    """What a stable distribution stays with: the first two numbers."""
    return version.split(".")[:2]


def test_podman_is_in_it(daemon: Daemon) -> None:
    (podman,) = (engine for engine in daemon.call("daemon/info")["engines"] if engine["name"] == "podman")
    row = row_of("Podman", "an ordinary user, rootless")
    _, version, _, runtime = row.engine.split()
    assert (release_of(version), runtime) == (release_of(podman["server_version"]), podman["oci_runtime"])
    assert bool(podman["controllers"]) is (BED == "machine")


def test_docker_is_in_it() -> None:
    _, version = row_of("Docker", "an ordinary user in the group docker").engine.split()
    assert release_of(version) == release_of(run("docker", "--version").removeprefix("Docker version "))
