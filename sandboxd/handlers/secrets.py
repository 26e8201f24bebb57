"""``secret/*``."""

from __future__ import annotations

from sandboxd import protocol, running
from sandboxd.attaching import injected_secrets
from sandboxd.connection import Context
from sandboxd.failures import Conflict, InvalidArgument, NotFound
from sandboxd.handlers.table import Handler
from sandboxd.lifecycle import State
from sandboxd.manager import Manager
from sandboxd.sandbox import Sandbox
from sandboxd.secret_store import SecretStore

NAMED_MAX = 8
"""Of the sandboxes that have a secret."""


def _secrets_of(sandbox: Sandbox) -> set[str]:
    """The names of those that it was given, and of those that are added to its requests."""
    egress = sandbox.record.egress
    return {*sandbox.record.secrets, *(() if egress is None else injected_secrets(egress))}


def _having(manager: Manager, name: str) -> list[Sandbox]:
    return [sandbox for sandbox in manager.present() if name in _secrets_of(sandbox)]


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
            "secret/take": self.take,
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
                    sandboxes=[sandbox.record.id for sandbox in _having(self._manager, known.name)],
                )
                for known in self._secrets.known()
            ]
        )

    async def remove(self, params: protocol.SecretRemoveParams, _: Context) -> protocol.Acknowledged:
        """Forget one that no sandbox has, or any."""
        self._secrets.check([params.name])
        having = _having(self._manager, params.name)
        if having and not params.force:
            ids = [sandbox.record.id for sandbox in having]
            more = f" and {len(ids) - NAMED_MAX} more" if len(ids) > NAMED_MAX else ""
            given = params.name in having[0].record.secrets
            without = f"secret take {ids[0]} {params.name}" if given else f"network {ids[0]} --reset"
            raise Conflict(
                f"cannot remove the secret {params.name!r}",
                detail=f"{', '.join(ids[:NAMED_MAX])}{more} could not use it any more",
                hint=f"sandboxctl {without}   (or all the same: sandboxctl secret rm --force {params.name})",
            )
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

    async def take(self, params: protocol.SecretTakeParams, _: Context) -> protocol.Acknowledged:
        """Take some from a sandbox, running or stopped."""
        sandbox = self._manager.get(params.sandbox)
        async with sandbox.lock:
            for name in params.secrets:
                if name not in sandbox.record.secrets:
                    raise NotFound(
                        f"cannot take the secret {name!r} from sandbox {sandbox.record.id}",
                        detail="it was not given it",
                        hint=f"sandboxctl inspect {sandbox.record.id}",
                    )
            # Of one that is stopped, nothing of its memory is left.
            if sandbox.record.state is not State.STOPPED:
                running.require_running(sandbox)
                await self._secrets.withdraw(sandbox, params.secrets)
            sandbox.put(secrets=tuple(name for name in sandbox.record.secrets if name not in params.secrets))
        return protocol.Acknowledged()
