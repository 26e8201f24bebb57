"""A secret and the sandboxes that have it: it is not taken from under them, and they do not start without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from sandboxd import protocol
from sandboxd.connection import Context
from sandboxd.failures import Conflict, NotFound, PrerequisiteMissing
from sandboxd.handlers.secrets import SecretHandlers
from sandboxd.lifecycle import State
from sandboxd.manager import Manager
from sandboxd.records import EgressRecord
from sandboxd.sandbox import Sandbox
from sandboxd.timings import Timings
from tests.daemon.test_manager import World, anyio_backend, no_patience, world
from tests.unit.records import record

pytestmark = pytest.mark.anyio

__all__ = ["anyio_backend", "no_patience", "world"]

NOBODY = cast("Context", None)


async def stopped(world: World, manager: Manager, *names: str) -> Sandbox:
    """A sandbox that is stopped and was given secrets."""
    made = await world.container_of(record(state=State.STOPPED))
    world.engine.end(str(made.container_id))
    sandbox = manager.register(made)
    sandbox.put(secrets=names)
    return sandbox


async def ask(world: World, manager: Manager, action: str, params: Mapping[str, Any]) -> None:
    """What ``secret/ACTION`` does."""
    handler = SecretHandlers(manager, world.secrets).table()[f"secret/{action}"]
    method = next(method for method in protocol.METHODS if method.name == f"secret/{action}")
    await handler(method.params(**params), NOBODY)


async def test_a_secret_that_a_sandbox_has_is_removed_only_by_force(world: World) -> None:
    """The sandbox could not be started again, and its user would learn that later, of something else."""
    async with world.managed() as manager:
        await world.secrets.put("token", b"value")
        box = await stopped(world, manager, "token")
        with pytest.raises(Conflict) as refused:
            await ask(world, manager, "remove", {"name": "token"})
        assert box.record.id in refused.value.detail
        assert f"sandboxctl secret take {box.record.id} token" in refused.value.hint
        assert "secret rm --force token" in refused.value.hint
        world.secrets.check(["token"])
        await ask(world, manager, "remove", {"name": "token", "force": True})
        with pytest.raises(NotFound):
            world.secrets.check(["token"])


async def test_a_secret_that_is_added_to_requests_is_as_much_in_use(world: World) -> None:
    """They would be answered with 502 from then on."""
    async with world.managed() as manager:
        await world.secrets.put("token", b"value")
        box = await stopped(world, manager)
        box.put(egress=EgressRecord(inject=("api.example.com X: {token}",)))
        with pytest.raises(Conflict) as refused:
            await ask(world, manager, "remove", {"name": "token"})
        assert f"sandboxctl network {box.record.id} --reset" in refused.value.hint


async def test_a_sandbox_without_its_secret_is_not_started_and_nothing_is_wrong_with_it(world: World) -> None:
    """It was started, stopped again, and said to have ended by itself."""
    async with world.managed() as manager:
        box = await stopped(world, manager, "token")
        with pytest.raises(PrerequisiteMissing) as refused:
            await manager.start(box, Timings())
        assert box.record.id in refused.value.brief
        assert "'token'" in refused.value.detail
        assert f"sandboxctl secret take {box.record.id} token" in refused.value.hint
        assert "start" not in world.engine.calls
        assert (box.record.state, box.record.state_reason) == (State.STOPPED, "")


async def test_a_secret_taken_from_a_stopped_sandbox_is_not_asked_for_when_it_starts(world: World) -> None:
    async with world.managed() as manager:
        await world.secrets.put("other", b"value")
        box = await stopped(world, manager, "token", "other")
        await ask(world, manager, "take", {"sandbox": box.record.id, "secrets": ["token"]})
        assert box.record.secrets == ("other",)
        assert [row.secrets for row in world.journal.sandboxes()] == [("other",)]
        assert await world.secrets.values_to_start(box) == {"other": b"value"}
        with pytest.raises(NotFound, match="cannot take the secret 'token' from sandbox"):
            await ask(world, manager, "take", {"sandbox": box.record.id, "secrets": ["other", "token"]})
        assert box.record.secrets == ("other",)


async def test_nothing_is_taken_from_a_sandbox_that_is_paused(world: World) -> None:
    """Its files cannot be reached: the record alone would say what is not true."""
    async with world.managed() as manager:
        made = await world.container_of(record(state=State.PAUSED))
        box = manager.register(made)
        box.put(secrets=("token",))
        with pytest.raises(Conflict, match="paused") as refused:
            await ask(world, manager, "take", {"sandbox": box.record.id, "secrets": ["token"]})
        assert refused.value.hint == f"sandboxctl resume {box.record.id}"
        assert box.record.secrets == ("token",)
