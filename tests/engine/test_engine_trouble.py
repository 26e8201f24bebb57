"""Engines that do not answer, or are not there: an error in time, a hint, and the other one goes on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.daemons import Daemon, running

pytestmark = pytest.mark.engine


@contextmanager
def other(daemon: Daemon, directory: Path, **env: str) -> Iterator[Daemon]:
    """A daemon in another environment, whose sandboxes are removed with the engines that there are."""
    with running(Daemon(directory / "other", env=env), engines=()) as other:
        yield other
    assert other.boxes_left() == []
    assert other.mounts() == []
    owner = other.owner
    for engine in ("podman", "docker"):
        assert daemon.client(engine, "ps", "-aq", f"--filter=label=io.sandboxd.owner={owner}") == ""


def assert_docker_is_refused_and_podman_works(other: Daemon) -> None:
    refusal = other.refusal("sandbox/create", engine="docker")
    assert refusal.type == "engine_unavailable"
    assert refusal.hint
    done = other.ctl("create", "--engine", "docker")
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"hint: " in done.stderr
    with other.box("podman") as box:
        assert other.sh(box, "echo works") == "works\n"
    with other.connect() as connection:
        chosen = connection.call("sandbox/create", {"ephemeral": True})
        assert chosen["engine"] == "podman", "the one that works is the one that is taken"


def test_an_engine_that_hangs_is_unavailable_and_holds_nobody_up(daemon: Daemon, tmp_path: Path) -> None:
    """Its socket takes connections and says nothing, as that of a daemon whose disk is stuck."""
    address = str(tmp_path / "hung.sock")
    with socket.socket(socket.AF_UNIX) as hung:
        hung.bind(address)
        hung.listen()
        with other(daemon, tmp_path, DOCKER_HOST=f"unix://{address}") as half:
            (docker,) = (row for row in half.call("daemon/info")["engines"] if row["name"] == "docker")
            assert docker["usable"] is False
            assert "in time" in docker["reason"] or "does not answer" in docker["reason"]
            assert half.refusal("sandbox/create", engine="docker").type == "engine_unavailable"
            with half.box("podman") as box:
                assert half.sh(box, "echo works") == "works\n"


def test_an_engine_whose_socket_is_dead_is_unavailable(daemon: Daemon, tmp_path: Path) -> None:
    address = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address)
    with other(daemon, tmp_path, DOCKER_HOST=f"unix://{address}") as half:
        assert_docker_is_refused_and_podman_works(half)


def test_a_client_that_is_no_engine_is_unavailable(daemon: Daemon, tmp_path: Path) -> None:
    """A broken installation: the program is there and fails."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "docker").write_text("#!/bin/sh\necho 'docker: this cannot work' >&2\nexit 1\n")
    (fake / "docker").chmod(0o755)
    with other(daemon, tmp_path, PATH=f"{fake}:{daemon.env['PATH']}") as half:
        assert_docker_is_refused_and_podman_works(half)
        (docker,) = (row for row in half.call("daemon/info")["engines"] if row["name"] == "docker")
        assert "this cannot work" in docker["reason"]


def test_without_any_engine_it_says_what_to_type(daemon: Daemon, tmp_path: Path) -> None:
    """The first minute on a fresh machine."""
    empty = tmp_path / "bin"
    empty.mkdir()
    with other(daemon, tmp_path, PATH=str(empty)) as none:
        done = none.ctl("create")
        assert done.returncode == 3
        assert b"hint: sudo " in done.stderr or b"hint: install " in done.stderr
        doctor = none.ctl("doctor")
        assert doctor.returncode == 1
        said = doctor.stdout.decode()
        assert "podman is not installed" in said
        assert "docker is not installed" in said
        fixes = [check["fix"] for check in none.call("daemon/doctor")["checks"] if check["status"] != "ok"]
        assert len(fixes) >= 3
        assert all("install" in fix for fix in fixes)
        assert none.ctl("ls").returncode == 0, "what needs no engine works"
