"""Commands whose output the daemon keeps: followed, read again, written to, and found again after a crash."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import Message
from tests.engine.conftest import Box
from tests.engine.daemons import Daemon, running, wait_until

pytestmark = pytest.mark.engine

COUNT_SLOWLY = "i=0; while [ $i -lt 20 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 5"
COUNTED = b"".join(b"line %d\n" % number for number in range(20))


def start(daemon: Daemon, box: Box, *argv: str, **params: Any) -> dict[str, Any]:
    """A spooled command in the background; what names it."""
    started = daemon.call("commands/start", sandbox=box["id"], argv=list(argv), stdio="spool", **params)
    return {"sandbox": box["id"], "command_id": started["command_id"]}


def followed(daemon: Daemon, method: str, **params: Any) -> tuple[dict[str, Any], dict[str, bytes], int]:
    """Call something that sends output; the reply, the output by stream, and how much of it was not kept."""
    output: dict[str, bytes] = {}
    dropped = 0

    def take(message: Message) -> None:
        nonlocal dropped
        content = message.content
        if content["method"] == "commands/output":
            told = content["params"]
            output[told["stream"]] = output.get(told["stream"], b"") + base64.b64decode(told["data"])
            dropped += told["dropped_bytes"]

    with daemon.connect() as connection:
        return connection.call(method, params, on_notification=take), output, dropped


def logs(daemon: Daemon, ref: dict[str, Any], **params: Any) -> bytes:
    return base64.b64decode(daemon.call("commands/logs", **ref, **params)["data"])


def test_streams_are_kept_apart_and_all_of_them_come_before_the_reply(daemon: Daemon, box: Box) -> None:
    """A caller that gets the end has everything."""
    argv = ["sh", "-c", "echo out; echo err >&2; printf '\\377\\000'; exit 3"]
    end, output, _ = followed(daemon, "commands/run", sandbox=box["id"], argv=argv, stdio="spool", follow=True)
    assert (end["exit_code"], end["status"]) == (3, "nonzero")
    assert output == {"stdout": b"out\n\xff\x00", "stderr": b"err\n"}
    assert (end["stdout_bytes"], end["stderr_bytes"], end["truncated"]) == (6, 4, False)


def test_merged_output_keeps_its_order(daemon: Daemon, box: Box) -> None:
    """Two streams in one are in the order of their writing."""
    argv = ["sh", "-c", "echo 1; echo 2 >&2; echo 3; echo 4 >&2"]
    params = {"sandbox": box["id"], "argv": argv, "stdio": "spool", "merge_stderr": True, "follow": True}
    _, output, _ = followed(daemon, "commands/run", **params)
    assert output == {"stdout": b"1\n2\n3\n4\n"}


def test_input_is_written_in_pieces_and_ends(daemon: Daemon, box: Box) -> None:
    """``cat`` gives back what it was given, and ends when its stdin does."""
    ref = start(daemon, box, "cat", stdin="pipe")
    for piece in (b"one ", b"\x00two"):
        daemon.call("commands/send_stdin", **ref, data=base64.b64encode(piece).decode())
    daemon.call("commands/close_stdin", **ref)
    end, output, _ = followed(daemon, "commands/connect", **ref)
    assert end["status"] == "ok"
    assert output["stdout"] == b"one \x00two"
    assert daemon.refusal("commands/send_stdin", **ref, data="").type == "conflict"


def test_followers_begin_where_they_like(daemon: Daemon, box: Box) -> None:
    """Each has its own byte; what is read once can be read again."""
    ref = start(daemon, box, "sh", "-c", COUNT_SLOWLY)
    wait_until(lambda: len(logs(daemon, ref)) >= len(b"line 0\n"), "the byte to begin at is written")
    _, late, _ = followed(daemon, "commands/connect", **ref, stdout_offset=7)
    end, whole, _ = followed(daemon, "commands/connect", **ref)
    assert whole["stdout"] == COUNTED
    assert late["stdout"] == COUNTED[7:]
    assert end["exit_code"] == 5
    assert logs(daemon, ref, offset=0, length=6) == b"line 0"
    assert logs(daemon, ref, length=8) == COUNTED[-8:]


def test_a_terminal_is_held_by_the_daemon(daemon: Daemon, box: Box) -> None:
    """A client may come, resize, type, leave and come back."""
    ref = start(daemon, box, "sh", pty={"rows": 11, "cols": 22})
    daemon.call("commands/resize", **ref, size={"rows": 33, "cols": 44})
    typed = b"tty; stty size\n"
    daemon.call("commands/send_stdin", **ref, data=base64.b64encode(typed).decode())
    wait_until(lambda: b"33 44" in logs(daemon, ref), "the terminal's size is said")
    daemon.call("commands/send_stdin", **ref, data=base64.b64encode(b"exit 4\n").decode())
    end, output, _ = followed(daemon, "commands/connect", **ref)
    assert end["exit_code"] == 4
    assert b"/dev/pts/" in output["stdout"]
    assert "stderr" not in output


def test_output_past_the_cap_keeps_its_head_and_its_tail(tmp_path: Path) -> None:
    """A chatty command fills no disk, and its end says that something is missing."""
    with running(Daemon(tmp_path, env={"SANDBOXD_DEFAULTS_OUTPUT": "1m"})) as daemon, daemon.box("podman") as box:
        script = "echo head; head -c 50000000 /dev/zero; echo tail"
        ref = start(daemon, box, "sh", "-c", script)
        end = daemon.call("commands/wait", **ref)
        assert end["truncated"] is True
        assert end["stdout_bytes"] == 50_000_000 + len("head\ntail\n")
        assert logs(daemon, ref, offset=0, length=5) == b"head\n"
        assert logs(daemon, ref, length=5) == b"tail\n"
        spools = tmp_path.rglob("*.out")
        assert sum(path.stat().st_blocks * 512 for path in spools) < 8 * 1024 * 1024


def test_output_that_was_not_kept_cannot_be_read(daemon: Daemon, box: Box) -> None:
    """A clear answer, with what to do."""
    started = daemon.call("commands/start", sandbox=box["id"], argv=["true"])
    refusal = daemon.refusal("commands/logs", sandbox=box["id"], command_id=started["command_id"])
    assert refusal.type == "conflict"
    assert "spool" in refusal.hint


def test_a_command_is_followed_to_its_end_across_a_kill_of_the_daemon(tmp_path: Path) -> None:
    """Its output is in files and its process is init's: nothing of it was the daemon's."""
    with running(Daemon(tmp_path)) as daemon:
        with daemon.box("docker") as box:
            slow = start(daemon, box, "sh", "-c", COUNT_SLOWLY)
            quick = start(daemon, box, "sh", "-c", "echo quick; exit 6")
            assert daemon.call("commands/wait", **quick)["exit_code"] == 6
            wait_until(lambda: b"line 1" in logs(daemon, slow), "it has begun")
            daemon.kill()
            daemon.start()
            end, output, _ = followed(daemon, "commands/connect", **slow, stdout_offset=7)
            assert output["stdout"] == COUNTED[7:]
            assert (end["exit_code"], end["status"]) == (5, "nonzero")
            assert daemon.call("commands/wait", **quick)["exit_code"] == 6
            assert logs(daemon, quick) == b"quick\n"
        spools = tmp_path / "state" / "spools"
        wait_until(lambda: os.listdir(spools) == [], "what it wrote went with the sandbox")


def test_many_spooled_commands_leave_nothing_open(daemon: Daemon, box: Box) -> None:
    """Descriptors and files of commands whose caller has its answer are gone."""

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{daemon.pid}/fd"))

    params = {"sandbox": box["id"], "argv": ["echo", "hello"], "stdio": "spool", "follow": True}
    followed(daemon, "commands/run", **params)
    before = descriptors()
    for _ in range(50):
        assert followed(daemon, "commands/run", **params)[1]["stdout"] == b"hello\n"
    wait_until(lambda: descriptors() <= before, "descriptors are closed again")
