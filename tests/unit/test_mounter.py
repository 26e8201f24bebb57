"""The late mount, in a process with a mount namespace of its own: a container as far as the kernel is concerned."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes.cgroup.readings import UNLIMITED
from runtimes.errors import UnreadableAnswer, Unsupported
from runtimes.mounter import mounter
from runtimes.mounter.binary import mounter_binary_path
from runtimes.mounter.mounter import LateMount, Mounter
from runtimes.mountinfo import MountEntry
from runtimes.mounts import detached_bind, mounts_of

pytestmark = pytest.mark.anyio

PATIENCE_S = 10.0

WAYS = ("user", "root") if os.geteuid() == 0 else ("user",)
"""Root mounts by the descriptor; an ordinary user enters the container's user namespace first."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "user":
        monkeypatch.setattr(mounter, "_is_root", lambda: False)
    way: str = request.param
    return way


@pytest.fixture
def inside(tmp_path: Path, way: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sees a file system of its own at ``tmp_path/box``, which the host does not see."""
    box = tmp_path / "box"
    box.mkdir()
    user = [] if way == "root" else ["--user", "--map-root-user"]
    places = f"mkdir {box}/workspace && ln -s workspace {box}/link"
    script = f"mount -t tmpfs none {box} && {places} && echo up && exec sleep 60"
    words = ["unshare", *user, "--mount", "--uts", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield process
        process.kill()


@pytest.fixture
def late() -> Iterator[Mounter]:
    made = Mounter(mounter_binary_path())
    yield made
    made.close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    (project / "file").write_text("hello")
    return project


def wanted(
    process: subprocess.Popen[bytes], project: Path, descriptor: int, target: str, **more: object
) -> LateMount:
    box = project.parent / "box"
    return LateMount(
        source_fd=descriptor,
        source_path=str(project),
        target=f"{box}/{target}",
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def source_fd(project: Path, way: str) -> Iterator[int]:
    directory_fd = os.open(project, os.O_PATH | os.O_DIRECTORY)
    source_fd = directory_fd if way == "user" else detached_bind(directory_fd, read_only=False, userns_fd=None)
    yield source_fd
    for descriptor in {directory_fd, source_fd}:
        os.close(descriptor)


def host_name_of(process: subprocess.Popen[bytes], way: str) -> bytes:
    user = [] if way == "root" else ["--user", "--preserve-credentials"]
    words = ["nsenter", f"--target={process.pid}", *user, "--uts", "hostname"]
    return subprocess.run(words, capture_output=True, check=True).stdout


def ended_process() -> subprocess.Popen[bytes]:
    with subprocess.Popen(["true"]) as process:
        return process


def seen(process: subprocess.Popen[bytes], path: Path) -> MountEntry | None:
    return next((entry for entry in mounts_of(process.pid) if entry.target == str(path)), None)


def options(process: subprocess.Popen[bytes], path: Path) -> set[str]:
    for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[4] == str(path):
            return set(fields[5].split(","))
    raise AssertionError(f"nothing is mounted at {path}")


async def test_a_directory_appears_inside_and_nowhere_else(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int
) -> None:
    target = project.parent / "box" / "workspace"
    await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
    assert Path(f"/proc/{inside.pid}/root{target}/file").read_text() == "hello"
    assert options(inside, target) >= {"rw", "nosuid", "nodev"}
    assert not any(entry.target.startswith(str(project.parent)) for entry in mounts_of("self"))


async def test_read_only_is_read_only(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int, way: str
) -> None:
    """Root says so when it makes the mount."""
    target = project.parent / "box" / "workspace"
    await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace", read_only=True))
    assert ("ro" in options(inside, target)) == (way == "user")


async def test_the_host_name_is_set(inside: subprocess.Popen[bytes], late: Mounter, way: str) -> None:
    await late.change(inside.pid, hostname="renamed")
    assert host_name_of(inside, way) == b"renamed\n"
    assert socket.gethostname() != "renamed"
    with pytest.raises(Unsupported):
        await late.change(inside.pid, hostname="x" * 64)


async def test_the_file_with_the_host_name_is_written_only_where_an_engine_has_mounted_it(
    inside: subprocess.Popen[bytes], late: Mounter, way: str
) -> None:
    """Else it is the image's, or of a process that is in no container the host's."""
    before = Path("/etc/hostname").read_bytes() if Path("/etc/hostname").exists() else None
    await late.change(inside.pid, hostname="renamed")
    assert (Path("/etc/hostname").read_bytes() if before is not None else None) == before


async def test_a_tmpfs_gets_another_size(inside: subprocess.Popen[bytes], late: Mounter, tmp_path: Path) -> None:
    """And keeps its flags. Only what is a tmpfs itself, at exactly that path."""
    box = tmp_path / "box"
    before = options(inside, box)
    await late.change(inside.pid, tmpfs_bytes={str(box): 1 << 20})
    status = os.statvfs(f"/proc/{inside.pid}/root{box}")
    assert status.f_blocks * status.f_frsize == 1 << 20
    assert options(inside, box) == before
    with pytest.raises(UnreadableAnswer, match="cannot open the place"):
        await late.change(inside.pid, tmpfs_bytes={str(box / "link"): 1 << 20})


async def test_the_sizes_of_tmpfs_are_told_as_the_kernel_has_them_inside(
    inside: subprocess.Popen[bytes], late: Mounter, tmp_path: Path
) -> None:
    """A proof goes by them. Of what is no tmpfs, of a place within one and of a link nothing is told."""
    box = tmp_path / "box"
    status = os.statvfs(f"/proc/{inside.pid}/root{box}")
    asked = (box, box / "workspace", box / "link", box / "missing", "/")
    told = await late.change(inside.pid, tmpfs_bytes={str(place): None for place in asked})
    assert told.tmpfs_bytes == {str(box): status.f_blocks * status.f_frsize}
    told = await late.change(inside.pid, tmpfs_bytes={"/": None, str(box): 3 << 20}, hostname="renamed")
    assert told.tmpfs_bytes == {str(box): 3 << 20}
    async with late.changing(inside.pid, tmpfs_bytes={str(box): 1 << 20}) as told:
        assert told.tmpfs_bytes == {}, "it is not known to be done"
    assert told.tmpfs_bytes == {str(box): 1 << 20}
    told = await late.change(inside.pid, tmpfs_bytes={str(box): 0})
    assert told.tmpfs_bytes == {str(box): UNLIMITED}


async def test_what_is_asked_for_is_done_while_its_caller_does_something_else(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int
) -> None:
    """Limits are written meanwhile. It counts as done only after the helper has said so."""
    target = project.parent / "box" / "workspace"
    async with late.changing(inside.pid, mount=wanted(inside, project, source_fd, "workspace")):
        deadline = time.monotonic() + PATIENCE_S
        while seen(inside, target) is None:
            assert time.monotonic() < deadline
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnreadableAnswer, match="cannot open the place"):
        async with late.changing(inside.pid, mount=wanted(inside, project, source_fd, "missing")):
            pass
    with pytest.raises(LookupError):
        async with late.changing(inside.pid, hostname="renamed"):
            raise LookupError
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("target", ["link", "missing", "link/../workspace"])
async def test_no_symlink_and_no_missing_place_is_mounted_on(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int, target: str
) -> None:
    with pytest.raises(UnreadableAnswer, match="cannot open the place to mount at"):
        await late.change(inside.pid, mount=wanted(inside, project, source_fd, target))
    assert seen(inside, project.parent / "box" / "workspace") is None


async def test_a_process_that_is_gone_is_an_error_and_the_next_mount_works(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int
) -> None:
    gone = ended_process()
    with pytest.raises(UnreadableAnswer):
        await late.change(gone.pid, mount=wanted(gone, project, source_fd, "workspace"))
    await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))


async def test_a_helper_that_was_prepared_serves_the_first_request(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int
) -> None:
    """The first claim would wait for its start, and a claim has milliseconds."""
    late.prepare()
    ready = late.helper_pid
    assert ready is not None
    late.prepare()
    await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
    assert late.helper_pid == ready


async def test_a_helper_that_was_killed_is_started_again(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int
) -> None:
    """The child that was ready serves one more request, and then there is nobody."""
    with pytest.raises(UnreadableAnswer):
        await late.change(inside.pid, mount=wanted(inside, project, source_fd, "missing"))
    assert late.helper_pid is not None
    os.kill(late.helper_pid, signal.SIGKILL)
    before = late.helper_pid
    deadline = time.monotonic() + PATIENCE_S
    while Path(f"/proc/{before}/stat").read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < deadline
    await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
    await late.change(inside.pid, hostname="renamed")
    assert late.helper_pid != before


async def test_nonsense_gets_no_answer_and_harms_nobody(
    inside: subprocess.Popen[bytes],
    late: Mounter,
    project: Path,
    source_fd: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the helper does not understand closes the pipe: an error at once, and not a wait."""
    with monkeypatch.context() as patched:
        patched.setattr(mounter, "_packed", lambda *_: b"nonsense")
        with pytest.raises(UnreadableAnswer, match="without an answer"):
            await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
    await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))


async def test_another_directory_that_took_its_place_is_never_mounted(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int, way: str
) -> None:
    target = project.parent / "box" / "workspace"
    project.rename(project.parent / "moved")
    project.mkdir()
    if way == "user":
        with pytest.raises(UnreadableAnswer, match="replaced by another"):
            await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
        assert seen(inside, target) is None
    else:
        await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
        assert Path(f"/proc/{inside.pid}/root{target}/file").read_text() == "hello"


async def test_a_user_follows_no_symlink_to_the_directory(
    inside: subprocess.Popen[bytes], late: Mounter, project: Path, source_fd: int, way: str
) -> None:
    project.rename(project.parent / "moved")
    project.symlink_to("moved")
    if way == "user":
        with pytest.raises(UnreadableAnswer, match="cannot open the directory once more"):
            await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
    else:
        await late.change(inside.pid, mount=wanted(inside, project, source_fd, "workspace"))
