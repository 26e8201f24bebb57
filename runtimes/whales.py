"""Images, through python-on-whales, in worker threads: the only module that imports it.

The import costs 0.3 to 0.8 s, so it happens inside the thread of the first call. python-on-whales has no timeout:
every client is started through ``timeout``, which puts it into a process group of its own and kills that group,
and a cancelled call finds and kills the client that its thread has started. So no thread outlives its call for long.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from runtimes import parse
from runtimes.argv import Client, host_path, image_reference
from runtimes.errors import EngineRefused, EngineTimeout, EngineUnavailable, UnreadableAnswer
from runtimes.model import ImageFacts
from runtimes.process import SERVICE_VARIABLES

if TYPE_CHECKING:
    from python_on_whales import DockerClient
    from python_on_whales.exceptions import DockerException

CALLS_AT_ONCE_MAX = 4
THREADS_MAX = 8
"""Calls at once, and as many threads again that were given up and have not ended yet: more means that clients
cannot even be killed, and then nothing is added to the heap."""

LIST_S_MAX = 60.0
IMPORT_S_MAX = 300.0
BUILD_S_MAX = 1800.0

KILLED_LATER_S = 2
"""The client is killed this much after its deadline where nobody has killed it before."""

_T = TypeVar("_T")


class Whales:
    """The image calls of one engine."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._turns = anyio.Semaphore(CALLS_AT_ONCE_MAX)
        self._threads: set[int] = set()

    async def list_images(self) -> list[ImageFacts]:
        """The images that the engine holds; one that is removed meanwhile is left out."""
        return await self._call("image list", LIST_S_MAX, _list_images)

    async def import_image(self, archive_path: str, reference: str, changes: Sequence[str]) -> str:
        """Make an image of a tar archive. Returns its id."""
        host_path(archive_path)
        image_reference(reference)
        return await self._call(
            "import", IMPORT_S_MAX, lambda docker: _import(docker, archive_path, reference, changes)
        )

    async def build_image(self, context_dir: str, reference: str) -> str:
        """Build the Containerfile in a folder. Returns the image's id."""
        host_path(context_dir)
        image_reference(reference)
        return await self._call("build", BUILD_S_MAX, lambda docker: _build(docker, context_dir, reference))

    async def _call(self, verb: str, deadline_s: float, work: Callable[[DockerClient], _T]) -> _T:
        """Do ``work`` in a thread.

        Raises:
            EngineTimeout: the deadline passed.
            EngineUnavailable: the threads of too many calls have not ended, or the client cannot be started.
            EngineRefused: the client ended with an error.
            UnreadableAnswer: python-on-whales cannot make sense of the answer.
        """
        what = f"`{self._client.engine.value} {verb}`"
        with anyio.move_on_after(deadline_s):
            async with self._turns:
                if len(self._threads) >= THREADS_MAX:
                    raise EngineUnavailable(
                        f"cannot start {what}", detail=f"{len(self._threads)} calls before it have not ended"
                    )
                return await self._in_thread(what, deadline_s, work)
        raise EngineTimeout(f"cannot wait longer for {what}")

    async def _in_thread(self, what: str, deadline_s: float, work: Callable[[DockerClient], _T]) -> _T:
        thread_ids: list[int] = []

        def body() -> _T:
            thread_id = threading.get_native_id()
            self._threads.add(thread_id)
            thread_ids.append(thread_id)
            try:
                return _translated(what, lambda: work(_docker_client(self._client, deadline_s)))
            finally:
                thread_ids.clear()
                self._threads.discard(thread_id)

        try:
            return await anyio.to_thread.run_sync(body, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
        except anyio.get_cancelled_exc_class():
            for thread_id in thread_ids:
                _kill_clients(thread_id)
            raise


def _docker_client(client: Client, deadline_s: float) -> DockerClient:
    from python_on_whales import DockerClient

    unset = [word for name in sorted(SERVICE_VARIABLES) for word in ("-u", name)]
    bounded = ["timeout", "--signal=KILL", str(math.ceil(deadline_s) + KILLED_LATER_S)]
    return DockerClient(client_call=[*bounded, "env", *unset, *client.call()], client_type=client.engine.value)


def _translated(what: str, work: Callable[[], _T]) -> _T:
    """Do ``work``; python-on-whales' errors become ours."""
    from python_on_whales.exceptions import DockerException

    try:
        return work()
    except DockerException as error:
        raise EngineRefused(f"cannot finish {what}", detail=_said(error)) from error
    except OSError as error:
        raise EngineUnavailable(f"cannot start {what}", detail=str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UnreadableAnswer(f"cannot read the answer of {what}", detail=str(error)[:500]) from error


def _said(error: DockerException) -> str:
    return parse.complaint((error.stderr or "").encode())


def _kill_clients(thread_id: int) -> None:
    """Kill the process groups of what this thread has started.

    Where the kernel does not list a thread's children, ``timeout`` ends the client when its time comes.
    """
    with contextlib.suppress(OSError), open(f"/proc/self/task/{thread_id}/children", encoding="ascii") as file:
        for pid in file.read().split():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(pid), signal.SIGKILL)


def _list_images(docker: DockerClient) -> list[ImageFacts]:
    from python_on_whales.exceptions import NoSuchImage

    images = []
    for image in docker.image.list():
        with contextlib.suppress(NoSuchImage):
            images.append(
                ImageFacts(
                    image_id=parse.image_id(image.id),
                    tags=tuple(tag for tag in image.repo_tags or () if "<none>" not in tag),
                    size_bytes=image.size,
                    created_at_s=image.created.timestamp(),
                )
            )
    return sorted(images, key=lambda image: (image.tags, image.image_id))


def _import(docker: DockerClient, archive_path: str, reference: str, changes: Sequence[str]) -> str:
    return parse.image_id(docker.image.import_(archive_path, tag=reference, changes=changes).id)


def _build(docker: DockerClient, context_dir: str, reference: str) -> str:
    # Named, because Docker alone would look for a Dockerfile. Not buildx, which a stock docker.io does not have.
    image = docker.legacy_build(
        context_dir, file=os.path.join(context_dir, "Containerfile"), tags=reference, quiet=True
    )
    return parse.image_id(image.id)
