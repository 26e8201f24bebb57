"""``AsyncSandbox``: the client for async code, on anyio. The twin of ``sandbox``, method for method.

Each call, and each handle that is followed, has a connection of its own: cancelling the one that waits closes it, and
the daemon then ends what was asked for. Requests are small and the socket is local, so they are sent without waiting.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, overload

import anyio

from sandboxd.client.again import ATTEMPTS_MAX, worth_it
from sandboxd.client.aio_calls import call, connect, settled
from sandboxd.client.aio_files import AsyncFiles
from sandboxd.client.calls import late
from sandboxd.client.connection import Connection, RpcError
from sandboxd.client.errors import NotFoundException, SandboxException, translated
from sandboxd.client.following import Chunk, Following, checked, input_params
from sandboxd.client.model import (
    COMMAND_TIMEOUT_S,
    LOGIN_SHELL,
    CommandResult,
    CreateOptions,
    Env,
    LimitOptions,
    ListedSandbox,
    ProcessInfo,
    PtySize,
    SandboxInfo,
    SandboxMetrics,
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
from sandboxd.client.sandbox import InstanceOrClass

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
    from types import TracebackType
    from typing import Self, Unpack

    TextCallback = Callable[[str], object]
    BytesCallback = Callable[[bytes], object]


async def receive(connection: Connection, following: Following, timeout_s: float | None = None) -> None:
    """Wait for one portion of what the daemon says about a command, and answer it.

    Raises:
        RpcError: As ``Following.take``; or ``timeout``.
    """
    with anyio.move_on_after(timeout_s) as waiting:
        await anyio.wait_readable(connection.fileno())
    if waiting.cancelled_caught:
        raise late()
    for message in connection.read():
        request = following.take(message.content)
        if request is not None:
            connection.send(*request)


def left(deadline: float | None) -> float | None:
    """Seconds until then; None: there is no end."""
    return None if deadline is None else max(deadline - time.monotonic(), 0)


class AsyncCommandHandle:
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
        return self._following.written("stdout").decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it wrote to stderr, as far as it was read."""
        return self._following.written("stderr").decode(errors="replace")

    async def __aiter__(self) -> AsyncIterator[tuple[str | None, str | None, bytes | None]]:
        """Each portion of output as ``(stdout, stderr, pty)``, two of which are None, until the command has ended."""
        async for chunk in self._chunks():
            if self._pty:
                yield None, None, chunk.data
            elif chunk.stream == "stdout":
                yield chunk.text, None, None
            else:
                yield None, chunk.text, None

    async def wait(
        self,
        on_pty: BytesCallback | None = None,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
    ) -> CommandResult:
        """Wait for the end. May be called again. Callbacks may be async, and go before those given at the start.

        Raises:
            CommandExitException: It did not exit with 0.
            TimeoutException: It ran into the timeout that it was started with; or, where there is no ``result``, the
                handle into its own, and the command goes on.
        """
        on_data = on_pty or self._on_data
        async for chunk in self._chunks():
            if not self._pty:
                await deliver_text(chunk, on_stdout or self._on_stdout, on_stderr or self._on_stderr)
            elif on_data is not None and chunk.data:
                await settled(on_data(chunk.data))
        if not self._following.ended():
            raise SandboxException("cannot wait for the command", "disconnect was called meanwhile")
        return self._following.result()

    async def kill(self) -> bool:
        """Kill it and everything that it started. False: it had ended."""
        return await kill(self._ref)

    async def send_stdin(self, data: str | bytes, request_timeout: float | None = None) -> None:
        """Write to its stdin or terminal."""
        await send_stdin(self._ref, data, request_timeout)

    async def close_stdin(self, request_timeout: float | None = None) -> None:
        """Close its stdin: it reads end of file."""
        await call("commands/close_stdin", self._ref, request_timeout)

    async def disconnect(self) -> None:
        """Stop following it, from the task that does. It goes on, and ``wait`` takes up where this left off."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _chunks(self) -> AsyncIterator[Chunk]:
        following = self._following
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        with translated():
            lost = 0
            while not following.ended():
                connection = self._connection = await connect()
                try:
                    params = {**self._ref, **following.connect_params()}
                    following.request_id = connection.send("commands/connect", params)
                    while not following.ended() and self._connection is connection:
                        while following.chunks:
                            yield following.chunks.popleft()
                        if self._connection is connection:
                            await receive(connection, following, left(deadline))
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


async def deliver_text(chunk: Chunk, on_stdout: TextCallback | None, on_stderr: TextCallback | None) -> None:
    """Give a portion of output to whom it is for."""
    callback = on_stdout if chunk.stream == "stdout" else on_stderr
    if callback is not None and chunk.text:
        await settled(callback(chunk.text))


async def kill(ref: dict[str, str], timeout_s: float | None = None) -> bool:
    """Kill a command; False: it had ended, or nobody knows it."""
    try:
        end = await call("commands/kill", ref, timeout_s)
    except NotFoundException:
        return False
    return bool(end["status"] == "killed")


async def send_stdin(ref: dict[str, str], data: str | bytes, timeout_s: float | None = None) -> None:
    """Write to a command's stdin or terminal, and wait until it is taken."""
    for params in input_params(data):
        await call("commands/send_stdin", {**ref, **params}, timeout_s)


