"""``Sandbox``: the blocking client. Each call, and each handle that is followed, has a connection of its own.

So threads may share a sandbox and its rooms; a handle belongs to one thread at a time. Callbacks run in the thread
that waits. Its twin for async code is ``aio``; what both know of requests and replies is in ``model``, and of a
running command in ``following``.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from sandboxd.client.again import ATTEMPTS_MAX, worth_it
from sandboxd.client.calls import call, late
from sandboxd.client.connection import Connection, RpcError
from sandboxd.client.errors import NotFoundException, SandboxException, translated
from sandboxd.client.files import Files
from sandboxd.client.following import Chunk, Following, checked, input_params
from sandboxd.client.model import (
    COMMAND_TIMEOUT_S,
    LOGIN_SHELL,
    CommandResult,
    CreateOptions,
    Env,
    LimitOptions,
    ProcessInfo,
    PtySize,
    SandboxInfo,
    SandboxMetrics,
    SandboxPaginator,
    SandboxQuery,
    SandboxVerification,
    ShellInfo,
    ShellResult,
    check_background,
    command_params,
    command_result,
    create_params,
    find_command,
    given,
    host_of,
    input_bytes,
    list_params,
    listed_sandboxes,
    memory_files,
    processes,
    read_files,
    run_params,
    sandbox_info,
    sandbox_metrics,
    shell_info,
    shell_params,
    update_params,
    verification,
)
from sandboxd.client.starting import connect_or_start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    TextCallback = Callable[[str], object]
    BytesCallback = Callable[[bytes], object]

OfInstance = TypeVar("OfInstance")
OfClass = TypeVar("OfClass")


class InstanceOrClass(Generic[OfInstance, OfClass]):
    """A method that is another one on the class: ``box.kill()`` and ``Sandbox.kill(sandbox_id)``."""

    def __init__(
        self, of_instance: Callable[[Any], OfInstance], of_class: Callable[[type[Any]], OfClass], doc: str
    ) -> None:
        self._of_instance = of_instance
        self._of_class = of_class
        self.__doc__ = doc

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> OfClass: ...
    @overload
    def __get__(self, instance: object, owner: type[Any]) -> OfInstance: ...
    def __get__(self, instance: object | None, owner: type[Any]) -> OfInstance | OfClass:
        return self._of_class(owner) if instance is None else self._of_instance(instance)


def receive(connection: Connection, following: Following, deadline: float | None = None) -> None:
    """Wait for one portion of what the daemon says about a command, and answer it.

    Raises:
        RpcError: As ``Following.take``; or ``timeout``, once the deadline is past.
    """
    if deadline is not None:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            raise late()
    for message in connection.read():
        request = following.take(message.content)
        if request is not None:
            connection.send(*request)


class CommandHandle:
    """A command that runs in the background. Iterate over it, or ``wait`` for it; its output is kept until then.

    It begins with the first byte that the command wrote, whenever that was. To drop the handle is to leave the
    command alone.
    """

    def __init__(
        self,
        sandbox_id: str,
        command_id: str,
        pid: int | None,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        on_data: BytesCallback | None = None,
        *,
        pty: bool = False,
        timeout: float | None = None,
    ) -> None:
        self._ref = {"sandbox": sandbox_id, "command_id": command_id}
        self._pid = pid
        self._pty = pty
        self._on_stdout = on_stdout
        self._on_stderr = on_stderr
        self._on_data = on_data
        self._timeout_s = timeout or None
        self._connection: Connection | None = None
        self._following = Following()

    @property
    def pid(self) -> int | None:
        """As seen inside the sandbox; None if nobody knows it any more."""
        return self._pid

    @property
    def command_id(self) -> str:
        """What names it to ``commands.connect`` and ``sandboxctl``."""
        return self._ref["command_id"]

    @property
    def stdout(self) -> str:
        """What it wrote to stdout, as far as it was read."""
        return self._written("stdout")

    @property
    def stderr(self) -> str:
        """What it wrote to stderr, as far as it was read."""
        return self._written("stderr")

    def __iter__(self) -> Iterator[tuple[str | None, str | None, bytes | None]]:
        """Each portion of output as ``(stdout, stderr, pty)``, two of which are None, until the command has ended."""
        for chunk in self._chunks():
            if self._pty:
                yield None, None, chunk.data
            elif chunk.stream == "stdout":
                yield chunk.text, None, None
            else:
                yield None, chunk.text, None

    def wait(
        self,
        on_pty: BytesCallback | None = None,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
    ) -> CommandResult:
        """Wait for the end. May be called again. Callbacks go before those given at the start.

        Raises:
            CommandExitException: It did not exit with 0.
            TimeoutException: It ran into the timeout that it was started with; or, where there is no ``result``, the
                handle into its own, and the command goes on.
        """
        on_data = on_pty or self._on_data
        for chunk in self._chunks():
            if not self._pty:
                deliver_text(chunk, on_stdout or self._on_stdout, on_stderr or self._on_stderr)
            elif on_data is not None and chunk.data:
                on_data(chunk.data)
        if not self._following.ended():
            raise SandboxException("cannot wait for the command", "disconnect was called meanwhile")
        return self._following.result()

    def kill(self) -> bool:
        """Kill it and everything that it started. False: it had ended."""
        return kill(self._ref)

    def send_stdin(self, data: str | bytes, request_timeout: float | None = None) -> None:
        """Write to its stdin or terminal."""
        send_stdin(self._ref, data, request_timeout)

    def close_stdin(self, request_timeout: float | None = None) -> None:
        """Close its stdin: it reads end of file."""
        call("commands/close_stdin", self._ref, request_timeout)

    def disconnect(self) -> None:
        """Stop following it, from the thread that does. It goes on, and ``wait`` takes up where this left off."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _written(self, stream: str) -> str:
        return self._following.written(stream).decode(errors="replace")

    def _chunks(self) -> Iterator[Chunk]:
        following = self._following
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        with translated():
            lost = 0
            while not following.ended():
                connection = self._connection = connect_or_start(os.environ)
                try:
                    params = {**self._ref, **following.connect_params()}
                    following.request_id = connection.send("commands/connect", params)
                    while not following.ended() and self._connection is connection:
                        while following.chunks:
                            yield following.chunks.popleft()
                        if self._connection is connection:
                            receive(connection, following, deadline)
                            lost = 0
                except RpcError as error:
                    lost += 1
                    if lost == ATTEMPTS_MAX or not worth_it("commands/wait", error):
                        raise
                    continue
                finally:
                    connection.close()
                break
        while following.chunks and following.ended():
            yield following.chunks.popleft()


