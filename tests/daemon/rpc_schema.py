"""Params of every method, right and wrong, drawn from the structs that the daemon decodes them with."""

from __future__ import annotations

import base64
import os
from typing import Any, Self

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from sandboxd.failures import FAILURES, INTERNAL_ERROR, REQUEST_CANCELLED
from sandboxd.protocol import Method
from tests.daemon.rpc_peer import Peer
from tests.engine.daemons import Daemon

PATIENT_S = 0.2
"""So long a request may take by itself: some wait for what never comes."""

ANSWER_S_MAX = 30.0
"""A bound for what must happen."""

ERROR_TYPES = {failure.type for failure in FAILURES}

TEXTS_THAT_MATTER = (
    "",
    "/",
    ".",
    "..",
    "../../../etc/passwd",
    "/proc/self/fd/0",
    "/workspace",
    "/tmp/x",
    "a\x00b",
    "\x1b[2J",
    "é\U0001f600",
    "-rf",
    "--",
    "true",
    "sh",
    "default",
    "none",
    "1",
    "64m",
    "1e999",
    "0x10",
    "-5s",
    "500ms",
    "99999999999999999999h",
    "0-1",
    "localhost:1",
    "x" * 5000,
)
"""For what is text: names, paths, quantities, and what is none of them."""

NUMBERS_THAT_MATTER = (
    0,
    1,
    -1,
    2,
    255,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS_THAT_MATTER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(TEXTS_THAT_MATTER),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)

SIZE_MAX = 3
"""Of lists and mappings: more of the same finds nothing new."""


def params_of(method: Method, known: dict[str, list[str]]) -> st.SearchStrategy[Any]:
    """Mostly what the method can read, often with something wrong in it, and now and then anything at all.

    Args:
        method: Whose.
        known: By field name, values that mean something to the daemon, such as ids of sandboxes.
    """
    meant = _value(inspect.type_info(method.params), known)
    return st.one_of(meant, meant, meant, st.builds(_spoiled, meant, st.randoms(use_true_random=False), JSON), JSON)


def _spoiled(params: Any, chance: Any, junk: Any) -> Any:
    """One field is replaced, taken away, or one too many."""
    spoiled = dict(params)
    name = chance.choice([*spoiled, "surprise"])
    if name in spoiled and chance.random() < 0.3:
        del spoiled[name]
    else:
        spoiled[name] = junk
    return spoiled


def _value(kind: inspect.Type, known: dict[str, list[str]]) -> st.SearchStrategy[Any]:  # noqa: C901  (one case per type)
    match kind:
        case inspect.Metadata(type=inner):
            return _value(inner, known)
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(ge=least, le=most):
            fitting = [
                n for n in NUMBERS_THAT_MATTER if (least is None or n >= least) and (most is None or n <= most)
            ]
            return st.sampled_from([*(fitting or [least or 0])])
        case inspect.FloatType():
            return st.sampled_from([0.0, 0.5, 1.5, -1.0, 1e308, 2.0**63])
        case inspect.StrType(pattern=pattern) if pattern is not None:
            return st.sampled_from(TEXTS_THAT_MATTER) | st.from_regex(pattern.replace(r"\Z", "$"), fullmatch=True)
        case inspect.StrType():
            return st.sampled_from(TEXTS_THAT_MATTER) | st.text(max_size=20)
        case inspect.BytesType():
            return st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode())
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.ListType(item_type=item):
            return st.lists(_value(item, known), max_size=SIZE_MAX)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_value(key, known), _value(value, known), max_size=SIZE_MAX)
        case inspect.UnionType(types=types):
            return st.one_of([_value(each, known) for each in types])
        case inspect.StructType(fields=fields):
            return _struct(fields, known)
        case _:
            raise AssertionError(f"no params had this type before: {kind}")


def _struct(fields: tuple[inspect.Field, ...], known: dict[str, list[str]]) -> st.SearchStrategy[dict[str, Any]]:
    required, optional = {}, {}
    for field in fields:
        value = _value(field.type, known)
        if field.encode_name in known:
            value = st.one_of(*[st.sampled_from(known[field.encode_name])] * 4, value)
        (required if field.required else optional)[field.encode_name] = value
    return st.fixed_dictionaries(required, optional=optional)


class Fuzzer:
    """Sends requests to a daemon, and knows what it may answer.

    Args:
        daemon: Whose socket it is.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._number = 0
        self._peer: Peer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._peer is not None:
            self._peer.socket.close()

    def ask(self, method: Method, params: Any, descriptors: int) -> dict[str, Any]:
        """The reply to one request. One that takes its time is cancelled, which must bring its reply, too."""
        if self._peer is None:
            self._peer = Peer(str(self._daemon.socket))
        self._number += 1
        with open(os.devnull, "rb") as null:
            self._peer.send(method.name, params, self._number, [null.fileno()] * descriptors)
        reply = self._reply(PATIENT_S)
        if reply is None:
            self._peer.cancel(self._number)
            reply = self._reply(ANSWER_S_MAX)
        assert reply is not None, f"{method.name} was not answered: {params!r}"
        return reply

    def _reply(self, timeout_s: float) -> dict[str, Any] | None:
        assert self._peer is not None
        self._peer.socket.settimeout(timeout_s)
        while True:
            try:
                message = self._peer.receive()
            except TimeoutError:
                return None
            if message.get("id") == self._number and "method" not in message:
                return message

    def check(self, method: Method, params: Any, descriptors: int) -> None:
        """Ask, and judge the answer: a result that the protocol knows, or an error with a type."""
        reply = self.ask(method, params, descriptors)
        if "result" in reply:
            msgspec.convert(reply["result"], method.result)
            return
        error = reply["error"]
        assert error["code"] != INTERNAL_ERROR, (method.name, params, error)
        assert error["code"] == REQUEST_CANCELLED or error["data"]["type"] in ERROR_TYPES, (
            method.name,
            params,
            error,
        )
