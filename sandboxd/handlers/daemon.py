"""``image/*`` and ``daemon/*``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import psutil

from runtimes.model import EngineInfo
from sandboxd import __version__, doctor, protocol
from sandboxd.connection import Context
from sandboxd.engines import EngineRoom
from sandboxd.handlers.table import Handler
from sandboxd.image_builder import ImageBuilder
from sandboxd.manager import Manager
from sandboxd.recovery import Finding, Repaired


class Collect(Protocol):
    """See ``Recovery.collect``."""

    def __call__(self, *, dry_run: bool) -> Awaitable[tuple[list[Finding], list[str]]]:
        """Look, and carry out."""
        ...


class DaemonHandlers:
    """The daemon itself, and the images of its engines.

    Args:
        manager: The sandboxes.
        engines: The engines.
        images: Makes images.
        examine: Gathers what doctor judges.
        repair: Makes a damaged journal whole.
        collect: Removes what is nobody's; returns that, and the engines that did not answer.
        daemon: What ``daemon/info`` says of this process, engines and counts excepted.
        config: Says which settings are in force.
        reload: Reads them again.
        shut_down: Begins the end of the daemon.
        hand_over: Leaves the listening socket to the next daemon, and returns copies of it and of what else is to go
            on, by their names, for whoever starts that; the caller closes them. None where a service manager does.
    """

    def __init__(
        self,
        *,
        manager: Manager,
        engines: EngineRoom,
        images: ImageBuilder,
        examine: Callable[[], Awaitable[doctor.Facts]],
        repair: Callable[[], Awaitable[Repaired]],
        collect: Collect,
        daemon: protocol.DaemonInfo,
        config: Callable[[], protocol.DaemonConfig],
        reload: Callable[[], protocol.DaemonReloaded],
        shut_down: Callable[[], None],
        hand_over: Callable[[], list[tuple[str, int]]],
    ) -> None:
        self._manager = manager
        self._engines = engines
        self._images = images
        self._examine = examine
        self._repair = repair
        self._collect = collect
        self._daemon = daemon
        self._config = config
        self._reload = reload
        self._shut_down = shut_down
        self._hand_over = hand_over

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "image/list": self.list_images,
            "image/build": self.build_image,
            "daemon/info": self.info,
            "daemon/doctor": self.doctor,
            "daemon/repair": self.repair,
            "daemon/gc": self.gc,
            "daemon/config": self.config,
            "daemon/reload": self.reload,
            "daemon/handover": self.handover,
            "daemon/shutdown": self.shutdown,
        }

    async def list_images(self, params: protocol.ImageListParams, _: Context) -> protocol.ImageList:
        """Images by engine."""
        return protocol.ImageList(images=await self._images.list(params.engine))

    async def build_image(self, params: protocol.ImageBuildParams, context: Context) -> protocol.ImageBuilt:
        """Make the default image."""
        return await self._images.build(params, context.progress)

    async def info(self, _: protocol.NoParams, __: Context) -> protocol.DaemonInfo:
        """This daemon."""
        default = self._engines.default()
        return msgspec.structs.replace(
            self._daemon,
            version=__version__,
            engines=[engine_report(info, default=info.name is default) for info in self._engines.infos],
            sandboxes=len(self._manager.present()),
            rss_bytes=psutil.Process().memory_info().rss,
        )

    async def doctor(self, _: protocol.NoParams, __: Context) -> protocol.DoctorReport:
        """Look at the host again, and judge it."""
        checks = doctor.judge(await self._examine())
        return protocol.DoctorReport(healthy=all(check.status != "failure" for check in checks), checks=checks)

    async def repair(self, _: protocol.NoParams, __: Context) -> protocol.JournalRepaired:
        """Have a journal that is whole."""
        done = await self._repair()
        return protocol.JournalRepaired(
            kept_aside=done.aside,
            sandboxes=len(self._manager.present()),
            rebuilt=done.rebuilt,
            unseen_engines=list(done.unseen),
        )

    async def gc(self, params: protocol.GcParams, _: Context) -> protocol.GcReport:
        """Remove what is nobody's, or only look."""
        found, unseen = await self._collect(dry_run=params.dry_run)
        return protocol.GcReport(
            dry_run=params.dry_run,
            found=[protocol.GcFinding(**finding._asdict()) for finding in found],
            unseen_engines=unseen,
        )

    async def config(self, _: protocol.NoParams, __: Context) -> protocol.DaemonConfig:
        """The settings in force."""
        return self._config()

    async def reload(self, _: protocol.NoParams, __: Context) -> protocol.DaemonReloaded:
        """Go by changed settings."""
        return self._reload()

    async def handover(self, _: protocol.NoParams, context: Context) -> protocol.Acknowledged:
        """Begin the end, with somebody to come."""
        for name, descriptor in self._hand_over():
            context.notify("daemon/left", protocol.DaemonLeft(name=name), (descriptor,))
        self._shut_down()
        return protocol.Acknowledged()

    async def shutdown(self, _: protocol.NoParams, __: Context) -> protocol.Acknowledged:
        """Begin the end."""
        self._shut_down()
        return protocol.Acknowledged()


def engine_report(info: EngineInfo, *, default: bool) -> protocol.EngineReport:
    """The wire's form of an engine."""
    return protocol.EngineReport(
        name=info.name.value,
        usable=info.usable,
        reason=info.reason,
        hint=info.hint,
        default=default,
        client_version=info.client_version,
        server_version=info.server_version,
        rootless=info.rootless,
        cgroup_version=None if info.cgroup_version is None else info.cgroup_version.value,
        cgroup_manager=info.cgroup_manager,
        controllers=list(info.controllers),
        oci_runtime=info.oci_runtime,
        oci_runtime_reason=info.oci_runtime_reason,
        storage_driver=info.storage_driver,
        socket_path=info.socket_path,
        nofile_hard_max=info.nofile_hard_max,
        capabilities={} if info.capabilities is None else msgspec.structs.asdict(info.capabilities),
        warnings=[warning.what for warning in info.warnings],
    )
