"""A network for a container that was made without one, while it runs: slirp4netns, as rootless Podman uses it.

Podman connects no container that was made with ``--network none``. So the program is started for the container's
network namespace: it makes an interface there, and speaks TCP and UDP for it with sockets of this host. It outlives
the daemon, as the container does, and is found again by the name that it was given: the owner, the sandbox, and the
number of the namespace, which no other can have as long as the program holds it.

When it ends, the interface is gone, and with it every connection. The container's own processes can neither end it
nor touch the interface: they have no capabilities.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator, Mapping

import anyio
import msgspec

from runtimes.errors import EngineRefused, EngineUnavailable
from runtimes.process import Lasting, client_environment, start_lasting
from runtimes.suitability import NETWORK_PROGRAM

INTERFACE = "tap0"
NAME_SERVER = "10.0.2.3"
"""Where the program answers for the host's name servers, inside."""
MTU_BYTES = 65520

READY_S_MAX = 10.0
END_S_MAX = 5.0
CMDLINE_BYTES_MAX = 4096
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Attached(msgspec.Struct, frozen=True):
    """One such program that runs."""

    pid: int
    sandbox_id: str
    namespace: int
    """Number of the network namespace that it serves."""


def namespace_of(pid: int) -> int:
    """The number of the network namespace of a process.

    Raises:
        OSError: it is gone, or may not be looked at.
    """
    return os.stat(f"/proc/{pid}/ns/net").st_ino


class UserNetworks:
    """Of the containers of one owner.

    Args:
        owner: Whose.
        env: Where the program is looked for.
    """

    def __init__(self, owner: str, env: Mapping[str, str]) -> None:
        self._prefix = f"{NETWORK_PROGRAM}-{owner}-"
        self._env = client_environment(env)
        self._ours: dict[int, Lasting] = {}

    def find(self, sandbox_id: str | None = None) -> list[Attached]:
        """Those that run, of one sandbox or of all; of a former daemon, too."""
        return [
            attached
            for pid in _pids()
            if (attached := self._read(pid)) is not None and sandbox_id in (None, attached.sandbox_id)
        ]

    def _read(self, pid: int) -> Attached | None:
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                name = file.read(CMDLINE_BYTES_MAX).split(b"\0", 1)[0].decode()
            # What runs under another user, or in a container, could bear any name.
            if name.startswith(self._prefix) and _is_ours(pid):
                sandbox_id, _, namespace = name.removeprefix(self._prefix).rpartition("/")
                return Attached(pid, sandbox_id, int(namespace))
        return None

    async def attach(self, sandbox_id: str, pid: int) -> Attached:
        """Give a container a network. It has an interface, an address and a route when this returns.

        Args:
            sandbox_id: Whose.
            pid: Of its PID 1, known to be it.

        Raises:
            EngineUnavailable: the program is not installed.
            EngineRefused: it does not come up.
        """
        program = shutil.which(NETWORK_PROGRAM, path=os.pathsep.join((self._env.get("PATH", ""), _SYSTEM_PATH)))
        if program is None:
            raise EngineUnavailable(f"cannot find {NETWORK_PROGRAM}", hint="sandboxctl doctor")
        with contextlib.ExitStack() as opened:

            def kept(descriptor: int) -> int:
                opened.callback(os.close, descriptor)
                return descriptor

            try:
                namespace_fd = kept(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
                ready_fd, said_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise EngineRefused("cannot enter the network of the container", detail=str(error)) from error
            kept(ready_fd)
            number = os.fstat(namespace_fd).st_ino
            argv = [
                f"{self._prefix}{sandbox_id}/{number}",
                "--configure",
                f"--mtu={MTU_BYTES}",
                "--disable-host-loopback",
                "--enable-sandbox",
                "--enable-seccomp",
                f"--ready-fd={said_fd}",
                *_target(pid, namespace_fd),
                INTERFACE,
            ]
            try:
                started = start_lasting(
                    argv, program=program, what=NETWORK_PROGRAM, env=self._env, passed=[namespace_fd, said_fd]
                )
            finally:
                os.close(said_fd)
            self._ours[started.pid] = started
            attached = Attached(started.pid, sandbox_id, number)
            try:
                with anyio.fail_after(READY_S_MAX):
                    await anyio.wait_readable(ready_fd)
                if not os.read(ready_fd, 1):
                    raise EngineRefused(f"cannot give the container a network: {NETWORK_PROGRAM} ended")
            except TimeoutError:
                await self.end(attached)
                raise EngineRefused(f"cannot give the container a network: {NETWORK_PROGRAM} hangs") from None
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self.end(attached)
                raise
        return attached

    async def ended(self, attached: Attached) -> None:
        """Return when the program has ended, however."""
        with self._pidfd(attached) as pidfd:
            if pidfd is not None:
                await anyio.wait_readable(pidfd)
        self._reap(attached)

    async def end(self, attached: Attached) -> None:
        """End the program, and with it the interface and every connection. Idempotent.

        Raises:
            EngineRefused: it does not end.
        """
        with self._pidfd(attached) as pidfd:
            if pidfd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                with anyio.move_on_after(END_S_MAX) as scope:
                    await anyio.wait_readable(pidfd)
                if scope.cancelled_caught:
                    raise EngineRefused(f"cannot end {NETWORK_PROGRAM}", detail=f"process {attached.pid}")
        self._reap(attached)

    def _reap(self, attached: Attached) -> None:
        ours = self._ours.get(attached.pid)
        if ours is not None and ours.poll() is not None:
            del self._ours[attached.pid]

    @contextlib.contextmanager
    def _pidfd(self, attached: Attached) -> Iterator[int | None]:
        """A descriptor of the process, as long as it is that; None: it has ended."""
        try:
            pidfd = os.pidfd_open(attached.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # What has the number now may be something else; a child of ours keeps it until it is reaped.
            is_it = attached.pid in self._ours or self._read(attached.pid) == attached
            yield pidfd if is_it else None
        finally:
            os.close(pidfd)


def _target(pid: int, namespace_fd: int) -> list[str]:
    """How the program is told where to go.

    Without root it must enter the user namespace as well, and its own confinement fails where both are given as paths
    (rootless-containers/slirp4netns#317). What it entered is compared with what the sandbox has, by whoever looks.
    """
    return ["--netns-type=path", f"/proc/self/fd/{namespace_fd}"] if os.geteuid() == 0 else [str(pid)]


def _is_ours(pid: int) -> bool:
    """Whether it is this user's, and sees the processes that we see."""
    with open(f"/proc/{pid}/status", "rb") as file:
        fields = {name: value.split() for name, _, value in (line.partition(b":") for line in file)}
    # In a user namespace the effective uid is another than the real one. Each PID namespace adds a number.
    return int(fields[b"Uid"][0]) == os.geteuid() and len(fields.get(b"NSpid", ())) <= 1


def _pids() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            yield int(name)
