"""A small honest engine in memory: it keeps the contract of ``runtimes.engine`` without any container.

It remembers containers and images, refuses what an engine refuses, and raises what an engine raises; the contract
suite runs against it as it does against Docker and Podman. Beyond the contract it can be told to fail or to hang
(``fail_next``, ``hang``), and to start a real program for each container (``launch``).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Sequence

import anyio
import anyio.lowlevel
import msgspec

from runtimes.argv import Client, exec_argv, host_path, image_reference, run_argv, update_argv
from runtimes.errors import ContainerNotFound, EngineRefused, ImageNotFound, RuntimeFailure, Unsupported
from runtimes.model import (
    Capabilities,
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
from runtimes.process import run

ALL_CAPABILITIES = Capabilities(
    memory_limit=True,
    cpu_limit=True,
    pids_limit=True,
    cpuset_limit=True,
    keep_id=True,
    rootless=False,
    network_none=True,
    pause=True,
    update_pids=True,
    update_limits=True,
    late_shm=True,
)

Launch = Callable[[ContainerSpec], "subprocess.Popen[bytes]"]

_GRAMMAR = Client(engine=EngineName.PODMAN, program="fake")
"""What no engine's command line could express is refused here as well."""


class _Container:
    def __init__(self, spec: ContainerSpec, image_id: str) -> None:
        self.spec = spec
        self.image_id = image_id
        self.limits = spec.limits
        self.network = spec.network
        self.state = ContainerState.CREATED
        self.exit_code: int | None = None
        self.process: subprocess.Popen[bytes] | None = None


