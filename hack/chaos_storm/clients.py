"""Clients that do what was drawn for them, believe nothing, and remember what they were promised."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from chaos_storm.ground import Ground
from chaos_storm.ledger import Book, Expected, Held
from chaos_storm.plan import Operation
from sandboxd.client import Connection, RpcError

ANSWER_S_MAX = 60.0
"""Longer than any deadline of the daemon's own that a hanging engine of a few seconds could come to."""

HELD_MAX = 3
KEPT_COMMANDS_MAX = 12
"""Of one sandbox. The daemon keeps more ends than these."""

OUTPUT_BYTES_MAX = 65536
RETRY_S = 0.05
ENTRY_BYTES = 3000

TRANSPORT = frozenset({"disconnected", "not_running"})
"""The answer was lost with the daemon."""

MODES = (None, "bind", "overlay", "copy")


class Client:
    """One of them. Its methods are called by one thread."""

    def __init__(self, ground: Ground, book: Book, number: int) -> None:
        self.number = number
        self.held: list[Held] = []
        self.removed: set[str] = set()
        self.troubled: Callable[[], bool] = lambda: False
        """Whether anything was wrong in this round so far: then a refusal has a cause."""
        self.interrupted: Callable[[str], bool] = lambda engine: False
        """Whether an engine has stopped all that ran in this round."""
        self._ground = ground
        self._book = book
        self._count = 0
        self.project = ground.projects / str(number)
        self.project.mkdir()
        (self.project / "known").write_text("known\n", encoding="ascii")
        self._operations: dict[str, Callable[[Held, random.Random], None]] = {
            "exec": self._exec,
            "start": self._start,
            "collect": self._collect,
            "shell": self._shell,
            "write": self._write,
            "list": self._list,
            "copy": self._copy,
            "update": self._update,
            "pause": self._pause,
            "restart": self._restart,
            "remove": self._remove,
            "expire": self._expire,
            "forward": self._forward,
            "events": self._events,
            "verify": self._verify,
            "metrics": self._metrics,
            "diff": self._diff,
        }

    def run(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if self._book.over.is_set():
                return
            chance = random.Random(operation.number)
            makes = operation.kind == "create" and len(self.held) < HELD_MAX
            kind = "create" if makes or not self.held else operation.kind
            if kind == "create" and not makes and self.held:
                kind = "exec"
            held = chance.choice(self.held) if self.held and kind != "create" else None
            if held is not None:
                held.history.append(f"{time.strftime('%T')} {kind}")
            try:
                if held is None:
                    self._create(chance)
                else:
                    self._operations[kind](held, chance)
            except RpcError as error:
                self._judge(kind, held, error)
            self._book.did(kind)

    def _judge(self, kind: str, held: Held | None, error: RpcError) -> None:
        """Say what an error means."""
        if held is not None and kind in {"pause", "restart", "remove", "expire"}:
            held.unclear = True
        if held is not None:
            held.history.append(error.type)
        what = f"client {self.number}, {kind} {held or ''}: {error.type}: {error}"
        self._book.refused(error.type)
        if error.type == "internal":
            self._book.happen("internal_error", what)
        elif error.type == "timeout" and error.code == 0:
            if not self.troubled():
                self._book.happen("unanswered", what)
        elif not (self.troubled() or (held is not None and self._loose(held))):
            self._book.happen("refused_without_cause", what)
        if error.type in TRANSPORT:
            time.sleep(RETRY_S)

    # --- asking

    def connect(self) -> Connection:
        """A connection, as soon as there is somebody."""
        deadline_s = time.monotonic() + ANSWER_S_MAX
        while True:
            try:
                return self._ground.daemon.connect()
            except RpcError as error:
                if error.type not in {"not_running", "timeout"} or time.monotonic() > deadline_s:
                    raise
            time.sleep(RETRY_S)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        with self.connect() as connection:
            return connection.call(method, params, timeout_s=ANSWER_S_MAX)

    def command(self, held: Held, *argv: str, **params: Any) -> tuple[dict[str, Any], bytes]:
        """How a command in the foreground ended, and what it wrote."""
        read_end, write_end = os.pipe()
        with os.fdopen(read_end, "rb", buffering=0) as reader, contextlib.ExitStack() as ours:
            writer = ours.enter_context(os.fdopen(write_end, "wb"))
            fields = {"sandbox": held.id, "argv": list(argv), "stdio": "descriptors", **params}
            with self.connect() as connection, open(os.devnull, "rb") as null:
                passed = (null.fileno(), writer.fileno(), writer.fileno())
                end = connection.call("commands/run", fields, passed, timeout_s=ANSWER_S_MAX)
            ours.close()
            os.set_blocking(reader.fileno(), False)
            return end, reader.read(OUTPUT_BYTES_MAX) or b""

    def _loose(self, held: Held) -> bool:
        """Whether what runs in it may end at any time, or what it is in is not known."""
        return held.shaken or held.unclear or self.interrupted(held.engine)

    def _expect(self, held: Held, seen: object, wanted: object, what: str) -> None:
        if seen != wanted and not self._loose(held):
            text = f"client {self.number}, {held}: {what}: {seen!r} and not {wanted!r}"
            self._book.happen("wrong_answer", text)

    # --- the operations

    def _create(self, chance: random.Random) -> None:
        self._count += 1
        engine, mode = chance.choice(self._ground.engines), chance.choice(MODES)
        launch = chance.choice(("auto", "auto", "cold"))
        token = f"c{self.number}-{self._count}"
        params: dict[str, Any] = {"template": engine, "launch": launch, "name": token, "env": {"CALLER": token}}
        if mode is not None:
            params["workspace"] = {"path": str(self.project), "mode": mode}
        box = self.call("sandbox/create", metadata={"client": str(self.number)}, **params)
        held = Held(box["id"], token, engine, box["container_id"], mode or "")
        held.history.append(f"{time.strftime('%T')} {box['launch']} {(box['workspace'] or {}).get('mounted', '')}")
        self.held.append(held)
        with self._unless_lost(held):
            started = self.call("commands/start", sandbox=held.id, argv=["sleep", "1000000"])
            held.witness = started["command_id"]

    @contextlib.contextmanager
    def _unless_lost(self, held: Held) -> Iterator[None]:
        try:
            yield
        except RpcError as error:
            self._judge("start", held, error)

    def _exec(self, held: Held, chance: random.Random) -> None:
        code = chance.randrange(4)
        end, said = self.command(held, "sh", "-c", f"echo $CALLER; exit {code}")
        self._tell_owner(held, said)
        self._expect(held, end["exit_code"], code, "exit code")

    def _tell_owner(self, held: Held, said: bytes) -> None:
        if said.strip() != held.token.encode():
            kind = "double_owner" if said.startswith(b"c") else "wrong_answer"
            if not (held.shaken or (kind == "wrong_answer" and self.interrupted(held.engine))):
                self._book.happen(kind, f"{held} is {said[:80]!r} and not {held.token}'s")

    def _start(self, held: Held, chance: random.Random) -> None:
        code, pause = chance.randrange(4), chance.choice(("0", "0.05", "0.5"))
        text = f"{held.token}/{chance.getrandbits(32):08x}"
        expected = Expected(f"{text}\n", code, not self.troubled())
        argv = ["sh", "-c", f"sleep {pause}; echo {text}; exit {code}"]
        started = self.call("commands/start", sandbox=held.id, argv=argv, stdio="spool")
        held.commands[started["command_id"]] = expected
        if self.troubled():
            # Since it was asked for: whoever fills the disk may not have found it to be doubted.
            expected.certain = False
        while len(held.commands) > KEPT_COMMANDS_MAX:
            # Nobody asks for it any more, so that the daemon may forget it.
            del held.commands[next(iter(held.commands))]

    def _collect(self, held: Held, chance: random.Random) -> None:
        if held.commands:
            self.collect(held, chance.choice(list(held.commands)))

    def collect(self, held: Held, command_id: str) -> None:
        """Wait for the end of a command, and see that it is what it must be."""
        expected = held.commands[command_id]
        ref = {"sandbox": held.id, "command_id": command_id}
        try:
            end = self.call("commands/wait", **ref)
            said = base64.b64decode(self.call("commands/logs", **ref)["data"])
        except RpcError as error:
            if error.type != "not_found" or held.shaken or held.unclear:
                raise
            self._book.happen("command_lost", f"{command_id} of {held}: {error}")
            return
        if expected.certain and not self._loose(held):
            self._expect(held, (end["exit_code"], end["status"]), _end_of(expected), f"the end of {command_id}")
            self._expect(held, said.decode(errors="replace"), expected.text, f"the output of {command_id}")

    def _shell(self, held: Held, chance: random.Random) -> None:
        number = chance.getrandbits(16)
        opened = self.call("shells/open", sandbox=held.id)
        ref = {"sandbox": held.id, "shell_id": opened["shell_id"]}
        self.call("shells/run", **ref, text=f"KEPT={number}")
        end = self.call("shells/run", **ref, text='exit_with() { return $1; }; exit_with "$((KEPT % 7))"')
        self._expect(held, end["exit_code"], number % 7, "what a shell kept")
        self.call("shells/close", **ref)

    def _write(self, held: Held, chance: random.Random) -> None:
        data = chance.randbytes(chance.choice((0, 10, 70_000)))
        params = {"sandbox": held.id, "path": f"/tmp/file-{chance.randrange(4)}"}
        self.call("files/write", **params, data=base64.b64encode(data).decode())
        self._expect(held, base64.b64decode(self.call("files/read", **params)["data"]), data, "a file")

    def _list(self, held: Held, chance: random.Random) -> None:
        entries = self.call("files/list", sandbox=held.id, path="/")["entries"]
        found = {entry["path"].strip("/") for entry in entries}
        self._expect(held, {"tmp", "proc"} <= found, True, "the root directory")

    def _copy(self, held: Held, chance: random.Random) -> None:
        data = chance.randbytes(ENTRY_BYTES)
        base = {"sandbox": held.id, "path": f"/tmp/tree-{chance.randrange(3)}"}
        self._transfer("files/upload", base, archive({"entry": data}))
        returned = self._transfer("files/download", base, None)
        with tarfile.open(fileobj=io.BytesIO(returned)) as tar:
            names = [member for member in tar if member.isfile()]
            contents = [tar.extractfile(member).read() for member in names]  # type: ignore[union-attr]
        self._expect(held, contents, [data], "a tree")

    def _transfer(self, method: str, params: dict[str, Any], data: bytes | None) -> bytes:
        """Send an archive, or with None get one."""
        read_end, write_end = os.pipe()
        taken: list[bytes] = []

        def send() -> None:
            with contextlib.suppress(OSError), os.fdopen(write_end, "wb") as pipe:
                pipe.write(data or b"")

        def take() -> None:
            with os.fdopen(read_end, "rb") as pipe:
                taken.append(pipe.read())

        thread = threading.Thread(target=take if data is None else send)
        passed = write_end if data is None else read_end
        thread.start()
        try:
            try:
                with self.connect() as connection:
                    request = connection.send(method, params, [passed])
                    os.close(passed)
                    passed = -1
                    connection.wait(request, timeout_s=ANSWER_S_MAX)
            finally:
                if passed >= 0:
                    os.close(passed)
        finally:
            thread.join()
        return b"".join(taken)

    def _update(self, held: Held, chance: random.Random) -> None:
        pids = chance.randrange(40, 200)
        box = self.call("sandbox/update", sandbox=held.id, limits={"pids": pids, "cpus": chance.choice((0.5, 1))})
        proven = {row["name"]: row["effective"] for row in box["limits"]}
        self._expect(held, proven["pids"], pids, "a limit")

    def _pause(self, held: Held, chance: random.Random) -> None:
        self.call("sandbox/pause", sandbox=held.id)
        self._expect(held, self.call("sandbox/resume", sandbox=held.id)["state"], "running", "the state")

    def _restart(self, held: Held, chance: random.Random) -> None:
        # Whatever becomes of the rest: what ran in it has ended.
        held.witness = None
        held.doubt()
        self.call("sandbox/stop", sandbox=held.id, grace=0)
        self._expect(held, self.call("sandbox/start", sandbox=held.id)["state"], "running", "the state")

    def _remove(self, held: Held, chance: random.Random) -> None:
        self.call("sandbox/kill", sandbox=held.id, wait=chance.random() < 0.3)
        self.held.remove(held)
        self.removed.add(held.id)

    def _expire(self, held: Held, chance: random.Random) -> None:
        if held.unclear and self.call("sandbox/get", sandbox=held.id)["state"] == "paused":
            # By a request whose answer was lost: the time of what is paused stands still.
            self.call("sandbox/resume", sandbox=held.id)
        self.call("sandbox/set_timeout", sandbox=held.id, lifetime="200ms")
        self.held.remove(held)
        self.removed.add(held.id)

    def _forward(self, held: Held, chance: random.Random) -> None:
        opened = self.call("ports/forward", sandbox=held.id, port=chance.randrange(1024, 60000))
        listed = [row["forward_id"] for row in self.call("ports/list", sandbox=held.id)["forwards"]]
        self._expect(held, opened["forward_id"] in listed, True, "a forward is listed")
        self.call("ports/close", sandbox=held.id, forward_id=opened["forward_id"])

    def _events(self, held: Held, chance: random.Random) -> None:
        self.call("events/subscribe", sandbox=held.id, follow=False)

    def _verify(self, held: Held, chance: random.Random) -> None:
        self._expect(held, self.call("sandbox/verify", sandbox=held.id)["verified"], True, "verified")

    def _metrics(self, held: Held, chance: random.Random) -> None:
        (row,) = self.call("sandbox/metrics", sandboxes=[held.id])["sandboxes"]
        self._expect(held, row["memory_bytes"] is not None, True, "memory is read")

    def _diff(self, held: Held, chance: random.Random) -> None:
        if held.mode not in {"overlay", "copy"}:
            return
        name = f"new-{chance.randrange(3)}"
        script = f"echo {held.token} > {name} || {{ ls -lan; grep workspace /proc/self/mountinfo; exit 1; }}"
        end, said = self.command(held, "sh", "-c", script)
        if end["exit_code"] != 0 and self.troubled():
            # There was no room for it.
            return
        self._expect(held, (end["exit_code"], said), (0, b""), "writing to the project")
        changes = {change["path"] for change in self.call("workspace/diff", sandbox=held.id)["changes"]}
        self._expect(held, name in changes, True, "a change is told")


def _end_of(expected: Expected) -> tuple[int, str]:
    return expected.exit_code, "ok" if expected.exit_code == 0 else "nonzero"


def archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()
