"""LISTEN and DIAL: sockets of init's network namespace, handed to whoever asks."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from runtimes.init.channel import InitChannel, SocketRefused
from runtimes.init.exchange import InitProtocolError
from tests.unit.init_harness import DEADLINE_S, descriptor_count, running_init, until
from tests.unit.test_init_channel import FakeInit, fake_init, message

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def free_port(family: int = socket.AF_INET) -> int:
    with socket.socket(family) as probe:
        probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def assert_talks(ends: tuple[socket.socket, socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    for sender, receiver in (ends, ends[::-1]):
        await loop.sock_sendall(sender, b"here")
        assert await asyncio.wait_for(loop.sock_recv(receiver, 10), DEADLINE_S) == b"here"


@pytest.mark.parametrize("ipv6", [False, True])
async def test_a_listening_socket_and_a_dialled_one_meet(ipv6: bool) -> None:
    """Both come out of init, so both belong to where init is, and the daemon needs no way in."""
    port = free_port(socket.AF_INET6 if ipv6 else socket.AF_INET)
    async with running_init() as host:
        before = descriptor_count(host.process.pid)
        with (
            await host.channel.listen(port, ipv6=ipv6) as listening,
            await host.channel.dial(port, ipv6=ipv6) as dialled,
        ):
            accepted, peer = await asyncio.get_running_loop().sock_accept(listening)
            with accepted:
                accepted.setblocking(False)
                assert peer[0] == ("::1" if ipv6 else "127.0.0.1")
                await assert_talks((dialled, accepted))
        # It answers before it closes its own copy.
        await until(lambda: descriptor_count(host.process.pid) == before, "init keeps nothing")


async def test_a_port_is_free_again_as_soon_as_its_socket_is_closed_even_with_connections_left() -> None:
    """A daemon that was killed leaves connections behind, and the next one needs the same port."""
    port = free_port()
    async with running_init() as host:
        listening = await host.channel.listen(port)
        with await host.channel.dial(port) as dialled:
            accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
            with accepted:
                listening.close()
                with await host.channel.listen(port):
                    accepted.close()
                    dialled.close()


async def test_a_port_that_is_taken_and_one_where_nobody_listens_are_refused_with_the_reason() -> None:
    port = free_port()
    async with running_init() as host:
        with pytest.raises(SocketRefused) as nobody:
            await host.channel.dial(port)
        assert nobody.value.errno == errno.ECONNREFUSED
        with await host.channel.listen(port):
            with pytest.raises(SocketRefused) as taken:
                await host.channel.listen(port)
            assert taken.value.errno == errno.EADDRINUSE


async def test_a_listener_that_takes_nobody_holds_nobody_else_up() -> None:
    """Init does not wait for a connection: it hands it out while it is still being made."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        async with running_init() as host:
            dialling = [asyncio.ensure_future(host.channel.dial(port)) for _ in range(4)]
            await until(lambda: any(task.done() for task in dialling), "one is in the backlog")
            assert await host.channel.list_commands() == []
            assert not all(task.done() for task in dialling)
            for task in dialling:
                task.cancel()
            done = await asyncio.gather(*dialling, return_exceptions=True)
            for dialled in done:
                if isinstance(dialled, socket.socket):
                    dialled.close()


async def test_more_sockets_than_init_may_have_files_can_be_handed_out() -> None:
    """Init holds each for a moment only; what is in flight is the asker's."""
    port = free_port()
    async with running_init() as host:
        before = descriptor_count(host.process.pid)
        with contextlib.ExitStack() as opened:
            listening = opened.enter_context(await host.channel.listen(port))
            for _ in range(200):
                opened.enter_context(await host.channel.dial(port))
                accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
                opened.enter_context(accepted)
            await until(lambda: descriptor_count(host.process.pid) == before, "init keeps nothing")


@contextlib.contextmanager
def descriptor_of(kind: str) -> Iterator[int]:
    with contextlib.ExitStack() as opened:
        if kind == "a file":
            descriptor = os.open("/dev/null", os.O_RDWR)
            opened.callback(os.close, descriptor)
        elif kind == "a Unix socket":
            descriptor = opened.enter_context(socket.socket(socket.AF_UNIX)).fileno()
        elif kind == "a datagram socket":
            descriptor = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).fileno()
        else:
            descriptor = opened.enter_context(socket.socket()).fileno()
        yield descriptor


async def lying(channel: InitChannel, fake: FakeInit, kind: int, descriptors: list[int]) -> None:
    asked = asyncio.ensure_future(channel.listen(8000))
    fake.say(message(kind, await fake.heard()), descriptors)
    with pytest.raises(InitProtocolError):
        await asyncio.wait_for(asked, DEADLINE_S)


@pytest.mark.parametrize("kind", ["a file", "a Unix socket", "a datagram socket", "a socket that does not listen"])
async def test_what_is_no_listening_tcp_socket_is_closed_and_ends_the_channel(kind: str) -> None:
    """Init is untrusted: a descriptor of something else must not be accepted on, nor be kept."""
    async with fake_init() as (fake, channel, _):
        with descriptor_of(kind) as descriptor:
            await lying(channel, fake, 0x8011, [descriptor])


async def test_no_descriptor_or_another_answer_ends_the_channel() -> None:
    async with fake_init() as (fake, channel, _):
        await lying(channel, fake, 0x8011, [])
    async with fake_init() as (fake, channel, _):
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            await lying(channel, fake, 0x8012, [listening.fileno()])
