"""Named recipes for sandboxes: what a template gives, and what can be claimed from its pool. Pure."""

from __future__ import annotations

import msgspec

from runtimes.model import EngineInfo, Network
from runtimes.quantities import parse_duration_ms, parse_memory
from sandboxd.config import DEFAULT_TEMPLATE, SIZE_BYTES_MAX, Config, Defaults, Template, template_defaults
from sandboxd.limits import Host, ResolvedLimits, resolve
from sandboxd.planner import PoolSettings
from sandboxd.protocol import LimitsParams, TemplateInfo
from sandboxd.recipe import Recipe, differences
from sandboxd.records import SandboxRecord

SLOT_BYTES = 16 * 1024 * 1024
"""What an idle slot costs the host at most: init, the engine's monitor, the kernel's share."""


class Templates:
    """The templates of one daemon."""

    def __init__(self, config: Config, host: Host) -> None:
        self._host = host
        self._bounds: dict[str, tuple[int | None, int | None]] = {}
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """Go by these settings from now on. What a pool was told to hold by a caller stays."""
        self._config = config
        self._limits: dict[tuple[str, int | None], ResolvedLimits] = {}
        self._given: dict[str, tuple[Template, Defaults]] = {}
        self._idle_s = parse_duration_ms(config.pool.idle) / 1000
        self._age_s_max = parse_duration_ms(config.pool.age_max) / 1000
        self._reserve_bytes = parse_memory(config.pool.memory_reserve, bytes_max=SIZE_BYTES_MAX)

    @property
    def names(self) -> list[str]:
        """All of them; ``default`` is always there."""
        return sorted({DEFAULT_TEMPLATE, *self._config.templates})

    def defaults(self, name: str) -> Defaults:
        """What a sandbox of this template gets when its request does not say.

        Raises:
            NotFound: there is no such template.
        """
        return self._of(name)[1]

    def env(self, name: str) -> dict[str, str]:
        """The variables of its sandboxes.

        Raises:
            NotFound: there is no such template.
        """
        return self._of(name)[0].env

    def rules(self, name: str) -> tuple[list[str], list[str], list[str]]:
        """What its sandboxes are allowed, are denied, and have added to their requests.

        Raises:
            NotFound: there is no such template.
        """
        template = self._of(name)[0]
        return template.allow, template.deny, template.inject

    def _of(self, name: str) -> tuple[Template, Defaults]:
        """Put together once: every claim asks some times."""
        if name not in self._given:
            self._given[name] = template_defaults(self._config, name)
        return self._given[name]

    def limits(self, name: str, engine: EngineInfo) -> ResolvedLimits:
        """The limits of a sandbox whose request says nothing of limits.

        Raises:
            NotFound: there is no such template.
            InvalidArgument: a setting does not fit this host.
        """
        key = (name, engine.nofile_hard_max)
        if key not in self._limits:
            self._limits[key] = resolve(
                LimitsParams(), self.defaults(name), self._host, nofile_hard_max=engine.nofile_hard_max
            )
        return self._limits[key]

    def recipe_of(self, record: SandboxRecord, engine: EngineInfo, *, late: bool) -> Recipe:
        """What must fit of a slot that is to become this sandbox, or that this record is of.

        Args:
            record: Of the sandbox.
            engine: Whose container it is.
            late: Mounts and sizes of tmpfs can be changed in a container that runs.
        """
        return Recipe(
            template=record.template,
            engine=record.engine,
            image=record.image,
            user=record.user,
            keep_id=record.keep_id,
            network=record.network,
            nofile_max=record.limits.nofile_max,
            tmp_bytes_max=None if late else record.tmp_bytes_max,
            shm_bytes_max=None if shm_is_late(engine, late=late) else record.limits.shm_bytes_max,
            prebound=None if late else record.workspace,
        )

    def unfit(self, wanted: Recipe, engine: EngineInfo) -> tuple[str, ...]:
        """What of a request is unlike its template, and fixed at creation: no slot will do.

        Another engine, another user inside and a project that is mounted in advance make a variant of the template,
        which has slots of its own.
        """
        resolved = self.limits(wanted.template, engine)
        defaults = self.defaults(wanted.template)
        late = wanted.tmp_bytes_max is None
        template = msgspec.structs.replace(
            wanted,
            image=defaults.image,
            network=made_with(engine, Network(defaults.network)),
            nofile_max=resolved.limits.nofile_max,
            tmp_bytes_max=None if late else resolved.tmp_bytes_max,
            shm_bytes_max=None if shm_is_late(engine, late=late) else resolved.limits.shm_bytes_max,
        )
        return differences(wanted, template)

    # --- pools ----------------------------------------------------------------------------------------

    def bound(self, name: str, slots_min: int | None, slots_max: int | None) -> None:
        """Change what a pool holds, until the daemon ends; None leaves it."""
        low, high = self._bounds.get(name, (None, None))
        self._bounds[name] = (low if slots_min is None else slots_min, high if slots_max is None else slots_max)

    def bounds(self, name: str) -> tuple[int, int]:
        """How many slots the template keeps at least, and at most.

        Raises:
            NotFound: there is no such template.
        """
        template = self._of(name)[0]
        low, high = self._bounds.get(name, (None, None))
        most = _first(high, template.pool_max, self._config.pool.max)
        return min(most, _first(low, template.pool_min, self._config.pool.min)), most

    def pool_settings(self, name: str, *, is_variant: bool) -> PoolSettings:
        """What the pool of a template is told; of a variant nothing is kept that nobody asks for."""
        low, high = self.bounds(name)
        return PoolSettings(
            slots_min=0 if is_variant else low, slots_max=high, idle_s=self._idle_s, age_s_max=self._age_s_max
        )

    def spare_slots(self, memory_available_bytes: int) -> int:
        """How many more slots the host has memory for."""
        return max(0, (memory_available_bytes - self._reserve_bytes) // SLOT_BYTES)

    def info(self, name: str) -> TemplateInfo:
        """The wire's form.

        Raises:
            NotFound: there is no such template.
        """
        template, defaults = self._of(name)
        low, high = self.bounds(name)
        return TemplateInfo(
            name=name,
            description=_description(name, template),
            engine=defaults.engine,
            image=defaults.image,
            memory=defaults.memory,
            cpus=defaults.cpus,
            pids=defaults.pids,
            shm=defaults.shm,
            tmp=defaults.tmp,
            nofile=defaults.nofile,
            network="allow" if template.allow or template.deny or template.inject else defaults.network,
            env=template.env,
            allow=template.allow,
            deny=template.deny,
            inject=template.inject,
            pool_min=low,
            pool_max=high,
        )


def made_with(engine: EngineInfo, wanted: Network) -> Network:
    """What the engine is told to make a container with that is to have this network.

    A rootless Podman can change nothing of the network that it has made, and what it makes can be had without it.
    """
    able = engine.capabilities
    by_us = able is not None and able.rootless and able.network_switch == "user_mode"
    return Network.NONE if by_us else wanted


def opened_late(record: SandboxRecord, engine: EngineInfo, template: Network) -> SandboxRecord:
    """The sandbox as a slot of its template can become it: without a network first, where that can be given later."""
    able = engine.capabilities
    if record.network is template or record.network is Network.NONE or able is None or not able.network_switch:
        return record
    return msgspec.structs.replace(record, network=Network.NONE, network_now=Network.FULL)


def shm_is_late(engine: EngineInfo, *, late: bool) -> bool:
    """Whether the size of /dev/shm can be changed later."""
    return late and engine.capabilities is not None and engine.capabilities.late_shm


def _description(name: str, template: Template) -> str:
    return template.description or ("What a sandbox gets that asks for nothing." if name == DEFAULT_TEMPLATE else "")


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
