"""The use cases: what can be done with sandboxes, in the order in which it must be done.

Every change of the world is written down first (``journal``), carried out under the sandbox's lock and under a
shield, so that a client that goes away leaves nothing half-made, and read back before it is reported.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import random
from collections.abc import Callable, Sequence

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from runtimes.cgroup.verify import LimitProof, enforceable
from runtimes.engine import Engine
from runtimes.errors import (
    CgroupUnreadable,
    ContainerNotFound,
    EngineRefused,
    EngineTimeout,
    EngineUnavailable,
    ImageNotFound,
    RuntimeFailure,
)
from runtimes.init.wire import InitError
from runtimes.inotify import Inotify
from runtimes.model import (
    ContainerFacts,
    ContainerSpec,
    ContainerState,
    EngineInfo,
    EngineName,
    Limits,
    Mount,
    Network,
    Tmpfs,
    User,
)
from runtimes.mounter.mounter import Mounter
from runtimes.quantities import format_bytes, parse_duration_ms
from sandboxd import admission, expiry, reconcile
from sandboxd.attaching import Attachments, changed_egress, egress_of
from sandboxd.background import Background
from sandboxd.config import Config
from sandboxd.engine_records import EngineRecords
from sandboxd.engines import EngineRoom
from sandboxd.failures import (
    CapacityExceeded,
    Conflict,
    Failure,
    InvalidArgument,
    LimitNotEnforceable,
    NotFound,
    PoolExhausted,
    SandboxGone,
    Unsupported,
)
from sandboxd.journal import Journal, LifetimeRecord, SandboxRecord
from sandboxd.lifecycle import Event, State, next_state
from sandboxd.limits import Host, merged, output_bytes_max, resolve, resolve_update
from sandboxd.planner import PoolSettings
from sandboxd.pool import Pools
from sandboxd.protocol import NetworkSetParams, SandboxCreateParams, SandboxUpdateParams
from sandboxd.recipe import Recipe
from sandboxd.running import seconds
from sandboxd.sandbox import INSIDE_BIN, INSIDE_RUN, TMPFS_TARGETS, Sandbox, Tell, container_id_of
from sandboxd.secret_store import SecretStore
from sandboxd.services.room import ServiceRoom
from sandboxd.spool import SpoolDirectory
from sandboxd.staging import Staging
from sandboxd.templates import Templates
from sandboxd.timings import Timings, now_ms
from sandboxd.workspace import TARGET, Identity, MountSource, Rules, identify
from sandboxd.workspaces import Opened, Progress, Workspaces, copy_bounds, silent

logger = logging.getLogger(__name__)

ID_PREFIX = "sb-"
_ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
"""Without characters that are taken for each other."""
_ID_CHARS = 10

RUN_TMPFS_BYTES_MAX = 16 * 1024 * 1024

CLAIMS_MAX = 3
"""Slots that are tried for one caller: one may have died, with nobody having heard of it yet."""

DYING_S_MAX = 0.5
"""How long the kernel takes between the last that can be read of a process and saying that it has ended."""

REMOVE_PAUSE_S_MIN, REMOVE_PAUSE_S_MAX = 0.25, 30.0
"""Between two tries to remove what the engine would not: twice as long each time."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who the daemon works for: its own user."""

    user: User
    home: str


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """Where things are on the host."""

    boxes_dir: str
    """One directory per sandbox."""
    bin_dir: str
    """Holds sandbox-init and sandbox-provoke; mounted read-only into every sandbox."""
    seccomp_profile: str
    spools_dir: str
    """One directory per sandbox: the output of its commands."""
    layers_dir: str
    """One directory per sandbox that does not work on its project itself: what it wrote instead."""
    private_dirs: tuple[str, ...]
    """Of the daemon and of the engines, by their real paths: whoever could write there would be master of all."""


