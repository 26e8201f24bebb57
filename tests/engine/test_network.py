"""What leads out of a sandbox: nothing, unless it was asked for, and then only what the rules say, on each engine."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import ENGINES, PATIENCE_S, Daemon, running, serving, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    """The port of a server on the host's loopback."""
    with serving() as port:
        yield port


def fetched(daemon: Daemon, box: dict[str, Any], url: str) -> str:
    """What a tool that knows of proxies gets, with what it says of errors."""
    return daemon.sh(box, f"busybox wget -q -O - {url} 2>&1 || true")


def test_what_a_rule_grants_comes_through_the_proxy_and_is_counted(daemon: Daemon, engine: str, page: int) -> None:
    with daemon.box(engine, allow=[f"127.0.0.1:{page}"]) as box:
        assert box["network"] == "allow"
        # Not by no_proxy: the page is on the host's loopback, not on the sandbox's.
        assert daemon.sh(box, f"no_proxy= busybox wget -q -O - http://127.0.0.1:{page}/") == "hello"
        known = daemon.call("network/get", sandbox=box["id"])
        assert (known["requests"], known["denied"], known["received_bytes"]) == (1, 0, 5)


def test_what_no_rule_grants_is_refused_and_told_with_the_command(daemon: Daemon, engine: str, page: int) -> None:
    with daemon.box(engine, network="allow") as box:
        assert "403" in fetched(daemon, box, "http://evil.example/secret")
        (denied,) = daemon.call("network/get", sandbox=box["id"])["denials"]
        assert (denied["method"], denied["host"], denied["port"]) == ("GET", "evil.example", 80)
        assert denied["command"].split()[1] == "busybox"
        assert len(denied["command"].split()[0]) == 12
        assert "evil.example" in daemon.log.read_text()
        assert "secret" not in daemon.log.read_text()


def test_rules_change_while_it_runs(daemon: Daemon, engine: str, page: int) -> None:
    fetch = f"no_proxy= http_proxy=http://127.0.0.1:3128 busybox wget -q -O - http://127.0.0.1:{page}/ 2>&1 || true"
    with daemon.box(engine) as box:
        assert "refused" in daemon.sh(box, fetch)
        assert daemon.call("network/set", sandbox=box["id"], add_allow=[f"127.0.0.1:{page}"])["mode"] == "allow"
        assert daemon.sh(box, fetch) == "hello"
        daemon.call("network/set", sandbox=box["id"], add_deny=[f"127.0.0.1:{page}"])
        assert "403" in daemon.sh(box, fetch)
        daemon.call("network/set", sandbox=box["id"], mode="none")
        assert "refused" in daemon.sh(box, fetch)


def test_there_is_no_other_way_out(daemon: Daemon, engine: str, page: int) -> None:
    """No interface, no route, no packet, no name server, not the host's loopback, no abstract socket of the host."""
    name = f"\0sandboxd-test-{os.getpid()}"
    with (
        daemon.box(engine, network="allow") as box,
        daemon.box(engine) as other,
        socket.socket(socket.AF_UNIX) as host,
    ):
        host.bind(name)
        host.listen()
        interfaces = daemon.sh(box, "cat /proc/net/dev")
        assert [line.split(":")[0].strip() for line in interfaces.splitlines()[2:]] == ["lo"]
        assert daemon.sh(box, "cat /proc/net/route").splitlines()[1:] == []
        routes = [
            line.split() for line in daemon.sh(box, "cat /proc/net/ipv6_route 2>/dev/null || true").splitlines()
        ]
        assert {fields[-1] for fields in routes} <= {"lo"}
        assert name[1:] not in daemon.sh(box, "cat /proc/net/unix")
        for attempt in (
            f"busybox nc -w 2 127.0.0.1 {page} </dev/null",
            "busybox nc -w 2 192.0.2.1 80 </dev/null",
            "busybox nc -w 2 2001:db8::1 80 </dev/null",
            "busybox nslookup pypi.org 192.0.2.53",
            "busybox ping -c 1 -W 1 192.0.2.1",
            "busybox traceroute -n -w 1 -m 1 192.0.2.1",
        ):
            assert daemon.run(box, "timeout", "10", "sh", "-c", attempt).end["status"] == "nonzero", attempt
        # What was given to one sandbox is on the loopback of that one alone.
        assert daemon.run(other, "sh", "-c", "busybox nc -w 2 127.0.0.1 3128 </dev/null").end["status"] == "nonzero"


