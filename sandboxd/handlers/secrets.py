"""``secret/*``."""

from __future__ import annotations

from sandboxd import protocol, running
from sandboxd.attaching import injected_secrets
from sandboxd.connection import Context
from sandboxd.failures import InvalidArgument
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.sandbox import Sandbox
from sandboxd.secret_store import SecretStore


def _secrets_of(sandbox: Sandbox) -> set[str]:
    """The names of those that it was given, and of those that are added to its requests."""
    egress = sandbox.record.egress
    return {*sandbox.record.secrets, *(() if egress is None else injected_secrets(egress))}


class SecretHandlers:
    """Secrets: values go in, names come out."""

    def __init__(self, manager: Manager, secrets: SecretStore) -> None:
        self._manager = manager
        self._secrets = secrets

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "secret/set": self.set,
            "secret/list": self.list,
            "secret/remove": self.remove,
            "secret/give": self.give,
        }

    async def set(self, params: protocol.SecretSetParams, _: Context) -> protocol.Acknowledged:
        """Keep one."""
        given = [source for source in (params.value, params.command, params.credential) if source is not None]
        if len(given) != 1:
            raise InvalidArgument(
                f"cannot keep the secret {params.name!r}", detail="give one of value, command and credential"
            )
        if params.value is not None:
            await self._secrets.put(params.name, params.value)
        else:
            await self._secrets.put_source(
                params.name, command=params.command or (), credential=params.credential or ""
            )
        return protocol.Acknowledged()

    async def list(self, _: protocol.NoParams, __: Context) -> protocol.SecretList:
        """The names."""
        return protocol.SecretList(
            secrets=[
                protocol.SecretInfo(
                    name=known.name,
                    size_bytes=known.size_bytes,
                    changed_at_ms=known.changed_at_ms,
                    source=known.source,
                    origin=known.origin,
                    sandboxes=[
                        sandbox.record.id for sandbox in self._manager.present() if known.name in _secrets_of(sandbox)
                    ],
                )
                for known in self._secrets.known()
            ]
        )

    async def remove(self, params: protocol.SecretParams, _: Context) -> protocol.Acknowledged:
        """Forget one."""
        self._secrets.remove(params.name)
        return protocol.Acknowledged()

    async def give(self, params: protocol.SecretGiveParams, _: Context) -> protocol.Acknowledged:
        """Give some to a sandbox that runs."""
        sandbox = self._manager.get(params.sandbox)
        running.require_running(sandbox)
        names = tuple(dict.fromkeys((*sandbox.record.secrets, *params.secrets)))
        values = await self._secrets.values(names)
        async with sandbox.lock:
            running.require_running(sandbox)
            sandbox.put(secrets=tuple(dict.fromkeys((*sandbox.record.secrets, *names))))
            await self._secrets.deliver(sandbox, values)
        return protocol.Acknowledged()
