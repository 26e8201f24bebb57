"""What the engines' clients are told: a specification in, an argument vector out. Docker and Podman side by side.

Pure. Sizes are exact integers, paths are quoted for the reader that will read them, and what an engine's
command line cannot express is refused with ``Unsupported``, never bent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import assert_never

import msgspec

from runtimes.errors import ContainerNotFound, Unsupported
from runtimes.model import (
    CONTAINER_NAME_PREFIX,
    CPU_MILLIS_PER_CPU,
    LABEL_NOTE,
    LABEL_OWNER,
    LABEL_SANDBOX,
    ContainerSpec,
    EngineName,
    Limits,
    Mount,
    Network,
    Tmpfs,
    User,
)

PROXY_VARIABLES = (
    "ALL_PROXY",
    "FTP_PROXY",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "all_proxy",
    "ftp_proxy",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
"""Docker's client copies these from the user's configuration into every container, passwords in URLs included.
A bare ``--env NAME`` that its own environment does not hold keeps one out."""

_IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_IMAGE_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:@+-]{0,511}")

_DOCKER_ROW = (
    f"[{{{{json .ID}}}},{{{{json .State}}}},"
    f'{{{{json (.Label "{LABEL_SANDBOX}")}}}},{{{{json (.Label "{LABEL_OWNER}")}}}},{{{{json .Names}}}}]'
)


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine's client is called on this host."""

    engine: EngineName
    program: str
    global_flags: tuple[str, ...] = ()
    """Before the verb: which OCI runtime, which cgroup manager, which socket."""
    nofile_max: int | None = None
    """Given where a specification gives none: the engine's own default is above the host's hard limit."""
    nproc_max: int | None = None
    """The same, and the most that can be given."""
    pids_uncounted: bool = False
    """No container's processes can be limited, and the engine must be told so: it has a default of its own."""
    cgroup_parent: str | None = None
    """The slice that containers are put into; None: the engine's own choice."""
    update_flags: tuple[str, ...] = ()
    """What ``update`` must be told beside the limits."""

    def call(self, *words: str) -> list[str]:
        """Argv of one call: program, global flags and ``words``."""
        return [self.program, *self.global_flags, *words]


def run_argv(client: Client, spec: ContainerSpec) -> list[str]:
    """Create and start, detached.

    Raises:
        Unsupported: the engine's command line cannot express something in ``spec``.
    """
    _refuse_inexpressible(spec)
    entrypoint, *arguments = spec.command
    return client.call(
        "run",
        "--detach",
        "--pull=never",
        "--log-driver=none",
        "--no-healthcheck",
        *_identity_flags(spec),
        *_hardening_flags(client, spec),
        *_limit_flags(client, spec),
        *([] if client.cgroup_parent is None else [f"--cgroup-parent={client.cgroup_parent}"]),
        *_environment_flags(client),
        *(flag for mount in spec.mounts for flag in _mount_flags(client, mount)),
        *(flag for tmpfs in spec.tmpfs for flag in ("--tmpfs", _tmpfs(client, spec.user, tmpfs))),
        *_network_flags(spec.network),
        f"--hostname={spec.hostname}",
        f"--workdir={spec.working_dir}",
        f"--entrypoint={entrypoint}",
        image_reference(spec.image),
        *arguments,
    )


def owner_label_argument(owner: str) -> str:
    """The argument of ``run_argv`` that names the owner, by which its clients are told from all other processes."""
    return f"--label={LABEL_OWNER}={_identity(owner)}"


def start_argv(client: Client, container_id: str) -> list[str]:
    """Start a stopped container."""
    return client.call("start", _container(container_id))


def stop_argv(client: Client, container_id: str, *, grace_s: int) -> list[str]:
    """TERM, then KILL."""
    return client.call("stop", "-t", str(grace_s), _container(container_id))


def pause_argv(client: Client, container_id: str) -> list[str]:
    """Freeze."""
    return client.call("pause", _container(container_id))


def resume_argv(client: Client, container_id: str) -> list[str]:
    """Let go on."""
    return client.call("unpause", _container(container_id))


def remove_argv(client: Client, container_ids: Sequence[str]) -> list[str]:
    """Kill and remove, anonymous volumes included. A container that is not there is no failure."""
    match client.engine:
        case EngineName.DOCKER:
            at_once: tuple[str, ...] = ()
        case EngineName.PODMAN:
            # Without it Podman sends TERM and waits ten seconds; Docker's rm kills in any case.
            at_once = ("--time=0",)
        case _:
            assert_never(client.engine)
    return client.call("rm", "--force", "--volumes", *at_once, *map(_container, container_ids))


