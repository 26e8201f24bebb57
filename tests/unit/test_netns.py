"""What /proc shows of a network: whether there is a way out, and whether there could be one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes import netns

HEADER = (
    "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs\n"
)
LO = "    lo: 100 1 0 0 0 0 0 0 100 1 0 0 0 0 0 0\n"
TAP = "  tap0: 2000 20 0 0 0 0 0 0 3000 30 0 0 0 0 0 0\n"
ROUTES = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
DEFAULT = "tap0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
LINK = "tap0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
DOWN = DEFAULT.replace("0003", "0002")
REJECT6 = f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200       lo\n"
DEFAULT6 = REJECT6.replace("      lo", "    eth0")


@pytest.mark.parametrize(
    ("dev", "route", "route6", "routed", "closed"),
    [
        (LO, "", REJECT6, False, True),
        (LO + TAP, DEFAULT + LINK, REJECT6, True, False),
        (LO + TAP, LINK, REJECT6, False, False),
        (LO + TAP, DOWN, REJECT6, False, False),
        (LO + TAP, "", DEFAULT6, True, False),
    ],
)
def test_an_interface_is_no_way_out_yet_and_no_closed_network_any_more(
    monkeypatch: pytest.MonkeyPatch, dev: str, route: str, route6: str, routed: bool, closed: bool
) -> None:
    tables = {"dev": HEADER + dev, "route": ROUTES + route, "ipv6_route": route6}
    monkeypatch.setattr(netns, "_table", lambda _, name: tables[name])
    view = netns.look(1)
    assert (view.routed, view.closed) == (routed, closed)


def test_the_counters_of_an_interface_are_those_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"dev": HEADER + LO + TAP, "route": ROUTES, "ipv6_route": ""}
    monkeypatch.setattr(netns, "_table", lambda _, name: tables[name])
    (tap,) = netns.look(1).interfaces
    assert (tap.name, tap.received_bytes, tap.sent_bytes) == ("tap0", 2000, 3000)


def test_a_network_of_ones_own_is_closed() -> None:
    """Of the real kernel, not of these tables: a namespace that was just made has a loopback and nothing else."""
    words = ["unshare", "--user", "--net", sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert netns.look(process.pid).closed
        process.communicate()
    assert Path(f"/proc/{os.getpid()}/net/dev").exists()
    with pytest.raises(OSError, match="No such file"):
        netns.look(process.pid)