class Manager:
    """All sandboxes of one daemon."""

    def __init__(
        self,
        background: Background,
        *,
        config: Config,
        host: Host,
        caller: Caller,
        places: Places,
        journal: Journal,
        engines: EngineRoom,
        userns_fd: int | None,
        inotify: Inotify,
        services: ServiceRoom,
        attachments: Attachments,
        mounter: Mounter | None,
        memory_available: Callable[[], int],
        secrets: SecretStore,
        tell: Tell | None = None,
    ) -> None:
        self._config = config
        self._services = services
        self._attachments = attachments
        self.templates = Templates(config, host)
        self._secrets = secrets
        self._inotify = inotify
        self._output_bytes_max = output_bytes_max(config.defaults)
        self._host = host
        self._caller = caller
        self._places = places
        self._journal = journal
        self.owner = journal.owner()
        """What labels its containers."""
        self._engines = engines
        self._background = background
        self._idmap_works = userns_fd is not None
        self.workspaces = Workspaces(
            places.layers_dir,
            rules=Rules(
                home=caller.home,
                allow=config.paths.allow,
                deny=config.paths.deny,
                private=places.private_dirs,
            ),
            bounds=copy_bounds(config.workspaces),
            may_mount=caller.user.uid == 0,
            idmap_works=userns_fd is not None,
            remove_foreign=self._remove_foreign,
        )
        """What they see of the host, and what they did to it."""
        self._staging = Staging(may_mount=caller.user.uid == 0, userns_fd=userns_fd, mounter=mounter)
        self._sandboxes: dict[str, Sandbox] = {}
        self._tell = tell
        self.watchers: list[Callable[[Sandbox], None]] = []
        """Called with each sandbox whenever it has changed, or is gone; must be cheap."""
        self.engine_records = EngineRecords(self.engine_of, _passable)
        """What engines are to be told of limits that were written past them."""
        self._removing: set[str] = set()
        """The sandboxes that a task in the background removes."""
        self.pools = Pools(
            background,
            settings_of=self._pool_settings,
            fill=self._fill_slot,
            discard=self.remove_soon,
            image_id=self._image_id,
            spare_slots=lambda: self.templates.spare_slots(memory_available()),
            fills_max=config.pool.fills_max,
            image_look_s=parse_duration_ms(config.pool.image_look) / 1000,
        )

    # --- finding --------------------------------------------------------------------------------------

    def all(self) -> list[Sandbox]:
        """All sandboxes, in the order of their making, those that are being removed included."""
        return list(self._sandboxes.values())

    def present(self) -> list[Sandbox]:
        """All but those that are as good as gone, and slots, which are nobody's."""
        return [sandbox for sandbox in self._sandboxes.values() if not sandbox.leaving and not sandbox.record.slot]

    def find(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox with exactly this id."""
        return self._sandboxes.get(sandbox_id)

    def get(self, reference: str, *, leaving: bool = False) -> Sandbox:
        """Find a sandbox by its id, an unambiguous prefix of one, or its name.

        Args:
            reference: What the caller typed.
            leaving: By its id, one that is as good as gone is found, too.

        Raises:
            NotFound: there is none.
            InvalidArgument: the prefix fits several.
        """
        exact = self._sandboxes.get(reference)
        if exact is not None and not exact.record.slot and (leaving or not exact.leaving):
            return exact
        present = self.present()
        named = [sandbox for sandbox in present if sandbox.record.name == reference]
        if named:
            return named[0]
        bare = reference.removeprefix(ID_PREFIX)
        fitting = [
            sandbox for sandbox in present if bare and sandbox.record.id.removeprefix(ID_PREFIX).startswith(bare)
        ]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise InvalidArgument(
                f"cannot tell which sandbox {reference!r} is",
                detail=f"{len(fitting)} ids begin with it",
                hint="sandboxctl ls",
            )
        raise NotFound(f"cannot find sandbox {reference!r}", hint="sandboxctl ls")

    # --- create ---------------------------------------------------------------------------------------

    def limits_of(self, params: SandboxCreateParams) -> Limits:
        """The limits that a sandbox gets of this request.

        Raises:
            InvalidArgument: one of them is nonsense, or more than the host has.
            NotFound: there is no such template.
        """
        defaults = self.templates.defaults(params.template)
        return resolve(params.limits, defaults, self._host, nofile_hard_max=None).limits

    def limits_after(self, sandbox: Sandbox, params: SandboxUpdateParams) -> Limits:
        """The limits that a sandbox has after this request.

        Raises:
            InvalidArgument: nonsense, or a limit that is fixed at creation.
        """
        return merged(sandbox.record.limits, resolve_update(params.limits, self._host))

    async def create(self, params: SandboxCreateParams, timings: Timings, progress: Progress = silent) -> Sandbox:
        """Make a sandbox, and prove its limits.

        Not cancelled half-way, but for the copying of a project: when the caller goes away meanwhile, the sandbox is
        made and then removed.

        Raises:
            InvalidArgument: something in ``params`` cannot be meant; nothing was made.
            LimitNotEnforceable: this host cannot enforce what was asked; nothing is left.
            Failure: anything else; nothing is left.
        """
        defaults = self.templates.defaults(params.template)
        lifetime = self._lifetime(params)
        egress = egress_of(params.network, params.allow, params.deny)
        self._secrets.check(params.secrets)
        self._check_room(params.name)
        with contextlib.ExitStack() as opened:
            places = await self.workspaces.open(params.workspace, params.mounts, opened)
            engine = await self._engines.choose(params.engine or defaults.engine)
            timings.mark("choose")
            resolved = resolve(params.limits, defaults, self._host, nofile_hard_max=engine.info.nofile_hard_max)
            limits = self._packed(resolved.limits, engine.info)
            require_pausable(engine, lifetime.on_timeout)
            policy = params.limits_policy or defaults.limits_policy
            self._check_enforceable(limits, engine.info, policy)
            identity = identify(
                engine.info,
                None if places.project is None else places.project.owner,
                caller=self._caller.user,
                idmap_works=self._idmap_works,
            )
            sandbox_id = self._new_id()
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
                workspace=self.workspaces.workspace_record(params.workspace, places, identity, engine.info),
                mounts=self.workspaces.mount_records(places, identity),
                network=Network.NONE if egress is not None else Network(params.network or defaults.network),
                egress=egress,
                services=self._services.grants(params.services, sandbox_id=sandbox_id),
                secrets=tuple(dict.fromkeys(params.secrets)),
                limits=limits,
                tmp_bytes_max=resolved.tmp_bytes_max,
                limits_policy=policy,
                env={**self.templates.env(params.template), **params.env},
                metadata=params.metadata,
                ephemeral=params.ephemeral,
                created_at_ms=now_ms(),
                warnings=(*_warnings(identity, engine.info), *places.warnings),
                bin_dir=self._places.bin_dir,
                lifetime=lifetime,
                cpus_packed=limits is not resolved.limits,
                template=params.template,
            )
            sandbox, miss_reason = None, ""
            for _ in range(CLAIMS_MAX):
                slot, miss_reason = await self._slot_for(record, engine, params)
                if slot is None:
                    break
                grants = self._services.grants(params.services, sandbox_id=slot.record.id)
                before = self._reserve(slot, msgspec.structs.replace(record, services=grants), engine)
                timings.mark("reserve")
                sandbox, miss_reason = await self._claim(slot, before, engine, places, timings, progress)
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
                sandbox = await self._launch_cold(record, engine, places, timings, progress)
        await self._unless_cancelled(sandbox)
        return sandbox

    async def _launch_cold(
        self, record: SandboxRecord, engine: Engine, places: Opened, timings: Timings, progress: Progress
    ) -> Sandbox:
        # Again, for others may have come in between; from here to the registration nothing waits.
        self._check_room(record.name)
        self._journal.put(record)
        sandbox = self.register(record)
        timings.mark("journal")
        # Nobody has it yet, and nobody gets it before it is made.
        sandbox.lock.acquire_nowait()
        try:
            await self._fill_layers(sandbox, places, progress)
            timings.mark("layers")
            with anyio.CancelScope(shield=True):
                await self._make(sandbox, engine, places, timings, Event.CREATED)
        finally:
            sandbox.lock.release()
        return sandbox

    # --- warm slots -----------------------------------------------------------------------------------

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
        return self.templates.recipe_of(record, late=self._staging.changes_late(engine.info))

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
            slot.claim(msgspec.structs.replace(record, changed_late=self._staging.changes_late(engine.info)))
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
                await self.workspaces.fill(slot, places, progress)
                with anyio.CancelScope(shield=True):
                    await self._change_to_claimed(slot, before, engine, places, timings)
        except (RuntimeFailure, LimitNotEnforceable) as error:
            # What has died cannot be proven, either; else it is the caller's limits that cannot.
            passed_over = isinstance(error, RuntimeFailure) or await _has_died(slot)
            self.remove_soon(slot)
            if not passed_over:
                raise
            logger.warning("cannot claim slot %s: %s", slot.record.id, error)
            self.pools.spoiled(self._recipe(before, engine))
            return None, f"claim failed: {error.brief}"
        except BaseException:
            self.remove_soon(slot)
            raise
        return slot, ""

    async def _change_to_claimed(
        self, slot: Sandbox, before: SandboxRecord, engine: Engine, places: Opened, timings: Timings
    ) -> None:
        if slot.record.changed_late:
            with contextlib.ExitStack() as opened:
                await self._change_late(slot, before, self.workspaces.sources(slot, places, opened))
        timings.mark("workspace")
        await self._claim_limits(slot, engine, before.limits)
        timings.mark("limits")
        self.prove(slot)
        self._require_proof(slot)
        timings.mark("verify")
        await self._attach(slot)
        timings.mark("network")
        slot.change(Event.CLAIMED)
        timings.mark("ready")

    async def _change_late(
        self, sandbox: Sandbox, made: SandboxRecord | None, sources: Sequence[MountSource]
    ) -> None:
        """Make a container what its record says, in all that its engine fixed when it was made.

        Args:
            sandbox: Whose.
            made: What its container is now; None: not known.
            sources: Its project, or nothing.
        """
        record = sandbox.record
        tmpfs_bytes = {}
        if made is None or record.tmp_bytes_max != made.tmp_bytes_max:
            tmpfs_bytes = _tmpfs_bytes(record.tmp_bytes_max, has_workspace=record.workspace is not None)
        shm = record.limits.shm_bytes_max
        if shm is not None and (made is None or shm != made.limits.shm_bytes_max):
            tmpfs_bytes["/dev/shm"] = shm  # noqa: S108  (inside the sandbox)
        source = next(iter(sources), None)
        await self._staging.change(sandbox, source, tmpfs_bytes=tmpfs_bytes, hostname=record.name)

    async def _claim_limits(self, slot: Sandbox, engine: Engine, before: Limits) -> None:
        """Straight into the control group; where that belongs to somebody else, through the engine."""
        changed = _changed(before, _passable(slot.record.limits, engine.info))
        if changed == Limits():
            return
        try:
            slot.write_limits(changed)
        except CgroupUnreadable:
            await self._write_limits(slot, engine, changed)
        else:
            self.engine_records.stale(slot)

    async def _fill_slot(self, recipe: Recipe) -> Sandbox:
        """Make a slot: a container of the recipe, checked, and nobody's.

        Raises:
            Failure, RuntimeFailure: it cannot be made; nothing is left.
        """
        engine = self._engines.get(EngineName(recipe.engine))
        resolved = self.templates.limits(recipe.template, engine.info)
        policy = self.templates.defaults(recipe.template).limits_policy
        self._check_enforceable(resolved.limits, engine.info, policy)
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
            bin_dir=self._places.bin_dir,
            template=recipe.template,
            slot=True,
        )
        with contextlib.ExitStack() as opened:
            places = await self.workspaces.reopen(record, opened)
            project = places.project
            bound = recipe.prebound
            if bound and project and (project.device, project.inode) != (bound.device, bound.inode):
                raise InvalidArgument(f"cannot make a slot for {bound.path}", detail="it is another directory now")
            self._journal.put(record)
            slot = self.register(record)
            with anyio.CancelScope(shield=True):
                async with slot.lock:
                    await self._make(slot, engine, places, Timings(), Event.FILLED)
                facts = await self.facts(slot)
        if facts is not None:
            slot.put(image_id=facts.image_id)
        return slot

    def keep_pools(self) -> None:
        """Have the pools that the configuration wants, with the slots of a former daemon."""
        for slot in self.all():
            if slot.record.state is State.WARM:
                recipe = self._recipe_if_fit(slot)
                if recipe is not None:
                    self.pools.adopt(recipe, slot, age_s=(now_ms() - slot.record.created_at_ms) / 1000)
                else:
                    self.remove_soon(slot)
        for name in self.templates.names:
            try:
                own = self._own_recipe(name)
            except Failure as error:
                # Said again to everybody who asks for it; it must not keep the others from starting.
                logger.warning("cannot keep slots of template %s: %s", name, error)
                continue
            if own is not None:
                self.pools.keep(own)

    def _recipe_if_fit(self, slot: Sandbox) -> Recipe | None:
        """What a slot of a former daemon is one of; None where no claim could use it now."""
        try:
            engine = self.engine_of(slot)
            recipe = self._recipe(slot.record, engine)
            fits = slot.connected and not self.templates.unfit(recipe, engine.info)
        except (Failure, RuntimeFailure) as error:
            logger.info("cannot use slot %s any more: %s", slot.record.id, error)
            return None
        return recipe if fits else None

    def _own_recipe(self, template: str) -> Recipe | None:
        """The recipe of a template's own slots: without a project, on the engine that it takes."""
        defaults = self.templates.defaults(template)
        try:
            engine = self._engines.chosen(defaults.engine)
        except EngineUnavailable:
            return None
        resolved = self.templates.limits(template, engine.info)
        identity = identify(engine.info, None, caller=self._caller.user, idmap_works=self._idmap_works)
        late = self._staging.changes_late(engine.info)
        return Recipe(
            template=template,
            engine=engine.name.value,
            image=defaults.image,
            user=identity.user,
            keep_id=identity.keep_id,
            network=Network(defaults.network),
            nofile_max=resolved.limits.nofile_max,
            tmp_bytes_max=None if late else resolved.tmp_bytes_max,
            shm_bytes_max=None if late else resolved.limits.shm_bytes_max,
        )

    def _pool_settings(self, recipe: Recipe) -> PoolSettings:
        is_variant = recipe != self._own_recipe(recipe.template)
        return self.templates.pool_settings(recipe.template, is_variant=is_variant)

    async def _image_id(self, recipe: Recipe) -> str | None:
        return await self._engines.get(EngineName(recipe.engine)).image_id(recipe.image)

    async def _unless_cancelled(self, sandbox: Sandbox) -> None:
        """Remove what was made for a caller who went away meanwhile: nobody will ever know its id."""
        try:
            await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self.remove(sandbox, Timings())
            raise

    async def _fill_layers(self, sandbox: Sandbox, places: Opened, progress: Progress) -> None:
        """Make its layers. That may take long, and so ends when the caller goes away."""
        try:
            await self.workspaces.fill(sandbox, places, progress)
        except BaseException:
            self.forget(sandbox)
            raise

    async def _make(self, sandbox: Sandbox, engine: Engine, places: Opened, timings: Timings, made: Event) -> None:
        try:
            container_id = await self._run(sandbox, engine, places, timings)
            sandbox.change(made, container_id=container_id)
            self.prove(sandbox)
            self._require_proof(sandbox)
            timings.mark("verify")
            await self._attach(sandbox)
            timings.mark("network")
        except BaseException as error:
            await self._discard(sandbox)
            if isinstance(error, EngineUnavailable):
                # What was known of it is no longer true: the next create shall choose by what is.
                self._background.start(self._engines.refresh)
            raise

    async def _attach(self, sandbox: Sandbox) -> None:
        """Give it its secrets, and put on its loopback what was asked for; what cannot be there is a warning."""
        await self._secrets.deliver(sandbox)
        problems = await self._attachments.attach(sandbox)
        if problems:
            sandbox.put(warnings=(*sandbox.record.warnings, *problems))

    async def set_network(self, sandbox: Sandbox, params: NetworkSetParams) -> None:
        """Change what a running sandbox may reach; it counts from its next request on.

        Raises:
            InvalidArgument, NotFound: rules or services that are none.
            Unsupported: a change to or from the engine's own network.
            Conflict: it does not run.
        """
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is not State.RUNNING:
                    raise Conflict(
                        f"cannot change the network of a sandbox that is {sandbox.record.state.value}",
                        hint=f"sandboxctl start {sandbox.record.id}",
                    )
                egress = changed_egress(
                    sandbox,
                    mode=params.mode,
                    allow=params.allow,
                    deny=params.deny,
                    add_allow=params.add_allow,
                    add_deny=params.add_deny,
                )
                services = sandbox.record.services
                if params.services is not None:
                    services = self._services.grants(params.services, sandbox_id=sandbox.record.id)
                sandbox.put(egress=egress, services=services)
                await self._attachments.attach(sandbox)

    async def _run(self, sandbox: Sandbox, engine: Engine, places: Opened, timings: Timings) -> str:
        sandbox.prepare()
        with contextlib.ExitStack() as opened:
            sources = self.workspaces.sources(sandbox, places, opened)
            mounts = opened.enter_context(self._staging.staged(sandbox, sources))
            spec = self._spec(sandbox.record, engine.info, mounts, sandbox.io_dir)
            timings.mark("prepare")
            container_id = await self._create(engine, spec)
            timings.mark("engine")
            await self._connect(sandbox, container_id, engine, sources, mounts, timings)
        return container_id

    async def _connect(
        self,
        sandbox: Sandbox,
        container_id: str,
        engine: Engine,
        sources: Sequence[MountSource],
        mounts: Sequence[Mount],
        timings: Timings,
    ) -> None:
        await sandbox.connect(container_id, engine, _paths_inside(sandbox, mounts))
        timings.mark("init")
        await self._staging.check_arrived(sandbox, sources)
        self.workspaces.note_backend(sandbox)
        timings.mark("workspace")

    async def _create(self, engine: Engine, spec: ContainerSpec) -> str:
        try:
            return await engine.create(spec)
        except ImageNotFound as error:
            if spec.image != self._config.defaults.image:
                # Only the default image can be built here; any other is the engine's to fetch.
                error.hint = f"{engine.name} pull {spec.image}"
            raise

    async def _discard(self, sandbox: Sandbox) -> None:
        """Undo a failed create. What cannot be undone now stays written down, and is undone at the next sweep."""
        try:
            await self.remove_from_engine(sandbox)
        except RuntimeFailure as error:
            logger.warning("cannot remove the failed sandbox %s yet: %s", sandbox.record.id, error)
            sandbox.put(state=State.REMOVING, state_reason=f"its creation failed, and {error.brief}")
            sandbox.disconnect()
        else:
            self.forget(sandbox)

    def _packed(self, limits: Limits, info: EngineInfo) -> Limits:
        """The limits of a new sandbox, bound to some CPUs if that is configured, can be done and says something."""
        able = info.capabilities
        if not self._config.capacity.pack_cpus or able is None or not able.cpuset_limit:
            return limits
        cpus = admission.pack(self._host.cpus_online, self._cpus_taken(), admission.whole_cpus(limits) or 0)
        return limits if cpus is None else msgspec.structs.replace(limits, cpuset_cpus=cpus)

    def _repacked(self, sandbox: Sandbox, changed: Limits) -> Limits:
        """A change of limits of a sandbox that was bound to some CPUs here: they follow its quota."""
        if not sandbox.record.cpus_packed or changed.cpu_millis is None or changed.cpuset_cpus is not None:
            return changed
        online = self._host.cpus_online
        cpus = admission.pack(online, self._cpus_taken(besides=sandbox), admission.whole_cpus(changed) or 0)
        return msgspec.structs.replace(changed, cpuset_cpus=cpus or online)

    def _cpus_taken(self, besides: Sandbox | None = None) -> list[tuple[int, ...]]:
        return [
            sandbox.record.limits.cpuset_cpus
            for sandbox in self.present()
            if sandbox is not besides
            and sandbox.record.limits.cpuset_cpus
            and sandbox.record.state not in (State.STOPPED, State.LOST)
        ]

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
        present = self.present()
        if name is not None and any(sandbox.record.name == name for sandbox in present):
            raise Conflict(
                f"cannot name a sandbox {name!r}",
                detail="another one has that name",
                hint=f"use it (sandboxctl exec {name} ...), or choose another name",
            )
        if name is not None and name.startswith(ID_PREFIX):
            raise InvalidArgument(f"cannot name a sandbox {name!r}", detail=f"ids begin with {ID_PREFIX}")
        if len(present) >= self._config.daemon.sandboxes_max:
            raise CapacityExceeded(
                f"cannot make more than {self._config.daemon.sandboxes_max} sandboxes",
                hint="remove some (sandboxctl rm), or raise daemon.sandboxes_max",
            )

    @staticmethod
    def _check_enforceable(limits: Limits, info: EngineInfo, policy: str) -> None:
        missing = enforceable(limits, info)
        if missing and policy == "strict":
            raise LimitNotEnforceable(
                f"cannot enforce {', '.join(entry.limit for entry in missing)} with {info.name}",
                detail="; ".join(dict.fromkeys(entry.reason for entry in missing)),
                hint=f"{missing[0].hint}   (or go on without proof: --degraded)",
            )

    @staticmethod
    def _require_proof(sandbox: Sandbox) -> None:
        unproven = [proof for proof in sandbox.proofs if not proof.verified]
        if unproven and sandbox.record.limits_policy == "strict":
            raise LimitNotEnforceable(
                f"cannot prove {', '.join(proof.name for proof in unproven)}",
                detail="; ".join(dict.fromkeys(proof.reason for proof in unproven)),
                hint="sandboxctl doctor, or go on without proof: --degraded",
            )

    def _new_id(self) -> str:
        while True:
            sandbox_id = ID_PREFIX + "".join(random.choices(_ID_ALPHABET, k=_ID_CHARS))  # noqa: S311  (an identifier, no secret)
            if sandbox_id not in self._sandboxes:
                return sandbox_id

    def register(self, record: SandboxRecord) -> Sandbox:
        """Have a sandbox of a record that is in the journal."""
        sandbox = Sandbox(
            record,
            directory=os.path.join(self._places.boxes_dir, record.id),
            journal=self._journal,
            background=self._background,
            spools=SpoolDirectory(
                os.path.join(self._places.spools_dir, record.id), self._inotify, cap_bytes=self._output_bytes_max
            ),
            on_init_lost=self._on_init_lost,
        )
        if self._tell is not None:
            sandbox.on_told = self._tell
        sandbox.on_changed = functools.partial(self._changed, sandbox)
        self._sandboxes[record.id] = sandbox
        return sandbox

    def _changed(self, sandbox: Sandbox) -> None:
        for watcher in self.watchers:
            watcher(sandbox)

    def forget(self, sandbox: Sandbox) -> None:
        """Have it no more: its container is known to be gone.

        Raises:
            Failure: the journal cannot be written; it is tried again at the next sweep.
        """
        sandbox.disconnect(killed=True)
        sandbox.erase()
        self._attachments.forget(sandbox)
        self._background.start(sandbox.spools.erase)
        if sandbox.record.workspace is not None and sandbox.record.workspace.layer:
            self._background.start(self.workspaces.erase, sandbox.record.id)
        self._journal.delete(sandbox.record.id)
        self._sandboxes.pop(sandbox.record.id, None)
        sandbox.gone.set()
        sandbox.tell("removed")
        self._changed(sandbox)
        sandbox.on_forgotten()

    async def _remove_foreign(self, directory: str) -> None:
        await self._engines.get(EngineName.PODMAN).remove_tree(directory)

    def sweep_layers_soon(self) -> None:
        """Remove, in the background, what sandboxes wrote of which nobody knows any more."""
        self._background.start(self.workspaces.erase_all, self.workspaces.unknown(self._sandboxes))

    # --- the container --------------------------------------------------------------------------------

    def _spec(self, record: SandboxRecord, info: EngineInfo, mounts: Sequence[Mount], io_dir: str) -> ContainerSpec:
        binds = [
            Mount(source=record.bin_dir, target=INSIDE_BIN, read_only=True),
            Mount(source=io_dir, target=INSIDE_RUN),
            *mounts,
        ]
        tmpfs_bytes = _tmpfs_bytes(record.tmp_bytes_max, has_workspace=any(each.target == TARGET for each in mounts))
        return ContainerSpec(
            sandbox_id=record.id,
            owner=self.owner,
            image=record.image,
            command=(f"{INSIDE_BIN}/sandbox-init", INSIDE_RUN),
            user=record.user,
            keep_id=record.keep_id,
            hostname=record.name or record.id,
            limits=_passable(record.limits, info),
            mounts=tuple(binds),
            tmpfs=tuple(
                Tmpfs(target=target, size_bytes_max=size_bytes, executable=target != "/run")
                for target, size_bytes in tmpfs_bytes.items()
            ),
            network=record.network,
            seccomp_profile=self._places.seccomp_profile,
            nproc_max=info.nproc_hard_max,
            selinux_disable=info.selinux_enforcing,
        )

    # --- stop, start, remove --------------------------------------------------------------------------

    async def stop(self, sandbox: Sandbox, grace_s: float) -> None:
        """Stop a sandbox; what it wrote outside of tmpfs stays. Idempotent."""
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is State.STOPPED:
                    return
                engine = self.engine_of(sandbox)
                container_id = container_id_of(sandbox)
                paused = sandbox.record.state is State.PAUSED
                sandbox.change(Event.STOP)
                try:
                    if paused:
                        # What is frozen takes no TERM.
                        await engine.resume(container_id)
                    await engine.stop(container_id, grace_s=max(0, math.ceil(grace_s)))
                finally:
                    await self._look(sandbox, engine, container_id)

    async def start(self, sandbox: Sandbox, timings: Timings) -> None:
        """Start a stopped sandbox, and prove its limits again. Idempotent."""
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is State.RUNNING:
                    return
                if sandbox.record.state is State.LOST:
                    raise _gone(sandbox)
                if sandbox.record.state is State.PAUSED:
                    await self._resume(sandbox, timings)
                    return
                sandbox.change(Event.START)
                try:
                    await self._start(sandbox, timings)
                except ContainerNotFound as error:
                    self.note(sandbox, Event.VANISHED, f"{sandbox.record.engine} no longer has its container")
                    raise _gone(sandbox) from error
                except BaseException:
                    await self._stop_again(sandbox)
                    raise

    async def pause(self, sandbox: Sandbox, timings: Timings, *, reason: str = "") -> None:
        """Freeze everything in a sandbox. It keeps its memory, and nobody can use it until it is resumed. Idempotent.

        Through the engine, whose view must be ours: a group that is frozen directly is "running" to Docker.

        Raises:
            Conflict: it does not run.
            Unsupported: its engine cannot.
        """
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is State.PAUSED:
                    return
                next_state(sandbox.record.state, Event.PAUSE)
                engine = self.engine_of(sandbox)
                try:
                    await engine.pause(container_id_of(sandbox))
                except (EngineRefused, EngineTimeout):
                    await self._look(sandbox, engine, container_id_of(sandbox))
                    raise
                timings.mark("engine")
                sandbox.change(Event.PAUSE, reason=reason)

    async def resume(self, sandbox: Sandbox, timings: Timings) -> None:
        """Let a paused sandbox go on. Idempotent.

        Raises:
            Conflict: it is not paused, and does not run.
            SandboxGone: its container is gone, or its init does not answer.
        """
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is State.RUNNING:
                    return
                if sandbox.record.state is not State.PAUSED:
                    raise Conflict(
                        f"cannot resume a sandbox that is {sandbox.record.state.value}",
                        detail=sandbox.record.state_reason,
                        hint=f"sandboxctl start {sandbox.record.id}",
                    )
                await self._resume(sandbox, timings)

    async def _resume(self, sandbox: Sandbox, timings: Timings) -> None:
        engine, container_id = self.engine_of(sandbox), container_id_of(sandbox)
        try:
            await engine.resume(container_id)
            timings.mark("engine")
        except RuntimeFailure:
            await self._look(sandbox, engine, container_id)
            raise
        await self.adopt(sandbox, engine, container_id)
        timings.mark("init")
        if sandbox.record.state is not State.RUNNING:
            raise SandboxGone(
                f"cannot resume sandbox {sandbox.record.id}",
                detail=sandbox.record.state_reason,
                hint=f"sandboxctl inspect {sandbox.record.id}",
            )

    async def _stop_again(self, sandbox: Sandbox) -> None:
        """Undo a start that failed: a sandbox whose limits are not proven must not run."""
        engine = self.engine_of(sandbox)
        sandbox.disconnect()
        try:
            await engine.stop(container_id_of(sandbox), grace_s=0)
        except RuntimeFailure as error:
            logger.warning("cannot stop %s again: %s", sandbox.record.id, error)
        await self._look(sandbox, engine, container_id_of(sandbox))

    async def _start(self, sandbox: Sandbox, timings: Timings) -> None:
        engine = self.engine_of(sandbox)
        container_id = container_id_of(sandbox)
        record = sandbox.record
        sandbox.prepare()
        with contextlib.ExitStack() as opened:
            places = await self.workspaces.reopen(record, opened)
            sources = self.workspaces.sources(sandbox, places, opened)
            staged = [] if record.changed_late else sources
            mounts = opened.enter_context(self._staging.staged(sandbox, staged))
            await engine.start(container_id)
            timings.mark("engine")
            await self._connect(sandbox, container_id, engine, staged, mounts, timings)
            if record.changed_late:
                await self._change_late(sandbox, None, sources)
        self._prove_again(sandbox)
        timings.mark("verify")
        self._require_proof(sandbox)
        await self._secrets.deliver(sandbox)
        sandbox.change(Event.ADOPTED)
        if sandbox.record.launch == "warm":
            self.engine_records.stale(sandbox)
        await self._attachments.attach(sandbox)
        timings.mark("network")

    def _prove_again(self, sandbox: Sandbox) -> None:
        """Prove; where that fails, write the limits once more, and prove.

        The engine starts a container with the limits of its creation: later updates are ours to repeat. And an
        update may have been cut short.
        """
        if not all(proof.verified for proof in self.prove(sandbox)):
            with contextlib.suppress(CgroupUnreadable):
                sandbox.write_limits(sandbox.record.limits)
            self.prove(sandbox)

    def restore_limits(self, sandbox: Sandbox) -> None:
        """Read the limits of a sandbox that runs, and write them again where somebody else has changed them."""
        at_rest = sandbox.connected and not sandbox.lock.locked() and not sandbox.is_unthrottled
        if sandbox.record.state not in (State.RUNNING, State.WARM) or not at_rest:
            return
        before = {proof.name for proof in sandbox.proofs if proof.verified}
        changed = [proof for proof in self.prove(sandbox) if proof.name in before and not proof.verified]
        if not changed:
            return
        said = "; ".join(f"{proof.name}: {proof.reason}" for proof in changed)
        logger.warning("somebody changed limits of %s: %s", sandbox.record.id, said)
        try:
            sandbox.write_limits(sandbox.record.limits)
        except CgroupUnreadable as error:
            logger.warning("cannot restore the limits of %s: %s", sandbox.record.id, error)
            return
        if before <= {proof.name for proof in self.prove(sandbox) if proof.verified}:
            sandbox.tell("limits_restored", reason=said)

    def condemn(self, sandbox: Sandbox) -> None:
        """Begin the end of a sandbox, at once and for good: written down, its processes killed, its name free.

        Waits for nobody: not for the engine, and not for whatever is under way with it, which then finds it gone.
        Idempotent.
        """
        if sandbox.record.id not in self._sandboxes:
            return
        if sandbox.record.state is not State.REMOVING:
            try:
                sandbox.change(Event.REMOVE)
            except Failure as error:
                # The journal is full or damaged. The row is there; that it is being removed can be said later.
                logger.warning("cannot write down that %s is being removed: %s", sandbox.record.id, error)
        sandbox.unthrottle()
        sandbox.kill_everything()
        sandbox.disconnect(killed=True)

    async def remove(self, sandbox: Sandbox, timings: Timings) -> None:
        """End everything in a sandbox and remove it without a trace. Works in every state; idempotent."""
        with anyio.CancelScope(shield=True):
            self.condemn(sandbox)
            timings.mark("kill")
            try:
                await self._remove(sandbox, timings)
            except (RuntimeFailure, Failure, OSError) as error:
                # Not as good as gone: it is listed again, until the next sweep or its user has removed it.
                self._note_trouble(sandbox, f"it is not gone yet: {error}")
                raise

    async def _remove(self, sandbox: Sandbox, timings: Timings) -> None:
        async with sandbox.lock:
            if sandbox.record.id not in self._sandboxes:
                return
            await self.remove_from_engine(sandbox)
            timings.mark("engine")
            self.forget(sandbox)
            timings.mark("host")

    def remove_soon(self, sandbox: Sandbox) -> None:
        """Kill what is in a sandbox now, and remove the rest in the background, however often that takes."""
        self.condemn(sandbox)
        if sandbox.record.id not in self._removing:
            self._removing.add(sandbox.record.id)
            self._background.start(self._remove_surely, sandbox)

    async def _remove_surely(self, sandbox: Sandbox) -> None:
        pause_s = REMOVE_PAUSE_S_MIN
        try:
            while sandbox.record.id in self._sandboxes:
                try:
                    # Not shielded: a daemon that ends leaves what an engine hangs on to the next start.
                    await self._remove(sandbox, Timings())
                except (RuntimeFailure, Failure, OSError) as error:
                    logger.warning("cannot remove %s yet: %s", sandbox.record.id, error)
                    self._note_trouble(sandbox, f"it is not gone yet: {error}")
                    await anyio.sleep(pause_s)
                    pause_s = min(pause_s * 2, REMOVE_PAUSE_S_MAX)
        finally:
            self._removing.discard(sandbox.record.id)

    def _note_trouble(self, sandbox: Sandbox, reason: str) -> None:
        with contextlib.suppress(Failure):
            if sandbox.record.id in self._sandboxes:
                sandbox.put(state_reason=reason)

    async def finish_removals(self, *, deadline_s: float) -> None:
        """Wait for removals that go on without trouble; a daemon that starts later does the rest."""
        with anyio.move_on_after(deadline_s):
            for sandbox in self.all():
                if sandbox.leaving and sandbox.record.id in self._removing:
                    await sandbox.gone.wait()

    async def remove_from_engine(self, sandbox: Sandbox) -> None:
        """Remove its container, or whatever the engine has under its label."""
        engine = self.engine_of(sandbox)
        sandbox.unthrottle()
        sandbox.disconnect(killed=True)
        if sandbox.record.container_id is not None:
            await _remove_thawed(engine, sandbox.record.container_id)
        else:
            await engine.remove_sandbox(sandbox.record.id, owner=self.owner)

    def engine_of(self, sandbox: Sandbox) -> Engine:
        """The engine that runs it.

        Raises:
            EngineUnavailable: it cannot be used now.
        """
        return self._engines.get(EngineName(sandbox.record.engine))

    # --- noticing what happened -----------------------------------------------------------------------

    def _on_init_lost(self, sandbox: Sandbox) -> None:
        if sandbox.record.slot:
            self.pools.lost(sandbox)
            return
        self._background.start(self._look_into, sandbox)

    async def _look_into(self, sandbox: Sandbox) -> None:
        """Find out what became of a sandbox whose init is silent."""
        async with sandbox.lock:
            settled = sandbox.record.state not in (State.CREATING, State.REMOVING, State.STOPPED)
            if sandbox.record.id not in self._sandboxes or sandbox.connected or not settled:
                return
            if sandbox.record.container_id is None:
                return
            await self._look(sandbox, self.engine_of(sandbox), sandbox.record.container_id)

    async def _look(self, sandbox: Sandbox, engine: Engine, container_id: str) -> None:
        """Ask the engine what became of a container, and write it down. Connects again if it runs."""
        try:
            facts = await engine.inspect(container_id)
        except ContainerNotFound:
            self.note(sandbox, Event.VANISHED, f"{engine.name} no longer has its container")
        except RuntimeFailure as error:
            self.note(sandbox, Event.UNREACHABLE, str(error))
        else:
            if facts.state is ContainerState.RUNNING:
                await self.adopt(sandbox, engine, container_id)
            elif facts.state is ContainerState.PAUSED:
                sandbox.change(Event.PAUSE, reason=reconcile.PAUSED)
            else:
                # Of one that was to stop it matters to nobody how its init took it.
                asked = sandbox.record.state is State.STOPPING
                self.note(sandbox, Event.EXITED, "" if asked else _why_stopped(facts))

    async def adopt(self, sandbox: Sandbox, engine: Engine, container_id: str) -> None:
        """Connect to a container that runs, unless we are, and book it as running, or as out of reach."""
        try:
            if not sandbox.connected:
                # A start that was cut short may have left the stage.
                sandbox.clear_stages()
                await sandbox.connect(container_id, engine, _programs(sandbox))
                await sandbox.adopt_commands()
            self._prove_again(sandbox)
            self._require_proof(sandbox)
        except (Failure, InitError, RuntimeFailure, OSError) as error:
            self.note(sandbox, Event.UNREACHABLE, str(error))
            return
        sandbox.change(Event.ADOPTED, container_id=container_id)
        if sandbox.record.launch == "warm":
            # Nobody knows whether a former daemon came to tell the engine, nor what a paused one has missed.
            self.engine_records.stale(sandbox)
        await self._attachments.attach(sandbox)

    @staticmethod
    def note(sandbox: Sandbox, event: Event, reason: str) -> None:
        """Book what was seen of a sandbox that does not run, or does not answer."""
        sandbox.disconnect()
        sandbox.change(event, reason=reason)

    def disconnect_all(self) -> None:
        """Let go of every sandbox; they and their commands go on."""
        for sandbox in self._sandboxes.values():
            sandbox.release()

    # --- proofs ---------------------------------------------------------------------------------------

    def prove(self, sandbox: Sandbox, reported: Limits | None = None) -> tuple[LimitProof, ...]:
        """Read the limits of a running sandbox, and keep the proofs."""
        return sandbox.prove(swap_bytes=self._host.swap_bytes, reported=reported)

    async def facts(self, sandbox: Sandbox) -> ContainerFacts | None:
        """The engine's view; None when it has none, or does not answer. That there is none is written down."""
        if sandbox.record.container_id is None:
            return None
        try:
            return await self.engine_of(sandbox).inspect(sandbox.record.container_id)
        except ContainerNotFound:
            await self._look_into(sandbox)
            return None
        except RuntimeFailure as error:
            logger.warning("cannot inspect %s: %s", sandbox.record.id, error)
            return None

    async def update(self, sandbox: Sandbox, params: SandboxUpdateParams, timings: Timings) -> None:
        """Change limits of a running sandbox and prove them; when they cannot be proven, the old ones are put back.

        Raises:
            InvalidArgument: nonsense, or a limit that is fixed at creation.
            Conflict: it does not run, or uses more than the new limit.
            LimitNotEnforceable: the new limits could not be proven.
        """
        changed = resolve_update(params.limits, self._host)
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is not State.RUNNING:
                    verb = "resume" if sandbox.record.state is State.PAUSED else "start"
                    raise Conflict(
                        f"cannot change the limits of a sandbox that is {sandbox.record.state.value}",
                        hint=f"sandboxctl {verb} {sandbox.record.id}",
                    )
                engine = self.engine_of(sandbox)
                chosen = changed.cpuset_cpus is not None
                changed = self._repacked(sandbox, changed)
                policy = params.limits_policy or sandbox.record.limits_policy
                self._check_enforceable(changed, engine.info, policy)
                self._check_use(sandbox, changed)
                before = sandbox.record.limits
                await self._apply(sandbox, engine, merged(before, changed), changed, policy)
                if chosen and sandbox.record.cpus_packed:
                    sandbox.put(cpus_packed=False)
                timings.mark("apply")

    async def _apply(self, sandbox: Sandbox, engine: Engine, limits: Limits, changed: Limits, policy: str) -> None:
        before, policy_before = sandbox.record.limits, sandbox.record.limits_policy
        sandbox.put(limits=limits, limits_policy=policy)
        try:
            await self._write_limits(sandbox, engine, changed)
            self.prove(sandbox)
            self._require_proof(sandbox)
        except (RuntimeFailure, Failure):
            sandbox.put(limits=before, limits_policy=policy_before)
            with contextlib.suppress(RuntimeFailure):
                await self._write_limits(sandbox, engine, before)
            self.prove(sandbox)
            raise

    async def _write_limits(self, sandbox: Sandbox, engine: Engine, limits: Limits) -> None:
        """Through the engine, so that its records stay right; what it cannot, straight into the control group."""
        limits = _passable(limits, engine.info)
        if limits == Limits():
            return
        left = await engine.update(container_id_of(sandbox), limits)
        if left != Limits():
            sandbox.write_limits(left)

    @staticmethod
    def _check_use(sandbox: Sandbox, changed: Limits) -> None:
        """Lowering a limit below what is used would kill at once, or be refused half-way."""
        try:
            usage = sandbox.usage()
        except CgroupUnreadable:
            return
        if _above(usage.memory_bytes, changed.memory_bytes_max):
            raise Conflict(
                f"cannot lower memory to {format_bytes(changed.memory_bytes_max or 0)}",
                detail=f"{format_bytes(usage.memory_bytes or 0)} are in use",
                hint=f"sandboxctl stats {sandbox.record.id}",
            )
        if _above(usage.pids, changed.pids_max):
            raise Conflict(
                f"cannot lower pids to {changed.pids_max}",
                detail=f"{usage.pids} are in use",
                hint=f"sandboxctl stats {sandbox.record.id}",
            )


def require_pausable(engine: Engine, on_timeout: str) -> None:
    """Refuse to promise a pause that the engine cannot keep.

    Raises:
        Unsupported: it cannot.
    """
    able = engine.info.capabilities
    if on_timeout == "pause" and (able is None or not able.pause):
        raise Unsupported(
            f"cannot pause a sandbox of {engine.name} when its time is over",
            detail="its containers have no control group that could be frozen here",
            hint="--on-timeout kill",
        )


async def _remove_thawed(engine: Engine, container_id: str) -> None:
    """Remove a container. One that is frozen cannot die of any signal on cgroup v1, and is thawed if it must be."""
    try:
        await engine.remove(container_id)
    except EngineRefused:
        with contextlib.suppress(RuntimeFailure):
            await engine.resume(container_id)
        await engine.remove(container_id)


async def _has_died(slot: Sandbox) -> bool:
    with anyio.move_on_after(DYING_S_MAX, shield=True):
        await slot.ended()
        return True
    return False


def _gone(sandbox: Sandbox) -> SandboxGone:
    return SandboxGone(
        f"cannot start sandbox {sandbox.record.id}",
        detail=sandbox.record.state_reason,
        hint=f"sandboxctl rm {sandbox.record.id}",
    )


def _paths_inside(sandbox: Sandbox, mounts: Sequence[Mount]) -> dict[str, str]:
    """Target inside to path on the host: what must be mounted there."""
    return {
        **_programs(sandbox),
        INSIDE_RUN: sandbox.io_dir,
        **{mount.target: os.path.realpath(mount.source) for mount in mounts if mount.overlay is None},
    }


def _programs(sandbox: Sandbox) -> dict[str, str]:
    return {INSIDE_BIN: sandbox.record.bin_dir} if sandbox.record.bin_dir else {}


def _warnings(identity: Identity, info: EngineInfo) -> tuple[str, ...]:
    selinux = "SELinux does not separate this sandbox from the host" if info.selinux_enforcing else ""
    return tuple(warning for warning in (identity.warning, selinux) if warning)


_FIELD_BY_LIMIT = {
    "memory": "memory_bytes_max",
    "cpus": "cpu_millis",
    "pids": "pids_max",
    "cpuset": "cpuset_cpus",
}


def _passable(limits: Limits, info: EngineInfo) -> Limits:
    """The limits that the engine is told: all, unless the caller goes on without those that cannot be enforced."""
    missing = {entry.limit for entry in enforceable(limits, info)}
    return msgspec.structs.replace(
        limits, **{field: None for name, field in _FIELD_BY_LIMIT.items() if name in missing}
    )


def _tmpfs_bytes(tmp_bytes_max: int, *, has_workspace: bool) -> dict[str, int]:
    """Target to size of everything that is writable inside, besides a workspace."""
    sizes = dict.fromkeys(TMPFS_TARGETS if has_workspace else (*TMPFS_TARGETS, TARGET), tmp_bytes_max)
    return {**sizes, "/run": min(tmp_bytes_max, RUN_TMPFS_BYTES_MAX)}


def _changed(before: Limits, after: Limits) -> Limits:
    """The limits of ``after`` that are not those of ``before``."""
    old = msgspec.structs.asdict(before)
    return Limits(**{name: value for name, value in msgspec.structs.asdict(after).items() if value != old[name]})


def _above(used: int | None, limit: int | None) -> bool:
    return used is not None and limit is not None and used > limit


def _why_stopped(facts: ContainerFacts) -> str:
    if facts.oom_killed:
        return "its init was killed for memory"
    return "its init ended" if facts.exit_code is None else f"its init ended with {facts.exit_code}"
