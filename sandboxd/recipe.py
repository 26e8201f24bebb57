"""What of a sandbox is fixed when its container is created, and so must fit for a warm one to be claimed. Pure."""

from __future__ import annotations

import msgspec

from runtimes.model import Network, User
from sandboxd.records import WorkspaceRecord


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of container. Slots of one recipe are alike, and any of them will do."""

    template: str
    engine: str
    image: str
    user: User
    keep_id: bool
    network: Network
    nofile_max: int | None
    tmp_bytes_max: int | None
    shm_bytes_max: int | None
    """The sizes of its tmpfs; None: they can be changed later."""
    prebound: WorkspaceRecord | None = None
    """The project that is mounted into the slot already, where it cannot be mounted later."""


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
