"""One daemon on real engines for the whole suite, and what each test takes from it.

Run as root: projects of several owners are made, and one test is an ordinary user.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import ENGINES, IMAGE, Daemon, running

Box = dict[str, Any]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The daemon that most tests share. In the end nothing of it may be left."""
    if os.geteuid() != 0:
        pytest.fail("the engine suite makes projects of several owners: run it as root (sudo hack/test tests/engine)")
    with running(Daemon(tmp_path_factory.mktemp("daemon"))) as daemon:
        for report in daemon.call("daemon/info")["engines"]:
            if not report["usable"]:
                pytest.fail(f"{report['name']} cannot be used ({report['reason']}): run hack/engines")
        daemon.call("image/build", source="busybox", reference=IMAGE)
        yield daemon
    for name in ENGINES:
        # Another run of the suite may still be using it.
        subprocess.run([name, "rmi", IMAGE], capture_output=True, check=False)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, daemon: Daemon) -> str:
    """Each engine in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def box(daemon: Daemon, engine: str) -> Iterator[Box]:
    """A sandbox without a project that the tests of one module share."""
    with daemon.box(engine, limits={"memory": "64m", "pids": 200}) as box:
        yield box


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory to be a workspace, root's own."""
    project = tmp_path / "project"
    project.mkdir()
    return project


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the static programs that try what a sandbox is to be refused."""
    directory = tmp_path_factory.mktemp("probes")
    if shutil.which("gcc") is None:
        pytest.fail("the engine suite needs a C compiler: run hack/engines")
    for name in ("seccomp_probe", "trespass", "ways_out"):
        source = Path(__file__).with_name(f"{name}.c")
        words = ["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", directory / name, source]
        subprocess.run(words, check=True)
    return directory
