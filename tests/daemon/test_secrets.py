"""Secrets: kept where nobody else looks, given as files, refused where they would be seen."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from sandboxd import failures, protocol, secret_sources, secret_store
from sandboxd.secret_sources import VALUE_BYTES_MAX
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
    await store.put("tokens", b"another")
    with pytest.raises(failures.NotFound) as caught:
        store.check(["token"])
    assert caught.value.hint == "did you mean tokens? else: sandboxctl secret set token < FILE"
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


async def test_a_link_is_not_followed_and_keeps_no_daemon_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody who could write there could have any file of this user's given away as a secret."""
    (tmp_path / "target").write_bytes(CANARY)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").symlink_to(tmp_path / "target")
    with caplog.at_level("WARNING"):
        store = SecretStore(str(tmp_path / "secrets"))
    assert "cannot use the secret 'token'" in caplog.text
    with pytest.raises(failures.Failure, match="cannot read the secret 'token'"):
        await store.values(["token"])
    await store.put("other", b"is kept all the same")


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


@pytest.mark.parametrize("kept", [CANARY, b"canary/5f2c+81d0=="])
@pytest.mark.parametrize("around", ["Bearer {}", "postgres://me:{}@db/x", '{{"key": "{}"}}', "a={};b"])
async def test_a_known_secret_is_found_within_a_value_too(tmp_path: Path, around: str, kept: bytes) -> None:
    """A header's or a URL's worth of text around it hides nothing from who reads it."""
    store = SecretStore(str(tmp_path))
    await store.put("token", kept)
    with pytest.raises(failures.InvalidArgument):
        store.refuse_in({"A": around.format(kept.decode())})
    assert store.holds(around.format(kept.decode()))


@pytest.mark.parametrize(
    ("where", "request_of"),
    [
        ("the metadata 'team'", lambda text: ({}, {"team": text}, ())),
        ("the name of metadata", lambda text: ({}, {text: "x"}, ())),
        ("argument 1", lambda text: ({}, {}, ("curl", f"Authorization: Bearer {text}"))),
        ("the variable 'A'", lambda text: ({"A": text}, {}, ())),
    ],
)
async def test_a_known_secret_is_refused_wherever_it_would_be_written_down_or_shown(
    tmp_path: Path, where: str, request_of: Callable[[str], tuple[dict[str, str], dict[str, str], tuple[str, ...]]]
) -> None:
    """Arguments are in /proc for every process, in the journal and in the audit log; metadata is in every list."""
    store = SecretStore(str(tmp_path))
    await store.put("token", CANARY)
    await store.put("weak", b"test")
    with pytest.raises(failures.InvalidArgument) as refused:
        await store.refuse(*request_of(CANARY.decode()))
    said = f"{refused.value.brief} {refused.value.detail} {refused.value.hint}"
    assert where in said
    assert CANARY.decode() not in said
    assert store.holds(f"Bearer {CANARY.decode()}")
    # What is as short as a word is one.
    await store.refuse({}, {"kind": "test"}, ("pytest", "test"))


async def test_a_word_that_is_a_secret_is_still_a_word(tmp_path: Path) -> None:
    store = SecretStore(str(tmp_path))
    await store.put("weak", b"debug")
    store.refuse_in({"LEVEL": "debug info"})
    with pytest.raises(failures.InvalidArgument):
        store.refuse_in({"LEVEL": "debug"})


def test_whatever_takes_variables_takes_them_where_they_are_looked_at() -> None:
    """The dispatcher looks at ``env``, ``metadata`` and ``argv`` of each request that changes something."""
    takers: dict[str, set[str]] = {"env": set(), "metadata": set(), "argv": set()}
    for method in (row for row in protocol.METHODS if not row.reads):
        for field in msgspec.structs.fields(method.params):
            if field.type == dict[str, str] or field.name == "argv":
                takers[field.name].add(method.name)
    assert takers == {
        "env": {"sandbox/create", "commands/run", "commands/start", "shells/open"},
        "metadata": {"sandbox/create"},
        "argv": {"commands/run", "commands/start"},
    }


# ---- of others than files


def printing(code: str) -> list[str]:
    return [sys.executable, "-c", f"import sys, os; {code}"]


