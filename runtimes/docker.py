"""Docker behind the engine contract."""

from __future__ import annotations

from runtimes.argv import Client
from runtimes.cli_engine import CliEngine
from runtimes.model import EngineInfo, EngineName


class DockerEngine(CliEngine):
    """Docker, rootful or rootless, through ``docker``."""

    @staticmethod
    def client_of(info: EngineInfo) -> Client:
        """The socket that answered at detection is named in every call: a context switched later changes nothing."""
        flags = () if info.socket_path is None else (f"--host=unix://{info.socket_path}",)
        return Client(engine=EngineName.DOCKER, program=info.client_path or "docker", global_flags=flags)
