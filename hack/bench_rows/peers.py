#!/usr/bin/env python3
"""Do with another project's sandbox what hack/bench asks for on stdin, and say on stdout how long each took.

Who runs it: hack/bench, with an interpreter that can import llm-sandbox or SWE-ReX. When: in its rows `run` and
`files`.

    hack/bench_rows/peers.py llm-sandbox|swe-rex CONTAINER DIRECTORY

The first line on stdout is `ready`, or why it cannot be measured; after that there is a line of seconds for each line
of stdin. CONTAINER is a running container of Docker's with a directory /tmp/many, DIRECTORY one on the host with the
files `small` and `large` and a directory `many`. llm-sandbox works on that container. SWE-ReX needs a server of its
own inside, which images without Python and a network cannot have: its server runs on the host here, in no sandbox at
all, which is the best it could do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

MIB = 1024 * 1024
READY_S = 30.0

Operation = Callable[[], Any]


@contextlib.contextmanager
def llm_sandbox(container: str, directory: str) -> Iterator[dict[str, Operation]]:
    from llm_sandbox import SandboxSession

    session = SandboxSession(container_id=container, skip_environment_setup=True, verbose=False)
    with session:

        def run(command: str) -> None:
            ended = session.execute_command(command)
            if ended.exit_code != 0:
                raise SystemExit(f"{command} ended with {ended.exit_code}")

        def write(name: str) -> None:
            session.copy_to_runtime(os.path.join(directory, name), f"/tmp/{name}")

        def read(name: str) -> None:
            session.copy_from_runtime(f"/tmp/{name}", os.path.join(directory, "fetched"))

        yield {
            "run-true": lambda: run("true"),
            "run-1m": lambda: run(f"head -c {MIB} /dev/zero"),
            "write-small": lambda: write("small"),
            "read-small": lambda: read("small"),
            "write-large": lambda: write("large"),
            "read-large": lambda: read("large"),
            "list": lambda: run("ls -la /tmp/many"),
        }


@contextlib.contextmanager
def swe_rex(_: str, directory: str) -> Iterator[dict[str, Operation]]:
    from swerex.runtime.abstract import Command, ReadFileRequest, UploadRequest, WriteFileRequest
    from swerex.runtime.remote import RemoteRuntime

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    words = [sys.executable, "-m", "swerex", "--host", "127.0.0.1", "--port", str(port), "--auth-token", token]
    server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target = os.path.join(directory, "written")
    with open(os.path.join(directory, "small"), encoding="ascii") as file:
        small = file.read()
    with asyncio.Runner() as runner:
        try:
            runtime = RemoteRuntime(host="http://127.0.0.1", port=port, auth_token=token)
            runner.run(runtime.wait_until_alive(timeout=READY_S))

            def run(*argv: str) -> None:
                ended = runner.run(runtime.execute(Command(command=list(argv))))
                if ended.exit_code != 0:
                    raise SystemExit(f"{argv} ended with {ended.exit_code}")

            def read(name: str) -> None:
                runner.run(runtime.read_file(ReadFileRequest(path=os.path.join(directory, name))))

            def upload() -> None:
                source = os.path.join(directory, "large")
                runner.run(runtime.upload(UploadRequest(source_path=source, target_path=target)))

            yield {
                "run-true": lambda: run("true"),
                "run-1m": lambda: run("head", "-c", str(MIB), "/dev/zero"),
                "write-small": lambda: runner.run(runtime.write_file(WriteFileRequest(path=target, content=small))),
                "read-small": lambda: read("small"),
                "write-large": upload,
                "read-large": lambda: read("large"),
                "list": lambda: run("ls", "-la", os.path.join(directory, "many")),
            }
        finally:
            server.terminate()
            server.wait()


PEERS = {"llm-sandbox": llm_sandbox, "swe-rex": swe_rex}


def main() -> int:
    peer, container, directory = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What a peer prints, and what it logs, is nobody's.
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    try:
        with PEERS[peer](container, directory) as operations:
            print("ready", file=answers)
            for line in sys.stdin:
                began_s = time.perf_counter()
                operations[line.strip()]()
                print(time.perf_counter() - began_s, file=answers)
    except ImportError as error:
        print(f"not installed ({error})", file=answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
