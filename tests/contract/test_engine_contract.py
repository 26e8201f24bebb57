"""What every engine promises (``runtimes.engine.Engine``), the same for the fake one, Docker and Podman.

Each clause is a function that uses nothing but the contract. All of them must hold for an engine, and none of them
for one that does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from runtimes.engine import Engine
from runtimes.errors import ContainerNotFound, EngineRefused, ImageNotFound, Unsupported
from runtimes.model import (
    ContainerEvent,
    ContainerFacts,
    ContainerSpec,
    ContainerState,
    ContainerSummary,
    EngineInfo,
    EngineName,
    Happening,
    ImageFacts,
    Limits,
    Network,
)
from tests.contract import engines
from tests.contract.engines import Bench
from tests.fakes.fake_engine import ALL_CAPABILITIES, FakeEngine

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
LIMITS = Limits(
    memory_bytes_max=64 * MIB,
    cpu_millis=500,
    pids_max=32,
    cpuset_cpus=(0,),
    shm_bytes_max=16 * MIB,
    nofile_max=1024,
)
NO_SUCH_ID = "f" * 64


async def a_created_container_runs_and_is_listed_with_its_labels(bench: Bench) -> None:
    spec = bench.spec()
    container_id = await bench.engine.create(spec)
    assert await bench.engine.list_containers(owner=bench.owner) == [
        ContainerSummary(
            container_id=container_id,
            sandbox_id=spec.sandbox_id,
            owner=bench.owner,
            state=ContainerState.RUNNING,
        )
    ]


async def another_owner_sees_nothing(bench: Bench) -> None:
    """Two daemons on one engine must never adopt or remove each other's containers."""
    await bench.engine.create(bench.spec())
    assert await bench.engine.list_containers(owner=bench.owner + "x") == []
    assert len(await bench.engine.list_containers(owner=bench.owner)) == 1


async def a_second_create_of_the_same_sandbox_is_refused_and_harms_nothing(bench: Bench) -> None:
    container_id = await bench.engine.create(bench.spec())
    with pytest.raises(EngineRefused):
        await bench.engine.create(bench.spec())
    assert (await bench.engine.inspect(container_id)).state is ContainerState.RUNNING


async def a_missing_image_is_told_apart_and_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(ImageNotFound):
        await bench.engine.create(bench.spec(image="localhost/no/such:image"))
    assert await bench.engine.list_containers(owner=bench.owner) == []


async def stop_and_start_are_idempotent_and_keep_the_container(bench: Bench) -> None:
    container_id = await bench.engine.create(bench.spec())
    for _ in range(2):
        await bench.engine.stop(container_id, grace_s=0)
        facts = await bench.engine.inspect(container_id)
        assert (facts.state, facts.pid) == (ContainerState.EXITED, None)
        assert facts.exit_code in {137, 143}
    for _ in range(2):
        await bench.engine.start(container_id)
        facts = await bench.engine.inspect(container_id)
        assert (facts.state, facts.exit_code) == (ContainerState.RUNNING, None)


async def pause_and_resume_are_idempotent_and_the_engine_knows(bench: Bench) -> None:
    container_id = await bench.engine.create(bench.spec())
    able = bench.engine.info.capabilities
    assert able is not None
    if not able.pause:
        with pytest.raises(Unsupported):
            await bench.engine.pause(container_id)
        return
    for _ in range(2):
        await bench.engine.pause(container_id)
        assert (await bench.engine.inspect(container_id)).state is ContainerState.PAUSED
    for _ in range(2):
        await bench.engine.resume(container_id)
        assert (await bench.engine.inspect(container_id)).state is ContainerState.RUNNING
    await bench.engine.stop(container_id, grace_s=0)
    for ask in (bench.engine.pause, bench.engine.resume):
        with pytest.raises(EngineRefused):
            await ask(container_id)


async def what_is_paused_can_be_removed(bench: Bench) -> None:
    """Nothing in it can take a signal; it must end all the same."""
    container_id = await bench.engine.create(bench.spec())
    able = bench.engine.info.capabilities
    if able is not None and able.pause:
        await bench.engine.pause(container_id)
        assert (await bench.engine.inspect(container_id)).state is ContainerState.PAUSED
    assert len(await bench.engine.list_containers(owner=bench.owner)) == 1
    await bench.engine.remove(container_id)
    assert await bench.engine.list_containers(owner=bench.owner) == []


