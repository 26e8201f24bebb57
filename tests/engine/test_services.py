"""A real ChromaDB, by its stock client, on the loopback of sandboxes that have no network.

The client is a process of the host's that has entered a sandbox's network: the images of the tests have no Python.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import PATIENCE_S, Daemon, wait_until

pytestmark = pytest.mark.engine

PYTHON = os.environ.get("SANDBOXD_CHROMA_PYTHON") or sys.executable

CLIENT = """
import sys
import chromadb
from chromadb.config import Settings

client = chromadb.HttpClient(database=sys.argv[1], settings=Settings(anonymized_telemetry=False))
verb, name = sys.argv[2:4]
if verb == "add":
    notes = client.get_or_create_collection(name, embedding_function=None)
    notes.add(ids=[sys.argv[4]], embeddings=[[1.0, 2.0]], documents=[sys.argv[4]])
elif verb == "get":
    print(" ".join(sorted(client.get_collection(name, embedding_function=None).get()["documents"])))
elif verb == "list":
    print(" ".join(sorted(collection.name for collection in client.list_collections())))
"""


@pytest.fixture(scope="module", autouse=True)
def chroma_is_installed() -> None:
    if subprocess.run([PYTHON, "-c", "import chromadb"], capture_output=True, check=False).returncode:
        pytest.fail(f"{PYTHON} has no chromadb: hack/venv --dev, or set SANDBOXD_CHROMA_PYTHON")


def client(box: dict[str, Any], *words: str, database: str = "default_database") -> subprocess.CompletedProcess[str]:
    """The stock client, seen from the network of a sandbox as from inside."""
    return subprocess.run(
        ["nsenter", f"--net=/proc/{box['pid']}/ns/net", PYTHON, "-c", CLIENT, database, *words],
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


def service(daemon: Daemon) -> dict[str, Any]:
    (row,) = (row for row in daemon.call("service/list")["services"] if row["name"] == "chroma")
    found: dict[str, Any] = row
    return found


def test_two_sandboxes_share_what_a_third_reads_and_a_fourth_does_not_see(daemon: Daemon, engine: str) -> None:
    name = f"notes-{engine}"
    with (
        daemon.box(engine, services=["chroma"]) as first,
        daemon.box(engine, services=["chroma=shared"]) as second,
        daemon.box(engine, services=["chroma=shared-ro", "chroma=private"]) as reader,
        daemon.box(engine, services=["chroma=private"]) as private,
    ):
        assert first["network"] == "none"
        said(first, "add", name, "one")
        said(second, "add", name, "two")
        assert said(reader, "get", name) == "one two"
        refused = client(reader, "add", name, "three")
        assert refused.returncode != 0
        assert "can only be read" in refused.stderr
        assert said(reader, "list", "-", database="private") == ""
        assert name not in said(private, "list", "-")
        said(private, "add", "mine", "secret")
        assert "mine" not in said(first, "list", "-")
        assert "busybox" in daemon.sh(private, "busybox | head -n 1").lower()
        assert "heartbeat" in daemon.sh(private, "busybox wget -q -O - http://127.0.0.1:8000/api/v2/heartbeat")


def test_what_was_acknowledged_survives_a_kill_of_chroma_and_one_of_the_daemon(daemon: Daemon, engine: str) -> None:
    name = f"lasting-{engine}"
    with daemon.box(engine, services=["chroma"]) as box:
        said(box, "add", name, "one")
        os.kill(service(daemon)["pid"], signal.SIGKILL)
        assert said(box, "get", name) == "one"
        said(box, "add", name, "two")
        daemon.kill()
        daemon.start()
        wait_until(lambda: client(box, "get", name).returncode == 0, "chroma is there again")
        assert said(box, "get", name) == "one two"


def test_a_copy_is_put_back(daemon: Daemon, engine: str, tmp_path: Any) -> None:
    name = f"copied-{engine}"
    with daemon.box(engine, services=["chroma"]) as box:
        said(box, "add", name, "before")
        daemon.call("service/backup", service="chroma", path=str(tmp_path / "copy.tar"))
        said(box, "add", name, "after")
        daemon.call("service/restore", service="chroma", path=str(tmp_path / "copy.tar"))
        assert said(box, "get", name) == "before"


def test_it_is_not_root_and_says_how_it_is(daemon: Daemon, engine: str) -> None:
    with daemon.box(engine, services=["chroma"]) as box:
        said(box, "list", "-")
        row = service(daemon)
        assert (row["state"], row["reason"], row["network"]) == ("ready", "", "own")
        assert box["id"] in row["sandboxes"]
        status = Path(f"/proc/{row['pid']}/status").read_text()
        assert "\nUid:\t0\t" not in status
        assert daemon.ctl("service", "status", "chroma").returncode == 0


def test_a_port_that_is_taken_inside_is_a_problem_of_that_sandbox_alone(daemon: Daemon, engine: str) -> None:
    with daemon.box(engine) as box:
        daemon.call("commands/start", sandbox=box["id"], argv=["busybox", "nc", "-l", "-p", "8000"])
        wait_until(lambda: ":1F40 " in daemon.sh(box, "cat /proc/net/tcp /proc/net/tcp6"), "nc listens")
        known = daemon.call("network/set", sandbox=box["id"], services=["chroma"])
        assert "127.0.0.1:8000" in known["problems"][0]
        assert known["services"][0]["state"] == "absent"
