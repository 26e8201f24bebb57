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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stock_bed.process import BedError, say
from stock_bed.roots import USER, Root

BOOT_S_MAX = 240
CONNECT_S = 5
ENDED_S_MAX = 10
PAUSE_S = 1.0

# Measured on two cores: the untrimmed boot takes four times as long, most of it in udev and in loading modules.
_MASKED = (
    "podman-restart.service podman.socket podman.service systemd-udev-trigger.service modprobe@drm.service "
    "modprobe@efi_pstore.service apparmor.service getty@tty1.service serial-getty@ttyS0.service"
).split()
_KERNEL_LINE = "root=/dev/vda rw console=ttyS0 quiet mitigations=off nokaslr audit=0 net.ifnames=0".split()


class Machine(NamedTuple):
    """One that answers."""

    root: Root
    port: int
    directory: Path
    boot_s: float

    @property
    def title(self) -> str:
        return "machine"

    def argv(self, words: Sequence[str], *, user: str = USER) -> list[str]:
        """How a command is run inside as ``user``, in a login session of its own."""
        return [*_ssh(self.root, self.port, self.directory), f"{user}@127.0.0.1", shlex.join(words)]


@contextlib.contextmanager
def booted(root: Root) -> Iterator[Machine]:
    """The machine for the length of a ``with``; nothing of it is left."""
    directory = Path(tempfile.mkdtemp(prefix="sandboxd-stock-"))
    try:
        port = _free_port()
        log = directory / "console.log"
        began = time.monotonic()
        with open(directory / "qemu.log", "wb") as output:
            qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "5", *_qemu(root, log, port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "TMPDIR": str(directory)},
                start_new_session=True,
            )
        try:
            say(f"{root.release.title}: booting the machine")
            _wait_until_it_answers(root, port, directory, qemu, began)
            yield Machine(root, port, directory, time.monotonic() - began)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*_ssh(root, port, directory), "-O", "exit", "root@127.0.0.1"],
                    capture_output=True,
                    timeout=ENDED_S_MAX,
                    check=False,
                )
            qemu.kill()
            qemu.wait()
    finally:
        shutil.rmtree(directory)


def _qemu(root: Root, log: Path, port: int) -> list[str]:
    line = " ".join([*_KERNEL_LINE, *(f"systemd.mask={unit}" for unit in _MASKED)])
    words = "-accel tcg,thread=multi,tb-size=1024 -cpu Nehalem,-cx16 -smp 2 -m 2048".split()
    words += "-machine q35,graphics=off,hpet=off -nodefaults -no-user-config -display none -no-reboot".split()
    words += ["-kernel", str(root.kernel), "-initrd", str(root.initrd), "-append", line]
    words += ["-drive", f"file={root.disk},if=virtio,format=raw,cache=unsafe,snapshot=on"]
    words += ["-device", "virtio-rng-pci", "-serial", f"file:{log}"]
    words += ["-nic", f"user,model=virtio-net-pci,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"]
    return ["qemu-system-x86_64", *words]


def _ssh(root: Root, port: int, directory: Path) -> list[str]:
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
        "ConnectTimeout": str(CONNECT_S),
        "ControlMaster": "auto",
        "ControlPath": str(directory / "ssh-%r"),
        "ControlPersist": "yes",
        "ServerAliveInterval": "30",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-F", "none", "-i", str(root.key), "-p", str(port), *words]


def _wait_until_it_answers(
    root: Root, port: int, directory: Path, qemu: subprocess.Popen[bytes], began: float
) -> None:
    while True:
        if qemu.poll() is not None:
            raise BedError(f"the machine ended with {qemu.returncode}\n{_console(directory)}")
        if time.monotonic() - began > BOOT_S_MAX:
            raise BedError(f"the machine does not answer after {BOOT_S_MAX} s\n{_console(directory)}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            words = [*_ssh(root, port, directory), f"{USER}@127.0.0.1", "true"]
            # The connection that goes on in the background keeps what it inherits.
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=60,
                check=False,
            )
            if done.returncode == 0:
                return
        time.sleep(PAUSE_S)


def _console(directory: Path) -> str:
    return (directory / "console.log").read_text(encoding="utf-8", errors="replace")[-3000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
