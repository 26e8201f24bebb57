"""A sandbox that tries every way out, and servers that try to lead the proxy astray, on each engine."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import uuid
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.daemons import Daemon, serving, wait_until

pytestmark = pytest.mark.engine

TEN_GIBIBYTES = 10 * 2**30
TAKEN_BYTES = 48 * 2**20
RSS_GROWTH_BYTES_MAX = 32 * 2**20
LORISES = 70


IN_A_NETWORK_OF_ITS_OWN = """
import socket, subprocess, sys
program, address, name = sys.argv[1:]
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "address", "add", address + "/32", "dev", "lo"], check=True)
with socket.create_server(("0.0.0.0", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
    abstract.bind("\\0" + name)
    abstract.listen()
    subprocess.run([program, address, str(server.getsockname()[1]), name], check=True)
"""
"""Runs the probe where there is something to be found, and nothing that it sends or changes is the host's."""


def fetched(daemon: Daemon, box: dict[str, Any], url: str) -> str:
    return daemon.sh(box, f"no_proxy= busybox wget -q -O - {url} 2>&1 || true")


def ways_out(lines: str) -> dict[str, str]:
    return dict(line.split() for line in lines.splitlines())


def test_no_way_leads_out_of_a_sandbox_that_is_not_full(
    daemon: Daemon, engine: str, probes: Path, project: Path
) -> None:
    """Sockets of every kind, interfaces and routes, tunnels and namespaces; also after the full network was there.

    The same program finds ways where there are some, or nothing that it says would mean anything.
    """
    addresses = [entry.address for entry in psutil.net_if_addrs()["docker0"] if entry.family == socket.AF_INET]
    name = f"sandboxd-test-{uuid.uuid4().hex}"
    shutil.copy(probes / "ways_out", project)
    with socket.create_server(("0.0.0.0", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        words = (addresses[0], str(server.getsockname()[1]), name)
        control = (sys.executable, "-c", IN_A_NETWORK_OF_ITS_OWN, str(probes / "ways_out"), addresses[0], name)
        done = subprocess.run(["unshare", "--net", *control], capture_output=True, text=True, check=True)
        open_ways = {way for way, result in ways_out(done.stdout).items() if result == "ok"}
        assert {"host_loopback", "host", "host_datagram", "name_server", "abstract", "route"} <= open_ways
        with daemon.box(engine, workspace={"path": str(project)}) as box:
            for mode in ("none", "allow", "full", "none"):
                assert daemon.call("network/set", sandbox=box["id"], mode=mode)["verified"]
                # What is farther than the host would be reached from there.
                near = ["near"] if mode == "full" else []
                found = ways_out(daemon.sh(box, f"/workspace/ways_out {' '.join([*words, *near])}"))
                led_out = {way for way, result in found.items() if result == "ok"}
                if mode == "full":
                    assert "host_datagram" in led_out
                    assert not led_out & {"abstract", "packet", "machine", "interface", "route", "tunnel"}
                else:
                    assert found.keys() == ways_out(done.stdout).keys()
                    assert led_out == set(), (mode, found)


class _Redirecting(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("location", f"http:/{self.path}")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


def test_a_redirect_leads_to_no_place_that_no_rule_names(daemon: Daemon, engine: str) -> None:
    """To metadata, and to a port of the host that nobody granted: the client follows, and is judged again."""
    with (
        serving(page=_Redirecting) as port,
        serving() as secret,
        daemon.box(engine, allow=[f"127.0.0.1:{port}"]) as box,
    ):
        for place in ("169.254.169.254/latest/", f"127.0.0.1:{secret}/"):
            assert "403" in fetched(daemon, box, f"http://127.0.0.1:{port}/{place}")
        known = daemon.call("network/get", sandbox=box["id"])
        assert [(row["host"], row["port"]) for row in known["denials"]] == [
            ("169.254.169.254", 80),
            ("127.0.0.1", secret),
        ]
        assert all(row["command"] is None or "busybox" in row["command"] for row in known["denials"])
        assert known["denials"][0]["command"] is not None


class _Endless(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", str(TEN_GIBIBYTES))
        self.end_headers()
        piece = bytes(2**20)
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


def test_ten_gibibytes_pass_through_without_staying(daemon: Daemon, engine: str) -> None:
    process = psutil.Process(daemon.pid)
    with serving(page=_Endless) as port, daemon.box(engine, allow=[f"127.0.0.1:{port}"]) as box:
        before = process.memory_info().rss
        taken = daemon.sh(
            box,
            f"no_proxy= busybox wget -q -O - http://127.0.0.1:{port}/ 2>/dev/null | head -c {TAKEN_BYTES} | wc -c",
        )
        assert int(taken) == TAKEN_BYTES
        assert process.memory_info().rss - before < RSS_GROWTH_BYTES_MAX
        assert daemon.call("network/get", sandbox=box["id"])["received_bytes"] >= TAKEN_BYTES
        wait_until(
            lambda: daemon.call("network/get", sandbox=box["id"])["connections"] == 0, "the connection was let go"
        )


def test_one_that_drips_into_all_its_places_holds_up_nobody_else(daemon: Daemon, engine: str) -> None:
    """Places are counted by sandbox: who takes all of its own waits alone."""
    drip = "(printf 'GET http://x/ HTTP/1.1\\r\\nA: '; sleep 60) | busybox nc 127.0.0.1 3128"
    with (
        serving() as port,
        daemon.box(engine, network="allow", limits={"pids": 1000}) as loris,
        daemon.box(engine, allow=[f"127.0.0.1:{port}"]) as other,
    ):
        script = f"for i in $(seq {LORISES}); do {drip} & done; wait"
        daemon.call("commands/start", sandbox=loris["id"], argv=["sh", "-c", script])
        wait_until(
            lambda: daemon.call("network/get", sandbox=loris["id"])["connections"] == 64, "all its places are taken"
        )
        assert fetched(daemon, other, f"http://127.0.0.1:{port}/") == "hello"
