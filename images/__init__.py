"""The images that sandboxes run on, and how to make them where no registry answers.

One folder per image. ``recipes`` decides and is pure; ``rootfs`` builds. Nothing here knows an engine: what comes
out is a tar archive of a root file system, and the Containerfile instructions that belong to it.
"""

from __future__ import annotations

from images.recipes import Attempt, HostFacts, Recipe, Source, plan
from images.rootfs import RootfsError, RootfsFacts, build_rootfs, context_dir, host_facts

__all__ = [
    "Attempt",
    "HostFacts",
    "Recipe",
    "RootfsError",
    "RootfsFacts",
    "Source",
    "build_rootfs",
    "context_dir",
    "host_facts",
    "plan",
]