async def test_a_command_is_run_whenever_its_secret_is_given_and_its_value_kept_nowhere(tmp_path: Path) -> None:
    counter = tmp_path / "runs"
    store = SecretStore(str(tmp_path / "secrets"), env=os.environ)
    code = f"open({str(counter)!r}, 'a').write('x'); print({CANARY[:6]!r}.decode() + {CANARY[6:]!r}.decode())"
    await store.put_source("token", command=printing(code))
    assert await store.values(["token"]) == {"token": CANARY}
    assert await store.values(["token"]) == {"token": CANARY}
    assert counter.read_text() == "xxx"
    (known,) = store.known()
    assert (known.source, known.size_bytes) == ("command", None)
    assert known.origin.startswith(sys.executable)
    assert os.listdir(tmp_path / "secrets") == [secret_sources.FILE_NAME]
    kept = tmp_path / "secrets" / secret_sources.FILE_NAME
    assert kept.stat().st_mode & 0o777 == 0o600
    assert CANARY not in kept.read_bytes()
    assert await SecretStore(str(tmp_path / "secrets"), env=os.environ).values(["token"]) == {"token": CANARY}


async def test_requests_one_after_the_other_or_at_once_do_not_run_a_command_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "runs"
    store = SecretStore(str(tmp_path / "secrets"), env=os.environ)
    await store.put_source("token", command=printing(f"open({str(counter)!r}, 'a').write('x'); print('value')"))
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(store.reveal, "token")
    assert await store.reveal("token") == b"value"
    assert counter.read_text() == "xx"
    monkeypatch.setattr(secret_store, "TOLD_S_MAX", 0.0)
    await store.reveal("token")
    assert counter.read_text() == "xxx"


async def test_a_command_that_fails_is_not_run_for_each_request_and_at_once_when_it_is_set_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox asks as often as it likes, and each run is a process of the host's."""
    counter, value = tmp_path / "runs", tmp_path / "value"
    store = SecretStore(str(tmp_path / "secrets"), env=os.environ)
    value.write_text("value")
    code = f"open({str(counter)!r}, 'a').write('x'); print(open({str(value)!r}).read())"
    await store.put_source("token", command=printing(code))
    value.unlink()
    for _ in range(3):
        with pytest.raises(failures.Failure):
            await store.reveal("token")
    assert counter.read_text() == "xx"
    monkeypatch.setattr(secret_store, "FAILED_S_MAX", 0.0)
    with pytest.raises(failures.Failure):
        await store.reveal("token")
    assert counter.read_text() == "xxx"
    monkeypatch.undo()
    await store.put("token", b"of my own")
    assert await store.reveal("token") == b"of my own"


async def test_a_commands_value_in_a_variable_is_refused_once_it_is_known(tmp_path: Path) -> None:
    store = SecretStore(str(tmp_path), env=os.environ)
    await store.put_source("token", command=["echo", CANARY.decode()])
    with pytest.raises(failures.InvalidArgument):
        store.refuse_in({"A": CANARY.decode()})


async def test_what_a_command_prints_is_known_to_the_next_daemon_before_anything_is_written_down(
    tmp_path: Path,
) -> None:
    """Its value is kept nowhere, so the first request that could hold it has it run: once, and not for each."""
    runs, value = tmp_path / "runs", tmp_path / "value"
    value.write_bytes(CANARY)
    code = f"open({str(runs)!r}, 'a').write('x'); sys.stdout.write(open({str(value)!r}).read())"
    await SecretStore(str(tmp_path / "kept")).put_source("token", command=printing(code))
    store = SecretStore(str(tmp_path / "kept"))
    await store.refuse({}, {}, ("true",))
    assert runs.read_text() == "x"
    for request in (({"KEY": CANARY.decode()}, {}), ({}, {"note": CANARY.decode()})):
        with pytest.raises(failures.InvalidArgument):
            await store.refuse(*request, ())
    assert runs.read_text() == "xx"


