"""New sandboxes: a warm slot that is claimed, or else a container that is made.

Everything is written down before the engine hears of it, and what was made for a caller who went away is removed.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Mapping

import anyio
import anyio.lowlevel
import msgspec

from runtimes.engine import Engine
from runtimes.errors import EngineUnavailable, RuntimeFailure
from runtimes.model import EngineInfo, EngineName, Limits, Network
from runtimes.quantities import parse_duration_ms
from sandboxd import expiry
from sandboxd.attaching import Attachments, egress_of, injected_secrets
from sandboxd.background import Background
from sandboxd.config import Config
from sandboxd.enforcing import check_enforceable, require_proof
from sandboxd.engines import EngineRoom, require_pausable
from sandboxd.failures import CapacityExceeded, Conflict, Failure, InvalidArgument, LimitNotEnforceable, PoolExhausted
from sandboxd.journal import Journal
from sandboxd.lifecycle import Event, State
from sandboxd.limits import Host, resolve
from sandboxd.manager import ID_PREFIX, Caller, Manager
from sandboxd.planner import PoolSettings
from sandboxd.pool import Pools
from sandboxd.protocol import SandboxCreateParams
from sandboxd.recipe import Recipe
from sandboxd.records import EgressRecord, LifetimeRecord, SandboxRecord
from sandboxd.running import seconds
from sandboxd.sandbox import Sandbox
from sandboxd.secret_store import SecretStore
from sandboxd.services.room import ServiceRoom
from sandboxd.templates import Templates, made_with, opened_late, shm_is_late
from sandboxd.timings import Timings, now_ms
from sandboxd.workspace import Identity, identify
from sandboxd.workspaces import Opened, Progress, silent

logger = logging.getLogger(__name__)

_ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
"""Without characters that are taken for each other."""
_ID_CHARS = 10

CLAIMS_MAX = 3
"""Slots that are tried for one caller: one may have died, with nobody having heard of it yet."""

DYING_S_MAX = 0.5
"""How long the kernel takes between the last that can be read of a process and saying that it has ended."""


CLAIMS_AT_ONCE = 3
"""Claims that are carried out at the same time. More finish no sooner, all together; fewer would let one that waits
for its mount hold up the others."""


class Launcher:
    """Makes the sandboxes of a manager, and the slots that some of them are.

    Args:
        manager: Has them, once they are made.
        background: For the pools.
        config: What sandboxes get that nobody chose.
        host: What there is to be had.
        caller: Who works in them.
        bin_dir: Holds our programs.
        journal: Where they are written down.
        engines: Those that make them.
        services: What they may share.
        attachments: Put on their loopbacks what was asked for.
        secrets: What they may know.
        idmap_works: Mounts can show other owners of files here.
        memory_available: Of the host, in bytes.
    """

    def __init__(
        self,
        manager: Manager,
        background: Background,
        *,
        config: Config,
        host: Host,
        caller: Caller,
        bin_dir: str,
        journal: Journal,
        engines: EngineRoom,
        services: ServiceRoom,
        attachments: Attachments,
        secrets: SecretStore,
        idmap_works: bool,
        memory_available: Callable[[], int],
    ) -> None:
        self._manager = manager
        self._workspaces = manager.workspaces
        self._enforcer = manager.enforcer
        self._containers = manager.containers
        self._background = background
        self._host = host
        self._user = caller.user
        self._bin_dir = bin_dir
        self._journal = journal
        self._engines = engines
        self._services = services
        self._attachments = attachments
        self._secrets = secrets
        self._idmap_works = idmap_works
        self._sandboxes_max = config.daemon.sandboxes_max
        self._turns = anyio.Semaphore(CLAIMS_AT_ONCE, fast_acquire=True)
        self.templates = Templates(config, host)
        self.pools = Pools(
            background,
            settings_of=self._pool_settings,
            fill=self._fill_slot,
            discard=manager.remove_soon,
            image_id=self._image_id,
            spare_slots=lambda: self.templates.spare_slots(memory_available()),
            fills_max=config.pool.fills_max,
            image_look_s=parse_duration_ms(config.pool.image_look) / 1000,
        )
        manager.on_slot_lost = self.pools.lost

    def limits_of(self, params: SandboxCreateParams) -> Limits:
        """The limits that a sandbox gets of this request.

        Raises:
            InvalidArgument: one of them is nonsense, or more than the host has.
            NotFound: there is no such template.
        """
        defaults = self.templates.defaults(params.template)
        return resolve(params.limits, defaults, self._host, nofile_hard_max=None).limits

    async def create(self, params: SandboxCreateParams, timings: Timings, progress: Progress = silent) -> Sandbox:
        """Make a sandbox, and prove its limits.

        Not cancelled half-way, but for the copying of a project: when the caller goes away meanwhile, the sandbox is
        made and then removed.

        Raises:
            InvalidArgument: something in ``params`` cannot be meant; nothing was made.
            LimitNotEnforceable: this host cannot enforce what was asked; nothing is left.
            JournalUnusable: it could not be written down; nothing was made.
            Failure: anything else; nothing is left.
        """
        self._journal.require_usable()
        defaults = self.templates.defaults(params.template)
        lifetime = self._lifetime(params)
        egress = self._egress(params)
        self._secrets.check([*params.secrets, *(injected_secrets(egress) if egress is not None else ())])
        env = {**self.templates.env(params.template), **params.env}
        self._secrets.refuse_in(env)
        self._check_room(params.name)
        with contextlib.ExitStack() as opened:
            places = await self._workspaces.open(params.workspace, params.mounts, opened)
            engine = await self._engines.choose(params.engine or defaults.engine)
            timings.mark("choose")
            resolved = resolve(params.limits, defaults, self._host, nofile_hard_max=engine.info.nofile_hard_max)
            limits = self._enforcer.packed(resolved.limits, engine.info)
            require_pausable(engine, lifetime.on_timeout)
            policy = params.limits_policy or defaults.limits_policy
            check_enforceable(limits, engine.info, policy)
            # Before anything is made, and before a turn is taken: a command that gives one may take its time.
            values = await self._secrets.values(tuple(dict.fromkeys(params.secrets)))
            identity = identify(
                engine.info,
                None if places.project is None else places.project.owner,
                caller=self._user,
                idmap_works=self._idmap_works,
            )
            sandbox_id = self._new_id()
            wanted = Network.NONE if egress is not None else Network(params.network or defaults.network)
            record = SandboxRecord(
                id=sandbox_id,
                name=params.name,
                state=State.CREATING,
                state_reason="",
                engine=engine.name.value,
                image=params.image or defaults.image,
                container_id=None,
                user=identity.user,
                keep_id=identity.keep_id,
                workspace=self._workspaces.workspace_record(params.workspace, places, identity, engine.info),
                mounts=self._workspaces.mount_records(places, identity),
                network=made_with(engine.info, wanted),
                network_now=None if made_with(engine.info, wanted) is wanted else wanted,
                egress=egress,
                services=self._services.grants(params.services, sandbox_id=sandbox_id),
                secrets=tuple(dict.fromkeys(params.secrets)),
                limits=limits,
                tmp_bytes_max=resolved.tmp_bytes_max,
                limits_policy=policy,
                env=env,
                metadata=params.metadata,
                ephemeral=params.ephemeral,
                created_at_ms=now_ms(),
                warnings=(*_warnings(identity, engine.info), *places.warnings),
                bin_dir=self._bin_dir,
                lifetime=lifetime,
                cpus_packed=limits is not resolved.limits,
                template=params.template,
            )
            claimable = opened_late(record, engine.info, Network(defaults.network))
            sandbox, miss_reason = None, ""
            for _ in range(CLAIMS_MAX):
                slot, miss_reason = await self._slot_for(claimable, engine, params)
                if slot is None:
                    break
                grants = self._services.grants(params.services, sandbox_id=slot.record.id)
                before = self._reserve(slot, msgspec.structs.replace(claimable, services=grants), engine)
                timings.mark("reserve")
                sandbox, miss_reason = await self._claim(slot, before, engine, places, values, timings, progress)
                if sandbox is not None:
                    break
            if sandbox is None:
                if params.launch in {"warm", "wait"}:
                    raise PoolExhausted(
                        f"cannot claim a sandbox of template {params.template!r}",
                        detail=miss_reason,
                        hint="sandboxctl doctor, or take a cold one: --launch cold",
                    )
                record = msgspec.structs.replace(record, miss_reason=miss_reason)
                sandbox = await self._launch_cold(record, engine, places, values, timings, progress)
        await self._unless_cancelled(sandbox)
        return sandbox

    async def _launch_cold(
        self,
        record: SandboxRecord,
        engine: Engine,
        places: Opened,
        secrets: Mapping[str, bytes],
        timings: Timings,
        progress: Progress,
    ) -> Sandbox:
        # Again, for others may have come in between; from here to the registration nothing waits.
        self._check_room(record.name)
        self._journal.put(record)
        sandbox = self._manager.register(record)
        timings.mark("journal")
        # Nobody has it yet, and nobody gets it before it is made.
        sandbox.lock.acquire_nowait()
        try:
            await self._fill_layers(sandbox, places, progress)
            timings.mark("layers")
            with anyio.CancelScope(shield=True):
                await self._make(sandbox, engine, places, secrets, timings, Event.CREATED)
        finally:
            sandbox.lock.release()
        return sandbox

    async def _slot_for(
        self, record: SandboxRecord, engine: Engine, params: SandboxCreateParams
    ) -> tuple[Sandbox | None, str]:
        """A slot to be claimed, or the reason why a container has to be made.

        Raises:
            PoolExhausted: the caller wants a slot and nothing else.
        """
        if params.launch == "cold":
            return None, ""
        recipe = self._recipe(record, engine)
        unfit = self._unfit(record, recipe, engine)
        if unfit:
            own = self._own_recipe(params.template)
            if own is not None:
                self.pools.miss(own, ", ".join(unfit))
            if params.launch != "auto":
                raise PoolExhausted(
                    f"cannot claim a sandbox of template {params.template!r}",
                    detail=f"fixed when a container is made, and unlike the template: {', '.join(unfit)}",
                    hint="leave that out, make a template of it, or take a cold one: --launch cold",
                )
            return None, ", ".join(unfit)
        if params.launch == "wait":
            return await self.pools.wait(recipe, deadline_s=seconds(params.wait, option="--wait")), ""
        taken = self.pools.take(recipe)
        if taken is None and params.launch == "warm":
            raise PoolExhausted(
                f"cannot claim a sandbox of template {params.template!r}",
                detail="no slot is warm",
                hint="sandboxctl pool list, or wait for one: --launch wait",
            )
        return taken, "" if taken else "empty"

    def _recipe(self, record: SandboxRecord, engine: Engine) -> Recipe:
        return self.templates.recipe_of(record, engine.info, late=self._containers.changes_late(engine.info))

    def _unfit(self, record: SandboxRecord, recipe: Recipe, engine: Engine) -> tuple[str, ...]:
        """Why no slot will do, in the words of the command line."""
        workspace = record.workspace
        layered = workspace is not None and bool(workspace.layer)
        by_engine = workspace is not None and workspace.layer == "overlay" and workspace.backend != "overlay"
        return (
            *self.templates.unfit(recipe, engine.info),
            *(("mounts",) if record.mounts else ()),
            *(("workspace",) if by_engine or (layered and recipe.prebound is not None) else ()),
        )

    def _reserve(self, slot: Sandbox, record: SandboxRecord, engine: Engine) -> SandboxRecord:
        """Write a slot down as the caller's; returns what it was. Waits for nobody, so that no name is given twice.

        Raises:
            Conflict: the name was taken meanwhile; the slot stays one.
            Failure: the journal cannot be written; likewise.
        """
        before = slot.record
        try:
            self._check_room(record.name)
            slot.claim(msgspec.structs.replace(record, changed_late=self._containers.changes_late(engine.info)))
        except Failure:
            self.pools.give_back(self._recipe(before, engine), slot)
            raise
        return before

    async def _claim(
        self,
        slot: Sandbox,
        before: SandboxRecord,
        engine: Engine,
        places: Opened,
        secrets: Mapping[str, bytes],
        timings: Timings,
        progress: Progress,
    ) -> tuple[Sandbox | None, str]:
        """Make a slot the caller's: no engine call, unless its limits cannot be written but by the engine.

        Returns:
            The sandbox; or None, and why a container has to be made after all.

        Raises:
            LimitNotEnforceable: this host cannot enforce what was asked; nothing is left.
            Failure: its layers cannot be made; likewise.
        """
        try:
            async with slot.lock:
                await self._workspaces.fill(slot, places, progress)
                async with self._turns:
                    with anyio.CancelScope(shield=True), self.pools.claiming():
                        await self._change_to_claimed(slot, before, engine, places, secrets, timings)
        except (RuntimeFailure, LimitNotEnforceable) as error:
            # What has died cannot be proven, either; else it is the caller's limits that cannot.
            passed_over = isinstance(error, RuntimeFailure) or await _has_died(slot)
            self._manager.remove_soon(slot)
            if not passed_over:
                raise
            logger.warning("cannot claim slot %s: %s", slot.record.id, error)
            self.pools.spoiled(self._recipe(before, engine))
            return None, f"claim failed: {error.brief}"
        except BaseException:
            self._manager.remove_soon(slot)
            raise
        return slot, ""

    async def _change_to_claimed(
        self,
        slot: Sandbox,
        before: SandboxRecord,
        engine: Engine,
        places: Opened,
        secrets: Mapping[str, bytes],
        timings: Timings,
    ) -> None:
        with contextlib.ExitStack() as opened:
            sources = self._workspaces.sources(slot, places, opened) if slot.record.changed_late else None
            # While the helper mounts, the limits are written and read back.
            async with self._containers.changing(slot, before, sources) as told:
                timings.mark("workspace")
                await self._enforcer.write_changes(slot, engine, before.limits)
                timings.mark("limits")
                ahead = slot.read_ahead()
                timings.mark("verify")
            timings.mark("workspace")
        self._enforcer.prove(slot, ahead=ahead, tmpfs_bytes=told.tmpfs_bytes)
        require_proof(slot)
        timings.mark("verify")
        await self._attach(slot, secrets)
        timings.mark("network")
        slot.change(Event.CLAIMED, took_us=timings.elapsed_us)
        timings.mark("ready")

    async def _fill_slot(self, recipe: Recipe) -> Sandbox:
        """Make a slot: a container of the recipe, checked, and nobody's.

        Raises:
            Failure, RuntimeFailure: it cannot be made; nothing is left.
        """
        engine = self._engines.get(EngineName(recipe.engine))
        resolved = self.templates.limits(recipe.template, engine.info)
        policy = self.templates.defaults(recipe.template).limits_policy
        check_enforceable(resolved.limits, engine.info, policy)
        record = SandboxRecord(
            id=self._new_id(),
            name=None,
            state=State.CREATING,
            state_reason="",
            engine=recipe.engine,
            image=recipe.image,
            container_id=None,
            user=recipe.user,
            keep_id=recipe.keep_id,
            workspace=recipe.prebound,
            network=recipe.network,
            limits=resolved.limits,
            tmp_bytes_max=resolved.tmp_bytes_max,
            limits_policy=policy,
            env={},
            metadata={},
            ephemeral=False,
            created_at_ms=now_ms(),
            bin_dir=self._bin_dir,
            template=recipe.template,
            slot=True,
        )
        with contextlib.ExitStack() as opened:
            places = await self._workspaces.reopen(record, opened)
            project = places.project
            bound = recipe.prebound
            if bound and project and (project.device, project.inode) != (bound.device, bound.inode):
                raise InvalidArgument(f"cannot make a slot for {bound.path}", detail="it is another directory now")
            self._journal.put(record)
            slot = self._manager.register(record)
            with anyio.CancelScope(shield=True):
                async with slot.lock:
                    await self._make(slot, engine, places, {}, Timings(), Event.FILLED)
                facts = await self._manager.facts(slot)
        if facts is not None:
            slot.put(image_id=facts.image_id)
        return slot

    def reconfigure(self, config: Config) -> None:
        """Go by these settings from now on: sandboxes that are made, and slots that are kept."""
        self._sandboxes_max = config.daemon.sandboxes_max
        self.templates.reconfigure(config)
        for name in self.templates.names:
            with contextlib.suppress(Failure):
                self.pools.resized(name, ends_drain=False)
        self._keep_wanted()
        self.pools.outdate(self._successor_of)

    def _successor_of(self, recipe: Recipe) -> Recipe | None:
        """What is claimed where a recipe was, by the settings that are in force now; it itself if it still fits."""
        try:
            engine = self._engines.get(EngineName(recipe.engine))
            if not self.templates.unfit(recipe, engine.info):
                return recipe
            return self._own_recipe(recipe.template)
        except (Failure, RuntimeFailure):
            # An engine that is silent now, or a template that no claim could use: neither is mended by a new slot.
            return recipe

    def keep_pools(self) -> None:
        """Have the pools that the configuration wants, with the slots of a former daemon."""
        for slot in self._manager.all():
            if slot.record.state is State.WARM:
                recipe = self._recipe_if_fit(slot)
                if recipe is not None:
                    self._containers.prepare_claim(slot, self._manager.engine_of(slot).info)
                    self.pools.adopt(recipe, slot, age_s=(now_ms() - slot.record.created_at_ms) / 1000)
                else:
                    self._manager.remove_soon(slot)
        self._keep_wanted()

    def _keep_wanted(self) -> None:
        for name in self.templates.names:
            try:
                own = self._own_recipe(name)
            except Failure as error:
                # Said again to everybody who asks for it; it must not keep the others from starting.
                logger.warning("cannot keep slots of template %s: %s", name, error)
                continue
            if own is not None:
                self.pools.keep(own)

    def _own_recipe(self, template: str) -> Recipe | None:
        """The recipe of a template's own slots: without a project, on the engine that it takes."""
        defaults = self.templates.defaults(template)
        try:
            engine = self._engines.chosen(defaults.engine)
        except EngineUnavailable:
            return None
        resolved = self.templates.limits(template, engine.info)
        identity = identify(engine.info, None, caller=self._user, idmap_works=self._idmap_works)
        late = self._containers.changes_late(engine.info)
        return Recipe(
            template=template,
            engine=engine.name.value,
            image=defaults.image,
            user=identity.user,
            keep_id=identity.keep_id,
            network=made_with(engine.info, Network(defaults.network)),
            nofile_max=resolved.limits.nofile_max,
            tmp_bytes_max=None if late else resolved.tmp_bytes_max,
            shm_bytes_max=None if shm_is_late(engine.info, late=late) else resolved.limits.shm_bytes_max,
        )

    def _pool_settings(self, recipe: Recipe) -> PoolSettings:
        is_variant = recipe != self._own_recipe(recipe.template)
        return self.templates.pool_settings(recipe.template, is_variant=is_variant)

    async def _image_id(self, recipe: Recipe) -> str | None:
        return await self._engines.get(EngineName(recipe.engine)).image_id(recipe.image)

    async def _make(
        self,
        sandbox: Sandbox,
        engine: Engine,
        places: Opened,
        secrets: Mapping[str, bytes],
        timings: Timings,
        made: Event,
    ) -> None:
        try:
            container_id = await self._containers.run(sandbox, engine, places, timings)
            sandbox.change(made, container_id=container_id, took_us=timings.elapsed_us)
            if made is Event.FILLED:
                self._containers.prepare_claim(sandbox, engine.info)
            self._enforcer.prove(sandbox)
            require_proof(sandbox)
            timings.mark("verify")
            await self._attach(sandbox, secrets)
            timings.mark("network")
        except BaseException as error:
            await self._discard(sandbox)
            if isinstance(error, EngineUnavailable):
                # What was known of it is no longer true: the next create shall choose by what is.
                self._background.start(self._engines.refresh)
            raise

    async def _discard(self, sandbox: Sandbox) -> None:
        """Undo a failed create. What cannot be undone now stays written down, and is undone at the next sweep."""
        try:
            await self._manager.remove_from_engine(sandbox)
        except RuntimeFailure as error:
            logger.warning("cannot remove the failed sandbox %s yet: %s", sandbox.record.id, error)
            sandbox.put(state=State.REMOVING, state_reason=f"its creation failed, and {error.brief}")
            sandbox.disconnect()
        else:
            self._manager.forget(sandbox)

    async def _attach(self, sandbox: Sandbox, secrets: Mapping[str, bytes]) -> None:
        """Give it its secrets, its network, and its loopback what was asked; what cannot be there is a warning.

        Raises:
            RuntimeFailure, Failure: it has not the network that it should have.
        """
        await self._secrets.deliver(sandbox, secrets)
        problems = await self._attachments.attach(sandbox, require_network=True)
        if problems:
            sandbox.put(warnings=(*sandbox.record.warnings, *problems))

    async def _fill_layers(self, sandbox: Sandbox, places: Opened, progress: Progress) -> None:
        """Make its layers. That may take long, and so ends when the caller goes away."""
        try:
            await self._workspaces.fill(sandbox, places, progress)
        except BaseException:
            self._manager.forget(sandbox)
            raise

    async def _unless_cancelled(self, sandbox: Sandbox) -> None:
        """Remove what was made for a caller who went away meanwhile: nobody will ever know its id."""
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self._manager.remove(sandbox, Timings())
            raise

    def _egress(self, params: SandboxCreateParams) -> EgressRecord | None:
        """The rules of a new sandbox: its request's on top of its template's, unless it wants a mode without rules.

        Raises:
            InvalidArgument: rules that are none, or that no mode obeys.
        """
        allow, deny, inject = self.templates.rules(params.template)
        if params.network in ("none", "full"):
            return egress_of(params.network, params.allow, params.deny, params.inject)
        return egress_of(params.network, [*allow, *params.allow], [*deny, *params.deny], [*inject, *params.inject])

    def _lifetime(self, params: SandboxCreateParams) -> LifetimeRecord:
        """How long a new sandbox may last: as the request says, or else the configuration.

        Raises:
            InvalidArgument: it is no duration.
        """
        defaults = self.templates.defaults(params.template)
        return expiry.begun(
            expiry.duration_ms(defaults.lifetime if params.lifetime is None else params.lifetime, "--lifetime"),
            expiry.duration_ms(
                defaults.idle_timeout if params.idle_timeout is None else params.idle_timeout, "--idle-timeout"
            ),
            params.on_timeout or defaults.on_timeout,
            now_ms(),
        )

    def _check_room(self, name: str | None) -> None:
        present = self._manager.present()
        if name is not None and any(sandbox.record.name == name for sandbox in present):
            raise Conflict(
                f"cannot name a sandbox {name!r}",
                detail="another one has that name",
                hint=f"use it (sandboxctl exec {name} ...), or choose another name",
            )
        if name is not None and name.startswith(ID_PREFIX):
            raise InvalidArgument(f"cannot name a sandbox {name!r}", detail=f"ids begin with {ID_PREFIX}")
        if len(present) >= self._sandboxes_max:
            raise CapacityExceeded(
                f"cannot make more than {self._sandboxes_max} sandboxes",
                hint="remove some (sandboxctl rm), or raise daemon.sandboxes_max",
            )

    def _new_id(self) -> str:
        while True:
            sandbox_id = ID_PREFIX + "".join(random.choices(_ID_ALPHABET, k=_ID_CHARS))  # noqa: S311  (an identifier, no secret)
            if self._manager.find(sandbox_id) is None:
                return sandbox_id

    def _recipe_if_fit(self, slot: Sandbox) -> Recipe | None:
        """What a slot of a former daemon is one of; None where no claim could use it now."""
        try:
            engine = self._manager.engine_of(slot)
            recipe = self._recipe(slot.record, engine)
            fits = slot.connected and not self.templates.unfit(recipe, engine.info)
        except (Failure, RuntimeFailure) as error:
            logger.info("cannot use slot %s any more: %s", slot.record.id, error)
            return None
        return recipe if fits else None


def _warnings(identity: Identity, info: EngineInfo) -> tuple[str, ...]:
    selinux = "SELinux does not separate this sandbox from the host" if info.selinux_enforcing else ""
    return tuple(warning for warning in (identity.warning, selinux) if warning)


async def _has_died(slot: Sandbox) -> bool:
    with anyio.move_on_after(DYING_S_MAX, shield=True):
        await slot.ended()
        return True
    return False
