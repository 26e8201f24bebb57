"""Records that were lost with the journal, made again of what there is: containers, their notes, the kernel.

What nobody else knows is gone: variables, metadata, secrets, rules of the network, services, forwards, lifetime. The
sandbox says so in its warnings. What it runs, and what it wrote, is untouched.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from runtimes import netns
from runtimes.cgroup.fs import CgroupHandle
from runtimes.cgroup.readings import UNLIMITED, EffectiveLimits
from runtimes.engine import Engine
from runtimes.errors import CgroupUnreadable
from runtimes.model import ContainerFacts, ContainerSummary, Limits, Network
from sandboxd import note
from sandboxd.config import DEFAULT_TEMPLATE
from sandboxd.lifecycle import State
from sandboxd.records import SandboxRecord
from sandboxd.timings import now_ms

CLAIM_NAME = "claim"
"""The file in a sandbox's directory that holds its note, once a slot has become somebody's."""

WARNING = (
    "its record was lost with the journal: its variables, metadata, lifetime, network rules, services, forwards and "
    "the names of its secrets are not known any more"
)


async def rebuilt(container: ContainerSummary, engine: Engine, directory: str) -> SandboxRecord:
    """The record of a sandbox of which there is only a container.

    Args:
        container: Its container.
        engine: Whose that is.
        directory: The host's side of the sandbox; need not be there.

    Raises:
        RuntimeFailure: the engine does not say what it is.
    """
    facts = await engine.inspect(container.container_id)
    made = note.read(facts.note) or _inspected(facts)
    claimed = _claim(directory)
    known = made if claimed is None else note.read(claimed) or made
    # A slot that has no directory any more may have been somebody's: it is kept.
    is_slot = made.slot and claimed is None and os.path.isdir(directory)
    kernel = _effective(facts)
    return SandboxRecord(
        **{field: getattr(known, field) for field in note.Note.__struct_fields__ if field not in _MENDED},
        id=container.sandbox_id,
        state=State.WARM if is_slot else State.RUNNING,
        state_reason="",
        engine=engine.name.value,
        container_id=container.container_id,
        slot=is_slot,
        limits=_limits(known.limits, kernel),
        tmp_bytes_max=_tmp_bytes(known.tmp_bytes_max, kernel),
        env={},
        metadata={},
        warnings=() if is_slot else (WARNING,),
        launch="warm" if made.slot else "cold",
        image_id=facts.image_id,
        network_now=_network_now(known.network, facts),
    )


_MENDED = frozenset({"slot", "limits", "tmp_bytes_max"})
"""What is better known than by the note."""


def _inspected(facts: ContainerFacts) -> note.Note:
    """What can be told of a container without a note: an older daemon made it."""
    return note.Note(
        image=facts.image,
        user=facts.user,
        created_at_ms=now_ms(),
        limits=facts.limits,
        tmp_bytes_max=0,
        limits_policy="degraded",
        network=facts.network,
        template=DEFAULT_TEMPLATE,
        bin_dir="",
    )


def _network_now(made: Network, facts: ContainerFacts) -> Network | None:
    """What it has, where that is not what it was made with: the kernel knows; what cannot be asked is closed."""
    now = Network.NONE
    if facts.pid is not None:
        with contextlib.suppress(OSError, ValueError):
            now = Network.FULL if netns.look(facts.pid).routed else Network.NONE
    return None if now is made else now


def _claim(directory: str) -> str | None:
    """The note of a slot that was claimed, be it readable or not; None: it was not."""
    try:
        with open(os.path.join(directory, CLAIM_NAME), encoding="utf-8", errors="replace") as file:
            return file.read(note.CHARS_MAX + 1)
    except OSError:
        return None


def _effective(facts: ContainerFacts) -> EffectiveLimits:
    """What the kernel holds it to; nothing where it does not run, or that cannot be read."""
    if facts.pid is None:
        return EffectiveLimits()
    try:
        handle = CgroupHandle.open(facts.pid, facts.container_id)
    except CgroupUnreadable:
        return EffectiveLimits()
    try:
        return handle.read_limits()
    except CgroupUnreadable:
        return EffectiveLimits()
    finally:
        handle.close()


def _limits(noted: Limits, kernel: EffectiveLimits) -> Limits:
    """The limits that hold: those that were changed since the container was made are the kernel's to tell."""
    fields: dict[str, int | tuple[int, ...] | None] = {}
    for field, before in msgspec.structs.asdict(noted).items():
        now = getattr(kernel, field)
        if now is None:
            fields[field] = before
        elif now == UNLIMITED or (before is None and field in _NEVER_UNLIMITED):
            fields[field] = None
        else:
            fields[field] = now
    return Limits(**fields)  # type: ignore[arg-type]


_NEVER_UNLIMITED = frozenset({"cpuset_cpus", "shm_bytes_max", "nofile_max"})
"""The kernel has a figure for these in any case."""


def _tmp_bytes(noted: int, kernel: EffectiveLimits) -> int:
    now = kernel.tmpfs_bytes_max.get("/tmp", UNLIMITED)  # noqa: S108  (inside the sandbox)
    return noted if now == UNLIMITED else now
