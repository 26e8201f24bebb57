"""The suite, and the product, notice when an engine is not told a limit.

The engines' clients on PATH are replaced by ones that leave out a flag: whatever the product asks for, the container
comes without it, as it would if the flag were forgotten or its meaning changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.daemons import ENGINES, Daemon, running

pytestmark = pytest.mark.engine

CLIENT = """\
#!/bin/sh
# The engine's own client, with one flag left out.
dropped=$(cat {file})
for word; do
    shift
    case $word in $dropped) ;; *) set -- "$@" "$word" ;; esac
done
exec {program} "$@"
"""
NOTHING = "--no-such-flag"

DROPPED = {
    "--memory*": "memory",
    "--cpus=*": "cpus",
    "--pids-limit=*": "pids",
    "--cpuset-cpus=*": "cpuset",
    "--shm-size=*": "shm",
}
LIMITS = {"memory": "96m", "cpus": "0.5", "pids": 64, "cpuset": "0", "shm": "8m"}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that says which flag is left out."""
    file = tmp_path_factory.mktemp("dropped") / "flag"
    file.write_text(NOTHING)
    return file


@pytest.fixture(scope="module")
def forgetful(daemon: Daemon, dropped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that finds the clients which forget. The other one has seen to the image."""
    clients = tmp_path_factory.mktemp("clients")
    for name in ENGINES:
        client = clients / name
        client.write_text(CLIENT.format(file=dropped, program=shutil.which(name)))
        client.chmod(0o755)
    env = {"PATH": f"{clients}:{daemon.env['PATH']}"}
    with running(Daemon(tmp_path_factory.mktemp("forgetful"), env=env)) as forgetful:
        yield forgetful


def test_the_client_itself_is_no_obstacle(forgetful: Daemon, engine: str, dropped: Path) -> None:
    """With nothing left out everything holds: what is refused below is refused for the flag."""
    dropped.write_text(NOTHING)
    with forgetful.box(engine, limits=LIMITS) as box:
        assert box["verified"] is True


@pytest.mark.parametrize("flag", DROPPED)
def test_a_limit_that_the_engine_was_not_told_is_found_out(
    forgetful: Daemon, engine: str, dropped: Path, flag: str
) -> None:
    dropped.write_text(flag)
    refusal = forgetful.refusal("sandbox/create", engine=engine, limits=LIMITS)
    assert refusal.type == "limit_not_enforceable", refusal
    assert DROPPED[flag] in refusal.brief.replace(",", " ").split(), refusal
    assert forgetful.sandboxes() == []
    forgetful.assert_nothing_left()


def test_who_accepts_less_is_told_what_does_not_hold(forgetful: Daemon, engine: str, dropped: Path) -> None:
    dropped.write_text("--pids-limit=*")
    with forgetful.box(engine, limits=LIMITS, limits_policy="degraded") as box:
        assert box["verified"] is False
        (pids,) = (row for row in box["limits"] if row["name"] == "pids")
        assert pids["verified"] is False
        assert pids["reason"]
        assert pids["effective"] != 64
