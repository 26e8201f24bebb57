"""Modes change while a sandbox runs, on each engine: what the kernel shows of its network, and what gets through."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, running, serving, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def address() -> str:
    """An address of this host that is not its loopback: Docker's bridge has one on every host."""
    addresses = [entry.address for entry in psutil.net_if_addrs()["docker0"] if entry.family == socket.AF_INET]
    return addresses[0]


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[str]:
    with serving(address) as port:
        yield f"http://{address}:{port}/"


def switch(daemon: Daemon, box: dict[str, Any], mode: str) -> dict[str, Any]:
    """Change the mode, and what is said of it, after it was compared with what /proc shows on the host."""
    known = daemon.call("network/set", sandbox=box["id"], mode=mode)
    return seen(daemon, box, known, mode)


def seen(daemon: Daemon, box: dict[str, Any], known: dict[str, Any], mode: str) -> dict[str, Any]:
    assert (known["mode"], known["verified"], known["problems"]) == (mode, True, [])
    pid = daemon.call("sandbox/get", sandbox=box["id"])["pid"]
    names = {line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]}
    assert names == {"lo", *(each["name"] for each in known["interfaces"])}
    assert (len(names) > 1) is (mode == "full")
    routes = Path(f"/proc/{pid}/net/route").read_text().splitlines()[1:]
    assert any(route.split()[1] == "00000000" for route in routes) is (mode == "full")
    return known


def fetched(daemon: Daemon, box: dict[str, Any], url: str) -> str:
    """What can be reached of this page, past any proxy."""
    return daemon.sh(box, f"no_proxy='*' http_proxy= timeout 5 busybox wget -q -O - {url} 2>&1 || true")


def helpers(daemon: Daemon) -> set[int]:
    """What speaks for sandboxes of this daemon."""
    prefix = f"slirp4netns-{daemon.owner}-"
    return {
        each.pid for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [""])[0].startswith(prefix)
    }


def slots_of(daemon: Daemon) -> int:
    return sum(row["warm"] + row["filling"] for row in daemon.call("pool/list")["pools"])


def test_full_is_opened_and_closed_while_it_runs(daemon: Daemon, engine: str, page: str) -> None:
    with daemon.box(engine) as box:
        seen(daemon, box, daemon.call("network/get", sandbox=box["id"]), "none")
        assert fetched(daemon, box, page) != "hello"
        switch(daemon, box, "full")
        assert fetched(daemon, box, page) == "hello"
        assert "nameserver" in daemon.sh(box, "cat /etc/resolv.conf")
        # The same again is no error, and nothing happens twice.
        switch(daemon, box, "full")
        assert fetched(daemon, box, page) == "hello"
        switch(daemon, box, "allow")
        assert fetched(daemon, box, page) != "hello"
        assert "403" in daemon.sh(box, f"busybox wget -q -O - {page} 2>&1 || true")
        switch(daemon, box, "full")
        switch(daemon, box, "none")
        assert fetched(daemon, box, page) != "hello"


def test_what_was_made_full_is_closed_and_opened_again(daemon: Daemon, engine: str, page: str) -> None:
    with daemon.box(engine, network="full") as box:
        seen(daemon, box, daemon.call("network/get", sandbox=box["id"]), "full")
        assert fetched(daemon, box, page) == "hello"
        switch(daemon, box, "none")
        assert fetched(daemon, box, page) != "hello"
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        daemon.call("sandbox/start", sandbox=box["id"])
        seen(daemon, box, daemon.call("network/get", sandbox=box["id"]), "none")
        switch(daemon, box, "full")
        assert fetched(daemon, box, page) == "hello"


def test_a_connection_that_is_open_is_cut(daemon: Daemon, engine: str, address: str) -> None:
    """Closing is no promise for later connections alone: nothing more arrives of one that is there."""
    with socket.create_server((address, 0)) as server, daemon.box(engine) as box:
        switch(daemon, box, "full")
        server.settimeout(PATIENCE_S)
        script = f"while echo tick; do usleep 20000; done | busybox nc {address} {server.getsockname()[1]}"
        daemon.call("commands/start", sandbox=box["id"], argv=["sh", "-c", script])
        connection, _ = server.accept()
        with connection:
            assert connection.recv(4096).startswith(b"tick")
            switch(daemon, box, "none")
            # What is on the way still may be; then there is silence, or the end.
            connection.settimeout(0.5)
            total = 0
            try:
                while data := connection.recv(4096):
                    total += len(data)
                    assert total < 4096, "the connection goes on"
            except TimeoutError:
                pass


def test_full_lives_through_stop_and_start_and_the_daemons_death(daemon: Daemon, engine: str, page: str) -> None:
    with daemon.box(engine) as box:
        switch(daemon, box, "full")
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        daemon.call("sandbox/start", sandbox=box["id"])
        seen(daemon, box, daemon.call("network/get", sandbox=box["id"]), "full")
        assert fetched(daemon, box, page) == "hello"
        counted = helpers(daemon)
        daemon.kill()
        daemon.start()
        seen(daemon, box, daemon.call("network/get", sandbox=box["id"]), "full")
        assert fetched(daemon, box, page) == "hello"
        # It was found again, not made again.
        assert helpers(daemon) == counted
        switch(daemon, box, "none")
        assert fetched(daemon, box, page) != "hello"
    wait_until(lambda: not counted & helpers(daemon), "what spoke for it is gone")


def test_what_speaks_for_a_podman_sandbox_is_started_again_when_it_is_killed(daemon: Daemon, page: str) -> None:
    before = helpers(daemon)
    with daemon.box("podman") as box:
        switch(daemon, box, "full")
        (helper,) = helpers(daemon) - before
        os.kill(helper, signal.SIGKILL)
        # The interface of the one that was killed may be there for another moment.
        wait_until(lambda: helpers(daemon) - before - {helper}, "another one has come")
        wait_until(lambda: daemon.call("network/get", sandbox=box["id"])["verified"], "it has its network again")
        assert fetched(daemon, box, page) == "hello"
        assert helper not in helpers(daemon)
        # Nor does it outlive its sandbox.
        daemon.call("sandbox/stop", sandbox=box["id"], grace=0)
        wait_until(lambda: helpers(daemon) <= before, "what spoke for it is gone")


def test_a_warm_slot_is_claimed_as_full(page: str, engine: str, daemon: Daemon, tmp_path: Path) -> None:
    with running(Daemon(tmp_path, env={"SANDBOXD_POOL_MAX": "1"})) as own:
        own.remove(own.create(engine))
        own.call("pool/warm")
        box = own.create(engine, network="full", launch="wait")
        assert (box["launch"], box["network"]) == ("warm", "full")
        seen(own, box, own.call("network/get", sandbox=box["id"]), "full")
        assert fetched(own, box, page) == "hello"
        own.call("pool/drain")
        wait_until(lambda: slots_of(own) == 0, "no slot is there, nor under way")
        wait_until(lambda: len(own.containers(engine)) == 1, "the slots are gone")
