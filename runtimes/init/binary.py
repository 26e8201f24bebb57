"""Where the compiled `sandbox-init`, `sandbox-provoke` and `sandbox-shell` are."""

from __future__ import annotations

import os

from runtimes.init.wire import InitError


class InitBinaryMissing(InitError):
    """The program was not built; `hint` is the command that builds it."""

    def __init__(self, path: str, hint: str) -> None:
        super().__init__(f"cannot find {path}; {hint}")
        self.path = path
        self.hint = hint


def init_binary_path() -> str:
    """The absolute path of the program that is mounted into sandboxes as PID 1.

    Raises:
        InitBinaryMissing: it was never built, or cannot be executed.
    """
    return _path_of("sandbox-init")


def provoke_binary_path() -> str:
    """The absolute path of the program that runs into limits on purpose.

    Raises:
        InitBinaryMissing: likewise.
    """
    return _path_of("sandbox-provoke")


def shell_binary_path() -> str:
    """The absolute path of the program that keeps a shell.

    Raises:
        InitBinaryMissing: likewise.
    """
    return _path_of("sandbox-shell")


def _path_of(name: str) -> str:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    if not os.access(path, os.X_OK):
        raise InitBinaryMissing(path, "build it: python hack/build_init.py")
    return path
