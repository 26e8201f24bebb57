"""What the errors of ``runtimes`` are called on the wire: what a caller is to do depends on it."""

from __future__ import annotations

import errno

import pytest

from runtimes.init.binary import InitBinaryMissing
from runtimes.init.channel import RequestRefused
from runtimes.init.exchange import ChannelClosed, InitProtocolError, InitTimeout
from runtimes.init.file_worker import FilesUnsupported, WorkerLost
from runtimes.init.files_wire import InvalidPath
from runtimes.init.wire import InitError, SpawnTooLarge, Stage
from sandboxd.translation import failure_from, failure_of_host


@pytest.mark.parametrize(
    ("error", "type_"),
    [
        (WorkerLost("it ended"), "conflict"),
        (InitTimeout("it did not answer within 5 s"), "timeout"),
        (ChannelClosed("it ended"), "sandbox_gone"),
        (InitProtocolError("it talks nonsense"), "sandbox_gone"),
        (SpawnTooLarge("too many words"), "invalid_argument"),
        (InvalidPath("it has a NUL"), "invalid_argument"),
        (InitBinaryMissing("/nowhere", "build it"), "prerequisite_missing"),
        (FilesUnsupported("init 0.1 has no file worker"), "unsupported"),
        (RequestRefused(errno.EOPNOTSUPP, Stage.REQUEST), "unsupported"),
        (RequestRefused(errno.ENOENT, Stage.REQUEST), "sandbox_gone"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_only_a_sandbox_that_is_lost_is_called_gone(error: InitError, type_: str) -> None:
    """A killed file worker has a successor, and a slow init may still answer: nobody should remove it for that."""
    failure = failure_from(error)
    assert failure.type == type_
    assert failure.brief.startswith("cannot ") or type_ == "invalid_argument"


@pytest.mark.parametrize(
    ("number", "type_"),
    [
        (errno.EMFILE, "capacity_exceeded"),
        (errno.ENFILE, "capacity_exceeded"),
        (errno.ENOMEM, "capacity_exceeded"),
        (errno.ENOSPC, "not_enough_space"),
        (errno.EDQUOT, "not_enough_space"),
        (errno.EPERM, None),
    ],
)
def test_what_the_host_has_no_more_of_is_no_defect_of_ours(number: int, type_: str | None) -> None:
    """It may run out anywhere, in the middle of anything; whoever asked has to learn what to do about it."""
    failure = failure_of_host(OSError(number, "said the kernel"))
    assert (failure and failure.type) == type_
    assert failure is None or failure.hint
