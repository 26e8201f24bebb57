"""``workspace/*``."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sandboxd import diffing, protocol
from sandboxd.applying import Outcome
from sandboxd.connection import Context
from sandboxd.handlers.table import Handler
from sandboxd.manager import Manager
from sandboxd.timings import Timings
from sandboxd.trees import Budget, Change, Trees
from sandboxd.workspaces import project_paths

LISTED_MAX = 1000
CHANGED_MEANWHILE = "it was changed while it was looked at"


class WorkspaceHandlers:
    """What sandboxes did to their projects."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def table(self) -> dict[str, Handler]:
        """By method."""
        return {
            "workspace/diff": self.diff,
            "workspace/apply": self.apply,
            "workspace/reset": self.reset,
        }

    async def diff(self, params: protocol.WorkspaceDiffParams, _: Context) -> protocol.WorkspaceDiff:
        """Compare."""
        timings = Timings()
        paths = project_paths(params.paths, params.paths_bytes)

        def report(trees: Trees, found: list[Change], budget: Budget) -> diffing.Page:
            return diffing.page(trees, found, budget, offset=params.offset, patch=params.patch)

        page = await self._manager.workspaces.diff(self._manager.get(params.sandbox), paths, report)
        timings.mark("diff")
        return protocol.WorkspaceDiff(
            changes=page.changes, total=page.total, next_offset=page.next_offset, timings_ms=timings.as_dict()
        )

    async def apply(self, params: protocol.WorkspaceApplyParams, _: Context) -> protocol.WorkspaceApplied:
        """Carry back, or say what that would do."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        paths = project_paths(params.paths, params.paths_bytes)
        if params.dry_run:
            comparison, outcome = await self._manager.workspaces.compare(sandbox, paths), Outcome()
        else:
            comparison, outcome = await self._manager.workspaces.apply(sandbox, paths, force=params.force)
        timings.mark("apply")
        return _applied(comparison.found, comparison.conflicts, outcome, timings, dry_run=params.dry_run)

    async def reset(self, params: protocol.WorkspaceResetParams, _: Context) -> protocol.WorkspaceApplied:
        """Undo."""
        timings = Timings()
        sandbox = self._manager.get(params.sandbox)
        found, outcome = await self._manager.workspaces.reset(
            sandbox, project_paths(params.paths, params.paths_bytes)
        )
        timings.mark("reset")
        return _applied(found, {}, outcome, timings, dry_run=False)


def _applied(
    found: Collection[Change], conflicts: Mapping[bytes, str], outcome: Outcome, timings: Timings, *, dry_run: bool
) -> protocol.WorkspaceApplied:
    done = [change.path for change in found if outcome.is_done(change) and not (dry_run and change.path in conflicts)]
    standing = {**conflicts, **dict.fromkeys(outcome.changed_meanwhile, CHANGED_MEANWHILE)}
    failed = {change.path: change.note for change in found if change.note} | outcome.failed
    return protocol.WorkspaceApplied(
        applied=[_for_display(path) for path in done[:LISTED_MAX]],
        applied_total=len(done),
        conflicts=_problems(standing),
        failed=_problems(failed),
        dry_run=dry_run,
        timings_ms=timings.as_dict(),
    )


def _problems(reasons: Mapping[bytes, str]) -> list[protocol.WorkspaceProblem]:
    return [
        protocol.WorkspaceProblem(path=_for_display(path), path_bytes=None if _is_utf8(path) else path, reason=reason)
        for path, reason in list(reasons.items())[:LISTED_MAX]
    ]


def _for_display(path: bytes) -> str:
    return path.decode(errors="backslashreplace")


def _is_utf8(path: bytes) -> bool:
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True
