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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import IO, NamedTuple, NoReturn

from stock_bed import cache, checkout, machine, namespaces
from stock_bed.bed import Bed
from stock_bed.process import BedError, run, say
from stock_bed.roots import RELEASES, USER, VENV, Root

BEDS: dict[str, Callable[[Root], AbstractContextManager[Bed]]] = {
    "machine": machine.booted,
    "namespaces": namespaces.booted,
}
PATIENCE_S = {"machine": 180, "namespaces": 30}
"""For one step of a test."""

TESTS_S_MAX = {"machine": 900, "namespaces": 240}
ALL_TESTS_S_MAX = 1800
TESTS = "tests/stock"
BEFORE_A_REBOOT, AFTER_A_REBOOT = f"{TESTS}/test_zzz_going_down.py", f"{TESTS}/boot/test_after.py"
"""What is left behind, by the last of all tests, and what must be found."""

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


class Part(NamedTuple):
    """What one run of pytest came to."""

    after: str
    """What was done to the bed before it; empty: nothing."""
    status: int
    figures: tuple[str, ...]
    closing: str


class Outcome(NamedTuple):
    """What one bed came to."""

    release: str
    bed: str
    boot_s: float
    tests_s: float
    parts: tuple[Part, ...]

    @property
    def status(self) -> int:
        return max(part.status for part in self.parts)


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
                cache.clean()
            case "build":
                _install_what_is_missing()
                for root in cache.ensure([RELEASES[name] for name in options.release or RELEASES]).values():
                    cache.make_disk(root)
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
    plan = _plan(options)
    made = cache.ensure([RELEASES[name] for name in dict.fromkeys(release for release, _ in plan)])
    user = "root" if options.as_root else USER
    outcomes = [_test(made[release], bed, options.pytest, user, everything=options.all) for release, bed in plan]
    _report(outcomes, time.monotonic() - began)
    return max(outcome.status for outcome in outcomes)


def _test(root: Root, name: str, chosen: Sequence[str], user: str, *, everything: bool) -> Outcome:
    """What one bed came to, with a part of the suite or with all that is its own."""
    with contextlib.ExitStack() as made:
        made.enter_context(cache.in_use(root))
        venv = made.enter_context(_installed(root)) if name == "machine" else None
        bed = made.enter_context(BEDS[name](root))
        say(f"{root.release.title}, {name}: up after {bed.boot_s:.1f} s")
        checkout.put(bed)
        if venv is not None:
            checkout.unpack(bed, venv)
        began = time.monotonic()
        parts = []
        for after, reboot, tests in _steps(bed, chosen):
            if reboot is not None:
                say(f"{root.release.title}, {name}: {after}")
                reboot_began = time.monotonic()
                reboot()
                say(f"{root.release.title}, {name}: up again after {time.monotonic() - reboot_began:.1f} s")
            parts.append(_run_pytest(bed, name, tests, user, after, everything=everything))
            if parts[-1].status:
                break
        tests_s = time.monotonic() - began
    return Outcome(root.release.title, name, bed.boot_s, tests_s, tuple(parts))


def _steps(bed: Bed, chosen: Sequence[str]) -> Iterator[tuple[str, Callable[[], None] | None, list[str]]]:
    """After what, how that is done, and what is run then."""
    if chosen:
        yield "", None, list(chosen)
        return
    reboots = list(bed.reboots.items())
    yield "", None, [TESTS]
    for number, (after, reboot) in enumerate(reboots, 1):
        again = [BEFORE_A_REBOOT] if number < len(reboots) else []
        yield after, reboot, [AFTER_A_REBOOT, *again]


def _run_pytest(bed: Bed, name: str, tests: Sequence[str], user: str, after: str, *, everything: bool) -> Part:
    script = f'cd {checkout.INSIDE} && exec {VENV}/bin/python -m pytest -p no:cacheprovider "$@"'
    env = [f"STOCK_BED={name}", f"STOCK_PATIENCE_S={PATIENCE_S[name]}", *checkout.ENV]
    env += ["STOCK_ALL=1"] if everything else []
    color = "--color=yes" if sys.stdout.isatty() else "--color=no"
    words = ["env", *env, "sh", "-c", script, "sh", color, *tests]
    status, lines = _pass_on(bed.argv(words, user=user), ALL_TESTS_S_MAX if everything else TESTS_S_MAX[name])
    figures = tuple(line.partition("FIGURE ")[2] for line in lines if line.startswith("FIGURE "))
    closing = next((match[1] for line in reversed(lines) if (match := _LAST_LINE.match(line))), "no closing line")
    return Part(after, status, figures, closing)


@contextlib.contextmanager
def _installed(root: Root) -> Iterator[IO[bytes]]:
    """A tar of what is made of the checkout by its user, in the quick bed: in the machine it takes minutes."""
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
        try:
            with _at_most(timeout_s):
                for raw in tests.stdout:
                    line = raw.decode(errors="replace")
                    print(line, end="", flush=True)
                    lines.append(line.rstrip())
                return tests.wait(), lines
        except _TimeIsUp:
            say(f"not done after {timeout_s:g} s")
            return 1, lines
        finally:
            # Whoever else holds its output, as ssh's connection does, keeps nobody waiting.
            tests.kill()


class _TimeIsUp(Exception):
    """What was to be done took too long."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise _TimeIsUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _report(outcomes: Sequence[Outcome], total_s: float) -> None:
    print()
    for outcome in outcomes:
        closings = "; ".join(
            f"after {part.after}: {part.closing}" if part.after else part.closing for part in outcome.parts
        )
        print(f"{outcome.release}, {outcome.bed}: {closings} ({outcome.tests_s:.0f} s, up in {outcome.boot_s:.1f} s)")
        for figure in (figure for part in outcome.parts for figure in part.figures):
            print(f"    {figure}")
    verdict = "FAILED" if any(outcome.status for outcome in outcomes) else "all passed"
    print(f"\nhack/stock: {verdict} in {total_s:.0f} s")


def _shell(options: argparse.Namespace) -> int:
    _install_what_is_missing()
    (release, bed_name), *_ = _plan(options)
    root = cache.ensure([RELEASES[release]])[release]
    with cache.in_use(root), BEDS[bed_name](root) as bed:
        checkout.put(bed)
        words = bed.argv(["bash", "-l"], user="root" if options.as_root else USER)
        words = [word if word != "--pipe" else "--pty" for word in words]
        if bed_name == "machine":
            words.insert(1, "-t")
        return subprocess.run(words, check=False).returncode
