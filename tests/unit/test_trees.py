"""What a sandbox changed, and carrying it back: from layers as the kernel and as a hostile sandbox leave them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandboxd import diffing
from sandboxd.applying import Outcome, Transfer, apply, reversed_changes
from sandboxd.failures import CapacityExceeded, Conflict, Timeout
from sandboxd.layers import Layers, conflicts
from sandboxd.trees import Budget, Change, LayerKind, Stopped, Trees, changes

File = tuple[bytes, int]
Link = str
Tree = Mapping[str, "File | Link | Tree"]
"""A directory: names to content and permissions, to where a symlink leads, or to a directory."""

NAME = st.sampled_from(["a", "b", "c", "two words", "né"])
FILE = st.tuples(st.sampled_from([b"", b"x\n", b"y\n" * 3, b"same\n", b"bin\0ary"]), st.sampled_from([0o644, 0o755]))
LINK = st.sampled_from(["a", "../b", "/etc/passwd"])
TREE: st.SearchStrategy[Tree] = st.recursive(
    st.dictionaries(NAME, FILE | LINK, max_size=4),
    lambda inner: st.dictionaries(NAME, FILE | LINK | inner, max_size=4),
    max_leaves=10,
)


def plenty() -> Budget:
    return Budget(entries_max=10_000, bytes_max=2**30, seconds_max=60)


def stopped() -> Budget:
    budget = plenty()
    budget.stop()
    return budget


def make(directory: Path, tree: Tree) -> None:
    directory.mkdir(exist_ok=True)
    for name, entry in tree.items():
        path = directory / name
        match entry:
            case str():
                path.symlink_to(entry)
            case (data, mode):
                path.write_bytes(data)
                path.chmod(mode)
            case _:
                make(path, entry)


def read(directory: Path) -> Tree:
    tree: dict[str, File | Link | Tree] = {}
    for path in directory.iterdir():
        if path.is_symlink():
            tree[path.name] = os.readlink(path)
        elif path.is_dir():
            tree[path.name] = read(path)
        else:
            tree[path.name] = (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
    return tree


def whiteout(path: Path) -> None:
    """As an overlay marks what was removed: anybody may make one."""
    os.mknod(path, stat.S_IFCHR, 0)


def make_upper(upper: Path, old: Tree, new: Tree, *, opaque: bool) -> None:
    """The layer that an overlay has after ``old`` became ``new``."""
    upper.mkdir(exist_ok=True)
    if opaque:
        os.setxattr(upper, "user.overlay.opaque", b"y")
    for name in old.keys() - new.keys():
        if not opaque:
            whiteout(upper / name)
    for name, entry in new.items():
        before = old.get(name)
        if isinstance(entry, Mapping):
            merged = isinstance(before, Mapping) and not opaque
            beneath = before if isinstance(before, Mapping) and merged else {}
            make_upper(upper / name, beneath, entry, opaque=name in old and not merged)
        elif before != entry or opaque:
            make(upper, {name: entry})


@contextlib.contextmanager
def opened(project: Path, layer: Path, kind: LayerKind = "userxattr") -> Iterator[Trees]:
    project_fd = os.open(project, os.O_RDONLY | os.O_DIRECTORY)
    layer_fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Trees(project_fd=project_fd, layer_fd=layer_fd, kind=kind)
    finally:
        os.close(project_fd)
        os.close(layer_fd)


def carry(trees: Trees, found: list[Change], *, check: bool = True) -> Outcome:
    outcome = Outcome()
    transfer = Transfer(source_fd=trees.layer_fd, target_fd=trees.project_fd, owner_of=None, check=check)
    apply(transfer, found, plenty(), outcome)
    return outcome


@settings(max_examples=60, deadline=None)
@given(TREE, TREE, st.booleans())
def test_a_project_becomes_what_the_sandbox_saw(old: Tree, new: Tree, opaque: bool) -> None:
    """Of any tree, any other: files that become directories, links, and all of it hidden and made anew."""
    with tempfile.TemporaryDirectory() as scratch:
        project, upper = Path(scratch, "project"), Path(scratch, "upper")
        make(project, old)
        make_upper(upper, old, new, opaque=opaque)
        if opaque:
            # The layer's own root hides nothing: an overlay says so of directories within it.
            os.removexattr(upper, "user.overlay.opaque")
            for name in old.keys() - new.keys():
                whiteout(upper / name)
        with opened(project, upper) as trees:
            outcome = carry(trees, changes(trees, plenty()))
            assert (outcome.failed, outcome.changed_meanwhile) == ({}, [])
            assert read(project) == new
            assert changes(trees, plenty()) == []


def _without_empty(tree: Tree) -> Tree:
    """As git sees it: no directory for its own sake."""
    kept = {name: _without_empty(entry) if isinstance(entry, Mapping) else entry for name, entry in tree.items()}
    return {name: entry for name, entry in kept.items() if entry != {}}


def _has_binary(tree: Tree) -> bool:
    return any(
        _has_binary(entry) if isinstance(entry, Mapping) else isinstance(entry, tuple) and b"\0" in entry[0]
        for entry in tree.values()
    )


def _leads_in_circles(path: Path) -> bool:
    """As a link to itself does."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


