"""``pool/*`` and ``template/*``."""

from __future__ import annotations

from sandboxd import protocol
from sandboxd.connection import Context
from sandboxd.failures import InvalidArgument
from sandboxd.handlers.table import Handler
from sandboxd.launching import Launcher
from sandboxd.pool import Slots
from sandboxd.running import seconds

DRAIN_DEADLINE_S = 30.0
"""How long slots that are being made are waited for; each goes when it is made, also after that."""


class PoolHandlers:
    """Warm slots, and the recipes that they are made by."""

    def __init__(self, launcher: Launcher) -> None:
        self._pools = launcher.pools
        self._templates = launcher.templates

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "pool/list": self.list,
            "pool/resize": self.resize,
            "pool/drain": self.drain,
            "pool/warm": self.warm,
            "template/list": self.list_templates,
            "template/get": self.get_template,
        }

    async def list(self, _: protocol.NoParams, __: Context) -> protocol.PoolList:
        """The rows."""
        return protocol.PoolList(pools=[_info(bucket) for bucket in self._pools.buckets()])

    async def resize(self, params: protocol.PoolResizeParams, _: Context) -> protocol.PoolList:
        """Change bounds."""
        if params.min is None and params.max is None:
            raise InvalidArgument("cannot resize to nothing", hint="give --min or --max")
        most = self._templates.bounds(params.template)[1] if params.max is None else params.max
        if params.min is not None and params.min > most:
            hint = "give --max, too" if params.max is None else "give a --max that is not below --min"
            raise InvalidArgument(f"cannot keep {params.min} slots where {most} are allowed", hint=hint)
        self._templates.bound(params.template, params.min, params.max)
        self._pools.resized(params.template)
        return protocol.PoolList(
            pools=[_info(bucket) for bucket in self._pools.buckets() if bucket.recipe.template == params.template]
        )

    async def drain(self, params: protocol.TemplateParams, _: Context) -> protocol.PoolDrained:
        """Let slots go, those that are being made as well."""
        self._templates.bounds(params.template)
        drained = self._pools.drain(params.template)
        await self._pools.filled(params.template, deadline_s=DRAIN_DEADLINE_S)
        return protocol.PoolDrained(drained=drained)

    async def warm(self, params: protocol.PoolWarmParams, _: Context) -> protocol.PoolWarmed:
        """Make slots."""
        self._templates.bounds(params.template)
        deadline_s = seconds(params.timeout, option="--timeout")
        return protocol.PoolWarmed(warm=await self._pools.warm(params.template, params.count, deadline_s=deadline_s))

    async def list_templates(self, _: protocol.NoParams, __: Context) -> protocol.TemplateList:
        """All of them."""
        return protocol.TemplateList(templates=[self._templates.info(name) for name in self._templates.names])

    async def get_template(self, params: protocol.TemplateParams, _: Context) -> protocol.TemplateInfo:
        """One."""
        return self._templates.info(params.template)


def _info(bucket: Slots) -> protocol.PoolInfo:
    recipe = bucket.recipe
    return protocol.PoolInfo(
        template=recipe.template,
        engine=recipe.engine,
        image=recipe.image,
        user=f"{recipe.user.uid}:{recipe.user.gid}",
        workspace=None if recipe.prebound is None else recipe.prebound.path,
        min=bucket.settings.slots_min,
        max=bucket.settings.slots_max,
        target=bucket.target,
        warm=len(bucket.warm),
        filling=bucket.filling,
        waiting=len(bucket.waiters),
        drained=bucket.drained,
        made=bucket.made,
        hits=bucket.hits,
        misses=dict(bucket.misses),
        lost=bucket.lost,
        ready_ms=None if bucket.refill_s is None else round(bucket.refill_s * 1000, 1),
        failure=bucket.failure,
    )