async def remove_ends_a_running_container_and_is_idempotent(bench: Bench) -> None:
    container_id = await bench.engine.create(bench.spec())
    for _ in range(2):
        await bench.engine.remove(container_id)
        assert await bench.engine.list_containers(owner=bench.owner) == []
    with pytest.raises(ContainerNotFound):
        await bench.engine.inspect(container_id)


async def remove_sandbox_takes_both_labels_exactly(bench: Bench) -> None:
    kept = await bench.engine.create(bench.spec("kept"))
    spec = bench.spec("gone")
    await bench.engine.create(spec)
    assert await bench.engine.remove_sandbox(spec.sandbox_id, owner=bench.owner + "x") == 0
    assert await bench.engine.remove_sandbox(spec.sandbox_id, owner=bench.owner) == 1
    assert await bench.engine.remove_sandbox(spec.sandbox_id, owner=bench.owner) == 0
    assert [row.container_id for row in await bench.engine.list_containers(owner=bench.owner)] == [kept]


async def what_happens_to_its_containers_is_told_whoever_does_it(bench: Bench) -> None:
    """And of nobody else's."""
    container_id = await bench.engine.create(bench.spec())
    told: list[ContainerEvent] = []
    others: list[ContainerEvent] = []
    over: list[str] = []
    seen = {happening: anyio.Event() for happening in Happening}

    def tell(event: ContainerEvent) -> None:
        told.append(event)
        seen[event.happening].set()

    async def follow(owner: str, told: Callable[[ContainerEvent], None]) -> None:
        await bench.engine.follow(owner=owner, told=told)
        over.append(owner)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow, bench.owner, tell)
        tasks.start_soon(follow, bench.owner + "x", others.append)
        with anyio.fail_after(60):
            while not told:
                # From when on it tells, nobody says.
                await bench.engine.stop(container_id, grace_s=0)
                await bench.engine.start(container_id)
                await anyio.lowlevel.checkpoint()
            await seen[Happening.STARTED].wait()
            await bench.engine.stop(container_id, grace_s=0)
            await seen[Happening.ENDED].wait()
            await bench.engine.remove(container_id)
            await seen[Happening.REMOVED].wait()
        tasks.cancel_scope.cancel()
    assert over == [], "nobody had ended it"
    assert {event.container_id for event in told} == {container_id}
    assert others == []


async def inspect_tells_what_it_was_told(bench: Bench) -> None:
    """A daemon that has lost all else finds out what a container is."""
    spec = bench.spec(note='{"name":"a b\\n","path":"/x=y,z"}')
    facts = await bench.engine.inspect(await bench.engine.create(spec))
    assert (facts.note, facts.image, facts.user, facts.network) == (spec.note, spec.image, spec.user, spec.network)


async def inspect_reports_every_limit_that_was_asked_for(bench: Bench) -> None:
    limits = bench.held(LIMITS)
    spec = bench.spec(limits=limits)
    facts = await bench.engine.inspect(await bench.engine.create(spec))
    assert facts.limits == limits
    assert (facts.sandbox_id, facts.owner, facts.oom_killed) == (spec.sandbox_id, bench.owner, False)


async def update_says_which_limits_it_could_not_change(bench: Bench) -> None:
    container_id = await bench.engine.create(bench.spec(limits=bench.held(LIMITS)))
    asked = Limits(memory_bytes_max=96 * MIB, cpu_millis=250, pids_max=20, nofile_max=512)
    left = await bench.engine.update(container_id, asked)
    assert left.nofile_max == 512
    assert left.pids_max in {None, 20}
    able = bench.engine.info.capabilities
    assert able is not None
    changed = (None, None) if able.update_limits else (asked.memory_bytes_max, asked.cpu_millis)
    assert (left.memory_bytes_max, left.cpu_millis) == changed


async def an_unknown_container_is_not_found_whatever_is_asked_of_it(bench: Bench) -> None:
    engine = bench.engine
    asked: list[Callable[[], Awaitable[object]]] = [
        lambda: engine.start(NO_SUCH_ID),
        lambda: engine.stop(NO_SUCH_ID, grace_s=0),
        lambda: engine.inspect(NO_SUCH_ID),
        lambda: engine.resume(NO_SUCH_ID),
    ]
    able = engine.info.capabilities
    if able is not None and able.update_limits:
        asked.append(lambda: engine.update(NO_SUCH_ID, Limits(memory_bytes_max=64 * MIB)))
    for ask in asked:
        with pytest.raises(ContainerNotFound):
            await ask()


async def an_empty_owner_does_not_mean_everybody(bench: Bench) -> None:
    with pytest.raises(Unsupported):
        await bench.engine.list_containers(owner="")
    with pytest.raises(Unsupported):
        await bench.engine.create(bench.spec(owner=""))


