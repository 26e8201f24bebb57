"""Files of a sandbox over the socket: resolved inside, by the sandbox's own user, whole or not at all."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Box
from tests.engine.daemons import Daemon

pytestmark = pytest.mark.engine


@pytest.fixture
def shared(daemon: Daemon, engine: str, project: Path) -> Iterator[Box]:
    with daemon.box(engine, workspace={"path": str(project)}) as box:
        yield box


def read(daemon: Daemon, box: Box, path: str, **params: Any) -> bytes:
    return base64.b64decode(daemon.call("files/read", sandbox=box["id"], path=path, **params)["data"])


def write(daemon: Daemon, box: Box, path: str, data: bytes, **params: Any) -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    return daemon.call("files/write", sandbox=box["id"], path=path, data=text, **params)


def test_what_is_written_is_the_projects_own_and_read_back_as_it_was(
    daemon: Daemon, shared: Box, project: Path
) -> None:
    """Every byte, with parents made, and owned outside by whoever owns the project."""
    data = bytes(range(256)) * 100
    info = write(daemon, shared, "new/dir/file", data, mode=0o640)
    assert (info["type"], info["size_bytes"], info["mode"]) == ("file", len(data), 0o640)
    assert (project / "new/dir/file").read_bytes() == data
    assert (project / "new/dir/file").stat().st_uid == project.stat().st_uid
    assert read(daemon, shared, "/workspace/new/dir/file") == data
    assert read(daemon, shared, "new/dir/file", offset=250, length=10) == data[250:260]
    write(daemon, shared, "new/dir/file", b"short")
    assert (project / "new/dir/file").stat().st_mode & 0o777 == 0o640, "a file keeps its mode"
    assert sorted(os.listdir(project / "new/dir")) == ["file"], "nothing is left beside it"


def test_listing_renaming_and_removing(daemon: Daemon, shared: Box, project: Path) -> None:
    """Names that are not UTF-8 come and go as bytes."""
    odd = os.fsdecode(b"line\nfeed \xff")
    (project / "tree/below").mkdir(parents=True)
    (project / "tree" / odd).write_text("x")
    (project / "tree/link").symlink_to("below")
    os.chown(project / "tree", project.stat().st_uid, project.stat().st_gid)
    listed = daemon.call("files/list", sandbox=shared["id"], path="tree", depth=2)
    assert [(row["path"], row["type"], row["target"]) for row in listed["entries"]] == [
        ("below", "dir", None),
        ("line\nfeed \\xff", "file", None),
        ("link", "symlink", "below"),
    ]
    name = base64.b64decode(listed["entries"][1]["path_bytes"])
    assert name == b"line\nfeed \xff"
    odd_path = base64.b64encode(b"tree/" + name).decode()
    assert daemon.call("files/stat", sandbox=shared["id"], path="", path_bytes=odd_path)["size_bytes"] == 1
    assert daemon.call("files/make_dir", sandbox=shared["id"], path="made/deep")["created"] is True
    assert daemon.call("files/make_dir", sandbox=shared["id"], path="made/deep")["created"] is False
    daemon.call("files/rename", sandbox=shared["id"], path="made", new_path="moved")
    assert (project / "moved/deep").is_dir()
    daemon.call("files/remove", sandbox=shared["id"], path="tree", recursive=True)
    assert not (project / "tree").exists()
    assert daemon.refusal("files/stat", sandbox=shared["id"], path="tree").type == "not_found"


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/environ", "fifo", "/tmp"])
def test_what_is_no_file_is_not_read(daemon: Daemon, shared: Box, project: Path, path: str) -> None:
    """A FIFO would wait, a device would never end, and what the kernel makes up is not the sandbox's."""
    if path == "fifo":
        os.mkfifo(project / "fifo", 0o666)
    refused = {"conflict", "unsupported", "invalid_argument"}
    assert daemon.refusal("files/read", sandbox=shared["id"], path=path).type in refused


def test_a_link_that_leads_out_leads_nowhere(daemon: Daemon, shared: Box, project: Path, tmp_path: Path) -> None:
    """It is followed inside, where the host's file is not."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (project / "link").symlink_to(secret)
    (project / "up").symlink_to("../../../../../../../../etc/hostname")
    assert daemon.refusal("files/read", sandbox=shared["id"], path="link").type == "not_found"
    assert read(daemon, shared, "up") != Path("/etc/hostname").read_bytes()


def test_the_read_only_root_stays_as_it_is(daemon: Daemon, shared: Box) -> None:
    """The daemon's own rights are of no use to whoever asks."""
    data = base64.b64encode(b"x").decode()
    refusal = daemon.refusal("files/write", sandbox=shared["id"], path="/etc/evil", data=data)
    assert refusal.type == "conflict"
    assert refusal.detail.startswith(("EROFS", "EACCES"))


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_a_path_that_is_none_is_refused(daemon: Daemon, shared: Box, path: str) -> None:
    """Before anything is sent inside."""
    assert daemon.refusal("files/stat", sandbox=shared["id"], path=path).type == "invalid_argument"
