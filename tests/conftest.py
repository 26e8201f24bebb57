"""Options of the whole suite, and the figures that its tests print."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest

# A machine that stalls for a moment must not be taken for a mistake: what a thing costs is told by hack/bench.
hypothesis.settings.register_profile("sandboxd", deadline=None)
hypothesis.settings.load_profile("sandboxd")

_FIGURES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sandboxd")
    group.addoption(
        "--soak",
        action="store_true",
        help="run test_soak.py, test_claims.py and test_fault_points.py of tests/engine at full size: an hour",
    )
    group.addoption(
        "--sleeper-seconds", type=float, help="how long its sleeper sleeps; 1800 with --soak, otherwise 3"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_FIGURES]:
        terminalreporter.section("figures")
        for line in config.stash[_FIGURES]:
            terminalreporter.write_line(line)


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a measured figure at the end of the run, under the test's name."""
    name = request.node.name
    return lambda figure: request.config.stash[_FIGURES].append(f"{name}: {figure}")
