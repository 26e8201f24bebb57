"""Templates: from the text of a configuration to what a slot must be, and what makes one of no use."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from runtimes.model import EngineInfo, EngineName, Limits, Network, User
from sandboxd.config import load_config
from sandboxd.failures import NotFound
from sandboxd.limits import Host
from sandboxd.records import SandboxRecord, WorkspaceRecord
from sandboxd.templates import SLOT_BYTES, Templates, made_with, opened_late
from tests.fakes.fake_engine import ALL_CAPABILITIES
from tests.unit.records import record

MIB = 1024 * 1024
HOST = Host(cpus_online=(0, 1), memory_bytes=8 * 2**30, swap_bytes=0, pid_max=2**22, nr_open=2**20)
ENGINE = EngineInfo(name=EngineName.PODMAN, usable=True, reason="", capabilities=ALL_CAPABILITIES)

TEXT = """
[defaults]
image = "localhost/plain:latest"
memory = "1g"
nofile = 1024

[pool]
min = 1
max = 4
idle = "90s"
age_max = "2h"
memory_reserve = "1g"

[templates.node]
description = "With node."
image = "localhost/node:latest"
memory = "2g"
tmp = "32m"
shm = "16m"
network = "full"
env = { NODE_ENV = "test" }
pool_min = 9
pool_max = 6

[templates.greedy]
cpus = "64"
"""


def templates(text: str = TEXT) -> Templates:
    return Templates(load_config(text, origin="config.toml", env={})[0], HOST)


def record_of(template: str, **changes: Any) -> SandboxRecord:
    """The sandbox of a request that says nothing but the template."""
    resolved = templates().limits(template, ENGINE)
    defaults = templates().defaults(template)
    plain = record(
        template=template,
        image=defaults.image,
        network=Network(defaults.network),
        limits=resolved.limits,
        tmp_bytes_max=resolved.tmp_bytes_max,
    )
    return msgspec.structs.replace(plain, **changes)


def test_what_a_template_does_not_say_is_as_in_the_defaults() -> None:
    found = templates()
    assert found.names == ["default", "greedy", "node"]
    assert templates("").names == ["default"]
    node = found.info("node")
    assert (node.description, node.image, node.memory) == ("With node.", "localhost/node:latest", "2g")
    assert (node.nofile, node.env, node.network) == (1024, {"NODE_ENV": "test"}, "full")
    plain = found.info("default")
    assert (plain.image, plain.memory, plain.env, plain.network) == ("localhost/plain:latest", "1g", {}, "none")
    assert plain.description
    limits = found.limits("node", ENGINE)
    assert (limits.limits.memory_bytes_max, limits.limits.nofile_max) == (2048 * MIB, 1024)
    assert (limits.limits.shm_bytes_max, limits.tmp_bytes_max) == (16 * MIB, 32 * MIB)


def test_a_template_that_nobody_wrote_is_named_with_those_that_are() -> None:
    for ask in (templates().info, templates().env, templates().defaults, templates().bounds):
        with pytest.raises(NotFound, match="nothing") as caught:
            ask("nothing")
        assert "default, greedy, node" in caught.value.detail


def test_more_than_the_host_has_is_cut_to_what_it_has() -> None:
    """A configuration may be written for a larger host."""
    assert templates().limits("greedy", ENGINE).limits.cpu_millis == 2000


def test_bounds_are_the_templates_own_else_the_pools_and_a_minimum_never_exceeds_the_maximum() -> None:
    found = templates()
    assert found.bounds("default") == (1, 4)
    assert found.bounds("node") == (6, 6)
    found.bound("node", 2, None)
    assert found.bounds("node") == (2, 6)
    found.bound("node", None, 1)
    assert found.bounds("node") == (1, 1)
    found.bound("node", None, 12)
    assert found.bounds("node") == (2, 12)
    assert found.bounds("default") == (1, 4)


def test_nothing_is_kept_of_a_variant_that_nobody_asks_for() -> None:
    own = templates().pool_settings("node", is_variant=False)
    variant = templates().pool_settings("node", is_variant=True)
    assert (own.slots_min, own.slots_max, own.idle_s, own.age_s_max) == (6, 6, 90.0, 7200.0)
    assert (variant.slots_min, variant.slots_max) == (0, 6)


def test_memory_that_the_host_is_to_keep_is_not_made_slots_of() -> None:
    assert templates().spare_slots(2**30 + 3 * SLOT_BYTES) == 3
    assert templates().spare_slots(2**30 + SLOT_BYTES - 1) == 0
    assert templates().spare_slots(0) == 0


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("name", ["default", "node"])
def test_a_slot_of_a_template_does_for_whoever_asks_for_nothing_else(name: str, late: bool) -> None:
    wanted = templates().recipe_of(record_of(name), ENGINE, late=late)
    assert templates().unfit(wanted, ENGINE) == ()
    assert (wanted.tmp_bytes_max is None) is (wanted.shm_bytes_max is None) is late


PROJECT = WorkspaceRecord(path="/home/me/project", read_only=False, mounted="same-uid")


@pytest.mark.parametrize(
    ("changes", "late", "early"),
    [
        ({"image": "localhost/other:latest"}, ("image",), ("image",)),
        ({"network": Network.NONE}, ("network",), ("network",)),
        ({"tmp_bytes_max": 64 * MIB}, (), ("tmp",)),
        ({"user": User(uid=4321, gid=4321)}, (), ()),
        ({"keep_id": True}, (), ()),
        ({"engine": "docker"}, (), ()),
        ({"workspace": PROJECT}, (), ()),
        ({"env": {"A": "b"}, "metadata": {"a": "b"}, "name": "me"}, (), ()),
        ({"image": "localhost/other:latest", "network": Network.NONE}, ("image", "network"), ("image", "network")),
    ],
)
def test_what_no_slot_can_become_is_said_in_the_words_of_the_command_line(
    changes: dict[str, Any], late: tuple[str, ...], early: tuple[str, ...]
) -> None:
    """What only makes a variant has slots of its own, and is none of these."""
    box = record_of("node", **changes)
    assert templates().unfit(templates().recipe_of(box, ENGINE, late=True), ENGINE) == late
    assert templates().unfit(templates().recipe_of(box, ENGINE, late=False), ENGINE) == early


@pytest.mark.parametrize(
    ("field", "value", "late", "early"),
    [
        ("nofile_max", 77, ("nofile",), ("nofile",)),
        ("shm_bytes_max", 4 * MIB, (), ("shm",)),
        ("memory_bytes_max", 64 * MIB, (), ()),
        ("cpu_millis", 100, (), ()),
        ("pids_max", 20, (), ()),
        ("cpuset_cpus", (0,), (), ()),
    ],
)
def test_limits_are_no_obstacle_but_those_that_are_fixed_at_creation(
    field: str, value: Any, late: tuple[str, ...], early: tuple[str, ...]
) -> None:
    limits: Limits = msgspec.structs.replace(record_of("node").limits, **{field: value})
    box = record_of("node", limits=limits)
    assert templates().unfit(templates().recipe_of(box, ENGINE, late=True), ENGINE) == late
    assert templates().unfit(templates().recipe_of(box, ENGINE, late=False), ENGINE) == early


def test_projects_that_are_mounted_in_advance_have_slots_of_their_own() -> None:
    box = record_of("node", workspace=PROJECT)
    other = record_of("node", workspace=msgspec.structs.replace(PROJECT, path="/home/me/other"))
    assert templates().recipe_of(box, ENGINE, late=False) != templates().recipe_of(other, ENGINE, late=False)
    assert templates().recipe_of(box, ENGINE, late=True) == templates().recipe_of(other, ENGINE, late=True)


def test_the_size_of_shared_memory_is_fixed_where_it_cannot_be_changed_late() -> None:
    """Another size is no slot's there, and not a claim that fails."""
    fixed = msgspec.structs.replace(ALL_CAPABILITIES, late_shm=False)
    rootless = msgspec.structs.replace(ENGINE, capabilities=fixed)
    box = record_of("default")
    other = msgspec.structs.replace(box, limits=msgspec.structs.replace(box.limits, shm_bytes_max=2**20))
    for engine, unfit in ((ENGINE, ()), (rootless, ("shm",))):
        recipe = templates().recipe_of(other, engine, late=True)
        assert templates().unfit(recipe, engine) == unfit


