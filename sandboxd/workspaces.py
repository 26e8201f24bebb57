"""What sandboxes see of the host, and what they did to it: opening, judging, layers, diff, apply, reset.

Everything that touches a file system is done in threads, within bounds, and is told to stop when its caller goes
away. Nothing here knows how a directory gets into a container: ``sources`` says what is to be mounted, for
``staging`` or for whoever mounts into a container that runs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from typing import TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import msgspec

from runtimes import beneath
from runtimes.model import EngineInfo, OverlayDirs, User
from runtimes.quantities import parse_memory
from sandboxd import gitworktree
from sandboxd.applying import Outcome, Owner, Transfer, apply, reversed_changes
from sandboxd.config import SIZE_BYTES_MAX
from sandboxd.config import Workspaces as WorkspaceSettings
from sandboxd.failures import Conflict, Failure, InvalidArgument, NotFound, Unsupported
from sandboxd.layers import SKIPPED_SHOWN_MAX, Base, Layers, conflicts
from sandboxd.lifecycle import State
from sandboxd.protocol import MountParams, WorkspaceParams
from sandboxd.records import MountRecord, SandboxRecord, WorkspaceRecord
from sandboxd.sandbox import Sandbox
from sandboxd.trees import Budget, Change, LayerKind, Seen, Stopped, Trees, changes
from sandboxd.workspace import (
    SANDBOX_USER,
    TARGET,
    Identity,
    MountSource,
    OpenedPath,
    Rules,
    glance_at_workspace,
    open_mount,
    open_workspace,
    refusal,
    shown,
    target_refusal,
)

logger = logging.getLogger(__name__)

OPEN_DEADLINE_S = 5.0
"""How long the file system of a workspace may take to open a directory."""

WORKERS_MAX = 4
"""Threads that walk trees at once, for all sandboxes."""

DIFF_ENTRIES_MAX = 500_000
DIFF_BYTES_MAX = 16 * 2**30
DIFF_SECONDS_MAX = 60.0
APPLY_SECONDS_MAX = 600.0

CONFLICTS_SHOWN_MAX = 20

_NOT_MOUNTED = (State.STOPPED, State.LOST)
"""Only then does no container have the overlay."""

Progress = Callable[[str, int | None, int | None], None]

_T = TypeVar("_T")


def silent(message: str, done: int | None = None, total: int | None = None) -> None:
    """Nobody wants to know how far it is."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What a copy of a project may cost."""

    entries_max: int
    bytes_max: int
    seconds_max: float = APPLY_SECONDS_MAX


def copy_bounds(settings: WorkspaceSettings) -> Bounds:
    """What the settings say."""
    return Bounds(
        entries_max=settings.copy_entries,
        bytes_max=parse_memory(settings.copy_bytes, bytes_max=SIZE_BYTES_MAX),
    )


