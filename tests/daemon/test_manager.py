"""The use cases when an engine fails them: what is undone, what is kept, and what is finished later."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from runtimes.errors import EngineRefused, EngineTimeout, EngineUnavailable, ImageNotFound, RuntimeFailure
from runtimes.inotify import Inotify
from runtimes.model import ContainerSpec, ContainerSummary, EngineInfo, Limits, User
from runtimes.usernet import UserNetworks
from sandboxd import health, reconcile, running
from sandboxd.attaching import Attachments
from sandboxd.background import Background
from sandboxd.config import Capacity, Config, Daemon, Template
from sandboxd.engines import EngineRoom
from sandboxd.failures import CapacityExceeded, Conflict, InvalidArgument, NotFound, SandboxGone
from sandboxd.journal import Journal
from sandboxd.launching import Launcher
from sandboxd.lifecycle import State
from sandboxd.limits import Host
from sandboxd.manager import Caller, Manager, Places
from sandboxd.network.outside import Outside
from sandboxd.protocol import LimitsParams, SandboxCreateParams
from sandboxd.records import CommandRecord, EgressRecord, SandboxRecord
from sandboxd.recovery import Recovery
from sandboxd.secret_store import SecretStore
from sandboxd.services.room import ServiceRoom
from sandboxd.timings import Timings
from sandboxd.translation import failure_from
from sandboxd.uplinks import Uplinks
from tests.fakes.fake_engine import FakeEngine
from tests.unit.records import record

pytestmark = pytest.mark.anyio

IMAGE = "localhost/sandboxd/default:latest"
UNAVAILABLE = EngineUnavailable("cannot reach podman", detail="nobody answers", hint="podman info")
REFUSED = EngineRefused("cannot create a container", detail="the disk is full")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of the fake engine have no init, and nobody is to wait for one."""
    monkeypatch.setattr("sandboxd.sandbox.INIT_DEADLINE_S", 0.05)


class World:
    """A manager over one fake engine, and what is written down."""

    def __init__(self, directory: Path) -> None:
        self.engine = FakeEngine(images=(IMAGE,))
        self.boxes = directory / "boxes"
        self.boxes.mkdir()
        self.journal = Journal.open(str(directory / "journal.sqlite3"))
        self.bin_dir = str(directory / "programs" / "now")
        self.room: EngineRoom
        self.background: Background
        self.manager: Manager
        self.launcher: Launcher
        self.recovery: Recovery
        self.secrets = SecretStore(str(directory / "secrets"))
        self.told: list[tuple[str, str, str | int | None]] = []
        """Kind, sandbox and reason of each event."""

    @asynccontextmanager
    async def managed(self, config: Config | None = None) -> AsyncIterator[Manager]:
        """A manager as a daemon has one, for as long as that daemon lives."""

        async def detect() -> Sequence[EngineInfo]:
            return [self.engine.info]

        room = EngineRoom(detect, lambda _info, _limiter: self.engine, calls_max=3)
        await room.refresh()
        inotify = Inotify()
        places = Places(
            boxes_dir=str(self.boxes),
            bin_dir=self.bin_dir,
            seccomp_profile="/seccomp.json",
            spools_dir=str(self.boxes.parent / "spools"),
            layers_dir=str(self.boxes.parent / "layers"),
            private_dirs=(),
        )
        self.room = room
        async with anyio.create_task_group() as tasks:
            self.background = background = Background(tasks)
            services = ServiceRoom(config or Config(), str(self.boxes.parent / "services"), list)
            settings = config or Config()
            host = Host(cpus_online=(0, 1), memory_bytes=2**33, swap_bytes=0, pid_max=2**22, nr_open=2**20)
            caller = Caller(user=User(uid=1000, gid=1000), home="/home/somebody")
            uplinks = Uplinks(background, room, UserNetworks(self.journal.owner(), {}))
            attachments = Attachments(background, services, Outside(), uplinks, self.secrets.reveal)
            self.manager = Manager(
                background,
                config=settings,
                host=host,
                caller=caller,
                places=places,
                journal=self.journal,
                engines=room,
                userns_fd=None,
                inotify=inotify,
                attachments=attachments,
                mounter=None,
                secrets=self.secrets,
                tell=lambda kind, sandbox, _, data: self.told.append((kind, sandbox, data.get("reason"))),
            )
            self.launcher = Launcher(
                self.manager,
                background,
                config=settings,
                host=host,
                caller=caller,
                bin_dir=places.bin_dir,
                journal=self.journal,
                engines=room,
                services=services,
                attachments=attachments,
                secrets=self.secrets,
                idmap_works=False,
                memory_available=lambda: 2**33,
            )
            self.recovery = Recovery(self.manager, engines=room, journal=self.journal, places=places)
            yield self.manager
            tasks.cancel_scope.cancel()
        inotify.close()

    async def container_of(self, box: SandboxRecord) -> SandboxRecord:
        """A container for a record, as a former daemon had made it; the record with its id."""
        container_id = await self.engine.create(
            ContainerSpec(
                sandbox_id=box.id,
                owner=self.journal.owner(),
                image=IMAGE,
                command=("/init",),
                user=box.user,
                seccomp_profile="/seccomp.json",
            )
        )
        found = record(id=box.id, state=box.state, ephemeral=box.ephemeral, container_id=container_id)
        self.journal.put(found)
        return found

    async def containers(self) -> list[str]:
        return [row.container_id for row in await self.engine.list_containers(owner=self.journal.owner())]

    async def assert_empty(self) -> None:
        assert self.manager.all() == []
        assert self.journal.sandboxes() == []
        assert await self.containers() == []
        assert os.listdir(self.boxes) == []


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.journal.close()


