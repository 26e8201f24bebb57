"""This checkout, as it is now, put into a bed."""

from __future__ import annotations

import subprocess
import tarfile
from typing import IO

from stock_bed.bed import Bed
from stock_bed.process import BedError, run
from stock_bed.roots import CHECKOUT, USER, VENV, WHEELS

LEFT_OUT = frozenset({".git", ".venv", ".hypothesis", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"})
INSIDE = f"/home/{USER}/sandboxd"
PUT_S_MAX = 120
INSTALL_S_MAX = 180
ENV = (f"PIP_FIND_LINKS={WHEELS}", "PIP_NO_INDEX=1", f"PATH={VENV}/bin:/usr/sbin:/usr/bin:/sbin:/bin")
"""Python packages come from the root file system: there is no network."""

CODE = ("sandboxd", "runtimes", "images", "tests")
"""What is imported inside, and not installed."""

_INSTALL = f"{INSIDE}/hack/venv && cd {INSIDE} && exec {VENV}/bin/python -m compileall -qq -j 0 {' '.join(CODE)}"
_PACK = "tar --create --files-from=- .venv runtimes/init"
_UNPACK = ("sh", "-c", f"mkdir -p {INSIDE} && exec tar --extract --no-same-owner --directory={INSIDE}")


def put(bed: Bed) -> None:
    """Copy it to ``INSIDE``, the user's own. What is built of it here is the same there: static programs."""
    with subprocess.Popen(bed.argv(_UNPACK), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as tar:
        assert tar.stdin is not None
        with tar.stdin, tarfile.open(fileobj=tar.stdin, mode="w|") as archive:
            archive.add(CHECKOUT, arcname=".", filter=_wanted)
        try:
            status = tar.wait(PUT_S_MAX)
        except subprocess.TimeoutExpired:
            tar.kill()
            raise BedError("cannot copy the checkout into the bed in time") from None
    if status != 0:
        raise BedError(f"cannot copy the checkout into the bed: tar ended with {status}")


def install(bed: Bed, archive: IO[bytes]) -> None:
    """Have its user make the checkout's .venv and compile its code, and write what came of it as a tar."""
    run(bed.argv(["env", *ENV, "sh", "-c", _INSTALL]), timeout_s=INSTALL_S_MAX)
    words = ["sh", "-c", f"cd {INSIDE} && find {' '.join(CODE)} -name __pycache__ | exec {_PACK}"]
    done = subprocess.run(bed.argv(words), stdin=subprocess.DEVNULL, stdout=archive, timeout=PUT_S_MAX, check=False)
    if done.returncode != 0:
        raise BedError(f"cannot copy .venv out of the bed: tar ended with {done.returncode}")


def unpack(bed: Bed, archive: IO[bytes]) -> None:
    """Unpack a tar over the checkout inside."""
    done = subprocess.run(bed.argv(_UNPACK), stdin=archive, stdout=subprocess.DEVNULL, timeout=PUT_S_MAX, check=False)
    if done.returncode != 0:
        raise BedError(f"cannot copy .venv into the bed: tar ended with {done.returncode}")


def _wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if LEFT_OUT.intersection(member.name.split("/")) else member
