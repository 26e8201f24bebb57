"""Events over a real socket: what was, what comes, what is missing, and who is held up by whom."""

from __future__ import annotations

import itertools
import json
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import anyio
import msgspec
import pytest
from anyio.from_thread import BlockingPortal

from sandboxd.connection import Context
from sandboxd.events import KEPT_MAX, EventLog
from sandboxd.failures import Stopping
from sandboxd.handlers.events import EventHandlers
from sandboxd.journal import Journal
from sandboxd.lifecycle import State
from sandboxd.listener import open_listener
from sandboxd.manager import Manager
from sandboxd.protocol import Params
from sandboxd.records import LifetimeRecord
from tests.daemon.rpc_peer import Peer, serving_on
from tests.daemon.sandboxctl import CTL, environment
from tests.daemon.test_daemon import without_engines
from tests.engine.daemons import Daemon, wait_until
from tests.unit.records import record


class Nobody:
    """A manager that knows no sandbox."""

    def id_of(self, reference: str) -> None:
        return None


class House:
    """A server that tells events, and nothing else."""

    def __init__(self, path: str, portal: BlockingPortal) -> None:
        self.path = path
        self._portal = portal
        numbers = itertools.count(1, 10**6)
        self.log = portal.call(lambda: EventLog(lambda _: next(numbers)))
        self._handlers = EventHandlers(self.log, cast("Manager", Nobody()))
        self._under_way: list[anyio.CancelScope] = []

    async def __call__(self, method: str, params: Params, context: Context) -> msgspec.Struct:
        with anyio.CancelScope() as scope:
            self._under_way.append(scope)
            return await self._handlers.table()[method](params, context)
        raise Stopping(f"cannot go on with {method!r}", detail="the daemon is stopping", hint="try again")

    def interrupt(self) -> None:
        """Tell who follows to come again, as a daemon does that is restarted."""

        def interrupt() -> None:
            for scope in self._under_way:
                scope.cancel()

        self._portal.call(interrupt)

    def publish(self, *kinds: str, sandbox: str = "sb-a", name: str | None = None) -> None:
        def publish() -> None:
            for kind in kinds:
                self.log.publish(kind, sandbox, name, {"reason": "x" * 100})

        self._portal.call(publish)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_listener(str(tmp_path / "s" / "sandboxd.sock")) as listener:
        late: list[House] = []

        async def dispatch(method: str, params: Params, context: Context) -> msgspec.Struct:
            return await late[0](method, params, context)

        with serving_on(listener.socket, dispatch) as portal:
            late.append(House(listener.path, portal))
            yield late[0]


def kinds_until_the_end(peer: Peer) -> tuple[list[str], dict[str, Any]]:
    kinds = []
    while "result" not in (message := peer.receive()):
        kinds.append(message["params"].get("kind", message["method"]))
    return kinds, message["result"]


def test_what_is_kept_is_told_and_then_it_ends(house: House) -> None:
    house.publish("created", "paused", "removed")
    with Peer(house.path) as peer:
        peer.send("events/subscribe", {"follow": False})
        assert kinds_until_the_end(peer) == (["events/begun", "created", "paused", "removed"], {"last_seq": 3})
        peer.send("events/subscribe", {"follow": False, "since": 2})
        assert kinds_until_the_end(peer) == (["events/begun", "removed"], {"last_seq": 3})


def test_whoever_follows_is_told_at_once_until_it_cancels(house: House) -> None:
    house.publish("created")
    with Peer(house.path) as peer:
        peer.send("events/subscribe", {"since": 2**53})
        assert peer.receive() == {"jsonrpc": "2.0", "method": "events/begun", "params": {"next_seq": 2}}
        house.publish("paused")
        assert peer.receive()["params"]["kind"] == "paused"
        house.publish("resumed")
        assert peer.receive()["params"]["seq"] == 3
        peer.cancel(1)
        assert peer.receive()["error"]["code"] == -32800


def test_filters_are_for_kinds_and_for_one_sandbox_that_may_be_gone(house: House) -> None:
    house.publish("created", "removed")
    house.publish("created", "removed", sandbox="sb-b")
    with Peer(house.path) as peer:
        peer.send("events/subscribe", {"follow": False, "sandbox": "sb-b", "kinds": ["removed"]})
        messages = [peer.receive() for _ in range(3)]
    assert [message.get("method") for message in messages] == ["events/begun", "events/event", None]
    assert (messages[1]["params"]["sandbox"], messages[1]["params"]["kind"]) == ("sb-b", "removed")


def test_a_sandbox_that_is_gone_is_found_by_the_name_that_it_had(house: House) -> None:
    """Who asks what became of it knows the name, and nothing else any more."""
    house.publish("created", "removed", sandbox="sb-b", name="box")
    house.publish("created", name="other")
    with Peer(house.path) as peer:
        peer.send("events/subscribe", {"follow": False, "sandbox": "box"})
        messages = [peer.receive() for _ in range(4)]
    assert [message["params"]["kind"] for message in messages[1:3]] == ["created", "removed"]
    assert "result" in messages[3]


