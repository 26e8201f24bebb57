"""What the engines' clients are told: nothing that is asked for is lost, nothing that hardens is left out."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes import argv
from runtimes.argv import Client
from runtimes.errors import ContainerNotFound, Unsupported
from runtimes.model import (
    CONTAINER_NAME_PREFIX,
    LABEL_NOTE,
    LABEL_OWNER,
    LABEL_SANDBOX,
    ContainerSpec,
    EngineName,
    Happening,
    Limits,
    Mount,
    Network,
    OverlayDirs,
    Tmpfs,
    User,
)

DOCKER = Client(engine=EngineName.DOCKER, program="docker", global_flags=("--host=unix:///s",))
PODMAN = Client(
    engine=EngineName.PODMAN, program="podman", global_flags=("--runtime=runc",), nofile_max=20000, nproc_max=32768
)
CLIENTS = [DOCKER, PODMAN]
ID = "0123456789abcdef" * 4

HARDENING = {
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--security-opt=seccomp=/etc/seccomp.json",
    "--pull=never",
    "--log-driver=none",
    "--no-healthcheck",
}
NEVER = ("--privileged", "--cap-add", "--volume", "-v", "--device", "--pid", "--ipc", "--rm", ":Z", "--publish", "-p")

every_client = pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.engine.value)


def spec(**fields: object) -> ContainerSpec:
    given_: dict[str, object] = {
        "sandbox_id": "s1",
        "owner": "o1",
        "image": "localhost/image:1",
        "command": ("/init", "--flag"),
        "user": User(uid=1000, gid=1001),
        "seccomp_profile": "/etc/seccomp.json",
    }
    return ContainerSpec(**{**given_, **fields})  # type: ignore[arg-type]


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
path = text.filter(lambda tail: "\r\n" not in tail).map(lambda tail: f"/{tail}")
positive = st.integers(min_value=1, max_value=2**50)
limits = st.builds(
    Limits,
    memory_bytes_max=st.none() | positive,
    cpu_millis=st.none() | st.integers(1, 8_192_000),
    pids_max=st.none() | positive,
    cpuset_cpus=st.none() | st.sets(st.integers(0, 8191), min_size=1, max_size=6).map(lambda s: tuple(sorted(s))),
    shm_bytes_max=st.none() | positive,
    nofile_max=st.none() | positive,
)
specs = st.builds(
    spec,
    limits=limits,
    mounts=st.lists(st.builds(Mount, source=path, target=path, read_only=st.booleans()), max_size=3).map(tuple),
    tmpfs=st.lists(
        st.builds(
            Tmpfs, target=path.filter(lambda p: ":" not in p), size_bytes_max=positive, executable=st.booleans()
        ),
        max_size=2,
    ).map(tuple),
    command=st.tuples(path, text),
    network=st.sampled_from(Network),
    selinux_disable=st.booleans(),
)


def split(client: Client, words: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a ``run``, and what follows the image."""
    image = words.index("localhost/image:1")
    return words[1 + len(client.global_flags) + 1 : image], words[image + 1 :]


def values(flags: list[str], name: str) -> list[str]:
    joined = [flag.split("=", 1)[1] for flag in flags if flag.startswith(f"{name}=")]
    return joined + [value for flag, value in itertools.pairwise(flags) if flag == name]


@every_client
@given(spec=specs)
def test_hardening_is_in_every_run_whatever_is_asked_for(client: Client, spec: ContainerSpec) -> None:
    words = argv.run_argv(client, spec)
    flags, after = split(client, words)
    assert set(flags) >= HARDENING | {"--user=1000:1001"}
    assert not [flag for flag in flags if flag.startswith(NEVER) and not flag.startswith(("--pids", "--pull"))]
    assert words[: 2 + len(client.global_flags)] == [client.program, *client.global_flags, "run"]
    assert (values(flags, "--entrypoint"), after) == ([spec.command[0]], list(spec.command[1:]))


