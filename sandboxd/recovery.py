"""Making the journal, the engines and this process agree again: after a start, and now and then.

``reconcile`` decides, this carries out. What fails is logged and tried again by the next sweep.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, assert_never

import anyio
import anyio.lowlevel
import anyio.to_thread

from runtimes import mounts, mounttable
from runtimes.engine import Engine
from runtimes.errors import RuntimeFailure
from runtimes.model import ContainerSummary, EngineName
from sandboxd import rebuilding, reconcile
from sandboxd.engines import EngineRoom
from sandboxd.failures import Failure
from sandboxd.journal import Journal
from sandboxd.lifecycle import Event, State
from sandboxd.manager import Manager, Places
from sandboxd.sandbox import Sandbox, erase_box
from sandboxd.spool import sweep as sweep_spools

logger = logging.getLogger(__name__)

SWEEP_PERIOD_S = 60.0
"""How often containers that nobody owns are looked for."""
SWEEP_AFTER_START_S = (1.0, 5.0, 20.0)
"""And after a start: an engine may still be finishing what a killed daemon had asked for."""

_NOTED = {
    reconcile.Action.NOTE_PAUSED: State.PAUSED,
    reconcile.Action.NOTE_STOPPED: State.STOPPED,
    reconcile.Action.NOTE_LOST: State.LOST,
}
"""The state that is written down; of a sandbox that is in it already there is no news."""

_SEEN_AGAIN = {reconcile.Action.ADOPT, *_NOTED}
"""What is done only if the engine still says so, where requests were served since it was asked."""


class Repaired(NamedTuple):
    """What a repair of the journal has done."""

    aside: str
    """Where the damaged file is now; empty: it was not damaged."""
    rebuilt: list[str]
    """Ids of the sandboxes that only their containers were left of."""
    unseen: tuple[str, ...]
    """Engines that could not be asked; what they have is taken in when they answer."""


class _Seen(NamedTuple):
    """What the engines said, and what was known when they were asked."""

    before: dict[str, State]
    listed: dict[str, Sequence[ContainerSummary]]


class Finding(NamedTuple):
    """Something that is not as it should be, or is nobody's; see ``protocol.GcFinding``."""

    kind: str
    name: str
    engine: str
    action: str
    reason: str


