"""Answers of the engines: read right when they are right, refused when they are not, whatever they are."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtimes import parse
from runtimes.errors import UnreadableAnswer
from runtimes.model import (
    LABEL_OWNER,
    LABEL_SANDBOX,
    ContainerEvent,
    ContainerState,
    ContainerSummary,
    EngineName,
    Happening,
    Limits,
)

ID = "0123456789abcdef" * 4
IMAGE = "fedcba9876543210" * 4
every_engine = pytest.mark.parametrize("engine", list(EngineName))


def docker_row(*fields: str) -> bytes:
    return json.dumps(fields).encode()


def podman_row(container_id: str, state: str, labels: dict[str, str] | None, name: str = "x") -> dict[str, Any]:
    return {"Id": container_id, "State": state, "Labels": labels, "Mounts": ["/tmp"], "Pid": 1, "Names": [name]}


def listed(engine: EngineName, state: str, sandbox: str, owner: str, name: str = "sandboxd-s1") -> bytes:
    if engine is EngineName.DOCKER:
        return docker_row(ID, state, sandbox, owner, name) + b"\n"
    labels = {name: value for name, value in ((LABEL_SANDBOX, sandbox), (LABEL_OWNER, owner)) if value}
    return json.dumps([podman_row(ID, state, labels, name)]).encode()


def inspected(**changes: Any) -> bytes:
    """What both engines' inspect has in common."""
    container: dict[str, Any] = {
        "Id": ID,
        "State": {"Status": "running", "Pid": 42, "ExitCode": 0, "OOMKilled": False},
        "Image": f"sha256:{IMAGE}",
        "HostConfig": {"Memory": 67108864, "NanoCpus": 500000000, "PidsLimit": 32, "CpusetCpus": "0-1,3"},
        "Config": {"Labels": {LABEL_SANDBOX: "s1", LABEL_OWNER: "o1", "x": "y"}},
    }
    return json.dumps([{**container, **changes}]).encode()


@every_engine
@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("created", ContainerState.CREATED),
        ("configured", ContainerState.CREATED),
        ("initialized", ContainerState.CREATED),
        ("running", ContainerState.RUNNING),
        ("Running", ContainerState.RUNNING),
        ("paused", ContainerState.PAUSED),
        ("exited", ContainerState.EXITED),
        ("stopped", ContainerState.EXITED),
        ("dead", ContainerState.OTHER),
        ("removing", ContainerState.OTHER),
        ("a word of tomorrow", ContainerState.OTHER),
    ],
)
def test_both_engines_words_become_one_vocabulary(engine: EngineName, word: str, state: ContainerState) -> None:
    assert parse.containers(engine, listed(engine, word, "s1", "o1")) == [
        ContainerSummary(container_id=ID, sandbox_id="s1", owner="o1", state=state)
    ]


@every_engine
@pytest.mark.parametrize("name", ["mine", "sandboxd-s2", "sandboxd-s11", ""])
def test_labels_that_came_with_an_image_are_told_from_our_own(engine: EngineName, name: str) -> None:
    """Whoever commits a sandbox and runs the image has a container with our labels, and it is not ours."""
    (row,) = parse.containers(engine, listed(engine, "running", "s1", "o1", name))
    assert not row.named_by_us


@every_engine
@pytest.mark.parametrize(("sandbox", "owner"), [("", "o1"), ("s1", ""), ("", "")])
def test_a_container_without_both_labels_is_not_ours(engine: EngineName, sandbox: str, owner: str) -> None:
    assert parse.containers(engine, listed(engine, "running", sandbox, owner)) == []


@pytest.mark.parametrize(
    ("engine", "answer"),
    [
        (EngineName.DOCKER, b""),
        (EngineName.DOCKER, b"\n"),
        (EngineName.PODMAN, b"[]"),
        (EngineName.PODMAN, b"null"),
        (EngineName.PODMAN, json.dumps([podman_row(ID, "running", None)]).encode()),
    ],
)
def test_an_empty_list_is_empty(engine: EngineName, answer: bytes) -> None:
    assert parse.containers(engine, answer) == []


