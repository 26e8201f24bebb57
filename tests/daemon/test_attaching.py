"""What is put on a sandbox's loopback: what its record says, no more, and taken away when that changes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from runtimes.init.channel import SocketRefused
from runtimes.init.wire import Stage
from runtimes.model import Network
from sandboxd.attaching import Attachments, changed_egress, egress_of, mode_of
from sandboxd.background import Background
from sandboxd.config import Config
from sandboxd.config import Service as ServiceSetting
from sandboxd.failures import Conflict, Failure, InvalidArgument, NotFound, Unsupported
from sandboxd.handlers.network import NetworkHandlers
from sandboxd.lifecycle import State
from sandboxd.network import culprit, streams
from sandboxd.network.egress import PROXY_PORT
from sandboxd.network.outside import Outside
from sandboxd.protocol import NetworkSetParams, SandboxParams
from sandboxd.records import EgressRecord, ForwardRecord, GrantRecord, SandboxRecord
from sandboxd.services.room import ServiceRoom
from tests.daemon.proxies import PATIENCE_S, door, listening, port_of, said_to
from tests.unit.records import record

pytestmark = pytest.mark.anyio

DB = GrantRecord(service="db")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Loopback:
    """A sandbox whose loopback is this host's: its ports are free ones, by the numbers that were asked for."""

    def __init__(self, **fields: Any) -> None:
        self.record: SandboxRecord = record(**fields)
        self.record = msgspec.structs.replace(self.record, state=State.RUNNING)
        self.lock = anyio.Lock()
        self.pid: int | None = None
        self.ports: dict[int, int] = {}
        self.asked: list[int] = []
        self.taken: set[int] = set()
        self.dialled: list[tuple[int, bool]] = []
        self.listens_by_ipv6 = False
        self.on_released: Callable[[], None] = lambda: None

    def put(self, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)

    async def listen(self, port: int) -> socket.socket:
        self.asked.append(port)
        if port in self.taken:
            raise SocketRefused(errno.EADDRINUSE, Stage.SOCKET)
        bound = listening()
        self.ports[port] = port_of(bound)
        return bound

    async def dial(self, port: int, *, ipv6: bool = False) -> socket.socket:
        self.dialled.append((port, ipv6))
        if ipv6 is not self.listens_by_ipv6:
            raise SocketRefused(errno.ECONNREFUSED, Stage.SOCKET)
        return await streams.connect(socket.AF_INET, ("127.0.0.1", port), deadline_s=PATIENCE_S)


async def no_secrets(name: str) -> bytes:
    raise NotFound(f"cannot find the secret {name!r}")


async def echo(accepted: socket.socket) -> None:
    await streams.send(accepted, await streams.receive(accepted))


@contextlib.asynccontextmanager
async def attaching(tmp_path: Path, switch: Any = None) -> AsyncIterator[Any]:
    """Attachments whose service ``db``, at port 5432 inside, says what it hears."""
    async with door(echo) as (port, _), anyio.create_task_group() as tasks:
        config = Config(services={"db": ServiceSetting(port=5432, address=f"127.0.0.1:{port}")})
        background = Background(tasks)
        room = ServiceRoom(config, str(tmp_path), list)
        room.start(background)
        yield Attachments(background, room, Outside(), switch or Switch(), no_secrets)
        tasks.cancel_scope.cancel()


async def nobody_listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(probe, ("127.0.0.1", port))
        except ConnectionRefusedError:
            return True
        return False


