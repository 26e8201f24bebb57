"""The client: one thin connection, and on it ``Sandbox`` and ``AsyncSandbox``.

The command line's hot verbs import this package for the connection alone, so everything else is loaded when it is
first named. By ``import_module`` and not by ``import``, which would count as an import of the command line's, too.
"""

from __future__ import annotations

from sandboxd.client.connection import FRAME_BYTES_MAX, Connection, Message, NotRunning, RpcError, result_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandboxd.client.aio import AsyncCommandHandle, AsyncSandbox, AsyncSandboxPaginator, AsyncShell
    from sandboxd.client.aio_files import AsyncFiles, AsyncWatchHandle
    from sandboxd.client.copying import Skipped, TransferInfo
    from sandboxd.client.errors import (
        AuthenticationException,
        CommandExitException,
        FileNotFoundException,
        InvalidArgumentException,
        NotEnoughSpaceException,
        NotFoundException,
        RateLimitException,
        SandboxException,
        SandboxNotFoundException,
        TimeoutException,
    )
    from sandboxd.client.file_model import (
        EntryInfo,
        FilesystemEvent,
        FilesystemEventType,
        FileType,
        WriteEntry,
        WriteInfo,
    )
    from sandboxd.client.files import Files, WatchHandle
    from sandboxd.client.model import (
        CommandResult,
        LimitReport,
        ListedSandbox,
        Problem,
        ProcessInfo,
        Provocation,
        PtySize,
        SandboxInfo,
        SandboxMetrics,
        SandboxPaginator,
        SandboxQuery,
        SandboxVerification,
        ShellInfo,
        ShellResult,
    )
    from sandboxd.client.sandbox import CommandHandle, Sandbox, Shell

_ROOMS = {
    "aio": ("AsyncCommandHandle", "AsyncSandbox", "AsyncSandboxPaginator", "AsyncShell"),
    "aio_files": ("AsyncFiles", "AsyncWatchHandle"),
    "copying": ("Skipped", "TransferInfo"),
    "errors": (
        "AuthenticationException",
        "CommandExitException",
        "FileNotFoundException",
        "InvalidArgumentException",
        "NotEnoughSpaceException",
        "NotFoundException",
        "RateLimitException",
        "SandboxException",
        "SandboxNotFoundException",
        "TimeoutException",
    ),
    "file_model": (
        "EntryInfo",
        "FileType",
        "FilesystemEvent",
        "FilesystemEventType",
        "WriteEntry",
        "WriteInfo",
    ),
    "files": ("Files", "WatchHandle"),
    "model": (
        "CommandResult",
        "LimitReport",
        "ListedSandbox",
        "Problem",
        "ProcessInfo",
        "Provocation",
        "PtySize",
        "SandboxInfo",
        "SandboxMetrics",
        "SandboxPaginator",
        "SandboxQuery",
        "SandboxVerification",
        "ShellInfo",
        "ShellResult",
    ),
    "sandbox": ("CommandHandle", "Sandbox", "Shell"),
}

__all__ = [
    "FRAME_BYTES_MAX",
    "AsyncCommandHandle",
    "AsyncFiles",
    "AsyncSandbox",
    "AsyncSandboxPaginator",
    "AsyncShell",
    "AsyncWatchHandle",
    "AuthenticationException",
    "CommandExitException",
    "CommandHandle",
    "CommandResult",
    "Connection",
    "EntryInfo",
    "FileNotFoundException",
    "FileType",
    "Files",
    "FilesystemEvent",
    "FilesystemEventType",
    "InvalidArgumentException",
    "LimitReport",
    "ListedSandbox",
    "Message",
    "NotEnoughSpaceException",
    "NotFoundException",
    "NotRunning",
    "Problem",
    "ProcessInfo",
    "Provocation",
    "PtySize",
    "RateLimitException",
    "RpcError",
    "Sandbox",
    "SandboxException",
    "SandboxInfo",
    "SandboxMetrics",
    "SandboxNotFoundException",
    "SandboxPaginator",
    "SandboxQuery",
    "SandboxVerification",
    "Shell",
    "ShellInfo",
    "ShellResult",
    "Skipped",
    "TimeoutException",
    "TransferInfo",
    "WatchHandle",
    "WriteEntry",
    "WriteInfo",
    "result_of",
]


def __getattr__(name: str) -> object:
    for room, names in _ROOMS.items():
        if name in names:
            from importlib import import_module

            value: object = getattr(import_module(f"{__name__}.{room}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
