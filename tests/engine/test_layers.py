"""A project that is never touched: overlays and copies, what was changed in them, and carrying it back."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.engine.daemons import Daemon, wait_until

pytestmark = pytest.mark.engine

LAYERS = ("overlay", "copy")

WORK = r"""
echo changed >> text; rm gone; mv moved renamed; rm -r dir; mkdir dir; echo 1 > dir/new; chmod 755 script
ln -sf elsewhere link; printf 'a\0b' > binary; mkdir -p deep/er; echo x > 'deep/er/two words'; mkfifo pipe
"""

CHANGES = {
    ("binary", "added"),
    ("deep", "added"),
    ("deep/er", "added"),
    ("deep/er/two words", "added"),
    ("dir/new", "added"),
    ("dir/old", "removed"),
    ("gone", "removed"),
    ("link", "modified"),
    ("pipe", "added"),
    ("renamed", "renamed"),
    ("script", "mode"),
    ("text", "modified"),
}


def _fill(project: Path) -> None:
    (project / "text").write_text("first\n")
    (project / "gone").write_text("to be removed\n")
    (project / "moved").write_text("the same\n")
    (project / "script").write_text("#!/bin/sh\n")
    (project / "script").chmod(0o644)
    (project / "link").symlink_to("somewhere")
    (project / "dir").mkdir()
    (project / "dir" / "old").write_text("old\n")


def _tree(directory: Path) -> dict[str, Any]:
    """All that counts of a tree: types, permissions, contents, owners."""
    found: dict[str, Any] = {}
    for parent, directories, files in os.walk(directory):
        for name in directories + files:
            path = Path(parent, name)
            status = path.lstat()
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            mode = 0 if path.is_symlink() else status.st_mode
            found[str(path.relative_to(directory))] = (mode, status.st_uid, content)
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_project_is_untouched_until_its_changes_are_applied(
    daemon: Daemon, engine: str, project: Path, layer: str, tmp_path: Path
) -> None:
    """And then it is exactly what the sandbox saw, and belongs to whom it belonged."""
    _fill(project)
    before = _tree(project)
    by_git = tmp_path / "by-git"
    subprocess.run(["cp", "-a", project, by_git], check=True)
    with daemon.box(engine, workspace={"path": str(project), "mode": layer}) as box:
        assert box["workspace"]["mode"] == layer
        assert box["workspace"]["backend"] in {"overlay": ["overlay"], "copy": ["copy", "reflink"]}[layer]
        assert daemon.call("workspace/diff", sandbox=box["id"])["changes"] == []
        daemon.sh(box, WORK)
        assert _tree(project) == before

        diff = daemon.call("workspace/diff", sandbox=box["id"])
        assert {(change["path"], change["kind"]) for change in diff["changes"]} == CHANGES
        by_path = {change["path"]: change for change in diff["changes"]}
        assert by_path["text"]["patch"].endswith("@@ -1,1 +1,2 @@\n first\n+changed\n")
        assert by_path["renamed"]["old_path"] == "moved"
        assert by_path["binary"]["binary"]
        assert by_path["pipe"]["note"]
        text = "".join(change["patch"] or "" for change in diff["changes"] if not change["binary"])
        subprocess.run(["git", "apply", "-"], input=text.encode(), cwd=by_git, check=True)

        applied = daemon.call("workspace/apply", sandbox=box["id"])
        assert applied["conflicts"] == []
        assert [problem["path"] for problem in applied["failed"]] == ["pipe"]
        assert daemon.sh(box, "cat text dir/new") == "first\nchanged\n1\n"
        left = daemon.call("workspace/diff", sandbox=box["id"])["changes"]
        assert [change["path"] for change in left] == ["pipe"]
        after = _tree(project)
        assert {owner for _, owner, _ in after.values()} == {0}
        assert stat.S_IMODE(after["script"][0]) == 0o755
        assert after.pop("binary")[2] == b"a\0b"
        assert after == _tree(by_git)
    assert daemon.mounts() == []


@pytest.mark.parametrize("layer", LAYERS)
def test_what_was_changed_in_the_project_meanwhile_is_not_overwritten(
    daemon: Daemon, engine: str, project: Path, layer: str
) -> None:
    """The caller's own work is worth more than the sandbox's."""
    _fill(project)
    with daemon.box(engine, name="works", workspace={"path": str(project), "mode": layer}) as box:
        daemon.sh(box, "echo sandbox >> text; echo sandbox >> script; echo sandbox > new; rm gone; echo 2 >> dir/old")
        (project / "text").write_text("mine\n")
        (project / "new").write_text("mine\n")
        (project / "gone").write_text("mine\n")
        (project / "dir" / "old").unlink()
        refusal = daemon.refusal("workspace/apply", sandbox=box["id"])
        assert refusal.type == "conflict"
        for path in ("text", "new", "gone", "dir/old"):
            assert f"{path}: " in refusal.detail, refusal
        assert "script" not in refusal.detail
        assert (project / "script").read_text() == "#!/bin/sh\n"

        dry = daemon.call("workspace/apply", sandbox=box["id"], dry_run=True)
        assert sorted(problem["path"] for problem in dry["conflicts"]) == ["dir/old", "gone", "new", "text"]
        assert dry["applied"] == ["script"]
        assert (project / "script").read_text() == "#!/bin/sh\n"

        daemon.call("workspace/apply", sandbox=box["id"], paths=["script"])
        daemon.sh(box, "echo more >> script")
        daemon.call("workspace/apply", sandbox=box["id"], paths=["/workspace/script"])
        assert (project / "script").read_text() == "#!/bin/sh\nsandbox\nmore\n"
        assert (project / "text").read_text() == "mine\n"

        daemon.call("workspace/apply", sandbox=box["id"], force=True)
        assert (project / "text").read_text() == "first\nsandbox\n"
        assert not (project / "gone").exists()
        assert (project / "dir" / "old").read_text() == "old\n2\n"
        assert daemon.call("workspace/diff", sandbox=box["id"])["total"] == 0


@pytest.mark.parametrize("layer", LAYERS)
def test_a_reset_shows_the_project_again(daemon: Daemon, engine: str, project: Path, layer: str) -> None:
    """Of some paths or of all, in a sandbox that runs and in one that is stopped."""
    _fill(project)
    before = _tree(project)
    with daemon.box(engine, workspace={"path": str(project), "mode": layer}) as box:
        pristine = daemon.sh(box, "ls -laR . | grep -v ' [.]*$'; cat text dir/old; id -u")
        daemon.sh(box, WORK)
        daemon.call("workspace/reset", sandbox=box["id"], paths=["dir", "text"])
        assert daemon.sh(box, "cat text dir/old; ls dir") == "first\nold\nold\n"
        assert daemon.sh(box, "echo again >> text; echo again > dir/again; ls renamed") == "renamed\n"
        daemon.call("workspace/reset", sandbox=box["id"])
        assert daemon.sh(box, "ls -laR . | grep -v ' [.]*$'; cat text dir/old; id -u") == pristine
        assert daemon.call("workspace/diff", sandbox=box["id"])["total"] == 0
        daemon.sh(box, WORK)
        daemon.call("sandbox/stop", sandbox=box["id"])
        daemon.call("workspace/reset", sandbox=box["id"], paths=["text"])
        daemon.call("sandbox/start", sandbox=box["id"])
        assert daemon.sh(box, "cat text renamed") == "first\nthe same\n"
        daemon.call("sandbox/stop", sandbox=box["id"])
        daemon.call("workspace/reset", sandbox=box["id"])
        daemon.call("sandbox/start", sandbox=box["id"])
        assert daemon.sh(box, "ls -laR . | grep -v ' [.]*$'; cat text dir/old; id -u") == pristine
        assert _tree(project) == before


@pytest.mark.parametrize("layer", LAYERS)
def test_what_was_written_outlives_the_daemon_and_a_stop_and_no_mount_is_left(
    daemon: Daemon, engine: str, project: Path, layer: str
) -> None:
    """Killed, the daemon leaves no mount; the next one knows what was changed; with the sandbox its layers go."""
    _fill(project)
    with daemon.box(engine, workspace={"path": str(project), "mode": layer}) as box:
        daemon.sh(box, "echo kept > text")
        daemon.kill()
        assert daemon.mounts() == []
        daemon.start()
        assert daemon.sh(box, "cat text") == "kept\n"
        assert daemon.call("workspace/diff", sandbox=box["id"])["total"] == 1
        daemon.call("sandbox/stop", sandbox=box["id"])
        assert daemon.mounts() == []
        assert daemon.call("workspace/diff", sandbox=box["id"])["total"] == 1
        daemon.call("sandbox/start", sandbox=box["id"])
        assert daemon.sh(box, "cat text; echo more >> text") == "kept\n"
        daemon.call("workspace/apply", sandbox=box["id"])
        assert (project / "text").read_text() == "kept\nmore\n"
        assert (daemon.state / "layers" / box["id"]).is_dir()
    daemon.await_no_layers()


def test_the_overlay_of_a_paused_sandbox_is_left_alone(daemon: Daemon, engine: str, project: Path) -> None:
    """It is mounted in there, and emptied behind the kernel's back it would be anything."""
    with daemon.box(engine, workspace={"path": str(project), "mode": "overlay"}) as box:
        daemon.sh(box, "echo kept > file")
        daemon.call("sandbox/pause", sandbox=box["id"])
        assert daemon.refusal("workspace/reset", sandbox=box["id"]).type == "conflict"
        daemon.call("sandbox/resume", sandbox=box["id"])
        assert daemon.sh(box, "cat file") == "kept\n"


