"""``service/*``."""

from __future__ import annotations

from sandboxd import protocol
from sandboxd.connection import Context
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.services.room import ServiceRoom
from sandboxd.services.supervisor import Service


class ServiceHandlers:
    """The services that sandboxes may share."""

    def __init__(self, manager: Manager, services: ServiceRoom) -> None:
        self._manager = manager
        self._services = services

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "service/list": self.list,
            "service/logs": self.logs,
            "service/restart": self.restart,
            "service/backup": self.backup,
            "service/restore": self.restore,
        }

    async def list(self, _: protocol.NoParams, __: Context) -> protocol.ServiceList:
        """The rows."""
        return protocol.ServiceList(services=[self._info(service) for service in self._services.all()])

    async def logs(self, params: protocol.ServiceLogsParams, _: Context) -> protocol.ServiceLogs:
        """What it printed."""
        return protocol.ServiceLogs(text=await self._services.get(params.service).log_tail(params.length))

    async def restart(self, params: protocol.ServiceParams, _: Context) -> protocol.ServiceInfo:
        """End it and start it."""
        service = self._services.get(params.service)
        await service.restart()
        return self._info(service)

    async def backup(self, params: protocol.ServiceFileParams, _: Context) -> protocol.ServiceBackup:
        """Copy its data."""
        copied = await self._services.backup(params.service, params.path)
        return protocol.ServiceBackup(
            name=params.service, path=params.path, size_bytes=copied.size_bytes, former_data_dir=None
        )

    async def restore(self, params: protocol.ServiceFileParams, _: Context) -> protocol.ServiceBackup:
        """Put a copy back."""
        copied = await self._services.restore(params.service, params.path)
        return protocol.ServiceBackup(
            name=params.service, path=params.path, size_bytes=None, former_data_dir=copied.former_data_dir
        )

    def _info(self, service: Service) -> protocol.ServiceInfo:
        address = service.address
        return protocol.ServiceInfo(
            name=service.spec.name,
            state=service.state.value,
            reason=service.reason,
            hint=service.hint,
            pid=service.pid,
            address=address if address is None or isinstance(address, str) else f"{address[0]}:{address[1]}",
            network=service.network,
            sandbox=service.sandbox_id,
            port=service.spec.port_inside,
            restarts=service.restarts,
            since_ms=service.since_ms,
            data_dir=(service.data_dir or None) if service.spec.argv else None,
            sandboxes=[
                sandbox.record.id
                for sandbox in self._manager.present()
                if any(grant.service == service.spec.name for grant in sandbox.record.services)
            ],
        )
