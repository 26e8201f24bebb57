"""All sandboxes of a daemon: found, stopped, started, removed, and what became of those that are silent.

Every change of the world is written down first (``journal``), carried out under the sandbox's lock and under a
shield, so that a client that goes away leaves nothing half-made, and read back before it is reported.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping

import anyio
import msgspec

from runtimes.engine import Engine
from runtimes.errors import ContainerNotFound, EngineRefused, EngineTimeout, RuntimeFailure
from runtimes.init.wire import InitError
from runtimes.inotify import Inotify
from runtimes.model import ContainerFacts, ContainerState, EngineName, User
from runtimes.mounter.mounter import Mounter
from sandboxd import reconcile, spelling
from sandboxd.attaching import Attachments
from sandboxd.background import Background
from sandboxd.config import Config
from sandboxd.containers import Containers, programs_of
from sandboxd.enforcing import Enforcer, require_proof
from sandboxd.engine_records import EngineRecords
from sandboxd.engines import EngineRoom
from sandboxd.failures import Conflict, Failure, InvalidArgument, NoSuchSandbox, SandboxGone
from sandboxd.journal import Journal
from sandboxd.kept_inputs import KEPT_MAX, KeptInputs, name_of
from sandboxd.lifecycle import Event, State, next_state
from sandboxd.limits import Host, output_bytes_max, passable
from sandboxd.records import SandboxRecord
from sandboxd.sandbox import Sandbox, Tell, container_id_of, nobody_listens
from sandboxd.secret_store import SecretStore
from sandboxd.spool import SpoolDirectory
from sandboxd.staging import Staging
from sandboxd.timings import Timings
from sandboxd.workspace import Rules
from sandboxd.workspaces import Workspaces, copy_bounds

logger = logging.getLogger(__name__)

ID_PREFIX = "sb-"


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
        attachments: Attachments,
        mounter: Mounter | None,
        late_calls: bool = True,
        secrets: SecretStore,
        tell: Tell | None = None,
        kept_inputs: KeptInputs | None = None,
    ) -> None:
        self._attachments = attachments
        self._secrets = secrets
        self._inotify = inotify
        self._output_bytes_max = output_bytes_max(config.defaults)
        self._caller = caller
        self._kept_inputs = kept_inputs or KeptInputs({})
        self._places = places
        self._journal = journal
        self.owner = journal.owner()
        """What labels its containers."""
        self._engines = engines
        self._background = background
        self.workspaces = Workspaces(
            places.layers_dir,
            rules=self._rules(config),
            bounds=copy_bounds(config.workspaces),
            may_mount=caller.user.uid == 0,
            idmap_works=userns_fd is not None,
            remove_foreign=self._remove_foreign,
        )
        """What they see of the host, and what they did to it."""
        self.containers = Containers(
            self.owner,
            seccomp_profile=places.seccomp_profile,
            default_image=config.defaults.image,
            staging=Staging(
                may_mount=caller.user.uid == 0, userns_fd=userns_fd, mounter=mounter, late_calls=late_calls
            ),
            workspaces=self.workspaces,
        )
        self.engine_records = EngineRecords(self.engine_of, passable)
        """What engines are to be told of limits that were written past them."""
        self.enforcer = Enforcer(
            host, engines, self.present, packs_cpus=config.capacity.pack_cpus, engine_records=self.engine_records
        )
        self._sandboxes: dict[str, Sandbox] = {}
        self._tell: Tell = tell or nobody_listens
        self.watchers: list[Callable[[Sandbox], None]] = []
        """Called with each sandbox whenever it is new, has changed, or is gone; must be cheap."""
        self._removing: set[str] = set()
        """The sandboxes that a task in the background removes."""
        self.on_slot_lost: Callable[[Sandbox], None] = self.remove_soon
        """Called with a slot whose init is gone."""

    def reconfigure(self, config: Config) -> None:
        """Go by these settings from now on; sandboxes that are there keep what they were made with."""
        self._output_bytes_max = output_bytes_max(config.defaults)
        self.workspaces.rules = self._rules(config)

    def _rules(self, config: Config) -> Rules:
        return Rules(
            home=self._caller.home,
            allow=config.paths.allow,
            deny=config.paths.deny,
            private=self._places.private_dirs,
        )

    # --- finding --------------------------------------------------------------------------------------

    def all(self) -> list[Sandbox]:
        """All sandboxes, in the order of their making, those that are being removed included."""
        return list(self._sandboxes.values())

    def present(self) -> list[Sandbox]:
        """All but those that are as good as gone, and slots, which are nobody's."""
        return [sandbox for sandbox in self._sandboxes.values() if not sandbox.record.slot and not sandbox.leaving]

    def find(self, sandbox_id: str) -> Sandbox | None:
        """The sandbox with exactly this id."""
        return self._sandboxes.get(sandbox_id)

    def get(self, reference: str, *, leaving: bool = False) -> Sandbox:
        """Find a sandbox by its id, an unambiguous prefix of one, or its name.

        Args:
            reference: What the caller typed.
            leaving: By its id, one that is as good as gone is found, too.

        Raises:
            NoSuchSandbox: there is none.
            InvalidArgument: the prefix fits several.
        """
        found = self._meant(reference, leaving=leaving)
        if found is None:
            names = [sandbox.record.name for sandbox in self.present() if sandbox.record.name is not None]
            raise NoSuchSandbox(
                f"cannot find sandbox {reference!r}", hint=spelling.hint(reference, names, "sandboxctl ls")
            )
        return found

    def _meant(self, reference: str, *, leaving: bool) -> Sandbox | None:
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
        return None

    def id_of(self, reference: str) -> str | None:
        """The id of the sandbox that is meant, be it as good as gone; None: none is, or it is not clear which."""
        try:
            found = self._meant(reference, leaving=True)
        except InvalidArgument:
            return None
        return None if found is None else found.record.id

    def inputs(self) -> list[tuple[str, int]]:
        """The stdins of commands in the background, by the names under which the next daemon finds them again."""
        found = [
            (name_of(sandbox.record.id, command.id), descriptor)
            for sandbox in self.all()
            for command in sandbox.commands.running()
            if command.background
            and command.outlet is not None
            and (descriptor := command.outlet.input_fd) is not None
        ]
        return found[:KEPT_MAX]

    # --- having and forgetting --------------------------------------------------------------------------

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
            kept_inputs=self._kept_inputs,
        )
        sandbox.on_told = self._tell
        sandbox.on_changed = functools.partial(self._changed, sandbox)
        self._sandboxes[record.id] = sandbox
        self._changed(sandbox)
        return sandbox

    def _changed(self, sandbox: Sandbox) -> None:
        for watcher in self.watchers:
            watcher(sandbox)

    def forget(self, sandbox: Sandbox) -> None:
        """Have it no more: its container is known to be gone."""
        sandbox.disconnect(killed=True)
        sandbox.erase()
        self._attachments.forget(sandbox)
        self._background.persist(sandbox.spools.erase)
        if sandbox.record.workspace is not None and sandbox.record.workspace.layer:
            self._background.persist(self.workspaces.erase, sandbox.record.id)
        self._journal.delete(sandbox.record.id)
        self._sandboxes.pop(sandbox.record.id, None)
        sandbox.gone.set()
        sandbox.tell("removed")
        self._changed(sandbox)
        sandbox.on_forgotten()

    async def _remove_foreign(self, directory: str) -> None:
        await self._engines.get(EngineName.PODMAN).remove_tree(directory)

    def tell_of_stray(self, sandbox_id: str, **data: str | int | None) -> None:
        """Have it told that a container of ours that nobody owned was removed."""
        self._tell("stray_removed", sandbox_id, None, data)

    def sweep_layers_soon(self, spared: Collection[str]) -> None:
        """Remove, in the background, what sandboxes wrote of which nobody knows any more, but for those spared."""
        self._background.persist(self.workspaces.erase_all, self.workspaces.unknown({*self._sandboxes, *spared}))

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
                values = await self._secrets.values_to_start(sandbox)
                sandbox.change(Event.START)
                try:
                    await self._start(sandbox, values, timings)
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
        engine, container_id = self.engine_of(sandbox), container_id_of(sandbox)
        sandbox.disconnect()
        ran = False
        try:
            ran = (await engine.inspect(container_id)).state is ContainerState.RUNNING
            await engine.stop(container_id, grace_s=0)
        except RuntimeFailure as error:
            logger.warning("cannot stop %s again: %s", sandbox.record.id, error)
        await self._look(sandbox, engine, container_id, stopped_by_us=ran)

    async def _start(self, sandbox: Sandbox, secrets: Mapping[str, bytes], timings: Timings) -> None:
        await self.containers.start(sandbox, self.engine_of(sandbox), timings)
        self.enforcer.prove_again(sandbox)
        timings.mark("verify")
        require_proof(sandbox)
        await self._secrets.deliver(sandbox, secrets)
        sandbox.change(Event.ADOPTED)
        if sandbox.record.launch == "warm":
            self.engine_records.stale(sandbox)
        await self._attachments.attach(sandbox)
        timings.mark("network")

    def condemn(self, sandbox: Sandbox) -> None:
        """Begin the end of a sandbox, at once and for good: written down, its processes killed, its name free.

        Waits for nobody: not for the engine, and not for whatever is under way with it, which then finds it gone.
        Idempotent.
        """
        if sandbox.record.id not in self._sandboxes:
            return
        if sandbox.record.state is not State.REMOVING:
            sandbox.change(Event.REMOVE)
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
            self.on_slot_lost(sandbox)
            return
        self._background.start(self._look_into, sandbox)

    async def _look_into(self, sandbox: Sandbox) -> None:
        """Find out what became of a sandbox whose init is silent."""
        async with sandbox.lock:
            settled = sandbox.record.state not in (State.CREATING, State.REMOVING, State.STOPPED)
            if sandbox.record.id not in self._sandboxes or sandbox.connected or not settled:
                return
            await self.look(sandbox)

    async def look(self, sandbox: Sandbox, *, why: str = "") -> None:
        """Ask the engine what became of a sandbox, and write it down where it is news. Called under its lock."""
        if sandbox.record.id not in self._sandboxes or sandbox.record.container_id is None:
            return
        try:
            await self._look(sandbox, self.engine_of(sandbox), sandbox.record.container_id, why=why)
        except Conflict:
            # Condemned while the engine was asked: what became of it matters to nobody any more.
            if sandbox.record.state is not State.REMOVING:
                raise

    async def _look(
        self, sandbox: Sandbox, engine: Engine, container_id: str, *, why: str = "", stopped_by_us: bool = False
    ) -> None:
        """Ask the engine what became of a container, and write it down. Connects again if it runs."""
        try:
            facts = await engine.inspect(container_id)
        except ContainerNotFound:
            self.note(sandbox, Event.VANISHED, f"{engine.name} no longer has its container")
        except RuntimeFailure as error:
            if not sandbox.connected:
                self.note(sandbox, Event.UNREACHABLE, str(error))
            elif sandbox.record.state is not State.PAUSED:
                # Its init is there, and so is what runs in it. What its engine cannot say now, a sweep asks again.
                sandbox.change(Event.ADOPTED)
        else:
            if facts.state is ContainerState.RUNNING:
                if not (sandbox.connected and sandbox.record.state is State.RUNNING):
                    await self.adopt(sandbox, engine, container_id, why=why)
            elif facts.state is ContainerState.PAUSED:
                if sandbox.record.state is not State.PAUSED:
                    sandbox.change(Event.PAUSE, reason=reconcile.PAUSED)
            elif sandbox.record.state is not State.STOPPED:
                # Of one that was to stop it matters to nobody how its init took it.
                asked = stopped_by_us or sandbox.record.state is State.STOPPING
                self.note(sandbox, Event.EXITED, "" if asked else _why_stopped(facts))

    async def adopt(self, sandbox: Sandbox, engine: Engine, container_id: str, *, why: str = "") -> None:
        """Connect to a container that runs, unless we are, and book it as running, or as out of reach."""
        try:
            if not sandbox.connected:
                # A start that was cut short may have left the stage.
                sandbox.clear_stages()
                await sandbox.connect(container_id, engine, programs_of(sandbox))
                await sandbox.adopt_commands()
            self.enforcer.prove_again(sandbox)
            require_proof(sandbox)
        except (Failure, InitError, RuntimeFailure, OSError) as error:
            self.note(sandbox, Event.UNREACHABLE, str(error))
            return
        sandbox.change(Event.ADOPTED, why=why, container_id=container_id)
        if sandbox.record.launch == "warm":
            # Nobody knows whether a former daemon came to tell the engine, nor what a paused one has missed.
            self.engine_records.stale(sandbox)
        await self._attachments.attach(sandbox)

    @staticmethod
    def note(sandbox: Sandbox, event: Event, reason: str) -> None:
        """Book what was seen of a sandbox that does not run, or does not answer."""
        if sandbox.connected or event is not Event.UNREACHABLE:
            # What was out of reach before may go on in there all the same.
            sandbox.disconnect()
        sandbox.change(event, reason=reason)

    def disconnect_all(self) -> None:
        """Let go of every sandbox; they and their commands go on."""
        for sandbox in self._sandboxes.values():
            sandbox.release()

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


async def _remove_thawed(engine: Engine, container_id: str) -> None:
    """Remove a container. One that is frozen cannot die of any signal on cgroup v1, and is thawed if it must be."""
    try:
        await engine.remove(container_id)
    except EngineRefused:
        with contextlib.suppress(RuntimeFailure):
            await engine.resume(container_id)
        await engine.remove(container_id)


def _gone(sandbox: Sandbox) -> SandboxGone:
    return SandboxGone(
        f"cannot start sandbox {sandbox.record.id}",
        detail=sandbox.record.state_reason,
        hint=f"sandboxctl rm {sandbox.record.id}",
    )


def _why_stopped(facts: ContainerFacts) -> str:
    if facts.oom_killed:
        return "its init was killed for memory"
    return "its init ended" if facts.exit_code is None else f"its init ended with {facts.exit_code}"