def list_argv(client: Client, *, owner: str, sandbox_id: str | None = None) -> list[str]:
    """The containers with this owner, and with this sandbox id where one is given."""
    filters = [f"--filter=label={LABEL_OWNER}={_identity(owner)}"]
    if sandbox_id is not None:
        filters.append(f"--filter=label={LABEL_SANDBOX}={_identity(sandbox_id)}")
    return client.call("ps", "--all", "--no-trunc", *filters, f"--format={_row_format(client)}")


def find_argv(client: Client, container_id: str) -> list[str]:
    """Print the id of this container, or nothing when there is none: exit status 0 either way."""
    return client.call("ps", "--all", "--no-trunc", "--quiet", f"--filter=id={_container(container_id)}")


_EVENTS = {
    EngineName.DOCKER: ("start", "die", "pause", "unpause", "destroy"),
    EngineName.PODMAN: ("start", "died", "pause", "unpause", "remove"),
}
"""Those that ``parse.container_event`` knows."""


def events_argv(client: Client, *, owner: str) -> list[str]:
    """Print what happens to the containers of this owner from now on, one JSON value per line, until it is ended."""
    match client.engine:
        case EngineName.DOCKER:
            row = "[{{json .Actor.ID}},{{json .Action}}]"
        case EngineName.PODMAN:
            row = "json"
        case _:
            assert_never(client.engine)
    filters = (f"--filter=event={event}" for event in _EVENTS[client.engine])
    return client.call(
        "events", "--filter=type=container", events_filter_argument(owner), *filters, f"--format={row}"
    )


def events_filter_argument(owner: str) -> str:
    """The argument of ``events_argv`` that names the owner, by which it is told from all other processes."""
    return f"--filter=label={LABEL_OWNER}={_identity(owner)}"


def inspect_argv(client: Client, container_id: str) -> list[str]:
    """Print a JSON list of one container."""
    return client.call("container", "inspect", _container(container_id))


def update_argv(client: Client, container_id: str, limits: Limits) -> list[str]:
    """Change the limits that are given here. Memory and swap always go together.

    On v1 the kernel refuses memory above memory-and-swap, so an engine that is told only one of them fails.
    """
    return client.call("update", *client.update_flags, *_cgroup_flags(limits), _container(container_id))


def connect_argv(client: Client, container_id: str) -> list[str]:
    """Give the engine's default network."""
    return client.call("network", "connect", _default_network(client), _container(container_id))


def disconnect_argv(client: Client, container_id: str, *, network: str | None = None) -> list[str]:
    """Take a network, by default the engine's own."""
    return client.call("network", "disconnect", network or _default_network(client), _container(container_id))


def exec_argv(
    client: Client,
    container_id: str,
    argv: Sequence[str],
    *,
    user: str,
    env: Sequence[tuple[str, str]],
    working_dir: str,
) -> list[str]:
    """Run a command in a running container, its stdin passed on."""
    for word in (*argv, user, working_dir):
        _words(word, "an argument")
    return client.call(
        "exec",
        "--interactive",
        f"--user={user}",
        f"--workdir={working_dir}",
        *(f"--env={_assignment(name, value)}" for name, value in env),
        _container(container_id),
        *argv,
    )


def image_id_argv(client: Client, reference: str) -> list[str]:
    """Prints the id of an image that the engine holds; fails when it holds none."""
    return client.call("image", "inspect", "--format={{.Id}}", image_reference(reference))


def remove_tree_argv(client: Client, directory: str) -> list[str]:
    """Remove a directory of the host with what is in it, as root of the engine's user namespace.

    Raises:
        Unsupported: the engine has no such namespace that others may enter.
    """
    host_path(directory)
    match client.engine:
        case EngineName.DOCKER:
            raise Unsupported("cannot remove files of Docker's users")
        case EngineName.PODMAN:
            return client.call("unshare", "rm", "-rf", "--one-file-system", "--", directory)
        case _:
            assert_never(client.engine)


def ping_argv(client: Client) -> list[str]:
    """The cheapest call that the engine itself must answer."""
    match client.engine:
        case EngineName.DOCKER:
            return client.call("version", "--format={{.Server.Version}}")
        case EngineName.PODMAN:
            # `podman version` asks nobody; a list opens the storage and its locks.
            return client.call("ps", "--quiet", "--last=1")
        case _:
            assert_never(client.engine)


def _default_network(client: Client) -> str:
    match client.engine:
        case EngineName.DOCKER:
            return "bridge"
        case EngineName.PODMAN:
            return "podman"
        case _:
            assert_never(client.engine)


def _row_format(client: Client) -> str:
    match client.engine:
        case EngineName.DOCKER:
            return _DOCKER_ROW
        case EngineName.PODMAN:
            # Podman's template has no .Label, and its .State is a sentence ("Up 3 minutes ago").
            return "json"
        case _:
            assert_never(client.engine)


