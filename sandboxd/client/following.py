"""One command, as the messages about it tell it. Pure: it says what to send, and the caller sends it."""

from __future__ import annotations

import binascii
import codecs
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from sandboxd.client.connection import result_of
from sandboxd.client.errors import CommandExitException, TimeoutException
from sandboxd.client.model import CommandResult, ShellResult, command_result, shell_result

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

INPUT_BYTES_MAX = 64 * 1024
"""Of stdin in one request. The next goes out when the command has taken this one."""

Request = tuple[str, dict[str, Any]]


class Chunk(NamedTuple):
    """Some output of a command."""

    stream: str
    """``stdout`` or ``stderr``; what a terminal shows is ``stdout``."""
    data: bytes
    text: str
    """The characters that ``data`` completes."""


class Following:
    """What is known of one command that is run or followed.

    Args:
        stdin: What the command is to read, after ``commands/started``; None for nothing of ours.
    """

    def __init__(self, stdin: bytes | None = None) -> None:
        self.request_id = 0
        """Of the ``commands/run`` or ``commands/connect`` that is under way."""
        self._offsets = {"stdout": 0, "stderr": 0}
        self._input = None if stdin is None else _input_requests(stdin)
        self._written: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {name: decoder("replace") for name in self._written}
        self._ref: dict[str, Any] = {}
        self.started = False
        self._end: Mapping[str, Any] | None = None
        self.chunks: deque[Chunk] = deque()
        """What was not yet taken."""

    def take(self, content: Mapping[str, Any]) -> Request | None:
        """Take one message; return a request that is to be sent now, if there is one.

        Raises:
            RpcError: The command was not started, or nobody knows how it ended.
        """
        match content.get("method"):
            case "commands/started":
                params = content["params"]
                self.started = True
                self._ref = {"sandbox": params["sandbox"], "command_id": params["command_id"]}
                return self._next_input()
            case "commands/output":
                self._take_output(content["params"])
                return None
            case None:
                return self._take_reply(content)
            case _:
                return None

    def connect_params(self) -> dict[str, int]:
        """Where ``commands/connect`` is to begin."""
        return {f"{stream}_offset": offset for stream, offset in self._offsets.items() if offset}

    def ended(self) -> bool:
        """Whether its end has been told; then all that it wrote has been, too."""
        return self._end is not None

    def result(self) -> CommandResult:
        """How it ended. Only once it has.

        Raises:
            CommandExitException: Not with 0.
            TimeoutException: It took too long.
        """
        if self._end is None:
            raise AssertionError("the command has not ended")
        return checked(command_result(self._end, self.written("stdout"), self.written("stderr")))

    def shell_result(self) -> ShellResult:
        """How a text ended that a shell evaluated. Only once it has.

        Raises:
            CommandExitException: Not with 0.
            TimeoutException: It took too long.
        """
        if self._end is None:
            raise AssertionError("the text has not ended")
        result = shell_result(self._end, self.written("stdout"), self.written("stderr"))
        checked(result)
        return result

    def written(self, stream: str) -> bytes:
        """What it wrote so far."""
        return b"".join(self._written[stream])

    def _take_reply(self, content: Mapping[str, Any]) -> Request | None:
        if content.get("id") in (self.request_id, None):
            self._end = result_of(dict(content))
            self.started = True
            for stream in self._decoders:
                self._put(stream, b"", final=True)
            return None
        # The command may end, or close its stdin, before it has read all of it: that is no failure of the run.
        return None if "error" in content else self._next_input()

    def _take_output(self, params: Mapping[str, Any]) -> None:
        stream = params["stream"]
        if params["dropped_bytes"]:
            self._put(stream, b"", final=True)
        data = binascii.a2b_base64(params["data"])
        self._offsets[stream] = params["offset"] + len(data)
        self._put(stream, data, final=False)

    def _put(self, stream: str, data: bytes, *, final: bool) -> None:
        text = self._decoders[stream].decode(data, final)
        self._written[stream].append(data)
        if data or text:
            self.chunks.append(Chunk(stream, data, text))

    def _next_input(self) -> Request | None:
        if self._input is None:
            return None
        method, params = next(self._input, ("", {}))
        return (method, {**self._ref, **params}) if method else None


def _input_requests(stdin: bytes) -> Iterator[Request]:
    for params in input_params(stdin):
        yield "commands/send_stdin", params
    yield "commands/close_stdin", {}


def input_params(data: str | bytes) -> Iterator[dict[str, Any]]:
    """Params of ``commands/send_stdin``, one for each piece of data, without the command's name."""
    data = data.encode() if isinstance(data, str) else data
    for start in range(0, len(data), INPUT_BYTES_MAX):
        yield {"data": binascii.b2a_base64(data[start : start + INPUT_BYTES_MAX], newline=False).decode()}


def checked(result: CommandResult) -> CommandResult:
    """The result of a command that exited with 0.

    Raises:
        CommandExitException: It did not.
        TimeoutException: It took too long.
    """
    if result.status == "timeout":
        error = TimeoutException(
            "the command did not end in time",
            f"killed after {result.wall_ms / 1000:.1f} s",
            "give timeout",
            "timeout",
        )
        error.result = result
        raise error
    if result.exit_code != 0:
        raise CommandExitException(result)
    return result