def test_whoever_does_not_read_misses_events_and_learns_it_and_others_do_not(house: House) -> None:
    """The socket's buffer holds some, the ring holds some, and what is between is a gap with numbers."""
    count = 4 * KEPT_MAX
    with Peer(house.path) as slow, Peer(house.path) as quick:
        for peer in (slow, quick):
            peer.send("events/subscribe", {})
            assert peer.receive()["method"] == "events/begun"
        seen = 0
        for _ in range(count // 64):
            house.publish(*["paused"] * 64)
            for _ in range(64):
                message = quick.receive()
                assert message["method"] == "events/event"
                seen = message["params"]["seq"]
        assert seen == count
        expected, gaps = 1, 0
        while expected <= count:
            message = slow.receive()
            if message["method"] == "events/lost":
                assert message["params"]["first_seq"] == expected
                expected = message["params"]["last_seq"] + 1
                gaps += 1
            else:
                assert message["params"]["seq"] == expected
                expected += 1
        assert gaps >= 1


def test_sandboxctl_follows_ten_thousand_events_over_its_own_restart_and_misses_none(house: House) -> None:
    """More than twice what is kept: it reads as they come, and goes on from the last number that it has printed."""
    count, burst = 10_000, KEPT_MAX // 8
    seen: list[int] = []
    published = 0
    env = {**environment(Path(house.path).parent), "SANDBOXD_SOCKET": house.path}
    for stop_at in (count // 2, count):
        argv = [*CTL, "events", "--follow", "--json", "--since", str(seen[-1] if seen else 0)]
        with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as follower:
            assert follower.stdout is not None
            while len(seen) < stop_at:
                if published - len(seen) < burst and published < count:
                    house.publish(*["paused"] * burst)
                    published += burst
                line = json.loads(follower.stdout.readline())
                assert line["method"] == "events/event", "it kept up, and so it misses nothing"
                seen.append(line["seq"])
            follower.terminate()
    assert seen == list(range(1, count + 1))


def test_sandboxctl_follows_events_over_a_restart_of_the_daemon(house: House) -> None:
    """Nobody has to notice that it was restarted: no event is missing, and none comes twice."""
    env = {**environment(Path(house.path).parent), "SANDBOXD_SOCKET": house.path}
    with subprocess.Popen([*CTL, "events", "-f", "--json"], env=env, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        for seq in (1, 2, 3):
            house.publish("paused")
            assert json.loads(follower.stdout.readline())["seq"] == seq
            house.interrupt()
        follower.terminate()


def test_sandboxctl_shows_the_last_ones_and_goes_on_after_them(house: House) -> None:
    """Of thousands that are kept, one mostly wants the end; nothing that happens meanwhile falls between the two."""
    house.publish(*["paused", "removed"] * 50)
    env = {**environment(Path(house.path).parent), "SANDBOXD_SOCKET": house.path}

    def seqs(*flags: str) -> list[int]:
        argv = [*CTL, "events", "--json", *flags]
        done = subprocess.run(argv, env=env, capture_output=True, check=True, timeout=20)
        return [json.loads(line)["seq"] for line in done.stdout.splitlines()]

    assert seqs("-n", "3") == [98, 99, 100]
    assert seqs("-n", "2", "--kind", "removed") == [98, 100]
    assert seqs("-n", "5", "--since", "98") == [99, 100]
    assert seqs("-n", "0") == []
    follow = [*CTL, "events", "-f", "-n", "2", "--json"]
    with subprocess.Popen(follow, env=env, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        for seq in (99, 100):
            assert json.loads(follower.stdout.readline())["seq"] == seq
        house.interrupt()
        house.publish("paused")
        assert json.loads(follower.stdout.readline())["seq"] == 101
        follower.terminate()


def test_sandboxctl_says_what_it_missed_and_goes_on(house: House) -> None:
    """Whoever was away for too long must not believe that nothing happened."""
    house.publish(*["paused"] * (KEPT_MAX + 10))
    env = {**environment(Path(house.path).parent), "SANDBOXD_SOCKET": house.path}
    done = subprocess.run([*CTL, "events", "--json", "--since", "0"], env=env, capture_output=True, check=True)
    first, *rest = [json.loads(line) for line in done.stdout.splitlines()]
    assert first == {"method": "events/lost", "first_seq": 1, "last_seq": 10}
    assert [line["seq"] for line in rest] == list(range(11, KEPT_MAX + 11))
    assert house.log.gaps == 1


def test_a_kind_that_is_none_is_refused(house: House) -> None:
    with Peer(house.path) as peer:
        assert "kinds" in peer.ask("events/subscribe", {"kinds": ["exploded"]})["error"]["data"]["detail"]


def test_a_daemon_that_cannot_reach_an_engine_says_what_is_over_and_not_gone(tmp_path: Path) -> None:
    """Its time passed while no daemon ran. Nothing is forgotten that may still be there, and numbers go on."""
    daemon: Daemon = without_engines(tmp_path)
    daemon.state.mkdir(mode=0o700)
    journal = Journal.open(str(daemon.state / "journal.sqlite3"))
    lifetime = LifetimeRecord(lifetime_ms=1000, expires_at_ms=2000)
    journal.put(record(id="sb-old1111111", name="old", state=State.STOPPED, lifetime=lifetime))
    journal.close()
    seqs = []
    for why in ("it is not gone yet", "does not answer"):
        daemon.start()
        try:
            wait_until(lambda: [row["state"] for row in daemon.sandboxes()] == ["removing"], "it was listed")
            assert why in daemon.call("sandbox/get", sandbox="old")["state_reason"]
            done = daemon.ctl("events", "--json")
            assert done.returncode == 0
            seqs += [json.loads(line)["seq"] for line in done.stdout.splitlines()]
        finally:
            daemon.kill()
    assert seqs == sorted(set(seqs))
    assert len(seqs) > 2
    with closing(sqlite3.connect(daemon.state / "journal.sqlite3")) as database:
        assert database.execute("SELECT COUNT(*) FROM sandboxes").fetchone() == (1,)