@every_client
def test_only_docker_is_not_told_that_a_mount_is_read_only_which_is_so_already(client: Client) -> None:
    """Its runtime would take off nosuid and nodev; Podman's would make what it is told nothing of writable."""
    told = {
        sealed: argv._mount(client, Mount(source="/a", target="/b", read_only=True, sealed=sealed))
        for sealed in (True, False)
    }
    assert "readonly" in told[False]
    assert ("readonly" in told[True]) == (client.engine is EngineName.PODMAN)


@every_client
@given(spec=specs)
def test_every_limit_that_is_asked_for_reaches_the_engine(client: Client, spec: ContainerSpec) -> None:
    flags, _ = split(client, argv.run_argv(client, spec))
    limits = spec.limits
    told = {
        "memory_bytes_max": values(flags, "--memory"),
        "cpu_millis": [str(round(float(value) * 1000)) for value in values(flags, "--cpus")],
        "pids_max": values(flags, "--pids-limit"),
        "shm_bytes_max": values(flags, "--shm-size"),
    }
    for field, found in told.items():
        asked = getattr(limits, field)
        assert found == ([] if asked is None else [str(asked)]), field
    assert values(flags, "--memory-swap") == told["memory_bytes_max"], "or Podman allows as much swap again"
    cpus = limits.cpuset_cpus
    assert values(flags, "--cpuset-cpus") == ([] if cpus is None else [",".join(map(str, cpus))])
    nofile = client.nofile_max if limits.nofile_max is None else limits.nofile_max
    ulimits = [value for value in values(flags, "--ulimit") if value.startswith("nofile")]
    assert ulimits == ([] if nofile is None else [f"nofile={nofile}:{nofile}"])


def test_no_limit_field_is_forgotten_when_one_is_added() -> None:
    """The test above names each field; a new one must be added there."""
    assert set(Limits.__struct_fields__) == {
        "memory_bytes_max",
        "cpu_millis",
        "pids_max",
        "cpuset_cpus",
        "shm_bytes_max",
        "nofile_max",
    }


@every_client
@given(spec=specs)
def test_mounts_read_back_as_they_were_given(client: Client, spec: ContainerSpec) -> None:
    """Read with a CSV reader, as both engines do."""
    flags, _ = split(client, argv.run_argv(client, spec))
    read = []
    for value in values(flags, "--mount"):
        (row,) = csv.reader(io.StringIO(value, newline=""), strict=True)
        fields = dict(field.partition("=")[::2] for field in row)
        assert fields.pop("type") == "bind"
        read.append(Mount(source=fields["src"], target=fields["dst"], read_only="readonly" in fields))
    assert tuple(read) == spec.mounts


@every_client
@given(spec=specs)
def test_identity_arrives_and_no_value_of_the_environment_does(client: Client, spec: ContainerSpec) -> None:
    flags, _ = split(client, argv.run_argv(client, spec))
    assert values(flags, "--label") == [f"{LABEL_SANDBOX}=s1", f"{LABEL_OWNER}=o1", f"{LABEL_NOTE}="]
    assert values(flags, "--name") == [f"{CONTAINER_NAME_PREFIX}s1"]
    assert [value for value in values(flags, "--env") if "=" in value] == []


@every_client
def test_a_client_of_an_owner_can_be_told_among_all_processes(client: Client) -> None:
    """``runtimes.clients`` looks for this very argument after a crash."""
    assert argv.owner_label_argument("o1") in argv.run_argv(client, spec())
    assert argv.owner_label_argument("o2") not in argv.run_argv(client, spec())
    with pytest.raises(Unsupported):
        argv.owner_label_argument("")


@every_client
def test_network_none_is_said_and_full_is_the_engines_default(client: Client) -> None:
    none, _ = split(client, argv.run_argv(client, spec()))
    full, _ = split(client, argv.run_argv(client, spec(network=Network.FULL)))
    assert values(none, "--network") == ["none"]
    assert values(full, "--network") == []


