"""Having an engine mount what was opened and judged.

By descriptor where we may mount, else by path, with a look at what arrived.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import msgspec

from runtimes.errors import Unsupported
from runtimes.model import Mount
from runtimes.mounts import mounts_below
from sandboxd.failures import InvalidArgument
from sandboxd.running import identity_inside
from sandboxd.sandbox import Sandbox
from sandboxd.workspace import MountSource, Stage


class Staging:
    """How this daemon gets directories into containers that start.

    Args:
        may_mount: The daemon is root, and mounts by descriptor.
        userns_fd: The namespace to map ids with; None: ids cannot be mapped here.
    """

    def __init__(self, *, may_mount: bool, userns_fd: int | None) -> None:
        self._may_mount = may_mount
        self._userns_fd = userns_fd

    @contextlib.contextmanager
    def staged(self, sandbox: Sandbox, sources: Sequence[MountSource]) -> Iterator[list[Mount]]:
        """What the engine is to mount, for as long as the container starts.

        Raises:
            Unsupported: it cannot be mounted as it was asked for.
        """
        if not self._may_mount:
            yield [_by_path(source) for source in sources]
            return
        with contextlib.ExitStack() as staged:
            mounts = []
            for source in sources:
                stage = Stage(sandbox.stage_path(source.target))
                staged.callback(stage.clear)
                self._put(sandbox, source, stage)
                mounts.append(Mount(source=stage.path, target=source.target, read_only=source.read_only))
            yield mounts

    def _put(self, sandbox: Sandbox, source: MountSource, stage: Stage) -> None:
        record = sandbox.record.workspace
        userns_fd = self._userns_fd if record is not None and record.mounted == "idmapped" else None
        try:
            stage.put(source, userns_fd=userns_fd)
        except Unsupported:
            if userns_fd is None or record is None:
                raise
            stage.put(source, userns_fd=None)
            warning = "the file system of the workspace cannot map ids: files belong to root inside"
            sandbox.put(
                workspace=msgspec.structs.replace(record, mounted="as-is"),
                warnings=(*sandbox.record.warnings, warning),
            )

    async def check_arrived(self, sandbox: Sandbox, sources: Sequence[MountSource]) -> None:
        """Where the engine mounted by path, see that it was what we had opened and judged.

        Raises:
            InvalidArgument: it was replaced meanwhile.
        """
        for source in [] if self._may_mount else sources:
            if await identity_inside(sandbox, source.target) != (source.device, source.inode):
                raise InvalidArgument(
                    f"cannot use {source.path!r} as a workspace",
                    detail="it was replaced by something else while it was mounted",
                )


def _by_path(source: MountSource) -> Mount:
    if source.read_only and any(path != source.path for path in mounts_below(source.path)):
        raise Unsupported(
            f"cannot mount {source.path!r} read-only",
            detail="other file systems are mounted below it, and an engine leaves those writable",
            hint="unmount them, or use it without --ro",
        )
    return Mount(source=source.path, target=source.target, read_only=source.read_only)