async def until_nobody_listens(port: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await nobody_listens(port):  # noqa: ASYNC110  (the kernel tells nobody)
            await asyncio.sleep(0.01)


async def test_nothing_is_put_into_a_sandbox_that_was_given_nothing(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback()
        assert await attachments.attach(box) == ()
        assert box.asked == []


async def test_what_the_record_says_is_there_and_stays_when_it_is_said_again(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback(egress=EgressRecord(), services=(DB,))
        assert await attachments.attach(box) == []
        assert set(box.ports) == {PROXY_PORT, 5432}
        assert await said_to(box.ports[5432], b"hello") == b"hello"
        answer = await said_to(box.ports[PROXY_PORT], b"GET http://good.example/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert attachments.ledger(box).denied == 1
        await attachments.attach(box)
        assert box.asked == [PROXY_PORT, 5432]


async def test_what_the_record_no_longer_says_is_taken_away_with_its_connections(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback(egress=EgressRecord(), services=(DB,))
        await attachments.attach(box)
        reader, writer = await asyncio.open_connection("127.0.0.1", box.ports[5432])
        box.put(services=())
        await attachments.attach(box)
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()
        await until_nobody_listens(box.ports[5432])
        assert not await nobody_listens(box.ports[PROXY_PORT])


async def test_rules_that_change_need_no_new_door(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback(egress=EgressRecord())
        await attachments.attach(box)
        box.put(egress=EgressRecord(allow=("127.0.0.1:*",)))
        await attachments.attach(box)
        assert box.asked == [PROXY_PORT]
        async with door(echo) as (port, _):
            request = f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: x\r\n\r\nhello".encode()
            answer = await said_to(box.ports[PROXY_PORT], request)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"hello")


async def test_a_sandbox_that_is_let_go_of_keeps_nothing_open_and_can_be_found_again(tmp_path: Path) -> None:
    """A daemon that starts anew, and a sandbox that was stopped, begin from here."""
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback(services=(DB,))
        await attachments.attach(box)
        box.on_released()
        await until_nobody_listens(box.ports[5432])
        await attachments.attach(box)
        assert await said_to(box.ports[5432], b"again") == b"again"


async def test_a_port_that_is_taken_inside_is_a_problem_and_no_failure(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback(egress=EgressRecord(), services=(DB,))
        box.taken.add(5432)
        (problem,) = await attachments.attach(box)
        assert "cannot offer db at 127.0.0.1:5432" in problem
        assert PROXY_PORT in box.ports
        box.taken.clear()
        assert await attachments.attach(box) == []
        assert attachments.problems(box) == []


# ---- ports


async def said_to_path(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("by_ipv6", [False, True])
async def test_a_port_of_the_host_leads_inside_to_whichever_loopback_listens(tmp_path: Path, by_ipv6: bool) -> None:
    """Some servers listen on ::1 alone when they are told localhost."""
    async with attaching(tmp_path) as attachments, door(echo) as (inside, _):
        box: Any = Loopback()
        box.listens_by_ipv6 = by_ipv6
        made = attachments.forward(box, port=inside, address="127.0.0.1", host_port=0, path=None)
        assert await said_to(made.host_port, b"hello") == b"hello"
        assert box.dialled == [(inside, False), (inside, True)][: 1 + by_ipv6]
        assert box.record.forwards == (made,)


async def test_a_unix_socket_of_the_host_leads_inside_and_is_this_users_alone(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments, door(echo) as (inside, _):
        box: Any = Loopback()
        path = tmp_path / "there.sock"
        made = attachments.forward(box, port=inside, address="127.0.0.1", host_port=0, path=str(path))
        assert path.stat().st_mode & 0o777 == 0o600
        assert await said_to_path(path, b"hello") == b"hello"
        attachments.close_forward(box, made.id)
        assert not path.exists()
        assert box.record.forwards == ()


async def test_a_forward_ends_with_its_sandbox_and_is_there_again_with_it(tmp_path: Path) -> None:
    """A stopped sandbox, and a daemon that was killed, whose Unix socket is still in the way."""
    async with attaching(tmp_path) as attachments, door(echo) as (inside, _):
        box: Any = Loopback()
        made = attachments.forward(box, port=inside, address="127.0.0.1", host_port=0, path=None)
        box.on_released()
        await until_nobody_listens(made.host_port)
        assert attachments.forwards(box) == [(made, 0, "the sandbox is running")]
        left = tmp_path / "left.sock"
        with socket.socket(socket.AF_UNIX) as former:
            former.bind(str(left))
        box.put(forwards=(*box.record.forwards, ForwardRecord(id="0" * 8, port=inside, path=str(left))))
        await attachments.attach(box)
        assert await said_to(made.host_port, b"again") == b"again"
        assert await said_to_path(left, b"again") == b"again"


async def test_a_forward_that_cannot_be_opened_again_says_why(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments, door(echo) as (taken, _):
        box: Any = Loopback(forwards=(ForwardRecord(id="0" * 8, port=80, address="127.0.0.1", host_port=taken),))
        await attachments.attach(box)
        ((_, connections, problem),) = attachments.forwards(box)
        assert connections == 0
        assert "something listens there" in problem


async def test_where_nothing_listens_inside_a_connection_is_reset(tmp_path: Path) -> None:
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback()
        box.listens_by_ipv6 = None
        made = attachments.forward(box, port=80, address="127.0.0.1", host_port=0, path=None)
        reader, writer = await asyncio.open_connection("127.0.0.1", made.host_port)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()


async def test_what_is_no_place_to_listen_on_is_refused_and_nothing_is_written_down(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with attaching(tmp_path) as attachments, door(echo) as (taken, _):
        box: Any = Loopback()
        for place, failure in (
            ({"address": "localhost"}, InvalidArgument),
            ({"address": "192.0.2.1"}, InvalidArgument),
            ({"host_port": taken}, Conflict),
            ({"path": "relative"}, InvalidArgument),
            ({"path": f"/{'x' * 200}"}, InvalidArgument),
            ({"path": str(tmp_path / "file")}, Conflict),
            ({"path": str(tmp_path / "missing" / "socket")}, Failure),
        ):
            fields: dict[str, Any] = {"address": "127.0.0.1", "host_port": 0, "path": None, **place}
            with pytest.raises(failure):
                attachments.forward(box, port=80, **fields)
        with pytest.raises(NotFound):
            attachments.close_forward(box, "0" * 8)
        assert box.record.forwards == ()


@pytest.mark.parametrize(
    ("mode", "allow", "becomes"),
    [
        (None, [], None),
        ("none", [], None),
        ("full", [], None),
        ("allow", [], EgressRecord()),
        (None, ["pypi"], EgressRecord(allow=("pypi",))),
        ("allow", ["pypi"], EgressRecord(allow=("pypi",))),
    ],
)
def test_rules_are_what_makes_a_proxy(mode: str | None, allow: list[str], becomes: EgressRecord | None) -> None:
    assert egress_of(mode, allow, []) == becomes


@pytest.mark.parametrize("mode", ["none", "full"])
def test_rules_that_nothing_would_obey_are_refused(mode: str) -> None:
    """Else somebody thinks that a network is filtered which is not."""
    with pytest.raises(InvalidArgument):
        egress_of(mode, ["pypi"], [])
    with pytest.raises(InvalidArgument):
        egress_of(mode, [], ["pypi"])


def test_a_rule_that_cannot_work_is_refused_when_it_is_given() -> None:
    """And not when the first request fails."""
    with pytest.raises(InvalidArgument):
        egress_of("allow", ["localhost:8080"], [])
    assert egress_of("allow", [], ["localhost:8080"]) is not None


@pytest.mark.parametrize("mode", ["none", "full"])
def test_what_is_said_of_rules_without_a_proxy_holds_for_every_verb(mode: str) -> None:
    """The flag is --network of create, and --mode of network."""
    with pytest.raises(InvalidArgument) as caught:
        egress_of(mode, ["pypi"], [])
    assert "--" not in caught.value.hint
    assert "'allow'" in caught.value.hint


def changed(box: Loopback, mode: str | None = None, **changes: Any) -> EgressRecord | None:
    said: dict[str, Any] = {"allow": None, "deny": None, "add_allow": [], "add_deny": [], **changes}
    sandbox: Any = box
    return changed_egress(sandbox, mode=mode, **said)


def test_rules_are_added_replaced_and_taken_away() -> None:
    box = Loopback(egress=EgressRecord(allow=("a.example",), deny=("b.example",)))
    assert changed(box) == box.record.egress
    assert changed(box, add_allow=["c.example", "a.example"]) == EgressRecord(
        allow=("a.example", "c.example"), deny=("b.example",)
    )
    assert changed(box, allow=["c.example"], deny=[]) == EgressRecord(allow=("c.example",))
    assert changed(box, mode="none") is None
    assert changed(Loopback(), add_allow=["c.example"]) == EgressRecord(allow=("c.example",))
    sandbox: Any = box
    assert mode_of(sandbox) == "allow"


def test_a_mode_replaces_the_rules_that_it_would_not_obey() -> None:
    box = Loopback(egress=EgressRecord(allow=("a.example",)))
    assert changed(box, mode="full") is None
    with pytest.raises(InvalidArgument):
        changed(Loopback(network=Network.FULL), mode="full", add_allow=["a.example"])
    assert changed(Loopback(network=Network.FULL)) is None
    assert changed(Loopback(network=Network.FULL), mode="allow") == EgressRecord()


class Switch:
    """Uplinks that do what they are told, or fail."""

    def __init__(self, failure: Failure | None = None) -> None:
        self.applied: list[Network] = []
        self.failure = failure

    def require_switchable(self, sandbox: Any, wanted: Network) -> None:
        if isinstance(self.failure, Unsupported):
            raise self.failure

    async def apply(self, sandbox: Any) -> None:
        self.applied.append(sandbox.record.network_wanted)
        if self.failure is not None and len(self.applied) == 1:
            raise self.failure


def wanting(mode: str, **fields: Any) -> NetworkSetParams:
    return NetworkSetParams(sandbox="box", mode=mode, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "mode", "fields", "becomes"),
    [
        (Network.NONE, "full", {}, "full"),
        (Network.FULL, "none", {}, "none"),
        (Network.FULL, "allow", {}, "allow"),
        (Network.FULL, None, {"add_allow": ["pypi"]}, "allow"),
        (Network.FULL, None, {"services": []}, "full"),
        (Network.NONE, "none", {}, "none"),
    ],
)
async def test_every_mode_can_become_every_other(
    tmp_path: Path, made: Network, mode: str, fields: dict[str, Any], becomes: str
) -> None:
    switch = Switch()
    async with attaching(tmp_path, switch) as attachments:
        box: Any = Loopback(network=made)
        await attachments.change(box, wanting(mode, **fields))
        assert mode_of(box) == becomes
        assert switch.applied == [Network.FULL if becomes == "full" else Network.NONE]
        assert box.record.network is made


async def test_what_could_not_be_opened_is_as_it_was(tmp_path: Path) -> None:
    async with attaching(tmp_path, Switch(Failure("no"))) as attachments:
        box: Any = Loopback(egress=EgressRecord(allow=("pypi",)))
        with pytest.raises(Failure):
            await attachments.change(box, wanting("full"))
        assert mode_of(box) == "allow"
        assert box.record.egress == EgressRecord(allow=("pypi",))
        assert PROXY_PORT in box.ports


async def test_what_could_not_be_closed_is_to_be_closed_all_the_same(tmp_path: Path) -> None:
    """Whoever asked for it must not find it open because something failed once: it is tried again at every look."""
    switch = Switch(Failure("no"))
    async with attaching(tmp_path, switch) as attachments:
        box: Any = Loopback(network=Network.FULL)
        with pytest.raises(Failure):
            await attachments.change(box, wanting("none"))
        assert mode_of(box) == "none"
        assert switch.applied == [Network.NONE, Network.NONE]


async def test_what_this_host_cannot_switch_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    switch = Switch(Unsupported("no", hint="sudo apt-get install slirp4netns"))
    async with attaching(tmp_path, switch) as attachments:
        box: Any = Loopback(egress=EgressRecord())
        with pytest.raises(Unsupported):
            await attachments.change(box, wanting("full"))
        assert (mode_of(box), switch.applied) == ("allow", [])


async def test_a_network_that_is_not_what_it_should_be_is_told_of_where_the_sandbox_must_live(tmp_path: Path) -> None:
    """A daemon that finds its sandboxes again does not let go of one for this."""
    async with attaching(tmp_path, Switch(Failure("it is down"))) as attachments:
        box: Any = Loopback(network=Network.FULL)
        assert await attachments.attach(box) == ["it is down"]
        assert attachments.problems(box) == ["it is down"]
        assert await attachments.attach(box) == []
        assert attachments.problems(box) == []
        with pytest.raises(Failure):
            await Attachments(None, None, None, Switch(Failure("no")), no_secrets).attach(box, require_network=True)  # type: ignore[arg-type]


async def test_a_sandbox_that_listens_on_more_than_is_listed_hides_no_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that no frame holds would be none: a forward could not be closed by its port any more."""
    monkeypatch.setattr(culprit, "LISTED_MAX", 1)
    async with attaching(tmp_path) as attachments:
        box: Any = Loopback()
        box.pid = os.getpid()
        forward = attachments.forward(box, port=80, address="127.0.0.1", host_port=0, path=None)
        manager: Any = types.SimpleNamespace(get=lambda _: box)
        nothing: Any = None
        ports = NetworkHandlers(manager, nothing, attachments, nothing).ports
        with listening(), listening():
            listed = await ports(SandboxParams(sandbox="box"), nothing)
        assert [each.forward_id for each in listed.forwards] == [forward.id]
        assert listed.listening is not None
        assert (len(listed.listening), listed.truncated) == (1, True)
        box.pid = None
        listed = await ports(SandboxParams(sandbox="box"), nothing)
        assert (listed.listening, listed.truncated) == (None, False)


def test_what_is_added_is_a_rule_like_the_others_of_the_mode_that_obeys_them() -> None:
    rule = "api.example.com X: {token}"
    assert egress_of(None, [], [], [rule]) == EgressRecord(inject=(rule,))
    with pytest.raises(InvalidArgument):
        egress_of("none", [], [], [rule])
    with pytest.raises(InvalidArgument):
        egress_of("allow", [], [], ["api.example.com X: no secret"])
    before: Any = Loopback(egress=EgressRecord(allow=("a.example",), inject=(rule,)))
    no_change: dict[str, Any] = {"mode": None, "allow": None, "deny": None, "add_allow": (), "add_deny": ()}
    more = changed_egress(before, **no_change, add_inject=["b.example Y: {other}", rule])
    assert more == EgressRecord(allow=("a.example",), inject=(rule, "b.example Y: {other}"))
    assert changed_egress(before, **no_change, inject=[]) == EgressRecord(allow=("a.example",))
    assert changed_egress(before, **{**no_change, "mode": "none"}) is None
