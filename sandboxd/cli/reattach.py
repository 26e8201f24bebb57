"""Following a command that the daemon holds, and typing into it, from anywhere, by several at once.

Output comes as ``commands/output``, from the spool: what was written lately, and then what is being written. What is
typed goes by ``commands/send_stdin``, one request after the other, for those sent at once may overtake each other.
When the command has a terminal and we have one, ours is raw meanwhile, and restored whatever happens.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import select
import signal

from sandboxd.cli import wire
from sandboxd.cli.attach import CHUNK_BYTES, catch_signals, make_raw, nothing, terminal_size
from sandboxd.cli.session import call, complain, connect_after
from sandboxd.cli.spooled import Output, look, say_dropped
from sandboxd.client import RpcError, result_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from sandboxd.cli.detach_keys import DetachKeys
    from sandboxd.client import Connection

REPLAY_BYTES = 64 * 1024
"""How much of what was written before is shown."""

LAST_INPUT_S_MAX = 1.0
"""How long a command that does not read may keep somebody who wants to leave."""

LEAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Reattached:
    """One command that goes on without us.

    Args:
        connection: To the daemon.
        command: The params that name it.
        keys: What leaves it.
        interactive: Pass on what is typed.
    """

    def __init__(
        self, connection: Connection, command: Mapping[str, str], keys: DetachKeys, *, interactive: bool
    ) -> None:
        self._connection = connection
        self._taken_over: Connection | None = None
        self._command = command
        self._keys = keys
        self._raw = False
        self._reading = interactive
        self._typed = b""
        self._end_of_input = False
        self._under_way: int | None = None
        self._output: Output | None = None
        self.left_by: int | None = None
        """What made us leave: the number of a signal, or 0 for the keys."""

    def run(self) -> dict[str, Any] | None:
        """Follow the command and return its end record, or None when we have left it running.

        Raises:
            RpcError: Its output is not kept, or the daemon went away.
        """
        streams = look(self._connection, self._command)
        # A terminal takes an end of input for a key that was typed, and more than one may be typing.
        self._end_of_input = self._reading and "stderr" in streams
        positions = {name: max(reply["bytes_total"] - REPLAY_BYTES, 0) for name, reply in streams.items()}
        self._raw = self._reading and os.isatty(0) and self._fits_terminal()
        self._output = Output(positions, _ignore if self._raw else say_dropped)
        signals, restore_signals = catch_signals(LEAVING + ((signal.SIGWINCH,) if self._raw else ()))
        restore_terminal = make_raw(0) if self._raw else nothing
        try:
            while True:
                offsets = {f"{name}_offset": position for name, position in self._output.positions.items()}
                try:
                    return self._follow(signals, self._send("commands/connect", **offsets))
                except RpcError as error:
                    self._go_on(error)
        finally:
            self.close()
            restore_terminal()
            restore_signals()

    def close(self) -> None:
        """Close what was connected to after a restart; the first connection is the caller's. Idempotent."""
        if self._taken_over is not None:
            self._taken_over.close()

    def _go_on(self, error: RpcError) -> None:
        """Follow it on the next daemon, from the same byte. What was typed and not answered may be lost.

        Raises:
            RpcError: There is none.
        """
        connection = connect_after(error)
        self.close()
        self._connection = self._taken_over = connection
        self._under_way = None
        if self._raw:
            self._fits_terminal()

    def _fits_terminal(self) -> bool:
        """Give the command's terminal our size. False: it has none, or has ended."""
        rows, cols = terminal_size()
        try:
            call(self._connection, "commands/resize", None, **self._command, size={"rows": rows, "cols": cols})
        except RpcError as error:
            if error.type != "conflict":
                raise
            return False
        return True

    def _send(self, method: str, **fields: object) -> int:
        return self._connection.send(method, wire.build(method, **self._command, **fields))

    def _follow(self, signals: int, request_id: int) -> dict[str, Any] | None:
        while self.left_by is None:
            poll = select.poll()
            poll.register(self._connection.fileno(), select.POLLIN)
            poll.register(signals, select.POLLIN)
            if self._reading and len(self._typed) < CHUNK_BYTES:
                poll.register(0, select.POLLIN)
            ready = dict(poll.poll())
            if signals in ready:
                for number in os.read(signals, CHUNK_BYTES):
                    self._take_signal(number)
            if 0 in ready:
                self._read_typed()
            if self._connection.fileno() in ready:
                self._take_messages()
                reply = self._connection.take_reply(request_id)
                if reply is not None:
                    return self._ended(result_of(reply))
            self._pass_on()
        if self.left_by == 0:
            self._send_the_rest()
        return None

    def _ended(self, end: dict[str, Any]) -> dict[str, Any]:
        if self._output is not None:
            self._output.finish(end)
        return end

    def _take_messages(self) -> None:
        for message in self._connection.read():
            if "method" not in message.content:
                self._connection.keep(message)
            elif message.content["method"] == "commands/output" and self._output is not None:
                try:
                    self._output.take(message.content["params"])
                except OSError:
                    self.left_by = signal.SIGHUP

    # --- what is typed

    def _read_typed(self) -> None:
        try:
            data = os.read(0, CHUNK_BYTES)
        except OSError:
            data = b""
        if not data:
            self._reading = False
            return
        left = False
        if self._raw:
            data, left = self._keys.feed(data)
        self._typed += data
        if left:
            self.left_by = 0

    def _pass_on(self) -> None:
        """Send what was typed, once what was typed before has arrived."""
        if self._under_way is not None:
            reply = self._connection.take_reply(self._under_way)
            if reply is None:
                return
            self._under_way = None
            self._check(reply)
        if self._typed:
            self._send_typed()
        elif self._end_of_input and not self._reading:
            self._end_of_input = False
            self._under_way = self._send("commands/close_stdin")

    def _send_the_rest(self) -> None:
        """What was typed before the keys is the command's, and what is not answered when we go is not carried out."""
        with contextlib.suppress(RpcError):
            while self._under_way is not None or self._typed:
                if self._under_way is not None:
                    self._connection.wait(self._under_way, timeout_s=LAST_INPUT_S_MAX)
                    self._under_way = None
                if self._typed:
                    self._send_typed()

    def _send_typed(self) -> None:
        data, self._typed = self._typed, b""
        encoded = binascii.b2a_base64(data, newline=False).decode()
        self._under_way = self._send("commands/send_stdin", data=encoded)

    def _check(self, reply: dict[str, Any]) -> None:
        try:
            result_of(reply)
        except RpcError as error:
            if error.type != "timeout":
                self._reading = self._end_of_input = False
                self._typed = b""
            if not self._raw:
                complain(error)

    # --- signals

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            rows, cols = terminal_size()
            self._send("commands/resize", size={"rows": rows, "cols": cols})
        elif number in LEAVING:
            self.left_by = number


def _ignore(_count: int, _stream: str) -> None:
    """Words of ours between those on a raw terminal would only disturb the picture."""
