"""``create ls inspect update verify stop start rm``: sandboxes themselves."""

from __future__ import annotations

import argparse
import sys
import time

from sandboxd.cli import render, verb, wire
from sandboxd.cli.network import add_network_arguments
from sandboxd.cli.session import (
    FAILURE,
    USAGE,
    Interrupted,
    call,
    call_each,
    columns,
    complain,
    connect,
    env_of,
    exit_code_of,
    request,
    say,
    show,
    show_json,
)
from sandboxd.cli.verb import Verb
from sandboxd.client import Connection, RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sandboxd.client import Message


def add_create_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``create`` and ``run`` have in common."""
    parser.add_argument("--name", help="a name of your own for it")
    verb.add_template(parser)
    parser.add_argument(
        "--launch",
        choices=("auto", "warm", "wait", "cold"),
        help="auto: a warm slot if there is one; warm: nothing else; wait: one's turn for it; cold: a new container",
    )
    parser.add_argument("--wait", metavar="TIME", help="with --launch wait: how long at most; default: 30s")
    verb.add_engine(parser)
    parser.add_argument("--image", type=verb.not_empty, metavar="REFERENCE", help="default: the daemon's")
    parser.add_argument(
        *("-w", "--workspace"), type=verb.not_empty, metavar="DIR", help="the project, seen inside at /workspace"
    )
    parser.add_argument(
        "--network",
        choices=("none", "allow", "full"),
        help="default: the daemon's, which is none; allow, where there are rules",
    )
    add_network_arguments(parser)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--ro", dest="mode", action="store_const", const="ro", help="the workspace cannot be written to"
    )
    modes.add_argument(
        "--overlay",
        dest="mode",
        action="store_const",
        const="overlay",
        help="the workspace is never touched: see sandboxctl workspace",
    )
    modes.add_argument(
        "--copy", dest="mode", action="store_const", const="copy", help="the same, with a copy of the workspace"
    )
    parser.add_argument(
        "--git-common",
        choices=("ro", "rw", "none"),
        help="how the repository of a git worktree is seen inside; default: ro",
    )
    parser.add_argument(
        "--mount",
        dest="mounts",
        action="append",
        default=[],
        type=verb.mount,
        metavar="SRC:DST[:ro]",
        help="another directory or file of the host; or type=bind,src=SRC,dst=DST[,ro]",
    )
    parser.add_argument(
        "--secret",
        dest="secrets",
        action="append",
        default=[],
        metavar="NAME",
        help="give it a secret, as the file /run/secrets/NAME; see: sandboxctl secret",
    )
    verb.add_env(parser)
    verb.add_labels(parser, "something to find it by")
    verb.add_limits(parser, create=True)
    group = parser.add_argument_group("lifetime")
    group.add_argument("--lifetime", metavar="TIME", help="how long it lasts, such as 30m; none: until it is removed")
    verb.add_idle(group)
    parser.add_argument(
        "--wait-capacity",
        metavar="TIME",
        help="how long to wait where this host has no room for it, such as 30s; default: not at all",
    )


def create(connection: Connection, arguments: argparse.Namespace, *, ephemeral: bool) -> dict[str, Any]:
    """Make the sandbox that the flags describe."""
    workspace = None
    if arguments.workspace is not None:
        workspace = wire.part(
            "WorkspaceParams",
            mode=arguments.mode,
            git_common=arguments.git_common,
            **_path_fields(arguments.workspace, "a workspace"),
        )
    mounts = [
        wire.part("MountParams", target=mount["dst"], mode=mount["mode"], **_path_fields(mount["src"], "a mount"))
        for mount in arguments.mounts
    ]
    try:
        sandbox = call(
            connection,
            "sandbox/create",
            _say_place,
            name=arguments.name,
            engine=arguments.engine,
            image=arguments.image,
            workspace=workspace,
            mounts=mounts,
            limits=wire.part("LimitsParams", **verb.limits_of(arguments)),
            limits_policy=arguments.degraded,
            env=env_of(arguments.env_file, arguments.env),
            network=arguments.network,
            allow=arguments.allow,
            deny=arguments.deny,
            inject=arguments.inject,
            services=arguments.services,
            secrets=arguments.secrets,
            metadata=dict(arguments.metadata),
            ephemeral=ephemeral,
            lifetime=arguments.lifetime,
            idle_timeout=arguments.idle_timeout,
            on_timeout=arguments.on_timeout,
            wait_capacity=arguments.wait_capacity,
            template=arguments.template,
            launch=arguments.launch,
            wait=arguments.wait,
        )
    except Interrupted as late:
        name = arguments.name or late.result["id"]
        if not ephemeral:
            say(f"sandbox {name} was there before the interrupt; to remove it: sandboxctl rm {name}")
        raise
    for warning in sandbox["warnings"]:
        say(f"warning: {warning}")
    return sandbox


def _say_place(message: Message) -> None:
    params = message.content["params"]
    if message.content["method"] == "$/progress" and sys.stderr.isatty():
        place = "" if params["total"] is None else f": place {params['done']} of {params['total']}"
        say(f"{params['message']}{place}")


def check_create_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what contradicts itself, before a daemon is started for it.

    Raises:
        RpcError: It does.
    """
    for given, flag in ((arguments.mode, f"--{arguments.mode}"), (arguments.git_common, "--git-common")):
        if given is not None and arguments.workspace is None:
            raise RpcError(
                0, "invalid_argument", f"cannot use {flag} without a workspace", "it goes with --workspace DIR"
            )


