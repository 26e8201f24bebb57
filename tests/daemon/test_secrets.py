"""Secrets: kept where nobody else looks, given as files, refused where they would be seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sandboxd import failures
from sandboxd.secret_store import SECRETS_MAX, SecretStore
from tests.unit.init_files import tree
from tests.unit.records import record

pytestmark = pytest.mark.anyio

CANARY = b"canary-5f2c81d0"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_secret_is_kept_for_this_user_alone_and_known_again(tmp_path: Path) -> None:
    store = SecretStore(str(tmp_path / "secrets"))
    await store.put("token", CANARY)
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "secrets" / "token").stat().st_mode & 0o777 == 0o600
    again = SecretStore(str(tmp_path / "secrets"))
    (known,) = again.known()
    assert (known.name, known.size_bytes) == ("token", len(CANARY))
    again.check(["token"])


async def test_a_directory_that_others_may_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o755)
    SecretStore(str(tmp_path / "secrets"))
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700


async def test_a_credential_of_the_service_is_a_secret_that_only_the_service_manager_takes_away(
    tmp_path: Path,
) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "token").write_bytes(CANARY)
    store = SecretStore(str(tmp_path / "secrets"), str(tmp_path / "credentials"))
    assert [known.name for known in store.known()] == ["token"]
    with pytest.raises(failures.InvalidArgument):
        store.refuse_in({"A": CANARY.decode()})
    with pytest.raises(failures.Conflict):
        store.remove("token")
    await store.put("token", b"of my own")
    store.refuse_in({"A": CANARY.decode()})
    store.remove("token")
    with pytest.raises(failures.InvalidArgument):
        store.refuse_in({"A": CANARY.decode()})


async def test_a_secret_is_replaced_whole_and_forgotten_for_good(tmp_path: Path) -> None:
    store = SecretStore(str(tmp_path))
    await store.put("token", b"old")
    await store.put("token", CANARY)
    assert os.listdir(tmp_path) == ["token"]
    store.refuse_in({"A": "old"})
    store.remove("token")
    assert os.listdir(tmp_path) == []
    store.refuse_in({"A": CANARY.decode()})
    for attempt in (lambda: store.remove("token"), lambda: store.check(["token"])):
        with pytest.raises(failures.NotFound):
            attempt()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a\0b", "a" * 64, "ü"])
async def test_what_is_no_name_touches_nothing(tmp_path: Path, name: str) -> None:
    store = SecretStore(str(tmp_path / "secrets"))
    with pytest.raises(failures.InvalidArgument):
        await store.put(name, CANARY)
    assert os.listdir(tmp_path) == ["secrets"]
    assert os.listdir(tmp_path / "secrets") == []


@pytest.mark.parametrize("value", [b"", b"x" * 65537])
async def test_nothing_and_too_much_are_no_secret(tmp_path: Path, value: bytes) -> None:
    with pytest.raises(failures.InvalidArgument):
        await SecretStore(str(tmp_path)).put("token", value)


async def test_there_are_only_so_many(tmp_path: Path) -> None:
    for number in range(SECRETS_MAX):
        (tmp_path / f"s{number}").write_bytes(b"x")
    store = SecretStore(str(tmp_path))
    await store.put("s0", b"y")
    with pytest.raises(failures.CapacityExceeded):
        await store.put("one-more", b"x")


async def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Somebody who could write there could have any file of this user's given away as a secret."""
    (tmp_path / "target").write_bytes(CANARY)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        SecretStore(str(tmp_path / "secrets"))


@pytest.mark.parametrize("kept", [CANARY, CANARY + b"\n"])
async def test_a_known_secret_in_a_variable_is_refused_with_the_way_to_give_it(tmp_path: Path, kept: bytes) -> None:
    store = SecretStore(str(tmp_path))
    await store.put("token", kept)
    with pytest.raises(failures.InvalidArgument) as refused:
        store.refuse_in({"OTHER": "x", "API_KEY": CANARY.decode()})
    said = f"{refused.value.brief} {refused.value.detail} {refused.value.hint}"
    assert "'token'" in said
    assert "'API_KEY'" in said
    assert "--secret token" in said
    assert CANARY.decode() not in said


async def test_secrets_are_given_as_files_for_the_sandboxs_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SecretStore(str(tmp_path))
    await store.put("token", CANARY)
    await store.put("other", b"not given")
    async with tree() as inside:
        monkeypatch.setattr("sandboxd.secret_store.INSIDE", os.fsdecode(inside.root / "secrets"))
        box: Any = Box(inside.files)
        await store.deliver(box)
        assert os.listdir(inside.root / "secrets") == ["token"]
        given = inside.root / "secrets" / "token"
        assert given.read_bytes() == CANARY
        assert given.stat().st_mode & 0o777 == 0o400
        assert (inside.root / "secrets").stat().st_mode & 0o777 == 0o700
        await store.put("token", b"renewed")
        await store.deliver(box)
        assert given.read_bytes() == b"renewed"


async def test_what_stands_in_the_way_inside_is_a_failure_without_the_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SecretStore(str(tmp_path))
    await store.put("token", CANARY)
    async with tree() as inside:
        (inside.root / "secrets").touch()
        monkeypatch.setattr("sandboxd.secret_store.INSIDE", os.fsdecode(inside.root / "secrets"))
        box: Any = Box(inside.files)
        with pytest.raises(failures.Failure) as failed:
            await store.deliver(box)
        assert CANARY.decode() not in str(failed.value)


class Box:
    """A sandbox that was given ``token``, as far as files go."""

    def __init__(self, files: Any) -> None:
        self.record = record(secrets=("token",))
        self._files = files

    def files_for_a_moment(self) -> Any:
        return Moment(self._files)


class Moment:
    def __init__(self, files: Any) -> None:
        self.files = files

    async def __aenter__(self) -> Any:
        return self.files

    async def __aexit__(self, *_: object) -> None:
        return None
