"""Podman behind the engine contract."""

from __future__ import annotations

from runtimes.argv import Client
from runtimes.cli_engine import CliEngine
from runtimes.model import EngineInfo, EngineName


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
            update_flags=("--no-healthcheck",) if able is not None and able.update_says_no_healthcheck else (),
        )