async def a_limit_of_zero_is_refused_for_engines_read_it_as_unlimited(bench: Bench) -> None:
    for limits in (Limits(memory_bytes_max=0), Limits(cpu_millis=0), Limits(pids_max=0), Limits(cpuset_cpus=())):
        with pytest.raises(Unsupported):
            await bench.engine.create(bench.spec(limits=limits))
    assert await bench.engine.list_containers(owner=bench.owner) == []


async def exec_joins_the_given_descriptors_and_returns_the_commands_status(bench: Bench) -> None:
    container_id = await bench.engine.create(bench.spec())
    reading, writing = os.pipe()
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        code = await bench.engine.exec(
            container_id,
            ["/bin/sh", "-c", 'echo "$GREETING"; exit 3'],
            user="0",
            env=[("GREETING", "a b")],
            working_dir="/",
            descriptors=(nothing, writing, writing),
            timeout_s=30,
        )
        assert code == 3
        assert os.read(reading, 100) == b"a b\n"
    finally:
        for descriptor in (reading, writing, nothing):
            os.close(descriptor)


async def an_imported_image_is_held_and_can_be_run(bench: Bench) -> None:
    reference = f"localhost/{bench.owner}/imported:1"
    assert await bench.engine.image_id(reference) is None
    image_id = await bench.engine.import_image(str(bench.archive), reference, changes=["ENV A=b"])
    assert await bench.engine.image_id(reference) == image_id
    listed = {image.image_id: image.tags for image in await bench.engine.list_images()}
    assert reference in listed[image_id]
    facts = await bench.engine.inspect(await bench.engine.create(bench.spec(image=reference)))
    assert facts.image_id == image_id


async def an_image_is_built_from_a_containerfile(bench: Bench) -> None:
    reference = f"localhost/{bench.owner}/built:1"
    context = bench.archive.parent / "context"
    context.mkdir(exist_ok=True)
    (context / "Containerfile").write_text("FROM scratch\nLABEL built=yes\n")
    image_id = await bench.engine.build_image(str(context), reference)
    assert image_id in {image.image_id for image in await bench.engine.list_images()}
    (context / "Containerfile").write_text("FROM scratch\nNONSENSE\n")
    if not isinstance(bench.engine, FakeEngine):
        with pytest.raises(EngineRefused):
            await bench.engine.build_image(str(context), reference)


async def what_a_cancelled_create_made_can_be_removed_at_once(bench: Bench) -> None:
    """The caller cleans up by label right after: nothing may appear later."""
    spec = bench.spec()
    with anyio.move_on_after(0.02) as scope:
        await bench.engine.create(spec)
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert await bench.engine.remove_sandbox(spec.sandbox_id, owner=bench.owner) == 1
    assert await bench.engine.list_containers(owner=bench.owner) == []


async def it_says_who_it_is_and_what_it_can_do(bench: Bench) -> None:
    await bench.engine.ping()
    assert bench.engine.info.usable
    assert bench.engine.info.capabilities is not None
    assert bench.engine.info.name is bench.engine.name


async def the_network_that_it_gave_is_taken_away_and_given_again(bench: Bench) -> None:
    """But not by a rootless Podman, beside which somebody else gives the network."""
    container_id = await bench.engine.create(bench.spec(network=Network.FULL))
    if bench.engine.info.rootless and bench.engine.name is EngineName.PODMAN:
        for ask in (bench.engine.connect_network, bench.engine.disconnect_network):
            with pytest.raises((EngineRefused, Unsupported)):
                await ask(container_id)
        return
    for _ in range(2):
        await bench.engine.disconnect_network(container_id)
        with pytest.raises(EngineRefused):
            await bench.engine.disconnect_network(container_id)
        await bench.engine.connect_network(container_id)
        with pytest.raises(EngineRefused):
            await bench.engine.connect_network(container_id)
    for ask in (bench.engine.connect_network, bench.engine.disconnect_network):
        with pytest.raises(ContainerNotFound):
            await ask(NO_SUCH_ID)


async def only_a_rootless_engine_removes_the_files_of_its_users(bench: Bench) -> None:
    directory = bench.archive.parent / "of-a-user"
    directory.mkdir(exist_ok=True)
    if bench.engine.info.rootless:
        await bench.engine.remove_tree(str(directory))
        assert not directory.exists()
        return
    with pytest.raises(Unsupported):
        await bench.engine.remove_tree(str(directory))
    assert directory.exists()


