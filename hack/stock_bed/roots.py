"""What goes into the root file system of a bed, and how it is made; ``cache`` keeps it.

It is a directory with ``root/`` (the tree that the namespaces bed lays an overlay on), ``vmlinuz``, ``initrd`` and,
once it was asked for, ``disk.ext4`` (what the machine boots), and ``key`` (how to log in).
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from stock_bed.process import BedError, run

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


def build(root: Root) -> None:
    """Make all of it in its directory, but the disk. That is there already, and nothing else is in it."""
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(root.key)], timeout_s=30)
    wheels = root.directory / "wheels"
    _fetch_wheels(root.release, wheels)
    _bootstrap(root, wheels)
    for name, pattern in (("vmlinuz", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        (found,) = (root.tree / "boot").glob(pattern)
        shutil.copyfile(found, root.directory / name)
    shutil.rmtree(wheels)


def build_disk(root: Root, disk: Path) -> None:
    """Make the disk that the machine boots."""
    with open(disk, "wb") as file:
        file.truncate(DISK_BYTES)
    words = ["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", str(root.tree)]
    program = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None:
        raise BedError("cannot find mkfs.ext4: apt-get install e2fsprogs")
    run([program, *words, str(disk)], timeout_s=BUILD_S_MAX)


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
