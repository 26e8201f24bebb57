"""All services of one daemon: ChromaDB, and those that the user declares."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

import anyio.to_thread
import msgspec

from runtimes.quantities import parse_memory
from sandboxd import spelling
from sandboxd.background import Background
from sandboxd.config import SIZE_BYTES_MAX, Config, loopback_address
from sandboxd.config import Service as ServiceSetting
from sandboxd.failures import Conflict, InvalidArgument, NotFound, Unsupported
from sandboxd.network.streams import Traffic, relay
from sandboxd.records import GrantRecord
from sandboxd.services import backup, chroma
from sandboxd.services.chroma import Chroma, chroma_spec
from sandboxd.services.chroma_scope import parse_scopes
from sandboxd.services.supervisor import Boxes, ContainerSpec, Service, ServiceSpec, give_away

RELAY_IDLE_S = 3600.0
"""A database's clients keep connections open that say nothing."""
PLAIN_PATIENCE_S = 15.0

Serve = Callable[[socket.socket], Awaitable[None]]


class Copied(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a copy."""

    size_bytes: int | None = None
    former_data_dir: str | None = None


class ServiceRoom:
    """The services, and what a sandbox is given of them.

    Args:
        config: The settings.
        directory: Each service has a directory in it.
        sandbox_ids: Of the sandboxes that there are.
        boxes: Where services run that are containers; None: there are none.
    """

    def __init__(
        self, config: Config, directory: str, sandbox_ids: Callable[[], Sequence[str]], boxes: Boxes | None = None
    ) -> None:
        memory = parse_memory(config.chroma.memory, bytes_max=SIZE_BYTES_MAX)
        specs = [
            chroma_spec(port_inside=config.chroma.port, memory_bytes_max=memory, python=config.chroma.python),
            *(_plain_spec(name, setting) for name, setting in config.services.items()),
        ]
        self._services = {spec.name: Service(spec, os.path.join(directory, spec.name), boxes) for spec in specs}
        self._chroma = Chroma(self._services[chroma.NAME], sandbox_ids)
        self._defaults = config.defaults.services.split()

    def start(self, background: Background) -> None:
        """Begin to look after them; none is started before it is wanted."""
        for service in self._services.values():
            background.start(service.run)

    def all(self) -> list[Service]:
        """All of them."""
        return list(self._services.values())

    def exposed(self) -> list[str]:
        """Those on the host's loopback that were to have a network of their own."""
        return [
            name
            for name, service in self._services.items()
            if service.network == "host" and service.spec.network == "none"
        ]

    def get(self, name: str) -> Service:
        """One of them.

        Raises:
            NotFound: there is none of this name.
        """
        service = self._services.get(name)
        if service is None:
            raise NotFound(
                f"cannot find a service {name!r}",
                detail=f"there are {', '.join(self._services)}",
                hint=spelling.hint(name, self._services, "sandboxctl service list"),
            )
        return service

    # --- what a sandbox is given ----------------------------------------------------------------------

    def grants(self, texts: Sequence[str] | None, *, sandbox_id: str) -> tuple[GrantRecord, ...]:
        """What ``NAME`` and ``NAME=SCOPE`` come to; without any, what the settings say.

        Raises:
            NotFound: a service that there is not.
            InvalidArgument: a scope that it does not have, or two services at one port.
        """
        said: dict[str, list[str | None]] = {}
        for text in self._defaults if texts is None else texts:
            name, equals, scope = text.partition("=")
            self.get(name)
            if equals and name != chroma.NAME:
                raise InvalidArgument(f"cannot use {text!r}", detail=f"{name} has no scopes", hint=f"write {name}")
            said.setdefault(name, []).append(scope if equals else None)
        scopes = {name: _scopes(given) for name, given in said.items()}
        if chroma.NAME in scopes:
            parse_scopes(scopes[chroma.NAME], sandbox_id=sandbox_id)
        ports = [self.get(name).spec.port_inside for name in scopes]
        if len(set(ports)) < len(ports):
            raise InvalidArgument(
                f"cannot offer {' and '.join(scopes)} at once", detail="two of them have the same port inside"
            )
        return tuple(GrantRecord(service=name, scopes=given) for name, given in scopes.items())

    def server(self, grant: GrantRecord, *, sandbox_id: str) -> Serve:
        """What serves the connections of one sandbox to one service, which is started if it does not run.

        Raises:
            NotFound: the service is not declared any more.
        """
        service = self.get(grant.service)
        service.want()
        if grant.service == chroma.NAME:
            return self._chroma.proxy(parse_scopes(grant.scopes, sandbox_id=sandbox_id)).serve
        return functools.partial(_serve_plain, service)

    async def forget(self, sandbox_id: str, grants: Sequence[GrantRecord]) -> None:
        """Remove what was private to a sandbox that is gone."""
        if any(grant.service == chroma.NAME and "private" in grant.scopes for grant in grants):
            await self._chroma.forget(sandbox_id)

    # --- copies ---------------------------------------------------------------------------------------

    async def backup(self, name: str, path: str) -> Copied:
        """Copy a service's data, while it is stopped for it, into a new file on the host.

        Raises:
            NotFound, Unsupported, InvalidArgument, Conflict: it cannot be copied, or not to there.
            Failure: the disk is full, or the data cannot be read.
        """
        service = self._with_data(name)
        backup.check_new(path)
        async with service.stopped():
            size = await anyio.to_thread.run_sync(backup.write_backup, service.data_dir, path)
        return Copied(size_bytes=size)

    async def restore(self, name: str, path: str) -> Copied:
        """Put a copy back, and start the service with it; the data that was there is kept beside it.

        Raises:
            NotFound, Unsupported, InvalidArgument: it is no copy; nothing has changed.
            Failure: it cannot be read, or the disk is full; nothing has changed.
        """
        service = self._with_data(name)
        if not os.path.isabs(path):
            raise InvalidArgument(f"cannot read {path!r}", detail="give an absolute path")
        fresh = f"{service.data_dir}.restoring"
        owner = os.stat(service.data_dir) if service.spec.container is not None else None
        os.makedirs(os.path.dirname(fresh), mode=0o700, exist_ok=True)
        if os.path.lexists(fresh):
            raise Conflict(f"cannot restore {name} now", detail=f"{fresh} is there", hint=f"rm -r {fresh}")
        await anyio.to_thread.run_sync(backup.read_backup, path, fresh)
        async with service.stopped():
            if owner is not None and os.geteuid() == 0:
                await anyio.to_thread.run_sync(give_away, fresh, owner.st_uid)
            former = await anyio.to_thread.run_sync(backup.swap_in, fresh, service.data_dir)
        return Copied(former_data_dir=former)

    def _with_data(self, name: str) -> Service:
        service = self.get(name)
        if not service.spec.argv:
            raise Unsupported(f"cannot copy the data of {name}", detail="it is not run by the daemon")
        if not service.data_dir:
            raise Unsupported(
                f"cannot copy the data of {name}",
                detail="it is in its container's memory",
                hint=f"name a directory: data, in [services.{name}] of the configuration",
            )
        return service


def _scopes(given: Sequence[str | None]) -> tuple[str, ...]:
    """The scopes of one service. Its name alone means what is shared; that must be said only beside others."""
    if all(scope is None for scope in given):
        return ()
    return tuple("shared" if scope is None else scope for scope in given)


def _plain_spec(name: str, setting: ServiceSetting) -> ServiceSpec:
    return ServiceSpec(
        name=name,
        argv=tuple(setting.command),
        port_inside=setting.port,
        address=loopback_address(setting.address) if setting.address else None,
        health_path=setting.health,
        memory_bytes_max=parse_memory(setting.memory, bytes_max=SIZE_BYTES_MAX),
        network=setting.network,
        own_listener=False,
        container=None
        if not setting.image
        else ContainerSpec(
            image=setting.image,
            engine=setting.engine,
            cpus=setting.cpus,
            pids=setting.pids,
            env=setting.env,
            data=setting.data,
            secrets=tuple(setting.secrets),
        ),
    )


async def _serve_plain(service: Service, accepted: socket.socket) -> None:
    """Pass the bytes of one connection on; it ends where there is nobody."""
    upstream = await service.reach(patience_s=PLAIN_PATIENCE_S)
    if upstream is None:
        return
    with upstream:
        await relay(accepted, upstream, Traffic(), idle_s=RELAY_IDLE_S)
