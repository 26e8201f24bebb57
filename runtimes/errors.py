"""What can go wrong below the engine contract, few classes, each because somebody reacts to it.

Every error has a ``brief`` (one clause, phrased "cannot ..."), a ``detail`` (what the engine or the
kernel said, bounded) and a ``hint`` (what to type next, or empty).
"""

from __future__ import annotations


class RuntimeFailure(Exception):
    """Base of all errors of this package."""

    def __init__(self, brief: str, *, detail: str = "", hint: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.detail = detail
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.brief}: {self.detail}" if self.detail else self.brief


class EngineUnavailable(RuntimeFailure):
    """The engine is not installed, does not answer, or did not answer in time."""


class EngineTimeout(EngineUnavailable):
    """The engine's client was ended because its deadline passed: what it was doing may still happen."""


class EngineRefused(RuntimeFailure):
    """The engine answered, and said no."""


class ContainerNotFound(RuntimeFailure):
    """No container has this id, or it is not one of ours."""


class ImageNotFound(RuntimeFailure):
    """The engine does not hold this image, and no registry answered for it."""


class Unsupported(RuntimeFailure):
    """This engine, or this host, cannot do what was asked: a capability is missing."""


class UnreadableAnswer(RuntimeFailure):
    """The engine's output is not what its contract says: too large, not JSON, or of another shape."""


class CgroupUnreadable(RuntimeFailure):
    """A control group, or one of its files, cannot be found, read or written."""