@settings(max_examples=40, deadline=None)
@given(TREE, TREE)
@example({"a": "a"}, {"a": {"a": "a"}})
def test_git_makes_of_the_project_what_the_sandbox_saw(old: Tree, new: Tree) -> None:
    """The patch is for people's own tools, which know no empty directories, and make none of a link to itself."""
    old, new = _without_empty(old), _without_empty(new)
    if _has_binary(old) or _has_binary(new):
        return
    with tempfile.TemporaryDirectory() as scratch:
        project, upper = Path(scratch, "project"), Path(scratch, "upper")
        make(project, old)
        if any(_leads_in_circles(path) for path in project.rglob("*")):
            return
        make_upper(upper, old, new, opaque=False)
        with opened(project, upper) as trees:
            found = changes(trees, plenty())
            page = diffing.page(trees, found, plenty(), offset=0, patch=True)
        text = "".join(change.patch or "" for change in page.changes)
        if text:
            env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}
            subprocess.run(["git", "apply", "-"], input=text.encode(), cwd=project, env=env, check=True)
        assert _without_empty(read(project)) == new


@settings(max_examples=40, deadline=None)
@given(TREE, TREE)
@example({"a": (b"x\n", 0o644)}, {"a": "a", "b": (b"x\n", 0o644)})
def test_a_copy_is_compared_and_carried_back_and_undone(old: Tree, new: Tree) -> None:
    """What was copied and not touched is no change; what is reset is the project's again."""
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch, "project")
        make(project, old)
        layers = Layers(str(Path(scratch, "layers")))
        project_fd = os.open(project, os.O_RDONLY | os.O_DIRECTORY)
        try:
            layers.make_copy(project_fd, plenty(), lambda _: None)
            copy = Path(layers.copy)
            assert read(copy) == old
            _become(copy, new)
            with layers.opened(project_fd) as trees:
                found = changes(trees, plenty())
                undone = Outcome()
                transfer = Transfer(source_fd=project_fd, target_fd=trees.layer_fd, owner_of=None, check=False)
                apply(transfer, reversed_changes(found), plenty(), undone)
                layers.settle(project_fd, undone.touched)
            assert read(copy) == old
            _become(copy, new)
            with layers.opened(project_fd) as trees:
                found = changes(trees, plenty())
                assert conflicts(found, layers.base(), trees.copied) == {}
                outcome = carry(trees, found)
                layers.settle(project_fd, outcome.touched)
            assert read(project) == new
            with layers.opened(project_fd) as trees:
                assert changes(trees, plenty()) == []
            layers.erase()
            assert not Path(layers.directory).exists()
        finally:
            os.close(project_fd)


