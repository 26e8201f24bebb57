"""The blocking client and the async one are the same to who calls them."""

import inspect
from typing import Any

import pytest

from sandboxd.client import aio, aio_files, files, sandbox

UNLIKE = {("Files", "watch_dir"), ("WatchHandle", "get_new_events")}
"""The one is asked for what happened, the other calls back."""

TWINS = [
    (name, blocking, getattr(awaited, f"Async{name}", None))
    for one, awaited in ((sandbox, aio), (files, aio_files))
    for name, blocking in vars(one).items()
    if inspect.isclass(blocking) and blocking.__module__ == one.__name__ and name[0] != "_"
    if blocking is not sandbox.InstanceOrClass
]


def parameters(function: Any) -> list[tuple[str, object, object]]:
    found = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


def public(class_: type) -> set[str]:
    return {name for name in dir(class_) if not name.startswith("_")}


@pytest.mark.parametrize(("name", "blocking", "awaited"), TWINS, ids=[name for name, _, _ in TWINS])
def test_what_one_client_has_the_other_has_with_the_same_arguments(
    name: str, blocking: type, awaited: type | None
) -> None:
    """Code moves from one to the other by writing ``await``; an argument of only one of them is found by accident."""
    assert awaited is not None
    assert public(blocking) ^ public(awaited) <= {method for owner, method in UNLIKE if owner == name}
    for method in public(blocking) & public(awaited):
        first, second = getattr(blocking, method), getattr(awaited, method)
        assert callable(first) == callable(second)
        if callable(first) and (name, method) not in UNLIKE:
            assert parameters(first) == parameters(second), method


def test_there_are_twins_to_compare() -> None:
    """Else the test above holds of nothing."""
    assert {"Sandbox", "Commands", "CommandHandle", "Pty", "Shells", "Files"} <= {name for name, _, _ in TWINS}
