"""Many commands, much output and long waits: what they leave behind, and what they cost, on each engine.

    pytest tests/engine/test_soak.py --soak

runs them at full size: 10 GiB of output, half an hour of sleep. Without it these two are smaller, and show the same.
The figures are printed at the end of the run.
"""

from __future__ import annotations

import base64
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import pytest

from sandboxd.client import Message, RpcError
from sandboxd.commands import ENDED_KEPT_MAX
from sandboxd.spool_plan import CAP_BYTES, CEILING_FACTOR
from tests.engine import kernel
from tests.engine.conftest import Box
from tests.engine.daemons import ENGINES, PATIENCE_S, Daemon, running, wait_until

pytestmark = pytest.mark.engine

MIB = 1024 * 1024

COMMANDS, COMMANDS_SOAK = 300, 1000
OUTPUT_BYTES, OUTPUT_BYTES_SOAK = 512 * MIB, 10 * 1024 * MIB
SLEEPER_S, SLEEPER_S_SOAK = 3.0, 1800.0

RSS_GROWTH_BYTES_MAX = 16 * MIB
"""Allocators keep what they once had. A leak of one end record per command would still be seen at full size."""

THREADS_IDLE_MAX = 16
"""Workers that the loop and its threads keep for the next time; they are few, and do not grow with the commands."""

KILLS = 3

SAMPLE_S = 0.02

Say = Callable[[str], None]


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    full: bool = request.config.getoption("--soak")
    return full


