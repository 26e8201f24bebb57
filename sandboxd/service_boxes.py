"""Containers of services: sandboxes without a network, which are nobody's but the daemon's.

A service runs as a command of the sandbox, as its ordinary user and within its limits. Nothing of it listens on the
host: whoever is given the service is led to it through the sandbox's init. A daemon that ends takes it along, and one
that was killed leaves a sandbox that the next removes, as it does with all whose owner is gone (``ephemeral``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence

import anyio

from runtimes.errors import RuntimeFailure
from runtimes.init.channel import SocketRefused, SpawnFailed
from runtimes.init.wire import InitError
from sandboxd import running
from sandboxd.failures import Conflict, Failure
from sandboxd.launching import Launcher
from sandboxd.manager import Manager
from sandboxd.protocol import CommandEnd, CommandParams, LimitsParams, SandboxCreateParams, WorkspaceParams
from sandboxd.sandbox import Sandbox
from sandboxd.services.supervisor import STOP_GRACE_S, Box, ServiceSpec
from sandboxd.timings import Timings
from sandboxd.workspace import TARGET

logger = logging.getLogger(__name__)

LABEL = "service"
"""In the metadata of its sandbox: the service's name."""


class ServiceBoxes:
    """Makes and removes them. It is there before the manager, who needs the services: whoever made both connects it.

    Args:
        manager: Has the sandboxes.
        launcher: Makes them.
    """

    def __init__(self, manager: Callable[[], Manager], launcher: Callable[[], Launcher]) -> None:
        self._manager = manager
        self._launcher = launcher
        self._allowed = anyio.Event()

    def allow(self) -> None:
        """Make them from now on: what a former daemon has left is sorted out."""
        self._allowed.set()

    @contextlib.asynccontextmanager
    async def box(self, spec: ServiceSpec) -> AsyncIterator[Box]:
        """A sandbox for the length of an ``async with``; see ``supervisor.Boxes``."""
        await self._allowed.wait()
        try:
            sandbox = await self._launcher().create(_params(spec), Timings())
        except InitError as error:
            raise Failure(f"cannot make the container of the service {spec.name}", detail=str(error)) from error
        logger.info("service %s runs in sandbox %s", spec.name, sandbox.record.id)
        try:
            yield _Box(sandbox)
        finally:
            with anyio.CancelScope(shield=True):
                await self._remove(sandbox)

    async def _remove(self, sandbox: Sandbox) -> None:
        try:
            await self._manager().remove(sandbox, Timings())
        except (RuntimeFailure, Failure, OSError) as error:
            logger.warning("cannot remove %s yet: %s", sandbox.record.id, error)
            self._manager().remove_soon(sandbox)


class _Box:
    """See ``supervisor.Box``."""

    data_inside = TARGET

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.sandbox_id = sandbox.record.id
        self.pid = sandbox.pid

    async def run(self, argv: Sequence[str], output: int) -> str:
        sandbox = self._sandbox
        params = CommandParams(sandbox=sandbox.record.id, argv=list(argv))
        request = running.spawn_request(sandbox, params, keep=False)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            command, _ = await sandbox.commands.start(
                request, (null, output, output), background=False, timeout_s=None, grace_s=STOP_GRACE_S
            )
        except SpawnFailed as error:
            raise running.not_started(error, request) from None
        except InitError as error:
            raise Failure("cannot start it in its container", detail=str(error)) from error
        finally:
            os.close(null)
        try:
            return _how_it_ended(await sandbox.commands.wait_or_kill(command))
        finally:
            sandbox.commands.release(command)

    async def dial(self, port: int) -> socket.socket:
        try:
            connected = await self._dial_either(port)
        except SocketRefused as error:
            raise OSError(error.errno, os.strerror(error.errno)) from error
        except (InitError, Conflict) as error:
            raise OSError(errno.ECONNREFUSED, str(error)) from error
        connected.setblocking(False)
        return connected

    async def _dial_either(self, port: int) -> socket.socket:
        """Of IPv4 or, where nobody listens there, of IPv6."""
        try:
            return await self._sandbox.dial(port)
        except SocketRefused as error:
            if error.errno != errno.ECONNREFUSED:
                raise
            return await self._sandbox.dial(port, ipv6=True)


def _params(spec: ServiceSpec) -> SandboxCreateParams:
    container = spec.container
    assert container is not None
    return SandboxCreateParams(
        image=container.image,
        engine=container.engine,  # type: ignore[arg-type]
        workspace=WorkspaceParams(path=container.data) if container.data else None,
        limits=LimitsParams(memory=spec.memory_bytes_max, cpus=container.cpus, pids=container.pids),
        env=container.env,
        network="none",
        services=[],
        secrets=list(container.secrets),
        metadata={LABEL: spec.name},
        ephemeral=True,
        lifetime="none",
        idle_timeout="none",
        launch="cold",
    )


def _how_it_ended(end: CommandEnd) -> str:
    if end.status == "oom":
        return "it was ended because its memory was at its limit"
    if end.signal is not None:
        return f"it ended by signal {end.signal}"
    return "its container is gone" if end.exit_code is None else f"it ended with {end.exit_code}"