class OpenedMount(msgspec.Struct, frozen=True, kw_only=True):
    """Something besides the project that is to be seen inside, open."""

    target: str
    read_only: bool
    opened: OpenedPath
    reason: str = ""


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """All that a sandbox is to see of the host, open; its opener closes it."""

    project: OpenedPath | None = None
    mounts: tuple[OpenedMount, ...] = ()
    warnings: tuple[str, ...] = ()


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What a sandbox changed, and what stands against carrying it back."""

    found: list[Change]
    conflicts: dict[bytes, str]


class Workspaces:
    """Those of all sandboxes of one daemon.

    Args:
        directory: Holds the layers, one directory per sandbox.
        rules: Which paths may be seen inside.
        bounds: What a copy may cost.
        may_mount: The daemon is root, and mounts itself.
        idmap_works: Ids of root and of the sandbox's user can be swapped in mounts.
        remove_foreign: Removes a directory with files of an engine's own users; see ``Engine.remove_tree``.
    """

    def __init__(
        self,
        directory: str,
        *,
        rules: Rules,
        bounds: Bounds,
        may_mount: bool,
        idmap_works: bool,
        remove_foreign: Callable[[str], Awaitable[None]],
    ) -> None:
        self._remove_foreign = remove_foreign
        self._directory = directory
        self.rules = rules
        self._bounds = bounds
        self._may_mount = may_mount
        self._idmap_works = idmap_works
        self._workers = anyio.CapacityLimiter(WORKERS_MAX)

    # --- opening --------------------------------------------------------------------------------------

    async def open(
        self, workspace: WorkspaceParams | None, mounts: Sequence[MountParams], held: contextlib.ExitStack
    ) -> Opened:
        """Open and judge what a request names. What was opened is closed with ``held``.

        Raises:
            InvalidArgument: something cannot be seen inside, or not there.
        """
        project = None
        warnings: list[str] = []
        opened: list[OpenedMount] = []
        for mount in mounts:
            reason = target_refusal(mount.target)
            if reason:
                raise InvalidArgument(f"cannot mount anything at {mount.target!r}", detail=reason)
            path = _given_path(mount.path, mount.path_bytes)
            source = await self._look(open_mount, path, held)
            opened.append(OpenedMount(target=mount.target, read_only=mount.mode == "ro", opened=source))
        _refuse_nested(opened)
        if workspace is not None:
            path = _given_path(workspace.path, workspace.path_bytes)
            project = _glance_at_project(path, self.rules)
            if project is None:
                project = await self._look(_open_project, path, held)
            else:
                held.callback(os.close, project.descriptor)
            if project.says_worktree and workspace.git_common != "none":
                common, warning = await self._git_common(project, workspace.git_common == "ro", opened, held)
                opened += common
                warnings += warning
        return Opened(project=project, mounts=tuple(opened), warnings=tuple(warnings))

    async def reopen(self, record: SandboxRecord, held: contextlib.ExitStack) -> Opened:
        """Open what a sandbox that is to be started again saw before.

        Raises:
            InvalidArgument: it is gone, or may no longer be seen.
        """
        project = None
        if record.workspace is not None and record.workspace.layer != "copy":
            project = await self._look(open_workspace, path_of(record.workspace), held)
        mounts = [
            OpenedMount(
                target=mount.target,
                read_only=mount.read_only,
                opened=await self._look(open_mount, path_of(mount), held),
                reason=mount.reason,
            )
            for mount in record.mounts
        ]
        return Opened(project=project, mounts=tuple(mounts))

    async def _look(
        self, look: Callable[[str, Rules], OpenedPath], path: str, held: contextlib.ExitStack
    ) -> OpenedPath:
        """In a thread: a dead network file system must stop nobody else."""
        try:
            with anyio.fail_after(OPEN_DEADLINE_S):
                opened = await anyio.to_thread.run_sync(look, path, self.rules, abandon_on_cancel=True)
        except TimeoutError:
            raise InvalidArgument(
                f"cannot use {shown(path)!r}",
                detail=f"its file system does not answer within {OPEN_DEADLINE_S:g} s",
                hint=f"stat {shown(path)}",
            ) from None
        held.callback(os.close, opened.descriptor)
        return opened

    async def _git_common(
        self, project: OpenedPath, read_only: bool, others: Sequence[OpenedMount], held: contextlib.ExitStack
    ) -> tuple[list[OpenedMount], list[str]]:
        """The repository of a git worktree, at its own path: there git looks for it."""
        find = functools.partial(gitworktree.common_directory, project.descriptor, project.path)
        brief = "the repository of this git worktree is not seen inside"
        try:
            with anyio.move_on_after(OPEN_DEADLINE_S):
                common = await anyio.to_thread.run_sync(find, abandon_on_cancel=True)
        except gitworktree.Untrusted as error:
            return [], [f"{brief}: {shown(str(error))}"]
        if common is None or any(mount.target == common for mount in others):
            return [], []
        reason = refusal(common, self.rules) or target_refusal(common)
        if reason or not _is_utf8(common):
            return [], [f"{brief}: {reason or 'its path is not UTF-8'}"]
        opened = await self._look(open_mount, common, held)
        return [OpenedMount(target=common, read_only=read_only, opened=opened, reason="git")], []

    # --- records --------------------------------------------------------------------------------------

    def workspace_record(
        self, params: WorkspaceParams | None, opened: Opened, identity: Identity, engine: EngineInfo
    ) -> WorkspaceRecord | None:
        """What is written down of a project.

        Raises:
            Unsupported: the mode cannot be had with this engine here.
        """
        if params is None or opened.project is None:
            return None
        return WorkspaceRecord(
            path=shown(opened.project.path),
            path_bytes=_bytes_if_odd(opened.project.path),
            read_only=params.mode == "ro",
            mounted=identity.mounted,
            layer=params.mode if params.mode in {"overlay", "copy"} else "",
            backend=self._backend(params.mode, engine),
            device=opened.project.device,
            inode=opened.project.inode,
        )

    def mount_records(self, opened: Opened, identity: Identity) -> tuple[MountRecord, ...]:
        """What is written down of the other mounts."""
        plain = "as-is" if identity.mounted == "idmapped" else identity.mounted
        return tuple(
            MountRecord(
                path=shown(mount.opened.path),
                path_bytes=_bytes_if_odd(mount.opened.path),
                target=mount.target,
                read_only=mount.read_only,
                mounted="idmapped" if self._is_mapped(mount.opened.owner, identity.user) else plain,
                reason=mount.reason,
            )
            for mount in opened.mounts
        )

    def _is_mapped(self, owner: User, user: User) -> bool:
        return self._may_mount and self._idmap_works and owner.uid == 0 and user == SANDBOX_USER

    def _backend(self, mode: str, engine: EngineInfo) -> str:
        if mode != "overlay":
            return "copy" if mode == "copy" else "bind"
        if self._may_mount:
            return "overlay"
        if engine.capabilities is not None and engine.capabilities.overlay_for_callers:
            return "podman-overlay"
        raise Unsupported(
            f"cannot put an overlay over a project with {engine.name}",
            detail="only root may mount, and this engine mounts no overlay for others",
            hint="use --copy, or Podman",
        )

    # --- layers ---------------------------------------------------------------------------------------

    def layers(self, sandbox_id: str) -> Layers:
        """What a sandbox writes instead of its project."""
        return Layers(os.path.join(self._directory, sandbox_id))

    async def fill(self, sandbox: Sandbox, opened: Opened, progress: Progress) -> None:
        """Make the layers that a new sandbox needs. A copy may take long, and ends early if its caller goes away.

        Raises:
            Failure: they cannot be made.
        """
        record = sandbox.record.workspace
        if record is None or opened.project is None or not record.layer:
            return
        layers = self.layers(sandbox.record.id)
        project = opened.project
        if record.layer == "overlay":
            kind: LayerKind = "overlay" if record.backend == "overlay" else "userxattr"
            # To its end: it is a handful of names, and a claim waits for it.
            with anyio.CancelScope(shield=True):
                make = functools.partial(layers.make_overlay, project.descriptor, kind)
                await anyio.to_thread.run_sync(make, limiter=self._workers)
            return

        def copy() -> Layers:
            with _readable(project.descriptor) as project_fd:
                report = layers.make_copy(project_fd, budget, tell)
            shares = report.shared and report.entries > 0
            changed["workspace"] = msgspec.structs.replace(record, backend="reflink" if shares else "copy")
            if report.skipped:
                listed = "; ".join(report.skipped[:SKIPPED_SHOWN_MAX])
                changed["warnings"] = (
                    *sandbox.record.warnings,
                    f"the copy is without {len(report.skipped)} of the project's files: {listed}",
                )
            return layers

        def tell(entries: int) -> None:
            anyio.from_thread.run_sync(progress, f"copied {entries} files", entries, None)

        changed: dict[str, object] = {}
        budget = Budget(
            entries_max=self._bounds.entries_max,
            bytes_max=self._bounds.bytes_max,
            seconds_max=self._bounds.seconds_max,
        )
        await self._work(copy, budget)
        sandbox.put(**changed)

    def note_backend(self, sandbox: Sandbox) -> None:
        """Write down what the engine turned out to have made the overlay with."""
        record = sandbox.record.workspace
        if record is not None and record.backend == "fuse-overlayfs":
            self.layers(sandbox.record.id).note_kind("fuse")

    async def erase(self, sandbox_id: str) -> None:
        """Remove what a sandbox wrote. Idempotent.

        Raises:
            OSError, RuntimeFailure, Failure: it cannot be removed now.
        """
        layers = self.layers(sandbox_id)
        if not os.path.lexists(layers.directory):
            return
        try:
            await anyio.to_thread.run_sync(layers.erase, limiter=self._workers)
        except PermissionError:
            # What an engine's overlay leaves beside its layer belongs to a user that the engine made up.
            await self._remove_foreign(layers.work)
            await anyio.to_thread.run_sync(layers.erase, limiter=self._workers)

    def unknown(self, known: Collection[str]) -> list[str]:
        """Ids of sandboxes that wrote something and are not among these."""
        try:
            return sorted(set(os.listdir(self._directory)) - set(known))
        except FileNotFoundError:
            return []

    async def erase_all(self, sandbox_ids: Collection[str]) -> None:
        """Remove what several sandboxes wrote."""
        for sandbox_id in sandbox_ids:
            logger.info("removing what a sandbox wrote that nobody knows: %s", sandbox_id)
            await self.erase(sandbox_id)

    # --- what is to be mounted ------------------------------------------------------------------------

    def sources(self, sandbox: Sandbox, opened: Opened, held: contextlib.ExitStack) -> list[MountSource]:
        """What is to be mounted into a sandbox, besides our own; see ``MountSource`` for how.

        Args:
            sandbox: Its layers are there: see ``fill``.
            opened: What was opened for it.
            held: Closes what is opened here.

        Raises:
            NotFound: its layers are gone.
        """
        sources = []
        record = sandbox.record.workspace
        if record is not None:
            sources.append(self._workspace_source(sandbox, record, opened, held))
        for mount, mount_record in zip(opened.mounts, sandbox.record.mounts, strict=True):
            sources.append(
                MountSource(
                    target=mount.target,
                    path=mount.opened.path,
                    descriptor=mount.opened.descriptor,
                    device=mount.opened.device,
                    inode=mount.opened.inode,
                    is_directory=mount.opened.is_directory,
                    read_only=mount.read_only,
                    is_mapped=mount_record.mounted == "idmapped",
                )
            )
        return sources

    def _workspace_source(
        self, sandbox: Sandbox, record: WorkspaceRecord, opened: Opened, held: contextlib.ExitStack
    ) -> MountSource:
        layers = self.layers(sandbox.record.id)
        is_mapped = record.mounted == "idmapped"
        if record.layer == "copy":
            try:
                descriptor = beneath.open_root(layers.copy)
            except OSError as error:
                raise NotFound("cannot find the copy of the project", detail=error.strerror or "") from None
            held.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            return MountSource(
                target=TARGET,
                path=layers.copy,
                descriptor=descriptor,
                device=status.st_dev,
                inode=status.st_ino,
                read_only=False,
                is_mapped=is_mapped,
            )
        assert opened.project is not None
        source = MountSource(
            target=TARGET,
            path=opened.project.path,
            descriptor=opened.project.descriptor,
            device=opened.project.device,
            inode=opened.project.inode,
            read_only=record.read_only,
            is_mapped=is_mapped,
        )
        if record.layer != "overlay":
            return source
        layers.require_project(layers.base(), source.descriptor)
        if record.backend == "overlay":
            overlay = layers.for_overlay(scratch=sandbox.stage_path("overlay"))
            return msgspec.structs.replace(source, overlay=overlay)
        return msgspec.structs.replace(source, engine_overlay=OverlayDirs(upper=layers.upper, work=layers.work))

    # --- diff, apply, reset ---------------------------------------------------------------------------

    async def diff(
        self, sandbox: Sandbox, paths: Collection[bytes], report: Callable[[Trees, list[Change], Budget], _T]
    ) -> _T:
        """Find what a sandbox changed, and what ``report`` makes of it, in a thread.

        Raises:
            Conflict: it works on the project itself.
            CapacityExceeded, Timeout: it is more than can be looked at.
        """
        layers = self._layers_of(sandbox)
        budget = _budget(DIFF_SECONDS_MAX)
        async with self._project(sandbox) as project_fd:

            def compare() -> _T:
                with layers.opened(project_fd) as trees:
                    return report(trees, changes(trees, budget, paths=paths), budget)

            return await self._work(compare, budget)

    async def compare(self, sandbox: Sandbox, paths: Collection[bytes]) -> Comparison:
        """Find what a sandbox changed, and what of it cannot be carried back without a loss. Raises as ``diff``."""
        base = self._layers_of(sandbox).base()

        def judge(trees: Trees, found: list[Change], _: Budget) -> Comparison:
            return Comparison(found=found, conflicts=_conflicts(found, base, trees))

        return await self.diff(sandbox, paths, judge)

    async def apply(self, sandbox: Sandbox, paths: Collection[bytes], *, force: bool) -> tuple[Comparison, Outcome]:
        """Carry changes back to the project. Whoever goes away meanwhile ends it between two files.

        What is written stays in the sandbox's layer as well, where it is the same as the project from then on: a
        layer that is mounted must not be changed behind the kernel's back.

        Raises:
            Conflict: something was changed in the project meanwhile, and ``force`` is not given; nothing was done.
            CapacityExceeded, Timeout: it is too much; what was carried back until then stays.
        """
        layers = self._layers_of(sandbox)
        budget = _budget(APPLY_SECONDS_MAX)
        outcome = Outcome()
        async with sandbox.lock, self._project(sandbox) as project_fd:

            def carry() -> Comparison:
                base = layers.base()
                with layers.opened(project_fd) as trees:
                    found = changes(trees, budget, paths=paths)
                    standing = _conflicts(found, base, trees)
                    if standing and not force:
                        raise _conflict_failure(sandbox, standing)
                    transfer = Transfer(
                        source_fd=trees.layer_fd,
                        target_fd=project_fd,
                        owner_of=_its_owner if self._may_mount else None,
                        check=True,
                    )
                    try:
                        apply(transfer, found, budget, outcome)
                    finally:
                        layers.settle(project_fd, outcome.touched)
                return Comparison(found=found, conflicts=standing)

            return await self._work(carry, budget), outcome

    async def reset(self, sandbox: Sandbox, paths: Collection[bytes]) -> tuple[list[Change], Outcome]:
        """Undo what a sandbox changed; return what undid it.

        Raises:
            Conflict: its overlay is mounted, and nobody can reach it from here: it is paused, or the engine's.
            Unsupported: only some paths, and the overlay is the engine's.
        """
        layers = self._layers_of(sandbox)
        record = sandbox.record.workspace
        assert record is not None
        budget = _budget(APPLY_SECONDS_MAX)
        outcome = Outcome()
        async with sandbox.lock, self._project(sandbox) as project_fd:
            runs = sandbox.record.state is State.RUNNING
            is_overlay = record.layer == "overlay"
            if is_overlay and not runs and sandbox.record.state not in _NOT_MOUNTED:
                raise Conflict(
                    f"cannot reset the overlay of a sandbox that is {sandbox.record.state.value}",
                    detail="it is mounted in there, and cannot be reached",
                    hint=f"sandboxctl stop {sandbox.record.id}",
                )
            if is_overlay and not self._may_mount and (runs or paths):
                raise _out_of_reach(sandbox, runs=runs)
            whole = is_overlay and not runs and not paths

            def undo() -> list[Change]:
                with layers.opened(project_fd) as trees:
                    found = changes(trees, budget, paths=paths)
                    if whole:
                        outcome.touched += [change.path for change in found]
                        layers.empty(project_fd)
                        return [msgspec.structs.replace(change, note="") for change in found]
                    undoing = reversed_changes(found)
                    with self._inside(sandbox, layers, trees, runs=runs) as target_fd:
                        transfer = Transfer(
                            source_fd=project_fd,
                            target_fd=target_fd,
                            owner_of=self._owner_inside(record, runs=runs) if self._may_mount else None,
                            check=False,
                        )
                        try:
                            apply(transfer, undoing, budget, outcome)
                        finally:
                            layers.settle(project_fd, outcome.touched)
                return undoing

            return await self._work(undo, budget), outcome

    def _layers_of(self, sandbox: Sandbox) -> Layers:
        record = sandbox.record.workspace
        if record is None or not record.layer:
            what = "it has no project" if record is None else "it works on the project itself"
            raise Conflict(
                f"cannot compare sandbox {sandbox.record.id} with its project",
                detail=what,
                hint="make one with --overlay or --copy",
            )
        return self.layers(sandbox.record.id)

    @contextlib.asynccontextmanager
    async def _project(self, sandbox: Sandbox) -> AsyncIterator[int]:
        """The project, open for reading."""
        assert sandbox.record.workspace is not None
        with contextlib.ExitStack() as held:
            opened = await self._look(open_workspace, path_of(sandbox.record.workspace), held)
            with _readable(opened.descriptor) as project_fd:
                yield project_fd

    @contextlib.contextmanager
    def _inside(self, sandbox: Sandbox, layers: Layers, trees: Trees, *, runs: bool) -> Iterator[int]:
        """What the sandbox sees as its project, to be written to.

        Of an overlay that is the overlay itself, never its layer: in the sandbox that runs, or mounted nowhere.
        """
        if trees.kind == "copy":
            yield trees.layer_fd
            return
        if runs:
            with _seen_by(sandbox) as target_fd:
                yield target_fd
            return
        status = os.fstat(trees.project_fd)
        source = MountSource(
            target=TARGET,
            path="",
            descriptor=trees.project_fd,
            device=status.st_dev,
            inode=status.st_ino,
            read_only=False,
            overlay=layers.for_overlay(scratch=sandbox.stage_path("overlay")),
        )
        mount_fd = source.detach(userns_fd=None)
        try:
            with _readable(mount_fd) as target_fd:
                yield target_fd
        finally:
            os.close(mount_fd)

    @staticmethod
    def _owner_inside(record: WorkspaceRecord, *, runs: bool) -> Callable[[Seen], Owner]:
        """Who owns a file of the project as it is seen where it is written."""
        if record.layer == "overlay" and record.mounted == "idmapped" and runs:
            return _swapped_owner
        return _its_owner

    async def _work(self, function: Callable[[], _T], budget: Budget | None = None) -> _T:
        """In a thread, to its end; told to stop when the caller goes away.

        Raises:
            OSError: turned into a ``Failure``.
        """
        outcome: list[_T] = []

        async def watch() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                if budget is not None:
                    budget.stop()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                outcome.append(await anyio.to_thread.run_sync(function, limiter=self._workers))
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            error = _alone(group)
            if isinstance(error, Stopped):
                await anyio.lowlevel.checkpoint()
            raise error from None
        return outcome[0]


def _alone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What ended the work, without the group around it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return Failure("cannot look at the project", detail=error.strerror or str(error))
    return error


def _budget(seconds_max: float) -> Budget:
    return Budget(entries_max=DIFF_ENTRIES_MAX, bytes_max=DIFF_BYTES_MAX, seconds_max=seconds_max)


def _conflicts(found: Collection[Change], base: Base, trees: Trees) -> dict[bytes, str]:
    return conflicts(found, base, trees.copied if trees.kind == "copy" else None)


def _conflict_failure(sandbox: Sandbox, conflicts: dict[bytes, str]) -> Conflict:
    listed = [f"{_in_one_line(path)}: {reason}" for path, reason in conflicts.items()]
    more = len(listed) - CONFLICTS_SHOWN_MAX
    if more > 0:
        listed[CONFLICTS_SHOWN_MAX:] = [f"and {more} more"]
    name = sandbox.record.name or sandbox.record.id
    return Conflict(
        f"cannot apply: {len(conflicts)} of the paths were changed in the project meanwhile",
        detail="; ".join(listed),
        hint=f"name other paths, or sandboxctl workspace apply --force {name}",
    )


def _in_one_line(path: bytes) -> str:
    """A name that a sandbox chose, for people: it begins no line of its own."""
    text = path.decode(errors="backslashreplace")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _out_of_reach(sandbox: Sandbox, *, runs: bool) -> Failure:
    name = sandbox.record.name or sandbox.record.id
    if runs:
        return Conflict(
            "cannot reset the overlay of a sandbox that runs",
            detail="its engine has mounted it, out of our reach",
            hint=f"sandboxctl stop {name}",
        )
    return Unsupported(
        "cannot reset only some paths of this overlay",
        detail="its engine mounts it, out of our reach",
        hint=f"sandboxctl workspace reset {name}",
    )


def _its_owner(seen: Seen) -> Owner:
    return seen.uid, seen.gid


def _swapped_owner(seen: Seen) -> Owner:
    return _swapped(seen.uid, SANDBOX_USER.uid), _swapped(seen.gid, SANDBOX_USER.uid)


def _swapped(number: int, other: int) -> int:
    return {0: other, other: 0}.get(number, number)


@contextlib.contextmanager
def _seen_by(sandbox: Sandbox) -> Iterator[int]:
    """The project as a sandbox sees it, by way of its init: nothing inside can put another directory there."""
    try:
        root_fd = os.open(f"/proc/{sandbox.pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Conflict("cannot reach what the sandbox sees", detail=error.strerror or "") from None
    try:
        target_fd = beneath.open_dir(root_fd, TARGET.lstrip("/").encode())
    finally:
        os.close(root_fd)
    try:
        yield target_fd
    finally:
        os.close(target_fd)


@contextlib.contextmanager
def _readable(descriptor: int) -> Iterator[int]:
    """The same directory, open for reading."""
    opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


# --- paths ----------------------------------------------------------------------------------------------


def _open_project(path: str, rules: Rules) -> OpenedPath:
    """As ``open_workspace``, with the look for a git worktree on the way: a claim feels every trip to a thread."""
    opened = open_workspace(path, rules)
    try:
        return msgspec.structs.replace(opened, says_worktree=gitworktree.says_worktree(opened.descriptor))
    except BaseException:
        os.close(opened.descriptor)
        raise


def _glance_at_project(path: str, rules: Rules) -> OpenedPath | None:
    """The same without a thread, of a project that was used lately, and is no worktree; None: of any other."""
    opened = glance_at_workspace(path, rules)
    if opened is None or gitworktree.surely_none(opened.descriptor):
        return opened
    os.close(opened.descriptor)
    return None


def path_of(record: WorkspaceRecord | MountRecord) -> str:
    """The host path that is written down."""
    return record.path if record.path_bytes is None else os.fsdecode(record.path_bytes)


def _given_path(path: str, path_bytes: bytes | None) -> str:
    return path if path_bytes is None else os.fsdecode(path_bytes)


def _bytes_if_odd(path: str) -> bytes | None:
    return None if _is_utf8(path) else os.fsencode(path)


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_nested(mounts: Sequence[OpenedMount]) -> None:
    """A place for the inner one would have to be made in the outer one, on the host."""
    targets = [mount.target for mount in mounts]
    for target in targets:
        if targets.count(target) > 1 or any(target.startswith(f"{other}/") for other in targets):
            raise InvalidArgument(f"cannot mount anything at {target!r}", detail="another mount is there, or above")


def project_paths(paths: Sequence[str], paths_bytes: Sequence[bytes]) -> list[bytes]:
    """Paths as they were typed, relative to the project, without doubt; none: the whole of it.

    Raises:
        InvalidArgument: one of them leads out of the project.
    """
    named = [_project_path(os.fsencode(path)) for path in paths] + [_project_path(path) for path in paths_bytes]
    return [] if b"" in named else named


def _project_path(path: bytes) -> bytes:
    inside = TARGET.encode()
    relative = posixpath.relpath(path, inside) if path.startswith(b"/") else posixpath.normpath(path)
    if relative == b"." or relative == b"":
        return b""
    if relative == b".." or relative.startswith(b"../") or b"\0" in path:
        raise InvalidArgument(
            f"cannot use the path {path.decode(errors='backslashreplace')!r}",
            detail="it is not in the project",
            hint="give a path that is relative to the project, or one below /workspace",
        )
    return relative
