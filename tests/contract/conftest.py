from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.model import EngineName
from tests.contract import engines
from tests.contract.engines import Bench

REAL = [pytest.param(name, marks=pytest.mark.engine) for name in EngineName]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def owner() -> str:
    return f"contract-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    engines.prepare(folder)
    return folder


@pytest.fixture(scope="session", params=REAL)
def prepared(request: pytest.FixtureRequest, owner: str, scratch: Path) -> Iterator[Bench]:
    """A real engine with the image in it, once per session."""
    bench = engines.real(request.param, owner, scratch)
    yield bench
    engines.clear(bench, image=True)


@pytest.fixture
def real_bench(prepared: Bench) -> Iterator[Bench]:
    """A real engine; what a test leaves behind is removed."""
    yield prepared
    engines.clear(prepared)


@pytest.fixture(scope="session", params=["fake", *REAL])
def any_prepared(request: pytest.FixtureRequest, owner: str, scratch: Path) -> Iterator[Bench]:
    if request.param == "fake":
        yield engines.fake(owner, scratch)
        return
    bench = engines.real(request.param, f"{owner}-all", scratch)
    yield bench
    engines.clear(bench, image=True)


@pytest.fixture
def bench(any_prepared: Bench, owner: str, scratch: Path) -> Iterator[Bench]:
    """Each engine in turn, the fake one new for every test; what a test leaves behind is removed."""
    if any_prepared.owner == owner:
        yield engines.fake(owner, scratch)
        return
    yield any_prepared
    engines.clear(any_prepared)