def deliver_text(chunk: Chunk, on_stdout: TextCallback | None, on_stderr: TextCallback | None) -> None:
    """Give a portion of output to whom it is for."""
    callback = on_stdout if chunk.stream == "stdout" else on_stderr
    if callback is not None and chunk.text:
        callback(chunk.text)


def kill(ref: dict[str, str], timeout_s: float | None = None) -> bool:
    """Kill a command; False: it had ended, or nobody knows it."""
    try:
        return bool(call("commands/kill", ref, timeout_s)["status"] == "killed")
    except NotFoundException:
        return False


def send_stdin(ref: dict[str, str], data: str | bytes, timeout_s: float | None = None) -> None:
    """Write to a command's stdin or terminal, and wait until it is taken."""
    for params in input_params(data):
        call("commands/send_stdin", {**ref, **params}, timeout_s)


class _Processes:
    """What commands and terminals have in common."""

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id

    def kill(self, pid: int | str, request_timeout: float | None = None) -> bool:
        """Kill a command and everything that it started. False: it had ended, or there is none."""
        try:
            ref = self._ref(pid, request_timeout)
        except NotFoundException:
            return False
        return kill(ref, request_timeout)

    def send_stdin(self, pid: int | str, data: str | bytes, request_timeout: float | None = None) -> None:
        """Write to a command's stdin or terminal."""
        send_stdin(self._ref(pid, request_timeout), data, request_timeout)

    def _list(self, timeout_s: float | None) -> list[ProcessInfo]:
        return processes(call("commands/list", {"sandbox": self._sandbox_id}, timeout_s))

    def _ref(self, pid: int | str, timeout_s: float | None) -> dict[str, str]:
        """What names a command, by its pid inside or by its id."""
        command_id = pid if isinstance(pid, str) else find_command(self._list(timeout_s), pid).command_id
        return {"sandbox": self._sandbox_id, "command_id": command_id}

    def _start(self, params: dict[str, Any], timeout_s: float | None) -> tuple[str, int]:
        """Start a command that goes on without us; its id and pid."""
        started = call("commands/start", {**params, "stdio": "spool"}, timeout_s)
        return started["command_id"], started["pid"]


