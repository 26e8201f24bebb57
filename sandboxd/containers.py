"""The containers of sandboxes: made and started as the record says, and changed while they run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence

from runtimes.cgroup.fs import read_fixed_limits
from runtimes.engine import Engine
from runtimes.errors import CgroupUnreadable, ImageNotFound, RuntimeFailure
from runtimes.model import ContainerSpec, EngineInfo, Mount, Network, Tmpfs
from runtimes.mounter.mounter import Told
from sandboxd import note, spelling
from sandboxd.limits import passable
from sandboxd.records import SandboxRecord
from sandboxd.sandbox import INSIDE_BIN, INSIDE_RESOLVER, INSIDE_RUN, TMPFS_TARGETS, Sandbox, container_id_of
from sandboxd.staging import Staging
from sandboxd.timings import Timings
from sandboxd.workspace import TARGET, MountSource
from sandboxd.workspaces import Opened, Workspaces

RUN_TMPFS_BYTES_MAX = 16 * 1024 * 1024


class Containers:
    """Makes what the records of sandboxes say.

    Args:
        owner: What labels them.
        seccomp_profile: The path of the one that all of them run under.
        default_image: The one that can be built here.
        staging: Gets directories into them.
        workspaces: What they see of the host.
    """

    def __init__(
        self, owner: str, *, seccomp_profile: str, default_image: str, staging: Staging, workspaces: Workspaces
    ) -> None:
        self._owner = owner
        self._seccomp_profile = seccomp_profile
        self._default_image = default_image
        self._staging = staging
        self._workspaces = workspaces

    def changes_late(self, engine: EngineInfo) -> bool:
        """Whether those of this engine can be changed while they run."""
        return self._staging.changes_late(engine)

    def prepare_claim(self, slot: Sandbox, engine: EngineInfo) -> None:
        """Have at hand what a claim of this slot needs: a claim has milliseconds, and these are some of them."""
        slot.prepare_claim()
        if self.changes_late(engine):
            self._staging.prepare()

    async def run(self, sandbox: Sandbox, engine: Engine, places: Opened, timings: Timings) -> str:
        """Have an engine make and start it, with what was opened mounted, and connect to its init; returns its id.

        Raises:
            Failure, RuntimeFailure, InitError: it cannot be; there may be a container.
        """
        sandbox.prepare()
        with contextlib.ExitStack() as opened:
            sources = self._workspaces.sources(sandbox, places, opened)
            mounts = opened.enter_context(self._staging.staged(sandbox, sources))
            spec = self._spec(sandbox, engine.info, mounts)
            timings.mark("prepare")
            container_id = await self._create(engine, spec)
            timings.mark("engine")
            await self._connect(sandbox, container_id, engine, sources, mounts, timings)
        return container_id

    async def start(self, sandbox: Sandbox, engine: Engine, timings: Timings) -> None:
        """Start a container that was stopped, with the same mounted again, and connect to its init.

        Raises:
            Failure, RuntimeFailure, InitError: it cannot be; it may run.
        """
        container_id, record = container_id_of(sandbox), sandbox.record
        sandbox.prepare()
        with contextlib.ExitStack() as opened:
            places = await self._workspaces.reopen(record, opened)
            sources = self._workspaces.sources(sandbox, places, opened)
            staged = [] if record.changed_late else sources
            mounts = opened.enter_context(self._staging.staged(sandbox, staged))
            await engine.start(container_id)
            timings.mark("engine")
            await self._connect(sandbox, container_id, engine, staged, mounts, timings)
            if record.changed_late:
                async with self.changing(sandbox, None, sources):
                    pass

    @contextlib.asynccontextmanager
    async def changing(
        self, sandbox: Sandbox, made: SandboxRecord | None, sources: Sequence[MountSource] | None
    ) -> AsyncIterator[Told]:
        """Make a container what its record says, in all that its engine fixed when it was made.

        It is asked for before the body, and seen to be done after it: what the body does goes on meanwhile. What the
        body is given knows then which sizes its tmpfs have, as far as they had to be looked at.

        Args:
            sandbox: Whose.
            made: What its container is now; None: not known.
            sources: Its project, or nothing; None: there is nothing to be changed.
        """
        if sources is None:
            yield Told()
            return
        record = sandbox.record
        tmpfs_bytes = {}
        if made is None or record.tmp_bytes_max != made.tmp_bytes_max:
            tmpfs_bytes = _tmpfs_bytes(record.tmp_bytes_max, has_workspace=record.workspace is not None)
        shm = record.limits.shm_bytes_max
        # Rootless Podman's belongs to a namespace above, and cannot be changed: it is left alone where it is right.
        shm_made = _shm_bytes(sandbox) if made is None else made.limits.shm_bytes_max
        if shm is not None and shm != shm_made:
            tmpfs_bytes["/dev/shm"] = shm  # noqa: S108  (inside the sandbox)
        source = next(iter(sources), None)
        async with self._staging.changing(sandbox, source, tmpfs_bytes=tmpfs_bytes, hostname=record.name) as told:
            yield told

    async def _connect(
        self,
        sandbox: Sandbox,
        container_id: str,
        engine: Engine,
        sources: Sequence[MountSource],
        mounts: Sequence[Mount],
        timings: Timings,
    ) -> None:
        await sandbox.connect(container_id, engine, _paths_inside(sandbox, mounts))
        timings.mark("init")
        await self._staging.check_arrived(sandbox, sources)
        self._workspaces.note_backend(sandbox)
        timings.mark("workspace")

    async def _create(self, engine: Engine, spec: ContainerSpec) -> str:
        try:
            return await engine.create(spec)
        except ImageNotFound as error:
            if spec.image != self._default_image:
                # Only the default image can be built here; any other is the engine's to fetch.
                error.hint = spelling.hint(
                    _short(spec.image), await _names_of_images(engine), f"{engine.name} pull {spec.image}"
                )
            raise

    def _spec(self, sandbox: Sandbox, info: EngineInfo, mounts: Sequence[Mount]) -> ContainerSpec:
        record = sandbox.record
        binds = [
            Mount(source=record.bin_dir, target=INSIDE_BIN, read_only=True),
            Mount(source=sandbox.io_dir, target=INSIDE_RUN),
            *_resolver(sandbox, info),
            *mounts,
        ]
        tmpfs_bytes = _tmpfs_bytes(record.tmp_bytes_max, has_workspace=any(each.target == TARGET for each in mounts))
        return ContainerSpec(
            sandbox_id=record.id,
            owner=self._owner,
            image=record.image,
            command=(f"{INSIDE_BIN}/sandbox-init", INSIDE_RUN),
            user=record.user,
            keep_id=record.keep_id,
            hostname=record.name or record.id,
            limits=passable(record.limits, info),
            mounts=tuple(binds),
            tmpfs=tuple(
                Tmpfs(target=target, size_bytes_max=size_bytes, executable=target != "/run")
                for target, size_bytes in tmpfs_bytes.items()
            ),
            network=record.network,
            seccomp_profile=self._seccomp_profile,
            nproc_max=info.nproc_hard_max,
            selinux_disable=info.selinux_enforcing,
            note=note.written(record),
        )


def _resolver(sandbox: Sandbox, info: EngineInfo) -> Sequence[Mount]:
    """Podman gives no name servers to a container without a network; they are there before the network is."""
    able = info.capabilities
    if sandbox.record.network is not Network.NONE or able is None or able.network_switch != "user_mode":
        return ()
    return [Mount(source=sandbox.resolver_path, target=INSIDE_RESOLVER, read_only=True)]


def _paths_inside(sandbox: Sandbox, mounts: Sequence[Mount]) -> dict[str, str]:
    """Target inside to path on the host: what must be mounted there."""
    return {
        **programs_of(sandbox),
        INSIDE_RUN: sandbox.io_dir,
        **{mount.target: os.path.realpath(mount.source) for mount in mounts if mount.overlay is None},
    }


def programs_of(sandbox: Sandbox) -> dict[str, str]:
    """Target inside to path on the host: the programs of ours that are mounted into it."""
    return {INSIDE_BIN: sandbox.record.bin_dir} if sandbox.record.bin_dir else {}


def _shm_bytes(sandbox: Sandbox) -> int | None:
    """The size of its /dev/shm now; None where that cannot be read."""
    if sandbox.pid is None:
        return None
    try:
        return read_fixed_limits(sandbox.pid).shm_bytes_max
    except CgroupUnreadable:
        return None


def _tmpfs_bytes(tmp_bytes_max: int, *, has_workspace: bool) -> dict[str, int]:
    """Target to size of everything that is writable inside, besides a workspace."""
    sizes = dict.fromkeys(TMPFS_TARGETS if has_workspace else (*TMPFS_TARGETS, TARGET), tmp_bytes_max)
    return {**sizes, "/run": min(tmp_bytes_max, RUN_TMPFS_BYTES_MAX)}


async def _names_of_images(engine: Engine) -> list[str]:
    """What the engine holds, in short; nothing where it does not say."""
    try:
        held = await engine.list_images()
    except RuntimeFailure:
        return []
    return sorted({_short(tag) for facts in held for tag in facts.tags})


def _short(reference: str) -> str:
    """As people write it."""
    for registry in ("localhost/", "docker.io/library/", "docker.io/"):
        reference = reference.removeprefix(registry)
    return reference.removesuffix(":latest")
