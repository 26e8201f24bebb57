"""A controller that is not delegated to the user: refused with what mends it, and accepted once that was typed.

Last of all: the user's systemd is restarted, and every container of theirs with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.engine.daemons import IMAGE, Daemon
from tests.stock.bed import DELEGATE, controllers_needed, delegated, limits, run, sudo, wait_until_manager_runs

pytestmark = controllers_needed

LESS = {
    "/etc/systemd/system.conf.d/stock.conf": "[Manager]\nDefaultTasksAccounting=no\nDefaultTasksMax=infinity\n",
    "/etc/systemd/system/user-.slice.d/stock.conf": "[Slice]\nTasksAccounting=no\nTasksMax=infinity\n",
    f"{DELEGATE}/00-less.conf": "[Service]\nDelegate=\nDelegate=memory\nTasksAccounting=no\nTasksMax=infinity\n",
}
"""What an administrator must write to delegate memory alone: processes are counted for every slice by default."""


@pytest.fixture(scope="module")
def memory_alone(daemon: Daemon) -> Iterator[None]:
    """A host whose administrator delegates memory and nothing else. The hint is what puts it right."""
    daemon.remove_everything()
    for path, text in LESS.items():
        sudo('mkdir -p "$(dirname "$1")"; printf %s "$2" >"$1"', path, text)
    restart_manager()
    yield
    sudo('rm -rf "$@"; systemctl daemon-reload', *LESS, str(DELEGATE))


def restart_manager() -> None:
    sudo('systemctl daemon-reload; systemctl restart "user@$1.service"', str(os.getuid()))
    wait_until_manager_runs()


def test_it_is_refused_and_the_hint_mends_it(daemon: Daemon, memory_alone: None, figures: list[str]) -> None:
    del memory_alone
    assert delegated() == "memory"
    daemon.call("daemon/doctor")
    hints = set()
    for asked, name in (({"pids": 50}, "pids"), ({"cpus": "0.5"}, "cpu"), ({"cpuset": "0"}, "cpuset")):
        refusal = daemon.refusal("sandbox/create", engine="podman", limits=asked)
        assert refusal.type == "limit_not_enforceable"
        assert f"the {name} controller is not delegated to your user" in refusal.detail
        hints.add(refusal.hint)
    (hint,) = hints
    assert "/etc/systemd/system/user@.service.d" in hint
    # Memory still holds, and what cannot be is said, where the caller puts up with it.
    with daemon.box("podman", limits={"memory": "64m"}, limits_policy="degraded") as box:
        verified = limits(box, "verified")
        assert (verified["memory"], verified["pids"], verified["cpus"]) == (True, False, False)
        # A group above the user's may count them all the same, without a limit.
        assert limits(box, "effective")["pids"] in {None, "unlimited"}

    # What follows the command is a remark: that one can do without.
    run("sh", "-ec", hint.partition("   (")[0])
    wait_until_manager_runs()

    assert {"cpu", "cpuset", "memory", "pids"} <= set(delegated().split())
    figures.append(f"after the drop-in of the hint: {delegated()}")
    daemon.call("daemon/doctor")
    asked = {"memory": "64m", "cpus": "0.5", "pids": 50, "cpuset": "0"}
    with daemon.box("podman", limits=asked) as box:
        assert box["verified"] is True
        assert limits(box, "effective")["cpuset"] == "0"
    assert run("podman", "image", "exists", IMAGE) == ""
