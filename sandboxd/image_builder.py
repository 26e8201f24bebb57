"""Making the image that sandboxes run on, without a registry where none answers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence

import anyio.from_thread
import anyio.to_thread

import images
from images import RootfsError, RootfsFacts, Source
from runtimes.engine import Engine
from runtimes.errors import EngineRefused, ImageNotFound, RuntimeFailure
from runtimes.model import ImageFacts
from sandboxd.engines import EngineRoom
from sandboxd.failures import InvalidArgument, PrerequisiteMissing
from sandboxd.protocol import ImageBuildParams, ImageBuilt, ImageInfo
from sandboxd.timings import Timings

Progress = Callable[[str, int | None, int | None], None]

_FOLDER = "default"

OWN_REGISTRY = "localhost/"
"""What images that were made here begin with."""


class ImageBuilder:
    """Makes and lists images.

    Args:
        engines: Whom to make them for.
        reference: Name and tag of the configured image.
        scratch_dir: Where archives are put for a moment.
    """

    def __init__(self, engines: EngineRoom, *, reference: str, scratch_dir: str) -> None:
        self._engines = engines
        self._reference = reference
        self._scratch_dir = scratch_dir
        self._building = anyio.Lock()

    async def list(self, engine: str | None) -> list[ImageInfo]:
        """The images of one engine, or of all that can be used."""
        chosen = await self._chosen(engine)
        return [_image(each, facts) for each in chosen for facts in await each.list_images()]

    async def build(self, params: ImageBuildParams, progress: Progress) -> ImageBuilt:
        """Make the image for one engine, or for all that can be used; what is there already is left alone.

        Raises:
            PrerequisiteMissing: no source works on this host; the reason of each is in the detail.
        """
        timings = Timings()
        reference = self._reference if params.reference is None else params.reference
        if not reference.startswith(OWN_REGISTRY) and reference != self._reference:
            raise InvalidArgument(
                f"cannot build an image called {reference!r}",
                detail="it would take the place of somebody else's image",
                hint=f"sandboxctl image build --reference {OWN_REGISTRY}NAME:TAG",
            )
        engines = await self._chosen(params.engine)
        async with self._building:
            if not params.force:
                engines = [each for each in engines if await each.image_id(reference) is None]
            source = "present"
            if engines:
                source = await self._make(engines, reference, params.source, progress)
            timings.mark("build")
        return ImageBuilt(
            images=[
                image
                for image in await self.list(params.engine)
                if any(_same_reference(tag, reference) for tag in image.tags)
            ],
            source=source,
            timings_ms=timings.as_dict(),
        )

    async def _chosen(self, engine: str | None) -> Sequence[Engine]:
        if engine is not None:
            return [await self._engines.choose(engine)]
        return self._engines.usable() or [await self._engines.choose("auto")]

    async def _make(self, engines: Sequence[Engine], reference: str, source: str, progress: Progress) -> str:
        said: list[str] = []
        hint = ""
        for attempt in images.plan(source, images.host_facts()):
            if not attempt.possible:
                said.append(f"{attempt.source}: {attempt.reason}")
                hint = attempt.hint or hint
                continue
            try:
                await self._from(attempt.source, engines, reference, progress)
            except (RootfsError, ImageNotFound, EngineRefused) as error:
                progress(f"{attempt.source}: {error.brief}", None, None)
                said.append(f"{attempt.source}: {error}")
                hint = error.hint or hint
            else:
                return attempt.source.value
        raise PrerequisiteMissing(f"cannot make the image {reference}", detail="; ".join(said), hint=hint)

    async def _from(self, source: Source, engines: Sequence[Engine], reference: str, progress: Progress) -> None:
        if source is Source.REGISTRY:
            for engine in engines:
                progress(f"{engine.name}: building {reference} from its Containerfile", None, None)
                await engine.build_image(images.context_dir(_FOLDER), reference)
            return
        with tempfile.TemporaryDirectory(dir=self._scratch_dir, prefix="image-") as directory:
            archive = os.path.join(directory, "rootfs.tar")
            facts = await self._archive(source, archive, progress)
            for engine in engines:
                progress(f"{engine.name}: importing {reference}", None, None)
                await engine.import_image(archive, reference, changes=facts.changes)

    @staticmethod
    async def _archive(source: Source, archive: str, progress: Progress) -> RootfsFacts:
        def from_thread(message: str, done: int | None, total: int | None) -> None:
            anyio.from_thread.run_sync(progress, message, done, total)

        return await anyio.to_thread.run_sync(images.build_rootfs, source.value, archive, from_thread)


def _image(engine: Engine, facts: ImageFacts) -> ImageInfo:
    return ImageInfo(
        engine=engine.name.value,
        image_id=facts.image_id,
        tags=list(facts.tags),
        size_bytes=facts.size_bytes,
        created_at_ms=None if facts.created_at_s is None else int(facts.created_at_s * 1000),
    )


def _same_reference(tag: str, reference: str) -> bool:
    """Docker leaves out what Podman writes in full: ``localhost/`` before, ``:latest`` behind."""

    def bare(name: str) -> str:
        return name.removeprefix("localhost/").removesuffix(":latest")

    return bare(tag) == bare(reference)


async def has_image(engine: Engine, reference: str) -> bool:
    """Whether the engine holds the image; False also when it does not answer."""
    try:
        return await engine.image_id(reference) is not None
    except RuntimeFailure:
        return False
