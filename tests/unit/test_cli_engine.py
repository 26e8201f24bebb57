"""What an engine makes of its client's failures, with a fake client on the PATH.

The fake is a shell script that answers by its verb, and writes every call down.
"""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from runtimes import whales
from runtimes.cli_engine import OnCall
from runtimes.docker import DockerEngine
from runtimes.errors import (
    ContainerNotFound,
    EngineRefused,
    EngineTimeout,
    EngineUnavailable,
    ImageNotFound,
    UnreadableAnswer,
    Unsupported,
)
from runtimes.model import ContainerSpec, EngineInfo, EngineName, Limits, Network, User
from runtimes.podman import PodmanEngine
from tests.fakes.fake_engine import ALL_CAPABILITIES
from tests.unit.init_harness import until

pytestmark = pytest.mark.anyio

ID = "0123456789abcdef" * 4
SPEC = ContainerSpec(
    sandbox_id="s1",
    owner="o1",
    image="image:1",
    command=("/init",),
    user=User(uid=1, gid=1),
    seccomp_profile="/s.json",
)

Client = Callable[..., "DockerEngine | PodmanEngine"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """An engine whose client does as told: one line of shell per verb, ``*`` for the others."""

    def write(
        engine: EngineName = EngineName.PODMAN, *, rootless: bool = False, on_call: OnCall | None = None, **verbs: str
    ) -> Any:
        cases = "".join(f"{verb}) {body};;\n" for verb, body in verbs.items())
        path = tmp_path / "client"
        script = 'while [ "${1#-}" != "$1" ]; do shift; done'
        path.write_text(f'#!/bin/sh\n{script}\necho "$@" >> {tmp_path}/calls\ncase "$1" in\n{cases}*) ;;\nesac\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        info = EngineInfo(
            name=engine,
            usable=True,
            reason="",
            client_path=str(path),
            capabilities=msgspec.structs.replace(ALL_CAPABILITIES, rootless=rootless),
            nofile_hard_max=1000,
        )
        cls = PodmanEngine if engine is EngineName.PODMAN else DockerEngine
        return cls(info, env={"PATH": "/usr/bin:/bin"}, on_call=on_call)

    return write


def calls(tmp_path: Path) -> list[str]:
    return [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize("engine", list(EngineName))
async def test_a_refused_create_with_no_image_is_an_image_not_found(client: Client, engine: EngineName) -> None:
    refusing = client(engine, run="exit 125", image="exit 1")
    with pytest.raises(ImageNotFound) as failure:
        await refusing.create(SPEC)
    assert failure.value.hint == "sandboxctl image build"


async def test_each_client_that_ended_is_told_of_with_how_long_it_ran(client: Client) -> None:
    """Whoever watches an engine sees which of its verbs has become slow, and which fail."""
    told: list[tuple[str, str, bool]] = []

    def note(engine: str, verb: str, took_s: float, *, succeeded: bool) -> None:
        assert took_s > 0
        told.append((engine, verb, succeeded))

    with pytest.raises(ContainerNotFound):
        await client(on_call=note, stop="exit 125").stop(ID, grace_s=0)
    assert told == [("podman", "stop", False), ("podman", "ps", True)]


async def test_a_refused_create_with_the_image_there_keeps_the_engines_words(client: Client) -> None:
    with pytest.raises(EngineRefused) as failure:
        await client(run="echo 'no room' >&2; exit 125", image=f"echo {'0' * 64}").create(SPEC)
    assert failure.value.detail == "no room"


@pytest.mark.parametrize("engine", list(EngineName))
async def test_a_refused_create_of_an_engine_that_is_gone_is_unavailable(client: Client, engine: EngineName) -> None:
    """No image, no container, no list: the same exit status as for a missing image, so the engine is asked."""
    gone = client(engine, run="exit 125", image="exit 1", version="exit 1", ps="exit 1")
    with pytest.raises(EngineUnavailable):
        await gone.create(SPEC)


async def test_a_change_that_failed_asks_whether_the_container_is_there(client: Client) -> None:
    with pytest.raises(ContainerNotFound):
        await client(stop="exit 125").stop(ID, grace_s=0)
    with pytest.raises(EngineRefused, match="cannot start"):
        await client(start="echo no >&2; exit 125", ps=f"echo {ID}").start(ID)
    with pytest.raises(EngineUnavailable):
        await client(stop="exit 125", ps="exit 125").stop(ID, grace_s=0)


async def test_a_remove_that_failed_is_a_success_when_nothing_is_left(client: Client) -> None:
    await client(rm="exit 1").remove(ID)
    with pytest.raises(EngineRefused):
        await client(rm="exit 1", ps=f"echo {ID}").remove(ID)


async def test_an_answer_that_is_no_id_is_not_taken_for_one(client: Client) -> None:
    with pytest.raises(UnreadableAnswer):
        await client(run="echo created").create(SPEC)


async def test_rows_of_another_owner_are_dropped_even_if_the_engine_lists_them(client: Client) -> None:
    """A filter that an engine reads as a pattern must not give us somebody else's container to remove."""
    labels = '{"io.sandboxd.sandbox": "s1", "io.sandboxd.owner": "o1x"}'
    engine = client(ps=f'echo \'[{{"Id": "{ID}", "State": "running", "Labels": {labels}}}]\'')
    assert await engine.list_containers(owner="o1") == []
    assert await engine.remove_sandbox("s1", owner="o1") == 0


NETWORK = msgspec.structs.replace(SPEC, network=Network.FULL)
HELPER_FAILS_ONCE = "[ -e {0}/tried ] && echo {1} || {{ touch {0}/tried; echo slirp4netns failed >&2; exit 126; }}"


async def test_a_network_helper_that_failed_is_tried_once_more(
    client: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = client(rootless=True, run=HELPER_FAILS_ONCE.format(tmp_path, ID), ps="echo '[]'")
    assert await engine.create(NETWORK) == ID
    assert calls(tmp_path) == ["run", "ps", "run"]
    assert "once more" in caplog.text


async def test_what_the_failed_try_left_behind_is_removed_first(client: Client, tmp_path: Path) -> None:
    labels = '{"io.sandboxd.sandbox": "s1", "io.sandboxd.owner": "o1"}'
    left = f'echo \'[{{"Id": "{ID}", "State": "created", "Labels": {labels}}}]\''
    engine = client(rootless=True, run=HELPER_FAILS_ONCE.format(tmp_path, ID), ps=left)
    await engine.create(NETWORK)
    assert calls(tmp_path) == ["run", "ps", "rm", "run"]


@pytest.mark.parametrize(
    ("spec", "rootless", "said"),
    [
        (NETWORK, True, "no room"),
        (NETWORK, False, "slirp4netns failed"),
        (SPEC, True, "slirp4netns failed"),
        (
            msgspec.structs.replace(NETWORK, sandbox_id="pasta"),
            True,
            "the container name sandboxd-pasta is already in use",
        ),
    ],
    ids=["another-reason", "rootful", "no-network", "the-id-names-a-helper"],
)
async def test_no_other_failure_is_tried_again(
    client: Client, tmp_path: Path, spec: ContainerSpec, rootless: bool, said: str
) -> None:
    engine = client(rootless=rootless, run=f"echo {said} >&2; exit 126", image=f"echo {'0' * 64}")
    with pytest.raises(EngineRefused):
        await engine.create(spec)
    assert calls(tmp_path).count("run") == 1


@pytest.mark.parametrize("field", ["memory_limit", "cpu_limit", "pids_limit", "cpuset_limit"])
async def test_a_limit_that_cannot_be_enforced_is_refused_before_anything_runs(
    client: Client, tmp_path: Path, field: str
) -> None:
    able = client()
    info = msgspec.structs.replace(
        able.info, capabilities=msgspec.structs.replace(ALL_CAPABILITIES, **{field: False}), hint="mend it"
    )
    engine = PodmanEngine(info, env={})
    limits = Limits(memory_bytes_max=1, cpu_millis=1, pids_max=1, cpuset_cpus=(0,))
    with pytest.raises(Unsupported) as failure:
        await engine.create(msgspec.structs.replace(SPEC, limits=limits))
    assert failure.value.hint == "mend it"
    assert not (tmp_path / "calls").exists()


async def test_more_open_files_than_the_host_allows_are_refused(client: Client) -> None:
    with pytest.raises(Unsupported, match="1001"):
        await client().create(msgspec.structs.replace(SPEC, limits=Limits(nofile_max=1001)))


async def test_an_engine_that_cannot_update_gives_everything_back(client: Client, tmp_path: Path) -> None:
    able = client()
    capabilities = msgspec.structs.replace(ALL_CAPABILITIES, update_limits=False)
    engine = PodmanEngine(msgspec.structs.replace(able.info, capabilities=capabilities), env={})
    limits = Limits(memory_bytes_max=1, pids_max=2)
    assert await engine.update(ID, limits) == limits
    assert not (tmp_path / "calls").exists()


def test_an_unusable_engine_cannot_be_driven() -> None:
    info = EngineInfo(name=EngineName.DOCKER, usable=False, reason="not running", hint="start it")
    with pytest.raises(EngineUnavailable) as failure:
        DockerEngine(info, env={})
    assert (failure.value.detail, failure.value.hint) == ("not running", "start it")


async def test_an_image_call_that_hangs_is_given_up_and_its_client_killed(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """python-on-whales has no timeout of its own."""
    monkeypatch.setattr(whales, "LIST_S_MAX", 3.0)
    engine = client(image=f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 600")
    threads = threading.active_count()
    with pytest.raises(EngineTimeout):
        await engine.list_images()
    pid = int((tmp_path / "pid").read_text())
    await until(lambda: not Path(f"/proc/{pid}").exists(), "the client is gone")
    await until(lambda: threading.active_count() <= threads + 1, "the thread is free again")


async def test_a_cancelled_image_call_ends_its_client(client: Client, tmp_path: Path) -> None:
    engine = client(image=f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 600")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.list_images)
        await until((tmp_path / "pid").exists, "the client has started")
        tasks.cancel_scope.cancel()
    pid = int((tmp_path / "pid").read_text())
    await until(lambda: not Path(f"/proc/{pid}").exists(), "the client is gone")


async def test_calls_that_cannot_even_be_killed_do_not_pile_up(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def stuck(docker: object) -> list[object]:
        release.wait(60)
        return []

    monkeypatch.setattr(whales, "_list_images", stuck)
    monkeypatch.setattr(whales, "LIST_S_MAX", 1.5)
    engine = client()
    timeouts = 0

    async def give_up() -> None:
        nonlocal timeouts
        with pytest.raises(EngineTimeout):
            await engine.list_images()
        timeouts += 1

    try:
        for _ in range(whales.THREADS_MAX // whales.CALLS_AT_ONCE_MAX):
            async with anyio.create_task_group() as tasks:
                for _ in range(whales.CALLS_AT_ONCE_MAX):
                    tasks.start_soon(give_up)
        started = time.monotonic()
        with pytest.raises(EngineUnavailable) as failure:
            await engine.list_images()
        assert not isinstance(failure.value, EngineTimeout)
        assert time.monotonic() - started < 1
    finally:
        release.set()
    assert timeouts == whales.THREADS_MAX


async def test_an_error_of_the_library_does_not_climb_above(client: Client) -> None:
    with pytest.raises(EngineRefused) as failure:
        await client(image="echo broken >&2; exit 1").list_images()
    assert failure.value.detail == "broken"
    with pytest.raises(UnreadableAnswer):
        await client(image='[ "$2" = list ] && echo abc || echo "not json"').list_images()
