"""From the errors of ``runtimes`` to the failures that cross the socket: one table, used at the handlers' edge.

Pure.
"""

from __future__ import annotations

import errno

from runtimes import errors
from runtimes.cgroup.fs import LimitBelowUsage
from runtimes.init.binary import InitBinaryMissing
from runtimes.init.channel import RequestRefused
from runtimes.init.exchange import InitTimeout
from runtimes.init.file_worker import FilesUnsupported, WorkerLost
from runtimes.init.files_wire import InvalidPath
from runtimes.init.wire import InitError, InvalidSpawn, SpawnTooLarge
from sandboxd.failures import (
    CapacityExceeded,
    Conflict,
    EngineRefusedFailure,
    EngineUnavailableFailure,
    Failure,
    InvalidArgument,
    LimitNotEnforceable,
    NotEnoughSpace,
    PrerequisiteMissing,
    SandboxGone,
    Timeout,
    Unsupported,
)

_BY_CLASS: tuple[tuple[type[errors.RuntimeFailure], type[Failure]], ...] = (
    # The first that fits: subclasses stand before their bases.
    (errors.EngineUnavailable, EngineUnavailableFailure),
    (errors.EngineRefused, EngineRefusedFailure),
    (errors.UnreadableAnswer, EngineRefusedFailure),
    (errors.ImageNotFound, PrerequisiteMissing),
    (errors.ContainerNotFound, SandboxGone),
    (errors.Unsupported, Unsupported),
    (LimitBelowUsage, Conflict),
    (errors.CgroupUnreadable, LimitNotEnforceable),
)


def failure_from(error: errors.RuntimeFailure | InitError) -> Failure:
    """Return the failure that says the same."""
    if isinstance(error, InitBinaryMissing):
        return PrerequisiteMissing("cannot find sandbox-init", detail=error.path, hint=error.hint)
    if isinstance(error, SpawnTooLarge | InvalidSpawn | InvalidPath):
        return InvalidArgument(str(error))
    if isinstance(error, WorkerLost):
        return Conflict(
            "cannot say whether it was done",
            detail=f"a command killed the sandbox's file worker before it answered: {error}",
            hint="look, and try again",
        )
    if isinstance(error, InitTimeout):
        return Timeout("cannot wait for the sandbox any longer", detail=str(error), hint="sandboxctl stats")
    if isinstance(error, FilesUnsupported) or (isinstance(error, RequestRefused) and error.errno == errno.EOPNOTSUPP):
        return Unsupported(
            "cannot do this in a sandbox that an older version made",
            detail=f"it keeps the init that it was made with: {error}",
            hint="make a new one: sandboxctl create",
        )
    if isinstance(error, InitError):
        return SandboxGone("cannot reach the sandbox's init", detail=str(error), hint="sandboxctl ls")
    for runtime_class, failure_class in _BY_CLASS:
        if isinstance(error, runtime_class):
            return failure_class(error.brief, detail=error.detail, hint=error.hint)
    return Failure(error.brief, detail=error.detail, hint=error.hint)


def failure_of_host(error: OSError) -> Failure | None:
    """What the host has no more of, wherever that was noticed; None: it is another error."""
    match error.errno:
        case errno.EMFILE | errno.ENFILE:
            return CapacityExceeded(
                "cannot open anything more: there are too many open files",
                detail=str(error),
                hint="remove sandboxes (sandboxctl ls), or let the daemon open more: ulimit -n, LimitNOFILE=",
            )
        case errno.ENOMEM:
            return CapacityExceeded("cannot go on: the host has no memory", detail=str(error), hint="free -h")
        case errno.ENOSPC | errno.EDQUOT:
            return NotEnoughSpace("cannot go on: the disk is full", detail=str(error), hint="df -h")
        case _:
            return None
