"""What is mounted where, from the text of ``/proc/PID/mountinfo``. Pure.

An engine mounts what it is told, and what the image says on top: volumes that fill from the image, symlinks that lead
a mount elsewhere. So what arrived is read from the kernel and compared with what was meant.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

from runtimes.errors import UnreadableAnswer

_OCTAL = re.compile(r"\\([0-7]{3})")

UNSIZED_FREE = frozenset(
    "proc sysfs tmpfs devtmpfs devpts mqueue cgroup cgroup2 securityfs debugfs tracefs fusectl binfmt_misc".split()
)
"""File systems that hold no data on a disk: what they hold is memory, and counts as such."""

ENGINE_FILES = frozenset(
    [
        "/etc/group",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/mtab",
        "/etc/passwd",
        "/etc/resolv.conf",
        "/run/.containerenv",
        "/run/secrets",
    ]
)
"""What engines mount by themselves: small files of their own, which the sandbox's user may not write."""


_OUTSIDE = -1
"""In the place of a mount that the table does not show: what the root of the process lies on."""


class MountEntry(msgspec.Struct, frozen=True):
    """One line."""

    number: int
    parent: int
    """The number of the mount that it lies on."""
    device: str
    root: str
    """Which directory of its file system is seen."""
    target: str
    writable: bool
    kind: str


def parse(text: str) -> tuple[MountEntry, ...]:
    """All lines, in the kernel's order. It says nothing: a mount may have a lower number than the one that it is on.

    Raises:
        UnreadableAnswer: a line is of another shape.
    """
    return tuple(_entry(line) for line in text.splitlines())


def _entry(line: str) -> MountEntry:
    fields = line.split(" ")
    try:
        separator = fields.index("-", 6)
        return MountEntry(
            number=int(fields[0]),
            parent=int(fields[1]),
            device=fields[2],
            root=unescape(fields[3]),
            target=unescape(fields[4]),
            writable="rw" in fields[5].split(","),
            kind=fields[separator + 1],
        )
    except (ValueError, IndexError):
        raise UnreadableAnswer("cannot read the mounts of a process", detail=repr(line[:200])) from None


def unescape(field: str) -> str:
    """A path as it is: the kernel writes blanks, line ends and backslashes as octal numbers."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field) if "\\" in field else field


def covering(entries: Sequence[MountEntry], path: str) -> MountEntry | None:
    """The mount that ``path`` is on, found as the kernel does: from the root, into what is mounted on the way."""
    numbers = {entry.number for entry in entries}
    # With a hundred containers there are some hundred entries, of which three or four are on the way.
    on_the_way = {path, *(path[:end] or "/" for end, letter in enumerate(path) if letter == "/")}
    on: dict[int, list[MountEntry]] = {}
    for entry in entries:
        if entry.target in on_the_way:
            on.setdefault(
                entry.parent if entry.parent in numbers and entry.parent != entry.number else _OUTSIDE, []
            ).append(entry)
    found, here = None, _OUTSIDE
    # Each mount is taken once, whatever a table says of which lies on which.
    while candidates := on.pop(here, None):
        # Of those on one mount the highest hides the others. Two at one place cannot be: the last one counts.
        found = min(reversed(candidates), key=lambda entry: len(entry.target))
        here = found.number
    return found


def source(entries: Sequence[MountEntry], path: str) -> tuple[str, str] | None:
    """Device, and directory within its file system, that ``path`` is; None when nothing is mounted there."""
    entry = covering(entries, path)
    if entry is None:
        return None
    beneath = path.removeprefix(entry.target.rstrip("/")).lstrip("/")
    return entry.device, f"{entry.root.rstrip('/')}/{beneath}".rstrip("/") or "/"


def is_below(path: str, tree: str) -> bool:
    """Whether ``path`` is ``tree`` or lies beneath it."""
    return path == tree or path.startswith(tree.rstrip("/") + "/")


def deviations(
    inside: Sequence[MountEntry],
    host: Sequence[MountEntry],
    sources: Mapping[str, str],
    *,
    ours: Collection[str],
    read_only: Collection[str],
) -> list[str]:
    """What is not mounted as it was meant, one clause each.

    Args:
        inside: The mounts of the container's PID 1.
        host: Our own.
        sources: Target inside to path on the host.
        ours: All targets that we mount, those whose source is no longer known too.
        read_only: Targets that must not be writable.
    """
    found = [clause for target in sources for clause in _misplaced(inside, host, target, sources[target], read_only)]
    for entry in inside:
        if entry.target == "/" or not entry.writable or entry.kind in UNSIZED_FREE or entry.target in ENGINE_FILES:
            continue
        owner = next((target for target in ours if is_below(entry.target, target)), None)
        if owner is None:
            found.append(f"the image declares a volume at {entry.target}, which no limit bounds")
    return found


def _misplaced(
    inside: Sequence[MountEntry], host: Sequence[MountEntry], target: str, path: str, read_only: Collection[str]
) -> list[str]:
    entry = covering(inside, target)
    if entry is None or entry.target != target:
        return [f"nothing is mounted at {target} itself"]
    if (entry.device, entry.root.removesuffix("//deleted")) != source(host, path):
        return [f"something else is mounted at {target}"]
    if target in read_only and entry.writable:
        return [f"{target} can be written"]
    over = [each for each in inside if is_below(each.target, target) and each.target != target]
    if not over:
        return []
    meant = {each.target.removeprefix(path) for each in host if is_below(each.target, path) and each.target != path}
    return [
        f"something is mounted over {each.target}" for each in over if each.target.removeprefix(target) not in meant
    ]