CLAUSES = [
    only_a_rootless_engine_removes_the_files_of_its_users,
    a_created_container_runs_and_is_listed_with_its_labels,
    another_owner_sees_nothing,
    a_second_create_of_the_same_sandbox_is_refused_and_harms_nothing,
    a_missing_image_is_told_apart_and_leaves_nothing,
    stop_and_start_are_idempotent_and_keep_the_container,
    pause_and_resume_are_idempotent_and_the_engine_knows,
    what_is_paused_can_be_removed,
    the_network_that_it_gave_is_taken_away_and_given_again,
    remove_ends_a_running_container_and_is_idempotent,
    remove_sandbox_takes_both_labels_exactly,
    what_happens_to_its_containers_is_told_whoever_does_it,
    inspect_tells_what_it_was_told,
    inspect_reports_every_limit_that_was_asked_for,
    update_says_which_limits_it_could_not_change,
    an_unknown_container_is_not_found_whatever_is_asked_of_it,
    an_empty_owner_does_not_mean_everybody,
    a_limit_of_zero_is_refused_for_engines_read_it_as_unlimited,
    exec_joins_the_given_descriptors_and_returns_the_commands_status,
    an_imported_image_is_held_and_can_be_run,
    an_image_is_built_from_a_containerfile,
    what_a_cancelled_create_made_can_be_removed_at_once,
    it_says_who_it_is_and_what_it_can_do,
]
Clause = Callable[[Bench], Awaitable[None]]


def _words(clause: Clause) -> str:
    return getattr(clause, "__name__", "clause").replace("_", "-")


@pytest.mark.parametrize("clause", CLAUSES, ids=_words)
async def test_an_engine_keeps_its_contract(bench: Bench, clause: Clause) -> None:
    await clause(bench)


@pytest.mark.parametrize("clause", CLAUSES, ids=_words)
async def test_an_engine_that_does_nothing_fails_every_clause(clause: Clause, owner: str, scratch: Path) -> None:
    """A clause that holds for nothing proves nothing."""
    idle = Bench(NullEngine(), owner, "image", scratch)
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError, KeyError)):
        await clause(idle)


class NullEngine:
    """Agrees to everything, does nothing, and gives the emptiest answer that fits."""

    name = EngineName.PODMAN
    info = EngineInfo(name=EngineName.DOCKER, usable=True, reason="", capabilities=ALL_CAPABILITIES)

    async def ping(self) -> None: ...

    async def create(self, spec: ContainerSpec) -> str:
        return NO_SUCH_ID

    async def start(self, container_id: str) -> None: ...

    async def stop(self, container_id: str, *, grace_s: int) -> None: ...

    async def pause(self, container_id: str) -> None: ...

    async def resume(self, container_id: str) -> None: ...

    async def remove(self, container_id: str) -> None: ...

    async def connect_network(self, container_id: str) -> None: ...

    async def disconnect_network(self, container_id: str) -> None: ...

    async def remove_sandbox(self, sandbox_id: str, *, owner: str) -> int:
        return 0

    async def list_containers(self, *, owner: str) -> list[ContainerSummary]:
        return []

    async def follow(self, *, owner: str, told: Callable[[ContainerEvent], None]) -> None: ...

    async def inspect(self, container_id: str) -> ContainerFacts:
        return ContainerFacts(
            container_id=container_id,
            sandbox_id=None,
            owner=None,
            state=ContainerState.OTHER,
            pid=None,
            exit_code=None,
            oom_killed=None,
            image_id=NO_SUCH_ID,
            limits=Limits(),
        )

    async def update(self, container_id: str, limits: Limits) -> Limits:
        return Limits()

    async def exec(self, container_id: str, argv: Sequence[str], **_: object) -> int:
        return 0

    async def remove_tree(self, directory: str) -> None:
        return None

    async def image_id(self, reference: str) -> str | None:
        return None

    async def list_images(self) -> list[ImageFacts]:
        return []

    async def import_image(self, archive_path: str, reference: str, *, changes: Sequence[str] = ()) -> str:
        return NO_SUCH_ID

    async def build_image(self, context_dir: str, reference: str) -> str:
        return NO_SUCH_ID


async def test_every_method_of_the_contract_has_a_clause(owner: str, scratch: Path) -> None:
    """A method that is added to the contract is added here."""
    called: set[str] = set()
    for clause in CLAUSES:
        bench = engines.fake(owner, scratch)
        await clause(bench)
        assert isinstance(bench.engine, FakeEngine)
        called.update(bench.engine.calls)
    methods = {name for name in vars(Engine) if not name.startswith("_")}
    assert methods - called == {"name", "info"}
