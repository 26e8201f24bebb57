"""The stdins of commands in the background, over a planned restart.

The daemon holds their writing ends, and a command whose last writing end is closed reads end of file.

They go to the next daemon with the listening socket, or through the service manager's descriptor store. What comes
back is believed to be nothing but a pipe that can be written to.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Collection, Mapping

PREFIX = "stdin."

KEPT_MAX = 256
"""FileDescriptorStoreMax= of the unit."""


def name_of(sandbox_id: str, command_id: int) -> str:
    """What a descriptor is called meanwhile: FDNAME= takes no colon."""
    return f"{PREFIX}{sandbox_id}.{command_id:012x}"


class KeptInputs:
    """What a daemon before has left.

    Args:
        descriptors: By their names; this is their owner from now on.
    """

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        self._descriptors = dict(descriptors)
        self.names = tuple(descriptors)
        """All that came. Whoever keeps copies of them is to let go of those: while one is open, no stdin ends."""

    def take(self, sandbox_id: str, command_id: int) -> int | None:
        """The writing end of a command's stdin, the caller's from now on; None: none was left."""
        descriptor = self._descriptors.pop(name_of(sandbox_id, command_id), None)
        if descriptor is None or _is_writable_pipe(descriptor):
            return descriptor
        os.close(descriptor)
        return None

    def close_others(self, sandbox_ids: Collection[str]) -> None:
        """Close those of sandboxes that are not there any more."""
        for name in list(self._descriptors):
            if name.removeprefix(PREFIX).rpartition(".")[0] not in sandbox_ids:
                os.close(self._descriptors.pop(name))

    def close(self) -> None:
        """Close what nobody has taken. Idempotent."""
        self.close_others(())


def _is_writable_pipe(descriptor: int) -> bool:
    writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    return writes and stat.S_ISFIFO(os.fstat(descriptor).st_mode)
