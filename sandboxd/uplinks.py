"""The engine's own network, given to a running sandbox and taken from it: what its record says is made true.

How depends on what the container was made with. One that has the engine's network, and any of Docker's, is connected
and disconnected by the engine. One that Podman made without a network gets slirp4netns, which is what Podman itself
gives a rootless container; it outlives the daemon, is found again, and is started again if it ends.

What is true is read from the kernel, before and after. Taking the interface away cuts every connection through it.
"""

from __future__ import annotations

import contextlib
import logging

import anyio
import anyio.to_thread

from runtimes import netns
from runtimes.engine import Engine
from runtimes.errors import EngineRefused, RuntimeFailure
from runtimes.model import EngineName, Network
from runtimes.netns import NetworkView
from runtimes.usernet import NAME_SERVER, Attached, UserNetworks, namespace_of
from sandboxd.background import Background
from sandboxd.engines import EngineRoom
from sandboxd.failures import Failure, Unsupported
from sandboxd.lifecycle import State
from sandboxd.sandbox import Sandbox, container_id_of

logger = logging.getLogger(__name__)

AGAIN_PAUSE_S_MIN, AGAIN_PAUSE_S_MAX = 0.25, 30.0
"""Before one that has ended is started again: twice as long each time."""


class Uplinks:
    """Of all sandboxes.

    Args:
        background: For the watches.
        engines: That made them.
        networks: Those that no engine gives.
    """

    def __init__(self, background: Background, engines: EngineRoom, networks: UserNetworks) -> None:
        self._background = background
        self._engines = engines
        self._networks = networks
        self._watched: dict[str, Attached] = {}

    def require_switchable(self, sandbox: Sandbox, wanted: Network) -> None:
        """Refuse a change that cannot be made here.

        Raises:
            Unsupported: with what to type.
            EngineUnavailable: its engine cannot be used.
        """
        if sandbox.record.network_wanted is wanted or self._by_engine(sandbox):
            return
        able = self._engine_of(sandbox).info.capabilities
        if wanted is Network.FULL and (able is None or not able.network_switch):
            raise Unsupported(
                f"cannot give a sandbox of {sandbox.record.engine} the full network while it runs",
                detail="the program for that is not installed",
                hint="sandboxctl doctor" if able is None else able.network_switch_fix or "sandboxctl doctor",
            )

    async def apply(self, sandbox: Sandbox) -> None:
        """Make true what the record says. Idempotent; an engine call only where something is to be changed.

        Called under the sandbox's lock, while it runs.

        Raises:
            RuntimeFailure, Failure: it could not be.
        """
        record, pid = sandbox.record, sandbox.pid
        if pid is None or (record.network is Network.NONE and record.network_now is None):
            return  # it has never had another
        wanted = record.network_wanted
        before = await self.look(sandbox)
        if wanted is Network.FULL and not before.routed:
            await self._open(sandbox, pid)
        elif wanted is Network.NONE and not before.closed:
            await self._close(sandbox)
        after = await self.look(sandbox)
        if wanted is Network.FULL and not after.routed and not self._by_engine(sandbox):
            await self._end(sandbox)
        if not (after.routed if wanted is Network.FULL else after.closed):
            raise EngineRefused(
                f"cannot give sandbox {record.id} the network {wanted.value!r}",
                detail=f"it has {', '.join(each.name for each in after.interfaces) or 'no interface'} still",
            )
        if not self._by_engine(sandbox):
            self._name_server(sandbox)
            self._keep(sandbox, pid)

    async def look(self, sandbox: Sandbox) -> NetworkView:
        """What the kernel says of its network.

        Raises:
            Failure: it does not run, or may not be looked at.
        """
        if sandbox.pid is None:
            raise Failure(f"cannot look at the network of {sandbox.record.id}", detail="it does not run")
        try:
            return await anyio.to_thread.run_sync(netns.look, sandbox.pid)
        except (OSError, ValueError) as error:
            raise Failure(f"cannot look at the network of {sandbox.record.id}", detail=str(error)) from error

    async def _open(self, sandbox: Sandbox, pid: int) -> None:
        if self._by_engine(sandbox):
            await self._engine_of(sandbox).connect_network(container_id_of(sandbox))
        else:
            # One of a former daemon's that is there without a route has failed.
            await self._end(sandbox)
            await self._networks.attach(sandbox.record.id, pid)

    async def _close(self, sandbox: Sandbox) -> None:
        if self._by_engine(sandbox):
            await self._engine_of(sandbox).disconnect_network(container_id_of(sandbox))
        else:
            await self._end(sandbox)

    async def _end(self, sandbox: Sandbox) -> None:
        self._watched.pop(sandbox.record.id, None)
        for attached in await anyio.to_thread.run_sync(self._networks.find, sandbox.record.id):
            await self._networks.end(attached)

    def _by_engine(self, sandbox: Sandbox) -> bool:
        able = self._engine_of(sandbox).info.capabilities
        return sandbox.record.network is Network.FULL or (able is not None and able.network_switch == "engine")

    def _engine_of(self, sandbox: Sandbox) -> Engine:
        return self._engines.get(EngineName(sandbox.record.engine))

    def _name_server(self, sandbox: Sandbox) -> None:
        full = sandbox.record.network_wanted is Network.FULL
        sandbox.write_resolver(f"nameserver {NAME_SERVER}\n" if full else "")

    # --- what runs beside -----------------------------------------------------------------------------

    def _keep(self, sandbox: Sandbox, pid: int) -> None:
        """See that what speaks for a sandbox is there as long as it is wanted, and no longer than it."""
        if sandbox.record.network_wanted is not Network.FULL:
            return
        number = namespace_of(pid)
        for attached in self._networks.find(sandbox.record.id):
            if attached.namespace == number and self._watched.get(sandbox.record.id) != attached:
                self._watched[sandbox.record.id] = attached
                self._background.start(self._watch, sandbox, attached)

    async def _watch(self, sandbox: Sandbox, attached: Attached) -> None:
        async with anyio.create_task_group() as until:

            async def sandbox_ended() -> None:
                await sandbox.ended()
                await self._networks.end(attached)

            until.start_soon(sandbox_ended)
            await self._networks.ended(attached)
            until.cancel_scope.cancel()
        if self._watched.get(sandbox.record.id) == attached:
            del self._watched[sandbox.record.id]
            await self._again(sandbox)

    async def _again(self, sandbox: Sandbox) -> None:
        pause_s = AGAIN_PAUSE_S_MIN
        while sandbox.record.state is State.RUNNING and sandbox.record.network_wanted is Network.FULL:
            async with sandbox.lock:
                if sandbox.pid is None or sandbox.record.state is not State.RUNNING:
                    return
                try:
                    await self.apply(sandbox)
                except (RuntimeFailure, Failure) as error:
                    logger.warning("sandbox %s has lost its network: %s", sandbox.record.id, error)
                else:
                    logger.warning("sandbox %s had lost its network, and has it again", sandbox.record.id)
                    return
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, AGAIN_PAUSE_S_MAX)

    async def sweep(self, pids: dict[str, int]) -> None:
        """End what a former daemon left for sandboxes that do not run any more.

        Args:
            pids: Id of a sandbox that runs to its PID 1.
        """
        for attached in await anyio.to_thread.run_sync(self._networks.find, None):
            pid = pids.get(attached.sandbox_id)
            with contextlib.suppress(OSError):  # one that has just ended
                if pid is not None and namespace_of(pid) == attached.namespace:
                    continue
            logger.info("ending the network of sandbox %s, which does not run", attached.sandbox_id)
            await self._networks.end(attached)