def _become(directory: Path, tree: Tree) -> None:
    """As somebody would who works there: everything is made anew."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            _become(path, {})
            path.rmdir()
        else:
            path.unlink()
    make(directory, tree)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    project, layer = tmp_path / "project", tmp_path / "layer"
    project.mkdir()
    layer.mkdir()
    return project, layer


def test_a_symlink_on_the_way_is_never_followed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither one that the sandbox put above a file of its own, nor one that is in the project."""
    project, layer = pair
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    (project / "dir").symlink_to(outside)
    (layer / "dir").mkdir()
    (layer / "dir" / "file").write_text("evil")
    with opened(project, layer) as trees:
        found = [change for change in changes(trees, plenty()) if change.path == b"dir/file"]
        outcome = carry(trees, found, check=False)
    assert outcome.failed.keys() == {b"dir/file"}
    assert (outside / "file").read_text() == "kept"


def test_pipes_sockets_and_devices_are_told_and_stay(pair: tuple[Path, Path]) -> None:
    """Opening a pipe would wait for ever; making a socket in the project would be a surprise."""
    project, layer = pair
    os.mkfifo(layer / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(layer / "sock"))
        with opened(project, layer) as trees:
            found = changes(trees, plenty())
            assert {(change.path, bool(change.note)) for change in found} == {(b"pipe", True), (b"sock", True)}
            carry(trees, found)
    assert os.listdir(project) == []


def test_setuid_bits_are_left_behind(pair: tuple[Path, Path]) -> None:
    """Where ids are mapped, a sandbox's file is root's on the disk: with that bit anybody would be root."""
    project, layer = pair
    (layer / "tool").write_text("#!/bin/sh\n")
    (layer / "tool").chmod(0o6755)
    with opened(project, layer) as trees:
        carry(trees, changes(trees, plenty()))
    assert stat.S_IMODE((project / "tool").stat().st_mode) == 0o755


def test_only_the_overlays_own_attributes_are_believed(pair: tuple[Path, Path]) -> None:
    """Under root's overlays ``user.*`` is the sandbox's to set: it must not make the project look emptied."""
    project, layer = pair
    (project / "dir").mkdir()
    (project / "dir" / "kept").write_text("x")
    (layer / "dir").mkdir()
    os.setxattr(layer / "dir", "user.overlay.opaque", b"y")
    with opened(project, layer, "overlay") as trees:
        assert changes(trees, plenty()) == []
    with opened(project, layer, "userxattr") as trees:
        assert [(change.path, change.kind) for change in changes(trees, plenty())] == [(b"dir/kept", "removed")]


def test_the_markers_of_fuse_overlayfs_are_read_in_its_layers_only(pair: tuple[Path, Path]) -> None:
    """Elsewhere they are files like others."""
    project, layer = pair
    (project / "gone").write_text("x")
    (project / "dir").mkdir()
    (project / "dir" / "hidden").write_text("x")
    (layer / ".wh.gone").write_text("")
    (layer / "dir").mkdir()
    (layer / "dir" / ".wh..wh..opq").write_text("")
    with opened(project, layer, "fuse") as trees:
        found = {(change.path, change.kind) for change in changes(trees, plenty())}
    assert found == {(b"gone", "removed"), (b"dir/hidden", "removed")}
    with opened(project, layer) as trees:
        assert {change.kind for change in changes(trees, plenty())} == {"added"}