class Recovery:
    """Recovers the sandboxes of one manager.

    Args:
        went_down: What lasts as long as a boot, or as a user's last login, is not there any more.
    """

    def __init__(
        self, manager: Manager, *, engines: EngineRoom, journal: Journal, places: Places, went_down: bool = False
    ) -> None:
        self._manager = manager
        self._engines = engines
        self._journal = journal
        self._boxes_dir = places.boxes_dir
        self._spools_dir = places.spools_dir
        self._layers_dir = places.layers_dir
        self._bin_dir = places.bin_dir
        self._went_down = went_down
        self._sweeping = anyio.Lock()
        """Held by whoever looks at everything: one that looked before another acted would act on it again."""

    async def recover(self) -> None:
        """Make the journal, the engines and this process agree again, after a start."""
        torn = self._journal.damaged
        for record in self._journal.sandboxes():
            self._manager.register(record).commands_lost = torn
        listed = await self._listed()
        await self._rebuild(listed)
        decisions = self._decide(listed, went_down=self._went_down)
        # Each sandbox is looked for in our own mounts, twice.
        with mounttable.kept():
            async with anyio.create_task_group() as tasks:
                for decision in decisions:
                    tasks.start_soon(self._carry_out, decision)
        for sandbox in self._manager.all():
            if not sandbox.connected:
                await sandbox.adopt_commands()
        if torn or self._journal.unseen_engines:
            logger.warning("the journal is damaged: outputs, layers and directories of nobody may be somebody's")
            return
        known = {
            sandbox.record.id: [command.id for command in self._journal.commands(sandbox.record.id)]
            for sandbox in self._manager.all()
        }
        await self._clear(known)

    async def _clear(self, known: Mapping[str, Collection[int]]) -> None:
        """Remove from the host what is of no sandbox."""
        spared = self._journal.unreadable
        for name in await sweep_spools(self._spools_dir, known, spared):
            logger.info("removed the output of a command that nobody knows: %s", name)
        self._manager.sweep_layers_soon(spared)
        for name in set(os.listdir(self._boxes_dir)) - known.keys() - spared:
            try:
                erase_box(os.path.join(self._boxes_dir, name))
            except OSError as error:
                logger.warning("cannot clear %s: %s", name, error)

    def _decide(
        self, listed: Mapping[str, Sequence[ContainerSummary]], *, went_down: bool = False
    ) -> list[reconcile.Decision]:
        """What to do; a container whose record may have been lost is nobody's to remove."""
        records = [sandbox.record for sandbox in self._manager.all()]
        unseen, unreadable = self._journal.unseen_engines, self._journal.unreadable
        return [
            decision
            for decision in reconcile.decide(records, listed, reachable=set(listed), went_down=went_down)
            if decision.action is not reconcile.Action.REMOVE_CONTAINER
            or (decision.engine not in unseen and decision.sandbox_id not in unreadable)
        ]

    async def _rebuild(self, listed: Mapping[str, Sequence[ContainerSummary]]) -> list[str]:
        """Make records for containers of ours whose records were lost; returns their ids."""
        made, seen = [], set()
        for name, containers in listed.items():
            whole = True
            for container in containers:
                lost = name in self._journal.unseen_engines or container.sandbox_id in self._journal.unreadable
                if not (lost and container.named_by_us) or self._manager.find(container.sandbox_id) is not None:
                    continue
                engine = self._engines.get(EngineName(name))
                directory = os.path.join(self._boxes_dir, container.sandbox_id)
                try:
                    record = await rebuilding.rebuilt(container, engine, directory)
                except RuntimeFailure as error:
                    logger.warning("cannot rebuild the record of %s yet: %s", container.sandbox_id, error)
                    whole = False
                    continue
                logger.warning("rebuilt the record of %s from its container", record.id)
                self._journal.keep(record)
                self._manager.register(record).commands_lost = True
                made.append(record.id)
            if whole:
                seen.add(name)
        self._journal.note_seen(seen)
        return made

    async def repair(self) -> Repaired:
        """Have a journal that is whole: of what is known, and of what the engines have.

        Raises:
            JournalUnusable: the disk does not take it.
        """
        rebuilt = await self._rebuild(await self._listed())
        aside = self._journal.repair()
        if rebuilt:
            await self.sweep()
        return Repaired(aside=aside, rebuilt=rebuilt, unseen=self._journal.unseen_engines)

    async def _listed(self) -> dict[str, Sequence[ContainerSummary]]:
        """Our containers by engine; an engine that does not answer is not in it."""
        listed: dict[str, Sequence[ContainerSummary]] = {}

        async def ask(engine: Engine) -> None:
            try:
                listed[engine.name.value] = await engine.list_containers(owner=self._manager.owner)
            except RuntimeFailure as error:
                logger.warning("cannot list the containers of %s: %s", engine.name, error)

        async with anyio.create_task_group() as tasks:
            for engine in self._engines.usable():
                tasks.start_soon(ask, engine)
        return listed

    async def _carry_out(self, decision: reconcile.Decision, *, later: bool = False) -> None:
        """Do it.

        Args:
            decision: What was decided.
            later: Requests were served since the engines were asked: what these said is a reason to look again.
        """
        sandbox = self._manager.find(decision.sandbox_id)
        known = sandbox is not None and sandbox.record.state is _NOTED.get(decision.action)
        log = logger.info if known or decision.action is reconcile.Action.ADOPT else logger.warning
        log("%s %s: %s", decision.action.value, decision.sandbox_id, decision.reason or "as it was left")
        try:
            if decision.action is reconcile.Action.REMOVE_CONTAINER:
                if decision.container is not None:
                    container_id = decision.container.container_id
                    await self._engines.get(EngineName(decision.engine)).remove(container_id)
                    self._manager.tell_of_stray(
                        decision.sandbox_id, reason=decision.reason, engine=decision.engine, container=container_id
                    )
            elif sandbox is not None:
                async with sandbox.lock:
                    if later and decision.action in _SEEN_AGAIN and sandbox.record.container_id is not None:
                        await self._manager.look(sandbox, why=decision.reason)
                    else:
                        await self._settle(sandbox, decision)
        except Exception as error:  # noqa: BLE001  (one sandbox must never keep the daemon from starting)
            logger.warning("cannot %s %s: %s", decision.action.value, decision.sandbox_id, error)

    async def _settle(self, sandbox: Sandbox, decision: reconcile.Decision) -> None:
        match decision.action:
            case reconcile.Action.ADOPT:
                if decision.container is not None:
                    engine = self._manager.engine_of(sandbox)
                    await self._manager.adopt(sandbox, engine, decision.container.container_id, why=decision.reason)
            case reconcile.Action.NOTE_PAUSED:
                sandbox.change(Event.PAUSE, reason=decision.reason)
            case reconcile.Action.NOTE_STOPPED:
                self._manager.note(sandbox, Event.EXITED, decision.reason)
            case reconcile.Action.NOTE_LOST:
                self._manager.note(sandbox, Event.VANISHED, decision.reason)
            case reconcile.Action.NOTE_UNREACHABLE:
                record = sandbox.record
                unknown = record.state in (State.CREATING, State.RESERVED, State.REMOVING)
                if unknown or record.ephemeral or record.slot:
                    # Nobody waits for it: it goes as soon as its engine answers again.
                    sandbox.change(Event.REMOVE, reason=decision.reason)
                else:
                    self._manager.note(sandbox, Event.UNREACHABLE, decision.reason)
            case reconcile.Action.FORGET:
                sandbox.change(Event.REMOVE, reason=decision.reason)
                await self._manager.remove_from_engine(sandbox)
                self._manager.forget(sandbox)
            case reconcile.Action.REMOVE_CONTAINER:
                raise AssertionError("not about a sandbox")
            case _:
                assert_never(decision.action)

    async def sweep_periodically(self) -> None:
        """Look for containers of ours that nobody owns, a few times soon after the start and then now and then."""
        for pause_s in itertools.chain(SWEEP_AFTER_START_S, itertools.repeat(SWEEP_PERIOD_S)):
            await anyio.sleep(pause_s)
            await self.try_sweep()

    async def try_sweep(self) -> None:
        """Sweep; what cannot be done now is logged, and done by a later one."""
        try:
            await self.sweep()
        except (RuntimeFailure, Failure, OSError) as error:
            logger.warning("cannot sweep: %s", error)

    async def sweep(self) -> None:
        """Remove what nobody owns, finish removals that failed, and find again what was out of reach.

        And write limits again that somebody has changed behind our back: an engine, systemd, an administrator.
        """
        async with self._sweeping:
            await self._sweep()

    async def _sweep(self) -> None:
        usable = {engine.name.value for engine in self._engines.usable()}
        if any(sandbox.record.engine not in usable for sandbox in self._manager.all()):
            await self._engines.refresh()
        self._journal.catch_up()
        for decision in await self._due(await self._look()):
            await self._carry_out(decision, later=True)
        for sandbox in self._manager.all():
            self._manager.enforcer.restore(sandbox)
            await anyio.lowlevel.checkpoint()

    async def _look(self) -> _Seen:
        before = {sandbox.record.id: sandbox.record.state for sandbox in self._manager.all()}
        return _Seen(before, await self._listed())

    async def _due(self, seen: _Seen) -> list[reconcile.Decision]:
        """What a sweep would do about what was seen; what was lost with the journal is taken in before."""
        await self._rebuild(seen.listed)
        return [
            decision
            for decision in self._decide(seen.listed)
            if decision.action is reconcile.Action.REMOVE_CONTAINER
            or self._is_due(decision, seen.before.get(decision.sandbox_id))
        ]

    async def collect(self, *, dry_run: bool) -> tuple[list[Finding], list[str]]:
        """Find what is nobody's, and what is not as its record says; deal with it, unless it is only looked for.

        Returns:
            What was found, and the engines that did not answer.
        """
        async with self._sweeping:
            return await self._collect(dry_run=dry_run)

    async def _collect(self, *, dry_run: bool) -> tuple[list[Finding], list[str]]:
        await self._engines.refresh()
        seen = await self._look()
        due = await self._due(seen)
        found = [_finding(decision) for decision in due]
        leftovers = self._leftovers()
        found += [
            Finding(kind, path, "", "remove", "no sandbox knows it")
            for kind, paths in leftovers.items()
            for path in paths
        ]
        if not dry_run:
            for decision in due:
                await self._carry_out(decision, later=True)
            await self._remove(leftovers)
        return found, sorted({engine.name.value for engine in self._engines.usable()} - seen.listed.keys())

    def _leftovers(self) -> dict[str, list[str]]:
        """Directories of ours on the host that belong to no sandbox, by what is in them.

        Nothing waits between the look and the comparison: what a sandbox has is made after it is known. Where not
        every record is known, nothing is nobody's.
        """
        if self._journal.damaged or self._journal.unseen_engines:
            return {}
        places = {"output": self._spools_dir, "layer": self._layers_dir, "directory": self._boxes_dir}
        listed = {kind: _names_in(place) for kind, place in places.items()}
        known = {sandbox.record.id for sandbox in self._manager.all()} | self._journal.unreadable
        found = {
            kind: [os.path.join(places[kind], name) for name in names if name not in known]
            for kind, names in listed.items()
        }
        return {**found, "programs": self._unused_programs()}

    def _unused_programs(self) -> list[str]:
        """None where it is not known of every sandbox which ones it was made with: it has them mounted."""
        used = {self._bin_dir, *(sandbox.record.bin_dir for sandbox in self._manager.all())}
        if "" in used or self._journal.unreadable:
            return []
        programs = os.path.dirname(self._bin_dir)
        return [path for name in _names_in(programs) if (path := os.path.join(programs, name)) not in used]

    async def _remove(self, leftovers: Mapping[str, Sequence[str]]) -> None:
        for kind, paths in leftovers.items():
            for path in paths:
                logger.warning("remove %s: no sandbox knows it", path)
                try:
                    match kind:
                        case "layer":
                            await self._manager.workspaces.erase(os.path.basename(path))
                        case "directory":
                            erase_box(path)
                        case _:
                            await anyio.to_thread.run_sync(mounts.remove_tree, path)
                except OSError as error:
                    logger.warning("cannot remove %s: %s", path, error)

    def _is_due(self, decision: reconcile.Decision, before: State | None) -> bool:
        """Whether a sweep may act: what is under way is left to whoever does it.

        Args:
            decision: What it would do.
            before: The sandbox's state when the engines were asked; None: there was none.
        """
        sandbox = self._manager.find(decision.sandbox_id)
        if sandbox is None or sandbox.lock.locked():
            return False
        match decision.action:
            case reconcile.Action.FORGET:
                # The engines could not know of a slot that was made while they were asked.
                return sandbox.record.state is State.REMOVING or (
                    sandbox.record.slot and before is sandbox.record.state
                )
            case reconcile.Action.ADOPT | reconcile.Action.NOTE_STOPPED:
                # Running, and yet not connected: whoever noticed could not write it down.
                silent = sandbox.record.state is State.RUNNING and not sandbox.connected
                return silent or sandbox.record.state in (State.BROKEN, State.LOST, State.PAUSED)
            case reconcile.Action.NOTE_PAUSED:
                return sandbox.record.state is not State.PAUSED
            case reconcile.Action.NOTE_LOST:
                return sandbox.record.state in (State.BROKEN, State.STOPPED)
            case _:
                return False


def _finding(decision: reconcile.Decision) -> Finding:
    if decision.action is reconcile.Action.REMOVE_CONTAINER:
        name = decision.sandbox_id if decision.container is None else decision.container.container_id
        return Finding("container", name, decision.engine, "remove", decision.reason)
    return Finding("sandbox", decision.sandbox_id, decision.engine, decision.action.value, decision.reason)


def _names_in(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
