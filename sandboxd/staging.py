"""Having an engine mount what was opened and judged.

By descriptor where we may mount, else by path, with a look at what arrived.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from runtimes.errors import UnreadableAnswer, Unsupported
from runtimes.model import EngineInfo, Mount
from runtimes.mounter.mounter import LateMount, Mounter, Told
from runtimes.mountinfo import covering
from runtimes.mounts import mounts_below, mounts_of
from runtimes.propagation import SlotDirectory
from sandboxd.failures import InvalidArgument
from sandboxd.running import identity_inside
from sandboxd.sandbox import PROVEN_TMPFS, Sandbox
from sandboxd.workspace import TARGET, MountSource, Stage, shown

OVERLAYS = {"overlay": "podman-overlay", "fuse.fuse-overlayfs": "fuse-overlayfs"}
"""What the kernel calls the overlays that engines make, and what we do."""

_Made_co = TypeVar("_Made_co", covariant=True)


class _Mount(Protocol[_Made_co]):
    """Mounts something, with ids as a namespace maps them."""

    def __call__(self, *, userns_fd: int | None) -> _Made_co: ...


class Staging:
    """How this daemon gets directories into containers that start.

    Args:
        may_mount: The daemon is root, and mounts by descriptor.
        userns_fd: The namespace to map ids with; None: ids cannot be mapped here.
        mounter: Mounts into containers that run; None: this host cannot.
        late_calls: The kernel has the calls for that. As root it works without: see ``propagation``.
    """

    def __init__(
        self, *, may_mount: bool, userns_fd: int | None, mounter: Mounter | None, late_calls: bool = True
    ) -> None:
        self._may_mount = may_mount
        self._passes_on = may_mount and not late_calls
        self._userns_fd = userns_fd
        self._mounter = mounter

    def changes_late(self, engine: EngineInfo) -> bool:
        """Whether a container of this engine that runs already can be changed: mounts, sizes of tmpfs, its name.

        As root always; else where the container's user namespace is ours. Not one of an engine's daemon that is root.
        """
        able = engine.capabilities
        return self._mounter is not None and (self._may_mount or (able is not None and able.late_for_callers))

    def prepare(self) -> None:
        """Have what changes containers that run at hand. Where that fails, the first change will say why."""
        if self._mounter is not None:
            with contextlib.suppress(OSError):
                self._mounter.prepare()

    @contextlib.asynccontextmanager
    async def changing(
        self,
        sandbox: Sandbox,
        source: MountSource | None,
        *,
        tmpfs_bytes: Mapping[str, int],
        hostname: str | None,
    ) -> AsyncIterator[Told]:
        """Change a container that runs: a mount, sizes of tmpfs, the host name.

        It is asked for before the body, and seen to be done after it. Who has it done is asked as well how large the
        tmpfs are that a proof is about.

        Raises:
            Unsupported: the kernel or the file system cannot.
            UnreadableAnswer: anything else; what the container sees now is not known.
        """
        if self._passes_on:
            self._pass_on(sandbox, source)
            source = None
        if source is None and not tmpfs_bytes and hostname is None:
            yield Told()
            return
        if self._mounter is None or sandbox.pid is None:
            raise Unsupported("cannot change a running container here", detail="there is no helper for it")
        with contextlib.ExitStack() as opened:
            mount = None
            if source is not None:
                source_fd = source.descriptor
                if self._may_mount:
                    source_fd = self._mapped(sandbox, source, source.detach)
                    opened.callback(os.close, source_fd)
                mount = LateMount(
                    source_fd=source_fd,
                    source_path=source.path,
                    target=source.target,
                    read_only=source.read_only,
                )
            asked = {**dict.fromkeys(PROVEN_TMPFS), **tmpfs_bytes}
            async with self._mounter.changing(sandbox.pid, mount=mount, tmpfs_bytes=asked, hostname=hostname) as told:
                yield told

    def _pass_on(self, sandbox: Sandbox, source: MountSource | None) -> None:
        """Have a container that runs see its project by the way that was left open for it, and close that.

        Raises:
            Unsupported: it cannot be mounted as it was asked for.
            UnreadableAnswer: something else is seen inside.
        """
        slot = SlotDirectory(sandbox.slot_path)
        try:
            if source is None:
                slot.pass_on(None)
                return
            stage = Stage(sandbox.stage_path(source.target))
            try:
                self._put(sandbox, source, stage)
                slot.pass_on(stage.path)
                _check_passed_on(sandbox, source, stage)
            finally:
                sandbox.clear_stages()
        except OSError as error:
            raise UnreadableAnswer(
                "cannot pass a mount on to a running container", detail=error.strerror or str(error)
            ) from error

    @contextlib.contextmanager
    def staged(self, sandbox: Sandbox, sources: Sequence[MountSource]) -> Iterator[list[Mount]]:
        """What the engine is to mount, for as long as the container starts.

        Raises:
            Unsupported: it cannot be mounted as it was asked for.
        """
        with contextlib.ExitStack() as staged:
            # Last of all, with the place that the stages were in.
            staged.callback(sandbox.clear_stages)
            mounts = []
            if self._passes_on and (sandbox.record.slot or sandbox.record.changed_late):
                slot = SlotDirectory(sandbox.slot_path)
                slot.make(size_bytes_max=sandbox.record.tmp_bytes_max, owner=sandbox.record.user)
                mounts.append(Mount(source=slot.path, target=TARGET, passes_on=True))
            for source in sources:
                stage = Stage(sandbox.stage_path(source.target))
                staged.callback(stage.clear)
                if self._may_mount:
                    self._put(sandbox, source, stage)
                    read_only = source.read_only
                    mounts.append(Mount(source=stage.path, target=source.target, read_only=read_only, sealed=True))
                else:
                    mounts.append(_by_path(source, stage))
            yield mounts

    def _put(self, sandbox: Sandbox, source: MountSource, stage: Stage) -> None:
        self._mapped(sandbox, source, functools.partial(stage.put, source))

    def _mapped(self, sandbox: Sandbox, source: MountSource, mount: _Mount[_Made_co]) -> _Made_co:
        """Mount with ids mapped where they are to be; where that cannot be done, as they are, and say so."""
        userns_fd = self._userns_fd if source.is_mapped else None
        try:
            return mount(userns_fd=userns_fd)
        except Unsupported:
            if userns_fd is None:
                raise
            made = mount(userns_fd=None)
            _note_unmapped(sandbox, source)
            return made

    async def check_arrived(self, sandbox: Sandbox, sources: Sequence[MountSource]) -> None:
        """Where the engine mounted by path, see that it was what we had opened and judged.

        Raises:
            InvalidArgument: it was replaced meanwhile.
            Unsupported: the engine made something else than an overlay.
        """
        for source in [] if self._may_mount else sources:
            if source.engine_overlay is not None:
                _check_overlay(sandbox, source)
                arrived: tuple[int, int] | None = _identity_of(source.path)
            else:
                arrived = await identity_inside(sandbox, source.target)
            if arrived != (source.device, source.inode):
                raise InvalidArgument(
                    f"cannot use {shown(source.path)!r} in a sandbox",
                    detail="it was replaced by something else while it was mounted",
                )


def _note_unmapped(sandbox: Sandbox, source: MountSource) -> None:
    """Write down that ids are not mapped there."""
    record = sandbox.record
    if source.target == TARGET and record.workspace is not None:
        sandbox.put(workspace=msgspec.structs.replace(record.workspace, mounted="as-is"))
    sandbox.put(
        mounts=tuple(
            msgspec.structs.replace(mount, mounted="as-is") if mount.target == source.target else mount
            for mount in record.mounts
        ),
        warnings=(
            *record.warnings,
            f"the file system of {shown(source.path)} cannot map ids: files belong to root inside",
        ),
    )


def _check_overlay(sandbox: Sandbox, source: MountSource) -> None:
    """See that the engine made an overlay, and write down which kind."""
    entry = covering(mounts_of(sandbox.pid or 0), source.target)
    backend = None if entry is None or entry.target != source.target else OVERLAYS.get(entry.kind)
    if backend is None:
        raise Unsupported(
            "cannot put an overlay over the project",
            detail=f"the engine mounted {'nothing' if entry is None else entry.kind} there",
            hint="use --copy",
        )
    if sandbox.record.workspace is not None and sandbox.record.workspace.backend != backend:
        sandbox.put(workspace=msgspec.structs.replace(sandbox.record.workspace, backend=backend))


def _check_passed_on(sandbox: Sandbox, source: MountSource, stage: Stage) -> None:
    meant, seen = covering(mounts_of("self"), stage.path), covering(mounts_of(sandbox.pid or 0), source.target)
    wanted = None if meant is None else (meant.device, meant.root, source.target, meant.writable)
    if seen is None or (seen.device, seen.root, seen.target, seen.writable) != wanted:
        raise UnreadableAnswer(
            "cannot pass a mount on to a running container", detail=f"something else is seen at {source.target}"
        )


def _identity_of(path: str) -> tuple[int, int]:
    """Device and inode of what is at a path now."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return status.st_dev, status.st_ino


def _by_path(source: MountSource, stage: Stage) -> Mount:
    if source.read_only and any(path != source.path for path in mounts_below(source.path)):
        raise Unsupported(
            f"cannot mount {shown(source.path)!r} read-only",
            detail="other file systems are mounted below it, and an engine leaves those writable",
            hint="unmount them, or use it without --ro",
        )
    path = source.path
    if not _can_be_said(path, overlay=source.engine_overlay is not None):
        stage.link(path)
        path = stage.path
    return Mount(source=path, target=source.target, read_only=source.read_only, overlay=source.engine_overlay)


def _can_be_said(path: str, *, overlay: bool) -> bool:
    """Whether an engine can be told this path; else it is told one of ours, which leads there."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return "\r\n" not in path and not (overlay and any(character in path for character in ":,\\"))
