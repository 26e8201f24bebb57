"""Bytes that are relayed arrive whole and are counted, on the loop or in a thread, whatever either end does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest

from sandboxd.network import bulk, streams
from sandboxd.network.streams import Traffic, relay
from tests.daemon.proxies import PATIENCE_S

pytestmark = pytest.mark.anyio

MEBIBYTE = 1024 * 1024
BULKY = 24 * MEBIBYTE + 4321

Move = Callable[..., Awaitable[bulk.Outcome]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each stay in a thread ended."""
    found: list[str] = []
    move = streams._BULK.move

    async def noted(*arguments: object) -> bulk.Outcome:
        outcome = await move(*arguments)  # type: ignore[arg-type]
        found.append(outcome)
        return outcome

    monkeypatch.setattr(streams._BULK, "move", noted)
    return found


def tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


def unix() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


PAIRS = {"tcp": tcp, "unix": unix}


@contextlib.asynccontextmanager
async def relaying(
    host: str, inside: str
) -> AsyncIterator[tuple[socket.socket, socket.socket, Traffic, asyncio.Task[None]]]:
    """Both far ends of a relay between two connections, what it counts, and its task."""
    with contextlib.ExitStack() as opened:
        far, near = PAIRS[host]()
        within, deep = PAIRS[inside]()
        for each in (far, near, within, deep):
            each.setblocking(False)
            opened.enter_context(each)
        traffic = Traffic()
        task = asyncio.create_task(relay(within, near, traffic, idle_s=PATIENCE_S))
        yield far, deep, traffic, task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def digest_of(source: socket.socket) -> tuple[str, int]:
    """Of all that comes, to its end."""
    found, count = hashlib.sha256(), 0
    async with asyncio.timeout(PATIENCE_S):
        while data := await streams.receive(source, MEBIBYTE):
            found.update(data)
            count += len(data)
    return found.hexdigest(), count


async def say(target: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await streams.send(target, data)
    target.shutdown(socket.SHUT_WR)


async def say_on(target: socket.socket) -> None:
    """Until the other side is gone."""
    with contextlib.suppress(OSError):
        while True:
            await streams.send(target, bytes(MEBIBYTE))


@pytest.mark.parametrize("host", ["tcp", "unix"])
async def test_much_arrives_whole_through_a_thread_both_ways_at_once(host: str, outcomes: list[str]) -> None:
    up, down = os.urandom(BULKY), os.urandom(BULKY)
    async with relaying(host, "tcp") as (far, deep, traffic, task):
        async with asyncio.TaskGroup() as group:
            group.create_task(say(far, up))
            group.create_task(say(deep, down))
            arrived = group.create_task(digest_of(deep))
            back = group.create_task(digest_of(far))
        assert arrived.result() == (hashlib.sha256(up).hexdigest(), BULKY)
        assert back.result() == (hashlib.sha256(down).hexdigest(), BULKY)
        await asyncio.wait_for(task, PATIENCE_S)
        assert (traffic.sent_bytes, traffic.received_bytes) == (BULKY, BULKY)
    assert "ended" in outcomes


def queues_of(end: socket.socket) -> tuple[bytes, int, int]:
    """Its congestion control, and what it queues at most in each direction."""
    control = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
    return control, *(end.getsockopt(socket.SOL_SOCKET, buffer) for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF))


async def test_ends_on_this_machine_queue_little_and_are_not_paced_as_on_a_network() -> None:
    """Megabytes in the kernel's queues are out of the cache when they are read: a forward carried half."""
    with contextlib.ExitStack() as opened:
        (far, near), (within, deep) = tcp(), tcp()
        for each in (far, near, within, deep):
            each.setblocking(False)
            opened.enter_context(each)
        async with asyncio.TaskGroup() as group:
            group.create_task(relay(within, near, Traffic(), idle_s=PATIENCE_S))
            await say(far, b"hello")
            assert (await digest_of(deep))[1] == len(b"hello")
            for end in (near, within):
                control, *buffers = queues_of(end)
                assert control == b"reno"
                # The kernel makes twice of what is asked for, and less of it where it allows less.
                assert max(buffers) <= 2 * streams.NEAR_BUFFER_BYTES
            deep.shutdown(socket.SHUT_WR)


