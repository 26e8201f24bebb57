"""Our errors: what happened, why, and what to type next; with their JSON-RPC code and exit code.

Pure. A failure is made beside the call that failed and travels unchanged to the terminal.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of ``sandboxctl``. ``run`` and ``exec`` exit with the command's own code instead."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    ENGINE_UNAVAILABLE = 3
    PREREQUISITE_MISSING = 4
    NO_SUCH_SANDBOX = 5
    TIMEOUT = 124
    """``run`` and ``exec``: the command was ended because its time was up."""
    EXEC_FAILED = 125
    """``run`` and ``exec``: we failed, the command did not run."""
    NOT_EXECUTABLE = 126
    NOT_FOUND = 127
    SIGNAL_BASE = 128


class Failure(Exception):
    """Base of all failures that cross the socket.

    Args:
        brief: One clause, "cannot ...", quoting what the user typed.
        detail: What the engine, the kernel or the check said.
        hint: A command to type, or a value to use.
    """

    type: ClassVar[str] = "internal"
    code: ClassVar[int] = -32000
    exit_code: ClassVar[Exit] = Exit.FAILURE

    def __init__(self, brief: str, *, detail: str = "", hint: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.brief}: {self.detail}" if self.detail else self.brief


class InvalidArgument(Failure):
    """The request is well formed and cannot be meant."""

    type = "invalid_argument"
    code = -32602
    exit_code = Exit.USAGE


class NotFound(Failure):
    """No such sandbox, command, file, secret, ..."""

    type = "not_found"
    code = -32001
    exit_code = Exit.NO_SUCH_SANDBOX


class NoSuchSandbox(NotFound):
    """No sandbox has this id or name."""

    code = -32015


class NoSuchFile(NotFound):
    """Nothing has this path in the sandbox."""

    code = -32016


class Conflict(Failure):
    """The thing is not in a state in which this can be done."""

    type = "conflict"
    code = -32002


class Timeout(Failure):
    """It took longer than it may."""

    type = "timeout"
    code = -32003


class LimitNotEnforceable(Failure):
    """This host, or this engine, cannot enforce a limit that was asked for."""

    type = "limit_not_enforceable"
    code = -32004
    exit_code = Exit.PREREQUISITE_MISSING


class CapacityExceeded(Failure):
    """The daemon has as many of these as it may."""

    type = "capacity_exceeded"
    code = -32005


class NotEnoughSpace(Failure):
    """A disk is full, or a quota, or a tmpfs: the sandbox's, or ours."""

    type = "not_enough_space"
    code = -32014


class PoolExhausted(Failure):
    """No warm slot, and the caller wanted nothing else."""

    type = "pool_exhausted"
    code = -32006


class SandboxGone(Failure):
    """The sandbox went away, or its init no longer answers."""

    type = "sandbox_gone"
    code = -32007
    exit_code = Exit.NO_SUCH_SANDBOX


class EngineUnavailableFailure(Failure):
    """No engine that can be used, or the chosen one does not answer."""

    type = "engine_unavailable"
    code = -32008
    exit_code = Exit.ENGINE_UNAVAILABLE


class Unauthorized(Failure):
    """The caller may not do this."""

    type = "unauthorized"
    code = -32009


class Unsupported(Failure):
    """The engine, the host or this version cannot do it."""

    type = "unsupported"
    code = -32010
    exit_code = Exit.PREREQUISITE_MISSING


class EngineRefusedFailure(Failure):
    """The engine answered, and said no."""

    type = "engine_refused"
    code = -32013


class PrerequisiteMissing(Failure):
    """Something that is installed, built or set once is not there or of no use: an image, the source of a secret."""

    type = "prerequisite_missing"
    code = -32012
    exit_code = Exit.PREREQUISITE_MISSING


class AuditUnavailable(Failure):
    """The audit log cannot be written, and the settings say that nothing is done without it."""

    type = "audit_unavailable"
    code = -32017
    exit_code = Exit.PREREQUISITE_MISSING


class JournalUnusable(Failure):
    """What is to be begun cannot be written down: the journal is damaged, or the disk is full."""

    type = "journal_unusable"
    code = -32019


class CommandNotStarted(Failure):
    """The sandbox is fine, the program could not be executed. ``detail`` begins with the name of the errno."""

    type = "command_not_started"
    code = -32011


class Stopping(Failure):
    """The daemon stops or restarts. The request was not begun, or changes nothing: it can be sent again as it is."""

    type = "stopping"
    code = -32018


FAILURES: tuple[type[Failure], ...] = (
    Failure,
    InvalidArgument,
    NotFound,
    NoSuchSandbox,
    NoSuchFile,
    Conflict,
    Timeout,
    LimitNotEnforceable,
    CapacityExceeded,
    NotEnoughSpace,
    PoolExhausted,
    SandboxGone,
    EngineUnavailableFailure,
    Unauthorized,
    Unsupported,
    EngineRefusedFailure,
    PrerequisiteMissing,
    AuditUnavailable,
    CommandNotStarted,
    JournalUnusable,
    Stopping,
)

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
REQUEST_CANCELLED = -32800
"""As in LSP."""
