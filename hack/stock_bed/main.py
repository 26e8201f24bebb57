"""The command line of hack/stock, and the course of a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO, NamedTuple, NoReturn

from stock_bed import checkout, machine, namespaces, roots
from stock_bed.process import BedError, run, say
from stock_bed.roots import RELEASES, USER, VENV, Root

BEDS = {"machine": machine.booted, "namespaces": namespaces.booted}
PATIENCE_S = {"machine": 120, "namespaces": 30}
"""For one step of a test."""

TESTS_S_MAX = {"machine": 420, "namespaces": 180}
PLAN = (("bookworm", "namespaces"), ("trixie", "namespaces"), ("trixie", "machine"))
"""What there is the time for where nothing else is asked for."""

PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
    "ssh": "openssh-client",
    "unshare": "util-linux",
    "ip": "iproute2",
}
"""Program and Debian package."""

INSTALL_S_MAX = 600
_LAST_LINE = re.compile(r"^=* ?((?:\d+ [a-z]+,? ?)+) in [0-9.]+s.*=*$")


class Outcome(NamedTuple):
    """What one bed came to."""

    release: str
    bed: str
    boot_s: float
    tests_s: float
    status: int
    figures: tuple[str, ...]
    closing: str


def main(document: str, arguments: Sequence[str]) -> int:
    """The exit status: 0 where all tests in all beds passed."""
    options = _parse(document, arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    if os.geteuid() != 0:
        print(f"error: this needs root\n  type: sudo {sys.argv[0]} {' '.join(arguments)}", file=sys.stderr)
        return 4
    try:
        match options.action:
            case "clean":
                roots.clean()
            case "build":
                _install_what_is_missing()
                for release in options.release or RELEASES:
                    roots.ensure(RELEASES[release])
            case "shell":
                return _shell(options)
            case _:
                return _run(options)
    except BedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted: everything is taken down")
        return 130
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parse(document: str, arguments: Sequence[str]) -> argparse.Namespace:
    summary, _, rest = document.partition("\n")
    parser = argparse.ArgumentParser(
        prog="hack/stock",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser.add_argument("action", nargs="?", default="run", choices=("run", "shell", "build", "clean"))
    parser.add_argument("--release", action="append", choices=tuple(RELEASES), help="this one alone")
    parser.add_argument("--bed", action="append", choices=tuple(BEDS), help="this one alone")
    parser.add_argument("--as-root", action="store_true", help="run the tests as root, as tests/engine wants it")
    parser.add_argument("--all", action="store_true", help="each release in each bed")
    options = parser.parse_args(arguments[:end])
    options.pytest = arguments[end + 1 :]
    return options


def _install_what_is_missing() -> None:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None]
    if not missing:
        return
    say(f"installing: {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "-qq"], timeout_s=INSTALL_S_MAX, env=env)
    words = ["apt-get", "install", "-qq", "--yes", "--no-install-recommends", *missing]
    run(words, timeout_s=INSTALL_S_MAX, env=env)


def _plan(options: argparse.Namespace) -> list[tuple[str, str]]:
    if not (options.all or options.release or options.bed):
        return list(PLAN)
    return [(release, bed) for bed in options.bed or BEDS for release in options.release or RELEASES]


def _run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    _install_what_is_missing()
    tests = options.pytest or ["tests/stock"]
    outcomes = []
    for release, bed in _plan(options):
        root = roots.ensure(RELEASES[release])
        outcomes.append(_test(root, bed, tests, "root" if options.as_root else USER))
    _report(outcomes, time.monotonic() - began)
    return max(outcome.status for outcome in outcomes)


def _test(root: Root, name: str, tests: Sequence[str], user: str) -> Outcome:
    with contextlib.ExitStack() as made:
        venv = made.enter_context(_installed(root)) if name == "machine" else None
        bed = made.enter_context(BEDS[name](root))
        say(f"{root.release.title}, {name}: up after {bed.boot_s:.1f} s, running {' '.join(tests)}")
        checkout.put(bed)
        if venv is not None:
            checkout.unpack(bed, venv)
        began = time.monotonic()
        script = f'cd {checkout.INSIDE} && exec {VENV}/bin/python -m pytest -p no:cacheprovider "$@"'
        env = [f"STOCK_BED={name}", f"STOCK_PATIENCE_S={PATIENCE_S[name]}", *checkout.ENV]
        color = "--color=yes" if sys.stdout.isatty() else "--color=no"
        words = ["env", *env, "sh", "-c", script, "sh", color, *tests]
        status, lines = _pass_on(bed.argv(words, user=user), TESTS_S_MAX[name])
        tests_s = time.monotonic() - began
    figures = tuple(line.partition("FIGURE ")[2] for line in lines if line.startswith("FIGURE "))
    closing = next((match[1] for line in reversed(lines) if (match := _LAST_LINE.match(line))), "no closing line")
    return Outcome(root.release.title, name, bed.boot_s, tests_s, status, figures, closing)


@contextlib.contextmanager
def _installed(root: Root) -> Iterator[IO[bytes]]:
    """A tar of the checkout's .venv, made by its user in the quick bed: in the machine it takes minutes."""
    with tempfile.TemporaryFile() as archive:
        with namespaces.booted(root) as bed:
            checkout.put(bed)
            checkout.install(bed, archive)
        archive.seek(0)
        yield archive


def _pass_on(argv: Sequence[str], timeout_s: float) -> tuple[int, list[str]]:
    """Run it, print what it prints as it comes, and return the exit status and the lines."""
    lines = []
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as tests:
        assert tests.stdout is not None
        with _killed_after(tests, timeout_s):
            for raw in tests.stdout:
                line = raw.decode(errors="replace")
                print(line, end="", flush=True)
                lines.append(line.rstrip())
    if tests.returncode < 0:
        say(f"not done after {timeout_s:g} s")
        return 1, lines
    return tests.returncode, lines


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], timeout_s: float) -> Iterator[None]:
    def kill(_signal: int, _frame: FrameType | None) -> None:
        process.kill()

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _report(outcomes: Sequence[Outcome], total_s: float) -> None:
    print()
    for outcome in outcomes:
        took = f"{outcome.tests_s:.0f} s, up in {outcome.boot_s:.1f} s"
        print(f"{outcome.release}, {outcome.bed}: {outcome.closing} ({took})")
        for figure in outcome.figures:
            print(f"    {figure}")
    print(
        f"\nhack/stock: {'all passed' if not any(each.status for each in outcomes) else 'FAILED'} in {total_s:.0f} s"
    )


def _shell(options: argparse.Namespace) -> int:
    _install_what_is_missing()
    (release, bed_name), *_ = _plan(options)
    with BEDS[bed_name](roots.ensure(RELEASES[release])) as bed:
        checkout.put(bed)
        words = bed.argv(["bash", "-l"], user="root" if options.as_root else USER)
        words = [word if word != "--pipe" else "--pty" for word in words]
        if bed_name == "machine":
            words.insert(1, "-t")
        return subprocess.run(words, check=False).returncode