class _Processes:
    """What commands and terminals have in common."""

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id

    async def kill(self, pid: int | str, request_timeout: float | None = None) -> bool:
        """Kill a command and everything that it started. False: it had ended, or there is none."""
        try:
            ref = await self._ref(pid, request_timeout)
        except NotFoundException:
            return False
        return await kill(ref, request_timeout)

    async def send_stdin(self, pid: int | str, data: str | bytes, request_timeout: float | None = None) -> None:
        """Write to a command's stdin or terminal."""
        await send_stdin(await self._ref(pid, request_timeout), data, request_timeout)

    async def _list(self, timeout_s: float | None) -> list[ProcessInfo]:
        return processes(await call("commands/list", {"sandbox": self._sandbox_id}, timeout_s))

    async def _ref(self, pid: int | str, timeout_s: float | None) -> dict[str, str]:
        """What names a command, by its pid inside or by its id."""
        command_id = pid if isinstance(pid, str) else find_command(await self._list(timeout_s), pid).command_id
        return {"sandbox": self._sandbox_id, "command_id": command_id}

    async def _start(self, params: dict[str, Any], timeout_s: float | None) -> tuple[str, int]:
        """Start a command that goes on without us; its id and pid."""
        started = await call("commands/start", {**params, "stdio": "spool"}, timeout_s)
        return started["command_id"], started["pid"]