@pytest.mark.parametrize(
    ("changes", "made", "claimable"),
    [
        ({}, Network.FULL, Network.NONE),
        ({"network_switch": "engine"}, Network.FULL, Network.NONE),
        ({"network_switch": ""}, Network.FULL, Network.FULL),
        ({"rootless": True}, Network.NONE, Network.NONE),
        ({"rootless": True, "network_switch": ""}, Network.FULL, Network.FULL),
    ],
)
def test_a_network_that_can_be_given_late_does_not_keep_a_slot_from_being_claimed(
    changes: dict[str, Any], made: Network, claimable: Network
) -> None:
    """And where the engine could not take away again what it gives, it is not asked for it."""
    engine = msgspec.structs.replace(
        ENGINE, capabilities=msgspec.structs.replace(ALL_CAPABILITIES, **{"network_switch": "user_mode", **changes})
    )
    assert made_with(engine, Network.FULL) is made
    assert made_with(engine, Network.NONE) is Network.NONE
    wanted = record_of("default", network=made, network_now=None if made is Network.FULL else Network.FULL)
    slot = opened_late(wanted, engine, Network.NONE)
    assert (slot.network, slot.network_wanted) == (claimable, Network.FULL)
    assert opened_late(wanted, engine, made) is wanted
    plain = record_of("default", network=Network.NONE)
    assert opened_late(plain, engine, Network.FULL) is plain
