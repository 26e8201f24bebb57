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


_running: set[subprocess.Popen[bytes]] = set()
"""What threads wait for: nothing else interrupts them."""


def run(
    argv: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None, data: bytes | None = None
) -> str:
    """What a program prints that must succeed."""
    stdin = subprocess.DEVNULL if data is None else subprocess.PIPE
    try:
        program = subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    except OSError as error:
        raise BedError(f"cannot run {argv[0]}: {error.strerror}") from error
    with program:
        _running.add(program)
        try:
            stdout, stderr = program.communicate(data, timeout_s)
        except subprocess.TimeoutExpired as error:
            program.kill()
            raise BedError(f"not done after {timeout_s:g} s: {shlex.join(argv)}") from error
        except BaseException:
            program.kill()
            raise
        finally:
            _running.discard(program)
    if program.returncode != 0:
        said = stderr.decode(errors="replace").strip()[-3000:]
        raise BedError(f"failed with {program.returncode}: {shlex.join(argv)[:500]}\n{said}")
    return stdout.decode(errors="replace")


def end_all() -> None:
    """End every program that a thread runs now, in order: its ``run`` fails."""
    for program in tuple(_running):
        program.terminate()