def _identity_flags(spec: ContainerSpec) -> list[str]:
    return [
        f"--name={CONTAINER_NAME_PREFIX}{spec.sandbox_id}",
        f"--label={LABEL_SANDBOX}={spec.sandbox_id}",
        owner_label_argument(spec.owner),
        # Without a note as well: an image has labels of its own, and theirs would be taken for ours.
        f"--label={LABEL_NOTE}={spec.note}",
    ]


def _hardening_flags(client: Client, spec: ContainerSpec) -> list[str]:
    flags = [
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        # A core file holds whatever its program knew; where the kernel pipes it, it is the host that is given it.
        "--ulimit=core=0:0",
        f"--security-opt=seccomp={spec.seccomp_profile}",
        f"--user={spec.user.uid}:{spec.user.gid}",
    ]
    if spec.selinux_disable:
        flags.append("--security-opt=label=disable")
    match client.engine:
        case EngineName.DOCKER:
            if spec.keep_id:
                raise Unsupported("cannot map the caller's uid to itself with Docker")
        case EngineName.PODMAN:
            # Podman would add its own writable tmpfs mounts to a read-only root, and its systemd mode more.
            # Volumes that an image declares would be writable, and on the host's disk.
            flags += ["--read-only-tmpfs=false", "--systemd=false", "--image-volume=ignore"]
            if spec.keep_id:
                flags.append("--userns=keep-id")
        case _:
            assert_never(client.engine)
    return flags


def _network_flags(network: Network) -> list[str]:
    match network:
        case Network.NONE:
            return ["--network=none"]
        case Network.FULL:
            # Rootful and rootless Podman call their default by different names; saying nothing gives it.
            return []
        case _:
            assert_never(network)


def _limit_flags(client: Client, spec: ContainerSpec) -> list[str]:
    flags = _cgroup_flags(spec.limits)
    if client.pids_uncounted and spec.limits.pids_max is None:
        flags.append("--pids-limit=0")
    if spec.limits.shm_bytes_max is not None:
        flags.append(f"--shm-size={spec.limits.shm_bytes_max}")
    nofile_max = client.nofile_max if spec.limits.nofile_max is None else spec.limits.nofile_max
    if nofile_max is not None:
        flags.append(f"--ulimit=nofile={nofile_max}:{nofile_max}")
    nproc_max = min(filter(None, (client.nproc_max, spec.nproc_max)), default=None)
    if nproc_max is not None:
        flags.append(f"--ulimit=nproc={nproc_max}:{nproc_max}")
    return flags


def _cgroup_flags(limits: Limits) -> list[str]:
    """The limits that a cgroup holds, in the words that ``run`` and ``update`` share."""
    _refuse_unlimited(limits)
    flags: list[str] = []
    if limits.memory_bytes_max is not None:
        flags += [f"--memory={limits.memory_bytes_max}", f"--memory-swap={limits.memory_bytes_max}"]
    if limits.cpu_millis is not None:
        whole, millis = divmod(limits.cpu_millis, CPU_MILLIS_PER_CPU)
        flags.append(f"--cpus={whole}.{millis:03d}")
    if limits.pids_max is not None:
        flags.append(f"--pids-limit={limits.pids_max}")
    if limits.cpuset_cpus is not None:
        flags.append(f"--cpuset-cpus={','.join(map(str, limits.cpuset_cpus))}")
    return flags


def _environment_flags(client: Client) -> list[str]:
    match client.engine:
        case EngineName.DOCKER:
            return [f"--env={name}" for name in PROXY_VARIABLES]
        case EngineName.PODMAN:
            return ["--http-proxy=false"]
        case _:
            assert_never(client.engine)


def _mount_flags(client: Client, mount: Mount) -> list[str]:
    if mount.overlay is None:
        return ["--mount", _mount(client, mount)]
    match client.engine:
        case EngineName.DOCKER:
            raise Unsupported("cannot make an overlay with Docker")
        case EngineName.PODMAN:
            # Only this flag knows overlays, and it has no quotes.
            paths = (mount.source, mount.target, mount.overlay.upper, mount.overlay.work)
            for path in paths:
                host_path(path)
                if any(character in path for character in ":,\\"):
                    raise Unsupported(f"cannot make an overlay of {path!r}", detail="it holds a colon or a comma")
            options = f"O,upperdir={mount.overlay.upper},workdir={mount.overlay.work}"
            return [f"--volume={mount.source}:{mount.target}:{options}"]
        case _:
            assert_never(client.engine)