class Commands(_Processes):
    """The commands of a sandbox."""

    @overload
    def run(
        self,
        cmd: str | Sequence[str],
        background: Literal[False] | None = None,
        envs: Env | None = None,
        user: str | None = None,
        cwd: str | None = None,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        stdin: bool | str | bytes | None = None,
        timeout: float | None = None,
        request_timeout: float | None = None,
    ) -> CommandResult: ...
    @overload
    def run(
        self,
        cmd: str | Sequence[str],
        background: Literal[True],
        envs: Env | None = None,
        user: str | None = None,
        cwd: str | None = None,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        stdin: bool | None = None,
        timeout: float | None = None,
        request_timeout: float | None = None,
    ) -> CommandHandle: ...
    def run(
        self,
        cmd: str | Sequence[str],
        background: bool | None = None,
        envs: Env | None = None,
        user: str | None = None,
        cwd: str | None = None,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        stdin: bool | str | bytes | None = None,
        timeout: float | None = None,
        request_timeout: float | None = None,
    ) -> CommandResult | CommandHandle:
        """Run a command to its end, or start it in the background.

        Args:
            cmd: Text for ``/bin/sh -c``, or a list that is run as it is.
            background: Return a handle at once; callbacks are then called by its ``wait``.
            envs: On top of the sandbox's own.
            user: Another user than the sandbox's. Slower, and its output comes when it has ended.
            cwd: Absolute, or relative to /workspace.
            on_stdout: Called with each portion of text.
            on_stderr: The same.
            stdin: What it reads. True: what ``send_stdin`` writes, until ``close_stdin``.
            timeout: Seconds; then its whole tree is killed. 0: none. Default: 60, and in the background none.
            request_timeout: Seconds for the daemon to start it.

        Raises:
            CommandExitException: It did not exit with 0.
            TimeoutException: It did not end in time.
            SandboxException: It could not be started.
        """
        if background:
            check_background(stdin)
            params = command_params(self._sandbox_id, cmd, envs, cwd, timeout)
            params.update(given(user=user, stdin="pipe" if stdin else None))
            return CommandHandle(self._sandbox_id, *self._start(params, request_timeout), on_stdout, on_stderr)
        limit = COMMAND_TIMEOUT_S if timeout is None else timeout
        params = command_params(self._sandbox_id, cmd, envs, cwd, limit)
        if user is not None:
            return self._run_as(user, params, stdin, on_stdout, on_stderr)
        params.update(run_params(stdin))
        following = Following(input_bytes(stdin))
        deadline = None if request_timeout is None else time.monotonic() + request_timeout
        with translated(), connect_or_start(os.environ) as connection:
            following.request_id = connection.send("commands/run", params)
            while not following.ended():
                receive(connection, following, None if following.started else deadline)
                while following.chunks:
                    deliver_text(following.chunks.popleft(), on_stdout, on_stderr)
        return following.result()

    def list(self, request_timeout: float | None = None) -> list[ProcessInfo]:
        """Commands that run, have left processes behind, or ended lately."""
        return self._list(request_timeout)

    def connect(
        self,
        pid: int | str,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        request_timeout: float | None = None,
        timeout: float | None = None,
    ) -> CommandHandle:
        """A handle on a command that was started in the background, by its pid inside or by its id.

        Args:
            pid: What names it.
            on_stdout: Called by ``wait`` with each portion of text.
            on_stderr: The same.
            request_timeout: Seconds for the daemon to find it.
            timeout: Seconds that the handle may be waited for; the command goes on then. 0, and the default: no end.
        """
        found = find_command(self._list(request_timeout), pid)
        return CommandHandle(self._sandbox_id, found.command_id, found.pid, on_stdout, on_stderr, timeout=timeout)

    def close_stdin(self, pid: int | str, request_timeout: float | None = None) -> None:
        """Close a command's stdin: it reads end of file."""
        call("commands/close_stdin", self._ref(pid, request_timeout), request_timeout)

    def _run_as(
        self,
        user: str,
        params: dict[str, Any],
        stdin: bool | str | bytes | None,
        on_stdout: TextCallback | None,
        on_stderr: TextCallback | None,
    ) -> CommandResult:
        with memory_files(input_bytes(stdin)) as files:
            end = call("commands/run", {**params, "user": user, "stdio": "descriptors"}, None, files)
            stdout, stderr = read_files(files)
        result = command_result(end, stdout, stderr)
        deliver_text(Chunk("stdout", stdout, result.stdout), on_stdout, on_stderr)
        deliver_text(Chunk("stderr", stderr, result.stderr), on_stdout, on_stderr)
        return checked(result)