HOSTILE = r"""
mkdir -p a/b; ln -s / a/root; ln -s ../../.. a/up; ln -s /etc/passwd passwd
rm -r dir; ln -s /etc dir
n=0; while [ $n -lt 120 ]; do mkdir d; cd d; n=$((n+1)); done; cd /workspace
echo x > 'new
line'; echo x > "$(printf 'n\351')"; echo x > "it's \"quoted\""; mkdir shut; echo x > shut/in; chmod 0 shut
truncate -s 4G sparse; ln a/f hard 2>/dev/null; : > .wh.text; : > 'a/.wh..wh..opq'; chmod 4755 script
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_a_hostile_layer_leads_nowhere(daemon: Daemon, engine: str, project: Path, layer: str) -> None:
    """Links out of the project, endless depths, odd names, markers of other overlays: compared, and carried back."""
    _fill(project)
    with daemon.box(engine, workspace={"path": str(project), "mode": layer}) as box:
        daemon.sh(box, HOSTILE)
        diff = daemon.call("workspace/diff", sandbox=box["id"])
        by_path = {change["path"]: change for change in diff["changes"]}
        assert by_path["passwd"]["type"] == "symlink"
        assert "root:" not in by_path["passwd"]["patch"]
        assert not any(path.startswith(("a/root/", "a/up/")) for path in by_path)
        assert by_path["n\\xe9"]["path_bytes"] is not None
        assert "new\nline" in by_path
        assert ("text" in by_path) is False
        assert by_path[".wh.text"]["kind"] == "added"
        assert by_path["sparse"]["new_size_bytes"] == 4 * 2**30
        assert by_path["dir/old"]["kind"] == "removed"
        deepest = max(by_path, key=len)
        assert "too deep" in by_path[deepest]["note"]
        daemon.call("workspace/apply", sandbox=box["id"])
        assert os.readlink(project / "dir") == "/etc"
        assert (project / os.fsdecode(b"n\xe9")).read_text() == "x\n"
        assert stat.S_IMODE((project / "script").stat().st_mode) == 0o755
        assert (project / "sparse").stat().st_blocks < 1000
        assert (project / "text").read_text() == "first\n"


def test_an_engine_that_works_on_the_project_itself_has_nothing_to_compare(
    daemon: Daemon, engine: str, project: Path
) -> None:
    with daemon.box(engine, workspace={"path": str(project), "mode": "bind"}) as box:
        assert box["workspace"]["mode"] == "rw"
        for method in ("diff", "apply", "reset"):
            refusal = daemon.refusal(f"workspace/{method}", sandbox=box["id"])
            assert (refusal.type, refusal.detail) == ("conflict", "it works on the project itself")


def test_a_copy_keeps_holes(daemon: Daemon, engine: str, project: Path) -> None:
    """A file that is larger than what a copy may take, and holds nothing, costs nothing."""
    with open(project / "huge", "wb") as file:
        file.truncate(2**40)
    with daemon.box(engine, workspace={"path": str(project), "mode": "copy"}) as box:
        assert daemon.sh(box, "stat -c %s huge").strip() == str(2**40)
        assert daemon.call("workspace/diff", sandbox=box["id"])["total"] == 0


def test_other_mounts_are_seen_at_their_places(daemon: Daemon, engine: str, project: Path, tmp_path: Path) -> None:
    """Directories and files, to be read or written, whatever they are called."""
    odd = tmp_path / 'a b:c,d"e\nf'
    odd.mkdir()
    (odd / "in").write_text("seen")
    file = tmp_path / "file.conf"
    file.write_text("setting")
    raw = os.path.join(os.fsencode(tmp_path), b"n\xe9")
    os.mkdir(raw)
    mounts = [
        {"path": str(odd), "target": "/data/x y:z", "mode": "ro"},
        {"path": str(file), "target": "/opt/file.conf", "mode": "ro"},
        {"path": "", "path_bytes": base64.b64encode(raw).decode(), "target": "/raw"},
    ]
    with daemon.box(engine, workspace={"path": str(project)}, mounts=mounts) as box:
        assert daemon.sh(box, "cat '/data/x y:z/in' /opt/file.conf; echo w > /raw/made; stat -c %u /raw/made") == (
            "seensetting1000\n"
        )
        assert (
            daemon.run(box, "sh", "-c", "echo > '/data/x y:z/in'; echo > /opt/file.conf").stderr.count(b"Read-only")
            == 2
        )
        assert os.stat(os.path.join(raw, b"made")).st_uid == 0
        assert [mount["mode"] for mount in box["mounts"]] == ["ro", "ro", "rw"]
        daemon.call("sandbox/stop", sandbox=box["id"])
        daemon.call("sandbox/start", sandbox=box["id"])
        assert daemon.sh(box, "cat /opt/file.conf /raw/made") == "settingw\n"
    assert daemon.mounts() == []


@pytest.mark.parametrize(
    ("path", "target"),
    [("/etc", "/data"), ("/var/run/docker.sock", "/d"), ("PROJECT", "/proc/x"), ("PROJECT", "/workspace/in")],
)
def test_a_mount_that_may_not_be_is_refused(
    daemon: Daemon, engine: str, project: Path, path: str, target: str
) -> None:
    mount = {"path": path.replace("PROJECT", str(project)), "target": target}
    assert daemon.refusal("sandbox/create", engine=engine, mounts=[mount]).type == "invalid_argument"


GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]


def _worktree(tmp_path: Path) -> tuple[Path, Path]:
    repository, worktree = tmp_path / "repository", tmp_path / "worktree"
    env = {**os.environ, "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
    for words in (
        ["init", "-q", str(repository)],
        ["-C", str(repository), "commit", "-q", "--allow-empty", "-m", "first"],
        ["-C", str(repository), "worktree", "add", "-q", str(worktree)],
    ):
        subprocess.run([*GIT, *words], check=True, env=env)
    return repository, worktree


def test_the_repository_of_a_git_worktree_is_seen_and_cannot_be_written(
    daemon: Daemon, engine: str, tmp_path: Path
) -> None:
    """A worktree is a file that names a directory elsewhere: without that, git says that it is no repository."""
    repository, worktree = _worktree(tmp_path)
    common = repository / ".git"
    with daemon.box(engine, workspace={"path": str(worktree)}) as box:
        (mount,) = box["mounts"]
        assert (mount["path"], mount["target"], mount["mode"], mount["reason"]) == (
            str(common),
            str(common),
            "ro",
            "git",
        )
        head = daemon.sh(box, f"cat {common}/worktrees/worktree/HEAD")
        assert head.startswith("ref: ")
        assert b"Read-only" in daemon.run(box, "sh", "-c", f"echo > {common}/hooks/pre-commit").stderr
    with daemon.box(engine, workspace={"path": str(worktree), "git_common": "rw"}) as box:
        daemon.sh(box, f"echo > {common}/made")
    assert (common / "made").exists()
    with daemon.box(engine, workspace={"path": str(worktree), "git_common": "none"}) as box:
        assert box["mounts"] == []


def test_a_file_that_only_says_that_it_is_a_worktree_shows_nothing(
    daemon: Daemon, engine: str, project: Path, tmp_path: Path
) -> None:
    """A sandbox that ran in the project before may have written it, to have the next one see a secret."""
    repository, worktree = _worktree(tmp_path)
    (project / ".git").write_bytes((worktree / ".git").read_bytes())
    with daemon.box(engine, workspace={"path": str(project)}) as box:
        assert box["mounts"] == []
        assert any("another place" in warning for warning in box["warnings"])
    assert (repository / ".git").is_dir()


def test_whoever_goes_away_while_a_project_is_copied_leaves_nothing(
    daemon: Daemon, engine: str, project: Path
) -> None:
    for number in range(3000):
        (project / f"f{number}").write_text("x")
    with daemon.connect() as connection:
        params = {"engine": engine, "workspace": {"path": str(project), "mode": "copy"}}
        connection.send("sandbox/create", params)
    assert daemon.call("daemon/info")["pid"]
    wait_until(lambda: not daemon.sandboxes() and not daemon.journal(), "the sandbox went with its caller")
    daemon.await_no_layers()
