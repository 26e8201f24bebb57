"""Detection with fake engines on the PATH, and real sockets."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtimes import detect
from runtimes.model import EngineInfo, EngineName
from runtimes.suitability import SocketState

pytestmark = pytest.mark.anyio

PODMAN_INFO = (
    '{"host": {"security": {"rootless": false}, "cgroupManager": "cgroupfs", "cgroupControllers": ["memory"],'
    ' "ociRuntime": {"name": "runc"}}, "store": {"graphDriverName": "overlay"}, "version": {"Version": "5.4.2"}}'
)
DOCKER_INFO = '{"ServerVersion": "28.0", "MemoryLimit": true, "ClientInfo": {"Version": "28.1"}}'

Install = Callable[[str, str], None]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sleep", "cat", "sh"):
        (folder / name).symlink_to(f"/bin/{name}")
    return folder


@pytest.fixture
def install(bin_dir: Path) -> Install:
    def write(name: str, body: str) -> None:
        path = bin_dir / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[str]:
    """A Unix socket that somebody listens on."""
    path = str(tmp_path / "listening.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        yield path


async def look(bin_dir: Path, **env: str) -> tuple[EngineInfo, EngineInfo]:
    podman, docker = await detect.detect_all({"PATH": str(bin_dir), **env})
    assert (podman.name, docker.name) == (EngineName.PODMAN, EngineName.DOCKER)
    return podman, docker


async def test_a_host_without_engines_says_so(bin_dir: Path) -> None:
    podman, docker = await look(bin_dir)
    assert (podman.usable, docker.usable) == (False, False)
    assert "not installed" in podman.reason
    assert podman.hint
    assert docker.hint


async def test_both_engines_are_found(bin_dir: Path, install: Install, listening: str) -> None:
    install("podman", f"cat <<'X'\n{PODMAN_INFO}\nX")
    install("docker", f"cat <<'X'\n{DOCKER_INFO}\nX")
    podman, docker = await look(bin_dir, DOCKER_HOST=f"unix://{listening}")
    assert (podman.usable, podman.server_version) == (True, "5.4.2")
    assert (docker.usable, docker.server_version, docker.client_version) == (True, "28.0", "28.1")
    assert docker.socket_path == listening
    assert podman.nofile_hard_max


CHOOSING = {
    "config.json": '{"auths": {}, "currentContext": "elsewhere"}',
    "config.json in small letters": '{"currentContext": "default", "auths": {}, "currentcontext": "elsewhere"}',
    "unreadable config.json": '{"auths": {}, "currentContext": "elsewhere"',
}


@pytest.mark.parametrize("chosen_by", [*CHOOSING, "DOCKER_CONTEXT"])
async def test_a_docker_context_leads_to_the_socket(
    bin_dir: Path, install: Install, listening: str, tmp_path: Path, chosen_by: str
) -> None:
    """And a file that we cannot read, the client may. It takes keys in any case."""
    install("docker", f"case \"$1\" in context) echo unix://{listening};; *) cat <<'X'\n{DOCKER_INFO}\nX\n;; esac")
    env = {"DOCKER_CONFIG": str(tmp_path)}
    if chosen_by == "DOCKER_CONTEXT":
        env[chosen_by] = "elsewhere"
    else:
        (tmp_path / "config.json").write_text(CHOOSING[chosen_by])
    _, docker = await look(bin_dir, **env)
    assert (docker.usable, docker.socket_path) == (True, listening)


@pytest.fixture
def fed(tmp_path: Path) -> Iterator[Path]:
    """A FIFO out of which comes, once somebody opens it, that no context is chosen."""
    fifo = tmp_path / "config.json"
    os.mkfifo(fifo)
    with subprocess.Popen(["/bin/sh", "-c", 'echo "{}" > "$0"', str(fifo)]) as writer:
        yield fifo
        writer.kill()


async def test_docker_settings_that_are_no_file_are_left_to_the_client_and_nobody_waits_for_their_writer(
    bin_dir: Path, install: Install, listening: str, fed: Path
) -> None:
    """A daemon that waits for what comes out of a FIFO may never start."""
    install("docker", f"case \"$1\" in context) echo unix://{listening};; *) cat <<'X'\n{DOCKER_INFO}\nX\n;; esac")
    _, docker = await look(bin_dir, DOCKER_CONFIG=str(fed.parent))
    assert (docker.usable, docker.socket_path) == (True, listening)


@pytest.mark.parametrize("text", [None, '{"auths": {}}', '{"currentContext": "default"}', '{"currentContext": ""}'])
async def test_where_nobody_has_chosen_a_context_no_client_is_asked_for_its_socket(
    bin_dir: Path, install: Install, listening: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """A start waits for one client less."""
    monkeypatch.setattr(detect, "DOCKER_SOCKET", listening)
    install("docker", f"[ \"$1\" != context ] || : > {tmp_path}/asked; cat <<'X'\n{DOCKER_INFO}\nX")
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    _, docker = await look(bin_dir, HOME="/nowhere", DOCKER_CONFIG=str(tmp_path))
    assert (docker.usable, docker.socket_path) == (True, listening)
    assert not (tmp_path / "asked").exists()


async def test_a_closed_socket_still_tells_the_clients_version(
    bin_dir: Path, install: Install, tmp_path: Path
) -> None:
    install("docker", 'echo \'{"ServerVersion": "", "ClientInfo": {"Version": "28.1"}}\'; echo no >&2; exit 1')
    _, docker = await look(bin_dir, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert (docker.usable, docker.client_version) == (False, "28.1")


@pytest.mark.parametrize("body", ["echo nonsense", "exit 3", "echo broken >&2; exit 125", "kill -9 $$"])
async def test_an_engine_that_answers_nonsense_is_unusable_and_hides_no_other(
    bin_dir: Path, install: Install, listening: str, body: str
) -> None:
    install("podman", body)
    install("docker", f"cat <<'X'\n{DOCKER_INFO}\nX")
    podman, docker = await look(bin_dir, DOCKER_HOST=f"unix://{listening}")
    assert (podman.usable, docker.usable) == (False, True)
    assert podman.reason


async def test_an_engine_that_hangs_is_given_up_in_time(
    bin_dir: Path, install: Install, listening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "INFO_S_MAX", 0.3)
    install("podman", "sleep 600")
    install("docker", "sleep 600")
    started = time.monotonic()
    podman, docker = await look(bin_dir, DOCKER_HOST=f"unix://{listening}")
    assert time.monotonic() - started < 3
    assert not podman.usable
    assert not docker.usable
    assert "cannot wait longer" in podman.reason


async def test_a_rootless_docker_is_found_in_the_runtime_folder(
    bin_dir: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "DOCKER_SOCKET", str(tmp_path / "none.sock"))
    install("docker", f"case \"$1\" in context) exit 1;; *) cat <<'X'\n{DOCKER_INFO}\nX\n;; esac")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "docker.sock"))
        server.listen()
        _, docker = await look(bin_dir, XDG_RUNTIME_DIR=str(tmp_path))
    assert docker.socket_path == str(tmp_path / "docker.sock")


def test_a_door_is_open_dead_or_missing(listening: str, tmp_path: Path) -> None:
    assert detect.connect(f"unix://{listening}") is SocketState.OPEN
    assert detect.connect(f"unix://{tmp_path}/none") is SocketState.MISSING
    assert detect.connect("tcp://127.0.0.1:1") is SocketState.REMOTE
    dead = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(dead)
    assert detect.connect(f"unix://{dead}") is SocketState.DEAD
    assert detect.connect(f"unix:///{'x' * 200}") is SocketState.MISSING


def test_facts_of_this_host_can_be_gathered_with_an_empty_environment() -> None:
    facts = detect.host_facts({})
    assert facts.uid == os.getuid()
    assert facts.runtime_dir is None
