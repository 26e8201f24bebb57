"""``network/*``."""

from __future__ import annotations

from runtimes.netns import Interface
from sandboxd import protocol, running
from sandboxd.attaching import Attachments, is_as_wanted, listening_inside, mode_of
from sandboxd.connection import Context
from sandboxd.failures import NotFound
from sandboxd.handlers.table import Handler
from sandboxd.injections import parse_injections, secrets_in
from sandboxd.manager import Manager
from sandboxd.network.egress import PROXY_URL
from sandboxd.records import ForwardRecord, GrantRecord
from sandboxd.sandbox import Sandbox
from sandboxd.secret_store import SecretStore
from sandboxd.services.room import ServiceRoom


class NetworkHandlers:
    """What sandboxes may reach."""

    def __init__(
        self, manager: Manager, services: ServiceRoom, attachments: Attachments, secrets: SecretStore
    ) -> None:
        self._manager = manager
        self._secrets = secrets
        self._services = services
        self._attachments = attachments

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "network/get": self.get,
            "network/set": self.set,
            "ports/forward": self.forward,
            "ports/list": self.ports,
            "ports/close": self.close,
        }

    async def get(self, params: protocol.SandboxParams, _: Context) -> protocol.NetworkInfo:
        """What it may reach."""
        return await self._info(self._manager.get(params.sandbox))

    async def set(self, params: protocol.NetworkSetParams, _: Context) -> protocol.NetworkInfo:
        """Change that."""
        sandbox = self._manager.get(params.sandbox)
        self._secrets.check(secrets_in(parse_injections([*(params.inject or ()), *params.add_inject])))
        await self._attachments.change(sandbox, params)
        return await self._info(sandbox)

    async def forward(self, params: protocol.PortForwardParams, _: Context) -> protocol.PortForward:
        """Lead a place on the host inside."""
        sandbox = self._manager.get(params.sandbox)
        async with sandbox.lock:
            running.require_running(sandbox)
            made = self._attachments.forward(
                sandbox, port=params.port, address=params.address, host_port=params.host_port, path=params.path
            )
        return _forward(made, 0, "")

    async def ports(self, params: protocol.SandboxParams, _: Context) -> protocol.PortList:
        """What is forwarded, and what listens."""
        sandbox = self._manager.get(params.sandbox)
        listening = await listening_inside(sandbox)
        return protocol.PortList(
            forwards=[_forward(*row) for row in self._attachments.forwards(sandbox)],
            listening=None
            if listening is None
            else [
                protocol.ListeningPort(address=each.address, port=each.port, protocol=each.protocol)
                for each in listening.sockets
            ],
            truncated=listening is not None and listening.truncated,
        )

    async def close(self, params: protocol.PortCloseParams, _: Context) -> protocol.Acknowledged:
        """Close a forward."""
        sandbox = self._manager.get(params.sandbox)
        async with sandbox.lock:
            self._attachments.close_forward(sandbox, params.forward_id)
        return protocol.Acknowledged()

    async def _info(self, sandbox: Sandbox) -> protocol.NetworkInfo:
        view = await self._attachments.evidence(sandbox)
        egress = sandbox.record.egress
        ledger = self._attachments.ledger(sandbox)
        problems = self._attachments.port_problems(sandbox)
        return protocol.NetworkInfo(
            id=sandbox.record.id,
            mode=mode_of(sandbox),
            allow=[] if egress is None else list(egress.allow),
            deny=[] if egress is None else list(egress.deny),
            inject=[] if egress is None else list(egress.inject),
            proxy=None if egress is None else PROXY_URL,
            services=[self._granted(grant, problems) for grant in sandbox.record.services],
            requests=ledger.requests,
            connections=self._attachments.connections(sandbox),
            sent_bytes=ledger.traffic.sent_bytes,
            received_bytes=ledger.traffic.received_bytes,
            denied=ledger.denied,
            denials=[
                protocol.Denied(
                    at_ms=denial.at_ms,
                    method=denial.method,
                    host=denial.host,
                    port=denial.port,
                    reason=denial.reason,
                    command=denial.command,
                )
                for denial in ledger.denials
            ],
            problems=self._attachments.problems(sandbox),
            interfaces=None if view is None else [_interface(each) for each in view.interfaces],
            verified=view is not None and is_as_wanted(sandbox, view),
        )

    def _granted(self, grant: GrantRecord, problems: dict[int, str]) -> protocol.ServiceGranted:
        try:
            service = self._services.get(grant.service)
        except NotFound as error:
            return protocol.ServiceGranted(
                name=grant.service, scopes=list(grant.scopes), port=0, state="absent", reason=str(error)
            )
        port = service.spec.port_inside
        return protocol.ServiceGranted(
            name=grant.service,
            scopes=list(grant.scopes),
            port=port,
            state="absent" if port in problems else service.state.value,
            reason=problems.get(port, service.reason),
        )


def _interface(seen: Interface) -> protocol.NetworkInterface:
    return protocol.NetworkInterface(name=seen.name, received_bytes=seen.received_bytes, sent_bytes=seen.sent_bytes)


def _forward(record: ForwardRecord, connections: int, problem: str) -> protocol.PortForward:
    return protocol.PortForward(
        forward_id=record.id,
        port=record.port,
        address=record.address or None,
        host_port=record.host_port or None,
        path=record.path or None,
        connections=connections,
        problem=problem,
    )
