"""The engines that the contract suite runs against, and the image that its containers run."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from runtimes.argv import Client, remove_argv
from runtimes.detect import detect_all
from runtimes.docker import DockerEngine
from runtimes.engine import Engine
from runtimes.errors import EngineUnavailable
from runtimes.model import LABEL_OWNER, ContainerSpec, EngineInfo, EngineName, Limits, User
from runtimes.podman import PodmanEngine
from tests.fakes.fake_engine import FakeEngine

APPLETS = ("sh", "sleep", "env", "true")
CHANGES = ('ENTRYPOINT ["/bin/wrong"]', 'CMD ["wrong"]', "VOLUME /volume")
"""What an image may bring along, and must not change what a sandbox runs."""

_LIST_IDS = ("ps", "--all", "--quiet", "--no-trunc")


class Bench:
    """One engine under test with an image, and an owner that nobody else has.

    Everything that is made with ``spec`` is removed by ``clear``.
    """

    def __init__(self, engine: Engine, owner: str, image: str, scratch: Path) -> None:
        self.engine = engine
        self.owner = owner
        self.image = image
        self.archive = scratch / "root.tar"
        self.seccomp_profile = scratch / "seccomp.json"

    def held(self, limits: Limits) -> Limits:
        """Those of the limits that this engine can enforce here: a rootless one on v1 only its rlimits."""
        able = self.engine.info.capabilities
        assert able is not None
        return msgspec.structs.replace(
            limits,
            memory_bytes_max=limits.memory_bytes_max if able.memory_limit else None,
            cpu_millis=limits.cpu_millis if able.cpu_limit else None,
            pids_max=limits.pids_max if able.pids_limit else None,
            cpuset_cpus=limits.cpuset_cpus if able.cpuset_limit else None,
        )

    def spec(self, sandbox_id: str = "s1", **fields: Any) -> ContainerSpec:
        """A container that sleeps."""
        given: dict[str, Any] = {
            "sandbox_id": f"{self.owner}-{sandbox_id}",
            "owner": self.owner,
            "image": self.image,
            "command": ("/bin/sleep", "600"),
            "user": User(uid=1000, gid=1000),
            "seccomp_profile": str(self.seccomp_profile),
        }
        return ContainerSpec(**{**given, **fields})


def prepare(scratch: Path) -> None:
    """Write the archive of a root file system and a seccomp profile into a folder."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.fail("the contract suite needs a static busybox: apt-get install busybox-static")
    with tarfile.open(scratch / "root.tar", "w") as archive:
        archive.add(busybox, "bin/busybox")
        for name in APPLETS:
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        full = tarfile.TarInfo("tmp/from-the-image")
        full.size = 4
        archive.addfile(full, io.BytesIO(b"full"))
    (scratch / "seccomp.json").write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW"}))


def fake(owner: str, scratch: Path) -> Bench:
    """The engine in memory."""
    image = f"{owner}/image:1"
    return Bench(FakeEngine(images=(image,)), owner, image, scratch)


def real(name: EngineName, owner: str, scratch: Path) -> Bench:
    """An engine of this host, with the image imported. Fails where it cannot be used: it should be there."""
    infos = anyio.run(detect_all, dict(os.environ))
    (info,) = (info for info in infos if info.name is name)
    try:
        engine = _build(info)
    except EngineUnavailable as failure:
        pytest.fail(f"the contract suite needs {name.value}: {failure} ({failure.hint})")
    image = f"localhost/{owner}/image:1"
    anyio.run(_import, engine, scratch / "root.tar", image)
    return Bench(engine, owner, image, scratch)


def clear(bench: Bench, *, image: bool = False) -> None:
    """Remove every container of the owner by the engine's own client, and the image too if asked."""
    if isinstance(bench.engine, FakeEngine):
        return
    client = client_of(bench.engine)
    listed = _client(client, *_LIST_IDS, f"--filter=label={LABEL_OWNER}={bench.owner}").split()
    if listed:
        subprocess.run(remove_argv(client, listed), check=True, capture_output=True, timeout=60)
    if image:
        references = _client(client, "images", "--format={{.Repository}}:{{.Tag}}").split()
        for reference in references:
            if f"/{bench.owner}/" in reference:
                _client(client, "rmi", "--force", reference)


def client_of(engine: Engine) -> Client:
    """How the client of a real engine is called."""
    assert isinstance(engine, DockerEngine | PodmanEngine)
    return engine.client_of(engine.info)


def _build(info: EngineInfo) -> DockerEngine | PodmanEngine:
    cls = DockerEngine if info.name is EngineName.DOCKER else PodmanEngine
    return cls(info, env=dict(os.environ))


async def _import(engine: Engine, archive: Path, image: str) -> None:
    await engine.import_image(str(archive), image, changes=CHANGES)


def _client(client: Client, *words: str) -> str:
    done = subprocess.run(client.call(*words), check=False, capture_output=True, text=True, timeout=60)
    return done.stdout