@pytest.mark.parametrize(
    ("said", "type_"),
    [
        (REFUSED, "engine_refused"),
        (EngineTimeout("cannot create a container", detail="`podman run` took too long"), "engine_unavailable"),
        (UNAVAILABLE, "engine_unavailable"),
        (ImageNotFound("cannot create a container", hint="sandboxctl image build"), "prerequisite_missing"),
    ],
    ids=["refused", "timeout", "unavailable", "no image"],
)
async def test_a_create_that_the_engine_fails_leaves_nothing(world: World, said: RuntimeFailure, type_: str) -> None:
    """And what the engine said arrives as it was: nobody can mend "something went wrong"."""
    async with world.managed():
        world.engine.fail_next("create", said)
        with pytest.raises(RuntimeFailure) as caught:
            await world.launcher.create(SandboxCreateParams(), Timings())
        failure = failure_from(caught.value)
        assert (failure.type, failure.detail, failure.hint) == (type_, said.detail, said.hint)
        assert "remove_sandbox" in world.engine.calls, "a client that failed may have left a container"
        await world.assert_empty()


async def test_a_container_whose_init_is_silent_is_removed(world: World) -> None:
    async with world.managed():
        with pytest.raises(SandboxGone):
            await world.launcher.create(SandboxCreateParams(), Timings())
        await world.assert_empty()


async def test_an_image_that_is_not_there_is_the_engines_word(world: World) -> None:
    async with world.managed():
        with pytest.raises(ImageNotFound):
            await world.launcher.create(SandboxCreateParams(image="localhost/no/such:image"), Timings())
        await world.assert_empty()


async def test_an_image_or_a_sandbox_that_is_not_there_is_told_from_one_that_was_meant(world: World) -> None:
    """The name of an image is compared as people write it."""
    async with world.managed() as manager:
        with pytest.raises(ImageNotFound) as missed:
            await world.launcher.create(SandboxCreateParams(image="sandboxd/default2"), Timings())
        hint = f"{world.engine.name} pull sandboxd/default2"
        assert missed.value.hint == f"did you mean sandboxd/default? else: {hint}"
        world.engine.fail_next("list_images", UNAVAILABLE)
        with pytest.raises(ImageNotFound) as missed:
            await world.launcher.create(SandboxCreateParams(image="sandboxd/default2"), Timings())
        assert missed.value.hint == hint
        manager.register(record(name="web"))
        with pytest.raises(NotFound) as caught:
            manager.get("wbe")
        assert caught.value.hint == "did you mean web? else: sandboxctl ls"


