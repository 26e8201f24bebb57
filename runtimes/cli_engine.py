"""An engine that is driven through its own command-line client: what Docker and Podman have in common.

A failed call is explained by a question, not by the words on stderr: is the engine there at all, does it hold the
image, does it know the container. Those questions are answered by exit status and by empty output.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import anyio
import msgspec

from runtimes import parse
from runtimes.argv import (
    PROXY_VARIABLES,
    Client,
    connect_argv,
    disconnect_argv,
    events_argv,
    exec_argv,
    find_argv,
    image_id_argv,
    inspect_argv,
    list_argv,
    pause_argv,
    ping_argv,
    remove_argv,
    remove_tree_argv,
    resume_argv,
    run_argv,
    start_argv,
    stop_argv,
    update_argv,
)
from runtimes.errors import (
    ContainerNotFound,
    EngineRefused,
    EngineUnavailable,
    ImageNotFound,
    RuntimeFailure,
    Unsupported,
)
from runtimes.model import (
    CONTAINER_NAME_PREFIX,
    Capabilities,
    ContainerEvent,
    ContainerFacts,
    ContainerSpec,
    ContainerState,
    ContainerSummary,
    EngineInfo,
    EngineName,
    ImageFacts,
    Limits,
    Network,
)
from runtimes.process import CLIENTS_AT_ONCE_MAX, Finished, OnCancel, client_environment, run, start
from runtimes.whales import Whales

PING_S_MAX = 10.0
QUESTION_S_MAX = 20.0
"""Lists, inspections and the like: tens of milliseconds on an idle host."""
CHANGE_S_MAX = 60.0
"""Create, start, remove, update: up to a second on an idle host, many times that on a busy disk."""

EVENT_BYTES_MAX = 256 * 1024
"""One event with all labels of its container."""

NETWORK_HELPERS = ("slirp4netns", "pasta", "rootlessport")
"""Programs that give a rootless container its network. When one does not come up, the client's exit status is the
same as for any other refusal and only its message names the helper: slirp4netns failed 8 of 31 creates in one
mixed run, and none of 26 later, so one more try is worth it."""

log = logging.getLogger(__name__)


class OnCall(Protocol):
    """Told of a client of an engine that has ended, or was ended."""

    def __call__(self, engine: str, verb: str, took_s: float, *, succeeded: bool) -> None:
        """Of one that was never started, ``took_s`` is how long it waited for its turn."""


class CliEngine(ABC):
    """The engine contract (``runtimes.engine.Engine``), by one client process per call."""

    def __init__(
        self,
        info: EngineInfo,
        *,
        env: Mapping[str, str],
        limiter: anyio.Semaphore | None = None,
        on_call: OnCall | None = None,
    ) -> None:
        """Drive the engine that was detected as ``info``.

        Args:
            info: What ``runtimes.detect`` found.
            env: The environment for the client, usually the daemon's own.
            limiter: How many clients may run at once; by default ``CLIENTS_AT_ONCE_MAX`` of this engine.
            on_call: Told of each client that has ended, or was ended.
        """
        if not info.usable or info.capabilities is None or info.client_path is None:
            raise EngineUnavailable(f"cannot use {info.name.value}", detail=info.reason, hint=info.hint)
        self._info = info
        self._capabilities: Capabilities = info.capabilities
        self._env = client_environment(env)
        self._limiter = anyio.Semaphore(CLIENTS_AT_ONCE_MAX) if limiter is None else limiter
        self._on_call = on_call
        self._client = self.client_of(info)
        self._whales = Whales(self._client)

    @staticmethod
    @abstractmethod
    def client_of(info: EngineInfo) -> Client:
        """How the client of the engine described by ``info`` is called."""

    @property
    def name(self) -> EngineName:
        """Which engine this is."""
        return self._info.name

    @property
    def info(self) -> EngineInfo:
        """What was detected."""
        return self._info

    async def ping(self) -> None:
        """See ``Engine.ping``."""
        finished = await self._ask(ping_argv(self._client), "ping", deadline_s=PING_S_MAX)
        if finished.returncode != 0:
            raise self._unreachable(finished)

    async def create(self, spec: ContainerSpec) -> str:
        """See ``Engine.create``."""
        self._refuse_unenforceable(spec.limits)
        if spec.keep_id and not self._capabilities.keep_id:
            raise Unsupported(f"cannot map the caller's uid to itself with this {self.name.value}")
        finished = await self._run_container(spec)
        if finished.returncode != 0 and self._network_helper_failed(spec, finished):
            log.warning("sandbox %s: a network helper failed, creating it once more", spec.sandbox_id)
            await self._remove_not_running(spec)
            finished = await self._run_container(spec)
        if finished.returncode != 0:
            raise await self._why_not_created(spec, finished)
        return parse.container_id(finished.stdout)

    async def start(self, container_id: str) -> None:
        """See ``Engine.start``."""
        await self._change(start_argv(self._client, container_id), "start", container_id)

    async def stop(self, container_id: str, *, grace_s: int) -> None:
        """See ``Engine.stop``."""
        words = stop_argv(self._client, container_id, grace_s=grace_s)
        await self._change(words, "stop", container_id, deadline_s=grace_s + CHANGE_S_MAX)

    async def pause(self, container_id: str) -> None:
        """See ``Engine.pause``."""
        if not self._capabilities.pause:
            raise Unsupported(
                f"cannot pause a sandbox with {self.name.value} on this host",
                detail="its containers have no control group that could be frozen",
                hint=self._info.hint or "sandboxctl doctor",
            )
        await self._bring_into(ContainerState.PAUSED, pause_argv(self._client, container_id), "pause", container_id)

    async def resume(self, container_id: str) -> None:
        """See ``Engine.resume``."""
        words = resume_argv(self._client, container_id)
        await self._bring_into(ContainerState.RUNNING, words, "unpause", container_id)

    async def _bring_into(self, state: ContainerState, words: Sequence[str], verb: str, container_id: str) -> None:
        """Both engines refuse to do what is done already: then it is looked whether it is."""
        finished = await self._ask(words, verb, deadline_s=CHANGE_S_MAX)
        if finished.returncode != 0 and (await self.inspect(container_id)).state is not state:
            raise self._refused(f"{verb} the container {container_id[:12]}", finished)

    async def remove(self, container_id: str) -> None:
        """See ``Engine.remove``."""
        await self._remove([container_id])

    async def remove_sandbox(self, sandbox_id: str, *, owner: str) -> int:
        """See ``Engine.remove_sandbox``."""
        listed = await self._list(owner=owner, sandbox_id=sandbox_id)
        found = [container for container in listed if container.named_by_us]
        if found:
            await self._remove([container.container_id for container in found])
        return len(found)

    async def list_containers(self, *, owner: str) -> list[ContainerSummary]:
        """See ``Engine.list_containers``."""
        return await self._list(owner=owner)

    async def follow(self, *, owner: str, told: Callable[[ContainerEvent], None]) -> None:
        """See ``Engine.follow``."""
        words = events_argv(self._client, owner=owner)
        client = start(words, what=self._what("events"), env=self._env, ends_with_us=True)
        said = ""
        try:
            async for line in client.lines(bytes_max=EVENT_BYTES_MAX):
                if line[:1] not in (b"{", b"["):
                    # Both streams come out here, and what is no event is a complaint.
                    said = parse.complaint(line)
                    continue
                event = parse.container_event(self.name, line)
                if event is not None:
                    told(event)
        finally:
            await client.close(grace_s=0)
        raise EngineUnavailable(f"cannot follow the events of {self.name.value}", detail=said, hint=self._info.hint)

    async def inspect(self, container_id: str) -> ContainerFacts:
        """See ``Engine.inspect``.

        Not through python-on-whales: its container object asks the engine again for any attribute that is read
        more than 10 ms after the last, so that one inspection can be put together from several moments.
        """
        finished = await self._ask(inspect_argv(self._client, container_id), "inspect")
        if finished.returncode != 0:
            raise await self._why_failed("inspect", container_id, finished)
        return parse.container_facts(finished.stdout)

    async def connect_network(self, container_id: str) -> None:
        """See ``Engine.connect_network``."""
        if self.name is EngineName.DOCKER:
            # One that was made with none has a network of that name, beside which there can be no other.
            await self._ask(disconnect_argv(self._client, container_id, network="none"), "network")
        await self._change(connect_argv(self._client, container_id), "connect", container_id)

    async def disconnect_network(self, container_id: str) -> None:
        """See ``Engine.disconnect_network``."""
        await self._change(disconnect_argv(self._client, container_id), "disconnect", container_id)

    async def update(self, container_id: str, limits: Limits) -> Limits:
        """See ``Engine.update``."""
        changeable, left = self._split_update(limits)
        if changeable != Limits():
            await self._change(update_argv(self._client, container_id, changeable), "update", container_id)
        return left

    async def exec(
        self,
        container_id: str,
        argv: Sequence[str],
        *,
        user: str,
        env: Sequence[tuple[str, str]],
        working_dir: str,
        descriptors: tuple[int, int, int],
        timeout_s: float | None,
    ) -> int:
        """See ``Engine.exec``. It takes no turn: it may last for hours."""
        words = exec_argv(self._client, container_id, argv, user=user, env=env, working_dir=working_dir)
        finished = await run(
            words, what=self._what("exec"), deadline_s=timeout_s, env=self._env, descriptors=descriptors
        )
        return finished.returncode

    async def remove_tree(self, directory: str) -> None:
        """See ``Engine.remove_tree``."""
        if not self._capabilities.enters_userns:
            raise Unsupported(
                f"cannot remove files of {self.name.value}'s users",
                detail="it has no user namespace that we can enter",
            )
        finished = await self._ask(remove_tree_argv(self._client, directory), "unshare", deadline_s=CHANGE_S_MAX)
        if finished.returncode != 0:
            raise self._refused(f"remove {directory}", finished)

    async def image_id(self, reference: str) -> str | None:
        """See ``Engine.image_id``.

        Not through python-on-whales, which tells a missing image from a missing engine by the text of stderr.
        """
        finished = await self._ask(image_id_argv(self._client, reference), "image")
        if finished.returncode != 0:
            await self.ping()
            return None
        return parse.image_id(finished.stdout.decode(errors="replace"))

    async def list_images(self) -> list[ImageFacts]:
        """See ``Engine.list_images``."""
        return await self._whales.list_images()

    async def import_image(self, archive_path: str, reference: str, *, changes: Sequence[str] = ()) -> str:
        """See ``Engine.import_image``."""
        return await self._whales.import_image(archive_path, reference, changes)

    async def build_image(self, context_dir: str, reference: str) -> str:
        """See ``Engine.build_image``."""
        return await self._whales.build_image(context_dir, reference)

    async def _run_container(self, spec: ContainerSpec) -> Finished:
        return await self._ask(
            run_argv(self._client, spec),
            "run",
            deadline_s=CHANGE_S_MAX,
            on_cancel="leave",
            env={name: value for name, value in self._env.items() if name not in PROXY_VARIABLES},
        )

    async def _list(self, *, owner: str, sandbox_id: str | None = None) -> list[ContainerSummary]:
        finished = await self._ask(list_argv(self._client, owner=owner, sandbox_id=sandbox_id), "ps")
        if finished.returncode != 0:
            await self.ping()
            raise self._refused("list containers", finished)
        return [
            row
            for row in parse.containers(self.name, finished.stdout)
            if row.owner == owner and sandbox_id in {None, row.sandbox_id}
        ]

    async def _remove(self, container_ids: Sequence[str]) -> None:
        finished = await self._ask(remove_argv(self._client, container_ids), "rm", deadline_s=CHANGE_S_MAX)
        if finished.returncode == 0:
            return
        for container_id in container_ids:
            if await self._is_there(container_id):
                raise self._refused(f"remove the container {container_id[:12]}", finished)

    async def _change(
        self, words: Sequence[str], verb: str, container_id: str, *, deadline_s: float = CHANGE_S_MAX
    ) -> None:
        finished = await self._ask(words, verb, deadline_s=deadline_s)
        if finished.returncode != 0:
            raise await self._why_failed(verb, container_id, finished)

    async def _ask(
        self,
        words: Sequence[str],
        verb: str,
        *,
        deadline_s: float = QUESTION_S_MAX,
        on_cancel: OnCancel = "kill",
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        started_s = time.monotonic()
        finished: Finished | None = None
        try:
            finished = await run(
                words,
                what=self._what(verb),
                deadline_s=deadline_s,
                env=self._env if env is None else env,
                limiter=self._limiter,
                on_cancel=on_cancel,
            )
        finally:
            if self._on_call is not None:
                took_s = time.monotonic() - started_s if finished is None else finished.wall_ms / 1000
                succeeded = finished is not None and finished.returncode == 0
                self._on_call(self.name.value, verb, took_s, succeeded=succeeded)
        return finished

    async def _is_there(self, container_id: str) -> bool:
        finished = await self._ask(find_argv(self._client, container_id), "ps")
        if finished.returncode != 0:
            raise self._unreachable(finished)
        return container_id.encode() in finished.stdout.split()

    async def _why_failed(self, verb: str, container_id: str, finished: Finished) -> RuntimeFailure:
        if await self._is_there(container_id):
            return self._refused(f"{verb} the container {container_id[:12]}", finished)
        return ContainerNotFound(f"cannot {verb} the container {container_id[:12]}: there is none with this id")

    async def _why_not_created(self, spec: ContainerSpec, finished: Finished) -> RuntimeFailure:
        if await self.image_id(spec.image) is None:
            return ImageNotFound(
                f"cannot create a container: {self.name.value} does not hold the image {spec.image}",
                hint="sandboxctl image build",
            )
        return self._refused("create a container", finished)

    def _unreachable(self, finished: Finished) -> EngineUnavailable:
        return EngineUnavailable(
            f"cannot reach {self.name.value}",
            detail=parse.complaint(finished.stderr),
            hint=self._info.hint or "sandboxctl doctor",
        )

    def _refused(self, action: str, finished: Finished) -> EngineRefused:
        detail = parse.complaint(finished.stderr) or f"{self.name.value} ended with status {finished.returncode}"
        return EngineRefused(f"cannot {action}", detail=detail)

    def _network_helper_failed(self, spec: ContainerSpec, finished: Finished) -> bool:
        if spec.network is not Network.FULL or not self._capabilities.rootless:
            return False
        # The id stands in the container's name, and so in messages that say nothing of a helper.
        said = parse.complaint(finished.stderr).replace(f"{CONTAINER_NAME_PREFIX}{spec.sandbox_id}", "")
        return any(helper in said for helper in NETWORK_HELPERS)

    async def _remove_not_running(self, spec: ContainerSpec) -> None:
        found = await self._list(owner=spec.owner, sandbox_id=spec.sandbox_id)
        ended = [row.container_id for row in found if row.state is not ContainerState.RUNNING]
        if ended:
            await self._remove(ended)

    def _refuse_unenforceable(self, limits: Limits) -> None:
        able = self._capabilities
        for what, asked, enforced in (
            ("memory", limits.memory_bytes_max, able.memory_limit),
            ("CPU time", limits.cpu_millis, able.cpu_limit),
            ("processes", limits.pids_max, able.pids_limit),
            ("CPUs to run on", limits.cpuset_cpus, able.cpuset_limit),
        ):
            if asked is not None and not enforced:
                raise Unsupported(
                    f"cannot limit {what} with {self.name.value} on this host",
                    detail="; ".join(warning.what for warning in self._info.warnings),
                    hint=self._info.hint,
                )
        asked, nofile_max = limits.nofile_max, self._info.nofile_hard_max
        if asked is not None and nofile_max is not None and asked > nofile_max:
            raise Unsupported(f"cannot allow {asked} open files", detail=f"the hard limit is {nofile_max}")

    def _split_update(self, limits: Limits) -> tuple[Limits, Limits]:
        """What this engine's ``update`` can change, and what it cannot."""
        able = self._capabilities
        if not able.update_limits:
            return Limits(), limits
        fixed = {"shm_bytes_max", "nofile_max"} | (set() if able.update_pids else {"pids_max"})
        asked = msgspec.structs.asdict(limits)
        return (
            Limits(**{field: value for field, value in asked.items() if field not in fixed}),
            Limits(**{field: value for field, value in asked.items() if field in fixed}),
        )

    def _what(self, verb: str) -> str:
        return f"`{self.name.value} {verb}`"