class FakeEngine:
    """An engine whose containers are entries in a dictionary.

    Args:
        name: Which engine it passes itself off as.
        images: References that it holds from the start.
        capabilities: What it says that it can do; limits beyond that are refused.
        launch: Starts PID 1 of a container on the host; without it a running container has no pid.
    """

    def __init__(
        self,
        *,
        name: EngineName = EngineName.PODMAN,
        images: Sequence[str] = (),
        capabilities: Capabilities = ALL_CAPABILITIES,
        launch: Launch | None = None,
    ) -> None:
        self.calls: list[str] = []
        """The methods that were called, in order."""
        self.specs: list[ContainerSpec] = []
        """What was to be created, in order."""
        self._info = EngineInfo(
            name=name,
            usable=True,
            reason="a fake engine",
            client_version="1.0",
            server_version="1.0",
            rootless=capabilities.rootless,
            capabilities=capabilities,
        )
        self._capabilities = capabilities
        self._launch = launch
        self._containers: dict[str, _Container] = {}
        self._images = {_full(reference): secrets.token_hex(32) for reference in images}
        self._followers: list[tuple[str, Callable[[ContainerEvent], None]]] = []
        self._failures: dict[str, list[RuntimeFailure]] = {}
        self._hanging: dict[str, anyio.Event] = {}

    def fail_next(self, method: str, failure: RuntimeFailure) -> None:
        """The next call of this method raises ``failure`` instead."""
        self._failures.setdefault(method, []).append(failure)

    def hang(self, method: str) -> None:
        """Calls of this method wait until ``release``."""
        self._hanging[method] = anyio.Event()

    def release(self, method: str) -> None:
        """Let the calls that hang go on."""
        self._hanging.pop(method).set()

    def end(self, container_id: str, *, exit_code: int = 0) -> None:
        """PID 1 of this container ends by itself."""
        container = self._containers[container_id]
        self._stop(container, exit_code)
        self._happened(container_id, container, Happening.ENDED)

    def tell_late(self, container_id: str, happening: Happening) -> None:
        """Tell of something that happened to this container a while ago."""
        self._happened(container_id, self._containers[container_id], happening)

    @property
    def followers(self) -> int:
        """How many follow what happens."""
        return len(self._followers)

    @property
    def name(self) -> EngineName:
        return self._info.name

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def ping(self) -> None:
        await self._enter("ping")

    async def create(self, spec: ContainerSpec) -> str:
        self.specs.append(spec)
        await self._enter("create")
        run_argv(_GRAMMAR, spec)
        self._refuse_unenforceable(spec.limits)
        if any(container.spec.sandbox_id == spec.sandbox_id for container in self._containers.values()):
            raise EngineRefused("cannot create a container", detail=f"{spec.sandbox_id} exists already")
        image_id = self._images.get(_full(spec.image))
        if image_id is None:
            raise ImageNotFound(f"cannot create a container: there is no image {spec.image}")
        container_id = secrets.token_hex(32)
        self._containers[container_id] = _Container(spec, image_id)
        self._start(self._containers[container_id])
        return container_id

    async def connect_network(self, container_id: str) -> None:
        await self._enter("connect_network")
        self._change_network(container_id, Network.FULL)

    async def disconnect_network(self, container_id: str) -> None:
        await self._enter("disconnect_network")
        self._change_network(container_id, Network.NONE)

    def _change_network(self, container_id: str, network: Network) -> None:
        container = self._find(container_id)
        if container.network is network:
            raise EngineRefused("cannot change the network", detail=f"it is {network} already")
        container.network = network

    async def start(self, container_id: str) -> None:
        await self._enter("start")
        container = self._find(container_id)
        if container.state is not ContainerState.RUNNING:
            self._start(container)
            self._happened(container_id, container, Happening.STARTED)

    async def stop(self, container_id: str, *, grace_s: int) -> None:
        await self._enter("stop")
        container = self._find(container_id)
        if container.state is ContainerState.RUNNING:
            self._stop(container, 128 + signal.SIGTERM)
            self._happened(container_id, container, Happening.ENDED)

    async def pause(self, container_id: str) -> None:
        await self._enter("pause")
        if not self._capabilities.pause:
            raise Unsupported("cannot pause with a fake engine")
        self._bring(container_id, ContainerState.PAUSED)

    async def resume(self, container_id: str) -> None:
        await self._enter("resume")
        self._bring(container_id, ContainerState.RUNNING)

    def _bring(self, container_id: str, state: ContainerState) -> None:
        container = self._find(container_id)
        if container.state not in (ContainerState.RUNNING, ContainerState.PAUSED):
            raise EngineRefused("cannot pause or resume this container", detail="it does not run")
        container.state = state
        if container.process is not None:
            container.process.send_signal(signal.SIGSTOP if state is ContainerState.PAUSED else signal.SIGCONT)
        paused = state is ContainerState.PAUSED
        self._happened(container_id, container, Happening.PAUSED if paused else Happening.RESUMED)

    async def remove(self, container_id: str) -> None:
        await self._enter("remove")
        container = self._containers.pop(container_id, None)
        if container is not None:
            self._stop(container, 128 + signal.SIGKILL)
            self._happened(container_id, container, Happening.REMOVED)

    async def remove_sandbox(self, sandbox_id: str, *, owner: str) -> int:
        await self._enter("remove_sandbox")
        found = [
            container_id
            for container_id, container in self._containers.items()
            if (container.spec.sandbox_id, container.spec.owner) == (sandbox_id, owner)
        ]
        for container_id in found:
            self._stop(self._containers.pop(container_id), 128 + signal.SIGKILL)
        return len(found)

    async def list_containers(self, *, owner: str) -> list[ContainerSummary]:
        await self._enter("list_containers")
        if not owner:
            raise Unsupported("cannot list the containers of nobody")
        return [
            ContainerSummary(
                container_id=container_id,
                sandbox_id=container.spec.sandbox_id,
                owner=owner,
                state=container.state,
            )
            for container_id, container in self._containers.items()
            if container.spec.owner == owner
        ]

    async def follow(self, *, owner: str, told: Callable[[ContainerEvent], None]) -> None:
        await self._enter("follow")
        self._followers.append((owner, told))
        try:
            await anyio.sleep_forever()
        finally:
            self._followers.remove((owner, told))

    def _happened(self, container_id: str, container: _Container, happening: Happening) -> None:
        for owner, told in self._followers:
            if owner == container.spec.owner:
                told(ContainerEvent(container_id=container_id, happening=happening))

    async def inspect(self, container_id: str) -> ContainerFacts:
        await self._enter("inspect")
        container = self._find(container_id)
        return ContainerFacts(
            container_id=container_id,
            sandbox_id=container.spec.sandbox_id,
            owner=container.spec.owner,
            state=container.state,
            pid=None if container.process is None else container.process.pid,
            exit_code=container.exit_code,
            oom_killed=False,
            image_id=container.image_id,
            limits=container.limits,
            note=container.spec.note,
            image=container.spec.image,
            user=container.spec.user,
            network=container.spec.network,
        )

    async def update(self, container_id: str, limits: Limits) -> Limits:
        await self._enter("update")
        container = self._find(container_id)
        update_argv(_GRAMMAR, container_id, limits)
        fixed = {"shm_bytes_max", "nofile_max"}
        asked = {field: value for field, value in msgspec.structs.asdict(limits).items() if value is not None}
        container.limits = msgspec.structs.replace(
            container.limits, **{field: value for field, value in asked.items() if field not in fixed}
        )
        return Limits(**{field: value for field, value in asked.items() if field in fixed})

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
        """Runs the command on the host: there is no inside."""
        await self._enter("exec")
        if self._find(container_id).state is not ContainerState.RUNNING:
            return 125
        exec_argv(_GRAMMAR, container_id, argv, user=user, env=env, working_dir=working_dir)
        finished = await run(argv, what="`fake exec`", deadline_s=timeout_s, env=dict(env), descriptors=descriptors)
        return finished.returncode

    async def remove_tree(self, directory: str) -> None:
        await self._enter("remove_tree")
        raise Unsupported("cannot remove files of a fake engine's users")

    async def image_id(self, reference: str) -> str | None:
        await self._enter("image_id")
        return self._images.get(_full(image_reference(reference)))

    async def list_images(self) -> list[ImageFacts]:
        await self._enter("list_images")
        return [
            ImageFacts(image_id=image_id, tags=(reference,), size_bytes=1024, created_at_s=0.0)
            for reference, image_id in sorted(self._images.items())
        ]

    async def import_image(self, archive_path: str, reference: str, *, changes: Sequence[str] = ()) -> str:
        await self._enter("import_image")
        host_path(archive_path)
        if not os.path.isfile(archive_path):
            raise EngineRefused("cannot import an image", detail=f"there is no file {archive_path}")
        return self._add_image(reference)

    async def build_image(self, context_dir: str, reference: str) -> str:
        await self._enter("build_image")
        host_path(context_dir)
        if not os.path.isfile(os.path.join(context_dir, "Containerfile")):
            raise EngineRefused("cannot build an image", detail=f"there is no Containerfile in {context_dir}")
        return self._add_image(reference)

    async def _enter(self, method: str) -> None:
        self.calls.append(method)
        await anyio.lowlevel.checkpoint()
        if method in self._hanging:
            await self._hanging[method].wait()
        failures = self._failures.get(method)
        if failures:
            raise failures.pop(0)

    def _find(self, container_id: str) -> _Container:
        try:
            return self._containers[container_id]
        except KeyError:
            raise ContainerNotFound(f"cannot find the container {container_id[:12]}") from None

    def _add_image(self, reference: str) -> str:
        image_id = secrets.token_hex(32)
        self._images[_full(image_reference(reference))] = image_id
        return image_id

    def _start(self, container: _Container) -> None:
        container.state, container.exit_code = ContainerState.RUNNING, None
        if self._launch is not None:
            container.process = self._launch(container.spec)

    def _stop(self, container: _Container, exit_code: int) -> None:
        container.state, container.exit_code = ContainerState.EXITED, exit_code
        if container.process is not None:
            container.process.kill()
            container.process.wait()
            container.process = None

    def _refuse_unenforceable(self, limits: Limits) -> None:
        able = self._capabilities
        for asked, enforced in (
            (limits.memory_bytes_max, able.memory_limit),
            (limits.cpu_millis, able.cpu_limit),
            (limits.pids_max, able.pids_limit),
            (limits.cpuset_cpus, able.cpuset_limit),
        ):
            if asked is not None and not enforced:
                raise Unsupported("cannot limit this with a fake engine")


def _full(reference: str) -> str:
    return reference if ":" in reference.rsplit("/", 1)[-1] else f"{reference}:latest"