class Pty(_Processes):
    """The terminals of a sandbox."""

    def create(
        self,
        size: PtySize,
        on_data: BytesCallback | None = None,
        user: str | None = None,
        cwd: str | None = None,
        envs: Env | None = None,
        timeout: float | None = None,
        request_timeout: float | None = None,
        cmd: str | Sequence[str] = LOGIN_SHELL,
    ) -> CommandHandle:
        """Start a shell, or ``cmd``, on a terminal that the daemon holds.

        Args:
            size: Of the terminal.
            on_data: Called by ``wait`` with each portion of what it shows.
            user: Another user than the sandbox's; refused by daemons that cannot.
            cwd: Absolute, or relative to /workspace.
            envs: On top of the sandbox's own.
            timeout: Seconds; then its whole tree is killed.
            request_timeout: Seconds for the daemon to start it.
            cmd: What to run.
        """
        params = command_params(self._sandbox_id, cmd, envs, cwd, timeout)
        params.update(given(user=user, pty={"rows": size.rows, "cols": size.cols}))
        return CommandHandle(self._sandbox_id, *self._start(params, request_timeout), on_data=on_data, pty=True)

    def connect(
        self,
        pid: int | str,
        on_data: BytesCallback | None = None,
        request_timeout: float | None = None,
        timeout: float | None = None,
    ) -> CommandHandle:
        """A handle on a terminal, by its pid inside or by its id. What it showed until now comes first.

        Args:
            pid: What names it.
            on_data: Called by ``wait`` with each portion of what it shows.
            request_timeout: Seconds for the daemon to find it.
            timeout: Seconds that the handle may be waited for; the terminal goes on then. 0, and the default: no end.
        """
        found = find_command(self._list(request_timeout), pid)
        return CommandHandle(
            self._sandbox_id, found.command_id, found.pid, on_data=on_data, pty=True, timeout=timeout
        )

    def resize(self, pid: int | str, size: PtySize, request_timeout: float | None = None) -> None:
        """Change a terminal's size."""
        params = {**self._ref(pid, request_timeout), "size": {"rows": size.rows, "cols": size.cols}}
        call("commands/resize", params, request_timeout)


