"""``Sandbox`` and ``AsyncSandbox`` against a daemon without engines: what they import, send, and make of errors."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from sandboxd import client as package
from sandboxd.client import (
    AsyncSandbox,
    AuthenticationException,
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    NotFoundException,
    RateLimitException,
    RpcError,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxPaginator,
    SandboxQuery,
    TimeoutException,
)
from sandboxd.client.errors import exception_from
from sandboxd.client.following import Following
from sandboxd.client.model import CreateOptions, create_params
from sandboxd.failures import FAILURES, Failure, NoSuchFile, NoSuchSandbox, NotFound
from tests.daemon.sandboxctl import PATIENCE_S, STUB, Ctl, environment, stub_daemon
from tests.twins import Twin


@pytest.fixture(params=["blocking", "async"])
def client(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``Sandbox``, or what does the same over ``AsyncSandbox``; both reach a stub."""
    with stub_daemon(tmp_path) as env, asyncio.Runner() as runner:
        monkeypatch.setenv("SANDBOXD_SOCKET", env["SANDBOXD_SOCKET"])
        yield Sandbox if request.param == "blocking" else Twin(AsyncSandbox, runner)


def test_options_reach_the_daemon(client: Any, tmp_path: Path) -> None:
    """By the names that agent code knows, and by ours."""
    box = client.create(
        "recipe",
        {"task": "1"},
        {"A": "b"},
        image="image",
        launch="wait",
        wait=5,
        engine="docker",
        name="box",
        workspace=tmp_path,
        read_only=True,
        allow_internet_access=True,
        memory="512m",
        limits_policy="degraded",
    )
    info = box.get_info()
    assert (info.template_id, info.image, info.metadata, info.envs) == ("recipe", "image", {"task": "1"}, {"A": "b"})
    assert (info.engine, info.name, info.workspace, info.network) == ("docker", "box", str(tmp_path), "full")
    assert info.limits[0].verified
    assert info.launch == "warm"
    [row] = client.list(SandboxQuery(metadata={"task": "1"}))
    assert (row.name, row.template_id, row.image) == ("box", "recipe", "image")
    assert client.list(SandboxQuery(metadata={"task": "2"})) == []
    assert client.connect("box").sandbox_id == box.sandbox_id
    [provoked] = box.verify(provoke=True).provocations
    assert provoked.held


@pytest.mark.parametrize(
    "options",
    [
        {"read_only": True},
        {"network": "none", "allow_internet_access": True},
        {"memory": "banana"},
        {"allow": "pypi"},
        {"secrets": "token"},
    ],
)
def test_options_that_cannot_be_meant_are_refused(client: Any, options: dict[str, Any]) -> None:
    """Here or by the daemon, it is the same exception."""
    with pytest.raises(InvalidArgumentException):
        client.create(**options)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"readonly": True}, "did you mean read_only?"),
        ({"time_out": 1}, "did you mean timeout?"),
        ({"mem": "64m"}, "did you mean memory?"),
        ({"api_key": "x"}, "one of allow "),
    ],
)
def test_an_option_that_nobody_reads_is_refused_with_the_one_that_was_meant(
    client: Any, option: dict[str, Any], hint: str
) -> None:
    """A limit that is misspelt would be no limit, and a workspace that was to be read-only could be written to."""
    [name] = option
    with pytest.raises(InvalidArgumentException, match=f"^unknown option '{name}'") as refused:
        client.create(**option)
    assert refused.value.hint.startswith(hint)


def test_an_update_of_an_unknown_limit_is_refused(client: Any) -> None:
    """It would change nothing, and say that all is well."""
    box = client.create()
    with pytest.raises(InvalidArgumentException) as refused:
        box.update(mem="64m")
    assert (refused.value.brief, refused.value.hint) == ("unknown option 'mem'", "did you mean memory?")
    with pytest.raises(InvalidArgumentException):
        box.update(name="x")