async def test_what_a_failed_create_cannot_undo_is_undone_by_the_next_sweep(world: World) -> None:
    """An engine that stops answering in the middle must not leave a container that nobody owns."""
    async with world.managed() as manager:
        world.engine.fail_next("remove_sandbox", UNAVAILABLE)
        with pytest.raises(SandboxGone):
            await world.launcher.create(SandboxCreateParams(), Timings())
        (left,) = manager.all()
        assert left.record.state is State.REMOVING
        assert "nobody answers" not in left.record.state_reason, "it is one clause"
        assert [row.state for row in world.journal.sandboxes()] == [State.REMOVING]
        assert len(await world.containers()) == 1
        await world.recovery.sweep()
        await world.assert_empty()


async def test_a_removal_that_failed_says_so_and_is_finished_by_the_next_sweep(world: World) -> None:
    async with world.managed() as manager:
        await world.container_of(record(state=State.STOPPED))
        await world.recovery.recover()
        (box,) = manager.all()
        world.engine.fail_next("remove", UNAVAILABLE)
        with pytest.raises(EngineUnavailable):
            await manager.remove(box, Timings())
        assert box.record.state is State.REMOVING
        assert manager.present() == [box], "what is not gone is to be seen"
        assert "not gone yet" in box.record.state_reason
        assert len(await world.containers()) == 1
        await world.recovery.sweep()
        await world.assert_empty()


