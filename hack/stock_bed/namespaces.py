"""systemd in namespaces of this host: a second to boot, no limits to set. For units, users and Podman itself.

The kernel is this host's. Where its control groups are v1 or hybrid, the bed sees a v2 tree without controllers, in
which a rootless Podman runs and limits nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stock_bed.process import BedError, say
from stock_bed.roots import USER, Root

BOOT_S_MAX = 60
HALT_S_MAX = 20
PAUSE_S = 0.1

_HALT = signal.SIGRTMIN + 4
"""What systemd takes for `poweroff`."""


class Namespaces(NamedTuple):
    """One that is up."""

    root: Root
    pid: int
    boot_s: float

    @property
    def title(self) -> str:
        return "namespaces"

    def argv(self, words: Sequence[str], *, user: str = USER) -> list[str]:
        """How a command is run inside as ``user``: as a service of the user's own manager."""
        manager = ["--user", f"--machine={user}@.host"] if user != "root" else []
        service = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", *manager]
        home = "/root" if user == "root" else f"/home/{user}"
        return [*_enter(self.pid), *service, f"--working-directory={home}", "--", *words]


@contextlib.contextmanager
def booted(root: Root) -> Iterator[Namespaces]:
    """A running systemd for the length of a ``with``; nothing of it is left."""
    directory = Path(tempfile.mkdtemp(prefix="sandboxd-stock-"))
    group = _own_group()
    try:
        scratch = directory / "scratch"
        scratch.mkdir()
        log = directory / "console.log"
        began = time.monotonic()
        say(f"{root.release.title}: starting systemd in namespaces")
        with open(log, "wb") as output:
            unshare = subprocess.Popen(
                _words(root, scratch, group),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            pid = _wait_until_it_is_up(unshare, log, began)
            yield Namespaces(root, pid, time.monotonic() - began)
            _halt(pid, unshare)
        finally:
            unshare.kill()
            unshare.wait()
    finally:
        _remove_group(group)
        shutil.rmtree(directory)


def _words(root: Root, scratch: Path, group: Path) -> list[str]:
    """Join the group first: the control group namespace begins where its maker is."""
    join = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
    namespaces = "--mount --pid --fork --uts --ipc --net --cgroup".split()
    unshare = ["unshare", *namespaces, "--kill-child=KILL"]
    program = str(Path(__file__).with_name("enter"))
    return [
        *["setpriv", "--pdeathsig", "KILL", "sh", "-c", join, str(group)],
        *[*unshare, program, str(root.tree), str(scratch)],
    ]


def _own_group() -> Path:
    tree = Path("/sys/fs/cgroup/unified")
    if not tree.is_dir():
        tree = Path("/sys/fs/cgroup")
    if not (tree / "cgroup.procs").exists():
        raise BedError("this host has no control groups v2, not even beside v1: use --bed machine")
    group = tree / f"sandboxd-stock-{os.getpid()}"
    group.mkdir()
    return group


def _remove_group(group: Path) -> None:
    """Deepest first; what is in them has ended, or ends now."""
    deadline = time.monotonic() + HALT_S_MAX
    while group.exists():
        kill = group / "cgroup.kill"
        with contextlib.suppress(OSError):
            kill.write_text("1", encoding="ascii")
        for directory, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        if time.monotonic() > deadline:
            raise BedError(f"cannot remove {group}: something in it does not end")
        time.sleep(PAUSE_S if group.exists() else 0)


def _enter(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--all", "--"]


def _wait_until_it_is_up(unshare: subprocess.Popen[bytes], log: Path, began: float) -> int:
    """The pid of systemd, once the user's manager runs as well."""
    while True:
        if unshare.poll() is not None:
            raise BedError(f"systemd ended with {unshare.returncode}\n{_tail(log)}")
        if time.monotonic() - began > BOOT_S_MAX:
            raise BedError(f"systemd is not up after {BOOT_S_MAX} s\n{_tail(log)}")
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text(encoding="ascii").split()
        if children:
            pid = int(children[0])
            socket = f"/proc/{pid}/root/run/user/1000/bus"
            if os.path.exists(socket):
                return pid
        time.sleep(PAUSE_S)


def _halt(pid: int, unshare: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, _HALT)
    try:
        unshare.wait(HALT_S_MAX)
    except subprocess.TimeoutExpired:
        say("systemd does not halt in time: it is killed")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]
