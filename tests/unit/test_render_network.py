"""What `sandboxctl network` says of a mode: whether the kernel shows it, and nothing that nobody saw."""

from __future__ import annotations

from typing import Any

import pytest

from sandboxd.cli import network, render_network
from sandboxd.cli.main import main

TAP = {"name": "tap0", "received_bytes": 1, "sent_bytes": 2}


def test_what_listens_is_told_with_its_protocol() -> None:
    """The same number is two ports, and a forward leads to one of them."""
    rows = [{"address": "127.0.0.1", "port": 53, "protocol": protocol} for protocol in ("tcp", "udp")]
    shown = render_network.ports({"forwards": [], "listening": rows}).splitlines()
    assert [line.split() for line in shown[-2:]] == [["127.0.0.1", "53", "tcp"], ["127.0.0.1", "53", "udp"]]


@pytest.mark.parametrize(("reply", "said"), [({"truncated": True}, True), ({"truncated": False}, False), ({}, False)])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_that_more_listens_than_is_shown_is_said_beside_the_table(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    reply: dict[str, bool],
    said: bool,
) -> None:
    """Who looks for a port that is not there would take it for closed. An older daemon lists all of them."""
    monkeypatch.setattr(network, "request", lambda *_, **__: {"forwards": [], "listening": [], **reply})
    assert main(["ports", "box", *flags]) == 0
    assert ("more listens than this" in capsys.readouterr().err) is said


@pytest.mark.parametrize(("network", "place"), [("own", "own network"), ("host", "127.0.0.1:4711"), (None, "-")])
def test_a_service_shows_an_address_where_it_can_be_connected_to(network: str | None, place: str) -> None:
    """The port of a network of its own leads nowhere from here, and another's may have the same."""
    row = {
        "name": "chroma",
        "state": "ready",
        "address": None if network is None else "127.0.0.1:4711",
        "network": network,
        **dict.fromkeys(("reason", "sandboxes"), ""),
        **dict.fromkeys(("pid", "sandbox")),
        **dict.fromkeys(("since_ms", "port", "restarts"), 0),
    }
    assert f"  {place}  " in render_network.services([row], 0)


@pytest.mark.parametrize(
    ("mode", "interfaces", "verified", "line"),
    [
        ("full", [TAP], True, "full (verified: tap0)"),
        ("none", [], True, "none (verified: no interface)"),
        ("none", [TAP], False, "none (NOT verified: tap0)"),
        ("full", None, False, "full (not verified: nobody can look)"),
    ],
)
def test_a_mode_is_told_with_what_the_kernel_shows(mode: str, interfaces: Any, verified: bool, line: str) -> None:
    info = {
        "mode": mode,
        "interfaces": interfaces,
        "verified": verified,
        "proxy": None,
        **dict.fromkeys(("allow", "deny", "services", "denials", "problems", "inject", "injections"), ()),
        **dict.fromkeys(("requests", "denied", "connections", "sent_bytes", "received_bytes"), 0),
    }
    first = render_network.network(info, 0).splitlines()[0]
    assert first.removeprefix("mode").strip() == line