@pytest.mark.parametrize(
    ("engine", "answer"),
    [
        (EngineName.DOCKER, b"CONTAINER ID   IMAGE"),
        (EngineName.DOCKER, docker_row(ID[:12], "running", "s1", "o1")),
        (EngineName.DOCKER, docker_row(ID, "running", "s1")),
        (EngineName.PODMAN, b""),
        (EngineName.PODMAN, b"{}"),
        (EngineName.PODMAN, b'[{"Id": "x", "State": "running"}]'),
        (EngineName.PODMAN, json.dumps([podman_row(ID, "running", {LABEL_OWNER: 7})]).encode()),  # type: ignore[dict-item]
    ],
)
def test_a_list_of_another_shape_is_refused(engine: EngineName, answer: bytes) -> None:
    """Half-read, it would make the daemon forget containers, or take over others."""
    with pytest.raises(UnreadableAnswer):
        parse.containers(engine, answer)


def test_inspect_is_reduced_to_what_is_asked_of_it() -> None:
    facts = parse.container_facts(inspected())
    assert (facts.container_id, facts.sandbox_id, facts.owner) == (ID, "s1", "o1")
    assert (facts.state, facts.pid, facts.exit_code, facts.oom_killed) == (ContainerState.RUNNING, 42, None, False)
    assert facts.image_id == IMAGE
    assert facts.limits == Limits(memory_bytes_max=67108864, cpu_millis=500, pids_max=32, cpuset_cpus=(0, 1, 3))


def test_the_exit_code_is_that_of_an_ended_container_only() -> None:
    ended = {"Status": "exited", "Pid": 0, "ExitCode": 137, "OOMKilled": True}
    facts = parse.container_facts(inspected(State=ended, Image=IMAGE))
    assert (facts.pid, facts.exit_code, facts.oom_killed, facts.image_id) == (None, 137, True, IMAGE)
    assert parse.container_facts(inspected(State={**ended, "Status": "running"})).exit_code is None


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        ({}, Limits()),
        ({"Memory": 0, "PidsLimit": None, "NanoCpus": 0, "CpusetCpus": "", "Ulimits": None}, Limits()),
        ({"PidsLimit": -1, "Memory": -1, "CpuQuota": -1}, Limits()),
        ({"CpuQuota": 50000, "CpuPeriod": 100000}, Limits(cpu_millis=500)),
        ({"CpuQuota": 50000, "CpuPeriod": 0}, Limits(cpu_millis=500)),
        ({"NanoCpus": 1, "CpuQuota": 50000}, Limits(cpu_millis=0)),
        ({"ShmSize": 65536}, Limits(shm_bytes_max=65536)),
        ({"Ulimits": [{"Name": "nofile", "Soft": 1, "Hard": 9}]}, Limits(nofile_max=9)),
        (
            {"Ulimits": [{"Name": "RLIMIT_NPROC", "Hard": 3}, {"Name": "RLIMIT_NOFILE", "Hard": 9}]},
            Limits(nofile_max=9),
        ),
    ],
)
def test_limits_are_read_in_both_engines_words(config: dict[str, Any], limits: Limits) -> None:
    assert parse.container_facts(inspected(HostConfig=config)).limits == limits


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b"[{}]",
        b"\xff\xfe",
        b"[" * 100_000,
        inspected(Id="short"),
        inspected(Image="latest"),
        inspected(State={"Status": "running", "Pid": -1}),
        inspected(State={"Status": "running", "Pid": 2**40}),
        inspected(State={"Status": "running", "Pid": "1"}),
        inspected(HostConfig={"Memory": 10**30}),
        inspected(HostConfig={"CpusetCpus": "0-99999999999"}),
        inspected(HostConfig={"CpusetCpus": "3-1"}),
        inspected(Config={"Labels": {LABEL_OWNER: ["list"]}}),
    ],
)
def test_an_inspect_of_another_shape_is_refused(answer: bytes) -> None:
    with pytest.raises(UnreadableAnswer) as refusal:
        parse.container_facts(answer)
    assert len(refusal.value.detail) <= parse.ERROR_CHARS_MAX


def test_two_containers_are_no_answer_to_a_question_about_one() -> None:
    (one,) = json.loads(inspected())
    with pytest.raises(UnreadableAnswer):
        parse.container_facts(json.dumps([one, one]).encode())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("Id", "State", "Status", "Pid", "Labels", "HostConfig", "Config", "Image", "Memory", "host"),
                    *("id", "status", "Type", "Action", "Actor", "Attributes", "ID", "Name", "Endpoints", "docker"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
answers = st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode())


