"""What speaks for a container's network is known by its name, and only that is ended."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from runtimes.errors import EngineRefused, EngineUnavailable
from runtimes.usernet import Attached, UserNetworks

pytestmark = pytest.mark.anyio

OWNER = "0123"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextmanager
def named(name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that calls itself so."""
    with subprocess.Popen([name, "60"], executable="/bin/sleep") as process:
        yield process
        process.kill()


async def test_those_of_a_former_daemon_are_found_by_owner_and_sandbox_and_ended() -> None:
    networks = UserNetworks(OWNER, {})
    with (
        named(f"slirp4netns-{OWNER}-sb-one/77") as one,
        named(f"slirp4netns-{OWNER}-sb-two/78"),
        named("slirp4netns-4567-sb-one/77") as stranger,
        named(f"slirp4netns-{OWNER}-nonsense"),
    ):
        assert networks.find("sb-one") == [Attached(one.pid, "sb-one", 77)]
        assert {attached.sandbox_id for attached in networks.find()} == {"sb-one", "sb-two"}
        (attached,) = networks.find("sb-one")
        await networks.end(attached)
        assert one.wait() == -9
        await networks.end(attached)
        await networks.ended(attached)
        assert networks.find("sb-one") == []
        assert stranger.poll() is None


def test_a_name_is_believed_of_no_process_in_a_container() -> None:
    """A sandbox of root's without a user namespace has our uid, and calls its processes what it likes."""
    script = f"exec -a slirp4netns-{OWNER}-sb-one/77 sh -c 'echo; read -r end'"
    words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "bash", "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n", "it has that name, and runs"
        assert UserNetworks(OWNER, {}).find() == []
        process.stdin.close()


async def test_a_number_that_something_else_has_by_now_is_left_alone() -> None:
    networks = UserNetworks(OWNER, {})
    with named("something-else") as other:
        await networks.end(Attached(other.pid, "sb-one", 77))
        await networks.ended(Attached(other.pid, "sb-one", 77))
        assert other.poll() is None


async def test_a_program_that_is_missing_or_ends_at_once_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    with named("a container") as process:
        monkeypatch.setattr("runtimes.usernet.shutil.which", lambda *_, **__: None)
        with pytest.raises(EngineUnavailable):
            await UserNetworks(OWNER, {}).attach("sb-one", process.pid)
        monkeypatch.setattr("runtimes.usernet.shutil.which", lambda *_, **__: "/bin/false")
        with pytest.raises(EngineRefused, match="ended"):
            await UserNetworks(OWNER, {}).attach("sb-one", process.pid)