def _path_fields(path: str, what: str) -> dict[str, Any]:
    absolute = verb.host_path(path, what)
    path_bytes = verb.base64_unless_utf8(absolute)
    return {"path": absolute if path_bytes is None else "", "path_bytes": path_bytes}


def _add_create(parser: verb.Parser) -> None:
    parser.flag_of_word = "--name"
    add_create_arguments(parser)
    verb.add_json(parser)


def _create(arguments: argparse.Namespace) -> int:
    check_create_arguments(arguments)
    with connect() as connection:
        sandbox = create(connection, arguments, ephemeral=False)
    if arguments.json:
        show_json(sandbox)
        return 0
    show(sandbox["id"])
    sys.stdout.flush()
    if sys.stderr.isatty() or not sandbox["verified"]:
        sys.stderr.write(render.limits_table(sandbox["limits"]))
    return 0


def _add_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="print ids only")
    verb.add_labels(parser, "only those that carry it")
    verb.add_json(parser)


def _ls(arguments: argparse.Namespace) -> int:
    reply = request("sandbox/list", metadata=dict(arguments.metadata))
    if arguments.json:
        show_json(reply)
    elif arguments.quiet:
        sys.stdout.writelines(f"{row['id']}\n" for row in reply["sandboxes"])
    else:
        show(render.sandbox_list(reply["sandboxes"], _now_ms(), columns()))
    return 0


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    verb.add_sandboxes(parser)
    verb.add_json(parser)


def _inspect(arguments: argparse.Namespace) -> int:
    now_ms = _now_ms()
    return each(arguments, "sandbox/get", {}, lambda reply: render.sandbox(reply, now_ms, columns()))


def _add_update(parser: argparse.ArgumentParser) -> None:
    verb.add_limits(parser, create=False)
    verb.add_sandbox(parser)
    verb.add_json(parser)


def _update(arguments: argparse.Namespace) -> int:
    limits = wire.part("LimitsParams", **verb.limits_of(arguments))
    if not limits:
        say("which limit?")
        sys.stderr.write("hint: sandboxctl update --help\n")
        return USAGE
    reply = request("sandbox/update", sandbox=arguments.sandbox, limits=limits, limits_policy=arguments.degraded)
    if arguments.json:
        show_json(reply)
    else:
        show(render.limits_table(reply["limits"], columns()))
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provoke", action="store_true", help="allocate past memory, fork past pids, spin past the quota"
    )
    verb.add_sandbox(parser)
    verb.add_json(parser)


