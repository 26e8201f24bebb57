"""hack/stock, as far as it goes without a bed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "hack"))

from stock_bed import cache, checkout, main, process, roots  # noqa: E402
from stock_bed.process import BedError, run  # noqa: E402


def plan(**options: object) -> list[tuple[str, str]]:
    return main._plan(SimpleNamespace(**{"all": False, "release": None, "bed": None, **options}))  # type: ignore[arg-type]


def test_what_runs_where() -> None:
    """By itself what there is time for, and whatever is asked for."""
    assert set(plan()) < set(plan(all=True))
    assert len(plan(all=True)) == len(roots.RELEASES) * len(main.BEDS)
    assert plan(release=["bookworm"], bed=["machine"]) == [("bookworm", "machine")]
    assert plan(bed=["namespaces"]) == [("trixie", "namespaces"), ("bookworm", "namespaces")]


def test_the_readme_says_of_no_bed_that_it_ran_which_is_not_in_the_plan() -> None:
    """That a bed has its rows, and what is in them, is tested in the bed."""
    rows = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("bed |") or "both" in line
    ]
    said = set()
    for cells in ([cell.strip() for cell in row.strip("|").split("|")] for row in rows if "`hack/stock`" in row):
        (name,) = (release.name for release in roots.RELEASES.values() if release.title == cells[0])
        beds = {"`hack/stock`, both beds": set(main.BEDS), "`hack/stock`, the quick bed": {"namespaces"}}[cells[-1]]
        said |= {(name, bed) for bed in beds}
    assert said == set(main.PLAN)


def test_each_way_down_is_followed_by_a_look_and_all_but_the_last_by_a_new_beginning() -> None:
    went: list[str] = []
    bed: Any = SimpleNamespace(reboots={name: functools.partial(went.append, name) for name in ("one", "two")})
    steps = list(main._steps(bed, []))
    assert [after for after, _, _ in steps] == ["", "one", "two"]
    assert [tests for _, _, tests in steps] == [
        [main.TESTS],
        [main.AFTER_A_REBOOT, main.BEFORE_A_REBOOT],
        [main.AFTER_A_REBOOT],
    ]
    for _, reboot, _ in steps[1:]:
        assert reboot is not None
        reboot()
    assert went == ["one", "two"]
    assert list(main._steps(bed, ["tests/unit", "-x"])) == [("", None, ["tests/unit", "-x"])]
    for path in (main.TESTS, main.BEFORE_A_REBOOT, main.AFTER_A_REBOOT):
        assert (ROOT / path).exists()


def test_output_that_somebody_else_keeps_open_holds_nobody_up() -> None:
    """As the connection of an ssh that was killed does."""
    status, lines = main._pass_on(["sh", "-c", "sleep 300 & echo $!; exec sleep 301"], 1)
    (holder,) = lines
    os.kill(int(holder), signal.SIGKILL)
    assert status == 1


def test_programs_that_threads_run_can_be_ended() -> None:
    with ThreadPoolExecutor() as threads:
        running = threads.submit(run, ["sleep", "60"], timeout_s=50)
        while not process._running:
            time.sleep(0.01)
        process.end_all()
        with pytest.raises(BedError, match="failed with -15: sleep 60"):
            running.result()
    assert not process._running


@pytest.mark.parametrize(
    ("line", "closing"),
    [
        ("=================== 3 failed, 22 passed in 309.40s (0:05:09) ===================", "3 failed, 22 passed"),
        ("18 passed, 7 skipped in 7.28s", "18 passed, 7 skipped"),
        ("FIGURE exec: 1 passed in spirit", None),
    ],
)
def test_the_closing_line_of_pytest_is_found(line: str, closing: str | None) -> None:
    match = main._LAST_LINE.match(line)
    assert (match[1] if match else None) == closing


def test_what_was_made_here_stays_here() -> None:
    """An environment of this host's Python would not run inside."""
    for name, wanted in (("./.venv/bin/python", False), ("./a/__pycache__/x", False), ("./sandboxd/daemon.py", True)):
        assert (checkout._wanted(tarfile.TarInfo(name)) is not None) is wanted


def test_a_root_is_made_anew_when_what_goes_into_it_changes() -> None:
    keys = {cache.content_key(release) for release in roots.RELEASES.values()}
    assert len(keys) == len(roots.RELEASES)


def test_of_each_release_the_last_few_are_kept_and_none_that_is_in_use_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roots, "build", lambda root: root.key.write_text("key"))
    release = roots.RELEASES["trixie"]
    kept = []
    for number in range(cache.KEPT_MAX + 2):
        made = cache.ensure([release._replace(python=str(number))])[release.name]
        os.utime(made.directory, (number, number))
        kept.append(made)
    assert [root.directory.exists() for root in kept] == [False, False, *[True] * cache.KEPT_MAX]
    with cache.in_use(kept[-1]):
        cache.clean()
        assert kept[-1].directory.exists()
    cache.clean()
    assert [entry.name for entry in cache.directory().iterdir()] == ["lock"]


def test_a_step_is_bounded_and_says_what_it_was() -> None:
    with pytest.raises(BedError, match=r"not done after 0\.1 s: sleep 5"):
        run(["sleep", "5"], timeout_s=0.1)
    with pytest.raises(BedError, match=r"failed with 3: sh -c .*\nwhy"):
        run(["sh", "-c", "echo why >&2; exit 3"], timeout_s=30)
    with pytest.raises(BedError, match="cannot run no-such-program"):
        run(["no-such-program"], timeout_s=30)


def test_its_help_says_what_it_does() -> None:
    done = subprocess.run(
        [ROOT / "hack" / "stock", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "--bed" in done.stdout
    assert "hack/stock shell" in done.stdout