class AsyncCommands(_Processes):
    """The commands of a sandbox."""

    @overload
    async def run(
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
    async def run(
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
    ) -> AsyncCommandHandle: ...
    async def run(
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
    ) -> CommandResult | AsyncCommandHandle:
        """Run a command to its end, or start it in the background. Cancelling the former kills the command.

        Args:
            cmd: Text for ``/bin/sh -c``, or a list that is run as it is.
            background: Return a handle at once; callbacks are then called by its ``wait``.
            envs: On top of the sandbox's own.
            user: Another user than the sandbox's. Slower, and its output comes when it has ended.
            cwd: Absolute, or relative to /workspace.
            on_stdout: Called with each portion of text; may be async.
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
            started = await self._start(params, request_timeout)
            return AsyncCommandHandle(self._sandbox_id, *started, on_stdout, on_stderr)
        limit = COMMAND_TIMEOUT_S if timeout is None else timeout
        params = command_params(self._sandbox_id, cmd, envs, cwd, limit)
        if user is not None:
            return await self._run_as(user, params, stdin, on_stdout, on_stderr)
        params.update(run_params(stdin))
        following = Following(input_bytes(stdin))
        with translated():
            connection = await connect()
            with connection:
                following.request_id = connection.send("commands/run", params)
                while not following.ended():
                    await receive(connection, following, None if following.started else request_timeout)
                    while following.chunks:
                        await deliver_text(following.chunks.popleft(), on_stdout, on_stderr)
        return following.result()

    async def list(self, request_timeout: float | None = None) -> list[ProcessInfo]:
        """Commands that run, have left processes behind, or ended lately."""
        return await self._list(request_timeout)

    async def connect(
        self,
        pid: int | str,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        request_timeout: float | None = None,
        timeout: float | None = None,
    ) -> AsyncCommandHandle:
        """A handle on a command that was started in the background, by its pid inside or by its id.

        Args:
            pid: What names it.
            on_stdout: Called by ``wait`` with each portion of text; may be async.
            on_stderr: The same.
            request_timeout: Seconds for the daemon to find it.
            timeout: Seconds that the handle may be waited for; the command goes on then. 0, and the default: no end.
        """
        found = find_command(await self._list(request_timeout), pid)
        return AsyncCommandHandle(
            self._sandbox_id, found.command_id, found.pid, on_stdout, on_stderr, timeout=timeout
        )

    async def close_stdin(self, pid: int | str, request_timeout: float | None = None) -> None:
        """Close a command's stdin: it reads end of file."""
        await call("commands/close_stdin", await self._ref(pid, request_timeout), request_timeout)

    async def _run_as(
        self,
        user: str,
        params: dict[str, Any],
        stdin: bool | str | bytes | None,
        on_stdout: TextCallback | None,
        on_stderr: TextCallback | None,
    ) -> CommandResult:
        with memory_files(input_bytes(stdin)) as files:
            end = await call("commands/run", {**params, "user": user, "stdio": "descriptors"}, None, files)
            stdout, stderr = read_files(files)
        result = command_result(end, stdout, stderr)
        await deliver_text(Chunk("stdout", stdout, result.stdout), on_stdout, on_stderr)
        await deliver_text(Chunk("stderr", stderr, result.stderr), on_stdout, on_stderr)
        return checked(result)


class AsyncPty(_Processes):
    """The terminals of a sandbox."""

    async def create(
        self,
        size: PtySize,
        on_data: BytesCallback | None = None,
        user: str | None = None,
        cwd: str | None = None,
        envs: Env | None = None,
        timeout: float | None = None,
        request_timeout: float | None = None,
        cmd: str | Sequence[str] = LOGIN_SHELL,
    ) -> AsyncCommandHandle:
        """Start a shell, or ``cmd``, on a terminal that the daemon holds. Arguments as for ``Pty.create``."""
        params = command_params(self._sandbox_id, cmd, envs, cwd, timeout)
        params.update(given(user=user, pty={"rows": size.rows, "cols": size.cols}))
        started = await self._start(params, request_timeout)
        return AsyncCommandHandle(self._sandbox_id, *started, on_data=on_data, pty=True)

    async def connect(
        self,
        pid: int | str,
        on_data: BytesCallback | None = None,
        request_timeout: float | None = None,
        timeout: float | None = None,
    ) -> AsyncCommandHandle:
        """A handle on a terminal, by its pid inside or by its id. What it showed until now comes first.

        Args:
            pid: What names it.
            on_data: Called by ``wait`` with each portion of what it shows; may be async.
            request_timeout: Seconds for the daemon to find it.
            timeout: Seconds that the handle may be waited for; the terminal goes on then. 0, and the default: no end.
        """
        found = find_command(await self._list(request_timeout), pid)
        return AsyncCommandHandle(
            self._sandbox_id, found.command_id, found.pid, on_data=on_data, pty=True, timeout=timeout
        )

    async def resize(self, pid: int | str, size: PtySize, request_timeout: float | None = None) -> None:
        """Change a terminal's size."""
        params = {**await self._ref(pid, request_timeout), "size": {"rows": size.rows, "cols": size.cols}}
        await call("commands/resize", params, request_timeout)


class AsyncShell:
    """A shell that keeps its directory, variables, functions and aliases. An ``async with`` closes it at its end."""

    def __init__(self, sandbox_id: str, shell_id: str) -> None:
        self._sandbox_id = sandbox_id
        self._ref = {"sandbox": sandbox_id, "shell_id": shell_id}

    @property
    def shell_id(self) -> str:
        """What names it to ``shells.connect`` and ``sandboxctl``."""
        return self._ref["shell_id"]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

    async def run(
        self,
        text: str,
        on_stdout: TextCallback | None = None,
        on_stderr: TextCallback | None = None,
        timeout: float | None = None,
    ) -> ShellResult:
        """Let it evaluate some text, and wait until it is ready again. Cancelling interrupts it.

        Args:
            text: As if it were sourced. Its stdin is empty.
            on_stdout: Called with each portion of text; may be async.
            on_stderr: The same.
            timeout: Seconds; then it is interrupted, and replaced if it does not come back. 0: none. Default: 60.

        Raises:
            CommandExitException: The text did not exit with 0.
            TimeoutException: It did not end in time; ``result`` says whether the shell is another one now.
            NotFoundException: The shell has ended.
        """
        following = Following()
        params = shell_params(self._sandbox_id, self.shell_id, text, timeout)
        with translated():
            connection = await connect()
            with connection:
                following.request_id = connection.send("shells/run", params)
                while not following.ended():
                    await receive(connection, following)
                    while following.chunks:
                        await deliver_text(following.chunks.popleft(), on_stdout, on_stderr)
        return following.shell_result()

    async def interrupt(self, request_timeout: float | None = None) -> bool:
        """End what it evaluates. False: nothing."""
        return bool((await call("shells/interrupt", self._ref, request_timeout))["interrupted"])

    async def close(self, request_timeout: float | None = None) -> bool:
        """End it and all that it left running. False: it had ended."""
        try:
            await call("shells/close", self._ref, request_timeout)
        except NotFoundException:
            return False
        return True


class AsyncShells:
    """The shells of a sandbox."""

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id

    async def open(
        self,
        shell: str | None = None,
        envs: Env | None = None,
        cwd: str | None = None,
        request_timeout: float | None = None,
    ) -> AsyncShell:
        """Open one: bash, or sh where the image has no bash, or ``shell``."""
        params = given(sandbox=self._sandbox_id, shell=shell, env=envs, cwd=cwd)
        reply = await call("shells/open", params, request_timeout)
        return AsyncShell(self._sandbox_id, reply["shell_id"])

    def connect(self, shell_id: str) -> AsyncShell:
        """One that is open, by its id."""
        return AsyncShell(self._sandbox_id, shell_id)

    async def list(self, request_timeout: float | None = None) -> Sequence[ShellInfo]:
        """Those that are open."""
        reply = await call("shells/list", {"sandbox": self._sandbox_id}, request_timeout)
        return [shell_info(row) for row in reply["shells"]]


class AsyncSandboxPaginator:
    """The sandboxes of this daemon, asked for when it is awaited, or by ``next_items``. There is one page."""

    def __init__(self, query: SandboxQuery | None, request_timeout: float | None) -> None:
        self._query = query
        self._request_timeout = request_timeout
        self._has_next = True

    @property
    def has_next(self) -> bool:
        """Whether the page was not yet taken."""
        return self._has_next

    def __await__(self) -> Generator[Any, Any, list[ListedSandbox]]:
        return self._listed().__await__()

    async def next_items(self) -> list[ListedSandbox]:
        """All of them; after that, none."""
        if not self._has_next:
            return []
        listed = await self._listed()
        self._has_next = False
        return listed

    async def _listed(self) -> list[ListedSandbox]:
        reply = await call("sandbox/list", list_params(self._query), self._request_timeout)
        return listed_sandboxes(reply, self._query)


class AsyncSandbox:
    """A sandbox, for async code: made by ``create``, found by ``connect``. An ``async with`` kills it at its end."""

    def __init__(self, sandbox_id: str) -> None:
        self._sandbox_id = sandbox_id
        self._ref = {"sandbox": sandbox_id}
        self.commands = AsyncCommands(sandbox_id)
        """Run and reach its commands."""
        self.files = AsyncFiles(sandbox_id)
        """Read, write and watch its files."""
        self.pty = AsyncPty(sandbox_id)
        """Terminals in it."""
        self.shells = AsyncShells(sandbox_id)
        """Shells that keep their state."""

    @classmethod
    async def create(
        cls,
        template: str | None = None,
        metadata: Env | None = None,
        envs: Env | None = None,
        **options: Unpack[CreateOptions],
    ) -> Self:
        """Make a sandbox and prove its limits. Arguments as for ``Sandbox``."""
        params = create_params(template, metadata, envs, options)
        return cls((await call("sandbox/create", params, options.get("request_timeout")))["id"])

    @classmethod
    async def connect(
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
        reply = await call("sandbox/connect", given(sandbox=sandbox_id, lifetime=timeout), request_timeout)
        return cls(reply["id"])

    resume = connect

    @staticmethod
    def list(query: SandboxQuery | None = None, request_timeout: float | None = None) -> AsyncSandboxPaginator:
        """The sandboxes of this daemon, or those that the query means: awaited, a list; or asked for its page."""
        return AsyncSandboxPaginator(query, request_timeout)

    @property
    def sandbox_id(self) -> str:
        """What names it."""
        return self._sandbox_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self.kill()

    kill = InstanceOrClass(
        lambda self: _killer(self.sandbox_id),
        lambda _: _kill_sandbox,
        "End everything in it and remove it. False: there is none. On the class it takes the sandbox's id.",
    )

    async def get_info(self, request_timeout: float | None = None) -> SandboxInfo:
        """Everything about it, the engine's view included.

        Raises:
            NotFoundException: It is gone.
        """
        return sandbox_info(await call("sandbox/get", self._ref, request_timeout))

    async def is_running(self, request_timeout: float | None = None) -> bool:
        """Whether commands can be run in it."""
        try:
            reply = await call("sandbox/metrics", {"sandboxes": [self.sandbox_id]}, request_timeout)
        except NotFoundException:
            return False
        return bool(reply["sandboxes"][0]["state"] == "running")

    async def set_timeout(self, timeout: float | str, request_timeout: float | None = None) -> None:
        """Let it last so many seconds from now on, whatever it was given before; ``"none"``: until it is killed."""
        await call("sandbox/set_timeout", {**self._ref, "lifetime": timeout}, request_timeout)

    async def touch(self, request_timeout: float | None = None) -> None:
        """Say that it is still needed: it is not idle."""
        await call("sandbox/touch", self._ref, request_timeout)

    async def pause(self, request_timeout: float | None = None) -> None:
        """Freeze it: it keeps its memory, and takes no CPU time until ``connect`` or ``resume``.

        Raises:
            SandboxException: It does not run, or its engine cannot.
        """
        await call("sandbox/pause", self._ref, request_timeout)

    async def get_host(self, port: int, request_timeout: float | None = None) -> str:
        """Where a port inside is reached from this host: ``127.0.0.1`` and a port that leads there, made if need be.

        Raises:
            SandboxException: The sandbox does not run.
        """
        forwards = (await call("ports/list", self._ref, request_timeout))["forwards"]
        found = host_of(forwards, port)
        return found or str(
            host_of([await call("ports/forward", {**self._ref, "port": port}, request_timeout)], port)
        )

    async def get_metrics(self, request_timeout: float | None = None) -> Sequence[SandboxMetrics]:
        """Its usage now, as the only element of a list."""
        return [sandbox_metrics(await call("sandbox/metrics", {"sandboxes": [self.sandbox_id]}, request_timeout))]

    async def update(self, request_timeout: float | None = None, **limits: Unpack[LimitOptions]) -> SandboxInfo:
        """Change limits while it runs, and prove them again.

        Raises:
            InvalidArgumentException: A limit that cannot be meant, or enforced here.
        """
        return sandbox_info(await call("sandbox/update", {**self._ref, **update_params(limits)}, request_timeout))

    async def verify(self, provoke: bool = False, request_timeout: float | None = None) -> SandboxVerification:
        """Read the limits from the kernel again; with ``provoke`` run into them as well."""
        return verification(await call("sandbox/verify", {**self._ref, "provoke": provoke}, request_timeout))


def _killer(sandbox_id: str) -> Callable[..., Awaitable[bool]]:
    async def kill_it(request_timeout: float | None = None) -> bool:
        return await _kill_sandbox(sandbox_id, request_timeout)

    return kill_it


async def _kill_sandbox(sandbox_id: str, request_timeout: float | None = None) -> bool:
    try:
        await call("sandbox/kill", {"sandbox": sandbox_id}, request_timeout)
    except NotFoundException:
        return False
    return True
