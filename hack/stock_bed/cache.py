"""Root file systems that are kept, by their content: some GiB, outside of the checkout, for others to use as well.

One is a directory ``RELEASE-KEY``. Its key is made of the recipe and of the versions of Python packages, and of
nothing else: `hack/stock clean` fetches newer Debian packages. Of each release the last few are kept, so that two
checkouts with other recipes do not take them away from each other; one that is in use is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stock_bed import roots
from stock_bed.process import end_all, say
from stock_bed.roots import CHECKOUT, Release, Root

KEPT_MAX = 3
"""Of each release."""


def directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "/var/tmp"
    return Path(base) / "sandboxd-stock"


def clean() -> None:
    """Remove every root that is kept and not in use."""
    with _locked() as cache:
        for entry in cache.iterdir():
            if entry.is_dir():
                _remove(entry)


def ensure(releases: Sequence[Release]) -> dict[str, Root]:
    """The roots of these releases by name; those that are not kept are made now, side by side."""
    with _locked() as cache:
        found = {
            release.name: Root(release, cache / f"{release.name}-{content_key(release)}") for release in releases
        }
        missing = [root for root in found.values() if not root.directory.exists()]
        for root in missing:
            _make_room(cache, root.release)
            say(f"{root.release.title}: making the root file system (a minute or two, kept in {root.directory})")
        with ThreadPoolExecutor(max_workers=len(releases)) as threads:
            try:
                for made in [threads.submit(_make, root, cache) for root in missing]:
                    made.result()
            except BaseException:
                end_all()
                raise
        for root in found.values():
            os.utime(root.directory)
        return found


def make_disk(root: Root) -> None:
    """The disk that the machine boots, unless it is there: the other bed does without."""
    with _locked():
        if not root.disk.exists():
            say(f"{root.release.title}: making the machine's disk")
            scratch = root.disk.with_suffix(".part")
            roots.build_disk(root, scratch)
            scratch.rename(root.disk)


@contextlib.contextmanager
def in_use(root: Root) -> Iterator[None]:
    """Nobody removes it meanwhile."""
    with open(root.key, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        yield


def content_key(release: Release) -> str:
    """What of a root of this release would be another one."""
    content = hashlib.sha256(repr(release).encode())
    recipe = Path(roots.__file__)
    for part in (recipe, recipe.with_name("customize"), CHECKOUT / "uv.lock"):
        content.update(part.read_bytes())
    return content.hexdigest()[:12]


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    cache = directory()
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(cache / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _make(kept: Root, cache: Path) -> None:
    """Make it beside its place, and put it there when it is whole."""
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f".{kept.release.name}-"))
    try:
        scratch.chmod(0o755)
        roots.build(Root(kept.release, scratch))
        scratch.rename(kept.directory)
    except BaseException:
        shutil.rmtree(scratch)
        raise


def _make_room(cache: Path, release: Release) -> None:
    """For one more: those that were not used for longest go."""
    by_use = sorted(cache.glob(f"{release.name}-*"), key=lambda each: each.stat().st_mtime, reverse=True)
    for stale in by_use[KEPT_MAX - 1 :]:
        _remove(stale)


def _remove(kept: Path) -> None:
    """Unless a bed is made of it now. What a run that was killed left behind has no key, or nobody who holds it."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(FileNotFoundError):
            key = held.enter_context(open(kept / "key", "rb"))
            try:
                fcntl.flock(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{kept} is in use, and stays")
                return
        shutil.rmtree(kept)
