"""Every method of the protocol, with params of every kind: an answer or a typed error, and the daemon goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxd.protocol import METHODS, Method
from tests.daemon.rpc_schema import Fuzzer, params_of
from tests.engine.daemons import Daemon
from tests.fakes import daemon_over_fake

KNOWN = {
    "sandbox": [daemon_over_fake.STOPPED, daemon_over_fake.PAUSED, "stopped"],
    "engine": ["podman"],
    "template": ["default"],
}
ELSEWHERE = {
    "daemon/shutdown": "there would be nobody to ask afterwards: tests/daemon/test_daemon.py",
    "daemon/handover": "the same: tests/daemon/test_handover.py",
    "image/build": "asks mirrors and registries: tests/engine",
}
EXAMPLES = 8
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    """One daemon for all of them: what one request breaks, the next one finds."""
    directory = tmp_path_factory.mktemp("fuzzed")
    daemon = Daemon(directory, launcher=[sys.executable, "-m", daemon_over_fake.__name__])
    daemon.start()
    try:
        with Fuzzer(daemon) as fuzzer:
            yield fuzzer
        assert daemon.call("daemon/info")["pid"] == daemon.pid
    finally:
        assert daemon.stop() == 0, daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize(
    "method", [method for method in METHODS if method.name not in ELSEWHERE], ids=lambda m: m.name
)
def test_whatever_is_asked_is_answered_by_a_result_or_a_typed_error(fuzzer: Fuzzer, method: Method) -> None:
    """Nothing that somebody sends may be an error that the daemon did not expect, or its end."""

    @SETTINGS
    @given(params=params_of(method, KNOWN), descriptors=st.integers(0, method.descriptors + 1))
    def check(params: Any, descriptors: int) -> None:
        fuzzer.check(method, params, descriptors)

    check()


def test_every_method_is_asked() -> None:
    assert ELSEWHERE.keys() < {method.name for method in METHODS}
