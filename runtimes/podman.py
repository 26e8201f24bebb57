"""Podman behind the engine contract."""

from __future__ import annotations

from runtimes.argv import Client
from runtimes.cgroup import fs
from runtimes.cli_engine import CliEngine
from runtimes.errors import EngineRefused
from runtimes.model import ContainerState, EngineInfo, EngineName

SLICE = "sandboxd.slice"
"""Where a systemd makes the groups of containers: the user's own, or as root the machine's."""


class PodmanEngine(CliEngine):
    """Podman, rootful or rootless, through ``podman``: no daemon and no socket are needed.

    By itself it limits the processes of every container, and without the controller for it crun starts none.
    """

    @staticmethod
    def client_of(info: EngineInfo) -> Client:
        """Runtime and cgroup manager as detected; both ulimits always, for Podman's defaults exceed the host's."""
        flags: list[str] = []
        able = info.capabilities
        if info.oci_runtime is not None and info.oci_runtime_reason:
            flags.append(f"--runtime={info.oci_runtime}")
        if info.cgroup_manager is not None:
            flags.append(f"--cgroup-manager={info.cgroup_manager}")
        return Client(
            engine=EngineName.PODMAN,
            program=info.client_path or "podman",
            global_flags=tuple(flags),
            nofile_max=info.nofile_hard_max,
            nproc_max=info.nproc_hard_max,
            pids_uncounted=able is not None and able.pids_uncounted,
            cgroup_parent=SLICE if able is not None and able.own_slice else None,
            update_flags=("--no-healthcheck",) if able is not None and able.update_says_no_healthcheck else (),
        )

    async def resume(self, container_id: str) -> None:
        """See ``Engine.resume``.

        A client that was killed in the middle leaves a container that is paused for Podman and runs for the kernel.
        Podman never looks, and its runtime thaws only what is frozen; so it is frozen again, and then thawed by both.
        """
        try:
            await super().resume(container_id)
        except EngineRefused:
            facts = await self.inspect(container_id)
            stuck = facts.state is ContainerState.PAUSED and facts.pid is not None
            if not stuck or not fs.freeze(facts.pid or 0, container_id):
                raise
            await super().resume(container_id)