def test_rules_services_and_secrets_are_lists_of_the_request() -> None:
    rule = "api.example.com X: {token}"
    options: CreateOptions = {"allow": ("pypi",), "inject": (rule,), "services": ["chroma=private"], "secrets": []}
    assert create_params(None, None, None, options) == {
        "allow": ["pypi"],
        "inject": [rule],
        "services": ["chroma=private"],
        "secrets": [],
        "limits": {},
    }


def test_a_sandbox_that_is_not_there_is_not_found(client: Any) -> None:
    """To kill it is no error: it is gone, as was wished."""
    with pytest.raises(SandboxNotFoundException, match="cannot find 'absent'") as raised:
        client.connect("absent")
    assert (raised.value.type, raised.value.hint) == ("not_found", "sandboxctl ls")
    assert client.kill("absent") is False


def test_a_list_is_one_page_for_code_that_turns_pages() -> None:
    """As it is for other clients; and still a list."""
    pages = SandboxPaginator(["first", "second"])  # type: ignore[list-item]
    assert pages == ["first", "second"]
    assert (pages.has_next, pages.next_items(), pages.has_next) == (True, ["first", "second"], False)
    assert pages.next_items() == []


def test_an_awaited_list_is_one_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the pages are made without ``await``, and each is awaited."""

    async def turn_pages() -> None:
        await AsyncSandbox.create(name="box", metadata={"task": "1"})
        pages = AsyncSandbox.list(SandboxQuery(metadata={"task": "1"}))
        assert pages.has_next
        [row] = await pages.next_items()
        assert (row.name, row.metadata) == ("box", {"task": "1"})
        assert not pages.has_next
        assert await pages.next_items() == []
        assert await AsyncSandbox.list() == [row]

    with stub_daemon(tmp_path) as env:
        monkeypatch.setenv("SANDBOXD_SOCKET", env["SANDBOXD_SOCKET"])
        asyncio.run(turn_pages())


def test_a_request_that_takes_too_long_is_a_timeout(client: Any) -> None:
    """As far as its caller is concerned."""
    with pytest.raises(TimeoutException):
        client.create(image="slow", request_timeout=0.05)


def test_a_block_kills_its_sandbox_whatever_happens_in_it(client: Any) -> None:
    """A failing test run leaves none behind."""
    with pytest.raises(ZeroDivisionError), client.create(name="box"):
        raise ZeroDivisionError
    assert client.list() == []


def test_other_failures_keep_their_type_and_hint(client: Any) -> None:
    """What has no class of its own is told apart by its type."""
    with pytest.raises(SandboxException, match="cannot reach podman") as raised:
        client.create(image="no-engine")
    assert type(raised.value) is SandboxException
    assert (raised.value.type, raised.value.detail) == ("engine_unavailable", "no socket")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("timeout", TimeoutException),
        ("not_found", NotFoundException),
        ("sandbox_gone", SandboxNotFoundException),
        ("invalid_argument", InvalidArgumentException),
        ("limit_not_enforceable", InvalidArgumentException),
        ("unsupported", InvalidArgumentException),
        ("unauthorized", AuthenticationException),
        ("capacity_exceeded", RateLimitException),
        ("conflict", SandboxException),
        ("disconnected", SandboxException),
    ],
)
def test_each_type_of_error_is_one_exception(kind: str, expected: type[SandboxException]) -> None:
    """Agent code catches classes."""
    error = exception_from(RpcError(1, kind, "cannot", "because", "do"))
    assert type(error) is expected
    assert str(error) == "cannot: because (hint: do)"
    assert kind in {failure.type for failure in FAILURES} | {"disconnected"}


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(NoSuchSandbox, SandboxNotFoundException), (NoSuchFile, FileNotFoundException), (NotFound, NotFoundException)],
)
def test_what_was_not_found_is_told_apart_by_its_code(
    failure: type[Failure], expected: type[SandboxException]
) -> None:
    """A file that is missing is another matter than a sandbox that is; both are not found."""
    error = exception_from(RpcError(failure.code, failure.type, "cannot find it"))
    assert type(error) is expected
    assert isinstance(error, NotFoundException)


def told(stream: str, data: str, offset: int, dropped_bytes: int = 0) -> dict[str, Any]:
    params = {"stream": stream, "data": data, "offset": offset, "dropped_bytes": dropped_bytes}
    return {"method": "commands/output", "params": params}


def test_characters_are_made_of_portions_but_not_across_a_gap() -> None:
    """Half a character before what was dropped has nothing to do with the half after it."""
    following = Following()
    following.take(told("stdout", "YcM=", 0))
    following.take(told("stdout", "qWI=", 2))
    following.take(told("stdout", "wyg=", 4))
    following.take(told("stdout", "w6k=", 1000, dropped_bytes=994))
    assert [chunk.text for chunk in following.chunks] == ["a", "éb", "\ufffd(", "é"]
    assert following.connect_params() == {"stdout_offset": 1002}


def test_an_end_by_a_signal_is_an_exit_code_and_a_reason() -> None:
    """128 and its number, as a shell has it; the reason says what the number cannot."""
    following = Following()
    end = {"exit_code": None, "signal": 9, "status": "oom", "oom_kills": 1, "wall_ms": 1.0, "truncated": False}
    counts = {"stdout_bytes": 10, "stderr_bytes": None}
    following.take({"id": 0, "result": {**end, **counts, "cpu_ms": 1.0, "memory_bytes_peak": None}})
    with pytest.raises(CommandExitException, match="out of memory") as raised:
        following.result()
    assert (raised.value.exit_code, raised.value.error) == (137, "out of memory")
    result = raised.value.result
    assert (result.status, result.oom_kills, result.cpu_ms, result.wall_ms) == ("oom", 1, 1.0, 1.0)
    assert (result.stdout_bytes_total, result.stderr_bytes_total, result.truncated) == (10, None, False)


START = """
import os, sys, threading, warnings
warnings.simplefilter("error")
from sandboxd.client import AsyncSandbox, Sandbox, starting
import anyio
starting.COMMAND = (sys.executable, {stub!r})
done = threading.Event()
threading.Thread(target=done.wait).start()
print({call})
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no children")
done.set()
"""


@pytest.mark.parametrize("call", ["Sandbox.list()", "anyio.run(AsyncSandbox.list)"])
def test_the_daemon_is_started_on_demand_and_is_nobodys_child(tmp_path: Path, call: str) -> None:
    """From a program with threads, too; and one that lives long does not have to reap it."""
    env = environment(tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", START.format(stub=str(STUB), call=call)],
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("[]\nno children\n", "")
    finally:
        Ctl(env)("daemon", "stop")


def test_a_cancelled_request_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon hears of it by the end of the connection, and goes on serving."""

    async def main() -> None:
        with anyio.move_on_after(0.05) as scope:
            await AsyncSandbox.create(image="slow")
        assert scope.cancelled_caught
        assert await AsyncSandbox.list() == []

    with stub_daemon(tmp_path) as env:
        monkeypatch.setenv("SANDBOXD_SOCKET", env["SANDBOXD_SOCKET"])
        anyio.run(main)


def test_all_names_are_there_and_no_others() -> None:
    """They are loaded when they are named."""
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="absent"):
        _ = package.absent


def test_importing_sandbox_imports_neither_engines_nor_the_daemon() -> None:
    """An agent pays for what it uses: no wire structs, no async framework."""
    script = "import sys; from sandboxd.client import Sandbox; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"runtimes", "images", "msgspec", "anyio", "asyncio", "subprocess", "psutil", "python_on_whales", "json"}
    assert not heavy & set(loaded)
    ours = {name for name in loaded if name.startswith("sandboxd.") and not name.startswith("sandboxd.client")}
    assert ours == {"sandboxd.framing", "sandboxd.jsontext", "sandboxd.paths"}
