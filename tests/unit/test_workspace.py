"""Which directories may be a workspace, and whose files they are inside."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.model import Capabilities, EngineInfo, EngineName, User
from runtimes.userns import open_swapped_userns
from sandboxd.failures import InvalidArgument
from sandboxd.workspace import (
    SANDBOX_USER,
    Rules,
    identify,
    idmap_works,
    open_mount,
    open_workspace,
    refusal,
    target_refusal,
)

HOME = "/home/me"


@pytest.mark.parametrize(
    "path",
    [
        "/", "/etc", "/etc/ssh", "/usr", "/usr/bin", "/proc", "/proc/1", "/sys/kernel", "/dev", "/boot", "/run",
        "/run/docker", "/var", "/var/lib/docker", "/var/run/x", "/home", "/tmp", "/root", "/root/project",
        "/home/me", "/home/other", "/home/other/project", "/home/me/.ssh", "/home/me/.ssh/keys", "/home/me/.gnupg",
        "/home/me/.aws", "/home/me/.config/gcloud/x", "/home/me/project (deleted)",
    ],
)  # fmt: skip
def test_a_directory_that_is_no_project_is_refused(path: str) -> None:
    """System paths, whole homes, other users' homes and credentials do not belong into a sandbox."""
    assert refusal(path, Rules(home=HOME)) != ""


@pytest.mark.parametrize(
    "path",
    ["/home/me/project", "/home/me/.config/app", "/srv/project", "/tmp/x", "/opt/src", "/run/media/me/stick",
     "/mnt/disk/project", "/etcetera", "/home/me/.sshfs", "/data/project", "/usr/src/linux"],
)  # fmt: skip
def test_a_project_is_allowed(path: str) -> None:
    """People keep projects in many places; a name that only begins like a refused one is not refused."""
    assert refusal(path, Rules(home=HOME)) == ""


@pytest.mark.parametrize("path", ["/etc/project", "/home/other/project", "/home/me/.ssh", "/var/lib/ci/build"])
def test_what_is_named_is_allowed(path: str) -> None:
    """Who names it means it."""
    assert refusal(path, Rules(home=HOME, allow=[path])) == ""
    assert refusal(f"{path}/below", Rules(home=HOME, allow=[path])) == ""
    assert refusal(f"{path}x", Rules(home=HOME, allow=[path])) == refusal(f"{path}x", Rules(home=HOME))


@pytest.mark.parametrize("path", ["/home/me/p", "/home/me/p/state", "/home/me/p/state/bin"])
def test_what_holds_the_daemons_own_files_is_never_a_project(path: str) -> None:
    """Whoever can write its programs, or reach its socket, is master of every sandbox: naming it does not help."""
    private = ["/home/me/p/state"]
    assert refusal(path, Rules(home=HOME, allow=[path], private=private)) != ""
    assert refusal("/home/me/p/other", Rules(home=HOME, private=private)) == ""


@pytest.mark.parametrize("path", ["/home/me/p", "/home/me/p/secret", "/home/me/p/secret/below"])
def test_what_holds_or_is_denied_is_refused_whatever_is_allowed(path: str) -> None:
    """A directory that nobody may see must not be seen as a part of another."""
    rules = Rules(home=HOME, allow=["/home/me"], deny=["/home/me/p/secret"])
    assert "paths.deny" in refusal(path, rules)
    assert refusal("/home/me/p/secrets", rules) == ""


@pytest.mark.parametrize(
    "target",
    ["relative", "/", "/proc/x", "/dev", "/sys/fs", "/.sandboxd/bin", "/workspace", "/workspace/x", "/tmp", "/etc",
     "/a/../etc", "//a", "/a/", "/home/sandbox"],
)  # fmt: skip
def test_nothing_is_mounted_where_it_would_hide_something(target: str) -> None:
    """Neither the sandbox's own files nor the image's, nor is a directory made for it in the project."""
    assert target_refusal(target) != ""


@pytest.mark.parametrize("target", ["/data", "/etc/ssl", "/home/me/repo/.git", "/opt/x", "/tmp/cache", "/a b:c"])
def test_other_places_can_be_mounted_on(target: str) -> None:
    assert target_refusal(target) == ""


def test_a_mount_is_a_directory_or_a_file_and_nothing_else(tmp_path: Path) -> None:
    """A socket of the host, an engine's above all, would be the end of all separation."""
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "sock"))
        for name in ("pipe", "sock"):
            with pytest.raises(InvalidArgument, match="neither a directory nor a file"):
                open_mount(str(tmp_path / name), Rules(home=HOME))
    for name in ("file", "."):
        os.close(open_mount(str(tmp_path / name), Rules(home=HOME)).descriptor)