def test_what_only_podman_needs_is_told_to_podman_alone() -> None:
    flags, _ = split(PODMAN, argv.run_argv(PODMAN, spec(keep_id=True, nproc_max=100_000)))
    assert set(flags) >= {"--read-only-tmpfs=false", "--systemd=false", "--http-proxy=false", "--userns=keep-id"}
    assert set(values(flags, "--ulimit")) == {"core=0:0", "nofile=20000:20000", "nproc=32768:32768"}
    flags, _ = split(DOCKER, argv.run_argv(DOCKER, spec()))
    assert values(flags, "--ulimit") == ["core=0:0"]
    with pytest.raises(Unsupported):
        argv.run_argv(DOCKER, spec(keep_id=True))


@every_client
def test_selinux_is_left_alone_unless_it_is_switched_off(client: Client) -> None:
    assert "--security-opt=label=disable" not in argv.run_argv(client, spec())
    assert "--security-opt=label=disable" in argv.run_argv(client, spec(selinux_disable=True))


@every_client
@pytest.mark.parametrize(
    "fields",
    [
        {"sandbox_id": ""},
        {"sandbox_id": "-x"},
        {"sandbox_id": "a b"},
        {"owner": ""},
        {"owner": "a=b"},
        {"image": ""},
        {"image": "--privileged"},
        {"image": "a b"},
        {"command": ()},
        {"command": ("relative",)},
        {"command": ("/init", "a\0b")},
        {"command": ("/init", "\udcff")},
        {"hostname": "\0"},
        {"working_dir": "relative"},
        {"seccomp_profile": "unconfined"},
        {"mounts": (Mount(source="relative", target="/a"),)},
        {"mounts": (Mount(source="/a", target="relative"),)},
        {"mounts": (Mount(source="/a\r\nb", target="/a"),)},
        {"mounts": (Mount(source="/a", target="/a\r\nb"),)},
        {"mounts": (Mount(source="/\udcff", target="/a"),)},
        {"tmpfs": (Tmpfs(target="/a:b", size_bytes_max=1),)},
        {"tmpfs": (Tmpfs(target="a", size_bytes_max=1),)},
        {"limits": Limits(memory_bytes_max=0)},
        {"limits": Limits(cpu_millis=-1)},
        {"limits": Limits(pids_max=-1)},
        {"limits": Limits(cpuset_cpus=())},
    ],
    ids=repr,
)
def test_what_an_engine_would_misread_is_refused(client: Client, fields: dict[str, object]) -> None:
    with pytest.raises(Unsupported):
        argv.run_argv(client, spec(**fields))


@every_client
@pytest.mark.parametrize("assignment", [("", "x"), ("A=B", "x"), (" A", "x"), ("TOKEN", "secret\0")])
def test_an_environment_that_would_be_misread_is_refused_and_not_quoted(
    client: Client, assignment: tuple[str, str]
) -> None:
    """A refusal stands in logs, and the value may be a secret."""
    with pytest.raises(Unsupported) as refusal:
        argv.exec_argv(client, ID, ["/bin/true"], user="0", env=(assignment,), working_dir="/")
    assert "secret" not in str(refusal.value)


@every_client
@pytest.mark.parametrize("wrong", ["", "abc", ID[:-1], ID.upper(), f"{ID}\n", "--all"])
def test_only_a_full_id_reaches_the_engine(client: Client, wrong: str) -> None:
    """A short id or a name can mean a container that is not ours."""
    builds: list[Callable[[], list[str]]] = [
        lambda: argv.start_argv(client, wrong),
        lambda: argv.stop_argv(client, wrong, grace_s=1),
        lambda: argv.remove_argv(client, [ID, wrong]),
        lambda: argv.inspect_argv(client, wrong),
        lambda: argv.find_argv(client, wrong),
        lambda: argv.update_argv(client, wrong, Limits(pids_max=1)),
        lambda: argv.exec_argv(client, wrong, ["/bin/true"], user="0", env=(), working_dir="/"),
    ]
    for build in builds:
        with pytest.raises(ContainerNotFound):
            build()


