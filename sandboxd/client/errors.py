"""What the Python client raises, under the names that agent code already catches; made from what the daemon said."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from sandboxd.client.connection import RpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.client.model import CommandResult


class SandboxException(Exception):
    """Base of all: what happened, why, and what to do next.

    Args:
        brief: One clause, "cannot ...".
        detail: What the engine, the kernel or the check said.
        hint: A command to type, or a value to use.
        type: As in the protocol's ``ErrorData``, or ``not_running``, ``disconnected``, ``bad_reply``.
    """

    def __init__(self, brief: str, detail: str = "", hint: str = "", type: str = "") -> None:  # noqa: A002
        super().__init__(brief)
        self.brief = brief
        self.detail = detail
        self.hint = hint
        self.type = type

    def __str__(self) -> str:
        said = f"{self.brief}: {self.detail}" if self.detail else self.brief
        return f"{said} (hint: {self.hint})" if self.hint else said


class TimeoutException(SandboxException):
    """A request or a command took longer than it may."""

    result: CommandResult | None = None
    """Of a command: how it ended, and what it wrote until then."""


class NotFoundException(SandboxException):
    """No such sandbox or command, or it is gone."""


class SandboxNotFoundException(NotFoundException):
    """No such sandbox, or it is gone."""


class FileNotFoundException(NotFoundException):
    """No such file in the sandbox."""


class InvalidArgumentException(SandboxException):
    """A value cannot be meant."""


class NotEnoughSpaceException(SandboxException):
    """No room is left in the sandbox."""


class AuthenticationException(SandboxException):
    """The daemon is not yours, or you may not do this."""


class RateLimitException(SandboxException):
    """The daemon or the sandbox has as many of these as it may."""


class CommandExitException(SandboxException):
    """A command ended, and not with 0."""

    def __init__(self, result: CommandResult) -> None:
        super().__init__(
            f"the command exited with code {result.exit_code}", result.error or result.stderr.strip(), type="nonzero"
        )
        self.result = result

    @property
    def stdout(self) -> str:
        """What it wrote to stdout."""
        return self.result.stdout

    @property
    def stderr(self) -> str:
        """What it wrote to stderr."""
        return self.result.stderr

    @property
    def exit_code(self) -> int:
        """Its exit code, or 128 and the number of the signal that ended it."""
        return self.result.exit_code

    @property
    def error(self) -> str | None:
        """Why it ended, where the exit code does not say it."""
        return self.result.error


_EXCEPTIONS: dict[str, type[SandboxException]] = {
    "timeout": TimeoutException,
    "not_found": NotFoundException,
    "sandbox_gone": SandboxNotFoundException,
    "invalid_argument": InvalidArgumentException,
    "limit_not_enforceable": InvalidArgumentException,
    "unsupported": InvalidArgumentException,
    "unauthorized": AuthenticationException,
    "capacity_exceeded": RateLimitException,
    "not_enough_space": NotEnoughSpaceException,
}


_BY_CODE: dict[int, type[SandboxException]] = {-32015: SandboxNotFoundException, -32016: FileNotFoundException}
"""Where one type has several codes; as in ``failures``, which an older daemon may not have."""


def exception_from(error: RpcError) -> SandboxException:
    """The exception that an error of the connection is."""
    kind = _BY_CODE.get(error.code) or _EXCEPTIONS.get(error.type, SandboxException)
    return kind(error.brief, error.detail, error.hint, error.type)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Errors of the connection become exceptions of this module."""
    try:
        yield
    except RpcError as error:
        raise exception_from(error) from error
