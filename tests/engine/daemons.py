"""A real daemon for tests: a process of its own, spoken to as its users do, and what is left when it has gone."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from runtimes.model import LABEL_OWNER
from sandboxd.client import Connection, RpcError

CHECKOUT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/sandboxd/test:latest"
ENGINES = ("podman", "docker")

PATIENCE_S = float(os.environ.get("STOCK_PATIENCE_S", "30"))
"""A bound for what must happen; nothing takes that long unless it is broken, or the host very busy. An emulated
machine is given more."""

POLL_S = 0.01


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Return what ``condition`` returns, as soon as that is true. Kernel and engines tell nobody: they are asked."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it never happened that {what}"
        time.sleep(POLL_S)
    return value


DRAIN_LOOK_S = 0.05
"""How often a reader looks whether the command has ended: nothing else wakes it when something is left behind."""


class Ran(NamedTuple):
    """A command that ran in a sandbox."""

    end: dict[str, Any]
    stdout: bytes
    stderr: bytes


class Daemon:
    """One daemon with a directory of its own.

    Args:
        directory: Made if it is not there; socket, state and log are in it.
        env: On top of this process's environment; None takes a variable away.
        launcher: What the interpreter is called through, to become another user.
        python: The interpreter.
        module: What is run by it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        env: Mapping[str, str | None] | None = None,
        launcher: Sequence[str] = (),
        python: str = sys.executable,
        module: str = "sandboxd.daemon",
    ) -> None:
        self.directory = directory
        self.socket = directory / "run" / "s.sock"
        self.state = directory / "state"
        self.log = directory / "log"
        self._launcher = launcher
        self._python = python
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        changes: dict[str, str | None] = {
            "SANDBOXD_SOCKET": str(self.socket),
            "SANDBOXD_STATE_DIR": str(self.state),
            "SANDBOXD_DEFAULTS_IMAGE": IMAGE,
            "SANDBOXD_POOL_MAX": "0",
            "XDG_CONFIG_HOME": str(directory / "config"),
            "PYTHONPATH": str(CHECKOUT),
            **(env or {}),
        }
        merged = {**os.environ, **changes}
        self.env = {name: value for name, value in merged.items() if value is not None}
        (directory / "run").mkdir(mode=0o700, parents=True, exist_ok=True)

    # --- its life -------------------------------------------------------------------------------------

    @property
    def boxes(self) -> Path:
        """Where its sandboxes have their directories: one level down, for another daemon may share the first."""
        root = self.directory / "run" / "boxes"
        return root / os.listdir(root)[0] if root.exists() and os.listdir(root) else root

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        """Start a process; return it, and the pipe on which it says that it is ready."""
        ready, told = os.pipe()
        try:
            with open(self.log, "ab") as log:
                process = subprocess.Popen(
                    [*self._launcher, self._python, "-m", self._module, "--ready-fd", str(told)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self.env,
                    cwd="/",
                    pass_fds=(told,),
                )
        finally:
            os.close(told)
        return process, ready

    def start(self) -> None:
        """Start it and wait until it serves."""
        self._process, ready = self.spawn()
        said = read_line(ready)
        assert said == "ready", f"{said}\n{self.log.read_text()}"

    def stop(self) -> int:
        """SIGTERM, as a service manager does; return its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        assert self._process is not None
        self._process.kill()
        self.wait()

    def wait(self) -> int:
        """Wait until it has ended by itself."""
        assert self._process is not None
        status = self._process.wait(PATIENCE_S)
        self._process = None
        return status

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def alive(self) -> bool:
        """By the kernel's word: it has not ended by itself."""
        return self._process is not None and self._process.poll() is None

    # --- speaking to it -------------------------------------------------------------------------------

    def connect(self) -> Connection:
        return Connection.connect(str(self.socket))

    def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """One request over a connection of its own."""
        with self.connect() as connection:
            return connection.call(method, params, timeout_s=PATIENCE_S)

    def refusal(self, method: str, /, **params: Any) -> RpcError:
        """The error that a request is answered with."""
        try:
            reply = self.call(method, **params)
        except RpcError as error:
            return error
        raise AssertionError(f"{method} was not refused: {reply}")

    def create(self, engine: str, **params: Any) -> dict[str, Any]:
        return self.call("sandbox/create", engine=engine, **params)

    def remove(self, sandbox: Mapping[str, Any]) -> None:
        self.call("sandbox/kill", sandbox=sandbox["id"], wait=True)

    @contextlib.contextmanager
    def box(self, engine: str, **params: Any) -> Iterator[dict[str, Any]]:
        """A sandbox for the length of a ``with``."""
        sandbox = self.create(engine, **params)
        try:
            yield sandbox
        finally:
            with contextlib.suppress(RpcError):
                self.remove(sandbox)

    def sandboxes(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.call("sandbox/list")["sandboxes"]
        return rows

    def state_of(self, sandbox: Mapping[str, Any]) -> str:
        state: str = self.call("sandbox/get", sandbox=sandbox["id"])["state"]
        return state

    def run(self, sandbox: Mapping[str, Any], *argv: str, stdin: bytes = b"", **params: Any) -> Ran:
        """Run a command; its stdio are pipes, and what is in them at its end counts, whoever still holds them."""
        pipes = [os.pipe() for _ in range(3)]
        taken = [bytearray(), bytearray()]
        ended = threading.Event()
        threads = [threading.Thread(target=_feed, args=(os.dup(pipes[0][1]), stdin))]
        threads += [
            threading.Thread(target=_drain, args=(pipes[number + 1][0], taken[number], ended)) for number in range(2)
        ]
        for thread in threads:
            thread.start()
        os.close(pipes[0][1])
        try:
            fields = {"sandbox": sandbox["id"], "argv": list(argv), "stdio": "descriptors", **params}
            passed = (pipes[0][0], pipes[1][1], pipes[2][1])
            with self.connect() as connection:
                end = connection.call("commands/run", fields, passed, timeout_s=PATIENCE_S)
        finally:
            ended.set()
            for number in (pipes[0][0], pipes[1][1], pipes[2][1]):
                os.close(number)
            for thread in threads:
                thread.join()
            for number in (pipes[1][0], pipes[2][0]):
                os.close(number)
        return Ran(end, bytes(taken[0]), bytes(taken[1]))

    def sh(self, sandbox: Mapping[str, Any], script: str, **params: Any) -> str:
        """What a shell script prints that must succeed."""
        ran = self.run(sandbox, "sh", "-c", script, **params)
        assert ran.end["exit_code"] == 0, (ran.end, ran.stdout, ran.stderr)
        return ran.stdout.decode()

    def ctl_argv(self, *words: str) -> list[str]:
        return [*self._launcher, self._python, "-m", "sandboxd.cli.main", *words]

    def ctl(self, *words: str, stdin: bytes = b"", cwd: str | Path = "/") -> subprocess.CompletedProcess[bytes]:
        """``sandboxctl``, to its end."""
        return subprocess.run(
            self.ctl_argv(*words),
            input=stdin,
            capture_output=True,
            env=self.env,
            cwd=cwd,
            timeout=PATIENCE_S,
            check=False,
        )

    def ctl_json(self, *words: str) -> Any:
        done = self.ctl(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    # --- what there is of it, by others' word ---------------------------------------------------------

    @property
    def owner(self) -> str:
        """What its containers are labelled with."""
        return (self.state / "owner").read_text().strip()

    def journal(self) -> list[dict[str, Any]]:
        """The sandboxes that are written down."""
        return [json.loads(row[0]) for row in self._query("SELECT record FROM sandboxes")]

    def _query(self, statement: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.state / "journal.sqlite3", timeout=PATIENCE_S)) as database:
            return database.execute(statement).fetchall()

    def containers(self, engine: str) -> list[str]:
        """Ids of its containers, running or not, by the engine's own client."""
        return self.client(engine, "ps", "-aq", "--no-trunc", f"--filter=label={LABEL_OWNER}={self.owner}").split()

    def client(self, engine: str, *words: str) -> str:
        """What an engine's own client prints."""
        argv = [*self._launcher, engine, *words]
        done = subprocess.run(argv, capture_output=True, text=True, env=self.env, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def mounts(self) -> list[str]:
        """Mount points on the host that lie in its directory."""
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            targets = [line.split(" ")[4] for line in file]
        return [target for target in targets if target.startswith(f"{self.directory}/")]

    def boxes_left(self) -> list[str]:
        """The directories of sandboxes that are there."""
        return sorted(os.listdir(self.boxes)) if self.boxes.exists() else []

    def await_no_layers(self) -> None:
        """What its sandboxes wrote instead of their projects goes in the background, after them."""
        wait_until(lambda: not os.listdir(self.state / "layers"), "all layers were removed")

    def remove_everything(self) -> None:
        for sandbox in self.sandboxes():
            self.remove(sandbox)

    def assert_nothing_left(self, engines: Sequence[str] = ENGINES) -> None:
        """No container, no mount, no directory."""
        assert {engine: self.containers(engine) for engine in engines} == {engine: [] for engine in engines}
        assert self.mounts() == []
        assert self.boxes_left() == []


def _feed(descriptor: int, data: bytes) -> None:
    """Write all of it, unless nobody reads any more."""
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _drain(descriptor: int, taken: bytearray, ended: threading.Event) -> None:
    """Read to the end, or until the command has ended and nothing is in the pipe."""
    while True:
        over = ended.is_set()
        if select.select([descriptor], [], [], 0 if over else DRAIN_LOOK_S)[0]:
            data = os.read(descriptor, 65536)
            taken += data
            if not data:
                return
        elif over:
            return


@contextlib.contextmanager
def running(daemon: Daemon, engines: Sequence[str] = ENGINES) -> Iterator[Daemon]:
    """The daemon, started; in the end everything that it made is removed, and nothing may be left."""
    daemon.start()
    try:
        yield daemon
    finally:
        if not daemon.running:
            daemon.start()
        daemon.remove_everything()
        assert daemon.stop() == 0, daemon.log.read_text()
        daemon.assert_nothing_left(engines)


def read_line(descriptor: int) -> str:
    """One line from a pipe, or what came before it was closed; the pipe is closed."""
    said = b""
    try:
        while not said.endswith(b"\n"):
            readable = select.select([descriptor], [], [], PATIENCE_S)[0]
            portion = os.read(descriptor, 4096) if readable else b""
            if not portion:
                break
            said += portion
    finally:
        os.close(descriptor)
    return said.decode().rstrip("\n")


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended, if it has not, and whose pipes are closed."""
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Nobody reads it."""


@contextlib.contextmanager
def serving(address: str = "127.0.0.1", page: type[BaseHTTPRequestHandler] = _Page) -> Iterator[int]:
    """The port of a server on the host, by default on its loopback, that says ``hello`` unless told otherwise."""
    with ThreadingHTTPServer((address, 0), page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class TlsPage:
    """A server on the host's loopback that says ``hello`` over TLS, and what it was told in ``X-Token``."""

    def __init__(self, port: int, heard: list[str | None]) -> None:
        self.port = port
        self.heard = heard


@contextlib.contextmanager
def serving_tls() -> Iterator[TlsPage]:
    """For the length of a ``with``; its authority is that of ``tests.daemon.proxies``."""
    heard: list[str | None] = []

    class Handler(_Page):
        def do_GET(self) -> None:
            heard.append(self.headers["X-Token"])
            super().do_GET()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CHECKOUT / "tests/daemon/tls/server.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield TlsPage(server.server_address[1], heard)
        finally:
            server.shutdown()
            thread.join()
