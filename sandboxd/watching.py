"""A watch of files in a sandbox: from what was seen inside to notifications that a caller can follow at its own pace.

A caller that does not read is waited for, and meanwhile nothing is fetched: what happens then waits in the kernel's
queue, whose size is bounded, and which says when it has dropped something.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

import anyio
import anyio.lowlevel

from runtimes.init.exchange import ChannelClosed
from runtimes.init.files_watch import Change, ChangeKind, Watcher
from sandboxd import protocol
from sandboxd.failures import SandboxGone
from sandboxd.files import text_of

CHANGES_PER_MESSAGE_MAX = 512
PATH_BYTES_PER_MESSAGE_MAX = 64 * 1024

GATHER_S = 0.02
"""What happens within it after a message goes out with the next one: a storm costs the daemon a share of its time."""

_KINDS = {
    ChangeKind.CREATED: "created",
    ChangeKind.MODIFIED: "modified",
    ChangeKind.CLOSED_AFTER_WRITE: "written",
    ChangeKind.ATTRIBUTES: "attributes",
    ChangeKind.REMOVED: "removed",
    ChangeKind.RENAMED: "renamed",
    ChangeKind.OVERFLOW: "overflow",
}


async def tell(watcher: Watcher, path: str, deliver: Callable[[list[protocol.FileChange]], Awaitable[None]]) -> None:
    """Deliver what changes, in portions, until the watched path itself is gone.

    Raises:
        SandboxGone: the sandbox, or its init, went away.
    """
    while True:
        try:
            changes = await watcher.changes()
        except ChannelClosed as error:
            raise SandboxGone(
                f"cannot watch {path!r} any longer", detail="the sandbox went away", hint="sandboxctl ls"
            ) from error
        for portion in portions(changes):
            await deliver([_told(change) for change in portion])
            await anyio.lowlevel.checkpoint()
        if any(change.kind is ChangeKind.REMOVED and not change.path for change in changes):
            return
        await anyio.sleep(GATHER_S)


def portions(changes: Sequence[Change]) -> Iterator[list[Change]]:
    """The changes in order, each portion small enough for a message that is no burden."""
    portion: list[Change] = []
    path_bytes = 0
    for change in changes:
        portion.append(change)
        path_bytes += len(change.path) + len(change.old_path or b"")
        if len(portion) >= CHANGES_PER_MESSAGE_MAX or path_bytes >= PATH_BYTES_PER_MESSAGE_MAX:
            yield portion
            portion, path_bytes = [], 0
    if portion:
        yield portion


def _told(change: Change) -> protocol.FileChange:
    path, path_bytes = text_of(change.path)
    old_path, old_path_bytes = (None, None) if change.old_path is None else text_of(change.old_path)
    return protocol.FileChange(
        kind=_KINDS[change.kind],  # type: ignore[arg-type]
        path=path,
        path_bytes=path_bytes,
        old_path=old_path,
        old_path_bytes=old_path_bytes,
        is_dir=change.is_directory,
    )