def _mount(client: Client, mount: Mount) -> str:
    """One ``--mount``: both engines read it with a CSV reader, so any path but one with CR LF can be written.

    ``--volume`` cannot hold a colon. The reader turns CR LF into LF, even between quotes.
    """
    fields = ["type=bind", f"src={mount.source}", f"dst={mount.target}"]
    # Docker's runtime mounts it once more for that, with this and nothing else: nosuid and nodev would be lost.
    # Podman's is told all three, and what it is not told to be read-only it makes writable.
    if mount.read_only and not (mount.sealed and client.engine is EngineName.DOCKER):
        fields.append("readonly")
    if mount.passes_on:
        fields.append("bind-propagation=rslave")
    return ",".join(map(_csv_field, fields))


def _csv_field(field: str) -> str:
    escaped = field.replace('"', '""')
    return f'"{escaped}"'


def _tmpfs(client: Client, user: User, tmpfs: Tmpfs) -> str:
    """One ``--tmpfs``, owned by the user as well as open to all.

    runc before 1.2 puts back the mode that the image's own folder has (0755 for /run, in most), and the user could
    not write there. Ownership stays.
    """
    options = ["rw", f"size={tmpfs.size_bytes_max}", "mode=1777", "nosuid", "nodev"]
    options.append("exec" if tmpfs.executable else "noexec")
    match client.engine:
        case EngineName.DOCKER:
            options += [f"uid={user.uid}", f"gid={user.gid}"]
        case EngineName.PODMAN:
            # U is Podman's word for the user of --user. And Podman alone would fill it with what the image has there.
            options += ["U", "notmpcopyup"]
        case _:
            assert_never(client.engine)
    return f"{tmpfs.target}:{','.join(options)}"


def _refuse_inexpressible(spec: ContainerSpec) -> None:
    _identity(spec.sandbox_id)
    _identity(spec.owner)
    if not spec.command or not spec.command[0].startswith("/"):
        raise Unsupported(f"cannot start {spec.command[:1]!r}", detail="the program must be an absolute path")
    for word in (*spec.command, spec.hostname, spec.note):
        _words(word, "an argument")
    for path in (spec.seccomp_profile, spec.working_dir, *(tmpfs.target for tmpfs in spec.tmpfs)):
        host_path(path)
    for mount in spec.mounts:
        host_path(mount.source)
        host_path(mount.target)
        if "\r\n" in mount.source + "\0" + mount.target:
            raise Unsupported(f"cannot mount {mount.source!r}", detail="the path holds CR LF")
    for tmpfs in spec.tmpfs:
        if ":" in tmpfs.target:
            raise Unsupported(f"cannot mount a tmpfs at {tmpfs.target!r}", detail="the path holds a colon")


def _refuse_unlimited(limits: Limits) -> None:
    """Zero and less, and an empty set, are the engines' words for "no limit": ours is None."""
    for field in limits.__struct_fields__:
        value = getattr(limits, field)
        if value is not None and (value == () if field == "cpuset_cpus" else value <= 0):
            raise Unsupported(f"cannot set {field} to {value!r}")


def _identity(text: str) -> str:
    """Ids stand in names, labels and filters, where an empty one would match every container."""
    if _IDENTITY.fullmatch(text) is None:
        raise Unsupported(f"cannot use {text!r} as an id", detail=f"it must match {_IDENTITY.pattern}")
    return text


def _container(container_id: str) -> str:
    if _CONTAINER_ID.fullmatch(container_id) is None:
        raise ContainerNotFound(f"cannot find a container {container_id!r}", detail="an id has 64 hexadecimal digits")
    return container_id


def image_reference(reference: str) -> str:
    """``reference`` itself.

    Raises:
        Unsupported: it cannot be the name of an image, and might be taken for something else.
    """
    if _IMAGE_REFERENCE.fullmatch(reference) is None:
        raise Unsupported(f"cannot use {reference!r} as the name of an image")
    return reference


def _assignment(name: str, value: str) -> str:
    _words(name + value, "an environment variable")
    if not name or "=" in name or name[0].isspace():
        raise Unsupported(f"cannot set an environment variable named {name!r}")
    return f"{name}={value}"


def host_path(path: str) -> None:
    """Refuse a path that an engine could take for something else.

    Raises:
        Unsupported: it is relative, or cannot be passed on.
    """
    _words(path, "a path")
    if not path.startswith("/"):
        raise Unsupported(f"cannot use the path {path!r}", detail="it must be absolute")


def _words(text: str, what: str) -> None:
    """Engines keep everything as JSON, in UTF-8: a lone byte would come back as another name."""
    if "\0" in text or not _is_utf8(text):
        raise Unsupported(f"cannot pass {what} to the engine", detail="it is not valid UTF-8, or holds a NUL")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
