"""Images that declare volumes: writable places on the host's disk that no limit bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.daemons import IMAGE, Daemon

pytestmark = pytest.mark.engine

REFERENCE = "localhost/sandboxd/with-volume:latest"


@pytest.fixture
def image(daemon: Daemon, engine: str) -> Iterator[str]:
    made = daemon.client(engine, "create", "--network=none", IMAGE, "true").strip()
    try:
        daemon.client(engine, "commit", "--change=VOLUME /data", made, REFERENCE)
    finally:
        daemon.client(engine, "rm", "-f", made)
    yield REFERENCE
    daemon.client(engine, "rmi", "-f", REFERENCE)


def test_a_volume_of_the_image_is_never_a_writable_place(daemon: Daemon, engine: str, image: str) -> None:
    """Podman can leave it out; Docker cannot, and then the image is refused, and says which volume it was."""
    if engine == "docker":
        refusal = daemon.refusal("sandbox/create", engine=engine, image=image)
        assert refusal.type == "unsupported"
        assert "/data" in refusal.detail
    else:
        with daemon.box(engine, image=image) as box:
            assert daemon.run(box, "sh", "-c", "mkdir -p /data && touch /data/x").end["exit_code"] != 0