@every_client
def test_containers_are_listed_by_exact_label(client: Client) -> None:
    words = argv.list_argv(client, owner="o1", sandbox_id="s1")
    assert set(words) >= {
        "--all",
        "--no-trunc",
        f"--filter=label={LABEL_OWNER}=o1",
        f"--filter=label={LABEL_SANDBOX}=s1",
    }
    with pytest.raises(Unsupported):
        argv.list_argv(client, owner="")


@every_client
def test_only_what_happens_to_our_containers_is_followed(client: Client) -> None:
    """By label: another daemon's events are none of ours, and each line costs."""
    words = argv.events_argv(client, owner="me")
    assert f"--filter=label={LABEL_OWNER}=me" in words
    assert argv.events_filter_argument("me") in words
    assert "--filter=type=container" in words
    assert len([word for word in words if word.startswith("--filter=event=")]) == len(Happening)


@every_client
@given(asked=limits)
def test_update_speaks_only_of_what_is_asked(client: Client, asked: Limits) -> None:
    cgroup = msgspec.structs.replace(asked, shm_bytes_max=None, nofile_max=None)
    words = argv.update_argv(client, ID, cgroup)
    assert (words[-1], "update" in words) == (ID, True)
    flags = sum(value is not None for value in msgspec.structs.asdict(cgroup).values())
    flags += cgroup.memory_bytes_max is not None
    assert len(words) == 1 + len(client.global_flags) + 1 + flags + 1


@every_client
def test_exec_passes_the_command_untouched(client: Client) -> None:
    command = ["/bin/sh", "-c", "echo --user=0 $X"]
    words = argv.exec_argv(client, ID, command, user="0:0", env=(("A", "b=c"),), working_dir="/w")
    assert words[-4:] == [ID, *command]
    assert set(words) >= {"--interactive", "--user=0:0", "--workdir=/w", "--env=A=b=c"}


def test_files_of_an_engines_own_users_are_removed_in_its_namespace() -> None:
    """Nobody else may, not even their sandbox's owner; and only Podman lets others in."""
    words = ["unshare", "rm", "-rf", "--one-file-system", "--", "/state/work"]
    assert argv.remove_tree_argv(PODMAN, "/state/work")[-6:] == words
    with pytest.raises(Unsupported):
        argv.remove_tree_argv(DOCKER, "/state/work")
    with pytest.raises(Unsupported):
        argv.remove_tree_argv(PODMAN, "relative")


def test_an_overlay_is_podmans_own_and_its_paths_are_written_as_they_are() -> None:
    """The flag has no quotes: what would end a field early is refused, and Docker has no such flag."""
    dirs = OverlayDirs(upper="/s/upper", work="/s/work")

    def over(source: str) -> ContainerSpec:
        return spec(mounts=(Mount(source=source, target="/workspace", overlay=dirs),))

    assert "--volume=/p q:/workspace:O,upperdir=/s/upper,workdir=/s/work" in argv.run_argv(PODMAN, over("/p q"))
    with pytest.raises(Unsupported):
        argv.run_argv(DOCKER, over("/p"))
    for source in ("/a:b", "/a,b", "/a\\b"):
        with pytest.raises(Unsupported):
            argv.run_argv(PODMAN, over(source))


def test_containers_go_into_a_slice_where_there_is_one_to_be_had() -> None:
    """And elsewhere nothing is said about it: an engine with cgroupfs takes no slice."""
    assert not [word for word in argv.run_argv(PODMAN, spec()) if word.startswith("--cgroup-parent")]
    inside = msgspec.structs.replace(PODMAN, cgroup_parent="sandboxd.slice")
    assert values(split(inside, argv.run_argv(inside, spec()))[0], "--cgroup-parent") == ["sandboxd.slice"]