def test_a_tree_that_is_too_deep_ends_somewhere(pair: tuple[Path, Path]) -> None:
    """Each level takes descriptors, and somebody may have made thousands."""
    project, layer = pair
    here = os.open(layer, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with opened(project, layer) as trees:
        found = changes(trees, plenty())
    assert found[-1].note == "it lies too deep"
    assert len(found) < 200


@pytest.mark.parametrize(
    ("budget", "error"),
    [
        (lambda: Budget(entries_max=2, bytes_max=2**30, seconds_max=60), CapacityExceeded),
        (lambda: Budget(entries_max=100, bytes_max=1, seconds_max=60), CapacityExceeded),
        (lambda: Budget(entries_max=100, bytes_max=2**30, seconds_max=0), Timeout),
        (stopped, Stopped),
    ],
)
def test_a_walk_costs_no_more_than_it_may(
    pair: tuple[Path, Path], budget: Callable[[], Budget], error: type[Exception]
) -> None:
    project, layer = pair
    for name in "abc":
        (project / name).write_text("x")
        (layer / name).write_text("y")
    with opened(project, layer) as trees, pytest.raises(error):
        changes(trees, budget())


def test_a_rename_is_told_as_one(pair: tuple[Path, Path]) -> None:
    project, layer = pair
    (project / "old").write_text("the content")
    whiteout(layer / "old")
    (layer / "new").write_text("the content")
    with opened(project, layer) as trees:
        (change,) = changes(trees, plenty())
        assert (change.kind, change.old_path, change.path) == ("renamed", b"old", b"new")
        carry(trees, [change])
    assert read(project) == {"new": (b"the content", 0o644)}


def test_a_file_leaves_its_old_name_only_once_it_has_the_new_one(pair: tuple[Path, Path]) -> None:
    """Else a full disk, or a directory that cannot be written, would cost the project a file."""
    project, layer = pair
    (project / "old").write_text("the content")
    (project / "dir").symlink_to("/nonexistent")
    whiteout(layer / "old")
    (layer / "dir").mkdir()
    (layer / "dir" / "new").write_text("the content")
    with opened(project, layer) as trees:
        found = [change for change in changes(trees, plenty()) if change.kind == "renamed"]
        outcome = carry(trees, found)
    assert outcome.failed.keys() == {b"dir/new"}
    assert (project / "old").read_text() == "the content"


def test_only_what_is_asked_for_is_told(pair: tuple[Path, Path]) -> None:
    project, layer = pair
    for name in ("a", "ab", "c"):
        (layer / name).mkdir()
        (layer / name / "file").write_text("x")
    with opened(project, layer) as trees:
        assert [change.path for change in changes(trees, plenty(), paths=[b"a", b"c/file"])] == [
            b"a",
            b"a/file",
            b"c/file",
        ]


def test_what_changes_between_looking_and_writing_is_left_alone(pair: tuple[Path, Path]) -> None:
    """The caller may save a file in that very moment."""
    project, layer = pair
    (project / "file").write_text("old")
    (layer / "file").write_text("new")
    with opened(project, layer) as trees:
        found = changes(trees, plenty())
        (project / "file").unlink()
        (project / "file").write_text("mine")
        outcome = carry(trees, found)
    assert outcome.changed_meanwhile == [b"file"]
    assert (project / "file").read_text() == "mine"
    assert os.listdir(project) == ["file"]


def test_another_directory_in_the_projects_place_is_refused(tmp_path: Path) -> None:
    """Carried back into it, the changes would hit what they were never made of."""
    (tmp_path / "project").mkdir()
    (tmp_path / "other").mkdir()
    layers = Layers(str(tmp_path / "layers"))
    for name, allowed in (("project", True), ("other", False)):
        project_fd = os.open(tmp_path / name, os.O_RDONLY)
        try:
            if allowed:
                layers.make_overlay(project_fd, "userxattr")
            with contextlib.nullcontext() if allowed else pytest.raises(Conflict), layers.opened(project_fd):
                pass
        finally:
            os.close(project_fd)


def test_a_page_holds_what_fits_and_says_where_to_go_on(pair: tuple[Path, Path]) -> None:
    """A reply is bounded; a diff is not."""
    project, layer = pair
    for number in range(9):
        (layer / f"f{number}").write_bytes(b"\x01" * 200_000)
    with opened(project, layer) as trees:
        found = changes(trees, plenty())
        told: list[str] = []
        offset: int | None = 0
        pages = 0
        while offset is not None:
            page = diffing.page(trees, found, plenty(), offset=offset, patch=True)
            assert len(msgspec.json.encode(page.changes)) < 4 * 1024 * 1024
            told += [change.path for change in page.changes]
            offset = page.next_offset
            pages += 1
    assert told == [f"f{number}" for number in range(9)]
    assert pages > 1


def test_a_layer_can_be_removed_whatever_modes_are_in_it() -> None:
    """An ordinary user is shut out of directories without permissions, and cannot move them either."""
    with tempfile.TemporaryDirectory() as scratch:
        layers = Layers(str(Path(scratch, "layers")))
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                _remove_as_anybody(Path(scratch), layers)
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not Path(layers.directory).exists()


def _remove_as_anybody(directory: Path, layers: Layers) -> None:
    if os.geteuid() == 0:
        os.chown(directory, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    project_fd = os.open(directory, os.O_RDONLY)
    layers.make_overlay(project_fd, "userxattr")
    deep = Path(layers.upper, "shut", "in")
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")
    Path(layers.work, "work").mkdir(mode=0)
    deep.chmod(0)
    deep.parent.chmod(0)
    layers.erase()


def test_what_a_sandbox_shut_is_removed_with_it(pair: tuple[Path, Path]) -> None:
    """Undone is undone, also what nobody could look at."""
    project, layer = pair
    (layer / "shut" / "in").mkdir(parents=True)
    with opened(project, layer) as trees:
        found = [change for change in changes(trees, plenty()) if change.path == b"shut"]
        outcome = Outcome()
        transfer = Transfer(source_fd=trees.project_fd, target_fd=trees.layer_fd, owner_of=None, check=False)
        apply(transfer, reversed_changes(found), plenty(), outcome)
    assert outcome.failed == {}
    assert os.listdir(layer) == []


@pytest.mark.parametrize("check", [True, False])
def test_a_directory_that_became_a_symlink_meanwhile_leads_nowhere(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: bool
) -> None:
    """Whoever works in the target puts a link where a directory was just made: nothing elsewhere changes."""
    project, layer = pair
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (layer / "wide").mkdir()
    (layer / "wide").chmod(0o777)
    (layer / "wide" / "file").write_text("x")
    make_dir = os.mkdir

    def make_and_swap(path: bytes, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        make_dir(path, mode, dir_fd=dir_fd)
        os.rmdir(path, dir_fd=dir_fd)
        os.symlink(elsewhere, path, dir_fd=dir_fd)

    with opened(project, layer) as trees:
        found = [change for change in changes(trees, plenty()) if change.path == b"wide/file"]
        monkeypatch.setattr(os, "mkdir", make_and_swap)
        outcome = carry(trees, found, check=check)
    assert list(outcome.failed) == [b"wide/file"]
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
    assert os.listdir(elsewhere) == []


def test_a_directory_with_too_many_names_is_not_read_to_its_end(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox can make millions of them, and what holds them is the daemon's memory."""
    project, layer = pair
    for number in range(30):
        (layer / str(number)).touch()
    monkeypatch.setattr("runtimes.beneath.NAMES_PER_STEP", 2)
    looked_at = []

    class Counting(Budget):
        def fits(self, count: int) -> None:
            looked_at.append(count)
            super().fits(count)

    with opened(project, layer) as trees, pytest.raises(CapacityExceeded):
        changes(trees, Counting(entries_max=9, bytes_max=1, seconds_max=60))
    assert looked_at == [2, 4, 6, 8, 10]


def test_a_directory_that_is_filled_while_it_is_removed_keeps_nobody_for_ever(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox goes on writing where a reset removes."""
    project, layer = pair
    (layer / "busy" / "in").mkdir(parents=True)
    (layer / "busy" / "in" / "0").touch()
    unlink, budget = os.unlink, plenty()
    made = 0

    def unlink_and_fill(path: str | bytes, *, dir_fd: int | None = None) -> None:
        nonlocal made
        unlink(path, dir_fd=dir_fd)
        made += 1
        os.close(os.open(f"{made}", os.O_CREAT | os.O_WRONLY, dir_fd=dir_fd))
        if made == 100:
            budget.stop()
        assert made < 10_000

    with opened(project, layer) as trees:
        found = [change for change in changes(trees, plenty()) if change.path == b"busy"]
        transfer = Transfer(source_fd=trees.project_fd, target_fd=trees.layer_fd, owner_of=None, check=False)
        monkeypatch.setattr(os, "unlink", unlink_and_fill)
        with pytest.raises(Stopped):
            apply(transfer, reversed_changes(found), budget, Outcome())
