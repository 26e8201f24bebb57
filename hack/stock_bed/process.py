"""Programs that are bounded in time, and whose failure says what was run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence


class BedError(Exception):
    """The bed, and not what is tested in it, failed."""


def say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


def run(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None, data: bytes | None = None
) -> str:
    """What a program prints that must succeed."""
    try:
        done = subprocess.run(
            argv,
            input=data,
            stdin=subprocess.DEVNULL if data is None else None,
            capture_output=True,
            timeout=timeout_s,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BedError(f"not done after {timeout_s:g} s: {shlex.join(argv)}") from error
    except OSError as error:
        raise BedError(f"cannot run {argv[0]}: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-3000:]
        raise BedError(f"failed with {done.returncode}: {shlex.join(argv)[:500]}\n{said}")
    return done.stdout.decode(errors="replace")
