"""What of a sandbox is fixed when its container is created, and so must fit for a warm one to be claimed. Pure."""

from __future__ import annotations

import msgspec

from runtimes.model import Limits, Network, User


class Prebound(msgspec.Struct, frozen=True, kw_only=True):
    """A project that is mounted into the slot already, where it cannot be mounted later."""

    path: str
    device: int
    inode: int
    read_only: bool
    mounted: str
    """How ownership is made right; see ``Identity.mounted``."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of container. Slots of one recipe are alike, and any of them will do."""

    template: str
    engine: str
    image: str
    user: User
    keep_id: bool
    network: Network
    tmp_bytes_max: int
    shm_bytes_max: int | None
    nofile_max: int | None
    prebound: Prebound | None = None


_WORDS = {
    "engine": "engine",
    "image": "image",
    "user": "user",
    "keep_id": "user",
    "network": "network",
    "tmp_bytes_max": "tmp",
    "shm_bytes_max": "shm",
    "nofile_max": "nofile",
}


def differences(wanted: Recipe, template: Recipe) -> tuple[str, ...]:
    """What the two have not in common, in the words of the command line. ``prebound`` is not looked at."""
    return tuple(
        dict.fromkeys(word for field, word in _WORDS.items() if getattr(wanted, field) != getattr(template, field))
    )


def fixed(limits: Limits) -> tuple[int | None, int | None]:
    """The limits that cannot be changed later: shm in bytes, open files."""
    return limits.shm_bytes_max, limits.nofile_max
