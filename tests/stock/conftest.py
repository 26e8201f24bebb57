"""Tests of what only stock Linux can prove; they run inside a bed that hack/stock starts, as an ordinary user.

Nothing is collected elsewhere: what they need, a host whose systemd and users may be changed, is no developer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.daemons import IMAGE, Daemon, wait_until
from tests.stock.bed import BED, identity, podman_is_usable, sudo

collect_ignore_glob = [] if BED else ["test_*.py"]
collect_ignore = ["boot"]
"""What is run by name, after a bed went down and came up."""

_figures: list[str] = []


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """What was measured, a line each; hack/stock prints them at its end."""
    return _figures


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory, figures: list[str]) -> Iterator[Daemon]:
    """The daemon that most tests share, started by hand. In the end nothing of it may be left.

    Docker is there only for the tests of it: on an emulated machine its start takes all that there is for a while.
    """
    sudo("systemctl stop docker.socket docker.service")
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), module="tests.stock.telling")
    try:
        daemon.start()
        # Asked for the first time on an emulated machine, Podman may take longer than it is waited for.
        wait_until(lambda: podman_is_usable(daemon), "Podman answers")
        figures.extend(identity(daemon))
        daemon.call("image/build", source="busybox", reference=IMAGE, engine="podman")
        yield daemon
    finally:
        if daemon.running:
            daemon.remove_everything()
            assert daemon.stop() == 0, daemon.log.read_text()
    daemon.assert_nothing_left(("podman",))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory to be a workspace."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "outside").write_text("from outside\n")
    return project


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for figure in _figures:
        terminalreporter.write_line(f"FIGURE {figure}")
