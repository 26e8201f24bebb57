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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from stock_bed.process import BedError, say
from stock_bed.roots import USER, Root

BOOT_S_MAX = 60
HALT_S_MAX = 20
PAUSE_S = 0.1

_HALT = signal.SIGRTMIN + 4
"""What systemd takes for `poweroff`."""


class Namespaces:
    """One that is up.

    Args:
        root: What it was started from.
        scratch: Where its keeper has what it writes.
        keeper: The process whose child's child is systemd.
        log: Where it complains.
        began: When it was started.
    """

    title = "namespaces"

    def __init__(self, root: Root, scratch: Path, keeper: subprocess.Popen[bytes], log: Path, began: float) -> None:
        self.root = root
        self._scratch = scratch
        self._keeper = keeper
        self._log = log
        self.pid = self._wait_until_it_is_up(began, before=None)
        self.boot_s = time.monotonic() - began

    def argv(self, words: Sequence[str], *, user: str = USER) -> list[str]:
        """How a command is run inside as ``user``: as a service of the user's own manager."""
        manager = ["--user", f"--machine={user}@.host"] if user != "root" else []
        service = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", *manager]
        home = "/root" if user == "root" else f"/home/{user}"
        return [*_enter(self.pid), *service, f"--working-directory={home}", "--", *words]

    @property
    def reboots(self) -> Mapping[str, Callable[[], None]]:
        """In order, and as where the power fails: nothing has time to end."""
        return {"a reboot": self._reboot, "a power cut": self._cut_power}

    def _reboot(self) -> None:
        began, before = time.monotonic(), self.pid
        # It may end with what it was run in.
        words = [*_enter(before), "systemctl", "reboot"]
        subprocess.run(words, capture_output=True, timeout=BOOT_S_MAX, check=False)
        self.pid = self._wait_until_it_is_up(began, before=before)

    def _cut_power(self) -> None:
        began, before = time.monotonic(), self.pid
        Path(f"/proc/{self._keeper.pid}/root{self._scratch}/power-cut").touch()
        os.kill(before, signal.SIGKILL)
        self.pid = self._wait_until_it_is_up(began, before=before)

    def halt(self) -> None:
        """Have systemd end everything in order, and end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, _HALT)
        try:
            self._keeper.wait(HALT_S_MAX)
        except subprocess.TimeoutExpired:
            say("systemd does not halt in time: it is killed")

    def _wait_until_it_is_up(self, began: float, *, before: int | None) -> int:
        """The pid of systemd, once the user's manager runs as well.

        Args:
            began: When it began to start.
            before: The pid of one that ends.
        """
        while True:
            if self._keeper.poll() is not None:
                raise BedError(f"systemd ended with {self._keeper.returncode}\n{_tail(self._log)}")
            if time.monotonic() - began > BOOT_S_MAX:
                raise BedError(f"systemd is not up after {BOOT_S_MAX} s\n{_tail(self._log)}")
            for pid in (pid for child in _children(self._keeper.pid) for pid in _children(child)):
                if pid != before and os.path.exists(f"/proc/{pid}/root/run/user/1000/bus"):
                    return pid
            time.sleep(PAUSE_S)


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
            keeper = subprocess.Popen(
                _words(root, scratch, group),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            bed = Namespaces(root, scratch, keeper, log, began)
            yield bed
            bed.halt()
        finally:
            keeper.kill()
            keeper.wait()
    finally:
        _remove_group(group)
        shutil.rmtree(directory)


def _words(root: Root, scratch: Path, group: Path) -> list[str]:
    """Join the group first: the control group namespace begins where its maker is."""
    join = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
    program = str(Path(__file__).with_name("keep"))
    become = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", join, str(group)]
    return [*become, "unshare", "--mount", program, str(root.tree), str(scratch)]


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in text.split()]


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


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]