def test_a_port_of_the_host_leads_to_what_listens_inside(daemon: Daemon, engine: str, tmp_path: Path) -> None:
    with daemon.box(engine) as box:
        daemon.call("commands/start", sandbox=box["id"], argv=["busybox", "nc", "-ll", "-p", "7000", "-e", "cat"])
        listens = wait_until(
            lambda: daemon.call("ports/list", sandbox=box["id"])["listening"], "something listens inside"
        )
        assert (7000, "tcp") in [(row["port"], row["protocol"]) for row in listens]
        assert daemon.call("sandbox/get", sandbox=box["id"])["network_verified"] is True
        done = daemon.ctl("forward", box["id"], "7000")
        assert done.returncode == 0, done.stderr
        host, _, port = done.stdout.decode().strip().rpartition(":")
        assert host == "127.0.0.1"
        with socket.create_connection(("127.0.0.1", int(port)), timeout=PATIENCE_S) as connection:
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"
        path = tmp_path / "inside.sock"
        assert daemon.ctl("forward", box["id"], f"{path}:7000").returncode == 0
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"
        rows = daemon.call("ports/list", sandbox=box["id"])["forwards"]
        assert [row["port"] for row in rows] == [7000, 7000]
        assert daemon.ctl("forward", box["id"], "--close", rows[1]["forward_id"]).returncode == 0
        assert not path.exists()


def forwards_of(daemon: Daemon, box: dict[str, Any]) -> list[dict[str, Any]]:
    """Without how many connections there are just now."""
    rows = daemon.call("ports/list", sandbox=box["id"])["forwards"]
    return [{field: value for field, value in row.items() if field != "connections"} for row in rows]


def test_forwards_live_through_restarts_of_both_and_are_open_to_nobody_else(
    daemon: Daemon, engine: str, tmp_path: Path
) -> None:
    path = tmp_path / "inside.sock"

    def said() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            try:
                connection.connect(str(path))
                connection.sendall(b"hello")
                return connection.recv(5)
            except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
                return b""

    def listen() -> None:
        daemon.call("commands/start", sandbox=box["id"], argv=["busybox", "nc", "-ll", "-p", "7000", "-e", "cat"])
        wait_until(lambda: said() == b"hello", "it answers through the forward")

    with daemon.box(engine) as box:
        made = daemon.call("ports/forward", sandbox=box["id"], port=7000)
        assert made["address"] == "127.0.0.1"
        daemon.call("ports/forward", sandbox=box["id"], port=7000, path=str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", made["host_port"]), timeout=PATIENCE_S)
        listen()
        rows = forwards_of(daemon, box)
        daemon.kill()
        daemon.start()
        assert wait_until(said, "the forward is there again") == b"hello"
        assert forwards_of(daemon, box) == rows
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        wait_until(lambda: not path.exists(), "the socket is gone with what it led to")
        daemon.call("sandbox/start", sandbox=box["id"])
        listen()
    wait_until(lambda: not path.exists(), "the socket is gone with its sandbox")


def slots_of(daemon: Daemon) -> int:
    return sum(row["warm"] + row["filling"] for row in daemon.call("pool/list")["pools"])


def test_a_warm_sandbox_is_claimed_with_its_way_out(daemon: Daemon, page: int, tmp_path: Path) -> None:
    """A slot has nothing on its loopback; what is asked for comes with the claim, without an engine call."""
    with running(Daemon(tmp_path, env={"SANDBOXD_POOL_MAX": "1"})) as own:
        own.remove(own.call("sandbox/create"))  # from now on there is a pool
        own.call("pool/warm")
        box = own.call("sandbox/create", launch="warm", allow=[f"127.0.0.1:{page}"])
        assert (box["launch"], box["network"]) == ("warm", "allow")
        assert own.sh(box, f"no_proxy= busybox wget -q -O - http://127.0.0.1:{page}/") == "hello"
        own.call("pool/drain")
        wait_until(lambda: slots_of(own) == 0, "no slot is there, nor under way")
        wait_until(lambda: sum(len(own.containers(name)) for name in ENGINES) == 1, "the slots are gone")


def test_a_daemon_that_was_killed_finds_its_doors_again(daemon: Daemon, engine: str, page: int) -> None:
    with daemon.box(engine, allow=[f"127.0.0.1:{page}"]) as box:
        daemon.kill()
        daemon.start()
        fetch = f"no_proxy= busybox wget -q -O - http://127.0.0.1:{page}/ || true"
        assert wait_until(lambda: daemon.sh(box, fetch), "the proxy is there again") == "hello"


def test_a_sandbox_that_is_stopped_and_started_has_its_doors(daemon: Daemon, engine: str, page: int) -> None:
    with daemon.box(engine, allow=[f"127.0.0.1:{page}"]) as box:
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        daemon.call("sandbox/start", sandbox=box["id"])
        assert daemon.sh(box, f"no_proxy= busybox wget -q -O - http://127.0.0.1:{page}/") == "hello"