async def test_a_command_that_prints_nothing_any_more_holds_nobody_up_twice(tmp_path: Path) -> None:
    """What is only compared may not keep sandboxes from being made."""
    runs, gone = tmp_path / "runs", tmp_path / "gone"
    gone.write_bytes(CANARY)
    code = f"open({str(runs)!r}, 'a').write('x'); sys.stdout.write(open({str(gone)!r}).read())"
    await SecretStore(str(tmp_path / "kept")).put_source("token", command=printing(code))
    gone.unlink()
    store = SecretStore(str(tmp_path / "kept"))
    await store.refuse({"A": "b"}, {}, ())
    await store.refuse({"A": "b"}, {}, ())
    assert runs.read_text() == "xx"


@pytest.mark.parametrize("trouble", ["sys.exit(1)", "__import__('time').sleep(60)"], ids=["fails", "is slow"])
async def test_a_command_that_gave_nothing_is_asked_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A store of passwords that was locked when the daemon began is unlocked some time."""
    value = tmp_path / "value"
    value.write_bytes(CANARY)
    code = f"os.path.exists({str(value)!r}) or {trouble}; sys.stdout.write(open({str(value)!r}).read())"
    await SecretStore(str(tmp_path / "kept")).put_source("token", command=printing(code))
    value.unlink()
    store = SecretStore(str(tmp_path / "kept"))
    with monkeypatch.context() as locked:
        locked.setattr(secret_store, "LEARN_S_MAX", 0.5)
        await store.refuse({"A": CANARY.decode()}, {}, ())
    value.write_bytes(CANARY)
    await store.refuse({"A": CANARY.decode()}, {}, ())
    monkeypatch.setattr(secret_store, "LEARN_S_MAX", 60.0)
    monkeypatch.setattr(secret_store, "FAILED_S_MAX", 0.0)
    monkeypatch.setattr(store, "_learn_from_s", 0.0)
    with pytest.raises(failures.InvalidArgument):
        await store.refuse({"A": CANARY.decode()}, {}, ())


async def test_a_daemon_out_of_descriptors_refuses_no_request_for_a_secret_that_it_cannot_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await SecretStore(str(tmp_path)).put_source("token", command=["echo", CANARY.decode()])
    store = SecretStore(str(tmp_path))

    def none_left(_: str) -> list[str]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as short:
        short.setattr(os, "listdir", none_left)
        await store.refuse({"A": CANARY.decode()}, {}, ())
    monkeypatch.setattr(store, "_learn_from_s", 0.0)
    with pytest.raises(failures.InvalidArgument):
        await store.refuse({"A": CANARY.decode()}, {}, ())


async def test_what_was_set_anew_is_known_and_its_command_not_run_to_learn_of_it(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = printing(f"open({str(runs)!r}, 'a').write('x'); print('value')")
    await SecretStore(str(tmp_path / "kept")).put_source("token", command=command)
    store = SecretStore(str(tmp_path / "kept"))
    store.remove("token")
    await store.put_source("token", command=command)
    await store.refuse({"A": "b"}, {}, ())
    assert runs.read_text() == "xx"


@pytest.mark.parametrize(
    ("command", "failure"),
    [
        (
            printing(f"print({CANARY!r}); sys.stderr.write({CANARY.decode()!r}); sys.exit(3)"),
            failures.PrerequisiteMissing,
        ),
        (printing(f"print({CANARY.decode()!r} * {VALUE_BYTES_MAX})"), failures.PrerequisiteMissing),
        (printing(""), failures.PrerequisiteMissing),
        (printing(f"print({CANARY!r}, flush=True); import time; time.sleep(100)"), failures.Timeout),
        (["/no/such/program"], failures.PrerequisiteMissing),
    ],
    ids=["fails", "too much", "nothing", "too long", "missing"],
)
async def test_a_command_that_gives_no_value_is_refused_when_it_is_set_and_nothing_it_said_is_repeated(
    tmp_path: Path,
    command: Sequence[str],
    failure: type[failures.Failure],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(secret_sources, "COMMAND_DEADLINE_S", 1.0)
    store = SecretStore(str(tmp_path), env=os.environ)
    await store.put("token", b"as before")
    hidden = [word if word.startswith("/") else "sh" for word in command[:1]]
    with caplog.at_level(logging.DEBUG), pytest.raises(failure) as failed:
        await store.put_source("token", command=command)
    said = f"{failed.value.brief} {failed.value.detail} {caplog.text}"
    assert CANARY.decode() not in said
    assert hidden[0] in failed.value.hint
    assert await store.values(["token"]) == {"token": b"as before"}


async def test_a_source_replaces_a_value_and_a_value_a_source(tmp_path: Path) -> None:
    store = SecretStore(str(tmp_path), env=os.environ)
    await store.put("token", b"kept")
    await store.put_source("token", command=["echo", "printed"])
    assert not (tmp_path / "token").exists()
    assert await store.values(["token"]) == {"token": b"printed"}
    await store.put("token", b"kept again")
    assert await SecretStore(str(tmp_path), env=os.environ).values(["token"]) == {"token": b"kept again"}
    await store.put_source("token", command=["echo", "printed"])
    store.remove("token")
    assert store.known() == []


async def test_a_credential_can_have_another_name_and_one_that_is_not_there_is_said_with_what_to_type(
    tmp_path: Path,
) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "api").write_bytes(CANARY)
    store = SecretStore(str(tmp_path / "secrets"), str(tmp_path / "credentials"))
    await store.put_source("token", credential="api")
    assert await store.values(["token"]) == {"token": CANARY}
    (known,) = (row for row in store.known() if row.name == "token")
    assert (known.source, known.origin, known.size_bytes) == ("credential", "api", len(CANARY))
    for wrong in ("other", "../secrets/x"):
        with pytest.raises(failures.PrerequisiteMissing) as missing:
            await store.put_source("wrong", credential=wrong)
        assert f"LoadCredential={wrong}:" in missing.value.hint
        assert "api" in missing.value.detail
    without = SecretStore(str(tmp_path / "secrets"))
    with pytest.raises(failures.PrerequisiteMissing):
        await without.values(["token"])


async def test_a_value_that_is_too_large_is_never_cut_short(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"x" * (VALUE_BYTES_MAX + 1))
    store = SecretStore(str(tmp_path))
    with pytest.raises(failures.Failure):
        await store.values(["token"])


async def test_sources_that_cannot_be_read_are_said_plainly(tmp_path: Path) -> None:
    (tmp_path / secret_sources.FILE_NAME).write_text('{"token": {"command": "a string"}}')
    with pytest.raises(failures.Failure) as failed:
        SecretStore(str(tmp_path))
    assert "mv " in failed.value.hint


# ---- given


async def test_secrets_are_given_as_files_for_the_sandboxs_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SecretStore(str(tmp_path))
    await store.put("token", CANARY)
    await store.put("other", b"not given")
    async with tree() as inside:
        monkeypatch.setattr("sandboxd.secret_store.INSIDE", os.fsdecode(inside.root / "secrets"))
        box: Any = Box(inside.files)
        await store.deliver(box, await store.values(["token"]))
        assert os.listdir(inside.root / "secrets") == ["token"]
        given = inside.root / "secrets" / "token"
        assert given.read_bytes() == CANARY
        assert given.stat().st_mode & 0o777 == 0o400
        assert (inside.root / "secrets").stat().st_mode & 0o777 == 0o700
        await store.put("token", b"renewed")
        await store.deliver(box, await store.values(["token"]))
        assert given.read_bytes() == b"renewed"


async def test_what_is_taken_from_a_sandbox_is_no_file_there_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it an error where the sandbox's user has removed it before."""
    store = SecretStore(str(tmp_path))
    await store.put("token", CANARY)
    async with tree() as inside:
        monkeypatch.setattr("sandboxd.secret_store.INSIDE", os.fsdecode(inside.root / "secrets"))
        box: Any = Box(inside.files)
        await store.withdraw(box, ["token"])
        await store.deliver(box, {"token": CANARY, "other": b"stays"})
        await store.withdraw(box, ["token"])
        assert os.listdir(inside.root / "secrets") == ["other"]
        await store.withdraw(box, ["token"])
        (inside.root / "secrets" / "token").mkdir()
        (inside.root / "secrets" / "token" / "in-the-way").touch()
        with pytest.raises(failures.Failure, match="cannot take the secret 'token' from sandbox"):
            await store.withdraw(box, ["token"])


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
            await store.deliver(box, {"token": CANARY})
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
