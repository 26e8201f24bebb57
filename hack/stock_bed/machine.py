"""The machine: a stock kernel of the release in qemu, without KVM. The truth, at a tenth of the speed.

KVM is not used where it is there either: the figures and the time limits are the same on every host, and not every
/dev/kvm can start a stock guest.

What is written inside goes to a file of qemu's that has no name any more; the cached disk stays as it was made. qemu
is a child that dies with us, whatever ends us.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from stock_bed import cache
from stock_bed.process import BedError, say
from stock_bed.roots import USER, Root

BOOT_S_MAX = 240
CONNECT_S = 5
ENDED_S_MAX = 10
PAUSE_S = 1.0
ANSWER_S_MAX = 60

CONSOLE = "console.log"

# Measured on two cores: the untrimmed boot takes four times as long, most of it in udev and in loading modules.
_MASKED = (
    "podman-restart.service podman.socket podman.service systemd-udev-trigger.service modprobe@drm.service "
    "modprobe@efi_pstore.service apparmor.service getty@tty1.service serial-getty@ttyS0.service"
).split()
_KERNEL_LINE = "root=/dev/vda rw console=ttyS0 quiet mitigations=off nokaslr audit=0 net.ifnames=0".split()


class Machine:
    """One that answers.

    Args:
        root: What it boots.
        directory: Where its sockets and logs are.
        port: Where its ssh is on this host's loopback.
        qemu: The process that it is.
        began: When that was started.
    """

    title = "machine"

    def __init__(self, root: Root, directory: Path, port: int, qemu: subprocess.Popen[bytes], began: float) -> None:
        self.root = root
        self._directory = directory
        self._port = port
        self._qemu = qemu
        self._boot_id = self._wait_until_it_answers(began, before="")
        self.boot_s = time.monotonic() - began

    def argv(self, words: Sequence[str], *, user: str = USER) -> list[str]:
        """How a command is run inside as ``user``, in a login session of its own."""
        return [*self._ssh(), f"{user}@127.0.0.1", shlex.join(words)]

    @property
    def reboots(self) -> Mapping[str, Callable[[], None]]:
        """In order alone: after a power cut it would spend the time on checking its disk."""
        return {"a reboot": self._reboot}

    def _reboot(self) -> None:
        began = time.monotonic()
        # A connection that is kept keeps what it inherits, so nothing of it is read.
        subprocess.run(
            self.argv(["systemctl", "reboot"], user="root"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=BOOT_S_MAX,
            check=False,
        )
        self._boot_id = self._wait_until_it_answers(began, before=self._boot_id)

    def hang_up(self) -> None:
        """End the connections that are kept: none of them outlives the machine's boot."""
        for user in ("root", USER):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*self._ssh(), "-O", "exit", f"{user}@127.0.0.1"],
                    capture_output=True,
                    timeout=ENDED_S_MAX,
                    check=False,
                )

    def _ssh(self) -> list[str]:
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": str(CONNECT_S),
            "ControlMaster": "auto",
            "ControlPath": str(self._directory / "ssh-%r"),
            "ControlPersist": "yes",
            "ServerAliveInterval": "30",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "none", "-i", str(self.root.key), "-p", str(self._port), *words]

    def _wait_until_it_answers(self, began: float, *, before: str) -> str:
        """What its kernel calls this boot, once that is not the one before."""
        while True:
            if self._qemu.poll() is not None:
                raise BedError(f"the machine ended with {self._qemu.returncode}\n{_console(self._directory)}")
            if time.monotonic() - began > BOOT_S_MAX:
                raise BedError(f"the machine does not answer after {BOOT_S_MAX} s\n{_console(self._directory)}")
            boot_id = self._ask_for_boot_id()
            if boot_id not in {"", before}:
                return boot_id
            if boot_id:
                # The one that goes down still answers: not over the same connection, which would hang with it.
                self.hang_up()
            time.sleep(PAUSE_S)

    def _ask_for_boot_id(self) -> str:
        """Empty while it does not answer. Into a file: a connection that is kept would hold a pipe open."""
        with tempfile.TemporaryFile() as said, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                self.argv(["cat", "/proc/sys/kernel/random/boot_id"]),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.DEVNULL,
                timeout=ANSWER_S_MAX,
                check=False,
            )
            said.seek(0)
            return said.read().decode(errors="replace").strip()
        return ""


@contextlib.contextmanager
def booted(root: Root) -> Iterator[Machine]:
    """The machine for the length of a ``with``; nothing of it is left."""
    cache.make_disk(root)
    directory = Path(tempfile.mkdtemp(prefix="sandboxd-stock-"))
    try:
        port = _free_port()
        began = time.monotonic()
        with open(directory / "qemu.log", "wb") as output:
            qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *_qemu(root, directory, port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "TMPDIR": str(directory)},
                start_new_session=True,
            )
        try:
            say(f"{root.release.title}: booting the machine")
            machine = Machine(root, directory, port, qemu, began)
            try:
                yield machine
            finally:
                machine.hang_up()
        finally:
            qemu.kill()
            qemu.wait()
    finally:
        shutil.rmtree(directory)


def _qemu(root: Root, directory: Path, port: int) -> list[str]:
    line = " ".join([*_KERNEL_LINE, *(f"systemd.mask={unit}" for unit in _MASKED)])
    words = "-accel tcg,thread=multi,tb-size=1024 -cpu Nehalem,-cx16 -smp 2 -m 2048".split()
    words += "-machine q35,graphics=off,hpet=off -nodefaults -no-user-config -display none".split()
    words += ["-kernel", str(root.kernel), "-initrd", str(root.initrd), "-append", line]
    words += ["-drive", f"file={root.disk},if=virtio,format=raw,cache=unsafe,snapshot=on"]
    words += ["-device", "virtio-rng-pci", "-serial", f"file:{directory / CONSOLE}"]
    words += ["-nic", f"user,model=virtio-net-pci,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"]
    return ["qemu-system-x86_64", *words]


def _console(directory: Path) -> str:
    return (directory / CONSOLE).read_text(encoding="utf-8", errors="replace")[-3000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
