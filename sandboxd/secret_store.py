"""Secrets: kept in files of this user's alone, and given to sandboxes by name, as files in memory at /run/secrets.

A value is in its file, and in memory while it is set or given; nowhere else. The journal, the events and every reply
know names. To refuse a secret that somebody passes as a variable, keyed digests are kept, which tell nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import logging
import os
import re
import secrets as randomness
from collections.abc import Mapping, Sequence

import anyio.to_thread
import msgspec

from runtimes.init.file_worker import FileRefused
from sandboxd.failures import CapacityExceeded, Conflict, Failure, InvalidArgument, NotFound
from sandboxd.sandbox import Sandbox

logger = logging.getLogger(__name__)

INSIDE = "/run/secrets"
"""On the tmpfs that every sandbox has at /run."""

SECRETS_MAX = 256
VALUE_BYTES_MAX = 64 * 1024

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}\Z")


class KnownSecret(msgspec.Struct, frozen=True, kw_only=True):
    """What may be said of a secret."""

    name: str
    size_bytes: int
    changed_at_ms: int


class SecretStore:
    """The secrets of one daemon.

    Args:
        directory: Of this user alone; made if it is not there.
        credentials: Where systemd has put the daemon's credentials: secrets that only the service manager changes.
    """

    def __init__(self, directory: str, credentials: str | None = None) -> None:
        self._directory = directory
        self._credentials = credentials
        self._key = randomness.token_bytes(32)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        os.chmod(directory, 0o700)
        self._digests = {known.name: self._digest(self._read(known.name)) for known in self.known()}

    def known(self) -> list[KnownSecret]:
        """All of them, by name."""
        found = []
        for name in sorted({*self._names(self._directory), *self._names(self._credentials)}):
            if _NAME.match(name):
                status = os.lstat(self._path(name))
                found.append(
                    KnownSecret(name=name, size_bytes=status.st_size, changed_at_ms=status.st_mtime_ns // 1_000_000)
                )
        return found

    @staticmethod
    def _names(directory: str | None) -> list[str]:
        return [] if directory is None else os.listdir(directory)

    def _path(self, name: str) -> str:
        """Of a secret's file; what was set goes before a credential of the same name."""
        own = os.path.join(self._directory, name)
        if self._credentials is not None and not os.path.lexists(own):
            return os.path.join(self._credentials, name)
        return own

    async def put(self, name: str, value: bytes) -> None:
        """Keep a secret, new or changed.

        Raises:
            InvalidArgument: no name, or no value.
            CapacityExceeded: there are as many as there may be.
            Failure: the disk is full.
        """
        check_name(name)
        if not 0 < len(value) <= VALUE_BYTES_MAX:
            raise InvalidArgument(
                f"cannot keep the secret {name!r}", detail=f"a value has 1 to {VALUE_BYTES_MAX} bytes"
            )
        if name not in self._digests and len(self._digests) >= SECRETS_MAX:
            raise CapacityExceeded(f"cannot keep more than {SECRETS_MAX} secrets", hint="sandboxctl secret rm NAME")
        await anyio.to_thread.run_sync(self._write, name, value)
        self._digests[name] = self._digest(value)

    def remove(self, name: str) -> None:
        """Forget a secret. Sandboxes that were given it keep what they have until they stop.

        Raises:
            NotFound: there is none.
            Conflict: it is a credential of the service.
        """
        self.check([name])
        if not os.path.lexists(os.path.join(self._directory, name)):
            raise Conflict(
                f"cannot remove the secret {name!r}",
                detail="it is a credential that the service manager gives to the daemon",
                hint="systemctl --user edit sandboxd",
            )
        os.unlink(os.path.join(self._directory, name))
        del self._digests[name]
        if any(known.name == name for known in self.known()):
            self._digests[name] = self._digest(self._read(name))

    def check(self, names: Sequence[str]) -> None:
        """Refuse names that are none of a secret.

        Raises:
            NotFound: there is no such secret.
        """
        for name in names:
            if name not in self._digests:
                raise NotFound(
                    f"cannot find the secret {name!r}",
                    hint=f"sandboxctl secret set {name} < FILE   (or: secret list)",
                )

    def refuse_in(self, env: Mapping[str, str]) -> None:
        """Refuse variables that hold a known secret: they would be in the journal, and readable for every process.

        Raises:
            InvalidArgument: one does. Says which, and how a secret is given.
        """
        if not self._digests:
            return
        for variable, value in env.items():
            digest = self._digest(value.encode(errors="surrogateescape"))
            for name, known in self._digests.items():
                if hmac.compare_digest(digest, known):
                    raise InvalidArgument(
                        f"cannot pass the secret {name!r} in the variable {variable!r}",
                        detail="variables are written down, and every process inside can read them",
                        hint=f"--secret {name}, and read {INSIDE}/{name} inside",
                    )

    async def deliver(self, sandbox: Sandbox) -> None:
        """Put the secrets of a sandbox into its memory, readable for its user. Idempotent; no engine call.

        Raises:
            NotFound: one is not kept any more.
            Failure: there is no room for them inside.
            InitError: its file worker does not answer.
        """
        names = sandbox.record.secrets
        if not names:
            return
        self.check(names)
        try:
            async with sandbox.files_for_a_moment() as files:
                await files.make_dir(INSIDE.encode(), mode=0o700)
                for name in names:
                    value = await anyio.to_thread.run_sync(self._read, name)
                    async with await files.temp(f"{INSIDE}/{name}".encode(), mode=0o400) as temp:
                        await anyio.to_thread.run_sync(functools.partial(_write_all, temp.descriptor, value))
                        await temp.commit()
        except FileRefused as error:
            raise Failure(
                f"cannot give its secrets to sandbox {sandbox.record.id}", detail=os.strerror(error.errno)
            ) from error
        except OSError as error:
            raise Failure(
                f"cannot give its secrets to sandbox {sandbox.record.id}", detail=error.strerror or ""
            ) from error

    def _digest(self, value: bytes) -> bytes:
        """Of a value without the line feed that a shell takes away."""
        return hashlib.blake2b(value.rstrip(b"\n"), key=self._key).digest()

    def _read(self, name: str) -> bytes:
        descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(VALUE_BYTES_MAX)

    def _write(self, name: str, value: bytes) -> None:
        path = os.path.join(self._directory, name)
        fresh = os.path.join(self._directory, f".{name}.{randomness.token_hex(4)}")
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise Failure(f"cannot keep the secret {name!r}", detail=error.strerror or "") from error


def check_name(name: str) -> None:
    """Refuse what is no name of a secret.

    Raises:
        InvalidArgument: it is none.
    """
    if not _NAME.match(name):
        raise InvalidArgument(
            f"cannot name a secret {name!r}",
            detail="a name has 1 to 63 of A-Z a-z 0-9 _ . -, and begins with a letter, a digit or _",
        )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[written:]
