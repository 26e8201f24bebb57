"""From requests to handlers: what a drain waits for, and what its callers are told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus

from sandboxd import failures, protocol
from sandboxd.handlers.dispatch import Dispatcher

pytestmark = pytest.mark.anyio

LONG_S = 60.0
"""Longer than any test: what waits for it does not end by itself."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Comparing:
    """A refusal that takes its time, as where the command of a secret has to be run first."""

    def __init__(self) -> None:
        self.asked = anyio.Event()
        self.known = anyio.Event()

    async def __call__(self, *_: object) -> None:
        self.asked.set()
        await self.known.wait()


@contextlib.contextmanager
def _unused(*_: object) -> Iterator[None]:
    yield


async def _done(*_: object) -> protocol.Acknowledged:
    return protocol.Acknowledged()


async def _ask(
    dispatcher: Dispatcher, method: str, params: protocol.Params, *, task_status: TaskStatus[list[object]]
) -> None:
    ends: list[object] = []
    task_status.started(ends)
    context: Any = type("Anybody", (), {"peer": None})()
    try:
        ends.append(await dispatcher(method, params, context))
    except failures.Failure as failure:
        ends.append(failure)


CREATE = protocol.SandboxCreateParams(env={"A": "b"})
RUN = protocol.CommandParams(sandbox="s_0", argv=["true"], stdio="null")


async def test_a_drain_waits_for_a_request_that_is_still_compared_with_secrets() -> None:
    """It came before the drain, and whoever sent it must not find that the connection is gone."""
    comparing = Comparing()
    dispatcher = Dispatcher([{"sandbox/create": _done}], _unused, comparing)
    async with anyio.create_task_group() as tasks:
        ends: list[object] = await tasks.start(_ask, dispatcher, "sandbox/create", CREATE)
        await comparing.asked.wait()
        drained = await tasks.start(_drain, dispatcher, LONG_S)
        await anyio.wait_all_tasks_blocked()
        assert drained == []
        comparing.known.set()
    assert ends == [protocol.Acknowledged()]


@pytest.mark.parametrize(("method", "params"), [("sandbox/create", CREATE), ("commands/run", RUN)])
async def test_a_request_that_a_drain_cuts_short_before_it_was_begun_can_be_sent_again(
    method: str, params: protocol.Params
) -> None:
    """The next daemon gets it: nothing was made, and no command has run."""
    comparing = Comparing()
    dispatcher = Dispatcher([{method: _done}], _unused, comparing)
    async with anyio.create_task_group() as tasks:
        ends: list[object] = await tasks.start(_ask, dispatcher, method, params)
        await comparing.asked.wait()
        await dispatcher.drain(deadline_s=0)
        assert [type(end) for end in ends] == [failures.Stopping]


async def test_a_question_does_not_wait_until_secrets_are_known() -> None:
    """A filter is kept nowhere, and ``ls`` is what one types when something hangs."""
    comparing = Comparing()
    dispatcher = Dispatcher([{"sandbox/list": _done}], _unused, comparing)
    async with anyio.create_task_group() as tasks:
        ends: list[object] = await tasks.start(
            _ask, dispatcher, "sandbox/list", protocol.SandboxListParams(metadata={"team": "x"})
        )
        await anyio.wait_all_tasks_blocked()
        assert ends == [protocol.Acknowledged()]
    assert not comparing.asked.is_set()


async def _drain(dispatcher: Dispatcher, deadline_s: float, *, task_status: TaskStatus[list[bool]]) -> None:
    drained: list[bool] = []
    task_status.started(drained)
    await dispatcher.drain(deadline_s=deadline_s)
    drained.append(True)
