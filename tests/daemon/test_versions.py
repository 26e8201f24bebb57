"""A newer ``sandboxctl`` and an older daemon, by its recorded replies, which must always be understood."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sandboxd.cli.wire_table import PROTOCOL_VERSION
from sandboxd.framing import Decoder, Frame, encode
from sandboxd.protocol import FRAME_BYTES_MAX
from tests.daemon.test_daemon import without_engines
from tests.engine.daemons import Daemon

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "daemon-protocol-1.json").read_text()
)


class OldDaemon:
    """Answers what it answered then; what came later is no method to it. It ends when it is told to."""

    def __init__(self, path: Path) -> None:
        self.asked: list[str] = []
        self._path = path
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(8)

    def serve(self) -> None:
        with suppress(OSError):
            while "daemon/shutdown" not in self.asked:
                connected, _ = self._listening.accept()
                with connected:
                    self._answer_all(connected)
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._path.unlink(missing_ok=True)

    def _answer_all(self, connected: socket.socket) -> None:
        decoder = Decoder(FRAME_BYTES_MAX)
        while data := connected.recv(65536):
            for item in decoder.feed(data):
                assert isinstance(item, Frame)
                request = json.loads(item.body)
                self.asked.append(request["method"])
                reply = {"jsonrpc": "2.0", "id": request["id"], **self._answer(request["method"])}
                connected.sendall(encode(json.dumps(reply).encode(), lines=False))
            if "daemon/shutdown" in self.asked:
                return

    @staticmethod
    def _answer(method: str) -> dict[str, Any]:
        if method in RECORDED:
            return {"result": RECORDED[method]}
        brief = f"cannot call {method!r}"
        data = {"type": "unsupported", "brief": brief, "detail": "no such method", "hint": ""}
        return {"error": {"code": -32601, "message": brief, "data": data}}


@contextmanager
def old_daemon(daemon: Daemon) -> Iterator[OldDaemon]:
    old = OldDaemon(daemon.socket)
    thread = threading.Thread(target=old.serve)
    thread.start()
    try:
        yield old
    finally:
        old.close()
        thread.join()


def test_what_an_old_daemon_cannot_do_is_said_with_what_makes_it_new(tmp_path: Path) -> None:
    """Else whoever has just upgraded looks for a mistake of their own."""
    daemon = without_engines(tmp_path)
    with old_daemon(daemon):
        done = daemon.ctl("metrics")
        assert done.returncode == 4
        assert b"cannot call 'daemon/metrics'" in done.stderr
        assert b"the daemon is sandboxd 0.1.0, protocol 1" in done.stderr
        assert done.stderr.endswith(b"hint: sandboxctl daemon restart\n")


def test_what_it_can_do_is_done_without_a_word(tmp_path: Path) -> None:
    """Nobody has to restart a daemon that does what is asked of it."""
    daemon = without_engines(tmp_path)
    with old_daemon(daemon):
        done = daemon.ctl("ls", "--json")
        assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, {"sandboxes": []}, b"")


def test_both_versions_are_shown_where_they_differ(tmp_path: Path) -> None:
    daemon = without_engines(tmp_path)
    with old_daemon(daemon):
        done = daemon.ctl("version")
        assert b"sandboxd 0.1.0" in done.stdout
        assert b"hint: sandboxctl daemon restart" in done.stderr


def test_a_restart_puts_a_new_one_in_the_place_of_one_that_hands_nothing_over(tmp_path: Path) -> None:
    """It is stopped as it knows it, and there is one moment without a socket: that is how it was then."""
    daemon = without_engines(tmp_path)
    with old_daemon(daemon) as old:
        done = daemon.ctl("daemon", "restart", "--json")
        try:
            assert done.returncode == 0, done.stderr
            assert old.asked[-2:] == ["daemon/handover", "daemon/shutdown"]
            info = json.loads(done.stdout)
            assert info["protocol_version"] == PROTOCOL_VERSION
            assert os.path.exists(f"/proc/{info['pid']}")
            assert daemon.ctl("version").stderr == b""
        finally:
            assert daemon.ctl("daemon", "stop").returncode == 0