@pytest.mark.parametrize(
    ("before", "level", "reason"),
    [(State.STOPPED, logging.INFO, "as it was left"), (State.RUNNING, logging.WARNING, "its container is exited")],
)
async def test_a_start_warns_of_what_has_ended_and_not_of_what_was_stopped(
    world: World, before: State, level: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever looks for warnings sees what went wrong; and no line is without a reason."""
    caplog.set_level(logging.INFO)
    box = await world.container_of(record(state=before))
    world.engine.end(str(box.container_id))
    async with world.managed():
        await world.recovery.recover()
    assert ("sandboxd.recovery", level, f"note_stopped {box.id}: {reason}") in caplog.record_tuples


async def test_a_removal_that_failed_can_be_asked_for_again(world: World) -> None:
    async with world.managed() as manager:
        await world.container_of(record(state=State.STOPPED))
        await world.recovery.recover()
        (box,) = manager.all()
        world.engine.fail_next("remove", UNAVAILABLE)
        with pytest.raises(EngineUnavailable):
            await manager.remove(box, Timings())
        await manager.remove(box, Timings())
        await world.assert_empty()


async def test_a_sandbox_that_was_paused_is_paused_for_the_next_daemon(world: World) -> None:
    """And it can be used for nothing, with the command that mends it."""
    box = await world.container_of(record(state=State.PAUSED))
    await world.engine.pause(str(box.container_id))
    async with world.managed() as manager:
        await world.recovery.recover()
        (kept,) = manager.all()
        assert (kept.record.state, kept.record.state_reason) == (State.PAUSED, "")
        for ask in (lambda: running.require_running(kept), lambda: running.require_awake(kept)):
            with pytest.raises(Conflict, match="paused") as caught:
                ask()
            assert caught.value.hint == f"sandboxctl resume {kept.record.id}"
        with pytest.raises(Conflict, match="files") as caught:
            await kept.files()
        assert caught.value.hint == f"sandboxctl resume {kept.record.id}"
        with pytest.raises(SandboxGone, match="cannot resume"):
            await manager.resume(kept, Timings())
        assert "resume" in world.engine.calls
        assert kept.record.state is State.BROKEN, "the fake engine has no init to go on with"
        await manager.remove(kept, Timings())
        await world.assert_empty()


@pytest.mark.parametrize("answers", [True, False], ids=["paused", "its engine does not answer"])
async def test_commands_that_init_cannot_tell_of_run_until_it_is_known_that_they_do_not(
    world: World, *, answers: bool
) -> None:
    """A daemon that starts where a sandbox is frozen, or out of reach, and then sees it stopped, loses no record."""
    box = await world.container_of(record(state=State.PAUSED if answers else State.RUNNING))
    ran = CommandRecord(id=7, argv=("sleep", "9"), started_at_ms=5, deadline_at_ms=None, grace_s=2.0)
    world.journal.put_command(box.id, ran)
    if answers:
        await world.engine.pause(str(box.container_id))
    else:
        world.engine.fail_next("list_containers", UNAVAILABLE)
    async with world.managed() as manager:
        await world.recovery.recover()
        (kept,) = manager.all()
        if not answers:
            # It has no init here: it stays out of reach, and nothing is known of what goes on inside.
            await world.recovery.sweep()
            assert kept.record.state is State.BROKEN
        assert [(row.argv, row.state) for row in kept.commands.infos()] == [(["sleep", "9"], "running")]
        await manager.stop(kept, 0)
        assert kept.record.state is State.STOPPED
        (row,) = kept.commands.infos()
        assert row.end is not None
        assert (row.state, row.end.status) == ("ended", "lost")
        assert [command.end for command in world.journal.commands(box.id)] == [row.end]
        await manager.remove(kept, Timings())
        await world.assert_empty()


async def test_a_slot_that_was_made_while_the_engines_were_asked_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that they should have known of goes."""
    async with world.managed() as manager:

        async def nothing(*, owner: str) -> list[ContainerSummary]:
            if not manager.all():
                made = record(state=State.WARM, slot=True, container_id="c" * 64)
                world.journal.put(made)
                manager.register(made)
            return []

        monkeypatch.setattr(world.engine, "list_containers", nothing)
        await world.recovery.sweep()
        assert [slot.record.state for slot in manager.all()] == [State.WARM]
        await world.recovery.sweep()
        assert manager.all() == []


async def test_what_was_paused_or_unpaused_behind_our_back_is_noticed(world: World) -> None:
    box = await world.container_of(record())
    await world.engine.pause(str(box.container_id))
    async with world.managed() as manager:
        world.engine.fail_next("list_containers", UNAVAILABLE)
        await world.recovery.recover()
        (kept,) = manager.all()
        await world.recovery.sweep()
        assert (kept.record.state, kept.record.state_reason) == (State.PAUSED, reconcile.PAUSED)
        await world.engine.resume(str(box.container_id))
        await world.recovery.sweep()
        assert "resume" not in world.engine.calls[-1:]
        assert kept.record.state is State.BROKEN, "it was connected to again, and has no init"


async def test_what_is_frozen_and_so_cannot_die_is_thawed_to_be_removed(world: World) -> None:
    async with world.managed() as manager:
        box = await world.container_of(record(state=State.PAUSED))
        await world.engine.pause(str(box.container_id))
        await world.recovery.recover()
        (kept,) = manager.all()
        world.engine.fail_next("remove", REFUSED)
        await manager.remove(kept, Timings())
        assert world.engine.calls[-3:] == ["remove", "resume", "remove"]
        await world.assert_empty()


async def test_a_pause_that_the_engine_refuses_changes_nothing(world: World) -> None:
    async with world.managed() as manager:
        await world.container_of(record(state=State.STOPPED))
        world.engine.end(next(iter(await world.containers())))
        await world.recovery.recover()
        (box,) = manager.all()
        with pytest.raises(Conflict, match="cannot pause a sandbox that is stopped"):
            await manager.pause(box, Timings())
        with pytest.raises(Conflict) as caught:
            await manager.resume(box, Timings())
        assert caught.value.hint == f"sandboxctl start {box.record.id}"
        assert "pause" not in world.engine.calls


@pytest.mark.parametrize(
    ("verb", "state"), [("pause", State.RUNNING), ("stop", State.RUNNING), ("resume", State.PAUSED)]
)
async def test_an_engine_that_refuses_and_cannot_say_why_costs_nothing_that_runs(
    world: World, verb: str, state: State
) -> None:
    """Its init answers: to take it for lost would end the record of every command in it."""
    async with world.managed() as manager:
        await world.container_of(record(state=State.BROKEN))
        await world.recovery.recover()
        (box,) = manager.all()
        box._channel = SimpleNamespace(close=lambda: None)
        box.put(state=state)
        world.engine.fail_next(verb, REFUSED)
        world.engine.fail_next("inspect", UNAVAILABLE)
        call = {
            "pause": lambda: manager.pause(box, Timings()),
            "stop": lambda: manager.stop(box, 0),
            "resume": lambda: manager.resume(box, Timings()),
        }[verb]
        with pytest.raises(EngineRefused):
            await call()
        assert box.connected
        assert box.record.state is state


async def test_a_kill_waits_for_no_engine(world: World) -> None:
    """An engine takes up to seconds to remove what is dead already: nobody has to wait, and the name is free."""
    async with world.managed() as manager:
        await world.container_of(record(state=State.STOPPED, name="mine"))
        await world.recovery.recover()
        (box,) = manager.all()
        world.engine.hang("remove")
        manager.remove_soon(box)
        assert [row.state for row in world.journal.sandboxes()] == [State.REMOVING]
        for reference in (box.record.id, box.record.id[:6], "mine"):
            with pytest.raises(NotFound):
                manager.get(reference)
        assert manager.present() == []
        assert manager.get(box.record.id, leaving=True) is box
        world.launcher._check_room("mine")
        world.engine.release("remove")
        await box.gone.wait()
        await world.assert_empty()


async def test_a_kill_waits_for_nothing_that_is_under_way(world: World) -> None:
    """A stop has its grace, an update its engine call: what is under way finds the sandbox gone."""
    async with world.managed() as manager:
        world.engine.end(str((await world.container_of(record(state=State.STOPPED))).container_id))
        await world.recovery.recover()
        (box,) = manager.all()
        world.engine.hang("start")
        refused = []

        async def start() -> None:
            with pytest.raises(Conflict, match="it is being removed") as caught:
                await manager.start(box, Timings())
            refused.append(caught.value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start)
            while "start" not in world.engine.calls:
                await anyio.lowlevel.checkpoint()
            manager.remove_soon(box)
            assert box.leaving
            world.engine.release("start")
        assert refused
        await box.gone.wait()
        await world.assert_empty()


@pytest.mark.parametrize("why", ["", "its container was paused"], ids=["init silent", "engine told"])
async def test_what_becomes_of_a_sandbox_that_is_removed_while_the_engine_is_asked_is_no_defect(
    world: World, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """Its init was silent, or its engine told of something, so the engine is asked; meanwhile its user removes it."""
    async with world.managed() as manager:
        await world.container_of(record(state=State.BROKEN))
        await world.recovery.recover()
        (box,) = manager.all()
        world.engine.hang("inspect")
        if why:
            manager._background.start(functools.partial(manager.look, box, why=why))
        else:
            manager._on_init_lost(box)
        while "inspect" not in world.engine.calls:
            await anyio.lowlevel.checkpoint()
        manager.remove_soon(box)
        world.engine.release("inspect")
        await box.gone.wait()
        assert "a background task failed" not in caplog.text
        await world.assert_empty()


async def test_a_kill_that_the_engine_refuses_is_tried_again_and_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not gone is to be seen, with the reason; nobody has to ask for it a second time."""
    monkeypatch.setattr("sandboxd.manager.REMOVE_PAUSE_S_MIN", 0.0)
    async with world.managed() as manager:
        await world.container_of(record(state=State.STOPPED))
        await world.recovery.recover()
        (box,) = manager.all()
        seen = []
        box.on_changed = lambda: seen.append((box.leaving, box.record.state_reason))
        world.engine.fail_next("remove", UNAVAILABLE)
        world.engine.fail_next("remove", UNAVAILABLE)
        manager.remove_soon(box)
        await box.gone.wait()
        assert world.engine.calls.count("remove") == 3
        assert (False, f"it is not gone yet: {UNAVAILABLE}") in seen
        await world.assert_empty()


async def test_a_kill_that_a_daemon_did_not_finish_is_finished_by_the_next(world: World) -> None:
    await world.container_of(record(state=State.STOPPED))
    async with world.managed() as manager:
        await world.recovery.recover()
        world.engine.hang("remove")
        manager.remove_soon(manager.all()[0])
        while "remove" not in world.engine.calls:
            await anyio.lowlevel.checkpoint()
    world.engine.release("remove")
    assert len(await world.containers()) == 1
    async with world.managed():
        await world.recovery.recover()
        await world.assert_empty()


async def test_a_daemon_that_ends_waits_for_removals_but_not_for_ever(world: World) -> None:
    """``rm`` and then ``daemon stop`` is to leave nothing behind; an engine that hangs is to hold up nobody."""
    async with world.managed() as manager:
        await world.container_of(record(state=State.STOPPED))
        await world.recovery.recover()
        (box,) = manager.all()
        world.engine.hang("remove")
        manager.remove_soon(box)
        await manager.finish_removals(deadline_s=0.05)
        assert not box.gone.is_set()
        world.engine.release("remove")
        with anyio.fail_after(30):
            await manager.finish_removals(deadline_s=60)
        await world.assert_empty()


@pytest.mark.parametrize("state", [State.PAUSED, State.RUNNING])
async def test_what_was_paused_or_resumed_while_the_engines_were_asked_is_no_news(
    world: World, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """By a request of ours: what the engines said of it is old by the time that it is read."""
    box = await world.container_of(record(state=state))
    container_id = str(box.container_id)
    if state is State.RUNNING:
        await world.engine.pause(container_id)
    listed = world.engine.list_containers

    async def said_too_early(*, owner: str) -> list[ContainerSummary]:
        said = await listed(owner=owner)
        await (world.engine.pause if state is State.PAUSED else world.engine.resume)(container_id)
        return said

    monkeypatch.setattr(world.engine, "list_containers", said_too_early)
    async with world.managed() as manager:
        kept = manager.register(box)
        monkeypatch.setattr(type(kept), "connected", True)
        await world.recovery.sweep()
        assert (kept.record.state, kept.record.state_reason) == (state, box.state_reason)
        monkeypatch.undo()


async def test_a_sandbox_whose_engine_does_not_answer_is_kept_and_looked_at_again(world: World) -> None:
    """An engine that starts later than the daemon must not cost anybody a sandbox."""
    box = await world.container_of(record())
    async with world.managed() as manager:
        world.engine.fail_next("list_containers", UNAVAILABLE)
        await world.recovery.recover()
        (kept,) = manager.all()
        assert kept.record.state is State.BROKEN
        assert "does not answer" in kept.record.state_reason
        assert await world.containers() == [box.container_id]
        world.engine.end(str(box.container_id))
        await world.recovery.sweep()
        assert (kept.record.state, kept.record.state_reason) == (State.STOPPED, "its init ended with 0")


@pytest.mark.parametrize(
    "left",
    [record(state=State.CREATING, container_id=None), record(state=State.REMOVING), record(ephemeral=True)],
    ids=["being created", "being removed", "ephemeral"],
)
async def test_what_nobody_waits_for_goes_as_soon_as_its_engine_answers(world: World, left: SandboxRecord) -> None:
    await world.container_of(left)
    world.journal.put(left)
    async with world.managed() as manager:
        world.engine.fail_next("list_containers", UNAVAILABLE)
        await world.recovery.recover()
        assert [box.record.state for box in manager.all()] == [State.REMOVING]
        await world.recovery.sweep()
        await world.assert_empty()


async def test_a_stopped_sandbox_whose_container_vanished_is_lost(world: World) -> None:
    """Docker tells of the end of a container before it has removed it."""
    box = await world.container_of(record(state=State.STOPPED))
    async with world.managed() as manager:
        world.engine.end(str(box.container_id))
        await world.recovery.recover()
        (kept,) = manager.all()
        assert kept.record.state is State.STOPPED
        await world.engine.remove(str(box.container_id))
        await world.recovery.sweep()
        assert kept.record.state is State.LOST
        await manager.remove(kept, Timings())
        await world.assert_empty()


async def test_a_container_with_our_label_that_nobody_owns_is_removed_and_others_are_not(world: World) -> None:
    async with world.managed():
        await world.container_of(record(id="sb-nobodys111"))
        world.journal.delete("sb-nobodys111")
        foreign = await world.engine.create(
            ContainerSpec(
                sandbox_id="sb-foreign111",
                owner="somebody-else",
                image=IMAGE,
                command=("/init",),
                user=User(uid=1000, gid=1000),
                seccomp_profile="/seccomp.json",
            )
        )
        (world.boxes / "sb-nobodys111").mkdir()
        await world.recovery.recover()
        await world.assert_empty()
        assert [row.container_id for row in await world.engine.list_containers(owner="somebody-else")] == [foreign]
    assert world.told == [("stray_removed", "sb-nobodys111", "it carries our label and no sandbox owns it")]


async def test_why_a_start_decided_as_it_did_is_told_to_whoever_listens(world: World) -> None:
    """A sandbox that is gone after a restart must not be gone for no reason."""
    dying = record(id="sb-dying11111", ephemeral=True)
    for box in (record(id="sb-lost111111", container_id="c" * 64), record(id="sb-making1111", state=State.CREATING)):
        world.journal.put(box)
    await world.container_of(dying)
    stopped = await world.container_of(record(id="sb-stopped111"))
    world.engine.end(str(stopped.container_id))
    async with world.managed():
        await world.recovery.recover()
    engine = world.engine.name.value
    assert {(kind, box): why for kind, box, why in world.told if kind != "removed"} == {
        ("lost", "sb-lost111111"): f"{engine} no longer has its container",
        ("removing", "sb-making1111"): "the daemon ended while it was created",
        ("removing", "sb-dying11111"): "the connection that it belonged to is gone",
        ("stopped", "sb-stopped111"): "its container is exited",
    }


async def test_a_sweep_leaves_a_create_in_flight_alone(world: World) -> None:
    """Its container may be in the engine's list before its id is known here."""
    async with world.managed() as manager, anyio.create_task_group() as tasks:
        world.engine.hang("inspect")
        world.engine.hang("create")

        async def create() -> None:
            with pytest.raises(SandboxGone):
                await world.launcher.create(SandboxCreateParams(), Timings())

        tasks.start_soon(create)
        while "create" not in world.engine.calls:
            await anyio.lowlevel.checkpoint()
        await world.recovery.sweep()
        assert [box.record.state for box in manager.all()] == [State.CREATING]
        assert {"remove", "remove_sandbox"}.isdisjoint(world.engine.calls)
        world.engine.release("create")


async def test_nonsense_is_refused_before_anything_is_written_down(world: World) -> None:
    async with world.managed():
        refused = [
            SandboxCreateParams(limits=LimitsParams(memory="banana")),
            SandboxCreateParams(limits=LimitsParams(cpus=64)),
            SandboxCreateParams(limits=LimitsParams(memory=2**34)),
        ]
        for params in refused:
            with pytest.raises(InvalidArgument):
                await world.launcher.create(params, Timings())
        assert "create" not in world.engine.calls
        await world.assert_empty()


async def test_there_is_room_for_as_many_as_the_configuration_says(world: World) -> None:
    await world.container_of(record(state=State.STOPPED))
    async with world.managed(Config(daemon=Daemon(sandboxes_max=1))):
        await world.recovery.recover()
        with pytest.raises(CapacityExceeded):
            await world.launcher.create(SandboxCreateParams(), Timings())


async def test_a_reference_is_an_id_or_its_beginning_or_a_name(world: World) -> None:
    for sandbox_id, name in (("sb-abc1111111", "first"), ("sb-abd1111111", None)):
        world.journal.put(record(id=sandbox_id, name=name, state=State.LOST))
    async with world.managed() as manager:
        await world.recovery.recover()
        for reference in ("sb-abc1111111", "sb-abc", "abc", "first"):
            assert manager.get(reference).record.id == "sb-abc1111111"
        for reference, failure in (("sb-ab", InvalidArgument), ("sb-", NotFound), ("x", NotFound)):
            with pytest.raises(failure):
                manager.get(reference)
        with pytest.raises(Conflict):
            await world.launcher.create(SandboxCreateParams(name="first"), Timings())


async def test_sandboxes_with_whole_cpus_are_spread_over_them_if_configured(world: World) -> None:
    """What the engine is told is what is written down; whoever says which CPUs gets those."""
    async with world.managed(Config(capacity=Capacity(pack_cpus=True))) as manager:
        taken = record(id="sb-taken11111", limits=Limits(cpuset_cpus=(0,)))
        manager.register(taken)
        packed = manager.enforcer.packed(Limits(cpu_millis=1000), world.engine.info)
        assert packed.cpuset_cpus == (1,)
        for own in (Limits(cpu_millis=1500), Limits(cpu_millis=1000, cpuset_cpus=(0,)), Limits(cpu_millis=2000)):
            assert manager.enforcer.packed(own, world.engine.info) is own
        with pytest.raises(SandboxGone):
            await world.launcher.create(SandboxCreateParams(limits=LimitsParams(cpus=1)), Timings())
        assert world.engine.specs[-1].limits.cpuset_cpus == (1,)
        box = manager.register(record(id="sb-packed1111", limits=packed, cpus_packed=True))
        assert manager.enforcer._repacked(box, Limits(cpu_millis=2000)).cpuset_cpus == (0, 1), (
            "all, when it may use all"
        )
        assert manager.enforcer._repacked(box, Limits(cpu_millis=1000)).cpuset_cpus == (1,)
        assert manager.enforcer._repacked(box, Limits(pids_max=9)).cpuset_cpus is None
    async with world.managed() as manager:
        own = Limits(cpu_millis=1000)
        assert manager.enforcer.packed(own, world.engine.info) is own
        assert manager.enforcer._repacked(manager.register(taken), own) is own


async def test_a_secret_in_a_templates_variables_is_refused_before_anything_is_made(world: World) -> None:
    """The settings are a file like any other, and what a template says is in every sandbox's record."""
    await world.secrets.put("token", b"canary-77aa01")
    config = Config(templates={"keyed": Template(env={"AUTH": "Bearer canary-77aa01"})})
    async with world.managed(config):
        with pytest.raises(InvalidArgument) as refused:
            await world.launcher.create(SandboxCreateParams(template="keyed"), Timings())
    assert "'AUTH'" in refused.value.brief
    assert world.journal.sandboxes() == []


async def test_a_templates_rules_come_first_and_a_mode_without_rules_does_without_them(world: World) -> None:
    await world.secrets.put("token", b"value")
    rule = "api.example.com X: {token}"
    config = Config(templates={"online": Template(allow=["pypi"], deny=["a.example"], inject=[rule])})
    async with world.managed(config):
        egress = world.launcher._egress
        with_both = egress(SandboxCreateParams(template="online", allow=["npm"]))
        assert with_both == EgressRecord(allow=("pypi", "npm"), deny=("a.example",), inject=(rule,))
        assert egress(SandboxCreateParams(template="online", network="none")) is None
        assert egress(SandboxCreateParams()) is None


@pytest.mark.parametrize("by_itself", [False, True])
async def test_a_start_that_failed_says_that_init_ended_only_where_it_did_so_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch, *, by_itself: bool
) -> None:
    """We end what ran and may not go on, and that is nothing to look for in the image."""
    box = await world.container_of(record(state=State.STOPPED))
    world.engine.end(str(box.container_id))
    begin = world.engine.start

    async def start(container_id: str) -> None:
        await begin(container_id)
        if by_itself:
            world.engine.end(container_id)

    monkeypatch.setattr(world.engine, "start", start)
    async with world.managed() as manager:
        await world.recovery.recover()
        (sandbox,) = manager.all()
        with pytest.raises(SandboxGone):
            await manager.start(sandbox, Timings())
        assert sandbox.record.state is State.STOPPED
        assert sandbox.record.state_reason.startswith("its init ended") is by_itself
        problems = [problem.kind for problem in health.counted(sandbox)]
        assert problems == (["init_gone"] if by_itself else [])
