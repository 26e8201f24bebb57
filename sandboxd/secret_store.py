"""Secrets: kept in files of this user's alone, and given to sandboxes by name, as files in memory at /run/secrets.

A value is in its file, and in memory while it is set, given, or added to requests; nowhere else. The journal, the
events and every reply know names. Of others than those in files only the source is kept (``secret_sources``). To
refuse a secret that somebody passes as a variable, only digests are kept (``secret_digests``).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import logging
import os
import re
import secrets as randomness
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import anyio
import anyio.to_thread
import msgspec

from runtimes.init.file_worker import FileRefused
from sandboxd import spelling
from sandboxd.failures import CapacityExceeded, Conflict, Failure, InvalidArgument, NotFound, PrerequisiteMissing
from sandboxd.sandbox import Sandbox
from sandboxd.secret_digests import PART_CHARS_MIN, SecretDigests
from sandboxd.secret_sources import VALUE_BYTES_MAX, Source, Sources, read_value, write_private
from sandboxd.timings import now_ms

logger = logging.getLogger(__name__)

INSIDE = "/run/secrets"
"""On the tmpfs that every sandbox has at /run."""

SECRETS_MAX = 256

TOLD_S_MAX = 60.0
"""How long the output of a command is good for requests that come one after the other."""

FAILED_S_MAX = 5.0
"""How long a command that gave nothing is not run again: requests come as fast as a sandbox likes."""

LEARN_S_MAX = 5.0
"""How long a request waits for what is only compared with it."""

LEARN_AGAIN_S = 60.0
"""How long those commands that gave nothing are left alone then: no request waits for them but the next one."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}\Z")


class KnownSecret(msgspec.Struct, frozen=True, kw_only=True):
    """What may be said of a secret."""

    name: str
    size_bytes: int | None
    """None: nobody knows before its command is run."""
    changed_at_ms: int
    source: Literal["file", "command", "credential"]
    origin: str = ""
    """The command, or the credential's name."""