@pytest.fixture
def own(daemon: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of one test's own: its figures are nobody else's. The shared one has seen to the image."""
    with running(Daemon(tmp_path / "own")) as own:
        yield own


class Figures(NamedTuple):
    """What a daemon and a sandbox hold."""

    descriptors: int
    threads: int
    rss_bytes: int
    spools: int
    children: int
    inside: int

    def __str__(self) -> str:
        return (
            f"{self.descriptors} descriptors, {self.threads} threads, {self.rss_bytes / MIB:.1f} MiB RSS, "
            f"{self.spools} spools, {self.children} children of the daemon, {self.inside} processes inside"
        )


def figures(daemon: Daemon, box: Box) -> Figures:
    process = psutil.Process(daemon.pid)
    return Figures(
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        rss_bytes=process.memory_info().rss,
        spools=spools(daemon),
        children=len(process.children(recursive=True)),
        inside=len(kernel.processes(box["pid"])),
    )


def spools(daemon: Daemon) -> int:
    return sum(1 for path in daemon.state.rglob("*") if path.suffix in {".out", ".err", ".both"})


# --- many commands --------------------------------------------------------------------------------------


def kept(daemon: Daemon, box: Box) -> None:
    """A foreground command whose output is followed."""
    params = {"sandbox": box["id"], "argv": ["sh", "-c", "echo out; echo err >&2"], "stdio": "spool", "follow": True}
    streams: dict[str, bytes] = {}

    def take(message: Message) -> None:
        told = message.content["params"]
        if message.content["method"] == "commands/output":
            streams[told["stream"]] = streams.get(told["stream"], b"") + base64.b64decode(told["data"])

    with daemon.connect() as connection:
        assert connection.call("commands/run", params, (), take, PATIENCE_S)["status"] == "ok"
    assert streams == {"stdout": b"out\n", "stderr": b"err\n"}


def passed_through(daemon: Daemon, box: Box) -> None:
    """A foreground command that writes to the caller's own descriptors."""
    assert daemon.run(box, "cat", stdin=b"through").stdout == b"through"


def in_a_terminal(daemon: Daemon, box: Box) -> None:
    """A terminal that the daemon holds."""
    params = {"sandbox": box["id"], "argv": ["tty"], "stdio": "spool", "pty": {"rows": 24, "cols": 80}}
    assert daemon.call("commands/run", **params)["status"] == "ok"


def refused(daemon: Daemon, box: Box) -> None:
    """A program that is not there."""
    assert daemon.refusal("commands/run", sandbox=box["id"], argv=["absent"], stdio="spool").type


def abandoned(daemon: Daemon, box: Box) -> None:
    """A client that goes away, and its command with it."""
    with daemon.connect() as connection:
        connection.send("commands/run", {"sandbox": box["id"], "argv": ["sleep", "1000"], "stdio": "spool"})


def in_the_background(daemon: Daemon, box: Box) -> None:
    """A background command with a stdin, waited for."""
    ref = _started(daemon, box, "cat", stdin="pipe")
    daemon.call("commands/send_stdin", **ref, data=base64.b64encode(b"in").decode())
    daemon.call("commands/close_stdin", **ref)
    assert daemon.call("commands/wait", **ref)["stdout_bytes"] == len(b"in")


def killed(daemon: Daemon, box: Box) -> None:
    """A background command that is killed, and what it left behind with it."""
    ref = _started(daemon, box, "sh", "-c", "setsid sleep 1000 & exec sleep 1000")
    assert daemon.call("commands/kill", **ref)["status"] == "killed"


def _started(daemon: Daemon, box: Box, *argv: str, **params: Any) -> dict[str, Any]:
    started = daemon.call("commands/start", sandbox=box["id"], argv=list(argv), stdio="spool", **params)
    return {"sandbox": box["id"], "command_id": started["command_id"]}


FOREGROUND = (kept, passed_through, in_a_terminal, refused, abandoned)
BACKGROUND = (in_the_background, killed)


def test_a_thousand_commands_leave_nothing_behind(own: Daemon, engine: str, soak: bool, say: Say) -> None:
    """Whoever keeps a daemon for months has a million of them.

    Ends of background commands are kept until somebody has asked, but no more than so many; they go with the sandbox.
    """
    count = COMMANDS_SOAK if soak else COMMANDS
    with own.box(engine, limits={"memory": "128m", "pids": 200}) as idle:
        with own.box(engine, limits={"memory": "128m", "pids": 200}) as box:
            for kind in FOREGROUND + BACKGROUND:
                kind(own, box)
            wait_until(lambda: figures(own, box).inside == 1, "only init is left")
            before = figures(own, box)
            say(f"before: {before}")

            began_s = time.monotonic()
            for number in range(count):
                FOREGROUND[number % len(FOREGROUND)](own, box)
            took_s = time.monotonic() - began_s
            wait_until(lambda: figures(own, box).inside == 1, "only init is left")
            wait_until(lambda: spools(own) == before.spools, "spools of the foreground are gone")
            wait_until(lambda: figures(own, box).descriptors <= before.descriptors, "descriptors are closed")
            foreground = figures(own, box)
            say(f"after {count} in the foreground, in {took_s:.1f} s: {foreground}")

            began_s = time.monotonic()
            for number in range(count):
                BACKGROUND[number % len(BACKGROUND)](own, box)
            took_s = time.monotonic() - began_s
            wait_until(lambda: figures(own, box).inside == 1, "only init is left")
            wait_until(lambda: spools(own) <= 2 * ENDED_KEPT_MAX, "no more are kept than may be")
            wait_until(lambda: figures(own, box).descriptors <= before.descriptors, "what is kept is not held open")
            background = figures(own, box)
            kept_count = min(count, ENDED_KEPT_MAX)
            say(f"after {count} in the background, in {took_s:.1f} s, {kept_count} ends kept: {background}")
        wait_until(lambda: spools(own) == 0, "spools went with the sandbox")
        wait_until(lambda: figures(own, idle).descriptors < before.descriptors, "descriptors went with it")
        # One that looks around now and then may be there at any moment.
        wait_until(lambda: figures(own, idle).children <= before.children, "no client of an engine was left behind")
        after = figures(own, idle)
        say(f"after the sandbox: {after}")
    for seen in (foreground, background, after):
        assert seen.threads <= THREADS_IDLE_MAX
        assert seen.inside == 1
        assert seen.rss_bytes - before.rss_bytes < RSS_GROWTH_BYTES_MAX


# --- much output ----------------------------------------------------------------------------------------


class Watched:
    """The most that a daemon's memory and disk were while something went on."""

    def __init__(self, daemon: Daemon) -> None:
        self.rss_bytes = 0
        self.disk_bytes = 0
        self._daemon = daemon
        self._process = psutil.Process(daemon.pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.rss_bytes = max(self.rss_bytes, self._process.memory_info().rss)
            self.disk_bytes = max(self.disk_bytes, disk_bytes(self._daemon))


def disk_bytes(daemon: Daemon) -> int:
    """What the spools of a daemon take on disk."""
    return sum(path.stat().st_blocks * 512 for path in daemon.state.rglob("*.out"))


def test_endless_output_takes_neither_memory_nor_disk(own: Daemon, engine: str, soak: bool, say: Say) -> None:
    """With two followers: one that keeps up with what it can, and one that never reads."""
    written = OUTPUT_BYTES_SOAK if soak else OUTPUT_BYTES
    with own.box(engine, limits={"memory": "128m"}) as box, own.connect() as deaf:
        before = psutil.Process(own.pid).memory_info().rss
        blocks = written // MIB
        ref = _started(own, box, "sh", "-c", f"echo head; dd if=/dev/zero bs=1M count={blocks} 2>&-; echo tail")
        deaf.send("commands/connect", ref)
        taken, dropped = 0, 0

        def take(message: Message) -> None:
            nonlocal taken, dropped
            told = message.content["params"]
            taken += len(base64.b64decode(told["data"]))
            dropped += told["dropped_bytes"]

        began_s = time.monotonic()
        with Watched(own) as most, own.connect() as keen:
            end = keen.call("commands/connect", ref, on_notification=take)
        said, followed_s = end["stdout_bytes"], time.monotonic() - began_s
        say(
            f"{written / MIB:.0f} MiB in {end['wall_ms'] / 1000:.1f} s, followed in {followed_s:.1f} s: "
            f"disk {most.disk_bytes / MIB:.0f} MiB at most, {disk_bytes(own) / MIB:.0f} MiB in the end; "
            f"RSS {before / MIB:.1f} MiB before, {most.rss_bytes / MIB:.1f} MiB at most; "
            f"a follower got {taken / MIB:.0f} MiB and was told of {dropped / MIB:.0f} MiB dropped"
        )
        assert (end["status"], end["truncated"]) == ("ok", True)
        assert said == written + len(b"head\ntail\n")
        assert taken + dropped == said
        assert disk_bytes(own) <= CAP_BYTES
        assert most.disk_bytes <= CEILING_FACTOR * CAP_BYTES
        assert most.rss_bytes - before < RSS_GROWTH_BYTES_MAX
        for params, expected in (({"offset": 0, "length": 5}, b"head\n"), ({"length": 5}, b"tail\n")):
            logs = own.call("commands/logs", **ref, **params)
            assert base64.b64decode(logs["data"]) == expected


# --- long waits -----------------------------------------------------------------------------------------


class Follows(threading.Thread):
    """Follows a command to its end, over as many daemons as it takes."""

    def __init__(self, daemon: Daemon, ref: dict[str, Any]) -> None:
        super().__init__()
        self.output = b""
        self.end: dict[str, Any] | None = None
        self.connections = 0
        self._daemon = daemon
        self._ref = ref

    def run(self) -> None:
        while self.end is None:
            try:
                with self._daemon.connect() as connection:
                    self.connections += 1
                    params = {**self._ref, "stdout_offset": len(self.output)}
                    self.end = connection.call("commands/connect", params, on_notification=self._take)
            except RpcError as error:
                if error.type not in {"disconnected", "not_running"}:
                    raise
                time.sleep(SAMPLE_S)

    def _take(self, message: Message) -> None:
        told = message.content["params"]
        assert told["offset"] == len(self.output)
        self.output += base64.b64decode(told["data"])


def test_a_sleeper_is_followed_to_its_end_across_kills_of_the_daemon(
    own: Daemon, soak: bool, request: pytest.FixtureRequest, say: Say
) -> None:
    """One on each engine, at once, and one daemon after the other."""
    chosen: float | None = request.config.getoption("--sleeper-seconds")
    length_s = chosen or (SLEEPER_S_SOAK if soak else SLEEPER_S)
    boxes = [own.create(engine) for engine in ENGINES]
    script = f"echo begun; sleep {length_s}; echo ended; exit 5"
    followers = [Follows(own, _started(own, box, "sh", "-c", script)) for box in boxes]
    for follower in followers:
        follower.start()
    pids = [own.pid]
    for _ in range(KILLS):
        wait_until(lambda: all(follower.connections == len(pids) for follower in followers), "all follow it")
        wait_until(lambda: all(follower.output == b"begun\n" for follower in followers), "nothing is heard twice")
        followers[0].join(length_s / (KILLS + 2))
        own.kill()
        own.start()
        pids.append(own.pid)
    for follower in followers:
        follower.join(length_s + PATIENCE_S)
        assert follower.end is not None
        assert (follower.end["exit_code"], follower.end["status"]) == (5, "nonzero")
        assert follower.output == b"begun\nended\n"
        assert follower.end["wall_ms"] >= length_s * 1000
    assert os.getpid() not in pids
    assert len(set(pids)) == KILLS + 1
    walls = ", ".join(f"{follower.end['wall_ms'] / 1000:.1f} s" for follower in followers if follower.end)
    say(f"slept {walls} under {len(pids)} daemons, followed over {[f.connections for f in followers]} connections")
