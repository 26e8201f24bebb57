"""Figures as text that a strict monitoring system reads, and what is counted for them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.model import Network, User
from sandboxd.config import metrics_address
from sandboxd.measuring import Measures, miss_word
from sandboxd.openmetrics import Counter, Histogram, counted, described, exposition, measured
from sandboxd.peers import Peer
from sandboxd.protocol import CommandParams, CommandStarted, SandboxCreateParams, SandboxInfo
from sandboxd.recipe import Recipe
from tests.openmetrics_reader import Family, read

NOBODY = Peer(1, 1, 1)


def test_each_kind_of_family_is_what_the_format_says() -> None:
    requests = Counter("requests", "Asked for.", ("method",))
    requests.add("a")
    requests.add("a", by=2)
    found = read(
        exposition(
            [
                described("build", "Which.", {"version": "1"}),
                requests.lines(),
                Counter("kills", "None yet.").lines(),
                counted("cpu_seconds", "Used.", [((), 1.5)], unit="seconds"),
                measured("used_bytes", "Used.", [(("x",), 7)], ("of",), unit="bytes"),
            ]
        )
    )
    assert found["build"].value("_info", version="1") == 1
    assert (found["requests"].kind, found["requests"].value("_total", method="a")) == ("counter", 3)
    assert found["kills"].value("_total") == 0, "what has never happened is told as well"
    assert (found["cpu_seconds"].unit, found["cpu_seconds"].value("_total")) == ("seconds", 1.5)
    assert (found["used_bytes"].kind, found["used_bytes"].value(of="x")) == ("gauge", 7)


def test_a_histogram_has_each_time_in_its_bucket_and_all_above() -> None:
    took = Histogram("took_seconds", "How long.", (0.01, 0.1, 1.0), ("engine",))
    for seconds in (0.001, 0.01, 0.05, 5.0):
        took.observe(seconds, "podman")
    found = read(exposition([took.lines()]))["took_seconds"]
    buckets = [found.value("_bucket", engine="podman", le=bound) for bound in ("0.01", "0.1", "1.0", "+Inf")]
    assert buckets == [2, 3, 3, 4]
    assert (found.value("_count", engine="podman"), found.unit) == (4, "seconds")
    assert found.value("_sum", engine="podman") == pytest.approx(5.061)


@settings(deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_whatever_is_in_a_label_or_a_sentence_comes_out_as_it_went_in(label: str, about: str) -> None:
    """A template may be called anything; a line must stay a line."""
    about = about or "."
    text = exposition([measured("a", about, [((label,), 1)], ("of",))])
    found = read(text)["a"]
    assert found.value(of=label) == 1
    assert found.about == about


@pytest.mark.parametrize(
    "text",
    [
        "# TYPE a counter\na_total 1\n",
        "# TYPE a counter\na 1\n# EOF\n",
        "# TYPE a gauge\na 1\na 1\n# EOF\n",
        "# TYPE a gauge\n# UNIT a bytes\na 1\n# EOF\n",
        "# TYPE a gauge\na{b=c} 1\n# EOF\n",
        "# TYPE a gauge\na 1\n# HELP a late\n# EOF\n",
        'a_bucket{le="1.0"} 2\n# EOF\n',
        "# TYPE a gauge\na one\n# EOF\n",
    ],
)
def test_the_reader_of_these_tests_is_strict(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read(text)


# --- what is counted


def figures(measures: Measures) -> dict[str, Family]:
    return read(exposition(family.lines() for family in measures.families))


def made(**fields: Any) -> SandboxInfo:
    plain = {
        name: None if kind is None else kind()
        for name, kind in {
            **dict.fromkeys(("name", "container_id", "pid", "workspace"), None),
            **dict.fromkeys(("state_reason", "image", "user", "limits_policy", "id"), str),
            **dict.fromkeys(("services", "mounts", "secrets", "limits", "warnings"), list),
            **dict.fromkeys(("metadata", "env", "timings_ms"), dict),
            **dict.fromkeys(("created_at_ms", "commands_running"), int),
            **dict.fromkeys(("ephemeral", "verified"), bool),
        }.items()
    }
    told = {"state": "running", "network": "none", "engine": "podman", "template": "default", "miss_reason": ""}
    return SandboxInfo(**{**plain, **told, "launch": "cold", **fields})


def test_sandboxes_are_booked_by_how_they_came_about() -> None:
    measures = Measures()
    for launch, reason in (("warm", ""), ("cold", ""), ("cold", "empty"), ("cold", "image, network")):
        ended = measures.observe("sandbox/create", SandboxCreateParams(), NOBODY)
        ended(made(launch=launch, miss_reason=reason), "ok")
    measures.observe("sandbox/create", SandboxCreateParams(), NOBODY)(None, "capacity_exceeded")
    found = figures(measures)
    assert found["sandboxd_claim_seconds"].value("_count", engine="podman") == 1
    assert found["sandboxd_create_seconds"].value("_count", engine="podman") == 3
    place = {"template": "default", "engine": "podman"}
    assert found["sandboxd_pool_hits"].value("_total", **place) == 1
    assert {dict(labels)["reason"] for _, labels in found["sandboxd_pool_misses"].samples} == {"empty", "several"}
    requests = found["sandboxd_requests"]
    assert requests.value("_total", method="sandbox/create", result="ok") == 4
    assert requests.value("_total", method="sandbox/create", result="capacity_exceeded") == 1


def test_reasons_are_few_whatever_was_said() -> None:
    """Each value of a label is a series for ever, and a reason may quote an engine."""
    said = ["empty", "image", "claim failed: cannot mount /a", "claim failed: cannot mount /b", "image, shm", "else"]
    assert [miss_word(reason) for reason in said] == ["empty", "image", "failed", "failed", "several", "other"]


def test_commands_are_booked_from_their_start_and_by_their_verdict() -> None:
    measures = Measures()
    params = CommandParams(sandbox="a", argv=["true"])
    started = CommandStarted(sandbox="a", command_id="0" * 12, pid=1, timings_ms={"spawn": 4.0, "total": 99.0})
    measures.observe("commands/start", params, NOBODY)(started, "ok")
    measures.observe("commands/start", params, NOBODY)(None, "not_found")
    for status in ("ok", "oom", "oom"):
        measures.tell("command_ended", "sb-a", None, {"status": status, "exit_code": 0, "oom_kills": 0})
    measures.tell("oom", "sb-a", None, {"oom_kills": 3})
    found = figures(measures)
    assert found["sandboxd_exec_seconds"].value("_sum") == pytest.approx(0.004)
    assert found["sandboxd_exec_seconds"].value("_count") == 1
    assert found["sandboxd_commands"].value("_total", verdict="oom") == 2
    assert found["sandboxd_oom_kills"].value("_total") == 3
    assert found["sandboxd_events"].value("_total", kind="command_ended") == 3


def test_engines_and_slots_are_booked_by_what_took_the_time() -> None:
    measures = Measures()
    measures.engine_called("docker", "run", 0.3, succeeded=True)
    measures.engine_called("docker", "run", 60.0, succeeded=False)
    recipe = Recipe(
        template="mine",
        engine="docker",
        image="i",
        user=User(uid=1, gid=1),
        keep_id=False,
        network=Network.NONE,
        nofile_max=1,
        tmp_bytes_max=None,
        shm_bytes_max=None,
    )
    measures.slot_ready(recipe, 0.4)
    found = figures(measures)
    assert found["sandboxd_engine_call_seconds"].value("_count", engine="docker", verb="run") == 2
    assert found["sandboxd_engine_call_failures"].value("_total", engine="docker", verb="run") == 1
    assert found["sandboxd_pool_ready_seconds"].value("_count", template="mine", engine="docker") == 1


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", None),
        ("unix:/run/m.sock", "/run/m.sock"),
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
    ],
)
def test_metrics_are_served_where_an_address_is_given(text: str, where: object) -> None:
    assert metrics_address(text) == where


@pytest.mark.parametrize("text", ["9464", ":9464", "localhost:9464", "unix:m.sock", "/run/m.sock", "127.0.0.1:99999"])
def test_metrics_are_served_nowhere_by_mistake(text: str) -> None:
    """A name may lead anywhere, and a port alone would be open to all."""
    with pytest.raises(msgspec.ValidationError):
        metrics_address(text)
