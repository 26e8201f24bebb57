"""Root file systems, made once for each content: what goes into one, and where it is kept.

A cached root is a directory ``RELEASE-KEY`` with ``root/`` (the tree that the namespaces bed lays an overlay on),
``vmlinuz``, ``initrd`` and, once it was asked for, ``disk.ext4`` (what the machine boots), and ``key`` (how to log
in). Its key is made of the recipe and of the versions of Python packages, and of nothing else: `hack/stock clean`
fetches newer Debian packages.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from stock_bed.process import BedError, end_all, run, say

CHECKOUT = Path(__file__).resolve().parents[2]
MIRROR = "http://deb.debian.org/debian"

USER = "ann"
WHEELS = "/opt/stock/wheels"
VENV = "/opt/stock/venv"

PACKAGES = """
    systemd-sysv udev kmod dbus-user-session libpam-systemd systemd-container sudo
    podman crun uidmap slirp4netns passt fuse-overlayfs netavark aardvark-dns golang-github-containers-common
    docker.io iptables
    python3 python3-venv gcc libc6-dev busybox-static
    openssh-server iproute2 procps netbase
    linux-image-cloud-amd64 initramfs-tools zstd
""".split()

BUILD_S_MAX = 420
DISK_BYTES = 4 * 1024**3

NOT_IN_THE_BED = ("codespell", "mypy", "ruff", "types-psutil")
"""Of the development group: what checks the code, not what tests it."""

TO_INSTALL_EDITABLE = "editables"
"""What hatchling asks for beside itself, when quickstart installs the checkout inside."""


class Release(NamedTuple):
    """A Debian release."""

    name: str
    title: str
    python: str
    packages: tuple[str, ...]
    """Beside those of both: what one of them has in a package of its own."""


RELEASES = {
    "trixie": Release("trixie", "Debian 13", "3.13", ("docker-cli",)),
    # Without the one Podman 4.3 copies whole images (driver vfs), without the other Docker starts no container.
    "bookworm": Release("bookworm", "Debian 12", "3.11", ("containers-storage", "apparmor")),
}


class Root(NamedTuple):
    """One that is made."""

    release: Release
    directory: Path

    @property
    def tree(self) -> Path:
        return self.directory / "root"

    @property
    def disk(self) -> Path:
        return self.directory / "disk.ext4"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def key(self) -> Path:
        return self.directory / "key"


def cache_directory() -> Path:
    """Outside of the checkout: some GiB that another checkout can use as well."""
    base = os.environ.get("XDG_CACHE_HOME") or "/var/tmp"
    return Path(base) / "sandboxd-stock"


def clean() -> None:
    """Remove every root that is kept."""
    with _locked():
        for entry in cache_directory().iterdir():
            if entry.name != "lock":
                _remove(entry)


def ensure(releases: Sequence[Release]) -> dict[str, Root]:
    """The roots of these releases by name; those that are not kept are made now, side by side."""
    with _locked() as cache:
        found = {
            release.name: Root(release, cache / f"{release.name}-{_content_key(release)}") for release in releases
        }
        missing = [root for root in found.values() if not root.directory.exists()]
        for root in missing:
            for stale in cache.glob(f"{root.release.name}-*"):
                _remove(stale)
            say(f"{root.release.title}: making the root file system (a minute or two, kept in {root.directory})")
        with ThreadPoolExecutor(max_workers=len(releases)) as threads:
            try:
                for made in [threads.submit(_make, root, cache) for root in missing]:
                    made.result()
            except BaseException:
                end_all()
                raise
        return found


def make_disk(root: Root) -> None:
    """The disk that the machine boots, unless it is there: the other bed does without."""
    with _locked():
        if root.disk.exists():
            return
        say(f"{root.release.title}: making the machine's disk")
        scratch = root.disk.with_suffix(".part")
        with open(scratch, "wb") as disk:
            disk.truncate(DISK_BYTES)
        words = ["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", str(root.tree)]
        program = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if program is None:
            raise BedError("cannot find mkfs.ext4: apt-get install e2fsprogs")
        run([program, *words, str(scratch)], timeout_s=BUILD_S_MAX)
        scratch.rename(root.disk)


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    cache = cache_directory()
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(cache / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _content_key(release: Release) -> str:
    content = hashlib.sha256(repr(release).encode())
    for part in (Path(__file__), Path(__file__).with_name("customize"), CHECKOUT / "uv.lock"):
        content.update(part.read_bytes())
    return content.hexdigest()[:12]


def _remove(directory: Path) -> None:
    shutil.rmtree(directory)


def _make(kept: Root, cache: Path) -> None:
    """Make it beside its place, and put it there when it is whole."""
    release = kept.release
    scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f".{release.name}-"))
    try:
        scratch.chmod(0o755)
        root = Root(release, scratch)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(root.key)], timeout_s=30)
        _fetch_wheels(release, scratch / "wheels")
        _bootstrap(root, scratch / "wheels")
        for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
            (found,) = (root.tree / "boot").glob(pattern)
            shutil.copyfile(found, scratch / name)
        _remove(scratch / "wheels")
        scratch.rename(kept.directory)
    except BaseException:
        _remove(scratch)
        raise


def _fetch_wheels(release: Release, directory: Path) -> None:
    """The Python packages, by this host's pip: it knows the mirrors and certificates that work here."""
    words = ["-m", "pip", "download", "-qq", f"--dest={directory}", "--only-binary=:all:"]
    words += [f"--python-version={release.python}", "--implementation=cp"]
    words += [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.write(_requirements("constraints"))
        constraints.flush()
        names = [*_package_requirements(), *_dev_requirements(), TO_INSTALL_EDITABLE]
        run([sys.executable, *words, f"--constraint={constraints.name}", *names], timeout_s=BUILD_S_MAX)


def _requirements(kind: str) -> str:
    return run([sys.executable, str(CHECKOUT / "hack" / "requirements.py"), kind], timeout_s=30)


def _dev_requirements() -> list[str]:
    return [line for line in _requirements("dev").split() if not line.startswith(NOT_IN_THE_BED)]


def _package_requirements() -> list[str]:
    return _requirements("package").split()


def _bootstrap(root: Root, wheels: Path) -> None:
    unwanted = ("man", "locale", "doc", "info")
    words = ["--mode=root", "--variant=minbase", "--quiet"]
    words += [f"--include={','.join([*PACKAGES, *root.release.packages])}"]
    words += ['--aptopt=Acquire::Languages "none"', "--aptopt=Acquire::Retries 3", "--dpkgopt=force-unsafe-io"]
    words += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in unwanted]
    program = shlex.quote(str(Path(__file__).with_name("customize")))
    words += [f'--{stage}-hook={program} {stage} "$1"' for stage in ("essential", "customize")]
    env = {
        **os.environ,
        "STOCK_USER": USER,
        "STOCK_KEY": str(root.key.with_suffix(".pub")),
        "STOCK_WHEELS": str(wheels),
        "STOCK_WHEELS_INSIDE": WHEELS,
        "STOCK_VENV_INSIDE": VENV,
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    run(["mmdebstrap", *words, root.release.name, str(root.tree), MIRROR], timeout_s=BUILD_S_MAX, env=env)
