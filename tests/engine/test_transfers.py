"""Trees and files over a descriptor, into real sandboxes and out of them."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import RpcError
from tests.engine.conftest import Box
from tests.engine.daemons import Daemon, wait_until

pytestmark = pytest.mark.engine

PATIENCE_S = 60.0
"""A bound for what must happen; nothing takes that long unless it is broken."""


@pytest.fixture
def shared(daemon: Daemon, engine: str, project: Path) -> Iterator[Box]:
    with daemon.box(engine, workspace={"path": str(project)}) as box:
        yield box


def upload(daemon: Daemon, box: Box, path: str, data: bytes, **params: Any) -> dict[str, Any]:
    """Send bytes through a pipe."""
    read_end, write_end = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "wb") as pipe:
            pipe.write(data)

    feeder = threading.Thread(target=feed)
    feeder.start()
    with daemon.connect() as connection:
        request = connection.send("files/upload", {"sandbox": box["id"], "path": path, **params}, [read_end])
        os.close(read_end)
        try:
            return connection.wait(request, timeout_s=PATIENCE_S)
        finally:
            feeder.join()


def download(daemon: Daemon, box: Box, path: str, **params: Any) -> tuple[dict[str, Any], bytes]:
    """Get bytes through a pipe."""
    read_end, write_end = os.pipe()
    taken: list[bytes] = []

    def drain() -> None:
        with os.fdopen(read_end, "rb") as pipe:
            taken.append(pipe.read())

    drainer = threading.Thread(target=drain)
    drainer.start()
    with daemon.connect() as connection:
        request = connection.send("files/download", {"sandbox": box["id"], "path": path, **params}, [write_end])
        os.close(write_end)
        try:
            reply = connection.wait(request, timeout_s=PATIENCE_S)
        finally:
            drainer.join()
    return reply, taken[0]


def archive(**files: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o640
            tar.addfile(info, io.BytesIO(data))
    return made.getvalue()


def test_a_tree_goes_in_and_comes_out(daemon: Daemon, shared: Box, project: Path) -> None:
    """Owned outside by whoever owns the project, and packed as it lies there."""
    odd = b"line\nfeed \xff"
    large = os.urandom(3_000_000)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in {b"small": b"x", odd: b"odd", b"large": large}.items():
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size, info.mode, info.mtime = len(data), 0o750, 1_600_000_000
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        empty = tarfile.TarInfo("empty")
        empty.type, empty.mode = tarfile.DIRTYPE, 0o555
        tar.addfile(empty)
    reply = upload(daemon, shared, "new", made.getvalue())
    assert (reply["entries"], reply["bytes"], reply["skipped_count"]) == (5, len(large) + 4, 0)
    status = (project / "new/large").stat()
    assert (project / "new/large").read_bytes() == large
    assert (status.st_mode & 0o7777, status.st_mtime, status.st_uid) == (0o750, 1_600_000_000, project.stat().st_uid)
    assert (project / "new" / os.fsdecode(odd)).read_bytes() == b"odd"
    assert os.readlink(project / "new/link") == "/etc/passwd"
    assert (project / "new/empty").stat().st_mode & 0o7777 == 0o555
    reply, data = download(daemon, shared, "/workspace/new")
    assert (reply["entries"], reply["skipped"]) == (6, [])
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        members = {os.fsencode(member.name): member for member in tar}
        assert set(members) == {b"new", b"new/small", b"new/" + odd, b"new/large", b"new/link", b"new/empty"}
        assert members[b"new/large"].mtime == 1_600_000_000
        file = tar.extractfile(members[b"new/large"])
        assert file is not None
        assert file.read() == large


def test_single_files_go_by_descriptor(daemon: Daemon, shared: Box, project: Path, tmp_path: Path) -> None:
    """From a file to a file, holes and all; an old file keeps its mode."""
    with open(tmp_path / "image", "wb") as file:
        file.write(b"begin")
        file.truncate(2**40)
        with daemon.connect() as connection:
            source = os.open(tmp_path / "image", os.O_RDONLY)
            params = {"sandbox": shared["id"], "path": "image", "form": "file", "mode": 0o600, "mtime_ns": 10**18}
            reply = connection.call("files/upload", params, [source], timeout_s=PATIENCE_S)
            os.close(source)
        status = (project / "image").stat()
        assert (status.st_size, status.st_mode & 0o777, status.st_mtime_ns) == (2**40, 0o600, 10**18)
        assert (reply["entries"], status.st_blocks * 512 < 2**20) == (1, True)
        with daemon.connect() as connection:
            target = os.open(tmp_path / "back", os.O_RDWR | os.O_CREAT)
            params = {"sandbox": shared["id"], "path": "image", "form": "file"}
            connection.call("files/download", params, [target], timeout_s=PATIENCE_S)
            assert (os.fstat(target).st_size, os.pread(target, 5, 0)) == (2**40, b"begin")
            os.close(target)
    with pytest.raises(RpcError, match="ended before"):
        upload(daemon, shared, "image", b"short", form="file", size_bytes=6)
    assert (project / "image").stat().st_size == 2**40, "the old one stays until the new one is whole"
    upload(daemon, shared, "image", b"new", form="file", size_bytes=3)
    assert (project / "image").read_bytes() == b"new"
    assert (project / "image").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/environ", "fifo"])
def test_what_is_endless_or_the_kernels_is_not_read(daemon: Daemon, shared: Box, project: Path, path: str) -> None:
    if path == "fifo":
        os.mkfifo(project / "fifo", 0o666)
    with pytest.raises(RpcError):
        download(daemon, shared, path, form="file")
    reply, _ = download(daemon, shared, path)
    assert (reply["bytes"], reply["skipped_count"]) == (0, 1)


def test_a_link_inside_leads_nowhere_on_the_host(daemon: Daemon, shared: Box, project: Path, tmp_path: Path) -> None:
    """What is outside has another meaning inside, or none."""
    (tmp_path / "outside").write_bytes(b"secret of the host")
    (project / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(RpcError):
        download(daemon, shared, "link", form="file", follow=True)
    with contextlib.suppress(RpcError):
        upload(daemon, shared, "/workspace/../../..", archive(escaped=b"x"))
    assert not list(tmp_path.rglob("escaped"))
    assert (tmp_path / "outside").read_bytes() == b"secret of the host"


def test_bounds_hold_and_nothing_is_left_behind(daemon: Daemon, shared: Box, project: Path) -> None:
    whole = archive(a=bytes(1000), b=bytes(1000))
    for bounds in ({"bytes_max": 1500}, {"entries_max": 1}):
        with pytest.raises(RpcError) as caught:
            upload(daemon, shared, "in", whole, **bounds)
        assert caught.value.type == "capacity_exceeded"
        (project / "in/a").unlink(missing_ok=True)
    upload(daemon, shared, "in", whole)
    for bounds in ({"bytes_max": 1500}, {"entries_max": 1}):
        with pytest.raises(RpcError) as caught:
            download(daemon, shared, "in", **bounds)
        assert caught.value.type == "capacity_exceeded"
    with pytest.raises(RpcError, match="no tar archive"):
        upload(daemon, shared, "in", b"x" * 5000)
    with pytest.raises(RpcError, match="nothing moved"):
        silent(daemon, shared)


def silent(daemon: Daemon, box: Box) -> None:
    """A client that never writes."""
    read_end, write_end = os.pipe()
    params = {"sandbox": box["id"], "path": "in", "idle_timeout": "100ms"}
    with daemon.connect() as connection:
        try:
            connection.call("files/upload", params, [read_end], timeout_s=PATIENCE_S)
        finally:
            os.close(read_end)
            os.close(write_end)


def test_a_client_that_goes_takes_its_transfer_along(daemon: Daemon, shared: Box, project: Path) -> None:
    """No partial file, no file worker and no descriptor of the daemon's is left."""
    workers = int(daemon.sh(shared, "ls /proc | grep -c '^[0-9]'"))
    before = descriptors(daemon)
    read_end, write_end = os.pipe()
    with daemon.connect() as connection:
        connection.send("files/upload", {"sandbox": shared["id"], "path": "partial", "form": "file"}, [read_end])
        os.close(read_end)
        os.write(write_end, b"begun")
        wait_until(lambda: int(daemon.sh(shared, "ls /proc | grep -c '^[0-9]'")) > workers, "the transfer runs")
    wait_until(lambda: descriptors(daemon) <= before, "the daemon lets go")
    wait_until(lambda: int(daemon.sh(shared, "ls /proc | grep -c '^[0-9]'")) <= workers, "the worker ends")
    os.close(write_end)
    assert os.listdir(project) == []


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))
