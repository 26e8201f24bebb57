"""What a rootless sandbox shares with others and with the host: a way out, ports, secrets, ChromaDB."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.engine.daemons import PATIENCE_S, Daemon, serving, wait_until
from tests.engine.test_services import CLIENT
from tests.stock.bed import POLICY, quick_bed

TOKEN = "canary-of-the-bed"

pytestmark = quick_bed


@contextlib.contextmanager
def box_with(daemon: Daemon, **params: Any) -> Iterator[dict[str, Any]]:
    with daemon.box("podman", limits_policy=POLICY, **params) as box:
        yield box


def test_there_is_one_way_out_and_it_obeys_the_rules(daemon: Daemon) -> None:
    with serving() as port, box_with(daemon, network="allow", allow=[f"127.0.0.1:{port}"]) as box:
        fetch = f"no_proxy= busybox wget -q -O - http://127.0.0.1:{port}/"
        assert daemon.sh(box, fetch) == "hello"
        refused = daemon.run(box, "busybox", "wget", "-O", "-", "http://evil.example/")
        assert b"403" in refused.stderr
        known = daemon.call("network/get", sandbox=box["id"])
        assert (known["mode"], known["denied"]) == ("allow", 1)
        interfaces = daemon.sh(box, "cat /proc/net/dev").splitlines()[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
        direct = daemon.run(box, "sh", "-c", f"busybox nc -w 2 127.0.0.1 {port} </dev/null")
        assert direct.end["status"] == "nonzero", "the host's loopback is not the sandbox's"


def test_a_port_of_the_host_leads_inside(daemon: Daemon, tmp_path: Path) -> None:
    with box_with(daemon) as box:
        daemon.call("commands/start", sandbox=box["id"], argv=["busybox", "nc", "-ll", "-p", "7000", "-e", "cat"])
        wait_until(lambda: daemon.call("ports/list", sandbox=box["id"])["listening"], "something listens inside")
        done = daemon.ctl("forward", box["id"], "7000")
        assert done.returncode == 0, done.stderr
        port = int(done.stdout.decode().strip().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"
        path = tmp_path / "inside.sock"
        assert daemon.ctl("forward", box["id"], f"{path}:7000").returncode == 0
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(path))
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"


def test_a_secret_is_a_file_in_memory_and_nowhere_else(daemon: Daemon) -> None:
    assert daemon.ctl("secret", "set", "token", stdin=TOKEN.encode()).returncode == 0
    try:
        with box_with(daemon, secrets=["token"]) as box:
            assert (
                daemon.sh(box, "cat /run/secrets/token; stat -c %u /run/secrets/token") == f"{TOKEN}{os.getuid()}\n"
            )
            assert daemon.sh(box, "stat -f -c %T /run/secrets") == "tmpfs\n"
            assert TOKEN not in daemon.sh(box, "env; cat /proc/1/environ /proc/1/cmdline | tr '\\0' ' '")
            assert TOKEN not in daemon.client("podman", "inspect", box["container_id"])
            assert TOKEN not in daemon.log.read_text()
    finally:
        assert daemon.ctl("secret", "rm", "token").returncode == 0


def client(box: dict[str, Any], *words: str, database: str = "default_database") -> subprocess.CompletedProcess[str]:
    """The stock client, on the network of a sandbox: the one inside, for its image has no Python."""
    # A sandbox's user namespace is its user's own: no privilege is needed to enter what belongs to it.
    enter = ["nsenter", f"--target={box['pid']}", "--user", "--net", "--preserve-credentials", "--"]
    return subprocess.run(
        [*enter, sys.executable, "-c", CLIENT, database, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )


def said(box: dict[str, Any], *words: str, database: str = "default_database") -> str:
    done = client(box, *words, database=database)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_chromadb_is_shared_as_far_as_each_may(daemon: Daemon) -> None:
    with (
        box_with(daemon, services=["chroma"]) as writer,
        box_with(daemon, services=["chroma=shared-ro", "chroma=private"]) as reader,
    ):
        said(writer, "add", "notes", "one")
        assert said(reader, "get", "notes") == "one"
        refused = client(reader, "add", "notes", "two")
        assert refused.returncode != 0
        assert "can only be read" in refused.stderr
        said(reader, "add", "mine", "secret", database="private")
        assert said(writer, "list", "-") == "notes"


def test_chromadb_answers_and_is_the_users_own(daemon: Daemon) -> None:
    with box_with(daemon, services=["chroma"]) as box:
        heartbeat = "http://127.0.0.1:8000/api/v2/heartbeat"
        assert "heartbeat" in daemon.sh(box, f"busybox wget -q -O - {heartbeat}")
        (row,) = (row for row in daemon.call("service/list")["services"] if row["name"] == "chroma")
        assert (row["state"], row["reason"]) == ("ready", "")
        assert Path(f"/proc/{row['pid']}").stat().st_uid == os.getuid()