class Shell:
    """A shell that keeps its working directory, variables, functions and aliases. A ``with`` closes it at its end."""

    def __init__(self, sandbox_id: str, shell_id: str) -> None:
        self._sandbox_id = sandbox_id
        self._ref = {"sandbox": sandbox_id, "shell_id": shell_id}

    @property
    def shell_id(self) -> str:
        """What names it to ``shells.connect`` and ``sandboxctl``."""
        return self._ref["shell_id"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self,
        text: str,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        timeout: float | None = None,
    ) -> ShellResult:
        """Let it evaluate some text, and wait until it is ready again.

        Args:
            text: As if it were sourced. Its stdin is empty.
            on_stdout: Called with each portion of text.
            on_stderr: The same.
            timeout: Seconds; then it is interrupted, and replaced if it does not come back. 0: none. Default: 60.

        Raises:
            CommandExitException: The text did not exit with 0.
            TimeoutException: It did not end in time; ``result`` says whether the shell is another one now.
            NotFoundException: The shell has ended.
        """
        following = Following()
        with translated(), connect_or_start(os.environ) as connection:
            following.request_id = connection.send(
                "shells/run", shell_params(self._sandbox_id, self.shell_id, text, timeout)
            )
            while not following.ended():
                receive(connection, following)
                while following.chunks:
                    deliver_text(following.chunks.popleft(), on_stdout, on_stderr)
        return following.shell_result()

    def interrupt(self, request_timeout: float | None = None) -> bool:
        """End what it evaluates, from another thread. False: nothing."""
        return bool(call("shells/interrupt", self._ref, request_timeout)["interrupted"])

    def close(self, request_timeout: float | None = None) -> bool:
        """End it and all that it left running. False: it had ended."""
        try:
            call("shells/close", self._ref, request_timeout)
        except NotFoundException:
            return False
        return True


class Shells:
    """The shells of a sandbox."""

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id

    def open(
        self,
        shell: str | None = None,
        envs: Env | None = None,
        cwd: str | None = None,
        request_timeout: float | None = None,
    ) -> Shell:
        """Open one: bash, or sh where the image has no bash, or ``shell``."""
        params = given(sandbox=self._sandbox_id, shell=shell, env=envs, cwd=cwd)
        return Shell(self._sandbox_id, call("shells/open", params, request_timeout)["shell_id"])

    def connect(self, shell_id: str) -> Shell:
        """One that is open, by its id."""
        return Shell(self._sandbox_id, shell_id)

    def list(self, request_timeout: float | None = None) -> Sequence[ShellInfo]:
        """Those that are open."""
        reply = call("shells/list", {"sandbox": self._sandbox_id}, request_timeout)
        return [shell_info(row) for row in reply["shells"]]


