"""The engines of this host: which there are, which one a new sandbox gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from runtimes.engine import Engine
from runtimes.errors import EngineUnavailable
from runtimes.model import EngineInfo, EngineName
from runtimes.suitability import choose
from sandboxd.failures import Unsupported

Detect = Callable[[], Awaitable[Sequence[EngineInfo]]]
"""Looks at the host: one ``EngineInfo`` per engine that is known to us, usable or not."""


class BegunLook:
    """A look at the engines that begins before anybody has asked: who asks first is given what it finds.

    Args:
        detect: Looks.
    """

    def __init__(self, detect: Detect) -> None:
        self._detect = detect
        self._found: Sequence[EngineInfo] | None = None
        self._looked = anyio.Event()
        self._given = False

    async def begin(self) -> None:
        """Look, once."""
        self._found = await self._detect()
        self._looked.set()

    async def __call__(self) -> Sequence[EngineInfo]:
        """See ``Detect``."""
        if self._given:
            return await self._detect()
        self._given = True
        await self._looked.wait()
        assert self._found is not None
        return self._found


class EngineRoom:
    """All engines that were found; one daemon drives them at once.

    Args:
        detect: Looks at the host.
        build: Makes the engine for a usable ``EngineInfo``, whose calls wait their turn at the semaphore.
        calls_max: Calls of one engine at once.
    """

    def __init__(
        self,
        detect: Detect,
        build: Callable[[EngineInfo, anyio.Semaphore], Engine],
        calls_max: int,
    ) -> None:
        self._detect = detect
        self._build = build
        self._limiters = {name: anyio.Semaphore(calls_max) for name in EngineName}
        self._detecting = anyio.Lock()
        self._engines: dict[EngineName, Engine] = {}
        self.infos: tuple[EngineInfo, ...] = ()

    async def refresh(self) -> None:
        """Look again. An engine that was usable and is not any more stays known, and answers for itself."""
        async with self._detecting:
            self.infos = tuple(await self._detect())
            for info in self.infos:
                known = self._engines.get(info.name)
                if info.usable and (known is None or known.info != info):
                    self._engines[info.name] = self._build(info, self._limiters[info.name])

    def usable(self) -> list[Engine]:
        """The engines that can be driven."""
        return list(self._engines.values())

    def default(self) -> EngineName | None:
        """The engine that a sandbox gets when nobody says which."""
        try:
            return choose(self.infos, None).name
        except EngineUnavailable:
            return None

    def get(self, name: EngineName) -> Engine:
        """The engine of this name.

        Raises:
            EngineUnavailable: it cannot be used, with the reason.
        """
        engine = self._engines.get(name)
        if engine is None:
            choose(self.infos, name)
            raise EngineUnavailable(f"cannot use {name}", hint="sandboxctl doctor")
        return engine

    def chosen(self, name: str) -> Engine:
        """The engine for a new sandbox, by what is known of the host now.

        Raises:
            EngineUnavailable: none can be used, with a reason for each.
        """
        return self.get(choose(self.infos, None if name == "auto" else EngineName(name)).name)

    async def choose(self, name: str) -> Engine:
        """The engine for a new sandbox; ``auto`` takes the best that works. Looks again before it gives up.

        Raises:
            EngineUnavailable: none can be used, with a reason for each.
        """
        try:
            return self.chosen(name)
        except EngineUnavailable:
            await self.refresh()
            return self.chosen(name)


def require_pausable(engine: Engine, on_timeout: str) -> None:
    """Refuse to promise a pause that the engine cannot keep.

    Raises:
        Unsupported: it cannot.
    """
    able = engine.info.capabilities
    if on_timeout == "pause" and (able is None or not able.pause):
        raise Unsupported(
            f"cannot pause a sandbox of {engine.name} when its time is over",
            detail="its containers have no control group that could be frozen here",
            hint="--on-timeout kill",
        )
