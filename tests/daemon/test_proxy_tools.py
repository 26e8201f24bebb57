"""The tools that the documentation names, as they are: with the variables of a sandbox they go through its proxy.

Each asks for something at ``good.example``, which no name server knows; what arrives at the proxy's far end is what
they would say to the real one. A tool that this host has not is left out.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path

import pytest

from sandboxd.network import streams
from sandboxd.network.egress import PROXY_ENV, PROXY_URL
from tests.daemon.proxies import PATIENCE_S, Recorder, door, egressing

pytestmark = pytest.mark.anyio

TLS_HELLO = b"\x16\x03"

TOOLS = {
    "git": ["git", "-c", "http.sslVerify=true", "ls-remote", "https://good.example/repository.git"],
    "pip": [
        *("pip", "download", "--no-deps", "--retries=0", "--timeout=5", "--disable-pip-version-check"),
        *("--index-url=https://good.example/simple", "--dest={directory}", "nothing"),
    ],
    "npm": [
        *("npm", "view", "nothing", "--registry=https://good.example/", "--fetch-retries=0", "--cache={directory}"),
        *("--update-notifier=false",),
    ],
    "apt": ["/usr/lib/apt/apt-helper", "download-file", "http://good.example/Release", "{directory}/Release"],
    "curl": ["curl", "-sS", "--max-time", "10", "https://good.example/"],
    "wget": ["wget", "-q", "-O", "-", "--tries=1", "http://good.example/"],
}
PLAIN = {"apt", "wget"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("tool", TOOLS)
async def test_a_tool_goes_through_the_proxy_by_itself(tool: str, tmp_path: Path) -> None:
    if shutil.which(TOOLS[tool][0]) is None:
        pytest.skip(f"this host has no {tool}")
    heard: list[bytes] = []

    async def listen(accepted: socket.socket) -> None:
        heard.append(await streams.receive(accepted))
        if tool in PLAIN:
            await streams.send(accepted, b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    async with egressing(listen) as proxy:
        own = f"http://127.0.0.1:{proxy.port}"
        env = {name: value.replace(PROXY_URL, own) for name, value in PROXY_ENV.items()}
        words = [word.format(directory=tmp_path) for word in TOOLS[tool]]
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **env},
        )
        said, _ = await asyncio.wait_for(process.communicate(), 3 * PATIENCE_S)
        assert heard, said
        assert set(proxy.outside.looked_up) == {"good.example"}
        assert proxy.ledger.denied == 0
    assert heard[0].startswith(b"GET /" if tool in PLAIN else TLS_HELLO), heard[0]


LOCAL = {
    "curl": ["curl", "-sS", "--max-time", "10", "{url}"],
    "wget": ["wget", "-q", "-O", "-", "--tries=1", "{url}"],
    "python3": ["python3", "-c", "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read())", "{url}"],
}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("tool", LOCAL)
async def test_a_service_on_the_sandboxs_own_loopback_is_not_asked_of_the_proxy(tool: str, host: str) -> None:
    """ChromaDB at 127.0.0.1:8000 is inside; through the proxy the address would be the host's, and refused."""
    if shutil.which(tool) is None:
        pytest.skip(f"this host has no {tool}")
    async with egressing(Recorder()) as proxy, door(Recorder()) as (port, _):
        own = f"http://127.0.0.1:{proxy.port}"
        process = await asyncio.create_subprocess_exec(
            *(word.format(url=f"http://{host}:{port}/") for word in LOCAL[tool]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={
                "PATH": os.environ["PATH"],
                **{name: value.replace(PROXY_URL, own) for name, value in PROXY_ENV.items()},
            },
        )
        said, _ = await asyncio.wait_for(process.communicate(), 3 * PATIENCE_S)
        assert b"hello" in said
        assert proxy.ledger.requests == 0
