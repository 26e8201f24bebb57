"""What goes wrong, one thing after the other. Each is over when its method returns, or when the round ends."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence

import psutil

from chaos_storm.ground import Ground
from chaos_storm.ledger import Book, Held
from chaos_storm.plan import Fault
from sandboxd.client import RpcError

SPAN_OPERATIONS = 6
SPAN_S_MAX = 3.0
"""How long what lasts for a while lasts: so many operations, or so long where nobody comes to an end."""

LIVE_RESTORE_SHARE = KILLED_SHARE = 0.5

CLIENT_LOOK_S = 0.01
CLIENT_S_MAX = 2.0
"""How long a client of an engine is waited for, to be killed."""

FREE_DESCRIPTORS = 3
FLOOD_REQUESTS = 400
GARBAGE_BYTES = 40_000
DEAF = 4
DEAF_REQUESTS = 50
SEND_S_MAX = 1.0

HEADER = b"Content-Length: "
PING = b'{"jsonrpc":"2.0","id":%d,"method":"daemon/config"}'
NO_METHOD = b'{"jsonrpc":"2.0","id":1,"method":"no/such"}'

DISTURBING = frozenset({"daemon_killed", "daemon_restarted", "killed_while_hanging"})
"""After these whatever was under way may have lost its answer."""


class Faults:
    """Carries out the faults of a round, at their moments."""

    def __init__(self, ground: Ground, book: Book, held: Callable[[], Sequence[Held]]) -> None:
        self.seen: set[str] = set()
        """Containers that were taken away."""
        self.active = False
        """Something has gone wrong in this round."""
        self.interrupted: set[str] = set()
        """Engines that have stopped all that ran in this round."""
        self._ground = ground
        self._book = book
        self._held = held
        self._until_end: list[contextlib.ExitStack] = []

    def carry_out(self, faults: Sequence[Fault], over: Callable[[], bool]) -> None:
        """Do them all, each as soon as so much is done; those that nobody waits for any more at once."""
        for fault in faults:
            while not over() and not self._book.wait_done(fault.after, 0.1):
                pass
            self.active = True
            getattr(self, f"_{fault.kind}")(random.Random(fault.number))
            self._book.broke(fault.kind)

    def end_turn(self) -> None:
        """Let go of what lasts for the length of a round."""
        for stack in self._until_end:
            stack.close()
        self._until_end.clear()

    def _for_a_while(self) -> None:
        self._book.wait_done(self._book.done + SPAN_OPERATIONS, SPAN_S_MAX)

    # --- the daemon

    def _daemon_killed(self, chance: random.Random) -> None:
        with self._ground.changing:
            self._ground.daemon.kill()
            self._ground.daemon.start()

    def _daemon_restarted(self, chance: random.Random) -> None:
        with self._ground.changing:
            status = self._ground.daemon.stop()
            if status != 0:
                self._book.happen("daemon_died", f"its end was asked for, and came with status {status}")
            self._ground.daemon.start()

    def _killed_while_hanging(self, chance: random.Random) -> None:
        self._ground.set_mode("hangs")
        try:
            self._for_a_while()
            with self._ground.changing:
                self._ground.daemon.kill()
                self._ground.set_mode("well")
                self._ground.daemon.start()
        finally:
            self._ground.set_mode("well")

    # --- sandboxes

    def _init_killed(self, chance: random.Random) -> None:
        victim = self._victim(chance)
        if victim is None:
            return
        victim.shaken = True
        for record in self._ground.daemon.journal():
            if record["id"] == victim.id:
                for pid in _inits_of(record["container_id"]):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _container_removed(self, chance: random.Random) -> None:
        victim = self._victim(chance)
        if victim is None:
            return
        victim.shaken = True
        self.seen.add(victim.container_id)
        words = [victim.engine, "rm", "--force", victim.container_id]
        subprocess.run(words, env={**os.environ, **self._ground.engine_env}, capture_output=True, check=False)

    def _victim(self, chance: random.Random) -> Held | None:
        held = sorted(self._held(), key=lambda one: one.token)
        return chance.choice(held) if held else None

    # --- the engines

    def _client_killed(self, chance: random.Random) -> None:
        """Kill the next client of an engine that the daemon starts."""
        deadline_s = time.monotonic() + CLIENT_S_MAX
        while time.monotonic() < deadline_s:
            for process in _children(self._ground.daemon.pid):
                with contextlib.suppress(psutil.Error):
                    if process.name() in self._ground.engines:
                        process.kill()
                        return
            time.sleep(CLIENT_LOOK_S)

    def _engine_restarted(self, chance: random.Random) -> None:
        """Stop an engine, or kill it, and start it again."""
        engine = chance.choice(self._ground.engines)
        live_restore, killed = chance.random() < LIVE_RESTORE_SHARE, chance.random() < KILLED_SHARE
        if engine == "podman":
            # It has no daemon. Its migration stops all that runs, and gives up where something goes away meanwhile.
            self.interrupted.add(engine)
            with contextlib.suppress(subprocess.CalledProcessError):
                self._ground.podman.call("system", "migrate")
            return
        docker = self._ground.docker
        docker.set_live_restore(live_restore)
        if not live_restore:
            self.interrupted.add(engine)
        if killed:
            docker.kill()
        else:
            docker.stop()
        try:
            self._for_a_while()
        finally:
            docker.start()

    def _engine_refuses(self, chance: random.Random) -> None:
        self._trouble("refuses", chance)

    def _engine_hangs(self, chance: random.Random) -> None:
        self._trouble("hangs", chance)

    def _trouble(self, mode: str, chance: random.Random) -> None:
        self._ground.set_mode(mode, chance.choice(self._ground.engines))
        try:
            self._for_a_while()
        finally:
            self._ground.set_mode("well")

    # --- the host

    def _disk_full(self, chance: random.Random) -> None:
        for held in self._held():
            # What a command writes from now on may find no room.
            held.doubt()
        self._ground.fill_disk()
        try:
            self._for_a_while()
        finally:
            self._ground.free_disk()

    def _descriptors_exhausted(self, chance: random.Random) -> None:
        pid = self._ground.daemon.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + FREE_DESCRIPTORS, before[1]))
        try:
            self._for_a_while()
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    # --- other clients

    def _slow_clients(self, chance: random.Random) -> None:
        """Some that ask for much and read nothing, until the round is over."""
        stack = contextlib.ExitStack()
        self._until_end.append(stack)
        for _ in range(DEAF):
            with contextlib.suppress(OSError):
                deaf = stack.enter_context(self._raw())
                for number in range(DEAF_REQUESTS):
                    _send(deaf, _framed(PING % number))

    def _malicious_clients(self, chance: random.Random) -> None:
        attacks = [self._garbage, self._half, self._huge, self._flood, self._descriptors, self._headers]
        for attack in chance.sample(attacks, 3):
            with contextlib.suppress(OSError), self._raw() as connection:
                attack(connection, chance)

    @staticmethod
    def _garbage(connection: socket.socket, chance: random.Random) -> None:
        _send(connection, chance.randbytes(GARBAGE_BYTES))

    @staticmethod
    def _half(connection: socket.socket, chance: random.Random) -> None:
        frame = _framed(PING % 1)
        _send(connection, frame[: chance.randrange(1, len(frame))])

    @staticmethod
    def _huge(connection: socket.socket, chance: random.Random) -> None:
        length = chance.choice((2**31, 2**63, 10**40, -1, 5 * 1024 * 1024))
        _send(connection, HEADER + str(length).encode() + b"\r\n\r\n" + b"x" * GARBAGE_BYTES)

    @staticmethod
    def _flood(connection: socket.socket, chance: random.Random) -> None:
        _send(connection, b"".join(_framed(PING % number) for number in range(FLOOD_REQUESTS)))

    @staticmethod
    def _descriptors(connection: socket.socket, chance: random.Random) -> None:
        with open(os.devnull, "rb") as null:
            for _ in range(20):
                socket.send_fds(connection, [_framed(NO_METHOD)], [null.fileno()] * chance.randrange(1, 60))

    @staticmethod
    def _headers(connection: socket.socket, chance: random.Random) -> None:
        _send(connection, b"X-Header: " + b"a" * GARBAGE_BYTES)

    def _raw(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(SEND_S_MAX)
            connection.connect(str(self._ground.daemon.socket))
        except OSError:
            connection.close()
            raise
        return connection


def shaking(faults: Sequence[Fault]) -> bool:
    """Whether answers may be lost."""
    return any(fault.kind in DISTURBING for fault in faults)


def calls_of_engines(argument: str) -> list[int]:
    """The clients of engines that were started with this argument."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if argument in process.cmdline():
                found.append(process.pid)
    return found


def _send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError, RpcError):
        connection.sendall(data)


def _framed(body: bytes) -> bytes:
    return HEADER + str(len(body)).encode() + b"\r\n\r\n" + body


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _inits_of(container_id: str | None) -> list[int]:
    """The first process of a container, by its control group and its own namespace's word."""
    if container_id is None:
        return []
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and container_id in _text(f"/proc/{name}/cgroup"):
                ranks = [line for line in _text(f"/proc/{name}/status").splitlines() if line.startswith("NSpid:")]
                if ranks and ranks[0].split()[-1] == "1":
                    found.append(int(name))
    return found


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
