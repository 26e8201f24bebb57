"""The build hook: one program for wheels and editable installs, and a clear word when it cannot be built."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runtimes.init import binary
from tests.unit.init_harness import ROOT, load_build_hook

hook = load_build_hook()


def test_the_program_is_static_and_runs(tmp_path: Path) -> None:
    """It has to run in images that have no libc, or none at all."""
    output = tmp_path / "sandbox-init"
    hook.compile_init(output)
    assert subprocess.run([output, "--version"], capture_output=True, check=True).stdout.startswith(b"sandbox-init ")
    assert b"/ld-linux" not in output.read_bytes()
    assert os.access(output, os.X_OK)
    assert os.listdir(tmp_path) == ["sandbox-init"]


@pytest.mark.parametrize(("sanitize", "packages"), [(False, "libc6-dev"), (True, "libasan")])
def test_without_a_compiler_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sanitize: bool, packages: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(hook.InitBuildError) as caught:
        hook.compile_init(tmp_path / "out", sanitize=sanitize)
    assert packages in str(caught.value)
    assert "gcc: No such file" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_compiler_that_fails_is_quoted_and_the_next_one_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no static libc here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", f"{broken} -m64")
    hook.compile_init(tmp_path / "out")
    assert (tmp_path / "out").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(hook.InitBuildError, match="no static libc here"):
        hook.compile_init(tmp_path / "out")


def test_a_program_older_than_its_source_is_not_current(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert not hook.is_current(output)
    output.write_bytes(b"")
    os.utime(output, (1, 1))
    assert not hook.is_current(output)
    os.utime(output, (2**33, 2**33))
    assert hook.is_current(output)


def test_a_wheel_holds_the_program_and_is_tagged_for_this_platform(tmp_path: Path) -> None:
    """A pure wheel would be installed where the program cannot run; an ignored file is left out by default."""
    project, wheels = tmp_path / "project", tmp_path / "wheels"
    for folder in ("runtimes", "hack"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("sandbox-init", "__pycache__"))
    for file in ("pyproject.toml", ".gitignore", "LICENSE"):
        shutil.copy(ROOT / file, project / file)
    for stub in ("README.md", "sandboxd/__init__.py", "images/__init__.py"):
        (project / stub).parent.mkdir(exist_ok=True)
        (project / stub).touch()
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(argv, cwd=project, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith(f"-{hook.wheel_tag()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        member = archive.getinfo("runtimes/init/sandbox-init")
        assert member.external_attr >> 16 & 0o111 == 0o111
        assert not [name for name in archive.namelist() if name.endswith((".c", ".h"))]


def test_a_missing_program_is_an_error_with_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary, "__file__", str(tmp_path / "binary.py"))
    with pytest.raises(binary.InitBinaryMissing) as caught:
        binary.init_binary_path()
    assert "python hack/build_init.py" in caught.value.hint
    (tmp_path / "sandbox-init").write_bytes(b"")
    (tmp_path / "sandbox-init").chmod(0o755)
    assert binary.init_binary_path() == str(tmp_path / "sandbox-init")
