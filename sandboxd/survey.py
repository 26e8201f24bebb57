"""Looking at everything that doctor judges."""

from __future__ import annotations

import os
import pwd
import resource
from collections.abc import Callable, Sequence

import anyio.to_thread
import psutil

from runtimes.cgroup.fs import swap_is_counted
from runtimes.errors import CgroupUnreadable
from runtimes.init.binary import InitBinaryMissing, init_binary_path
from sandboxd import doctor
from sandboxd.audit.auditor import AuditState
from sandboxd.engines import EngineRoom
from sandboxd.image_builder import has_image
from sandboxd.journal import Journal
from sandboxd.paths import is_private

LINGER_DIR = "/var/lib/systemd/linger"
"""One file per user: loginctl(1)."""


class Survey:
    """Gathers facts for doctor.

    Args:
        engines: Looked at again at each survey.
        image: The configured image.
        socket: Where the daemon listens.
        state_dir: Whose disk must have room.
        maps_ids: Id-mapped mounts work; None where they are not needed.
        mounts_late: This kernel can mount into containers that run.
        supervised: A service manager started us.
        audit: How the audit log fares.
        journal: May be in trouble.
        metrics_problem: Why metrics are not served where they should be.
        exposed_services: Those that every user of the host can connect to, though none should.
    """

    def __init__(
        self,
        *,
        engines: EngineRoom,
        image: str,
        socket: str,
        state_dir: str,
        maps_ids: bool | None,
        mounts_late: bool,
        supervised: bool,
        audit: Callable[[], AuditState],
        journal: Journal,
        metrics_problem: Callable[[], str],
        exposed_services: Callable[[], Sequence[str]],
    ) -> None:
        self._exposed_services = exposed_services
        self._engines = engines
        self._image = image
        self._socket = socket
        self._state_dir = state_dir
        self._maps_ids = maps_ids
        self._mounts_late = mounts_late
        self._supervised = supervised
        self._audit = audit
        self._journal = journal
        self._metrics_problem = metrics_problem

    async def examine(self) -> doctor.Facts:
        """Look at the host."""
        await self._engines.refresh()
        usable = {engine.name: engine for engine in self._engines.usable()}
        found = [
            doctor.EngineFacts(
                info=info, has_image=await has_image(usable[info.name], self._image) if info.usable else None
            )
            for info in self._engines.infos
        ]
        init_error = init_hint = ""
        try:
            init_binary_path()
        except InitBinaryMissing as error:
            init_error, init_hint = str(error), error.hint
        try:
            free_bytes: int | None = (await anyio.to_thread.run_sync(psutil.disk_usage, self._state_dir)).free
        except OSError:
            free_bytes = None
        return doctor.Facts(
            engines=tuple(found),
            image=self._image,
            init_error=init_error,
            init_hint=init_hint,
            state_dir=self._state_dir,
            state_free_bytes=free_bytes,
            socket=self._socket,
            socket_dir_private=is_private(os.path.dirname(self._socket), os.geteuid()),
            daemon_nofile_soft=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            idmap_works=self._maps_ids,
            mounts_late=self._mounts_late,
            journal_trouble=self._journal.trouble,
            journal_damaged=self._journal.damaged,
            swap_bytes=psutil.swap_memory().total,
            swap_counted=_swap_counted(),
            lingers=_lingers(supervised=self._supervised, rootless=any(engine.info.rootless for engine in found)),
            audit=self._audit(),
            metrics_problem=self._metrics_problem(),
            exposed_services=tuple(self._exposed_services()),
        )


def _swap_counted() -> bool | None:
    try:
        return swap_is_counted(os.getpid())
    except CgroupUnreadable:
        return None


def _lingers(*, supervised: bool, rootless: bool) -> bool | None:
    """Whether the user's systemd stays when the user goes; None: none of what we care for is below it."""
    uid = os.geteuid()
    if uid == 0 or not os.path.isdir(f"/run/user/{uid}/systemd") or not (supervised or rootless):
        return None
    return os.path.exists(os.path.join(LINGER_DIR, pwd.getpwuid(uid).pw_name))