@given(answer=answers)
@example(answer=b'["' + ID.encode() + b'", "x", "y", "z"]')
def test_no_answer_whatever_raises_anything_else(answer: bytes) -> None:
    """The engine's client is another program: its output is untrusted."""
    for engine in EngineName:
        for read_rows in (parse.containers, parse.container_event):
            with contextlib.suppress(UnreadableAnswer):
                read_rows(engine, answer)
    readers = (parse.container_facts, parse.container_id, parse.docker_info, parse.chooses_context, parse.podman_info)
    for read in readers:
        with contextlib.suppress(UnreadableAnswer):
            read(answer)
    for read_text in (parse.image_id, parse.version):
        with contextlib.suppress(UnreadableAnswer):
            read_text(answer.decode(errors="replace"))
    assert len(parse.complaint(answer)) <= parse.ERROR_CHARS_MAX


@pytest.mark.parametrize("answer", [f"{ID}\n", f"a warning\n{ID}\n", f"  {ID}  "])
def test_a_new_containers_id_is_the_last_word(answer: str) -> None:
    assert parse.container_id(answer.encode()) == ID


@pytest.mark.parametrize("answer", ["", "\n", ID[:-1], f"{ID}0", f"{ID} done", ID.upper()])
def test_anything_but_an_id_is_refused(answer: str) -> None:
    with pytest.raises(UnreadableAnswer):
        parse.container_id(answer.encode())


@pytest.mark.parametrize("text", [IMAGE, f"sha256:{IMAGE}", f"sha256:{IMAGE}\n"])
def test_an_images_id_is_the_same_from_both_engines(text: str) -> None:
    assert parse.image_id(text) == IMAGE


def test_a_complaint_keeps_what_says_why() -> None:
    stderr = (
        b'time="2030-01-01T00:00:00Z" level=warning msg="Resource limits are not supported and ignored"\n'
        b"\x1b[31mError:\x1b[0m no\r\n\x1b]0;title\x07such \x00thing\n\n"
        b"Run 'docker run --help' for more information\n"
    )
    assert parse.complaint(stderr) == "Error: no\nsuch thing"


@given(stderr=st.binary(max_size=3000))
def test_a_complaint_is_bounded_and_cannot_speak_to_a_terminal(stderr: bytes) -> None:
    said = parse.complaint(stderr)
    assert len(said) <= parse.ERROR_CHARS_MAX
    assert said.count("\n") < parse.ERROR_LINES_MAX
    assert not [character for character in said if ord(character) < 32 and character not in "\n\t"]
    assert "\x1b" not in said
    assert "\x9b" not in said


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("4.3.1", (4, 3)), ("v5.10.0-dev", (5, 10)), ("20.10.24+dfsg1", (20, 10)), ("", (0, 0)), ("unknown", (0, 0))],
)
def test_versions_compare_as_numbers(text: str, numbers: tuple[int, int]) -> None:
    assert parse.version(text) == numbers


def happened(engine: EngineName, word: str, container_id: str = ID) -> bytes:
    if engine is EngineName.DOCKER:
        return json.dumps([container_id, word]).encode()
    return json.dumps({"ID": container_id, "Status": word, "Type": "container", "Attributes": {}}).encode()


@every_engine
def test_both_engines_say_in_their_words_what_happened(engine: EngineName) -> None:
    """And what is of no interest is no event."""
    words = {
        EngineName.DOCKER: ("start", "die", "pause", "unpause", "destroy"),
        EngineName.PODMAN: ("start", "died", "pause", "unpause", "remove"),
    }[engine]
    found = [parse.container_event(engine, happened(engine, word)) for word in words]
    assert found == [ContainerEvent(container_id=ID, happening=happening) for happening in Happening]
    assert parse.container_event(engine, happened(engine, "exec_die")) is None


@every_engine
@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b"[1,2]", b"\xff", b"[" * 5000])
def test_an_event_that_is_none_is_refused(engine: EngineName, line: bytes) -> None:
    """An engine's word is untrusted like any other."""
    with pytest.raises(UnreadableAnswer):
        parse.container_event(engine, line)
    with pytest.raises(UnreadableAnswer):
        parse.container_event(engine, happened(engine, "start", "../../x"))