class Sandbox:
    """A sandbox. Making the object makes the sandbox; a ``with`` kills it at its end.

    Args:
        template: The name of a configured recipe. Default: ``default``. Another image: ``image=``.
        metadata: Kept with it, and what ``list`` can ask for.
        envs: Variables of all its commands.
        options: See ``CreateOptions``.
    """

    def __init__(
        self,
        template: str | None = None,
        metadata: Env | None = None,
        envs: Env | None = None,
        **options: Unpack[CreateOptions],
    ) -> None:
        params = create_params(template, metadata, envs, options)
        self._adopt(call("sandbox/create", params, options.get("request_timeout"))["id"])

    @classmethod
    def create(
        cls,
        template: str | None = None,
        metadata: Env | None = None,
        envs: Env | None = None,
        **options: Unpack[CreateOptions],
    ) -> Self:
        """Make a sandbox and prove its limits."""
        return cls(template, metadata, envs, **options)

    @classmethod
    def connect(
        cls, sandbox_id: str, timeout: float | str | None = None, request_timeout: float | None = None
    ) -> Self:
        """A sandbox that is there, by its id, an unambiguous prefix of it, or its name; a paused one goes on.

        Args:
            sandbox_id: What names it.
            timeout: Seconds that it lasts from now on, unless it lasts longer anyway.
            request_timeout: Seconds for the daemon to answer.

        Raises:
            NotFoundException: There is none.
        """
        reply = call("sandbox/connect", given(sandbox=sandbox_id, lifetime=timeout), request_timeout)
        self = cls.__new__(cls)
        self._adopt(reply["id"])
        return self

    resume = connect

    @staticmethod
    def list(query: SandboxQuery | None = None, request_timeout: float | None = None) -> SandboxPaginator:
        """The sandboxes of this daemon, or those that the query means: a list, which has its page as well."""
        reply = call("sandbox/list", list_params(query), request_timeout)
        return SandboxPaginator(listed_sandboxes(reply, query))

    def _adopt(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id
        self._ref = {"sandbox": sandbox_id}
        self.commands = Commands(sandbox_id)
        """Run and reach its commands."""
        self.files = Files(sandbox_id)
        """Read, write and watch its files."""
        self.pty = Pty(sandbox_id)
        """Terminals in it."""
        self.shells = Shells(sandbox_id)
        """Shells that keep their state."""

    @property
    def sandbox_id(self) -> str:
        """What names it."""
        return self._sandbox_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    kill = InstanceOrClass(
        lambda self: _killer(self.sandbox_id),
        lambda _: _kill_sandbox,
        "End everything in it and remove it. False: there is none. On the class it takes the sandbox's id.",
    )

    def get_info(self, request_timeout: float | None = None) -> SandboxInfo:
        """Everything about it, the engine's view included.

        Raises:
            NotFoundException: It is gone.
        """
        return sandbox_info(call("sandbox/get", self._ref, request_timeout))

    def is_running(self, request_timeout: float | None = None) -> bool:
        """Whether commands can be run in it."""
        try:
            [row] = call("sandbox/metrics", {"sandboxes": [self.sandbox_id]}, request_timeout)["sandboxes"]
        except NotFoundException:
            return False
        return bool(row["state"] == "running")

    def set_timeout(self, timeout: float | str, request_timeout: float | None = None) -> None:
        """Let it last so many seconds from now on, whatever it was given before; ``"none"``: until it is killed."""
        call("sandbox/set_timeout", {**self._ref, "lifetime": timeout}, request_timeout)

    def touch(self, request_timeout: float | None = None) -> None:
        """Say that it is still needed: it is not idle."""
        call("sandbox/touch", self._ref, request_timeout)

    def pause(self, request_timeout: float | None = None) -> None:
        """Freeze it: it keeps its memory, and takes no CPU time until ``connect`` or ``resume``.

        Raises:
            SandboxException: It does not run, or its engine cannot.
        """
        call("sandbox/pause", self._ref, request_timeout)

    def get_host(self, port: int, request_timeout: float | None = None) -> str:
        """Where a port inside is reached from this host: ``127.0.0.1`` and a port that leads there, made if need be.

        Raises:
            SandboxException: The sandbox does not run.
        """
        forwards = call("ports/list", self._ref, request_timeout)["forwards"]
        found = host_of(forwards, port)
        return found or str(host_of([call("ports/forward", {**self._ref, "port": port}, request_timeout)], port))

    def get_metrics(self, request_timeout: float | None = None) -> Sequence[SandboxMetrics]:
        """Its usage now, as the only element of a list."""
        return [sandbox_metrics(call("sandbox/metrics", {"sandboxes": [self.sandbox_id]}, request_timeout))]

    def update(self, request_timeout: float | None = None, **limits: Unpack[LimitOptions]) -> SandboxInfo:
        """Change limits while it runs, and prove them again.

        Raises:
            InvalidArgumentException: A limit that cannot be meant, or enforced here.
        """
        return sandbox_info(call("sandbox/update", {**self._ref, **update_params(limits)}, request_timeout))

    def verify(self, provoke: bool = False, request_timeout: float | None = None) -> SandboxVerification:
        """Read the limits from the kernel again; with ``provoke`` run into them as well."""
        return verification(call("sandbox/verify", {**self._ref, "provoke": provoke}, request_timeout))


def _killer(sandbox_id: str) -> Callable[..., bool]:
    def kill_it(request_timeout: float | None = None) -> bool:
        return _kill_sandbox(sandbox_id, request_timeout)

    return kill_it


def _kill_sandbox(sandbox_id: str, request_timeout: float | None = None) -> bool:
    try:
        call("sandbox/kill", {"sandbox": sandbox_id}, request_timeout)
    except NotFoundException:
        return False
    return True
