"""The Python client, blocking and async, against a daemon on real engines."""

from __future__ import annotations

import asyncio
import os
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from sandboxd.client import (
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxQuery,
    TimeoutException,
)
from tests.engine.daemons import Daemon, wait_until
from tests.twins import Twin

pytestmark = pytest.mark.engine

FOREVER = "while :; do sleep 1; done"


@pytest.fixture(autouse=True)
def reachable(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client finds the daemon where a user's would be found."""
    monkeypatch.setenv("SANDBOXD_SOCKET", str(daemon.socket))


@pytest.fixture(params=["blocking", "async"])
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    """``Sandbox``, or what does the same over ``AsyncSandbox``."""
    if request.param == "blocking":
        yield Sandbox
        return
    with asyncio.Runner() as runner:
        yield Twin(AsyncSandbox, runner)


@pytest.fixture
def sandbox(client: Any, box: dict[str, Any]) -> Any:
    """The module's sandbox, through the client."""
    return client.connect(box["id"])


def test_a_sandbox_is_made_found_and_killed(client: Any, engine: str, daemon: Daemon, tmp_path: Any) -> None:
    """Its whole life, by the methods that agent code calls."""
    (tmp_path / "hello").write_text("hello")
    tmp_path.chmod(0o755)
    with client.create(
        metadata={"task": str(tmp_path)},
        envs={"A": "b"},
        engine=engine,
        workspace=tmp_path,
        read_only=True,
        memory="64m",
    ) as box:
        assert box.is_running()
        assert box.commands.run("cat hello; echo $A").stdout == "hellob\n"
        with pytest.raises(CommandExitException):
            box.commands.run("echo x > hello")
        info = box.get_info()
        assert (info.sandbox_id, info.state, info.engine) == (box.sandbox_id, "running", engine)
        assert (info.memory_mb, info.cpu_count) == (64, metrics_of(box).cpu_count)
        assert (info.workspace, info.network, info.envs, info.verified) == (str(tmp_path), "none", {"A": "b"}, True)
        assert [row.sandbox_id for row in client.list(SandboxQuery(metadata=info.metadata))] == [box.sandbox_id]
        assert client.list(SandboxQuery(metadata=info.metadata, state=["stopped"])) == []
        assert client.connect(box.sandbox_id[:20]).sandbox_id == box.sandbox_id
        assert metrics_of(box).mem_total == 64 << 20
        [memory] = [limit for limit in box.update(memory="96m").limits if limit.name == "memory"]
        assert (memory.effective, memory.verified) == (96 << 20, True)
        assert box.verify().verified
    assert not box.is_running()
    assert client.kill(box.sandbox_id) is False
    with pytest.raises(SandboxNotFoundException):
        client.connect(box.sandbox_id)


def metrics_of(box: Any) -> Any:
    [metrics] = box.get_metrics()
    return metrics


def test_a_port_inside_has_a_place_on_this_host(client: Any, engine: str) -> None:
    """Made when it is asked for, and the same one from then on, whatever the network of the sandbox."""
    with client.create(engine=engine) as box:
        serve = "while :; do printf 'HTTP/1.0 204 No Content\\r\\n\\r\\n' | nc -l -p 8080; done"
        box.commands.run(serve, background=True)
        host = box.get_host(8080)
        assert box.get_host(8080) == host

        def answered() -> bool:
            try:
                with urllib.request.urlopen(f"http://{host}/", timeout=20) as reply:
                    return bool(reply.status == 204)
            except OSError:
                return False

        wait_until(answered, "the server inside answers")


def test_a_handle_can_be_waited_for_so_long_and_no_longer(sandbox: Any) -> None:
    """The command goes on, and so may whoever waits for it."""
    started = sandbox.commands.run("read line; echo $line", background=True, stdin=True)
    handle = sandbox.commands.connect(started.pid, timeout=0.2)
    with pytest.raises(TimeoutException) as raised:
        handle.wait()
    assert raised.value.result is None
    handle.send_stdin("done\n", request_timeout=20)
    handle.close_stdin(request_timeout=20)
    assert sandbox.commands.connect(started.command_id, timeout=60).wait().stdout == "done\n"


def test_a_file_that_is_not_there_is_no_missing_sandbox(sandbox: Any) -> None:
    """Agent code catches the one and goes on."""
    with pytest.raises(FileNotFoundException):
        sandbox.files.read("/tmp/absent")


def test_a_sandbox_is_killed_by_its_id(client: Any, engine: str) -> None:
    """For what another process made."""
    box = client.create(engine=engine)
    assert client.kill(box.sandbox_id) is True
    with pytest.raises(NotFoundException):
        box.get_info()


def test_a_limit_that_cannot_be_meant_is_an_invalid_argument(client: Any, engine: str) -> None:
    """A misspelt limit must not become none."""
    with pytest.raises(InvalidArgumentException, match="banana"):
        client.create(engine=engine, memory="banana")


def test_a_command_runs_to_its_end(sandbox: Any) -> None:
    """Text goes to a shell, a list does not; bytes are kept beside the text."""
    result = sandbox.commands.run("printf 'a\\377'; echo $B >&2; pwd >&2", envs={"B": "c"}, cwd="/tmp")
    assert (result.stdout, result.stdout_bytes, result.stderr) == ("a\ufffd", b"a\xff", "c\n/tmp\n")
    assert (result.exit_code, result.status, result.error, result.truncated) == (0, "ok", None, False)
    assert sandbox.commands.run(["echo", "$B; exit 3"]).stdout == "$B; exit 3\n"


def test_a_failing_command_is_raised_with_what_it_wrote(sandbox: Any) -> None:
    """The exception is the result, too."""
    with pytest.raises(CommandExitException, match="oops") as raised:
        sandbox.commands.run("echo out; echo oops >&2; exit 3")
    error = raised.value
    assert (error.exit_code, error.stdout, error.stderr) == (3, "out\n", "oops\n")
    with pytest.raises(CommandExitException) as raised:
        sandbox.commands.run("kill -9 $$")
    assert (raised.value.exit_code, raised.value.result.status) == (137, "signaled")


def test_output_is_called_back_as_whole_characters(sandbox: Any) -> None:
    """A character that is written in two halves arrives as one."""
    out: list[str] = []
    err: list[str] = []
    script = "printf 'a\\303'; sleep 0.2; printf '\\251b'; echo e >&2"
    result = sandbox.commands.run(script, on_stdout=out.append, on_stderr=err.append)
    assert "".join(out) == "aéb" == result.stdout
    assert err == ["e\n"]


def test_stdin_is_given_whole(sandbox: Any) -> None:
    """Larger than a pipe, a message and the socket's buffer; and not read at all."""
    data = os.urandom(3 << 20)
    assert sandbox.commands.run("cat", stdin=data).stdout_bytes == data
    assert sandbox.commands.run("cat", stdin="text").stdout == "text"
    assert sandbox.commands.run("true", stdin=data).exit_code == 0
    assert sandbox.commands.run("cat").stdout == ""


def test_a_command_that_does_not_end_is_a_timeout(sandbox: Any) -> None:
    """With what it wrote until then."""
    with pytest.raises(TimeoutException) as raised:
        sandbox.commands.run(f"echo before; {FOREVER}", timeout=0.3)
    assert raised.value.result is not None
    assert raised.value.result.stdout == "before\n"


def test_a_program_that_is_not_there_is_no_exit_code(sandbox: Any) -> None:
    """A shell's 127 is the shell's; without one it is an error in words."""
    with pytest.raises(SandboxException, match="cannot execute 'absent'") as raised:
        sandbox.commands.run(["absent"])
    assert raised.value.type == "command_not_started"


def test_another_user_is_asked_of_the_engine(sandbox: Any) -> None:
    """The same call, the slow way."""
    said: list[str] = []
    result = sandbox.commands.run("id -u; cat; exit 0", user="0", stdin="x", on_stdout=said.append)
    assert result.stdout == "0\nx"
    assert said == ["0\nx"]
    with pytest.raises(CommandExitException, match="code 4"):
        sandbox.commands.run("exit 4", user="0")


def test_a_command_in_the_background_is_iterated(sandbox: Any) -> None:
    """Each portion is of one stream; the end is the result."""
    handle = sandbox.commands.run("echo a; read x; echo $x >&2; exit 3", background=True, stdin=True)
    handle.send_stdin("b\n")
    portions = list(handle)
    assert "".join(out for out, _, _ in portions if out) == "a\n" == handle.stdout
    assert "".join(err for _, err, _ in portions if err) == "b\n" == handle.stderr
    for _ in range(2):
        with pytest.raises(CommandExitException) as raised:
            handle.wait()
        assert raised.value.exit_code == 3


def test_a_command_is_found_by_pid_and_by_id(sandbox: Any) -> None:
    """Theirs is a number, ours outlives it; each method takes both."""
    handle = sandbox.commands.run("cat; echo done", background=True, stdin=True)
    [info] = [row for row in sandbox.commands.list() if row.command_id == handle.command_id]
    assert (info.pid, info.cmd, info.state) == (handle.pid, "/bin/sh", "running")
    sandbox.commands.send_stdin(handle.pid, "one ")
    sandbox.commands.send_stdin(handle.command_id, b"two ")
    sandbox.commands.close_stdin(handle.pid)
    heard: list[str] = []
    assert sandbox.commands.connect(handle.pid).wait(on_stdout=heard.append).exit_code == 0
    assert "".join(heard) == "one two done\n"
    assert sandbox.commands.connect(handle.command_id).wait().stdout == "one two done\n"
    for absent in (1 << 22, "0" * 12):
        with pytest.raises(NotFoundException):
            sandbox.commands.connect(absent)
        assert sandbox.commands.kill(absent) is False


def test_a_killed_command_is_gone(sandbox: Any) -> None:
    """By its handle and by its pid; a second time there is nothing to kill."""
    first = sandbox.commands.run(FOREVER, background=True)
    assert first.kill() is True
    with pytest.raises(CommandExitException) as raised:
        first.wait()
    assert (raised.value.exit_code, raised.value.error) == (137, "killed")
    second = sandbox.commands.run(FOREVER, background=True)
    assert sandbox.commands.kill(second.pid) is True


def test_a_handle_takes_up_where_it_was_disconnected(sandbox: Any) -> None:
    """Nothing is lost, nothing comes twice."""
    handle = sandbox.commands.run("echo one; read x; echo two", background=True, stdin=True)
    for portion in handle:
        assert portion == ("one\n", None, None)
        handle.disconnect()
    handle.send_stdin("\n")
    said: list[str] = []
    assert handle.wait(on_stdout=said.append).stdout == "one\ntwo\n"
    assert "".join(said) == "two\n"


def test_a_terminal_is_made_resized_and_reached_again(sandbox: Any) -> None:
    """It is the daemon's: one client's end is not its end."""
    shown: list[bytes] = []
    handle = sandbox.pty.create(PtySize(rows=11, cols=22), shown.append, envs={"PS1": ""})
    sandbox.pty.resize(handle.pid, PtySize(rows=33, cols=44))
    sandbox.pty.send_stdin(handle.pid, b"tty; stty size\n")
    again = sandbox.pty.connect(handle.command_id)
    seen = b""
    for _, _, data in again:
        seen += data
        if b"33 44" in seen:
            break
    again.send_stdin("exit 0\n")
    assert handle.wait().exit_code == 0
    assert b"/dev/pts/" in b"".join(shown)
    doomed = sandbox.pty.create(PtySize(rows=1, cols=1), cmd=["sleep", "1000"])
    assert sandbox.pty.kill(doomed.pid) is True


def test_threads_share_a_sandbox(box: dict[str, Any]) -> None:
    """Each call has its own connection."""
    sandbox = Sandbox.connect(box["id"])
    results: dict[int, str] = {}

    def run(number: int) -> None:
        results[number] = sandbox.commands.run(f"echo {number}").stdout

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n" for number in range(8)}


def test_cancelling_a_run_kills_the_command(box: dict[str, Any]) -> None:
    """An agent that gives up leaves nothing running."""

    async def main() -> None:
        sandbox = await AsyncSandbox.connect(box["id"])
        said = anyio.Event()

        async def hear(text: str) -> None:
            assert text == "begun\n"
            said.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: sandbox.commands.run(f"echo begun; {FOREVER}", on_stdout=hear))
            await said.wait()
            tasks.cancel_scope.cancel()

    anyio.run(main)
    sandbox = Sandbox.connect(box["id"])
    wait_until(
        lambda: not [row for row in sandbox.commands.list() if row.state == "running" and "begun" in row.args[-1]],
        "the command is gone",
    )
