"""Services that are containers: without a network, reached through init, ended and removed with the daemon."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtimes.model import LABEL_OWNER
from tests.engine.daemons import ENGINES, IMAGE, Daemon, running, wait_until

pytestmark = pytest.mark.engine

SERVE = "echo it begins; id -u; exec busybox httpd -f -v -p {port} -h {data}"


@pytest.fixture(scope="module")
def serving(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose services are containers, one of them on each engine; the shared one has made the image."""
    directory = tmp_path_factory.mktemp("serving")
    settings = []
    for name in ENGINES:
        data = directory / f"data-{name}"
        data.mkdir()
        (data / "index.html").write_text(f"from {name}")
        settings.append(f"""
            [services.{name}]
            image = "{IMAGE}"
            engine = "{name}"
            command = ["sh", "-c", {json.dumps(SERVE)}]
            port = 8080
            health = "/"
            memory = "32m"
            cpus = "0.5"
            pids = 20
            data = "{data}"
        """)
    config = directory / "config" / "sandboxd"
    config.mkdir(parents=True)
    (config / "config.toml").write_text("".join(settings))
    with running(Daemon(directory)) as made:
        yield made


def service(daemon: Daemon, name: str) -> dict[str, Any]:
    (row,) = (row for row in daemon.call("service/list")["services"] if row["name"] == name)
    found: dict[str, Any] = row
    return found


def ready(daemon: Daemon, name: str) -> dict[str, Any]:
    wait_until(lambda: service(daemon, name)["state"] == "ready", f"the service {name} is ready")
    return service(daemon, name)


def fetched(daemon: Daemon, box: dict[str, Any]) -> str:
    """What the service answers, as soon as it does: on a busy host its container takes longer than one request."""

    def answer() -> str:
        return daemon.run(box, "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/").stdout.decode()

    said: str = wait_until(answer, "the service answers")
    return said


def test_a_container_is_a_service_like_the_others_and_listens_nowhere_on_the_host(
    serving: Daemon, engine: str
) -> None:
    with serving.box(engine, services=[engine]) as box:
        assert fetched(serving, box) == f"from {engine}"
        row = ready(serving, engine)
        assert (row["address"], box["network"]) == (None, "none")
        inside = serving.call("sandbox/get", sandbox=row["sandbox"])
        assert (inside["engine"], inside["network"], inside["verified"]) == (engine, "none", True)
        assert inside["metadata"] == {"service": engine}
        limits = {limit["name"]: limit["effective"] for limit in inside["limits"]}
        assert (limits["memory"], limits["pids"]) == (32 << 20, 20)
        owner = serving.client(
            engine, "inspect", f'--format={{{{index .Config.Labels "{LABEL_OWNER}"}}}}', inside["container_id"]
        )
        assert owner.strip() == serving.owner
        log = serving.ctl("service", "logs", engine).stdout.decode().split()
        assert log[:2] == ["it", "begins"]
        assert log[2] != "0"
        assert row["sandbox"] in serving.ctl("service", "list").stdout.decode()


def test_one_that_dies_is_started_again_in_a_new_container_and_the_old_one_is_gone(
    serving: Daemon, engine: str
) -> None:
    with serving.box(engine, services=[engine]) as box:
        first = ready(serving, engine)
        os.kill(first["pid"], signal.SIGKILL)
        assert fetched(serving, box) == f"from {engine}"
        second = ready(serving, engine)
        assert second["sandbox"] != first["sandbox"]
        assert second["restarts"] > first["restarts"]
        assert [row["id"] for row in serving.sandboxes() if row["metadata"] == {"service": engine}] == [
            second["sandbox"]
        ]
        restarted = serving.call("service/restart", service=engine)
        assert restarted["sandbox"] != second["sandbox"]
        assert fetched(serving, box) == f"from {engine}"


def test_a_killed_daemon_leaves_a_container_that_the_next_one_replaces(serving: Daemon, engine: str) -> None:
    with serving.box(engine, services=[engine]) as box:
        first = ready(serving, engine)
        serving.kill()
        serving.start()
        assert first["sandbox"] not in [row["id"] for row in serving.sandboxes()]
        assert fetched(serving, box) == f"from {engine}"
        assert len(serving.containers(engine)) == 2


def test_its_data_is_copied_and_put_back(serving: Daemon, engine: str, tmp_path: Path) -> None:
    data = Path(service(serving, engine)["data_dir"])
    with serving.box(engine, services=[engine]) as box:
        assert serving.ctl("service", "backup", engine, str(tmp_path / "copy.tar")).returncode == 0
        (data / "index.html").write_text("overwritten")
        assert fetched(serving, box) == "overwritten"
        assert serving.ctl("service", "restore", engine, str(tmp_path / "copy.tar")).returncode == 0
        assert fetched(serving, box) == f"from {engine}"
