"""The daemon's door: what it was started with, its socket, and how a failed start is told.

All that serves is ``composition``'s, and takes a fifth of a second to load. Engines take longer to say what they are,
so they are asked first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import resource
import sys
from collections.abc import Mapping, Sequence

import anyio
import anyio.to_thread

from runtimes import detect
from runtimes.errors import RuntimeFailure
from runtimes.init.wire import InitError
from sandboxd import __version__, logs
from sandboxd.activation import Activation, take_over
from sandboxd.engines import BegunLook
from sandboxd.failures import Exit, Failure
from sandboxd.listener import AlreadyRunning, Listener, open_listener
from sandboxd.paths import socket_path
from sandboxd.translation import failure_from

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``sandboxd`` in the foreground until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="sandboxd",
        description="The sandboxd daemon, in the foreground. Nobody needs to start it by hand: see sandboxctl.",
    )
    parser.add_argument("--socket", metavar="PATH", help="where to listen (SANDBOXD_SOCKET)")
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], help="instead of the setting daemon.log_level"
    )
    parser.add_argument("--ready-fd", type=int, metavar="FD", help="descriptor to write one line to, once it serves")
    parser.add_argument("--version", action="version", version=f"sandboxd {__version__}")
    options = parser.parse_args(arguments)
    # What is loaded stays, and looking for garbage in it is a sixth of what loading costs; ``run`` turns it on again.
    gc.disable()
    logs.begin(sys.stderr, os.environ, options.log_level or "info")
    _raise_descriptor_limit()
    # A core file would hold the secrets that were being given.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        activation = take_over(os.environ)
        env = dict(os.environ)
        if options.socket:
            env["SANDBOXD_SOCKET"] = os.path.abspath(options.socket)
        if options.log_level:
            env["SANDBOXD_DAEMON_LOG_LEVEL"] = options.log_level
        if activation.listening is not None and not activation.handed_over:
            env["SANDBOXD_SOCKET"] = activation.listening.getsockname()
        ours = activation.handed_over
        with open_listener(socket_path(env), activation.listening, ours=ours) as listener:
            anyio.run(functools.partial(_run, listener, env, activation, options.ready_fd))
    except AlreadyRunning as error:
        if options.ready_fd is not None:
            _tell(options.ready_fd, "running")
            return Exit.OK
        return _fail(error, options.ready_fd)
    except Failure as error:
        return _fail(error, options.ready_fd)
    except (RuntimeFailure, InitError) as error:
        return _fail(failure_from(error), options.ready_fd)
    except BaseExceptionGroup as group:
        return _fail(_only_failure(group), options.ready_fd)
    return Exit.OK


async def _run(listener: Listener, env: Mapping[str, str], activation: Activation, ready_fd: int | None) -> None:
    """Look at the engines while what drives them is loaded: each takes its time, and neither needs the other."""
    look = BegunLook(functools.partial(detect.detect_all, env))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look.begin)
        await anyio.to_thread.run_sync(importlib.import_module, "sandboxd.composition")
        from sandboxd.composition import run

        await run(listener, env, activation=activation, tell=functools.partial(_tell, ready_fd), detect=look)


def _only_failure(group: BaseExceptionGroup[BaseException]) -> Failure:
    """The failure that ended a task group; what is none is a defect, and goes on as it is.

    A task group wraps what ends it, one group per level.
    """
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    match error:
        case Failure():
            return error
        case RuntimeFailure() | InitError():
            return failure_from(error)
        case _:
            raise group


def _raise_descriptor_limit() -> None:
    """Use what the host allows: a sandbox takes about twenty descriptors, most of them for its counters."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _fail(error: Failure, ready_fd: int | None) -> int:
    logger.error("%s", error)
    data = {"type": error.type, "brief": error.brief, "detail": error.detail, "hint": error.hint}
    _tell(ready_fd, f"error: {json.dumps(data)}")
    return error.exit_code


def _tell(ready_fd: int | None, line: str) -> None:
    """Say how it went, to whoever started us and waits for that."""
    if ready_fd is None:
        return
    with contextlib.suppress(OSError):
        os.write(ready_fd, line.encode() + b"\n")
        os.close(ready_fd)


if __name__ == "__main__":
    raise SystemExit(main())