def test_a_path_that_is_not_utf8_can_be_opened_and_said(tmp_path: Path) -> None:
    """A file system holds any bytes; a message only text."""
    path = os.path.join(os.fsencode(tmp_path), b"n\xe9")
    os.mkdir(path)
    opened = open_workspace(os.fsdecode(path), Rules(home=HOME))
    os.close(opened.descriptor)
    assert os.fsencode(opened.path) == path
    with pytest.raises(InvalidArgument) as caught:
        open_workspace(os.fsdecode(path + b"x"), Rules(home=HOME))
    caught.value.brief.encode()


def test_a_home_of_root_directory_allows_nothing_by_itself() -> None:
    """Service users have HOME=/: that must not make /etc a project."""
    assert refusal("/etc", Rules(home="/")) != ""


@given(st.lists(st.sampled_from(["a", "b", ".ssh", "etc", "home", "me", "root"]), min_size=1, max_size=5))
def test_below_the_home_only_credentials_are_refused(parts: list[str]) -> None:
    """A property over paths: the home's rule is the one that decides there."""
    path = "/".join([HOME, *parts])
    assert (refusal(path, Rules(home=HOME)) != "") == (parts[0] == ".ssh")


def test_a_symlink_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    """Otherwise a link named project would open /etc."""
    (tmp_path / "project").symlink_to("/etc")
    with pytest.raises(InvalidArgument, match="/etc belongs to the system"):
        open_workspace(str(tmp_path / "project"), Rules(home=HOME))


@pytest.mark.parametrize("path", ["relative", "", "/nonexistent/dir", "/dev/null", "/with\0nul"])
def test_what_is_no_directory_is_refused(path: str) -> None:
    """A clear error, before anything is made."""
    with pytest.raises(InvalidArgument, match="cannot use"):
        open_workspace(path, Rules(home=HOME))


def test_an_opened_workspace_knows_what_was_opened(tmp_path: Path) -> None:
    """Device and inode are what the check after the mount compares."""
    opened = open_workspace(str(tmp_path), Rules(home=HOME))
    try:
        status = tmp_path.stat()
        assert (opened.device, opened.inode) == (status.st_dev, status.st_ino)
        assert opened.owner == User(uid=status.st_uid, gid=status.st_gid)
    finally:
        os.close(opened.descriptor)


def _engine(*, rootless: bool, keep_id: bool = False) -> EngineInfo:
    capabilities = Capabilities(
        memory_limit=True, cpu_limit=True, pids_limit=True, cpuset_limit=True,
        keep_id=keep_id, rootless=rootless, network_none=True, pause=True, update_pids=True, update_limits=True,
    )  # fmt: skip
    return EngineInfo(name=EngineName.PODMAN, usable=True, reason="", rootless=rootless, capabilities=capabilities)


ME, ROOT, OTHER = User(uid=1234, gid=1234), User(uid=0, gid=0), User(uid=7, gid=8)


@pytest.mark.parametrize(
    ("engine", "owner", "caller", "idmap", "user", "mounted"),
    [
        (_engine(rootless=True, keep_id=True), ME, ME, False, ME, "keep-id"),
        (_engine(rootless=True, keep_id=True), None, ME, False, ME, "keep-id"),
        (_engine(rootless=True), ME, ME, False, SANDBOX_USER, "as-is"),
        (_engine(rootless=False), ME, ME, False, ME, "same-uid"),
        (_engine(rootless=False), None, ROOT, True, SANDBOX_USER, "same-uid"),
        (_engine(rootless=False), OTHER, ROOT, True, OTHER, "same-uid"),
        (_engine(rootless=False), ROOT, ROOT, True, SANDBOX_USER, "idmapped"),
        (_engine(rootless=False), ROOT, ROOT, False, SANDBOX_USER, "as-is"),
    ],
)
def test_the_project_belongs_to_whoever_runs_inside(
    engine: EngineInfo, owner: User | None, caller: User, idmap: bool, user: User, mounted: str
) -> None:
    """Root runs nothing inside, and files written there are the caller's outside."""
    identity = identify(engine, owner, caller=caller, idmap_works=idmap)
    assert identity.user == user
    assert identity.user.uid != 0
    assert identity.mounted == mounted
    assert (identity.warning != "") == (mounted == "as-is")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount to try it")
def test_mounts_that_a_killed_daemon_left_do_not_hide_that_ids_can_be_mapped(tmp_path: Path) -> None:
    """The next daemon would take the host for one that cannot, and every project of root's would be read-only."""
    userns_fd = open_swapped_userns(outside=0, inside=SANDBOX_USER.uid)
    left = tmp_path / "sb-left" / "stages" / "workspace"
    left.mkdir(parents=True)
    try:
        assert idmap_works(str(tmp_path), userns_fd)
        # Of a kind that cannot be mapped.
        subprocess.run(["mount", "-t", "proc", "proc", left], check=True)
        try:
            assert idmap_works(str(tmp_path), userns_fd)
        finally:
            subprocess.run(["umount", left], check=True)
        assert sorted(os.listdir(tmp_path)) == ["sb-left"]
    finally:
        os.close(userns_fd)