def test_an_end_elsewhere_keeps_the_windows_and_the_pace_of_the_host() -> None:
    """A bound of half a megabyte would be a brake on a long link."""

    class Elsewhere(socket.socket):
        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.1", 443

    with Elsewhere(socket.AF_INET, socket.SOCK_STREAM) as end:
        before = queues_of(end)
        streams._hold_near(end)
        assert queues_of(end) == before


async def test_little_never_sees_a_thread(outcomes: list[str]) -> None:
    async with relaying("tcp", "tcp") as (far, deep, _, _):
        await say(far, b"hello")
        assert await digest_of(deep) == (hashlib.sha256(b"hello").hexdigest(), 5)
    assert outcomes == []


async def test_one_that_falls_silent_gives_its_thread_back_and_goes_on(
    outcomes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else sixteen idle connections that were once busy would hold all threads for ever."""
    monkeypatch.setattr(bulk, "QUIET_S", 0.02)
    data = os.urandom(BULKY)
    async with relaying("tcp", "tcp") as (far, deep, _, _), asyncio.TaskGroup() as group:
        arrived = group.create_task(digest_of(deep))
        async with asyncio.timeout(PATIENCE_S):
            await streams.send(far, data)
            while "quiet" not in outcomes:  # noqa: ASYNC110  (a thread tells nobody)
                await asyncio.sleep(0.01)
        await say(far, b"more")
        assert await arrived == (hashlib.sha256(data + b"more").hexdigest(), BULKY + 4)


async def test_where_the_kernel_cannot_it_goes_on_without(
    outcomes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "splice", refused)
    data = os.urandom(BULKY)
    async with relaying("tcp", "tcp") as (far, deep, _, _), asyncio.TaskGroup() as group:
        arrived = group.create_task(digest_of(deep))
        await say(far, data)
        assert await arrived == (hashlib.sha256(data).hexdigest(), BULKY)
    assert outcomes == ["impossible"]


@pytest.mark.parametrize("end", ["cancelled", "reset"])
async def test_a_relay_that_is_ended_leaves_no_thread_that_uses_its_sockets(end: str) -> None:
    """Their numbers are somebody else's the moment after."""
    async with relaying("tcp", "tcp") as (far, deep, traffic, task), asyncio.TaskGroup() as group:
        saying = group.create_task(say_on(far))
        async with asyncio.timeout(PATIENCE_S):
            while traffic.received_bytes < 2 * streams.BULKY_BYTES:
                await streams.receive(deep, MEBIBYTE)
        if end == "reset":
            deep.close()
        else:
            task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE_S)
        assert task.done()
        assert streams._BULK.has_room
        assert streams._BULK._limiter.borrowed_tokens == 0
        saying.cancel()


async def test_under_anyio_the_sockets_are_closed_after_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A door cancels by a scope, which cancels again and again: nothing of that may let go of a thread."""
    order: list[str] = []
    moved = bulk._move

    def noted(*arguments: object) -> bulk.Outcome:
        outcome = moved(*arguments)  # type: ignore[arg-type]
        time.sleep(0.2)  # a thread that takes its time: whoever does not wait for it is first
        order.append("thread")
        return outcome

    monkeypatch.setattr(bulk, "_move", noted)
    far, near = tcp()
    within, deep = tcp()
    for each in (far, near, within, deep):
        each.setblocking(False)
    traffic = Traffic()
    with far, deep:
        async with anyio.create_task_group() as group:

            async def serve() -> None:
                with near, within:
                    try:
                        await relay(within, near, traffic, idle_s=PATIENCE_S)
                    finally:
                        order.append("closed")

            group.start_soon(serve)
            group.start_soon(say_on, far)
            with anyio.fail_after(PATIENCE_S):
                while traffic.received_bytes < 2 * streams.BULKY_BYTES:
                    await streams.receive(deep, MEBIBYTE)
            group.cancel_scope.cancel()
    assert order == ["thread", "closed"]
