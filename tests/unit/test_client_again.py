"""A request whose daemon goes away under it: sent again where nothing can be done twice, and told where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import pytest

from sandboxd.client import RpcError, again, aio_calls, calls
from sandboxd.client.errors import SandboxException
from sandboxd.protocol import METHODS

STREAMS = {"commands/connect", "events/subscribe", "files/download", "files/watch"}
"""They change nothing either, but what they have sent already must not come again."""

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_what_may_be_sent_again_is_what_the_protocol_says_changes_nothing() -> None:
    assert {method.name for method in METHODS if method.reads} - STREAMS == again.IDEMPOTENT


class Daemons:
    """One after the other: each answers one request, or goes away."""

    def __init__(self, *answers: dict[str, Any] | RpcError) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closed."""

    def call(self, *_: object) -> dict[str, Any]:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, RpcError):
            raise answer
        return answer


def gone() -> RpcError:
    return RpcError(0, "disconnected", "the daemon went away")


def stopping() -> RpcError:
    return RpcError(-32018, "stopping", "cannot take requests any more")


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Daemons], dict[str, Any]]:
    def ask(method: str, daemons: Daemons) -> dict[str, Any]:
        monkeypatch.setattr(calls, "connect_or_start", lambda _: daemons)
        return calls.call(method, {})

    return ask


Ask = Callable[[str, Daemons], dict[str, Any]]


def test_a_question_is_asked_again(ask: Ask) -> None:
    assert ask("sandbox/list", Daemons(gone(), {"sandboxes": []})) == {"sandboxes": []}


def test_an_order_that_nobody_began_is_given_again(ask: Ask) -> None:
    """The daemon says so itself: whatever it is, it was not done."""
    assert ask("sandbox/create", Daemons(stopping(), {"id": "x"})) == {"id": "x"}


def test_an_order_that_may_have_been_carried_out_is_not_given_twice(ask: Ask) -> None:
    daemons = Daemons(gone(), {"id": "two"})
    with pytest.raises(SandboxException, match="went away"):
        ask("sandbox/create", daemons)
    assert daemons.asked == 1


def test_what_was_refused_is_not_asked_again(ask: Ask) -> None:
    daemons = Daemons(RpcError(-32001, "not_found", "cannot find it"), {})
    with pytest.raises(SandboxException):
        ask("sandbox/get", daemons)
    assert daemons.asked == 1


def test_a_daemon_that_is_always_gone_is_given_up(ask: Ask) -> None:
    daemons = Daemons(*(gone() for _ in range(10)))
    with pytest.raises(SandboxException):
        ask("sandbox/list", daemons)
    assert daemons.asked == again.ATTEMPTS_MAX


async def test_the_async_twin_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    daemons = Daemons(gone(), stopping(), {"sandboxes": []})

    async def connect() -> Daemons:
        return daemons

    async def call_on(connection: Daemons, *_: object) -> dict[str, Any]:
        return connection.call()

    monkeypatch.setattr(aio_calls, "connect", connect)
    monkeypatch.setattr(aio_calls, "call_on", call_on)
    assert await aio_calls.call("sandbox/list", {}) == {"sandboxes": []}
    daemons.answers = [gone()]
    with pytest.raises(SandboxException):
        await aio_calls.call("sandbox/kill", {})
