"""Where a secret comes from, if not from its own file: the output of a command, or a credential of the service.

A command is run when the value is needed, by the daemon, as its user. What it prints is a value and nothing else: no
error, log or reply repeats any of it, nor what it says on stderr, which may hold the same.
"""

from __future__ import annotations

import contextlib
import os
import secrets as randomness
import shlex
from collections.abc import Mapping, Sequence
from typing import Literal

import anyio.to_thread
import msgspec

from runtimes import process
from runtimes.errors import EngineTimeout, RuntimeFailure, UnreadableAnswer
from sandboxd.failures import Failure, PrerequisiteMissing, Timeout

VALUE_BYTES_MAX = 64 * 1024

COMMAND_DEADLINE_S = 30.0
"""A password manager may ask its user for a touch."""

STDERR_BYTES_MAX = 64 * 1024

SOURCES_BYTES_MAX = 4 * 1024 * 1024

FILE_NAME = ".sources.json"
"""No name of a secret begins with a dot."""


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One secret that is not kept here: exactly one of ``command`` and ``credential`` is there."""

    command: tuple[str, ...] = ()
    credential: str = ""
    changed_at_ms: int

    @property
    def kind(self) -> Literal["command", "credential"]:
        """In the protocol's words."""
        return "command" if self.command else "credential"

    @property
    def shown(self) -> str:
        """As a person would write it."""
        return shlex.join(self.command) if self.command else self.credential


class Sources:
    """The sources of one daemon, by the names of their secrets; written down in a file of this user's alone.

    Args:
        directory: Of the secrets.
        credentials: Where systemd has put the daemon's credentials; None: it was given none.
        env: What commands get.
    """

    def __init__(self, directory: str, *, credentials: str | None, env: Mapping[str, str]) -> None:
        self._path = os.path.join(directory, FILE_NAME)
        self._credentials = credentials
        self._env = process.client_environment(env)
        self._sources = self._load()

    def all(self) -> Mapping[str, Source]:
        """All of them."""
        return self._sources

    def credentials(self) -> Sequence[str]:
        """The names of what the service manager has given to the daemon."""
        if self._credentials is None:
            return ()
        with contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self._credentials))
        return ()

    def credential_path(self, name: str) -> str:
        """The file of a credential.

        Raises:
            PrerequisiteMissing: the service manager did not give it.
        """
        if self._credentials is None or name not in self.credentials():
            given = ", ".join(self.credentials())
            raise PrerequisiteMissing(
                f"cannot find the credential {name!r}",
                detail=f"the service manager gave the daemon {given or 'none'}",
                hint=f"systemctl --user edit sandboxd, with LoadCredential={name}:/path/of/the/file in [Service]",
            )
        return os.path.join(self._credentials, name)

    async def put(self, name: str, source: Source) -> None:
        """Keep a source, new or changed.

        Raises:
            Failure: it cannot be written down.
        """
        await anyio.to_thread.run_sync(self._store, {**self._sources, name: source})

    def forget(self, name: str) -> None:
        """Keep it no more. Idempotent.

        Raises:
            Failure: it cannot be written down.
        """
        if name in self._sources:
            self._store({other: source for other, source in self._sources.items() if other != name})

    async def value(self, name: str, source: Source) -> bytes:
        """What a source gives now.

        Raises:
            PrerequisiteMissing: there is no such credential, or the command fails, or gives nothing, or too much.
            Timeout: the command takes too long.
        """
        if source.credential:
            return await anyio.to_thread.run_sync(read_value, name, self.credential_path(source.credential))
        return await self._run(name, source.command)

    async def _run(self, name: str, command: Sequence[str]) -> bytes:
        brief = f"cannot have the secret {name!r} of its command"
        by_hand = f"see what it does by hand: {shlex.join(command)}"
        try:
            finished = await process.run(
                command,
                what=f"the command of the secret {name!r}",
                deadline_s=COMMAND_DEADLINE_S,
                env=self._env,
                stdout_bytes_max=VALUE_BYTES_MAX + 1,
                stderr_bytes_max=STDERR_BYTES_MAX,
            )
        except EngineTimeout:
            # Not chained: its detail is what the command said.
            raise Timeout(brief, detail=f"it took more than {COMMAND_DEADLINE_S:g} s", hint=by_hand) from None
        except UnreadableAnswer:
            raise PrerequisiteMissing(
                brief, detail=f"it printed more than {VALUE_BYTES_MAX} bytes", hint=by_hand
            ) from None
        except RuntimeFailure as error:
            raise PrerequisiteMissing(brief, detail=str(error), hint=by_hand) from None
        if finished.returncode != 0:
            raise PrerequisiteMissing(brief, detail=f"it ended with {finished.returncode}", hint=by_hand)
        value = finished.stdout.removesuffix(b"\n")
        if not value:
            raise PrerequisiteMissing(brief, detail="it printed nothing", hint=by_hand)
        return checked(name, value)

    def _load(self) -> dict[str, Source]:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return {}
        with os.fdopen(descriptor, "rb") as file:
            raw = file.read(SOURCES_BYTES_MAX)
        try:
            return msgspec.json.decode(raw, type=dict[str, Source])
        except msgspec.MsgspecError as error:
            raise Failure(
                f"cannot read {self._path}", detail=str(error), hint=f"mv {self._path} {self._path}.damaged"
            ) from error

    def _store(self, sources: dict[str, Source]) -> None:
        write_private(self._path, msgspec.json.encode(sources))
        self._sources = sources


def read_value(name: str, path: str) -> bytes:
    """The value in a file.

    Raises:
        OSError: it cannot be read, or is a link.
        PrerequisiteMissing: it is empty, or too large.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        return checked(name, file.read(VALUE_BYTES_MAX + 1))


def checked(name: str, value: bytes) -> bytes:
    """The value, if it can be one.

    Raises:
        PrerequisiteMissing: it is empty, or too large.
    """
    if not 0 < len(value) <= VALUE_BYTES_MAX:
        raise PrerequisiteMissing(
            f"cannot use the value of the secret {name!r}",
            detail=f"a value has 1 to {VALUE_BYTES_MAX} bytes",
            hint="sandboxctl secret list",
        )
    return value


def write_private(path: str, data: bytes) -> None:
    """Replace a file by one that only this user can read, whole or not at all.

    Raises:
        Failure: the disk is full, or it cannot be written.
    """
    directory, name = os.path.split(path)
    fresh = os.path.join(directory, f".{name}.{randomness.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise Failure(f"cannot write {path}", detail=error.strerror or "") from error