class SecretStore:
    """The secrets of one daemon.

    Args:
        directory: Of this user alone; made if it is not there.
        credentials: Where systemd has put the daemon's credentials: secrets that only the service manager changes.
        env: What commands get that are the source of one.
    """

    def __init__(self, directory: str, credentials: str | None = None, env: Mapping[str, str] | None = None) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        os.chmod(directory, 0o700)
        self._sources = Sources(directory, credentials=credentials, env=env or {})
        self._digests = SecretDigests(randomness.token_bytes(32))
        """Of the values that are known: of a command's, once it was run."""
        self._told: dict[str, tuple[float, bytes]] = {}
        self._failed: dict[str, tuple[float, Failure]] = {}
        """When, and why."""
        self._unknown: frozenset[str] = frozenset()
        """Those of commands that have not given a value since the daemon began."""
        self._learn_from_s = 0.0
        self._learning = anyio.Lock()
        self._running: collections.defaultdict[str, anyio.Lock] = collections.defaultdict(anyio.Lock)
        for name in self._names():
            self._learn(name)

    def known(self) -> list[KnownSecret]:
        """All of them, by name."""
        return [self._described(name) for name in self._names()]

    def _names(self) -> list[str]:
        names = {*os.listdir(self._directory), *self._sources.all(), *self._sources.credentials()}
        return sorted(name for name in names if _NAME.match(name))

    def _source(self, name: str) -> Source | None:
        """Where it comes from; None: from its file here. What was set goes before a credential of the same name."""
        source = self._sources.all().get(name)
        if source is not None or os.path.lexists(self._path(name)):
            return source
        return Source(credential=name, changed_at_ms=0) if name in self._sources.credentials() else None

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _described(self, name: str) -> KnownSecret:
        source = self._source(name)
        path = self._path(name)
        if source is not None and source.credential:
            with contextlib.suppress(Failure):
                path = self._sources.credential_path(source.credential)
        size_bytes, changed_at_ms = None, 0
        if source is None or source.credential:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(path)
                size_bytes, changed_at_ms = status.st_size, status.st_mtime_ns // 1_000_000
        return KnownSecret(
            name=name,
            size_bytes=size_bytes,
            changed_at_ms=(source.changed_at_ms if source else 0) or changed_at_ms,
            source="file" if source is None else source.kind,
            origin="" if source is None else source.shown,
        )

    # --- keeping them ---------------------------------------------------------------------------------

    async def put(self, name: str, value: bytes) -> None:
        """Keep a secret, new or changed.

        Raises:
            InvalidArgument: no name, or no value.
            CapacityExceeded: there are as many as there may be.
            Failure: the disk is full.
        """
        self._check_new(name)
        if not 0 < len(value) <= VALUE_BYTES_MAX:
            raise InvalidArgument(
                f"cannot keep the secret {name!r}", detail=f"a value has 1 to {VALUE_BYTES_MAX} bytes"
            )
        await anyio.to_thread.run_sync(write_private, self._path(name), value)
        self._sources.forget(name)
        self._forget(name)
        self._digests.learn(name, value)

    async def put_source(self, name: str, *, command: Sequence[str] = (), credential: str = "") -> None:
        """Keep where a secret comes from, new or changed; it must give a value now.

        Raises:
            InvalidArgument: no name.
            CapacityExceeded: there are as many as there may be.
            Failure: it gives none; nothing has changed.
        """
        self._check_new(name)
        source = Source(command=tuple(command), credential=credential, changed_at_ms=now_ms())
        value = await self._sources.value(name, source)
        await self._sources.put(name, source)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))
        self._forget(name)
        self._digests.learn(name, value)

    def _check_new(self, name: str) -> None:
        check_name(name)
        names = self._names()
        if name not in names and len(names) >= SECRETS_MAX:
            raise CapacityExceeded(f"cannot keep more than {SECRETS_MAX} secrets", hint="sandboxctl secret rm NAME")

    def remove(self, name: str) -> None:
        """Forget a secret. Sandboxes that were given it keep what they have until they stop.

        Raises:
            NotFound: there is none.
            Conflict: it is a credential of the service.
        """
        self.check([name])
        if name not in self._sources.all() and not os.path.lexists(self._path(name)):
            raise Conflict(
                f"cannot remove the secret {name!r}",
                detail="it is a credential that the service manager gives to the daemon",
                hint="systemctl --user edit sandboxd",
            )
        self._sources.forget(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))
        self._forget(name)
        if name in self._names():
            self._learn(name)

    def _forget(self, name: str) -> None:
        """What it was, and what came of its command."""
        self._told.pop(name, None)
        self._failed.pop(name, None)
        self._digests.forget(name)
        self._unknown -= {name}

    def check(self, names: Sequence[str]) -> None:
        """Refuse names that are none of a secret.

        Raises:
            NotFound: there is no such secret.
        """
        present = self._names() if names else ()
        for name in names:
            if name not in present:
                raise NotFound(
                    f"cannot find the secret {name!r}",
                    hint=spelling.hint(name, sorted(present), f"sandboxctl secret set {name} < FILE"),
                )

    async def refuse(self, env: Mapping[str, str], metadata: Mapping[str, str], argv: Sequence[str]) -> None:
        """Refuse a request that holds a known secret where it would be written down, or shown to every process.

        Where there are variables or metadata, which are kept, the output of each command is known before.

        Raises:
            InvalidArgument: it does. Says where, and how a secret is given.
        """
        if (env or metadata) and self._unknown:
            await self._learn_of_commands()
        self.refuse_in(env)
        for key, value in metadata.items():
            self._refuse_text(value, f"the metadata {key!r}", "metadata is written down, and shown by every list")
            self._refuse_text(key, "the name of metadata", "metadata is written down, and shown by every list")
        for number, argument in enumerate(argv):
            self._refuse_text(
                argument, f"argument {number}", "arguments are written down, and every process inside can read them"
            )

    def refuse_in(self, env: Mapping[str, str]) -> None:
        """Refuse variables that hold a known secret: they would be in the journal, and readable for every process.

        As all of a value, or as a part of it (see ``secret_digests``).

        Raises:
            InvalidArgument: one does. Says which, and how a secret is given.
        """
        for variable, value in env.items():
            why = "variables are written down, and every process inside can read them"
            self._refuse_text(value, f"the variable {variable!r}", why, chars_min=1)

    def _refuse_text(self, text: str, where: str, why: str, *, chars_min: int = PART_CHARS_MIN) -> None:
        name = self._digests.name_in(text, chars_min=chars_min)
        if name is not None:
            raise InvalidArgument(
                f"cannot pass the secret {name!r} in {where}",
                detail=why,
                hint=f"--secret {name}, and read {INSIDE}/{name} inside",
            )

    def holds(self, text: str) -> bool:
        """Whether a text holds a known secret that is too long for a mere word."""
        return self._digests.name_in(text, chars_min=PART_CHARS_MIN) is not None

    async def _learn_of_commands(self) -> None:
        """Run those commands of which nobody knows what they print, all at a time, not for long and not each time."""
        async with self._learning:
            if time.monotonic() < self._learn_from_s:
                return
            with anyio.move_on_after(LEARN_S_MAX):
                async with anyio.create_task_group() as tasks:
                    for name in self._unknown:
                        tasks.start_soon(self._learn_of_command, name)
            self._learn_from_s = time.monotonic() + LEARN_AGAIN_S

    async def _learn_of_command(self, name: str) -> None:
        # One that fails, or was removed meanwhile, is said to whoever wants to have it. That the daemon is short of
        # descriptors is no reason to refuse a request.
        with contextlib.suppress(Failure, OSError):
            await self.reveal(name)

    # --- giving them ----------------------------------------------------------------------------------

    async def values(self, names: Sequence[str]) -> dict[str, bytes]:
        """The values of some, as they are now; of a command what it prints now.

        Raises:
            NotFound: one is not kept any more.
            Failure: its source does not give it.
        """
        self.check(names)
        return {name: await self._fetch(name) for name in names}

    async def values_to_start(self, sandbox: Sandbox) -> dict[str, bytes]:
        """The values of a sandbox's own, before it is started: without them it would have to be stopped again.

        Raises:
            PrerequisiteMissing: one is not to be had. Says how the sandbox can do without it.
        """
        values = {}
        for name in sandbox.record.secrets:
            try:
                values.update(await self.values([name]))
            except Failure as error:
                mend = f"sandboxctl secret set {name} < FILE" if isinstance(error, NotFound) else error.hint
                raise PrerequisiteMissing(
                    f"cannot start sandbox {sandbox.record.id}",
                    detail=str(error),
                    hint=f"{mend}   (or without it: sandboxctl secret take {sandbox.record.id} {name})",
                ) from error
        return values

    async def reveal(self, name: str) -> bytes:
        """One value, for a request: a command is not run for each.

        Raises:
            NotFound: it is not kept any more.
            Failure: its source does not give it.
        """
        self.check([name])
        async with self._running[name]:
            at_s, value = self._told.get(name, (0.0, b""))
            if value and time.monotonic() - at_s < TOLD_S_MAX:
                return value
            failed = self._failed.pop(name, None)
            if failed is not None and time.monotonic() - failed[0] < FAILED_S_MAX:
                self._failed[name] = failed
                raise failed[1].with_traceback(None)
            try:
                return await self._fetch(name)
            except Failure as error:
                self._failed[name] = (time.monotonic(), error)
                raise

    async def _fetch(self, name: str) -> bytes:
        source = self._source(name)
        if source is None:
            try:
                value = await anyio.to_thread.run_sync(read_value, name, self._path(name))
            except OSError as error:
                raise Failure(f"cannot read the secret {name!r}", detail=error.strerror or "") from error
        else:
            value = await self._sources.value(name, source)
        if self._source(name) == source:
            if source is not None and source.command:
                self._told[name] = (time.monotonic(), value)
            self._digests.learn(name, value)
            self._unknown -= {name}
        return value

    def _learn(self, name: str) -> None:
        """Know a value again, where that costs no more than to read a file."""
        source = self._source(name)
        if source is not None and source.command:
            self._unknown |= {name}
            return
        try:
            path = self._path(name) if source is None else self._sources.credential_path(source.credential)
            self._digests.learn(name, read_value(name, path))
        except (Failure, OSError) as error:
            # Said again to whoever wants to have it.
            logger.warning("cannot use the secret %r: %s", name, getattr(error, "strerror", None) or error)

    async def deliver(self, sandbox: Sandbox, values: Mapping[str, bytes]) -> None:
        """Put the secrets of a sandbox into its memory, readable for its user. Idempotent; no engine call.

        Raises:
            Failure: there is no room for them inside.
            InitError: its file worker does not answer.
        """
        if not sandbox.record.secrets:
            return
        try:
            async with sandbox.files_for_a_moment() as files:
                await files.make_dir(INSIDE.encode(), mode=0o700)
                for name, value in values.items():
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

    async def withdraw(self, sandbox: Sandbox, names: Sequence[str]) -> None:
        """Take secrets out of a sandbox's memory. Idempotent; no engine call.

        Raises:
            Failure: something else has their place inside.
            InitError: its file worker does not answer.
        """
        async with sandbox.files_for_a_moment() as files:
            for name in names:
                try:
                    await files.remove(f"{INSIDE}/{name}".encode())
                except FileRefused as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                        raise Failure(
                            f"cannot take the secret {name!r} from sandbox {sandbox.record.id}",
                            detail=os.strerror(error.errno),
                        ) from error


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