def _verify(arguments: argparse.Namespace) -> int:
    proof = request("sandbox/verify", sandbox=arguments.sandbox, provoke=arguments.provoke)
    if arguments.json:
        show_json(proof)
    else:
        show(render.verification(proof, columns()))
    return 0 if proof["verified"] else FAILURE


def _add_stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grace", metavar="TIME", help="between TERM and KILL, such as 5s")
    verb.add_sandboxes(parser)
    verb.add_json(parser)


def _stop(arguments: argparse.Namespace) -> int:
    return each(arguments, "sandbox/stop", {"grace": arguments.grace})


def _add_start(parser: argparse.ArgumentParser) -> None:
    verb.add_sandboxes(parser)
    verb.add_json(parser)


def _start(arguments: argparse.Namespace) -> int:
    return each(arguments, "sandbox/start", {})


def _add_rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="no error if it is not there; no question")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--wait", action="store_true", help="return when nothing of them is left on this host")
    verb.add_sandboxes(parser, optional=True)
    verb.add_json(parser)


def _rm(arguments: argparse.Namespace) -> int:
    if bool(arguments.sandboxes) == arguments.all:
        say("which sandboxes? name them, or use --all")
        return USAGE
    forgiven = {"not_found", "sandbox_gone"} if arguments.force else set()
    if arguments.all:
        arguments.sandboxes = [row["id"] for row in request("sandbox/list")["sandboxes"]]
        forgiven = {"not_found", "sandbox_gone"}
        if not arguments.sandboxes:
            if arguments.json:
                show_json([])
            return 0
        if not (arguments.yes or arguments.force or _agreed(len(arguments.sandboxes))):
            return FAILURE
    return each(arguments, "sandbox/kill", {"wait": arguments.wait}, forgiven=forgiven)


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        say(f"would remove {_sandboxes(count)}; to do it without a question: --yes")
        return False
    sys.stderr.write(f"remove {_sandboxes(count)} and all that runs inside? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _sandboxes(count: int) -> str:
    return f"{count} sandbox{'' if count == 1 else 'es'}"


def each(
    arguments: argparse.Namespace,
    method: str,
    fields: dict[str, Any],
    text_of: Callable[[dict[str, Any]], str] | None = None,
    *,
    forgiven: set[str] | None = None,
) -> int:
    """Do it to every sandbox that was named, whatever happens to the others; the first failure gives the code.

    Without ``text_of``, which makes of a reply what is printed, that is the name as it was typed.
    """
    code = 0
    names = list(dict.fromkeys(arguments.sandboxes))
    done = []
    with connect() as connection:
        outcomes = call_each(connection, method, ({"sandbox": name, **fields} for name in names))
        for name, outcome in zip(names, outcomes, strict=True):
            if isinstance(outcome, RpcError):
                if outcome.type not in (forgiven or ()):
                    complain(outcome)
                    code = code or exit_code_of(outcome)
            elif arguments.json:
                done.append(outcome)
            else:
                show(text_of(outcome) if text_of is not None else name)
    if arguments.json:
        single = len(names) == 1 and not getattr(arguments, "all", False)
        if not single or not (done or code):
            show_json(done)
        elif done:
            show_json(done[0])
    return code


def _now_ms() -> int:
    return int(time.time() * 1000)


VERBS = {
    "create": Verb("make a sandbox and print its id", _add_create, _create),
    "ls": Verb("list sandboxes", _add_ls, _ls),
    "inspect": Verb("show everything about sandboxes", _add_inspect, _inspect),
    "update": Verb("change limits while it runs, and prove them again", _add_update, _update),
    "verify": Verb("prove the limits", _add_verify, _verify),
    "stop": Verb("stop sandboxes; they can be started again", _add_stop, _stop),
    "start": Verb("start stopped sandboxes", _add_start, _start),
    "rm": Verb("end sandboxes and remove them without a trace", _add_rm, _rm),
}
