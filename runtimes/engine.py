"""The engine contract.

Docker and Podman stand behind it; nothing above it knows which one it talks to, and nothing above it
assumes that a container is a process of this host (``ContainerFacts.pid`` may be None).

Rules that hold for every method:

* A call has a deadline. When it passes, the client process is ended and ``EngineTimeout`` is raised.
* Output of the client is bounded; more than the bound raises ``UnreadableAnswer``.
* A container is addressed by its full 64-digit id, and only containers that carry both identity labels are
  listed. Names are for people who read ``docker ps``.
* Cancelling a call ends its client, except ``create``, whose client is left to end by itself, for some seconds at
  most, before the cancellation goes on: a client that is killed half-way can leave a container that appears later.
  Whoever cancels a create removes by label afterwards, and finds all there is.
* ``EngineUnavailable`` where the engine is gone, ``EngineRefused`` where it said no; the other errors are
  named per method. No error of python-on-whales, and no OSError, leaves this contract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from runtimes.model import (
    ContainerEvent,
    ContainerFacts,
    ContainerSpec,
    ContainerSummary,
    EngineInfo,
    EngineName,
    ImageFacts,
    Limits,
)


class Engine(Protocol):
    """A container engine, reached through its own command-line client."""

    @property
    def name(self) -> EngineName:
        """Which engine this is."""
        ...

    @property
    def info(self) -> EngineInfo:
        """What was found out when the engine was detected: versions, runtime, capabilities. No engine call."""
        ...

    async def ping(self) -> None:
        """Ask the engine for a sign of life.

        Raises:
            EngineUnavailable: no answer within the deadline.
        """
        ...

    async def create(self, spec: ContainerSpec) -> str:
        """Create the container and start it: one client process (``run --detach``).

        Returns:
            The container's full id. PID 1 has been executed by then.

        Raises:
            ImageNotFound: the image is not held locally; nothing is pulled by surprise.
            Unsupported: a limit that this engine cannot enforce here, or something it has no words for.
            EngineRefused: the engine said no. A container may have been left behind: remove by label.

        Not idempotent: a second create of the same sandbox id is refused by the engine.
        """
        ...

    async def start(self, container_id: str) -> None:
        """Start a stopped container. Idempotent: starting a running one does nothing."""
        ...

    async def stop(self, container_id: str, *, grace_s: int) -> None:
        """TERM to PID 1, KILL after ``grace_s``. Idempotent. The container stays and can be started again."""
        ...

    async def pause(self, container_id: str) -> None:
        """Freeze everything in a running container; memory and open files stay. Idempotent.

        Raises:
            Unsupported: this engine cannot on this host (``Capabilities.pause``).
            EngineRefused: it does not run.
        """
        ...

    async def resume(self, container_id: str) -> None:
        """Let a paused container go on. Idempotent: a running one does.

        Raises:
            EngineRefused: it does not run, and was not paused.
        """
        ...

    async def remove(self, container_id: str) -> None:
        """Kill and remove the container with its anonymous volumes, paused or not.

        Idempotent: nothing to remove is success.
        """
        ...

    async def remove_sandbox(self, sandbox_id: str, *, owner: str) -> int:
        """Remove every container that carries exactly these two labels.

        Returns:
            How many were removed. Two engine calls.
        """
        ...

    async def list_containers(self, *, owner: str) -> list[ContainerSummary]:
        """All containers, running or not, whose owner label is exactly ``owner``. One engine call."""
        ...

    async def follow(self, *, owner: str, told: Callable[[ContainerEvent], None]) -> None:
        """Tell what happens to the containers of this owner, whoever does it, from about now on. Never returns.

        What happens before it begins, or after it has ended, is not told: look for yourself then. It takes no turn.

        Args:
            owner: Whose containers.
            told: Called with each event; must be cheap.

        Raises:
            EngineUnavailable: it has ended: the engine has, or it keeps no events.
            UnreadableAnswer: what it says is no event.
        """
        ...

    async def inspect(self, container_id: str) -> ContainerFacts:
        """Ask the engine about one container.

        Raises:
            ContainerNotFound: there is none with this id.
        """
        ...

    async def connect_network(self, container_id: str) -> None:
        """Give a running container the engine's own default network. It has it again after a stop and a start.

        Not idempotent: whoever calls looks first whether it has it.

        Raises:
            ContainerNotFound: there is none with this id.
            EngineRefused: it has it, or was made in a way that this engine cannot change.
        """
        ...

    async def disconnect_network(self, container_id: str) -> None:
        """Take the engine's own network from a running container, for good; the rest as ``connect_network``."""
        ...

    async def update(self, container_id: str, limits: Limits) -> Limits:
        """Change limits through the engine's own ``update``, so that its records stay right.

        Returns:
            The limits that the engine could *not* change this way (all None when it changed them all): the
            caller writes these into the cgroup itself.
        """
        ...

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
        """Run a command through the engine's own exec, as another user than PID 1: the slow, second road.

        Args:
            container_id: Full id of a running container.
            argv: Command and arguments.
            user: ``name``, ``uid`` or ``uid:gid``.
            env: Added to the container's environment.
            working_dir: Absolute path inside.
            descriptors: Become stdin, stdout and stderr of the engine's client; the caller goes on owning them.
            timeout_s: The client is ended when it passes; None waits for ever.

        Returns:
            The client's exit status: the command's own, or 125 to 127 as both engines define them.
        """
        ...

    async def remove_tree(self, directory: str) -> None:
        """Remove a directory of the host that holds files of the engine's own users. Idempotent.

        Raises:
            Unsupported: this engine has no user namespace that can be entered: only rootless Podman has.
        """
        ...

    async def image_id(self, reference: str) -> str | None:
        """The id of the image that the engine holds under this name, None when it holds none. Nothing is pulled."""
        ...

    async def list_images(self) -> list[ImageFacts]:
        """The images that the engine holds."""
        ...

    async def import_image(self, archive_path: str, reference: str, *, changes: Sequence[str] = ()) -> str:
        """Make an image of one tar archive of a root file system.

        Args:
            archive_path: Host path of the tar file.
            reference: ``name:tag`` to give it. An image that has it already loses it.
            changes: Containerfile instructions to record, such as ``ENV PATH=/bin``.

        Returns:
            The image id.
        """
        ...

    async def build_image(self, context_dir: str, reference: str) -> str:
        """Build the Containerfile in ``context_dir``.

        Returns:
            The image id.

        Raises:
            EngineRefused: a base image cannot be fetched, or a step failed.
        """
        ...
